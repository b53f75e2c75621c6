"""A run read back, and two runs joined: address -> activations that stay on the disk until they are asked for."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hookx.activations import Activations, Positions, Rows
from hookx.datasets import ActivationDataset
from hookx.errors import NotStoredError, ShardError, StoreError, UsageError
from hookx.images import Keys
from hookx.layers import closest
from hookx.plan import Plan
from hookx.store import present_shards, read_plan, read_record


def open_features(path: str | os.PathLike[str], *, partial: bool = False) -> Features:
    """Open the output directory of a run; no activation is read yet.

    Args:
        path: the directory that `hookx extract` wrote.
        partial: accept a run that is not finished, and show the shards that are.

    Raises:
        StoreError: no run, a run that is not finished (the message has the command that resumes it), or a damaged
            shard.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import hookx
        >>> with TemporaryDirectory() as out:
        ...     _ = hookx.extract("resnet18", "conv1,avgpool", "images", weights="none", out=out)
        ...     features = hookx.open(out)
        ...     rows = features["conv1"][2:4]  # only these are read
        >>> list(features), rows.shape, features.keys[0]
        (['conv1', 'avgpool'], torch.Size([2, 64, 112, 112]), 'animals/chelsea.jpg')
    """
    path = Path(path)
    plan = read_plan(path)
    shards = present_shards(path, plan)
    if len(shards) < len(plan.shards) and not partial:
        raise StoreError(
            f"{path}/ is not finished: {len(shards):,} of {len(plan.shards):,} shards",
            "finish it with the command that began it; as far as its plan tells:",
            f"  {plan.command(os.path.join(path, ''))}",
            f"or read the shards that there are: --partial, or in Python hookx.open({str(path)!r}, partial=True)",
        )
    files = [(path / plan.shard_file(shard)).absolute() for shard in shards]
    failures: dict[str, str] = {}
    first_rows = [0]

    def keys_of_rows() -> Iterator[bytes]:
        # One record at a time in memory: a run can have millions of images.
        last = b""
        for shard, file in zip(shards, files, strict=True):
            record = read_record(path, plan, shard)
            failures.update(record.failures)
            first_rows.append(first_rows[-1] + len(record.keys))
            for key in map(os.fsencode, record.keys):
                if key <= last:
                    raise ShardError(file, "is damaged: its images are not in the order of their keys")
                yield key
                last = key

    keys = Keys.pack(keys_of_rows())
    return Features(path, plan, Rows(keys, failures, files, np.array(first_rows, dtype=np.int64)))


class RunKeys(Keys):
    """The image key of every row of a run, in order.

    A mapping's `keys()` are its addresses, and a run's keys are its images. Both are meant by `features.keys`: as it
    stands it is the images', and called, as `dict(features)` and `**features` do, the addresses'.
    """

    def __init__(self, keys: Keys, addresses: Sequence[str]) -> None:
        super().__init__(keys._block, keys._ends)  # The same memory: there can be millions.
        self._addresses = addresses

    def __call__(self) -> KeysView[str]:
        return dict.fromkeys(self._addresses).keys()


class Features(Mapping[str, Activations]):
    """The activations of a run, by address. Nothing is loaded until it is indexed.

    Attributes:
        plan: what was computed.
        keys: the image key of every row, in order; the same for every address. `features.keys()` are the addresses.
        failures: key -> reason, of the images that could not be read.
    """

    keys: RunKeys

    def __init__(self, path: Path, plan: Plan, rows: Rows) -> None:
        self.path, self.plan, self.rows = path, plan, rows
        self.failures = rows.failures
        self._activations = {layer.address: Activations(layer, rows) for layer in plan.layers}
        self.keys = RunKeys(rows.keys, list(self))

    @property
    def keys_of_rows(self) -> RunKeys:
        """The same as `keys`."""
        return self.keys

    def __getitem__(self, address: str) -> Activations:
        if address not in self._activations:
            raise NotStoredError(f"{self.path}/ holds no {address!r}; closest: {closest(str(address), self)}")
        return self._activations[address]

    def __iter__(self) -> Iterator[str]:
        return iter(self._activations)

    def __len__(self) -> int:
        return len(self._activations)

    def __repr__(self) -> str:
        return f"Features('{self.path}', {len(self.keys):,} images, {', '.join(self)})"

    def dataset(self, address: str | Sequence[str], transform: Callable[[Any], Any] | None = None) -> ActivationDataset:
        """Return a map-style torch Dataset of (activation, key); `ActivationDataset` tells what it can do.

        Args:
            address: one, or several, whose items are ({address: activation}, key).
            transform: what an activation (or a dict of them) becomes, in the process that reads it.
        """
        if isinstance(address, str):
            return ActivationDataset({address: self[address]}, address, transform)
        if not address:
            raise UsageError("a dataset of no addresses has no items", f"name some of: {', '.join(self)}")
        return ActivationDataset({one: self[one] for one in address}, None, transform)


@dataclass(frozen=True)
class Join:
    """Two runs, of both the images that they share: row n of one is row n of the other.

    Attributes:
        left, right: the runs, as `hookx.open` gives them, with the rows in common.
        only_left, only_right: keys that have a row in one of them alone; `right.failures` may say why.
    """

    left: Features
    right: Features
    only_left: Keys
    only_right: Keys

    @property
    def keys(self) -> Keys:
        """The image key of every row, in order."""
        return self.left.keys


def join(left: Features, right: Features) -> Join:
    """Bring the rows of two runs into one order, by their keys. No activation is read.

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
    in_left, in_right = _common(left.keys, right.keys)
    return Join(
        left=_narrowed(left, in_left),
        right=_narrowed(right, in_right),
        only_left=_without(left.keys, in_left),
        only_right=_without(right.keys, in_right),
    )


def _common(left: Keys, right: Keys) -> tuple[Positions, Positions]:
    """Return where the keys that are in both are in each."""
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


def _narrowed(features: Features, positions: Positions) -> Features:
    rows = features.rows
    keys = Keys.pack(map(rows.keys.encoded, positions.tolist()))
    chosen = positions if rows.chosen is None else rows.chosen[positions]
    return Features(features.path, features.plan, replace(rows, keys=keys, chosen=chosen))


def _without(keys: Keys, positions: Positions) -> Keys:
    others = np.ones(len(keys), dtype=bool)
    others[positions] = False
    return Keys.pack(map(keys.encoded, np.flatnonzero(others).tolist()))
