"""What a run did, and where its time went."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

from hookx.images.listing import Remarks
from hookx.plan import Plan, Shard
from hookx.run.parts import Part
from hookx.store.directory import present_shards
from hookx.store.location import Location, location_of
from hookx.store.record import Totals

if TYPE_CHECKING:
    from hookx.run.prepare import Job

T = TypeVar("T")


class Timing:
    """Seconds of work by part, added up over the processes that shared it, and which part was the slowest."""

    PARTS = ("reading", "nvjpeg", "model", "copying", "writing")

    def __init__(self, processes: Mapping[str, int], takes_turns: bool) -> None:
        self.total = self.reading = self.nvjpeg = self.model = self.copying = self.writing = 0.0
        self.processes = processes  # how many share a part
        # The processes that read run the model too: together, reading and model are what is waited for.
        self.takes_turns = takes_turns
        self._start = time.perf_counter()

    @classmethod
    def of(cls, job: Job) -> Timing:
        """Begin to measure a run in this process and its workers."""
        computing = job.workers if job.workers_compute else 1
        from hookx.run.nvjpeg import NVJPEG_THREADS  # imports torchvision, which who hands shards out does not need

        processes = {"reading": max(job.workers, 1), "model": computing, "nvjpeg": NVJPEG_THREADS}
        return cls(processes, job.device.type == "cpu" and (job.workers_compute or not job.workers))

    @property
    def seconds(self) -> dict[str, float]:
        return {part: getattr(self, part) for part in self.PARTS}

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add what another process has measured."""
        for part in self.PARTS:
            setattr(self, part, getattr(self, part) + seconds[part])

    def stop(self) -> None:
        self.total = time.perf_counter() - self._start

    @property
    def busy(self) -> dict[str, float]:
        """The share of the time for which each part worked."""
        parts = {"reading": self.reading, "model": self.model, "copying": self.copying, "writing": self.writing}
        if self.nvjpeg:
            parts["nvjpeg"] = self.nvjpeg
        return {part: round(seconds / self.processes.get(part, 1) / self.total, 3) for part, seconds in parts.items()}

    @property
    def bound_by(self) -> str:
        """The part that the others waited for."""
        busy = self.busy
        if self.takes_turns and busy["reading"] + busy["model"] > busy["writing"]:
            del busy["writing"]
        return max(busy, key=lambda part: busy[part])


def _derive(get: Callable[[Summary], T]) -> T:
    """Make a property whose type is that of the expression."""
    return cast(T, property(get))


@dataclass(frozen=True)
class Summary:
    """What a run did. The seconds of each part are of work, added up over the processes that shared it."""

    plan: Plan
    totals: Totals
    timing: Timing
    out: str
    device: str
    workers: int
    batch_size: int  # the largest that ran, in the last shard
    shards_computed: int  # by this call; the others were there already
    images_computed: int
    part: Part | None  # what this call computed; None: all of the run
    shards_finished: int  # of the run, by now and by whomever
    remarks: Remarks  # on the list of images

    model = _derive(lambda summary: summary.plan.model)
    weights = _derive(lambda summary: summary.plan.weights)
    notes = _derive(lambda summary: summary.plan.notes)  # on the weights, such as what was unwrapped from a checkpoint
    preprocessing = _derive(lambda summary: summary.plan.preprocessing)
    layers = _derive(lambda summary: summary.plan.layers)
    precision = _derive(lambda summary: summary.plan.precision)
    memory_format = _derive(lambda summary: summary.plan.memory_format)
    images = _derive(lambda summary: summary.totals.rows)  # stored
    failures = _derive(lambda summary: summary.totals.failures)
    not_taken = _derive(lambda summary: dict(summary.remarks.not_taken))  # files that are not images, by suffix
    columns = _derive(lambda summary: dict(summary.remarks.columns))  # what each holds, by name
    chosen = _derive(lambda summary: summary.remarks.chosen)  # the options that left images out
    rotations_ignored = _derive(lambda summary: summary.totals.rotations_ignored)
    reused = _derive(lambda summary: summary.totals.reused)  # activations that were copied from other runs
    ranges = _derive(lambda summary: summary.totals.ranges)  # images that use little of theirs, or go beyond it
    counts = _derive(lambda summary: summary.totals.counts)
    # Rows that were computed again in other company, and are the same; None if the run did not check itself.
    self_checked = _derive(lambda summary: summary.totals.self_checked)
    bytes = _derive(lambda summary: summary.totals.rows * summary.plan.bytes_per_image)  # of the activations
    shards = _derive(lambda summary: len(summary.plan.shards))
    seconds_total = _derive(lambda summary: round(summary.timing.total, 3))
    seconds_reading = _derive(lambda summary: round(summary.timing.reading, 3))
    seconds_nvjpeg = _derive(lambda summary: round(summary.timing.nvjpeg, 3))  # of threads that decode on a GPU
    seconds_model = _derive(lambda summary: round(summary.timing.model, 3))
    seconds_copying = _derive(lambda summary: round(summary.timing.copying, 3))  # from a GPU
    seconds_writing = _derive(lambda summary: round(summary.timing.writing, 3))
    busy = _derive(lambda summary: summary.timing.busy)  # a part -> the share of the time for which it worked
    bound_by = _derive(lambda summary: summary.timing.bound_by)  # the part that the run waited for

    @property
    def files(self) -> tuple[str, ...]:
        shards = self.plan.shards
        numbers = self.part.numbers(len(shards)) if self.part else range(len(shards))
        return tuple(str(location_of(self.out) / self.plan.shard_file(shards[number])) for number in numbers)

    @property
    def is_complete(self) -> bool:
        """Whether no shard of the run is missing."""
        return self.shards_finished == len(self.plan.shards)


def summarize(
    plan: Plan,
    out: Location,
    pending: Sequence[Shard],
    part: Part | None,
    totals: Totals,
    timing: Timing,
    *,
    device: str,
    workers: int,
    remarks: Remarks,
) -> Summary:
    """Describe a finished run by the totals of its shards; a part of a run by those that it has computed."""
    timing.stop()
    batch_size = totals.batch_size or plan.batch_size
    return Summary(
        plan=plan,
        totals=totals,
        timing=timing,
        out=str(out),
        device=device,
        workers=workers,
        batch_size=min(batch_size, max(map(len, (plan.shards[0], plan.shards[-1])))),
        shards_computed=len(pending),
        images_computed=sum(map(len, pending)),
        part=part,
        shards_finished=len(present_shards(out, plan)) if part else len(plan.shards),
        remarks=remarks,
    )
