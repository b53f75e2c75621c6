"""Check everything that can be wrong with a run before its first shard."""

from __future__ import annotations

import logging
import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from hookx.capture.rows import stored_dtype
from hookx.capture.runner import Runner
from hookx.errors import StoreError, UsageError
from hookx.images.listing import ImageList, list_images
from hookx.keys import images_sha256
from hookx.layers.select import parse_selectors
from hookx.layers.tree import Target
from hookx.models import LoadedModel
from hookx.options import DTYPE_NAMES, ExtractOptions, list_paths, takes
from hookx.plan import DTYPES, LayerSpec, Plan, Shard, images_per_shard
from hookx.run.defaults import choose_batch_size, choose_workers
from hookx.run.ready import ready_model
from hookx.store.directory import PLAN, check_resumable, finished_shards, read_plan

log = logging.getLogger("hookx")


@dataclass(frozen=True)
class Job:
    """A run that has been checked and not begun."""

    out: Path
    plan: Plan
    model: LoadedModel
    images: ImageList
    targets: list[Target]
    runner: Runner
    workers: int
    decode_timeout_seconds: float
    strict: bool
    pending: list[Shard]

    @property
    def device(self) -> torch.device:
        return self.runner.device

    @property
    def workers_compute(self) -> bool:
        """Whether each worker runs a lane of its own, on one thread, as they do on the CPU.

        Where processes cannot be forked they only decode, as they do beside a GPU, which the main process feeds.
        """
        return self.device.type == "cpu" and self.workers > 0 and sys.platform == "linux"

    @property
    def bytes_to_write(self) -> int:
        return sum(map(len, self.pending)) * self.plan.bytes_per_image

    @property
    def bytes_free(self) -> int:
        return _bytes_free(self.out)


@takes(ExtractOptions)
def prepare(options: ExtractOptions) -> Job:
    """Check everything that can be wrong with a run, and write nothing.

    Raises:
        HookxError: an argument is wrong.
    """
    selectors, excluded = parse_selectors(options.layers), parse_selectors(options.exclude)
    if not selectors:
        raise UsageError("no layer is named", "name one: --layers avgpool    list them: hookx list-layers MODEL")
    batch_size: int | str = options.batch_size
    memory_format: str = options.memory_format
    listed = list_images(list_paths(options.images))
    directory = Path(options.out)
    # A resumed run keeps what was chosen automatically: on another device the choice could differ.
    begun = read_plan(directory) if (directory / PLAN).exists() else None
    if begun is not None:
        batch_size = begun.batch_size if batch_size == "auto" else batch_size
        memory_format = begun.memory_format if memory_format == "auto" else memory_format
    ready = ready_model(
        options.model,
        options.weights,
        options,
        selectors,
        excluded,
        device=options.device,
        precision=options.precision,
        memory_format=memory_format,
        preprocessing=options,
    )
    loaded, selection = ready.loaded, ready.selection
    for left_out in selection.left_out.values():
        log.info("left out: %s", left_out)
    specs = []
    for target in selection.targets:
        returned = stored_dtype(target)
        stored = DTYPE_NAMES[options.dtype] if options.dtype and returned in DTYPE_NAMES.values() else returned
        if stored not in DTYPES:
            raise UsageError(
                f"'{target.address}' is {returned}, which safetensors files cannot hold", "convert it: --dtype fp32"
            )
        specs.append(LayerSpec(str(target.address), target.shape, stored))

    bytes_per_image = sum(spec.bytes_per_image for spec in specs)
    batch_size = choose_batch_size(
        batch_size, ready.runner.device, ready.preprocessing.crop_px, len(listed), bytes_per_image
    )
    plan = Plan(
        model=loaded.name,
        weights=loaded.weights,
        layers=tuple(specs),
        preprocessing=ready.preprocessing,
        precision=options.precision,
        memory_format=ready.runner.memory_format,
        image_count=len(listed),
        images_sha256=images_sha256(listed.keys, listed.sizes_bytes),
        images_per_shard=images_per_shard(bytes_per_image, int(options.max_shard_size), options.shard_images),
        batch_size=batch_size,
        notes=loaded.notes,
    )
    check_resumable(directory, plan)
    finished = {shard.number for shard in finished_shards(directory, plan)}
    pending = [shard for shard in plan.shards if shard.number not in finished]
    batches = sum(math.ceil(len(shard) / batch_size) for shard in pending)
    job = Job(
        out=directory,
        plan=plan,
        model=loaded,
        images=listed,
        targets=selection.targets,
        runner=ready.runner,
        workers=min(choose_workers(options.workers, ready.runner.device), batches),
        decode_timeout_seconds=options.decode_timeout,
        strict=options.strict,
        pending=pending,
    )
    if job.bytes_to_write > job.bytes_free:
        raise StoreError(
            f"the activations need {job.bytes_to_write:,} bytes and {existing_parent(directory)} has "
            f"{job.bytes_free:,} free",
            "choose another --out, fewer --layers, a reduction such as @mean23, or --dtype fp16",
        )
    return job


def existing_parent(path: Path) -> Path:
    path = path.absolute()
    return path if path.exists() else existing_parent(path.parent)


def _bytes_free(path: Path) -> int:
    return shutil.disk_usage(existing_parent(path)).free
