"""Which part of a run a process computes: what `--shard` says, or what the scheduler that started it says.

A part is fixed by its number and by how many there are, not by who else is running: part 3 of 16 is every shard whose
number is 3 modulo 16. So parts need nothing from each other, the next start may have another number of them, and the
slow region of a list is spread over all. No torch.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from hookx.errors import UsageError
from hookx.options import ExtractOptions
from hookx.plan import Plan

log = logging.getLogger("hookx")
_SWITCH = "to compute every shard in this process: --shard all"


@dataclass(frozen=True)
class Part:
    """One of the parts of a run: the shards whose number is `number` modulo `count`.

    Example:
        >>> part = Part.parse("3/16")
        >>> str(part), list(part.numbers(40)), Part.parse("all")
        ('3/16', [3, 19, 35], None)
    """

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str | None) -> Part | None:
        """Read what `--shard` takes; None for every shard."""
        if text in (None, "all"):
            return None
        number, _, count = str(text).partition("/")
        return cls(int(number), int(count))

    def within(self, outer: Part | None) -> Part:
        """Return this part of an outer part."""
        return self if outer is None else Part(outer.number * self.count + self.number, outer.count * self.count)

    def numbers(self, shard_count: int) -> range:
        return range(self.number, shard_count, self.count)


@dataclass(frozen=True)
class Told:
    """What the environment says about this process: its part, the variables that say so, and who shares its host."""

    part: Part | None = None
    variables: tuple[str, ...] = ()
    place: int = 0  # among the processes of the run on this host
    neighbours: int = 1  # how many those are


def told_by(variables: Mapping[str, str]) -> Told:
    """Read the part that Slurm's arrays, srun, torchrun or Open MPI give a process; a task of an array can hold others.

    Raises:
        UsageError: an array's numbers have gaps, so that they do not say how many parts there are.

    Example:
        >>> told = told_by({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
        >>> str(told.part), told.place, told.neighbours, told.variables
        ('1/4', 1, 2, ('RANK', 'WORLD_SIZE'))
    """
    outer, said = _array_task(variables), ["SLURM_ARRAY_TASK_ID"]
    inner = Told()
    # The innermost launcher starts hookx: srun may start torchrun or mpirun, and their numbers count all nodes then.
    for rank, size, local_rank, local_size in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        # Not SLURM_NTASKS, which a script that sbatch runs has as well, once, without srun.
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""),
    ):
        if rank in variables and size in variables:
            part = _part_of(variables, rank, size)
            neighbours = _whole(variables, local_size, 1) if local_size else _tasks_on_node(variables)
            inner = Told(part, (rank, size), _whole(variables, local_rank, 0), neighbours)
            break
    if inner.part is None:
        part, names = outer, said if outer else []
    else:
        part, names = inner.part.within(outer), [*(said if outer else []), *inner.variables]
    return dataclasses.replace(inner, part=part, variables=tuple(names))


def as_told(options: ExtractOptions, variables: Mapping[str, str] | None = None) -> ExtractOptions:
    """Return the options with the part that the environment says, if `--shard` says nothing; say so in the log."""
    if options.shard is not None:
        return options
    told = told_by(os.environ if variables is None else variables)
    if told.part is None:
        return options
    log.info("part %s of the shards, by %s; %s", told.part, " and ".join(told.variables), _SWITCH)
    device = options.device
    if device == "auto" and told.neighbours > 1:
        from hookx.run.defaults import device_at  # imports torch

        device = device_at(told.place)
    return dataclasses.replace(options, shard=str(told.part), device=device)


def describe_part(part: Part, plan: Plan, pending: int) -> str:
    of_part, in_all = len(part.numbers(len(plan.shards))), len(plan.shards)
    return f"{part.number} of {part.count}: {of_part:,} of {in_all:,} shards, {pending:,} to compute"


def count_shared_cores(cores: int, variables: Mapping[str, str] | None = None) -> int:
    """Return how many of a host's cores belong to this process, if others of its run are there as well.

    Example:
        >>> count_shared_cores(32, {"LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "0"}), count_shared_cores(32, {})
        (4, 32)
        >>> count_shared_cores(32, {"SLURM_CPUS_PER_TASK": "6", "SLURM_JOB_ID": "1"})
        6
    """
    variables = os.environ if variables is None else variables
    for name in ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        if name in variables:
            return max(1, cores // max(1, _whole(variables, name, 1)))
    if "SLURM_JOB_ID" in variables:  # Slurm binds tasks to cores only where it is configured to.
        if own := _whole(variables, "SLURM_CPUS_PER_TASK", 0):
            return min(cores, own)
        if on_node := _whole(variables, "SLURM_CPUS_ON_NODE", 0):
            return min(cores, max(1, on_node // _tasks_on_node(variables)))
    return cores


def _array_task(variables: Mapping[str, str]) -> Part | None:
    if "SLURM_ARRAY_TASK_ID" not in variables:
        return None
    task = _whole(variables, "SLURM_ARRAY_TASK_ID", 0)
    first, last = (_whole(variables, f"SLURM_ARRAY_TASK_{name}", task) for name in ("MIN", "MAX"))
    step = max(1, _whole(variables, "SLURM_ARRAY_TASK_STEP", 1))
    count = _whole(variables, "SLURM_ARRAY_TASK_COUNT", (last - first) // step + 1)
    if count == 1:
        return None
    tasks = range(first, last + 1, step)
    if len(tasks) != count or task not in tasks:
        raise UsageError(
            f"the numbers of this Slurm array have gaps: {count} tasks from {first} to {last}, so they do not say how "
            "many parts there are",
            f"say it, as in --shard $SLURM_ARRAY_TASK_ID/{last + 1}, or submit --array=0-{last}",
            _SWITCH,
        )
    return Part(tasks.index(task), count)


def _part_of(variables: Mapping[str, str], rank: str, size: str) -> Part | None:
    number, count = _whole(variables, rank, 0), _whole(variables, size, 1)
    if not 0 <= number < count:
        raise UsageError(f"{rank} is {number} and {size} is {count}, which is not a part", _SWITCH)
    return Part(number, count) if count > 1 else None


def _tasks_on_node(variables: Mapping[str, str]) -> int:
    """Return how many tasks of a step run on this node: '2(x3),1' means 2 on nodes 0 to 2, and 1 on node 3."""
    node, seen = _whole(variables, "SLURM_NODEID", 0), 0
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", variables.get("SLURM_STEP_TASKS_PER_NODE", "")):
        seen += int(times or 1)
        if node < seen:
            return max(1, int(tasks))
    return 1


def _whole(variables: Mapping[str, str], name: str, default: int) -> int:
    text = variables.get(name, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"the variable {name} must be a whole number, got '{text}'", _SWITCH) from None
