"""The straight line: images, model and layers -> probe -> plan -> batches -> capture -> shards -> summary."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from hookx.batches import DECODE_TIMEOUT_SECONDS
from hookx.batches import batches as decoded_batches
from hookx.capture import RowCapture, stored_dtype
from hookx.choices import chosen_batch_size, chosen_workers, one_of
from hookx.errors import HookxError, ImageError, StoreError, UsageError
from hookx.filling import Filling, FillingAndWriting
from hookx.images import ImageList, list_images
from hookx.layers import Target, parse_selectors
from hookx.models import LoadedModel, ModelOptions
from hookx.plan import (
    DTYPES,
    IMAGES_PER_SHARD_AT_MOST,
    LayerSpec,
    Plan,
    Preprocessing,
    Shard,
    images_per_shard,
    images_sha256,
    parse_bytes,
)
from hookx.ready import PreprocessingOptions, ready_model
from hookx.store import (
    PLAN,
    RunDirectory,
    ShardRecord,
    Totals,
    check_resumable,
    finished_shards,
    read_plan,
    read_record,
)
from hookx.workers import keep_freed_memory, single_threaded
from hookx.writing import BatchWriter, ShardWriter

log = logging.getLogger("hookx")

_SHORT_DTYPES = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_FAILURES_SAID_ALOUD = 10
_PASSES_IN_FLIGHT = 2  # on a GPU, beside the one that is being asked for


@dataclass(frozen=True)
class Job:
    """A run of which everything has been checked and nothing has been done."""

    out: Path
    plan: Plan
    model: LoadedModel
    images: ImageList
    targets: list[Target]
    device: torch.device
    workers: int
    decode_timeout_seconds: float
    strict: bool
    pending: list[Shard]

    @property
    def workers_compute(self) -> bool:
        """On the CPU the workers compute what they decode: a small batch each, on one thread.

        Where processes cannot be forked they only decode, as they do beside a GPU, which one process feeds.
        """
        return self.device.type == "cpu" and (self.workers == 0 or sys.platform == "linux")

    @property
    def bytes_to_write(self) -> int:
        return sum(map(len, self.pending)) * self.plan.bytes_per_image

    @property
    def bytes_free(self) -> int:
        return _bytes_free(self.out)


@dataclass(frozen=True)
class Summary:
    """What a run did. The seconds of each part are of work, added up over the processes that shared it."""

    out: str
    model: str
    weights: str
    notes: tuple[str, ...]  # of the weights, such as what was unwrapped from a checkpoint
    preprocessing: Preprocessing
    layers: tuple[LayerSpec, ...]
    images: int  # rows stored
    failures: int
    shards: int
    shards_computed: int  # by this call; the others were there already
    images_computed: int
    bytes: int  # of activations
    device: str
    precision: str
    memory_format: str
    batch_size: int
    workers: int
    rotations_ignored: int
    counts: dict[str, dict[str, int]]  # address -> 'non_finite', 'all_zero' images, 'overflowed', 'flushed' values
    seconds_total: float
    seconds_reading: float
    seconds_model: float
    seconds_copying: float  # from a GPU
    seconds_writing: float
    busy: dict[str, float]  # 'reading', 'model', 'copying', 'writing' -> the share of the time for which it worked
    bound_by: str  # which of them the run waited for
    files: tuple[str, ...]


def extract(
    model: str,
    layers: str | Iterable[str],
    images: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    out: str | os.PathLike[str] = "features",
    progress: Callable[[int], None] = lambda images_done: None,
    **options: Any,
) -> Summary:
    """Store the activations of a folder of images; what `hookx extract` does.

    Running it again with the same arguments finishes what an interrupted run left, or finds it done.

    Args:
        model: a model's name, as `hookx.list_models()` gives it.
        layers: selectors: 'conv1,avgpool', or a list of them.
        images: folders and files.
        out: the directory for plan.json, the shards and the index.
        progress: called with the number of images finished since the last call.
        options: those of `prepare`.

    Raises:
        HookxError: whatever is wrong with the arguments, before the first shard; or the disk, on the way.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as out:
        ...     summary = extract("resnet18", "conv1,avgpool", "images", weights="none", out=out)
        >>> summary.images, [layer.shape for layer in summary.layers]
        (8, [(64, 112, 112), (512, 1, 1)])
    """
    return run(prepare(model, layers, images, out=out, **options), progress)


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
    batch_size = chosen_batch_size(batch_size, ready.device, ready.preprocessing.crop_px, len(listed), bytes_per_image)
    max_shard_bytes = parse_bytes(max_shard_size) if isinstance(max_shard_size, str) else max_shard_size
    plan = Plan(
        model=loaded.name,
        weights=loaded.weights,
        layers=tuple(specs),
        preprocessing=ready.preprocessing,
        precision=precision,
        memory_format=ready.memory_format,
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
        device=ready.device,
        workers=min(chosen_workers(workers, ready.device), batches),
        decode_timeout_seconds=decode_timeout,
        strict=strict,
        pending=pending,
    )
    if job.bytes_to_write > job.bytes_free:
        raise StoreError(
            f"the activations need {job.bytes_to_write:,} bytes and {_existing_parent(directory)} has "
            f"{job.bytes_free:,} free",
            "choose another --out, fewer --layers, a reduction such as @mean23, or --dtype fp16",
        )
    return job


def run(job: Job, progress: Callable[[int], None] = lambda images_done: None) -> Summary:
    """Compute the shards of a job that are pending, and write the index."""
    plan, clock = job.plan, _Clock()
    with RunDirectory(job.out, plan) as directory:
        if job.pending:
            _compute(job, directory, clock, progress)
        directory.publish_index()  # Written again on a finished run: it is small, and may be missing.
    return _summary(job, clock)


def _compute(job: Job, directory: RunDirectory, clock: _Clock, progress: Callable[[int], None]) -> None:
    plan, on_gpu = job.plan, job.device.type == "cuda"
    made = _made(plan.model, job.device, plan.batch_size)
    with (
        single_threaded() if job.device.type == "cpu" else contextlib.nullcontext(),
        ShardWriter(
            BatchWriter(
                directory,
                job.pending,
                plan.batch_size,
                functools.partial(_expected, job, made),
                at_once=_PASSES_IN_FLIGHT + 1 if on_gpu else 1,
                pin_memory=on_gpu,
            ),
            processes=max(1, job.workers) if job.workers_compute else 1,
        ) as writer,
        RowCapture(
            job.model.module,
            job.targets,
            device=job.device,
            precision=plan.precision,
            memory_format=plan.memory_format,
            forward=job.model.forward,
        ) as capture,
    ):
        filling = Filling(writer.batches, capture, plan.preprocessing, plan.batch_size)
        # The workers are forked here, before there are threads.
        batches = decoded_batches(
            job.images,
            [positions for shard in job.pending for positions in shard.batches(plan.batch_size)],
            plan.preprocessing,
            workers=job.workers,
            decode_timeout_seconds=job.decode_timeout_seconds,
            pin_memory=on_gpu,
            in_worker=functools.partial(_begin_worker, directory),
            transform=job.model.transform,
            consume=FillingAndWriting(filling) if job.workers_compute else None,
            device=job.device,
        )
        failures = _Failures(strict=job.strict)
        with contextlib.closing(batches):
            for shard in job.pending:
                expected = _expected(job, made, shard)
                record = ShardRecord(sizes_bytes=expected.sizes_bytes)
                in_flight: deque[tuple[range, int]] = deque()
                for positions in shard.batches(plan.batch_size):
                    batch = next(batches)
                    failures.say(batch.failures)
                    if job.workers_compute:
                        filled = batch.outcome
                        if isinstance(filled, HookxError):
                            raise filled
                        record.add_counts(filled.counts)
                        clock.model_seconds += filled.seconds
                        writer.add(filled.written)
                    else:
                        clock.model_seconds += filling(positions, batch.pixels_NCHW)
                        in_flight.append((positions, capture.passes))
                        if len(in_flight) > (_PASSES_IN_FLIGHT if on_gpu else 0):
                            _hand_over(in_flight, capture, writer)
                    clock.reading_seconds += batch.seconds
                    record.keys += batch.keys
                    record.failures += batch.failures
                    record.rotations_ignored += batch.rotations_ignored
                    progress(len(positions))
                while in_flight:
                    _hand_over(in_flight, capture, writer)
                record.add_counts(capture.take_counts())
                record.made = {**made, "batch_size": filling.images_at_once}
                writer.publish(record)
            writer.finish()
        failures.say_how_many_more()
        clock.model_seconds += capture.gpu_seconds
        clock.copying_seconds = capture.gpu_copying_seconds
        clock.writing_seconds = writer.seconds


def _expected(job: Job, made: Mapping[str, Any], shard: Shard) -> ShardRecord:
    """Return what a shard will say of itself if every image can be read."""
    positions = slice(shard.start, shard.stop)
    return ShardRecord(
        keys=list(job.images.keys[positions]),
        sizes_bytes=list(job.images.sizes_bytes[positions]),
        made=dict(made),
    )


def _hand_over(in_flight: deque[tuple[range, int]], capture: RowCapture, writer: ShardWriter) -> None:
    """Have the oldest batch written, once a GPU has copied it."""
    positions, passes = in_flight.popleft()
    capture.wait(passes)
    writer.add(writer.batches.write(positions))


class _Failures:
    """Says aloud which images cannot be read, up to a number."""

    def __init__(self, *, strict: bool) -> None:
        self._strict, self._count = strict, 0

    def say(self, failures: Sequence[tuple[str, str]]) -> None:
        for key, reason in failures:
            if self._strict:
                raise ImageError(f"cannot read '{key}': {reason}", "leave out --strict to go on without it")
            if self._count < _FAILURES_SAID_ALOUD:
                log.warning("cannot read '%s': %s", key, reason)
            self._count += 1

    def say_how_many_more(self) -> None:
        if self._count > _FAILURES_SAID_ALOUD:
            log.warning("and %d more that cannot be read; see failures.csv", self._count - _FAILURES_SAID_ALOUD)


def _begin_worker(directory: RunDirectory) -> None:
    directory.release()
    keep_freed_memory()
    # Only the thread that hands tensors over reports here, when the parent was killed in the middle of taking one.
    sys.excepthook = lambda *_: None


def _summary(job: Job, clock: _Clock) -> Summary:
    plan = job.plan
    totals = Totals()
    for shard in plan.shards:  # One record in memory at a time: a run can have millions of images.
        totals.add(read_record(job.out, plan, shard))
    return Summary(
        out=str(job.out),
        model=plan.model,
        weights=plan.weights,
        notes=plan.notes,
        preprocessing=plan.preprocessing,
        layers=plan.layers,
        images=totals.rows,
        failures=totals.failures,
        shards=len(plan.shards),
        shards_computed=len(job.pending),
        images_computed=sum(map(len, job.pending)),
        bytes=totals.rows * plan.bytes_per_image,
        device=_device_name(job.device),
        precision=plan.precision,
        memory_format=plan.memory_format,
        batch_size=plan.batch_size,
        workers=job.workers,
        rotations_ignored=totals.rotations_ignored,
        counts=totals.counts,
        seconds_total=round(clock.total_seconds, 3),
        seconds_reading=round(clock.reading_seconds, 3),
        seconds_model=round(clock.model_seconds, 3),
        seconds_copying=round(clock.copying_seconds, 3),
        seconds_writing=round(clock.writing_seconds, 3),
        busy=clock.busy(job),
        bound_by=clock.bound_by(job),
        files=tuple(str(job.out / plan.shard_file(shard)) for shard in plan.shards),
    )


class _Clock:
    """Seconds of work, by part, and what they say of the whole."""

    def __init__(self) -> None:
        self.reading_seconds = self.model_seconds = self.copying_seconds = self.writing_seconds = 0.0
        self._start = time.perf_counter()

    @property
    def total_seconds(self) -> float:
        return time.perf_counter() - self._start

    def busy(self, job: Job) -> dict[str, float]:
        workers = max(job.workers, 1)
        shares = {
            "reading": self.reading_seconds / workers,
            "model": self.model_seconds / (workers if job.workers_compute else 1),
            "copying": self.copying_seconds,
            "writing": self.writing_seconds,
        }
        return {part: round(seconds / self.total_seconds, 3) for part, seconds in shares.items()}

    def bound_by(self, job: Job) -> str:
        busy = self.busy(job)
        if job.workers_compute and busy["reading"] + busy["model"] > busy["writing"]:
            del busy["writing"]  # Reading and model share the workers, and together are what is waited for.
        return max(busy, key=lambda part: busy[part])


# --- choices -------------------------------------------------------------------------------------------------------


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _float_dtype(name: str) -> str:
    dtype = _SHORT_DTYPES.get(name, name)
    one_of("dtype", dtype, list(_SHORT_DTYPES.values()))
    return dtype


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    return path if path.exists() else _existing_parent(path.parent)


def _bytes_free(path: Path) -> int:
    return shutil.disk_usage(_existing_parent(path)).free


def _made(model: str, device: torch.device, batch_size: int) -> dict[str, Any]:
    source = {"timm": "timm", "hf": "transformers"}.get(model.partition(":")[0], "torchvision")
    return {
        "hookx": version("hookx-vision"),
        "torch": torch.__version__,
        source: version(source),
        "pillow": version("pillow"),
        "device": _device_name(device),
        "batch_size": batch_size,
    }
