"""Show what a run holds, finished or not: its plan, its progress and statistics of its activations."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hookx.plan import LayerSpec, Plan, RangeCounts, ValueCounts
from hookx.store.columns import open_columns
from hookx.store.directory import names_in, present_shards, read_plan
from hookx.store.index import INDEX, SHARDS
from hookx.store.location import Location, location_of
from hookx.store.record import Totals, read_record
from hookx.store.shard_rows import ShardRows

_BYTES_AT_ONCE = 16 * 2**20
_VALUES_AT_ONCE = 2**15  # Few enough to stay in a core's cache, and for torch to use a single thread.


@dataclass(frozen=True)
class Statistics:
    """Statistics of one layer's values over all rows.

    Mean, deviation (the root of the mean squared distance from the mean), minimum and maximum cover the finite values
    and are None if there are none. A complex value counts as two.
    """

    values: int
    mean: float | None
    deviation: float | None
    minimum: float | None
    maximum: float | None
    zeros: int
    non_finite: int


@dataclass(frozen=True)
class InspectedLayer:
    address: str
    shape: tuple[int, ...]  # (rows so far, *shape of one image)
    dtype: str
    bytes: int
    statistics: Statistics | None


@dataclass(frozen=True)
class Inspection:
    """What the directory of a run holds."""

    path: str
    plan: Plan
    shards_finished: int
    has_index: bool
    rows: int
    failures: int
    rotations_ignored: int
    ranges: RangeCounts  # images of more than 8 bits that use little of their range, or go beyond it
    bytes: int  # activations only
    layers: tuple[InspectedLayer, ...]
    counts: ValueCounts
    columns: Mapping[str, str]  # 'int', 'float', 'bool' or 'text', by the name of the column
    self_checked: int | None  # rows that the run computed again in other company; None if it did not check itself
    made: tuple[dict[str, Any], ...]  # how the shards were made, without repetition

    @property
    def is_finished(self) -> bool:
        return self.shards_finished == len(self.plan.shards) and self.has_index


def inspect(
    path: str | os.PathLike[str],
    *,
    statistics: bool = False,
    progress: Callable[[int], None] = lambda shards_read: None,
) -> Inspection:
    """Describe a run, finished or not.

    Args:
        statistics: compute statistics of every layer in double precision. This reads every activation, 16 MiB (or one
            row, if larger) at a time; otherwise only the shards' headers are read.
        progress: called with the number of shards read since the last call.

    Raises:
        StoreError: the directory holds no run, or a shard is damaged or cannot be read (`verify` reports all of them).

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from hookx.launch.extract import extract
        >>> with TemporaryDirectory() as out:
        ...     _ = extract("resnet18", "relu", "images", weights="none", out=out)
        ...     inspection = inspect(out, statistics=True)
        >>> inspection.is_finished, inspection.layers[0].shape
        (True, (8, 64, 112, 112))
        >>> inspection.layers[0].statistics.minimum
        0.0
    """
    run = location_of(path)
    plan = read_plan(run)
    shards = present_shards(run, plan)
    totals, columns = Totals(), open_columns(run, plan)
    made: list[dict[str, Any]] = []
    moments = {layer.address: Moments() for layer in plan.layers}
    for shard in shards:
        record = read_record(run, plan, shard)
        totals.add(record)
        if record.made not in made:
            made.append(record.made)
        if statistics:
            for layer in plan.layers:
                for values in _read_pieces(run / plan.shard_file(shard), layer, len(record.keys)):
                    moments[layer.address].add(values)
        progress(1)
    return Inspection(
        path=str(run),
        plan=plan,
        shards_finished=len(shards),
        has_index=bool({INDEX, SHARDS} & names_in(run)),
        rows=totals.rows,
        failures=totals.failures,
        rotations_ignored=totals.rotations_ignored,
        ranges=totals.ranges,
        counts=totals.counts,
        columns=columns.kinds if columns is not None else {},
        self_checked=totals.self_checked,
        bytes=totals.rows * plan.bytes_per_image,
        layers=tuple(
            InspectedLayer(
                address=layer.address,
                shape=(totals.rows, *layer.shape),
                dtype=layer.dtype,
                bytes=totals.rows * layer.bytes_per_image,
                statistics=moments[layer.address].statistics() if statistics else None,
            )
            for layer in plan.layers
        ),
        made=tuple(made),
    )


def _read_pieces(file: Location, layer: LayerSpec, rows: int) -> Iterator[Tensor]:
    stored, rows_at_once = ShardRows(file, layer, rows), max(1, _BYTES_AT_ONCE // max(1, layer.bytes_per_image))
    for start in range(0, rows, rows_at_once):
        yield stored.tensor(start, min(start + rows_at_once, rows))


class Moments:
    """Count, mean and squared distances of a stream of values, updated piece by piece without cancellation.

    Source: Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances" (1979).
    """

    def __init__(self) -> None:
        self.values = self.finite = self.zeros = 0
        self.mean = self.squares = 0.0  # squares: the sum of squared distances from the mean
        self.minimum, self.maximum = math.inf, -math.inf

    def add(self, piece: Tensor) -> None:
        """Add values of any shape and type."""
        values = (torch.view_as_real(piece) if piece.is_complex() else piece).flatten()
        self.values += values.numel()
        self.zeros += int((values == 0).sum())
        for some in values.split(_VALUES_AT_ONCE):
            self._add_finite(some.to(torch.float64))

    def _add_finite(self, values: Tensor) -> None:
        minimum, maximum = map(float, values.aminmax())
        if not (math.isfinite(minimum) and math.isfinite(maximum)):  # aminmax returns NaN if there is one.
            finite = values[values.isfinite()]
            if finite.numel():
                self._add_finite(finite)
            return
        self.minimum, self.maximum = min(self.minimum, minimum), max(self.maximum, maximum)
        mean = float(values.mean())
        count, total = values.numel(), self.finite + values.numel()
        apart = mean - self.mean
        self.squares += float((values - mean).square_().sum()) + apart * apart * self.finite * count / total
        self.mean += apart * count / total
        self.finite = total

    def statistics(self) -> Statistics:
        """Return the statistics of the values so far."""
        non_finite = self.values - self.finite
        if not self.finite:
            return Statistics(self.values, None, None, None, None, self.zeros, non_finite)
        deviation = math.sqrt(self.squares / self.finite)
        return Statistics(self.values, self.mean, deviation, self.minimum, self.maximum, self.zeros, non_finite)
