"""Run the model again on some rows of a run, in the batches they were computed in and in others, and compare."""

from __future__ import annotations

import random
import warnings
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from hookx.capture.arithmetic import PRECISIONS
from hookx.capture.rows import RowCapture
from hookx.capture.runner import MEMORY_FORMATS, Runner
from hookx.capture.second_look import Rows, SecondLook
from hookx.check.verify import Problem
from hookx.errors import CaptureError, ShardError, StoreError, UnreadableError, UsageError
from hookx.images.decoding import check_decoding, decode, decode_jpegs, failure_reason, model_input
from hookx.images.files import File
from hookx.images.listing import list_images
from hookx.keys import key_bytes
from hookx.layers.select import Selector, Target
from hookx.models import LoadedModel, borrowed_models, load_model, may_run_code
from hookx.options import CheckpointOptions, Fit, ModelOptions, RecomputeOptions, list_paths, takes
from hookx.plan import Plan, Shard, WeightsIdentity
from hookx.run.defaults import choose_device, single_threaded
from hookx.run.ready import place_and_select, settle_passes
from hookx.store.directory import present_shards, read_plan
from hookx.store.location import Location, location_of
from hookx.store.record import read_record
from hookx.store.shard_rows import ShardRows

# Largest deviations that rounding explains, as a share of the row's largest magnitude. Sums in another order differ
# slightly; another device also has other arithmetic (TensorFloat-32 has the 10 bits of a half).
_MAX_ROUNDING, _MAX_ROUNDING_OF_HALVES = 1e-4, 2e-2
_NEIGHBOURS = 2  # images of another batch, beside those that are computed again


@dataclass(frozen=True)
class RecomputedRow:
    """One row, and its largest deviation at each address, as a share of the row's largest magnitude; 0: same bits."""

    file: str
    row: int
    key: str
    deviations: dict[str, float]


@dataclass(frozen=True)
class Recomputation:
    """The rows that were computed again, and their problems: deviations beyond rounding, missing or changed images."""

    device: str
    rows: tuple[RecomputedRow, ...]
    problems: tuple[Problem, ...]

    @property
    def deviations(self) -> dict[str, float]:
        """The largest deviation of each address."""
        addresses = self.rows[0].deviations if self.rows else ()
        return {address: max(row.deviations[address] for row in self.rows) for address in addresses}

    @property
    def rows_with_same_bits(self) -> int:
        return sum(not any(row.deviations.values()) for row in self.rows)


@takes(RecomputeOptions)
def recompute(options: RecomputeOptions) -> Recomputation:
    """Run the model again on random rows of a run, and compare.

    Each is computed in the batch that it was computed in, and compared with what is stored. Then it is computed alone,
    and the whole batch in smaller ones, beside images of another: a row that moves by more than rounding depends on its
    companions, which is a problem, too. If the run had batches of one image, no row has companions.

    A model that no zoo names has to be named again, because building it may run code, which a plan alone must not
    decide.

    Raises:
        HookxError: the run, its model, its weights or its images cannot be loaded. Rows that deviate do not raise; the
            result lists them.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from hookx.launch.extract import extract
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
    path = location_of(options.path)
    plan = read_plan(path)
    for value, known in ((plan.precision, PRECISIONS), (plan.memory_format, MEMORY_FORMATS)):
        if value not in known:
            raise StoreError(f"{path}/ was computed in '{value}', which this version of hookx does not support")
    with borrowed_models():
        return _recompute(options, path, plan)


def _recompute(options: RecomputeOptions, path: Location, plan: Plan) -> Recomputation:
    chosen = _choose_rows(path, plan, options.count, random.Random(options.seed))
    listed = list_images(
        list_paths(options.images),
        root=options.root,
        path_column=options.path_column,
        key_column=options.key_column,
        columns=(),
        suffixes=options.suffix,
    )
    files = dict(zip(listed.keys, listed.files, strict=True))
    model_options = options.options or ModelOptions(**options.values_of(CheckpointOptions))
    loaded = _load_again(plan, options.model, options.weights, model_options)
    runner = Runner(loaded.module, loaded.forward, choose_device(options.device), plan.precision, plan.memory_format)
    found = list(_find_batches(path, plan, chosen))
    # A resumed run may have had smaller batches than the plan was begun with.
    targets = _find_targets(path, plan, loaded, runner, max(batch.images_at_once for batch in found))

    rows: list[RecomputedRow] = []
    problems: list[Problem] = []
    neighbours_NCHW: Tensor | None = None  # images of the batch before
    with (
        single_threaded() if runner.device.type == "cpu" else nullcontext(),
        RowCapture(runner, targets, settle_passes(runner, targets, plan.preprocessing)) as capture,
    ):
        look = SecondLook(capture, targets, plan.layers)
        for batch in found:
            try:
                pixels_NCHW = _decode_again(batch, files, plan, loaded, runner.device)
            except StoreError as error:
                problems += [Problem(batch.file, f"row {row:,}: {error}") for row in batch.rows.values()]
                continue
            inputs_NCHW = model_input(pixels_NCHW, plan.preprocessing)
            computed = look.compute(inputs_NCHW)
            compared = list(_compare(path, plan, batch, computed))
            rows += compared
            problems += _find_deviations(compared, plan, same_device=batch.made_on == runner.device.type)
            if batch.images_at_once > 1:
                problems += _find_dependences(batch, inputs_NCHW, computed, look, neighbours_NCHW)
                neighbours_NCHW = inputs_NCHW[:_NEIGHBOURS].clone()
    return Recomputation(str(runner.device), tuple(rows), tuple(problems))


def _choose_rows(path: Location, plan: Plan, count: int, generator: random.Random) -> dict[Shard, list[int]]:
    """Choose random rows from all readable shards; return the row numbers of each shard, in order."""
    rows_of: dict[Shard, int] = {}
    for shard in present_shards(path, plan):
        with suppress(ShardError, UnreadableError):  # `verify` reports it.
            rows_of[shard] = len(read_record(path, plan, shard).keys)
    shards, ends = list(rows_of), list(accumulate(rows_of.values()))
    if not ends or not ends[-1]:
        raise StoreError(f"{path}/ holds no row to compute again")
    chosen: dict[Shard, list[int]] = {}
    for number in sorted(generator.sample(range(ends[-1]), min(count, ends[-1]))):
        place = bisect_right(ends, number)
        chosen.setdefault(shards[place], []).append(number - ends[place] + rows_of[shards[place]])
    return chosen


def _load_again(plan: Plan, model: str | None, weights: str | None, options: ModelOptions) -> LoadedModel:
    """Build the run's model with the run's weights; a plan alone never names a path to read or code to run."""
    needs_trust, identity = may_run_code(plan.model), WeightsIdentity(plan.weights)
    if model is None and needs_trust:
        raise UsageError(
            f"the model of this run is '{plan.model}', and building it may run code",
            f"if you trust it, name it yourself: --model {plan.model}",
        )
    if model is not None and plan.model not in (model, Path(model).name):
        raise UsageError(f"the model of this run is '{plan.model}', and not '{model}'")
    if identity.seed is not None:
        weights, options = weights or "none", replace(options, seed=identity.seed)
    elif identity.published_name:
        weights = weights or identity.published_name
    elif weights is None and not needs_trust and not plan.weights.startswith(plan.model):
        raise UsageError(f"the weights of this run are a file ({plan.weights})", "name it: --weights FILE")
    # A model can be built otherwise for another size, and bring its transform or not.
    prepared = plan.preprocessing
    if prepared.size:
        options = replace(options, size=prepared.size, resize_positions=True)
    if not prepared.custom:
        options = replace(options, fit=cast(Fit, prepared.fit))  # `ModelOptions` checks it.
    loaded = load_model(model or plan.model, weights or "default", options)
    if loaded.weights != plan.weights:
        raise StoreError(f"these are other weights ({loaded.weights}) than those of this run ({plan.weights})")
    if (there := plan.preprocessing.loader) != (named := loaded.preprocessing.loader):
        raise UsageError(
            f"the images of this run were read by {there or 'Pillow'}, and not by {named or 'Pillow'}",
            "name that function: --loader file.py:function" if there else "leave out --loader",
        )
    return loaded


def _find_targets(path: Location, plan: Plan, loaded: LoadedModel, runner: Runner, batch_size: int) -> list[Target]:
    """Location the model on its device and find the run's layers in it."""
    if loaded.cpu_only and runner.device.type != "cpu":
        raise UsageError(f"{plan.model} has integer layers that run on the CPU only", "write --device cpu")
    check_decoding(plan.preprocessing, runner.device)
    selectors = [Selector.parse(layer.address) for layer in plan.layers]
    targets = place_and_select(loaded, runner, plan.preprocessing, selectors, (), batch_size).targets
    shapes = {layer.address: layer.shape for layer in plan.layers}
    if {str(target.address): target.shape for target in targets} != shapes:
        raise StoreError(f"{plan.model} does not have the layers and shapes of {path}/")
    return targets


@dataclass(frozen=True)
class _Batch:
    """Images of one shard that went through the model together."""

    file: str
    made_on: str  # the type of device
    images_at_once: int  # in the run, at most
    sizes_bytes: dict[str, int]  # key -> size when the run listed the images of the shard
    rows_of_shard: int
    keys: list[str]
    first_row: int
    rows: dict[str, int]  # key -> row, of those to compare


def _find_batches(path: Location, plan: Plan, chosen: dict[Shard, list[int]]) -> Iterator[_Batch]:
    """Yield the batches of the chosen rows: cut at multiples of the batch size, without unreadable images."""
    for shard, numbers in chosen.items():
        record = read_record(path, plan, shard)
        batch_size = record.made_in_batches_of or plan.batch_size
        made_on = str(record.made.get("device")).partition(":")[0].partition(" ")[0]
        readable, wanted = set(record.keys), {record.keys[row]: row for row in numbers}
        keys = sorted([*record.keys, *(key for key, _ in record.failures)], key=key_bytes)
        sizes_bytes = dict(zip(keys, record.sizes_bytes, strict=False)) | (record.mended or {})
        for positions in shard.batches(batch_size):
            listed = keys[positions.start - shard.start : positions.stop - shard.start]
            rows = {key: wanted[key] for key in listed if key in wanted}
            if rows:
                in_batch = [key for key in listed if key in readable]
                first_row = record.keys.index(in_batch[0])
                in_shard = (plan.shard_file(shard), made_on, batch_size, sizes_bytes, len(record.keys))
                yield _Batch(*in_shard, in_batch, first_row, rows)


def _decode_again(
    batch: _Batch, files: dict[str, File], plan: Plan, loaded: LoadedModel, device: torch.device
) -> Tensor:
    """Return the pixels of a batch; `StoreError` for an image that is missing, has changed or cannot be read."""

    def decode_image(key: str) -> Tensor:
        # Look keys up among the images that the user named; never open them as paths.
        if key not in files:
            raise StoreError(f"its batch needs the image '{key}', which is not in --images")
        try:
            pixels_CHW, _ = decode(
                files[key], plan.preprocessing, batch.sizes_bytes.get(key), loaded.transform, loaded.loader
            )
            if pixels_CHW.ndim > 1:
                return pixels_CHW.to(device)
            (decoded_CHW,), refused = decode_jpegs([pixels_CHW], plan.preprocessing, device)  # a JPEG file, for the GPU
            if refused:
                raise refused[0]
            return decoded_CHW
        except Exception as error:  # Decoders can raise anything.
            raise StoreError(f"its batch needs the image '{key}': {failure_reason(error)}") from None

    return torch.stack([decode_image(key) for key in batch.keys])


def _find_dependences(
    batch: _Batch, pixels_NCHW: Tensor, computed: Rows, look: SecondLook, neighbours_NCHW: Tensor | None
) -> Iterator[Problem]:
    """Compute the chosen rows of a batch alone, and all of them in smaller batches, and report those that move.

    Args:
        pixels_NCHW: the whole batch.
        computed: what the model returns for it.
        neighbours_NCHW: images of another batch, if there is one.
    """
    count = len(batch.keys)
    alone = [[batch.keys.index(key)] for key in batch.rows]
    last_first, half = list(reversed(range(count))), -(-count // 2)
    halves = [places for places in (last_first[:half], last_first[half:]) if places]
    reported: set[tuple[int, str]] = set()
    for group in [*alone, *halves]:
        others_NCHW = pixels_NCHW[:0]
        if group in halves:
            spare = [place for place in range(count) if place not in group][:_NEIGHBOURS]
            others_NCHW = pixels_NCHW[spare] if neighbours_NCHW is None else neighbours_NCHW
        try:
            again = look.compute(torch.cat([others_NCHW, pixels_NCHW[group]]))
        except CaptureError as error:
            yield from (Problem(batch.file, f"row {batch.first_row + place:,}: {error}") for place in group)
            continue
        together = len(others_NCHW) + len(group)
        company = f"in another batch of {together:,}" if together > 1 else "alone"
        for number, place in enumerate(group, len(others_NCHW)):
            moved = look.find_moved(
                {address: tensor[place] for address, tensor in computed.items()},
                {address: tensor[number] for address, tensor in again.items()},
                pixels_NCHW[place],
                (count, together),
            )
            for one in moved:
                if (place, one.address) not in reported:
                    reported.add((place, one.address))
                    row = f"row {batch.first_row + place:,} ('{batch.keys[place]}')"
                    what = f"{one.address} depends on the other images of a batch: {company}, {one}"
                    yield Problem(batch.file, f"{row} is not that of its image: {what}")


def _compare(path: Location, plan: Plan, batch: _Batch, computed: Rows) -> Iterator[RecomputedRow]:
    """Compare the stored rows of a batch with what was computed for their images."""
    stored = {layer.address: ShardRows(path / batch.file, layer, batch.rows_of_shard) for layer in plan.layers}
    for key, row in batch.rows.items():
        deviations = {
            address: _deviation(stored[address].tensor(row, row + 1)[0], tensor[batch.keys.index(key)])
            for address, tensor in computed.items()
        }
        yield RecomputedRow(batch.file, row, key, deviations)


def _find_deviations(rows: Sequence[RecomputedRow], plan: Plan, *, same_device: bool) -> Iterator[Problem]:
    """Report the deviations that rounding does not explain."""
    for row in rows:
        for layer in plan.layers:
            halves = plan.precision != "fp32" or layer.dtype in ("float16", "bfloat16")
            allowed = _MAX_ROUNDING if same_device and not halves else _MAX_ROUNDING_OF_HALVES
            deviation = row.deviations[layer.address]
            if not deviation <= allowed:
                yield Problem(
                    row.file,
                    f"row {row.row:,} ('{row.key}') is not what {layer.address} returns: it deviates by "
                    f"{deviation:.1e} of its largest value (rounding: {allowed:.0e})",
                )


def _deviation(stored: Tensor, computed: Tensor) -> float:
    """Return the largest difference as a share of the largest magnitude; infinity where only one is finite."""
    one, other = (
        (torch.view_as_real(tensor) if tensor.is_complex() else tensor).flatten().to(torch.float64)
        for tensor in (stored, computed)
    )
    same = (one == other) | (one.isnan() & other.isnan())
    if bool(same.all()):
        return 0.0
    magnitude = max(float(tensor.nan_to_num(0, 0, 0).abs().max()) for tensor in (one, other))
    difference = (one - other)[~same].abs().nan_to_num(nan=float("inf"))
    return float(difference.max()) / magnitude if magnitude else float("inf")
