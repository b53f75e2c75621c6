"""The keys of a run's rows, which stay in its shards until they are needed."""

from __future__ import annotations

import bisect
import os
from collections import OrderedDict
from collections.abc import Iterator, KeysView, Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from hookx.errors import ShardError
from hookx.keys import Keys, SortedKeys
from hookx.plan import Plan, Shard
from hookx.store.index import ShardTable
from hookx.store.location import Location
from hookx.store.record import read_record

_MAX_BYTES = 2 * 2**30  # of keys that are kept: enough for some 50 million


class KeysInShards(SortedKeys):
    """Keys that are read from the headers of their shards, each when it is first needed.

    Raises:
        ShardError: a shard is not what the table of shards says, when its keys are read.
    """

    def __init__(self, path: Location, plan: Plan, table: ShardTable) -> None:
        self.path, self.plan, self.first_keys = path, plan, table.first_keys
        self.first_rows: NDArray[np.int64] = np.concatenate([[0], np.cumsum(table.rows)]).astype(np.int64)
        self._shards = [shard for shard, rows in zip(plan.shards, table.rows, strict=True) if rows]
        self._starts = [int(self.first_rows[shard.number]) for shard in self._shards]
        self._firsts = [os.fsencode(self.first_keys[shard.number]) for shard in self._shards]
        self._read: OrderedDict[int, Keys] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    def __iter__(self) -> Iterator[str]:
        for place in range(len(self._shards)):
            yield from self._keys(place)

    def encoded(self, position: int) -> bytes:
        place = bisect.bisect_right(self._starts, position) - 1
        return self._keys(place).encoded(position - self._starts[place])

    def place(self, key: str) -> int:
        place = bisect.bisect_right(self._firsts, os.fsencode(key)) - 1
        return 0 if place < 0 else self._starts[place] + self._keys(place).place(key)

    def _keys(self, place: int) -> Keys:
        if place in self._read:
            self._read.move_to_end(place)
            return self._read[place]
        shard = self._shards[place]
        keys = keys_of(self.path, self.plan, shard)
        expected = int(self.first_rows[shard.number + 1] - self.first_rows[shard.number])
        if len(keys) != expected or keys.encoded(0) != self._firsts[place]:
            file = self.path / self.plan.shard_file(shard)
            raise ShardError(file, "is damaged: it does not hold what shards.csv says")
        self._read[place] = keys
        self._bytes += keys.nbytes
        while self._bytes > _MAX_BYTES and len(self._read) > 1:
            self._bytes -= self._read.popitem(last=False)[1].nbytes
        return keys


def keys_of(path: Location, plan: Plan, shard: Shard) -> Keys:
    """Read the keys of a shard's rows; `ShardError` if they are not in order."""
    keys = Keys.pack(map(os.fsencode, read_record(path, plan, shard).keys))
    if any(one >= other for one, other in pairwise(map(keys.encoded, range(len(keys))))):
        raise ShardError(path / plan.shard_file(shard), "is damaged: its images are not in the order of their keys")
    return keys


class FailuresInShards(Mapping[str, str]):
    """Key -> reason for the images of a run that could not be read; read when it is first used."""

    def __init__(self, path: Location, plan: Plan, table: ShardTable) -> None:
        self._path, self._plan = path, plan
        self._shards = [shard for shard, failures in zip(plan.shards, table.failures, strict=True) if failures]
        self._count = sum(table.failures)
        self._found: dict[str, str] | None = None

    def _all(self) -> dict[str, str]:
        if self._found is None:
            records = (read_record(self._path, self._plan, shard) for shard in self._shards)
            self._found = dict(failure for record in records for failure in record.failures)
        return self._found

    def __getitem__(self, key: str) -> str:
        return self._all()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return repr(self._all())


class RunKeys(SortedKeys):
    """The image key of every row of a run, in order.

    `features.keys` serves two meanings: as a sequence it holds the keys of the images; called, as `dict(features)` and
    `**features` do, it returns the addresses, which are the keys of the mapping.
    """

    def __init__(self, keys: SortedKeys, addresses: Sequence[str]) -> None:
        self._keys, self._addresses = keys, addresses  # Shares the keys: there can be millions.

    def __call__(self) -> KeysView[str]:
        return dict.fromkeys(self._addresses).keys()

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def encoded(self, position: int) -> bytes:
        return self._keys.encoded(position)

    def place(self, key: str) -> int:
        return self._keys.place(key)
