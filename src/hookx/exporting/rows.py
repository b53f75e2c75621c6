"""The rows of one layer, as numpy sees them, a bounded block at a time and each with its key."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from hookx.keys import key_bytes
from hookx.read.activations import Activations

log = logging.getLogger("hookx")

_BLOCK_BYTES = 16 * 2**20
_BLOCK_ROWS = 2**14  # A row can be a single number, and its key is longer than that.


@dataclass(frozen=True)
class Rows:
    """What is exported.

    Attributes:
        keys: the image key of every row.
        dtype: the numpy type that is written; it holds every value of the stored one.
        origin: where the rows come from, as names and texts that any format can hold.
        advance: called with a number of rows, once for each row.
    """

    keys: Sequence[str]
    activations: Activations
    dtype: np.dtype[np.generic]
    origin: Mapping[str, str]
    advance: Callable[[int], None]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return (rows, *shape of one image)."""
        return self.activations.shape

    @property
    def values_per_row(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def bytes_per_row(self) -> int:
        return self.values_per_row * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return len(self) * self.bytes_per_row

    @property
    def rows_per_block(self) -> int:
        return min(_BLOCK_ROWS, max(1, _BLOCK_BYTES // max(1, self.bytes_per_row)))

    def spans(self) -> Iterator[slice]:
        """Cut the rows into blocks of some 16 MiB, or of one row if that is larger."""
        for start in range(0, len(self), self.rows_per_block):
            yield slice(start, min(start + self.rows_per_block, len(self)))

    def blocks(self, *, is_last_pass: bool = True) -> Iterator[tuple[slice, NDArray[np.generic]]]:
        """Read the rows, a block at a time; a format that reads them more than once reports its last pass only."""
        wider = getattr(torch, self.dtype.name)
        for span in self.spans():
            yield span, self.activations[span].to(wider).numpy()
            if is_last_pass:
                self.advance(span.stop - span.start)

    @cached_property
    def keys_are_text(self) -> bool:
        """Whether all file names are UTF-8, as nearly all are; if not, what can hold text only holds their bytes."""
        if any(re.search("[\udc80-\udcff]", key) for key in self.keys):
            log.info("some file names are not UTF-8, so the keys are written as bytes")
            return False
        return True

    def texts(self, span: slice) -> list[str] | list[bytes]:
        """Return the keys of some rows as texts or, where not every key of the run is one, as bytes."""
        return list(self.keys[span]) if self.keys_are_text else list(map(key_bytes, self.keys[span]))
