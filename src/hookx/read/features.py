"""A run read back: a mapping of addresses to activations that stay on disk until they are indexed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, KeysView, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hookx.errors import NotStoredError, ShardError, StoreError, UsageError
from hookx.keys import Keys
from hookx.plan import Plan
from hookx.read.activations import Activations, RowIndex
from hookx.read.datasets import ActivationDataset
from hookx.store.directory import present_shards, read_plan
from hookx.store.record import read_record


def open_features(path: str | os.PathLike[str], *, partial: bool = False) -> Features:
    """Open the output directory of a run without reading any activation.

    Args:
        path: the directory that `hookx extract` wrote.
        partial: accept an unfinished run and show its finished shards.

    Raises:
        StoreError: the directory holds no run, an unfinished one (the message has the command that resumes it), or a
            damaged shard.

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
    path = Path(path)
    plan = read_plan(path)
    shards = present_shards(path, plan)
    if len(shards) < len(plan.shards) and not partial:
        raise StoreError(
            f"{path}/ is not finished: {len(shards):,} of {len(plan.shards):,} shards",
            "resume it with (reconstructed from the plan):",
            f"  {plan.command(os.path.join(path, ''))}",
            f"or read its finished shards: --partial, or in Python hookx.open({str(path)!r}, partial=True)",
        )
    files = [(path / plan.shard_file(shard)).absolute() for shard in shards]
    failures: dict[str, str] = {}
    first_rows = [0]

    def keys_of_rows() -> Iterator[bytes]:
        # Hold one record at a time: a run can have millions of images.
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
    return Features(path, plan, RowIndex(path, keys, failures, files, np.array(first_rows, dtype=np.int64)))


class RunKeys(Keys):
    """The image key of every row of a run, in order.

    `features.keys` serves two meanings: as a sequence it holds the keys of the images; called, as `dict(features)` and
    `**features` do, it returns the addresses, which are the keys of the mapping.
    """

    def __init__(self, keys: Keys, addresses: Sequence[str]) -> None:
        super().__init__(keys._block, keys._ends)  # Shares the memory: there can be millions.
        self._addresses = addresses

    def __call__(self) -> KeysView[str]:
        return dict.fromkeys(self._addresses).keys()


class Features(Mapping[str, Activations]):
    """The activations of a run by address, loaded when they are indexed.

    Attributes:
        plan: what was computed.
        keys: the image key of every row, in order, for all addresses. `features.keys()` returns the addresses.
        failures: key -> reason for the images that could not be read.
    """

    keys: RunKeys

    def __init__(self, path: Path, plan: Plan, rows: RowIndex) -> None:
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
            raise NotStoredError.of(f"{self.path}/", str(address), self)
        return self._activations[address]

    def __iter__(self) -> Iterator[str]:
        return iter(self._activations)

    def __len__(self) -> int:
        return len(self._activations)

    def __repr__(self) -> str:
        return f"Features('{self.path}', {len(self.keys):,} images, {', '.join(self)})"

    def dataset(self, address: str | Sequence[str], transform: Callable[[Any], Any] | None = None) -> ActivationDataset:
        """Return a map-style torch Dataset of (activation, key); see `ActivationDataset`.

        Args:
            address: one address, or several; for several the items are ({address: activation}, key).
            transform: applied to each activation (or dict of them) in the process that reads it.
        """
        if isinstance(address, str):
            return ActivationDataset({address: self[address]}, address, transform)
        if not address:
            raise UsageError("a dataset needs at least one address", f"choose from: {', '.join(self)}")
        return ActivationDataset({one: self[one] for one in address}, None, transform)
