"""A finished run, read back: address -> activations that stay on the disk until they are asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from hookx.errors import StoreError
from hookx.layers import closest
from hookx.plan import LayerSpec
from hookx.store import finished_shards, open_shard, read_plan, read_record


def open_features(path: str | os.PathLike[str], *, partial: bool = False) -> Features:
    """Open the output directory of a run; no activation is read yet.

    Args:
        path: the directory that `hookx extract` wrote.
        partial: accept a run that is not finished, and show the shards that are.

    Raises:
        StoreError: no run, a run that is not finished, or a damaged shard.
    """
    return Features(Path(path), partial=partial)


class Features(Mapping[str, "Activations"]):
    """The activations of a run, by address. Nothing is loaded until it is sliced.

    Attributes:
        plan: what was computed.
        keys_of_rows: the image key of every row, in order; the same for every address.
        failures: key -> reason, of the images that could not be read.
    """

    def __init__(self, path: Path, *, partial: bool = False) -> None:
        self.path = path
        self.plan = read_plan(path)
        shards = finished_shards(path, self.plan)
        if len(shards) < len(self.plan.shards) and not partial:
            raise StoreError(
                f"{path}/ is not finished: {len(shards)} of {len(self.plan.shards)} shards",
                "run the same command again to finish it, or open it with partial=True",
            )
        records = [read_record(path, self.plan, shard) for shard in shards]
        self.keys_of_rows = [key for record in records for key in record.keys]
        self.failures = dict(failure for record in records for failure in record.failures)
        self._files = [path / self.plan.shard_file(shard) for shard in shards]
        self._first_rows = np.cumsum([0, *(len(record.keys) for record in records)])

    def __getitem__(self, address: str) -> Activations:
        for layer in self.plan.layers:
            if layer.address == address:
                return Activations(layer, self._files, self._first_rows)
        raise KeyError(f"{address}; closest: {closest(address, self)}")

    def __iter__(self) -> Iterator[str]:
        return (layer.address for layer in self.plan.layers)

    def __len__(self) -> int:
        return len(self.plan.layers)

    def __repr__(self) -> str:
        return f"Features('{self.path}', {len(self.keys_of_rows)} images, {', '.join(self)})"

    def dataset(self, address: str) -> Dataset[tuple[Tensor, str]]:
        """Return a map-style torch Dataset of (activation, key)."""
        return _ActivationDataset(self[address], self.keys_of_rows)


class Activations:
    """One address of a run: an array of shape (rows, *layer shape) that stays on the disk until it is indexed.

    An integer gives one row without its first dimension; a slice, a list of integers or a mask of all rows gives a
    tensor of rows. Only those rows are read.
    """

    def __init__(self, layer: LayerSpec, files: Sequence[Path], first_rows: NDArray[np.int64]) -> None:
        self.address = layer.address
        self.dtype: torch.dtype = getattr(torch, layer.dtype)
        self.shape = (int(first_rows[-1]), *layer.shape)
        self._files, self._first_rows = files, first_rows

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"Activations('{self.address}', shape={self.shape}, dtype={self.dtype})"

    def __getitem__(self, index: int | slice | Sequence[int] | NDArray[Any]) -> Tensor:
        if isinstance(index, slice):
            rows = range(len(self))[index]
            if rows.step == 1:
                return self._run(rows.start, max(rows.start, rows.stop))
            return self._rows(rows)
        if isinstance(index, int | np.integer):
            row = range(len(self))[index]  # Negative indices count from the end; outside is an IndexError.
            return self._run(row, row + 1)[0]
        chosen = np.asarray(index)
        if chosen.dtype == bool and chosen.shape == (len(self),):
            chosen = np.flatnonzero(chosen)
        if isinstance(index, tuple) or (chosen.size and (chosen.ndim != 1 or chosen.dtype.kind not in "iu")):
            raise TypeError(f"rows are an integer, a slice, a list of integers or a mask of {len(self)}, not {index!r}")
        return self._rows([range(len(self))[row] for row in chosen.tolist()])

    def torch(self) -> Tensor:
        """Read all rows."""
        return self[:]

    def numpy(self) -> NDArray[Any]:
        """Read all rows as a numpy array; bfloat16, which numpy does not have, becomes float32 (exactly)."""
        tensor = self[:]
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self.numpy(), dtype=dtype)

    def _rows(self, rows: Sequence[int]) -> Tensor:
        if not len(rows):
            return self._run(0, 0)
        return torch.cat([self._run(row, row + 1) for row in rows])

    def _run(self, start: int, stop: int) -> Tensor:
        """Read consecutive rows, which may lie in several shards."""
        pieces = []
        for number, file in enumerate(self._files):
            first, end = int(self._first_rows[number]), int(self._first_rows[number + 1])
            if max(start, first) < min(stop, end):
                with open_shard(file) as opened:
                    rows = opened.get_slice(self.address)
                    pieces.append(rows[max(start, first) - first : min(stop, end) - first])
        if not pieces:
            return torch.empty((0, *self.shape[1:]), dtype=self.dtype)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class _ActivationDataset(Dataset[tuple[Tensor, str]]):
    def __init__(self, activations: Activations, keys: list[str]) -> None:
        self.activations, self.keys = activations, keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, row: int) -> tuple[Tensor, str]:
        return self.activations[row], self.keys[row]
