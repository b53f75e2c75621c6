"""Check everything that can be wrong with a run before its first shard."""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hookx.capture.rows import stored_dtype
from hookx.capture.runner import Runner
from hookx.errors import StoreError, UsageError, one_of
from hookx.images.listing import ImageList, list_images
from hookx.keys import images_sha256
from hookx.layers.select import parse_selectors
from hookx.layers.tree import Target
from hookx.models import LoadedModel, ModelOptions
from hookx.options import PreprocessingOptions, parse_bytes
from hookx.plan import DTYPES, LayerSpec, Shard, images_per_shard
from hookx.plan.plan import IMAGES_PER_SHARD_AT_MOST, Plan
from hookx.run.defaults import chosen_batch_size, chosen_workers
from hookx.run.ready import ready_model
from hookx.run.workers import DECODE_TIMEOUT_SECONDS
from hookx.store.directory import PLAN, check_resumable, finished_shards, read_plan

log = logging.getLogger("hookx")
_SHORT_DTYPES = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Job:
    """A run of which everything has been checked and nothing has been done."""

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


def prepare(
    model: str,
    layers: str | Iterable[str],
    images: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    out: str | os.PathLike[str] = "features",
    weights: str = "default",
    seed: int = 0,
    weights_key: str | None = None,
    allow_missing: Sequence[str] = (),
    trust_checkpoint: bool = False,
    model_args: Mapping[str, str] | None = None,
    transform: str | None = None,
    exclude: str | Iterable[str] = (),
    batch_size: int | str = "auto",
    device: str = "auto",
    workers: int | None = None,
    decode_timeout: float = DECODE_TIMEOUT_SECONDS,
    precision: str = "fp32",
    memory_format: str = "auto",
    dtype: str | None = None,
    decode: str = "exact",
    resize: int | None = None,
    crop: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str | None = None,
    exif: str = "ignore",
    max_shard_size: str | int = "512MiB",
    shard_images: int = 4096,
    strict: bool = False,
) -> Job:
    """Check everything that can be wrong with a run, and write nothing. The arguments are the command's options."""
    selectors, excluded = parse_selectors(layers), parse_selectors(exclude)
    if not selectors:
        raise UsageError("no layer is asked for", "name one: --layers avgpool    list them: hookx list-layers MODEL")
    if shard_images < 1:
        raise UsageError(f"the shard images are {shard_images}; it is 1 or more")
    if shard_images > IMAGES_PER_SHARD_AT_MOST:
        raise UsageError(f"the shard images are {shard_images:,}; {IMAGES_PER_SHARD_AT_MOST:,} is the most")
    stored_as = None if dtype is None else _float_dtype(dtype)
    listed = list_images([images] if isinstance(images, str | os.PathLike) else images)
    directory = Path(out)
    # What was chosen automatically stays what it was: on another device the choice may be another.
    begun = read_plan(directory) if (directory / PLAN).exists() else None
    if begun is not None:
        batch_size = begun.batch_size if batch_size == "auto" else batch_size
        memory_format = begun.memory_format if memory_format == "auto" else memory_format
    ready = ready_model(
        model,
        weights,
        ModelOptions(
            seed=seed,
            weights_key=weights_key,
            allow_missing=tuple(allow_missing),
            trust_checkpoint=trust_checkpoint,
            model_args=dict(model_args or {}),
            transform=transform,
        ),
        selectors,
        excluded,
        device=device,
        precision=precision,
        memory_format=memory_format,
        preprocessing=PreprocessingOptions(resize, crop, mean, std, interpolation, exif, decode),
    )
    loaded, selection = ready.loaded, ready.selection
    for left_out in selection.left_out.values():
        log.info("left out: %s", left_out)
    specs = []
    for target in selection.targets:
        returned = stored_dtype(target)
        stored = stored_as if stored_as and returned in _SHORT_DTYPES.values() else returned
        if stored not in DTYPES:
            raise UsageError(f"'{target.address}' is {returned}, which a safetensors file cannot hold", "give --dtype")
        specs.append(LayerSpec(str(target.address), target.shape, stored))

    bytes_per_image = sum(spec.bytes_per_image for spec in specs)
    batch_size = chosen_batch_size(
        batch_size, ready.runner.device, ready.preprocessing.crop_px, len(listed), bytes_per_image
    )
    max_shard_bytes = parse_bytes(max_shard_size) if isinstance(max_shard_size, str) else max_shard_size
    plan = Plan(
        model=loaded.name,
        weights=loaded.weights,
        layers=tuple(specs),
        preprocessing=ready.preprocessing,
        precision=precision,
        memory_format=ready.runner.memory_format,
        image_count=len(listed),
        images_sha256=images_sha256(listed.keys, listed.sizes_bytes),
        images_per_shard=images_per_shard(bytes_per_image, max_shard_bytes, shard_images),
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
        workers=min(chosen_workers(workers, ready.runner.device), batches),
        decode_timeout_seconds=decode_timeout,
        strict=strict,
        pending=pending,
    )
    if job.bytes_to_write > job.bytes_free:
        raise StoreError(
            f"the activations need {job.bytes_to_write:,} bytes and {existing_parent(directory)} has "
            f"{job.bytes_free:,} free",
            "choose another --out, fewer --layers, a reduction such as @mean23, or --dtype fp16",
        )
    return job


def _float_dtype(name: str) -> str:
    dtype = _SHORT_DTYPES.get(name, name)
    one_of("dtype", dtype, list(_SHORT_DTYPES.values()))
    return dtype


def existing_parent(path: Path) -> Path:
    path = path.absolute()
    return path if path.exists() else existing_parent(path.parent)


def _bytes_free(path: Path) -> int:
    return shutil.disk_usage(existing_parent(path)).free
