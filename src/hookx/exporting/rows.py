"""The rows of one layer as numpy arrays, a bounded block at a time, each row with its key."""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hookx.keys import key_bytes
from hookx.read.activations import Activations
from hookx.read.columns import Columns, as_objects
from hookx.store.columns import Value

log = logging.getLogger("hookx")


@dataclass(frozen=True)
class Rows:
    """What is exported."""

    keys: Sequence[str]
    activations: Activations
    dtype: np.dtype[np.generic]  # to write; it holds every value of the stored type
    origin: Mapping[str, str]  # layer, model, weights and fingerprint of the run, as text that every format can hold
    columns: Columns  # what else is known of the images
    advance: Callable[[int], None] = lambda rows_read: None  # called as export's `progress`
    max_block_bytes: int = 16 * 2**20  # or a single row
    max_block_rows: int = 2**14  # A second bound, because a row can be smaller than its key.

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.activations.shape

    @property
    def values_per_row(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def nbytes(self) -> int:
        return len(self) * self.values_per_row * self.dtype.itemsize

    @property
    def rows_per_block(self) -> int:
        row_bytes = self.values_per_row * self.dtype.itemsize
        return min(self.max_block_rows, max(1, self.max_block_bytes // max(1, row_bytes)))

    def spans(self) -> Iterator[slice]:
        """Yield the rows of each block, in order."""
        for start in range(0, len(self), self.rows_per_block):
            yield slice(start, min(start + self.rows_per_block, len(self)))

    def blocks(self) -> Iterator[tuple[slice, NDArray[np.generic]]]:
        """Read the rows one block at a time, and report each block when the next one is requested."""
        dtype = getattr(torch, self.dtype.name)
        for span in self.spans():
            yield span, self.activations[span].to(dtype).numpy()
            self.advance(span.stop - span.start)

    def values(self, span: slice) -> Iterator[tuple[Value, ...]]:
        """Yield the values of the columns for some rows, one row at a time; None where there is none."""
        if not self.columns:
            return itertools.repeat((), span.stop - span.start)
        arrays = (as_objects(*self.columns.read(name, span)) for name in self.columns)
        return zip(*(array.tolist() for array in arrays), strict=True)

    def numbers_or_texts(self, name: str) -> NDArray[Any]:
        """Return a column for formats that cannot lack a value: numbers, in which NaN stands for none, or texts."""
        values, present = self.columns.read(name)
        if self.columns.kinds[name] == "text":
            return values if present is None else np.where(present, values, "")
        return values if present is None else np.where(present, values.astype(np.float64), np.nan)

    @cached_property
    def keys_are_text(self) -> bool:
        """Whether every file name is valid UTF-8, as nearly all are; formats that hold only text get bytes if not."""
        if any(re.search("[\udc80-\udcff]", key) for key in self.keys):
            log.info("some file names are not UTF-8, so the keys are written as bytes")
            return False
        return True

    def texts(self, span: slice) -> list[str] | list[bytes]:
        """Return the keys of some rows as text, or as bytes if not every key of the run is valid UTF-8."""
        return list(self.keys[span]) if self.keys_are_text else list(map(key_bytes, self.keys[span]))
