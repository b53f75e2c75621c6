"""Is a run true? The model runs again on some of its rows, in the batches in which they were computed."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hookx.capture.rows import RowCapture
from hookx.capture.runner import MEMORY_FORMATS, PRECISIONS
from hookx.check.verify import Problem
from hookx.errors import ShardError, StoreError, UsageError
from hookx.images.decoding import check_decoding, decode, decode_jpegs, failure_reason, model_input
from hookx.images.listing import list_images
from hookx.keys import key_bytes
from hookx.layers.select import Selector
from hookx.models import LoadedModel, ModelOptions, list_models, load_model
from hookx.options import CheckpointOptions, RecomputeOptions, list_paths, takes
from hookx.plan import LayerSpec, Plan, Shard
from hookx.run.cores import single_threaded
from hookx.run.defaults import chosen_device
from hookx.run.ready import place_and_select
from hookx.store.directory import present_shards, read_plan
from hookx.store.format import open_shard
from hookx.store.record import ShardRecord, read_record

# Another order of the same sums, as a share of the row's largest magnitude. Between devices the arithmetic differs too
# (TensorFloat-32 has the 10 bits of a half).
_ROUNDING, _ROUNDING_OF_HALVES = 1e-4, 2e-2


@dataclass(frozen=True)
class RecomputedRow:
    """One row, and for every address its largest deviation, as a share of the row's largest magnitude; 0: same bits."""

    file: str
    row: int
    key: str
    deviations: dict[str, float]


@dataclass(frozen=True)
class Recomputation:
    """The rows that were computed again, and what is wrong with them: a deviation beyond rounding, a missing image."""

    device: str
    rows: tuple[RecomputedRow, ...]
    problems: tuple[Problem, ...]

    @property
    def deviations(self) -> dict[str, float]:
        """The largest deviation of each address."""
        return {address: max(row.deviations[address] for row in self.rows) for address in self.rows[0].deviations}

    @property
    def rows_with_same_bits(self) -> int:
        return sum(not any(row.deviations.values()) for row in self.rows)


@takes(RecomputeOptions)
def recompute(options: RecomputeOptions) -> Recomputation:
    """Run the model again on random rows of a run, each in the batch it was computed in, and compare.

    A model that is not one of torchvision's has to be named again, because building it may run code, which a plan alone
    must not decide.

    Raises:
        HookxError: the run, its model, its weights or the images are not to be had. Rows that deviate are reported in
            the result.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from hookx.run.run import extract
        >>> with TemporaryDirectory() as out:
        ...     _ = extract("resnet18", "conv1,avgpool", "images", weights="none", out=out)
        ...     again = recompute(out, 2, "images")
        >>> again.problems, sorted(again.deviations)
        ((), ['avgpool', 'conv1'])
    """
    if options.count < 1:
        raise UsageError(f"--recompute must be at least 1, got {options.count}")
    if options.options is not None:
        warnings.warn("recompute(options=...) is deprecated: give its fields as arguments", DeprecationWarning, 3)
    model_options = options.options or ModelOptions(**options.values_of(CheckpointOptions))
    count, device = options.count, options.device
    path = Path(options.path)
    plan = read_plan(path)
    if plan.precision not in PRECISIONS:
        raise StoreError(f"{path}/ was computed in '{plan.precision}', which this hookx does not know")
    if plan.memory_format not in MEMORY_FORMATS:
        raise StoreError(f"{path}/ was computed in '{plan.memory_format}', which this hookx does not know")
    chosen = _choose(path, plan, count, random.Random(options.seed))
    listed = list_images(list_paths(options.images))
    files = dict(zip(listed.keys, listed.files, strict=True))
    loaded = _load_again(plan, options.model, options.weights, model_options)
    on_device = chosen_device(device)
    if loaded.cpu_only and on_device.type != "cpu":
        raise UsageError(f"{plan.model} has integer layers that run on the CPU only", "write --device cpu")
    check_decoding(plan.preprocessing, on_device)
    selection = place_and_select(
        loaded,
        [Selector.parse(layer.address) for layer in plan.layers],
        crop_px=plan.preprocessing.crop_px,
        precision=plan.precision,
        memory_format=plan.memory_format,
        device=on_device,
    )
    if {str(target.address): target.shape for target in selection.targets} != {
        layer.address: layer.shape for layer in plan.layers
    }:
        raise StoreError(f"{plan.model} does not have the layers and shapes of {path}/")

    rows: list[RecomputedRow] = []
    problems: list[Problem] = []
    with (
        single_threaded() if on_device.type == "cpu" else nullcontext(),
        RowCapture(
            loaded.module,
            selection.targets,
            device=on_device,
            precision=plan.precision,
            memory_format=plan.memory_format,
            forward=loaded.forward,
        ) as capture,
    ):
        for shard, numbers in chosen.items():
            file, record = plan.shard_file(shard), read_record(path, plan, shard)
            for batch in _batches(plan, shard, record, numbers):
                try:
                    pixels_NCHW = torch.stack(
                        [_pixels_CHW(key, files, record, plan, loaded, on_device) for key in batch.keys]
                    )
                except StoreError as error:
                    problems += [Problem(file, f"row {row:,}: {error}") for row in batch.rows]
                    continue
                computed = _computed(capture, pixels_NCHW, plan)
                for row in batch.rows:
                    key = record.keys[row]
                    place = batch.keys.index(key)
                    deviations = {
                        layer.address: _deviation(_stored(path / file, layer, row), computed[layer.address][place])
                        for layer in plan.layers
                    }
                    rows.append(RecomputedRow(file, row, key, deviations))
                    on_another_device = str(record.made.get("device")).split(":")[0].split()[0] != on_device.type
                    for layer in plan.layers:
                        allowed = _rounding(plan, layer, on_another_device)
                        if not deviations[layer.address] <= allowed:
                            problems.append(
                                Problem(
                                    file,
                                    f"row {row:,} ('{key}') is not what {layer.address} returns: it deviates by "
                                    f"{deviations[layer.address]:.1e} of its largest value (rounding: {allowed:.0e})",
                                )
                            )
    return Recomputation(str(on_device), tuple(rows), tuple(problems))


def _choose(path: Path, plan: Plan, count: int, generator: random.Random) -> dict[Shard, list[int]]:
    """Choose rows out of all whole shards; in each, their numbers in order."""
    rows_of: dict[Shard, int] = {}
    for shard in present_shards(path, plan):
        try:
            rows_of[shard] = len(read_record(path, plan, shard).keys)
        except ShardError:
            continue  # `verify` names it.
    rows = sum(rows_of.values())
    if not rows:
        raise StoreError(f"{path}/ holds no row that could be computed again")
    numbers = sorted(generator.sample(range(rows), min(count, rows)))
    chosen: dict[Shard, list[int]] = {}
    first = 0
    for shard, rows_here in rows_of.items():
        here = [number - first for number in numbers if first <= number < first + rows_here]
        if here:
            chosen[shard] = here
        first += rows_here
    return chosen


def _load_again(plan: Plan, model: str | None, weights: str | None, options: ModelOptions) -> LoadedModel:
    """Build the run's model with the run's weights; what a plan says is never taken for a path, nor as code to run."""
    zoo = plan.model in list_models()
    if model is None and not zoo and not plan.model.startswith("timm:"):
        raise UsageError(
            f"the model of this run is '{plan.model}', and building it may run code",
            f"if you trust it, name it yourself: --model {plan.model}",
        )
    if model is not None and plan.model not in (model, Path(model).name):
        raise UsageError(f"the model of this run is '{plan.model}', and not '{model}'")
    if seeded := re.match(r"random \(seed (\d{1,18})\)", plan.weights):
        weights, options = weights or "none", replace(options, seed=int(seeded[1]))
    elif published := re.fullmatch(r"\w+_Weights\.(\w+)", plan.weights):
        weights = weights or published[1]
    elif zoo and weights is None:
        raise UsageError(f"the weights of this run are a file ({plan.weights})", "name it: --weights FILE")
    loaded = load_model(model or plan.model, weights or "default", options)
    if loaded.weights != plan.weights:
        raise StoreError(f"these are other weights ({loaded.weights}) than those of this run ({plan.weights})")
    return loaded


@dataclass(frozen=True)
class _Batch:
    keys: list[str]  # of the images that went through the model together
    rows: list[int]  # those of them that are to be compared


def _batches(plan: Plan, shard: Shard, record: ShardRecord, numbers: Sequence[int]) -> Iterator[_Batch]:
    """Find the batches of some rows: cut at multiples of the batch size, and what could not be read left out."""
    made_with = record.made.get("batch_size")
    batch_size = made_with if isinstance(made_with, int) and made_with > 0 else plan.batch_size
    row_of = {key: row for row, key in enumerate(record.keys)}
    keys = _keys_in_order(record)
    wanted = set(numbers)
    for positions in shard.batches(batch_size):
        together = [key for key in keys[positions.start - shard.start : positions.stop - shard.start] if key in row_of]
        rows = [row_of[key] for key in together if row_of[key] in wanted]
        if rows:
            yield _Batch(together, rows)


def _keys_in_order(record: ShardRecord) -> list[str]:
    return sorted([*record.keys, *(key for key, _ in record.failures)], key=key_bytes)


def _pixels_CHW(
    key: str, files: dict[str, str], record: ShardRecord, plan: Plan, loaded: LoadedModel, device: torch.device
) -> Tensor:
    # Keys are looked up among the images that the user named, and never opened as paths.
    if key not in files:
        raise StoreError(f"its batch needs the image '{key}', which is not among those named")
    sizes_bytes = dict(zip(_keys_in_order(record), record.sizes_bytes, strict=False))
    try:
        pixels_CHW, _ = decode(files[key], plan.preprocessing, sizes_bytes.get(key), loaded.transform)
        if pixels_CHW.ndim == 1:
            (decoded,) = decode_jpegs([pixels_CHW], plan.preprocessing, device)
            if not isinstance(decoded, Tensor):
                raise decoded
            return decoded
        return pixels_CHW.to(device)
    except Exception as error:  # As in a run: whatever a decoder raises.
        raise StoreError(f"its batch needs the image '{key}': {failure_reason(error)}") from None


def _computed(capture: RowCapture, pixels_NCHW: Tensor, plan: Plan) -> dict[str, Tensor]:
    computed = {
        layer.address: torch.empty((len(pixels_NCHW), *layer.shape), dtype=getattr(torch, layer.dtype))
        for layer in plan.layers
    }
    capture.run(model_input(pixels_NCHW, plan.preprocessing), computed)
    capture.wait()
    return computed


def _stored(file: Path, layer: LayerSpec, row: int) -> Tensor:
    with open_shard(file) as opened:
        rows: Tensor = opened.get_slice(layer.address)[row : row + 1]
    return rows[0]


def _deviation(stored: Tensor, computed: Tensor) -> float:
    """Return the largest difference as a share of the largest magnitude; infinite where only one is finite."""
    one, other = (_as_float64(tensor) for tensor in (stored, computed))
    same = (one == other) | (one.isnan() & other.isnan())
    if bool(same.all()):
        return 0.0
    magnitude = max(float(tensor.nan_to_num(0, 0, 0).abs().max()) for tensor in (one, other))
    difference = (one - other)[~same].abs().nan_to_num(nan=float("inf"))
    return float(difference.max()) / magnitude if magnitude else float("inf")


def _as_float64(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).flatten().to(torch.float64)


def _rounding(plan: Plan, layer: LayerSpec, on_another_device: bool) -> float:
    halves = plan.precision != "fp32" or layer.dtype in ("float16", "bfloat16")
    return _ROUNDING_OF_HALVES if halves or on_another_device else _ROUNDING
