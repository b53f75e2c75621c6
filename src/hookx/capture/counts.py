"""Count the values that a user should know of: not finite, all zero, or changed by the stored type."""

from __future__ import annotations

import torch
from torch import Tensor

from hookx.plan import ValueCounts


class ValueCounter:
    """Collects `ValueCounts` over many passes, on the device of the values."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, list[Tensor]]] = {}
        self._of_pass: list[tuple[str, str, Tensor]] = []

    def begin_pass(self) -> None:
        """Drop the counts of a pass that did not end: a batch that fails is run again in parts."""
        self._of_pass = []

    def end_pass(self) -> None:
        for address, kind, count in self._of_pass:
            self._sums.setdefault(address, {}).setdefault(kind, []).append(count)
        self._of_pass = []

    def add(self, address: str, value: Tensor, stored: Tensor) -> None:
        """Count in one batch of floating-point activations, as returned and as stored."""
        # NaN, infinity and a lone non-zero all survive into the extremes of an image.
        per_image = value.unsqueeze(1) if value.ndim == 1 else value
        if not per_image.shape[1:].numel():
            return
        dims = tuple(range(1, per_image.ndim))
        high, low = per_image.amax(dims), per_image.amin(dims)
        found = {"non_finite": ~(high.isfinite() & low.isfinite()), "all_zero": (high == 0) & (low == 0)}
        if torch.finfo(stored.dtype).bits < torch.finfo(value.dtype).bits:
            found["overflowed"] = stored.isinf() & ~value.isinf()
            found["flushed"] = (stored == 0) & (value != 0)
        # The sums are read once a shard: reading one now would wait for the GPU.
        self._of_pass += [(address, kind, where.sum()) for kind, where in found.items()]

    def take(self) -> ValueCounts:
        """Return the counts since the last call."""
        counts = {
            address: {kind: count for kind, sums in by_kind.items() if (count := sum(map(int, sums)))}
            for address, by_kind in self._sums.items()
        }
        self._sums.clear()
        return ValueCounts({address: by_kind for address, by_kind in counts.items() if by_kind})
