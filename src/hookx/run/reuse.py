"""Rows of other runs that a run copies in place of computing them: by image and by layer."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hookx.errors import StoreError, UsageError
from hookx.images.listing import ImageList
from hookx.keys import key_bytes
from hookx.plan import OF_THE_IMAGES, LayerSpec, Plan, Shard
from hookx.store.directory import present_shards, read_plan
from hookx.store.format import checksum_in_file, open_shard
from hookx.store.location import Location, location_of
from hookx.store.record import ShardRecord, read_record
from hookx.store.shard_rows import ShardRows

log = logging.getLogger("hookx")
MAY_GROW = ("layers", *OF_THE_IMAGES)  # fields of a plan that may differ where rows are copied
_NONE = -1  # in place of a row
_MAX_OPEN = 64  # tensors of shards, in each process


def plans_of(paths: Sequence[str | os.PathLike[str]]) -> list[tuple[Location, Plan]]:
    """Read the plans of runs that are to be reused; `StoreError` if a path holds none."""
    return [(location, read_plan(location)) for location in map(location_of, paths)]


def check_alike(path: Location, there: Plan, plan: Plan) -> None:
    """Raise `UsageError` if two plans differ in more than their images and their layers."""
    if differences := there.differences(plan, but=MAY_GROW):
        raise UsageError(
            f"{path}/ holds rows of another kind: {'; '.join(differences)}",
            "only runs that agree in all but their images and their layers can be reused, or appended to",
        )


@dataclass(frozen=True)
class Other:
    """A run whose rows can be copied.

    Attributes:
        shards: those that are there.
        first_rows: how many rows precede each of them, and the total.
        row_of: for each image of this run's list its row in the other, -1 if it has none.
        addresses: the layers that both runs store, in the same shape and type.
    """

    path: Location
    plan: Plan
    shards: Sequence[Shard]
    first_rows: Sequence[int]
    row_of: NDArray[np.int64]
    addresses: frozenset[str]

    @classmethod
    def open(cls, path: Location, there: Plan, plan: Plan, images: ImageList) -> Other:
        """Match the rows of a run to the images of a list, by their keys and sizes."""
        check_alike(path, there, plan)
        shards, first_rows = present_shards(path, there), [0]
        row_of = np.full(len(images), _NONE, np.int64)
        position = 0
        for shard in shards:
            record = read_record(path, there, shard)
            for row, (key, size_bytes) in enumerate(sizes_of_rows(record), first_rows[-1]):
                while position < len(images) and images.keys.encoded(position) < key:
                    position += 1
                is_here = position < len(images) and images.keys.encoded(position) == key
                if is_here and images.sizes_bytes[position] == size_bytes:
                    row_of[position] = row
            first_rows.append(first_rows[-1] + len(record.keys))
        addresses = frozenset(layer.address for layer in set(there.layers) & set(plan.layers))
        return cls(path, there, shards, first_rows, row_of, addresses)


def sizes_of_rows(record: ShardRecord) -> Iterator[tuple[bytes, int]]:
    """Yield the key of every row, and the size in bytes of the image that it was computed from."""
    failed, mended = {key for key, _ in record.failures}, record.mended or {}
    for key, size_bytes in zip(record.keys_of_images, record.sizes_bytes, strict=True):
        if key not in failed:
            yield key_bytes(key), mended.get(key, size_bytes)


@dataclass(frozen=True, eq=False)
class Reuse:
    """What a run copies from others: for each image and each layer, from the first that has it.

    Args:
        others: those that rows are copied from, in the order in which they were named.
        pending: the shards that this run has still to write.
    """

    plan: Plan
    others: Sequence[Other]
    pending: Sequence[Shard]
    _open: dict[tuple[int, int, str], ShardRows] = field(default_factory=dict)  # in this process

    @cached_property
    def _groups(self) -> dict[tuple[int, ...], list[str]]:
        """The addresses that are found in the same others, by the numbers of these."""
        groups: dict[tuple[int, ...], list[str]] = {}
        for layer in self.plan.layers:
            holders = tuple(number for number, other in enumerate(self.others) if layer.address in other.addresses)
            groups.setdefault(holders, []).append(layer.address)
        return groups

    @cached_property
    def _is_whole(self) -> NDArray[np.bool_]:
        """For each image, whether all of its layers are found."""
        whole = np.ones(self.plan.image_count, bool)
        for holders in self._groups:
            whole &= self._is_found(holders)
        return whole

    def _is_found(self, holders: Sequence[int]) -> NDArray[np.bool_]:
        found = np.zeros(self.plan.image_count, bool)
        for number in holders:
            found |= self.others[number].row_of != _NONE
        return found

    @cached_property
    def lacking(self) -> frozenset[str]:
        """The addresses that some pending image lacks, which are computed."""
        lacking: set[str] = set()
        for holders, addresses in self._groups.items():
            found = self._is_found(holders)
            if not all(found[shard.start : shard.stop].all() for shard in self.pending):
                lacking.update(addresses)
        return frozenset(lacking)

    def is_whole(self, position: int) -> bool:
        """Return whether an image is copied, and so need not be read."""
        return bool(self._is_whole[position])

    def copy(self, positions: Sequence[int], rows: Mapping[str, Tensor]) -> dict[str, list[int]]:
        """Copy what there is of some images into their rows; return which rows of each address were.

        Raises:
            StoreError: a shard of another run is damaged, has changed or cannot be read.
        """
        copied: dict[str, list[int]] = {}
        wanted = np.array(positions, np.int64)
        for holders, addresses in self._groups.items():
            left = np.arange(len(positions))
            for number in holders:
                there = self.others[number].row_of[wanted[left]]
                for address in addresses if (there != _NONE).any() else ():
                    places = left[there != _NONE].tolist()
                    self._copy(number, address, there[there != _NONE].tolist(), places, rows[address])
                    copied.setdefault(address, []).extend(places)
                left = left[there == _NONE]
        return copied

    def _copy(self, number: int, address: str, source: list[int], places: list[int], rows: Tensor) -> None:
        """Copy ascending rows of another run to places in a tensor, a stretch of adjacent ones at a time."""
        other = self.others[number]
        cuts = [
            place
            for place in range(1, len(source))
            if source[place] != source[place - 1] + 1
            or places[place] != places[place - 1] + 1
            or source[place] in self._starts(number)
        ]
        for start, stop in itertools.pairwise([0, *cuts, len(source)]):
            shard = int(np.searchsorted(other.first_rows, source[start], side="right")) - 1
            first = source[start] - other.first_rows[shard]
            stored = self._rows_of(number, shard, address)
            rows[places[start] : places[start] + stop - start] = stored.tensor(first, first + stop - start)

    def _starts(self, number: int) -> frozenset[int]:
        return frozenset(self.others[number].first_rows)

    def _rows_of(self, number: int, place: int, address: str) -> ShardRows:
        if (number, place, address) not in self._open:
            other = self.others[number]
            if len(self._open) >= _MAX_OPEN:
                self._open.clear()
            layer = next(layer for layer in self.plan.layers if layer.address == address)
            self._open[number, place, address] = _open_checked(other, other.shards[place], layer)
        return self._open[number, place, address]


def _open_checked(other: Other, shard: Shard, layer: LayerSpec) -> ShardRows:
    """Open a tensor that rows are copied from; `StoreError` unless it is what was written."""
    file, record = other.path / other.plan.shard_file(shard), read_record(other.path, other.plan, shard)
    with open_shard(file) as (opened, header):
        place = header.tensors[layer.address]
        if checksum_in_file(opened, place.start, place.stop) != record.checksums.get(layer.address):
            raise StoreError(
                f"{file} is damaged: '{layer.address}' does not match the checksum taken when it was written",
                f"see what else is: hookx verify {other.path}/    or compute its rows anew: leave out --reuse",
            )
    return ShardRows(file, layer, len(record.keys))


def reuse_of(
    others: Sequence[tuple[Location, Plan]], plan: Plan, images: ImageList, pending: Sequence[Shard]
) -> Reuse | None:
    """Find what a run can copy from others, and say how much; None if there are no others."""
    if not others or not pending:
        return None
    reuse = Reuse(plan, [Other.open(path, there, plan, images) for path, there in others], pending)
    for other in reuse.others:
        found = sum(int((other.row_of[shard.start : shard.stop] != _NONE).sum()) for shard in pending)
        layers = f"{len(other.addresses):,} of {len(plan.layers):,} layers" if found else "nothing"
        log.info("reused from %s: %s of %s images", other.path, layers, f"{found:,}")
    return reuse
