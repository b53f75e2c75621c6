"""The straight line: images, model and layers -> probe -> plan -> batches -> capture -> shards -> summary."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from hookx.batches import DECODE_TIMEOUT_SECONDS
from hookx.batches import batches as decoded_batches
from hookx.capture import RowCapture, stored_dtype
from hookx.errors import HookxError, ImageError, StoreError, UsageError
from hookx.hooks import PRECISIONS, module_classes
from hookx.images import ImageList, list_images
from hookx.layers import Layer, Selection, Selector, Target, closest, matched_paths, parse_selectors, select
from hookx.models import LoadedModel, ModelOptions, load_model, skeleton
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
from hookx.probe import example_images, probe
from hookx.store import RunDirectory, ShardRecord, ShardWriter, Totals, check_resumable, finished_shards, read_record

log = logging.getLogger("hookx")

_SHORT_DTYPES = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_FAILURES_SAID_ALOUD = 10


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
    def bytes_to_write(self) -> int:
        return sum(map(len, self.pending)) * self.plan.bytes_per_image

    @property
    def bytes_free(self) -> int:
        return _bytes_free(self.out)


@dataclass(frozen=True)
class Summary:
    """What a run did. Times are seconds that the run spent on, or waited for, each part."""

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
    batch_size: int
    rotations_ignored: int
    counts: dict[str, dict[str, int]]  # address -> 'non_finite', 'all_zero' images, 'overflowed', 'flushed' values
    seconds_total: float
    seconds_reading: float
    seconds_model: float
    seconds_writing: float
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
    batch_size: int = 32,
    device: str = "auto",
    workers: int | None = None,
    decode_timeout: float = DECODE_TIMEOUT_SECONDS,
    precision: str = "fp32",
    dtype: str | None = None,
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
    for name, value in (("batch size", batch_size), ("shard images", shard_images)):
        if value < 1:
            raise UsageError(f"the {name} is {value}; it is 1 or more")
    if shard_images > IMAGES_PER_SHARD_AT_MOST:
        raise UsageError(f"the shard images are {shard_images:,}; {IMAGES_PER_SHARD_AT_MOST:,} is the most")
    stored_as = None if dtype is None else _float_dtype(dtype)
    listed = list_images([images] if isinstance(images, str | os.PathLike) else images)
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
        preprocessing=PreprocessingOptions(resize, crop, mean, std, interpolation, exif),
    )
    loaded, preprocessing, chosen_device, selection = ready.loaded, ready.preprocessing, ready.device, ready.selection
    for left_out in selection.left_out.values():
        log.info("left out: %s", left_out)
    specs = []
    for target in selection.targets:
        returned = stored_dtype(target)
        stored = stored_as if stored_as and returned in _SHORT_DTYPES.values() else returned
        if stored not in DTYPES:
            raise UsageError(f"'{target.address}' is {returned}, which a safetensors file cannot hold", "give --dtype")
        specs.append(LayerSpec(str(target.address), target.shape, stored))

    max_shard_bytes = parse_bytes(max_shard_size) if isinstance(max_shard_size, str) else max_shard_size
    plan = Plan(
        model=loaded.name,
        weights=loaded.weights,
        layers=tuple(specs),
        preprocessing=preprocessing,
        precision=precision,
        memory_format="contiguous",
        image_count=len(listed),
        images_sha256=images_sha256(listed.keys, listed.sizes_bytes),
        images_per_shard=images_per_shard(sum(s.bytes_per_image for s in specs), max_shard_bytes, shard_images),
        batch_size=batch_size,
        notes=loaded.notes,
    )
    directory = Path(out)
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
        device=chosen_device,
        workers=min(_default_workers(chosen_device) if workers is None else workers, batches),
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


@dataclass(frozen=True)
class PreprocessingOptions:
    """What a user asks of the preprocessing in place of what came with the weights; None: as it came."""

    resize: int | None = None
    crop: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    interpolation: str | None = None
    exif: str = "ignore"


@dataclass(frozen=True)
class ReadyModel:
    """A model on its device, its skeleton, what prepares its images, and what selectors name in it."""

    loaded: LoadedModel
    bare: LoadedModel
    preprocessing: Preprocessing
    device: torch.device
    selection: Selection


def ready_model(
    model: str,
    weights: str,
    options: ModelOptions,
    selectors: Sequence[Selector],
    excluded: Sequence[Selector] = (),
    *,
    device: str,
    precision: str,
    preprocessing: PreprocessingOptions,
) -> ReadyModel:
    """Build a model and find the layers in it; what is wrong with them shows before any weights are loaded."""
    _one_of("precision", precision, list(PRECISIONS))
    _one_of("exif", preprocessing.exif, ["ignore", "apply"])
    chosen_device = resolve_device(device)
    bare = skeleton(model, weights, options)
    prepares = _overridden(bare.preprocessing, preprocessing)
    paths = matched_paths(selectors, module_classes(bare.module), model)
    matched_paths(excluded, module_classes(bare.module), model)
    if selectors:
        images_without_memory = example_images(bare.module, prepares.crop_px)
        select(selectors, probe(bare.module, images_without_memory, paths=paths, forward=bare.forward), model, excluded)

    loaded = load_model(model, weights, options)
    log.info("weights: %s", loaded.weights)
    for note in loaded.notes:
        log.info("%s", note)
    if loaded.cpu_only and chosen_device.type != "cpu":
        if device != "auto":
            raise UsageError(f"{model} has integer layers that run on the CPU only", "write --device cpu")
        chosen_device = torch.device("cpu")
    selection = Selection()
    if selectors:
        selection = place_and_select(
            loaded, selectors, excluded, crop_px=prepares.crop_px, precision=precision, device=chosen_device
        )
    loaded.module.to(chosen_device)
    return ReadyModel(loaded, bare, prepares, chosen_device, selection)


def place_and_select(
    loaded: LoadedModel,
    selectors: Sequence[Selector],
    excluded: Sequence[Selector] = (),
    *,
    crop_px: int,
    precision: str,
    device: torch.device,
) -> Selection:
    """Move a model to its device, and probe it there: what the selectors name in it."""
    loaded.module.to(device)
    # Published weights can lack a module that their architecture has: GoogLeNet's auxiliary classifiers.
    classes = module_classes(loaded.module)
    paths = matched_paths(selectors, classes, loaded.name)
    # Those that the weights did not hold are probed too, for their place in the order of execution.
    paths = list(dict.fromkeys([*paths, *(path for path in classes if _is_within(path, loaded.random_paths))]))
    examples_NCHW = example_images(loaded.module, crop_px).to(device)
    try:
        probed = probe(loaded.module, examples_NCHW, paths=paths, precision=precision, forward=loaded.forward)
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(len(examples_NCHW), error) from None
    selection = select(selectors, probed, loaded.name, excluded)
    _warn_of_random_modules(loaded, probed, selection)
    return selection


def _warn_of_random_modules(loaded: LoadedModel, probed: Sequence[Layer], selection: Selection) -> None:
    """Warn of targets that run after, or inside of, modules which the weights did not hold."""
    order = [layer.path for layer in probed]
    random = [path for path in order if _is_within(path, loaded.random_paths)]
    for target in selection.targets:
        path = target.address.path
        before = [other for other in random if order.index(other) <= order.index(path)]
        inside = [other for other in loaded.random_paths if path == "." or other.startswith(f"{path}.")]
        if before or inside:
            log.warning(
                "'%s' depends on random weights: those of %s were missing", target.address, (before + inside)[0]
            )


def _is_within(path: str, paths: Sequence[str]) -> bool:
    return any(path == other or path.startswith(f"{other}.") for other in paths)


def run(job: Job, progress: Callable[[int], None] = lambda images_done: None) -> Summary:
    """Compute the shards of a job that are pending, and write the index."""
    plan, clock = job.plan, _Clock()
    with RunDirectory(job.out, plan) as directory:
        if job.pending:
            _compute(job, directory, clock, progress)
        with clock.writing:
            directory.publish_index()  # Written again on a finished run: it is small, and may be missing.
    return _summary(job, clock)


def _compute(job: Job, directory: RunDirectory, clock: _Clock, progress: Callable[[int], None]) -> None:
    plan, device = job.plan, job.device
    on_gpu = device.type == "cuda"
    positions = [batch for shard in job.pending for batch in shard.batches(plan.batch_size)]
    # The decoding processes are forked here, before the writer's thread exists.
    batches = decoded_batches(
        job.images,
        positions,
        plan.preprocessing,
        workers=job.workers,
        decode_timeout_seconds=job.decode_timeout_seconds,
        pin_memory=on_gpu,
        in_worker=functools.partial(_begin_worker, directory),
        transform=job.model.transform,
    )
    said_aloud, images_at_once = 0, plan.batch_size
    with (
        contextlib.closing(batches),
        ShardWriter(directory, capacity=max(map(len, job.pending)), pin_memory=on_gpu) as writer,
        RowCapture(
            job.model.module, job.targets, device=device, precision=plan.precision, forward=job.model.forward
        ) as capture,
    ):
        for shard in job.pending:
            with clock.writing:
                buffer = writer.buffer()
            record = ShardRecord(sizes_bytes=list(job.images.sizes_bytes[shard.start : shard.stop]))
            for _ in shard.batches(plan.batch_size):
                with clock.reading:
                    batch = next(batches)
                for key, reason in batch.failures:
                    if job.strict:
                        raise ImageError(f"cannot read '{key}': {reason}", "leave out --strict to go on without it")
                    if said_aloud < _FAILURES_SAID_ALOUD:
                        log.warning("cannot read '%s': %s", key, reason)
                    said_aloud += 1
                if batch.pixels_NCHW is not None:
                    start, stop = len(record.keys), len(record.keys) + len(batch.keys)
                    rows = {address: tensor[start:stop] for address, tensor in buffer.items()}
                    with clock.model:
                        pixels_NCHW = batch.pixels_NCHW.to(device, non_blocking=on_gpu)
                        images_at_once = _run_in_parts(capture, pixels_NCHW, rows, images_at_once)
                record.keys += batch.keys
                record.failures += batch.failures
                record.rotations_ignored += batch.rotations_ignored
                progress(len(batch.positions))
            if on_gpu:
                with clock.model:
                    torch.cuda.synchronize(device)  # The copies into the buffer were only queued.
            record.counts = capture.take_counts()
            record.made = _made(plan.model, device, min(plan.batch_size, images_at_once))
            writer.publish(shard, buffer, record)
        with clock.writing:
            writer.finish()
    if said_aloud > _FAILURES_SAID_ALOUD:
        log.warning("and %d more that cannot be read; see failures.csv", said_aloud - _FAILURES_SAID_ALOUD)


def _begin_worker(directory: RunDirectory) -> None:
    directory.release()
    # Only the thread that hands tensors over reports here, when the parent was killed in the middle of taking one.
    sys.excepthook = lambda *_: None


def _run_in_parts(
    capture: RowCapture, pixels_NCHW: torch.Tensor, rows: Mapping[str, torch.Tensor], images_at_once: int
) -> int:
    """Run a batch, in halves of halves if the device's memory is too small; return how many images it held."""
    start = 0
    while start < len(pixels_NCHW):
        stop = min(start + images_at_once, len(pixels_NCHW))
        try:
            capture.run(pixels_NCHW[start:stop], {address: tensor[start:stop] for address, tensor in rows.items()})
            start = stop
        except torch.OutOfMemoryError as error:
            if stop - start == 1:
                raise _out_of_memory(1, error) from None
            images_at_once = (stop - start) // 2
            log.warning("out of memory with %d images at once: going on with %d", stop - start, images_at_once)
    return images_at_once


def _out_of_memory(images_at_once: int, error: torch.OutOfMemoryError) -> HookxError:
    return HookxError(
        f"the device has too little memory for {images_at_once} images at once: {str(error).splitlines()[0]}",
        "try --precision bf16, a smaller --crop, or --device cpu",
    )


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
        batch_size=plan.batch_size,
        rotations_ignored=totals.rotations_ignored,
        counts=totals.counts,
        seconds_total=round(clock.total_seconds, 3),
        seconds_reading=round(clock.reading.seconds, 3),
        seconds_model=round(clock.model.seconds, 3),
        seconds_writing=round(clock.writing.seconds, 3),
        files=tuple(str(job.out / plan.shard_file(shard)) for shard in plan.shards),
    )


class _Stopwatch:
    """Adds up the time spent inside its `with` blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start


class _Clock:
    def __init__(self) -> None:
        self.reading, self.model, self.writing = _Stopwatch(), _Stopwatch(), _Stopwatch()
        self._start = time.perf_counter()

    @property
    def total_seconds(self) -> float:
        return time.perf_counter() - self._start


# --- choices -------------------------------------------------------------------------------------------------------


def resolve_device(name: str) -> torch.device:
    """Turn 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps' into a device; `UsageError` for one that is absent."""
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        else:
            name = "cpu"
    present = ["cpu", *(["mps"] if torch.backends.mps.is_available() else [])]
    if torch.cuda.is_available():
        present += ["cuda", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    if name not in present:
        raise UsageError(
            f"there is no device '{name}' here; there is: {', '.join(present)}", "or let hookx choose: --device auto"
        )
    return torch.device(name)


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _default_workers(device: torch.device) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # On the CPU the forward pass needs the cores itself, and decoding is the lighter half.
    return max(1, cores // 2 if device.type == "cpu" else cores - 1)


def _float_dtype(name: str) -> str:
    dtype = _SHORT_DTYPES.get(name, name)
    _one_of("dtype", dtype, list(_SHORT_DTYPES.values()))
    return dtype


def _one_of(what: str, value: str, known: list[str]) -> None:
    if value not in known:
        raise UsageError(f"'{value}' is not a {what}; closest: {closest(value, known, len(known))}")


def _overridden(preprocessing: Preprocessing, options: PreprocessingOptions) -> Preprocessing:
    """Return the preprocessing of the weights with what the user asked for instead."""
    wanted = {name: value for name, value in vars(options).items() if name != "exif" and value is not None}
    if preprocessing.custom and wanted:
        raise UsageError(
            f"this model brings a preprocessing of its own ({preprocessing}), which no option can change",
            "leave out --resize, --crop, --mean, --std and --interpolation",
        )
    names = {"resize": "resize_px", "crop": "crop_px"}
    asked: dict[str, Any] = {
        names.get(name, name): tuple(map(float, value)) if name in ("mean", "std") else value
        for name, value in wanted.items()
    }
    changed = dataclasses.replace(preprocessing, exif=options.exif, **asked)
    if min(changed.resize_px, changed.crop_px) < 1 or changed.crop_px > changed.resize_px:
        raise UsageError(
            f"cannot crop {changed.crop_px} pixels out of {changed.resize_px}", "give both: --resize 256 --crop 224"
        )
    if len(changed.mean) != 3 or len(changed.std) != 3 or 0.0 in changed.std:
        raise UsageError("mean and std are three numbers each, and no std is 0", "as in --mean 0.485,0.456,0.406")
    _one_of(
        "interpolation",
        changed.interpolation,
        ["nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos"],
    )
    return changed


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
