"""Check everything that can be wrong with a run before its first shard."""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hookx.capture.rows import stored_dtype
from hookx.errors import HookxError, LayerError, OtherRunError, UsageError, one_line
from hookx.images.listing import ImageList
from hookx.layers.select import Selection, Target
from hookx.options import DTYPE_NAMES, ExtractOptions, takes
from hookx.plan import DTYPES, LayerSpec, Plan, Shard, images_per_shard
from hookx.run.defaults import choose_batch_size, choose_workers
from hookx.run.growth import explain
from hookx.run.listed import list_images_of, selectors_of
from hookx.run.made import describe_process, kind_of
from hookx.run.mended import as_begun, failing_shards
from hookx.run.parts import Part, describe_part
from hookx.run.ready import ReadyModel, ready_model, try_loader
from hookx.run.reuse import Reuse, plans_of, reuse_of
from hookx.run.room import bytes_free, check_room
from hookx.store.directory import begun_plan, check_resumable, finished_shards, present_shards
from hookx.store.location import Location, location_of

log = logging.getLogger("hookx")
_CONVERT = "convert it: --dtype fp32"


@dataclass(frozen=True)
class Job:
    """A run that has been checked and not begun."""

    options: ExtractOptions
    out: Location
    plan: Plan
    ready: ReadyModel
    images: ImageList
    workers: int
    pending: list[Shard]
    then_bytes: Sequence[int]  # the sizes of the images when the run was begun
    begun: Plan | None  # what the directory held by then
    replaced: frozenset[int]  # numbers of the pending shards that are there, without images that could not be read
    reuse: Reuse | None = None  # what is copied from other runs

    @property
    def part(self) -> Part | None:
        """The part that this process computes; None for every shard."""
        return Part.parse(self.options.shard)

    @property
    def device(self) -> torch.device:
        return self.ready.runner.device

    @property
    def workers_compute(self) -> bool:
        """Whether each worker runs a lane of its own, on one thread, as they do on the CPU.

        Where processes cannot be forked they only decode, as they do beside a GPU, which the main process feeds.
        """
        return self.device.type == "cpu" and self.workers > 0 and sys.platform == "linux"

    @property
    def image_count(self) -> int:
        """How many images this process is to account for, computed or not."""
        if self.part is None:
            return len(self.images)
        return sum(len(self.plan.shards[number]) for number in self.part.numbers(len(self.plan.shards)))

    @property
    def bytes_to_write(self) -> int:
        return sum(map(len, self.pending)) * self.plan.bytes_per_image

    @property
    def bytes_free(self) -> int | None:
        """How many bytes the output directory's file system has left; None for an object store."""
        return bytes_free(self.out) if isinstance(self.out, Path) else None


@takes(ExtractOptions)
def prepare(options: ExtractOptions) -> Job:
    """Check everything that can be wrong with a run, and write nothing; `HookxError` if an argument is wrong."""
    return prepare_listed(options, list_images_of(options))


def prepare_again(job: Job) -> Job:
    """Prepare a job once more, with what another process chose that has begun the run since."""
    return prepare_listed(job.options, job.images)


def prepare_listed(
    options: ExtractOptions, listed: ImageList, chosen_for: str | None = None, *, is_helper: bool = False
) -> Job:
    """Check a run of images that are listed already; see `prepare`.

    Args:
        chosen_for: a kind of device, in place of the one that computes here, for which the batch size and the memory
            format are chosen.
        is_helper: this process computes for another, which says which shards and has looked at those that are there.
    """
    selectors, excluded = selectors_of(options)
    out = location_of(options.out)
    # A resumed run keeps what was chosen automatically: on another device the choice could differ.
    begun = begun_plan(out)
    others = plans_of(options.reuse)
    chosen = begun or (others[0][1] if others else options)  # The rows of one kind of layout fit together.
    batch_size = chosen.batch_size if options.batch_size == "auto" else options.batch_size
    memory_format = chosen.memory_format if options.memory_format == "auto" else options.memory_format
    ready = ready_model(
        options.model, options.weights, options, selectors, excluded, memory_format, batch_size, chosen_for
    )
    selection, specs = _choose_types(ready.selection, options.dtype)
    ready = dataclasses.replace(ready, selection=selection)
    loaded, device = ready.loaded, ready.runner.device
    intended = torch.device(chosen_for) if chosen_for else device
    bytes_per_image = sum(spec.bytes_per_image for spec in specs)
    batch_size = choose_batch_size(batch_size, intended, ready.preprocessing.size_px, len(listed), bytes_per_image)
    plan = Plan(
        model=loaded.name,
        weights=loaded.weights,
        layers=tuple(specs),
        preprocessing=ready.preprocessing,
        precision=options.precision,
        memory_format=ready.runner.memory_format,
        image_count=len(listed),
        images_sha256=listed.sha256,
        images_per_shard=images_per_shard(bytes_per_image, int(options.max_shard_size), options.shard_images),
        batch_size=batch_size,
        notes=loaded.notes,
        hardware=kind_of(describe_process(ready, batch_size)) if options.same_hardware else (),
    )
    plan, then_bytes = as_begun(out, begun, plan, listed)
    try:
        check_resumable(out, plan)
    except OtherRunError as error:
        raise explain(error, out, plan, begun, listed) from None
    part = Part.parse(options.shard)
    # Every part would read every header, of hundreds of thousands; who writes the index reads them all.
    by_name = part is not None or is_helper
    finished = present_shards(out, plan, is_output=True) if by_name else finished_shards(out, plan)
    numbers = part.numbers(len(plan.shards)) if part else range(len(plan.shards))
    finished = [shard for shard in finished if shard.number in numbers]
    replaced = failing_shards(out, plan, finished) if options.retry_failures and not is_helper else frozenset()
    kept = {shard.number for shard in finished} - replaced
    pending = [plan.shards[number] for number in numbers if number not in kept]
    if part and not is_helper:
        log.info("part %s", describe_part(part, plan, len(pending)))
    batches = sum(math.ceil(len(shard) / batch_size) for shard in pending)
    workers = min(choose_workers(options.workers, device), batches)
    if reuse := reuse_of(others, plan, listed, pending):
        # What is copied is not computed: a pass ends with the last layer that some image lacks.
        targets = [target for target in selection.targets if str(target.address) in reuse.lacking]
        ready = dataclasses.replace(ready, selection=Selection(targets, selection.left_out))
    if pending and not is_helper:
        try_loader(ready, listed)
    ready = ready.settle() if pending and ready.selection.targets else ready
    job = Job(options, out, plan, ready, listed, workers, pending, then_bytes, begun, replaced, reuse)
    if not is_helper:
        check_room(out, pending, plan, options.scratch)
    return job


def _choose_types(selection: Selection, asked: str | None) -> tuple[Selection, list[LayerSpec]]:
    """Choose the type that each target is stored in; leave out what no file can hold and no selector names."""
    targets, specs, left_out = [], [], dict(selection.left_out)
    for target in selection.targets:
        address = str(target.address)
        try:
            specs.append(LayerSpec(address, target.shape, _type_of(target, asked)))
            targets.append(target)
        except HookxError as error:
            if target.is_named:
                raise
            left_out[address] = one_line(error)
            log.info("left out: %s", "; ".join(line.strip() for line in str(error).splitlines()))
    if not targets:
        raise LayerError("; ".join(left_out[str(target.address)] for target in selection.targets), _CONVERT)
    return Selection(targets, left_out), specs


def _type_of(target: Target, asked: str | None) -> str:
    """Return the type in which a target is stored; raise if no file can hold what it returns."""
    returned, wanted = stored_dtype(target), DTYPE_NAMES.get(asked or "", "")
    if wanted and "float" in returned:
        return wanted
    if returned in DTYPES:
        return returned
    if wanted == "float32" and returned.startswith("complex"):
        return "complex64"
    is_number = "float" in returned or returned.startswith("complex")
    raise UsageError(
        f"'{target.address}' is {returned}, which safetensors files cannot hold", *([_CONVERT] if is_number else [])
    )
