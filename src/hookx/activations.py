"""One address of a run: an array that stays in the files of the shards until its rows are asked for."""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from hookx.errors import NotStoredError, ShardError, UsageError
from hookx.images import Keys
from hookx.layers import closest
from hookx.plan import LayerSpec
from hookx.store import open_shard

# A mapped file takes up addresses, not memory, and a process may have some 65,000 of them.
_MAPPED_AT_MOST = 256
_KEYS_COMPARED = 100  # with one that is not there, for the error message

Index: TypeAlias = int | slice | Sequence[int] | Sequence[bool] | NDArray[Any] | Tensor
Positions: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """Which rows there are, and where: the same for every address of a run.

    Attributes:
        keys: the image key of every row, in order.
        failures: key -> reason, of the images that have no row.
        files: of the shards.
        first_rows: how many rows of the run come before each file, and the number of all.
        chosen: where the rows are in the run, ascending; None if they are all of it.
    """

    keys: Keys
    failures: Mapping[str, str]
    files: Sequence[Path]
    first_rows: Positions
    chosen: Positions | None = None

    @cached_property
    def borders(self) -> Positions:
        """How many of these rows come before each file, and the number of all."""
        return self.first_rows if self.chosen is None else np.searchsorted(self.chosen, self.first_rows)

    def position(self, key: str) -> int:
        """Return the row of an image; `NotStoredError` if it has none, with the reason if there is one."""
        if key in self.keys:
            return self.keys.index(key)
        if key in self.failures:
            raise NotStoredError(f"'{key}' could not be read: {self.failures[key]}")
        # Keys are in order, so those that begin alike are neighbours.
        place = self.keys.place(key)
        around = self.keys[max(0, place - _KEYS_COMPARED) : place + _KEYS_COMPARED]
        raise NotStoredError(f"there is no image '{key}' among the {len(self.keys):,}; closest: {closest(key, around)}")


class Activations:
    """One address of a run: an array of shape (rows, *shape of one image) that stays on the disk until it is indexed.

    Rows are named as numpy names them: by an integer (one row, without its first dimension), a slice, a list, an array
    or a tensor of integers, or a mask of all rows. Only those rows are read, each file once and in its order, and what
    is returned is a copy: yours to change. `shards`, and `torch` and `numpy` where a run has one shard, copy nothing:
    what they return is the file, mapped into memory, and read as it is looked at. It can be changed, and the file
    does not change with it.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import hookx
        >>> with TemporaryDirectory() as out:
        ...     _ = hookx.extract("resnet18", "avgpool", "images", weights="none", out=out)
        ...     avgpool = hookx.open(out)["avgpool"]
        ...     first, some = avgpool[0], avgpool[[5, 2, 5]]
        ...     eighth = avgpool.of("things/rocket.jpg")
        >>> avgpool
        Activations('avgpool', shape=(8, 512, 1, 1), dtype=torch.float32)
        >>> first.shape, some.shape, eighth.shape
        (torch.Size([512, 1, 1]), torch.Size([3, 512, 1, 1]), torch.Size([512, 1, 1]))
    """

    def __init__(self, layer: LayerSpec, rows: Rows) -> None:
        self.address = layer.address
        self.dtype: torch.dtype = getattr(torch, layer.dtype)
        self.shape = (len(rows.keys), *layer.shape)
        self.bytes_per_row = layer.bytes_per_image
        self.rows = rows
        self._mapped = lru_cache(_MAPPED_AT_MOST)(self._map)

    @property
    def keys(self) -> Keys:
        """The image key of every row."""
        return self.rows.keys

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.__getitem__, range(len(self)))

    def __repr__(self) -> str:
        return f"Activations('{self.address}', shape={self.shape}, dtype={self.dtype})"

    def __getstate__(self) -> dict[str, Any]:
        # A worker process that is spawned maps the files itself; one that is forked shares the pages.
        return {name: value for name, value in self.__dict__.items() if name != "_mapped"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._mapped = lru_cache(_MAPPED_AT_MOST)(self._map)

    def __getitem__(self, index: Index) -> Tensor:
        positions = _positions(index, len(self))
        rows = self._read(np.atleast_1d(positions))
        return rows if positions.ndim else rows[0]

    def of(self, key: str | Sequence[str]) -> Tensor:
        """Return the activation of an image by its key, or the rows of several in their order.

        Raises:
            NotStoredError: no row has this key; the message says why the image could not be read, if that is why.
        """
        if isinstance(key, str):
            return self[self.rows.position(key)]
        return self[[self.rows.position(one) for one in key]]

    def batches(self, size: int) -> Iterator[tuple[Tensor, list[str]]]:
        """Yield all rows in order, `size` at a time: (activations, keys)."""
        if size < 1:
            raise UsageError(f"the batch size is {size}; it is 1 or more")
        for start in range(0, len(self), size):
            yield self[start : start + size], self.keys[start : start + size]

    def shards(self) -> Iterator[tuple[Tensor, list[str]]]:
        """Yield all rows in order, a shard at a time and without a copy: (activations, keys)."""
        for number, (start, stop) in enumerate(pairwise(self.rows.borders)):
            if start < stop:
                is_whole = stop - start == self.rows.first_rows[number + 1] - self.rows.first_rows[number]
                yield self._map(number) if is_whole else self[start:stop], self.keys[start:stop]

    def torch(self) -> Tensor:
        """Return all rows as a tensor."""
        if np.count_nonzero(np.diff(self.rows.borders)) == 1:
            return next(self.shards())[0]
        return self[:]

    def numpy(self) -> NDArray[Any]:
        """Return all rows as an array. numpy has no bfloat16: it becomes float32, exactly, and a warning says so."""
        if self.dtype == torch.bfloat16:
            self._warn_of_conversion()
        return self._array()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError(f"'{self.address}' is read from its files, so an array of it is a copy")
        if self.dtype == torch.bfloat16 and dtype is None:
            self._warn_of_conversion()
        return np.asarray(self._array(), dtype=dtype)

    def _array(self) -> NDArray[Any]:
        rows = self.torch()
        return (rows.float() if rows.dtype == torch.bfloat16 else rows).numpy()

    def _warn_of_conversion(self) -> None:
        warnings.warn(
            f"'{self.address}' is bfloat16, which numpy does not have: it becomes float32, exactly; .torch() keeps it",
            stacklevel=3,
        )

    def _read(self, positions: Positions) -> Tensor:
        """Copy rows out of the files: every file once, its rows in their order, to where they were asked for."""
        if self.rows.chosen is not None:
            positions = self.rows.chosen[positions]
        rows = torch.empty((len(positions), *self.shape[1:]), dtype=self.dtype)
        order = np.argsort(positions, kind="stable")
        ascending = positions[order]
        borders = np.searchsorted(ascending, self.rows.first_rows)
        for number in np.flatnonzero(np.diff(borders)).tolist():
            part = slice(borders[number], borders[number + 1])
            within = torch.from_numpy(ascending[part] - self.rows.first_rows[number])
            rows[torch.from_numpy(order[part])] = self._mapped(number)[within]
        return rows

    def _map(self, number: int) -> Tensor:
        """Return the rows of a shard without reading them: the system does as they are looked at.

        The mapping is private, so that what is written to the tensor is memory of this process, and never the file.
        """
        file, (start, stop) = self.rows.files[number], self.rows.first_rows[number : number + 2]
        try:
            with open_shard(file) as opened:
                tensor: Tensor = opened.get_tensor(self.address)
        except (SafetensorError, RuntimeError) as error:
            raise ShardError(file, f"is damaged: {error}") from None
        if (tensor.dtype, tensor.shape) != (self.dtype, (stop - start, *self.shape[1:])):
            raise ShardError(file, "is another one than when the run was opened")
        return tensor


def _positions(index: Any, length: int) -> Positions:
    """Return the rows that an index names, counted from 0; without a dimension if it names one."""
    if isinstance(index, slice):
        return np.arange(*index.indices(length))
    try:
        named = np.asarray(index.numpy(force=True) if isinstance(index, Tensor) else index)
    except ValueError:  # a list of lists of different lengths
        named = np.array(None)
    if named.dtype == bool and named.shape == (length,):
        return np.flatnonzero(named)
    is_empty = named.shape == (0,)
    if isinstance(index, tuple) or not (is_empty or (named.ndim <= 1 and named.dtype.kind in "iu")):
        raise TypeError(f"rows are an integer, a slice, a list of integers or a mask of {length}, {_instead(index)}")
    outside = named[(named < -length) | (named >= length)]
    if outside.size:
        raise IndexError(f"row {outside.flat[0]} of {length:,}")
    positions = named.astype(np.int64)
    return np.where(positions < 0, positions + length, positions)


def _instead(index: Any) -> str:
    if isinstance(index, str):
        return f"not {index!r}; an image has its row by .of({index!r})"
    if isinstance(index, tuple):
        return f"not {index!r}; take rows first, and then a part of their tensor: [rows][:, 0]"
    if isinstance(index, np.ndarray | Tensor):
        return f"not an array of {index.dtype} with the shape {tuple(index.shape)}"
    return f"not {reprlib.repr(index)}"
