"""A run read back, as a mapping of addresses to activations that stay on disk, and two runs joined by their keys."""

from __future__ import annotations

import os
import warnings
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hookx.errors import NotStoredError, ShardError, StoreError, UsageError
from hookx.keys import Keys, SortedKeys
from hookx.plan import Plan, Shard
from hookx.read.activations import Activations, Positions, RowIndex
from hookx.read.columns import Columns
from hookx.read.datasets import ActivationDataset, Targets
from hookx.read.run_keys import FailuresInShards, KeysInShards, RunKeys
from hookx.read.several import merge
from hookx.store.directory import present_shards, read_plan
from hookx.store.index import read_shard_table
from hookx.store.location import Location, absolute, location_of
from hookx.store.objects.path import ObjectPath
from hookx.store.record import read_record

if TYPE_CHECKING:
    import pandas

_MAX_READ_AT_ONCE = 1_000_000  # images; those of longer runs are read from the disk a shard at a time, when needed


def open_features(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], *, partial: bool = False
) -> Features:
    """Open the output directory of a run without reading any activation.

    Several runs that differ in their images only are read as one: their rows are in the order of their keys, as if one
    run had computed all of them.

    Args:
        path: the directory, or those of several runs.
        partial: accept an unfinished run and show its finished shards.

    Raises:
        StoreError: the directory holds no run, an unfinished one (the message has the command that resumes it), or a
            damaged shard; or runs do not belong together.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import hookx
        >>> with TemporaryDirectory() as out:
        ...     _ = hookx.extract("resnet18", "conv1,avgpool", "images", weights="none", out=out)
        ...     features = hookx.open(out)
        ...     rows = features["conv1"][2:4]  # reads only these rows
        >>> list(features), rows.shape, features.keys[0]
        (['conv1', 'avgpool'], torch.Size([2, 64, 112, 112]), 'animals/chelsea.jpg')
    """
    if not isinstance(path, str | os.PathLike | ObjectPath):
        runs = [open_features(one, partial=partial) for one in path]
        return runs[0] if len(runs) == 1 else _open_several(runs)
    run = location_of(path)
    plan = read_plan(run)
    shards = present_shards(run, plan)
    if len(shards) < len(plan.shards) and not partial:
        raise StoreError(
            f"{run}/ is not finished: {len(shards):,} of {len(plan.shards):,} shards",
            "resume it with (reconstructed from the plan):",
            f"  {plan.command(f'{run}/')}",
            f"or read its finished shards: --partial, or in Python hookx.open({str(run)!r}, partial=True)",
        )
    files = [absolute(run / plan.shard_file(shard)) for shard in shards]
    # Headers are read at once where that is fast, so that what is wrong with a shard is said here.
    is_long = plan.image_count > _MAX_READ_AT_ONCE or isinstance(run, ObjectPath)
    if is_long and len(shards) == len(plan.shards) and (table := read_shard_table(run, plan)):
        in_shards = KeysInShards(absolute(run), plan, table)
        failures: Mapping[str, str] = FailuresInShards(absolute(run), plan, table)
        return Features(run, plan, RowIndex(run, plan, in_shards, failures, files, in_shards.first_rows, shards=shards))
    keys, failures, first_rows = _read_all(run, plan, shards)
    return Features(run, plan, RowIndex(run, plan, keys, failures, files, first_rows, shards=shards))


def _open_several(runs: Sequence[Features]) -> Features:
    plan, rows, columns = merge(runs)  # `UsageError` without any
    return Features(runs[0].path, plan, rows, columns)


def _read_all(run: Location, plan: Plan, shards: Sequence[Shard]) -> tuple[Keys, dict[str, str], Positions]:
    """Read keys, failures, and how many rows precede each shard, from the headers: a run may have no table of them."""
    failures: dict[str, str] = {}
    first_rows = [0]

    def keys_of_rows() -> Iterator[bytes]:
        # Hold one record at a time: a run can have millions of images.
        last = b""
        for shard in shards:
            record = read_record(run, plan, shard)
            failures.update(record.failures)
            first_rows.append(first_rows[-1] + len(record.keys))
            for key in map(os.fsencode, record.keys):
                if key <= last:
                    file = run / plan.shard_file(shard)
                    raise ShardError(file, "is damaged: its images are not in the order of their keys")
                yield key
                last = key

    keys = Keys.pack(keys_of_rows())
    return keys, failures, np.array(first_rows, dtype=np.int64)


class Features(Mapping[str, Activations]):
    """The activations of a run by address, loaded when they are indexed.

    Attributes:
        plan: what was computed.
        keys: the image key of every row, in order, for all addresses; also named `keys_of_rows`. `features.keys()`
            returns the addresses.
        failures: key -> reason for the images that could not be read.
        columns: what else is known of the image of every row, by the name of the column; see `Columns`.
    """

    keys: RunKeys

    def __init__(self, path: Location, plan: Plan, rows: RowIndex, columns: Columns | None = None) -> None:
        self.path, self.plan, self.rows, self.failures = path, plan, rows, rows.failures
        self.columns = columns if columns is not None else Columns(rows)
        self._activations = {layer.address: Activations(layer, rows) for layer in plan.layers}
        self.keys = self.keys_of_rows = RunKeys(rows.keys, list(self))

    def __getitem__(self, address: str) -> Activations:
        if address not in self._activations:
            raise NotStoredError.of(f"{self.path}/", str(address), self)
        return self._activations[address]

    def __iter__(self) -> Iterator[str]:
        return iter(self._activations)

    def __len__(self) -> int:
        return len(self._activations)

    def __repr__(self) -> str:
        return f"Features('{self.path}', {len(self.keys):,} images, {', '.join(self)})"

    def dataset(
        self,
        address: str | Sequence[str],
        transform: Callable[[Any], Any] | None = None,
        *,
        target: str | None = None,
    ) -> ActivationDataset:
        """Return a map-style torch Dataset of (activation, key), or (activation, target); see `ActivationDataset`.

        For several addresses, the items are ({address: activation}, key).

        Args:
            target: a column, whose value takes the place of the key. A text becomes its number among all texts of the
                column, sorted; the dataset's `classes` holds them.

        Raises:
            NotStoredError: the run does not hold an address or the column.
            UsageError: some rows have no value in the column.
        """
        targets = Targets.of(self.columns, target, self.keys) if target is not None else None
        if isinstance(address, str):
            return ActivationDataset({address: self[address]}, address, transform, targets)
        if not address:
            raise UsageError("a dataset needs at least one address", f"choose from: {', '.join(self)}")
        return ActivationDataset({one: self[one] for one in address}, None, transform, targets)

    def to_pandas(self, addresses: str | Sequence[str] = ()) -> pandas.DataFrame:
        """Return all rows as a table of pandas: the columns, then a column for each address, indexed by the keys.

        An activation is an array in its own shape; `np.stack(table["avgpool"])` joins those of all rows. A value that
        is lacking is one of pandas' own.

        Raises:
            NotStoredError: the run does not hold an address.
            UsageError: pandas is not installed.

        Example:
            >>> from tempfile import TemporaryDirectory
            >>> import hookx
            >>> with TemporaryDirectory() as out:
            ...     _ = hookx.extract("resnet18", "avgpool", "images", weights="none", out=out, label="parent")
            ...     table = hookx.open(out).to_pandas(["avgpool"])
            >>> list(table), int((table["label"] == "things").sum()), table["avgpool"]["things/rocket.jpg"].shape
            (['label', 'avgpool'], 2, (512, 1, 1))
        """
        from hookx.read.tables import to_pandas  # pandas takes a second to import, and is an extra.

        return to_pandas(self, [addresses] if isinstance(addresses, str) else addresses)


@dataclass(frozen=True)
class Join:
    """Two runs, reduced to the images they share: row n of one and row n of the other belong to the same image.

    Attributes:
        left, right: the runs, as `hookx.open` returns them, with only the common rows.
        only_left, only_right: keys that have a row in only one of them; the other's `failures` may say why.
    """

    left: Features
    right: Features
    only_left: Keys
    only_right: Keys

    @property
    def keys(self) -> SortedKeys:
        """The image key of every row, in order."""
        return self.left.keys


def join(left: Features, right: Features) -> Join:
    """Match the rows of two runs by their keys, without reading any activation; warn if they share none.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import hookx
        >>> with TemporaryDirectory() as out:
        ...     for model in ("resnet18", "squeezenet1_1"):
        ...         _ = hookx.extract(model, "type:AdaptiveAvgPool2d", "images", weights="none", out=f"{out}/{model}")
        ...     both = hookx.join(hookx.open(f"{out}/resnet18"), hookx.open(f"{out}/squeezenet1_1"))
        ...     rows = both.left["avgpool"][:2].flatten(1), both.right["classifier.3"][:2].flatten(1)
        >>> len(both.keys), len(both.only_left), [tuple(some.shape) for some in rows]
        (8, 0, [(2, 512), (2, 1000)])
    """
    in_left, in_right = _match(left.keys, right.keys)
    if left.keys and right.keys and not len(in_left):
        warnings.warn(
            f"{left.path} and {right.path} have no key in common: the first are '{left.keys[0]}' and "
            f"'{right.keys[0]}'; hookx extract --root gives all runs keys relative to one folder",
            stacklevel=2,
        )
    return Join(
        left=_narrow(left, in_left),
        right=_narrow(right, in_right),
        only_left=_take(left.keys, np.delete(np.arange(len(left.keys)), in_left)),
        only_right=_take(right.keys, np.delete(np.arange(len(right.keys)), in_right)),
    )


def _match(left: SortedKeys, right: SortedKeys) -> tuple[Positions, Positions]:
    """Return the positions of the common keys in each."""
    in_left, in_right = array("q"), array("q")
    here = there = 0
    while here < len(left) and there < len(right):
        one, other = left.encoded(here), right.encoded(there)
        if one == other:
            in_left.append(here)
            in_right.append(there)
        here += one <= other
        there += other <= one
    return np.array(in_left), np.array(in_right)


def _narrow(features: Features, positions: Positions) -> Features:
    rows = features.rows
    chosen = positions if rows.chosen is None else rows.chosen[positions]
    narrowed = replace(rows, keys=_take(rows.keys, positions), chosen=chosen)
    return Features(features.path, features.plan, narrowed, features.columns.at(positions))


def _take(keys: SortedKeys, positions: Positions) -> Keys:
    return Keys.pack(map(keys.encoded, positions.tolist()))
