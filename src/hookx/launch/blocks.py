"""Which shards a worker gets next: large blocks at first, small ones towards the end, so that all end together."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Sequence

_BLOCKS_EACH = 4  # of what remains, for every worker
# Handing out a block costs some 0.3 s of processes and memory; and what a slow worker has, no other can take from it.
_MIN_SECONDS, _MAX_SECONDS = 10, 300
_MAX_DEATHS = 3


class Blocks:
    """The shards that nobody computes yet.

    A shard of a worker that exited is handed out again. Which of the worker's shards was to blame shows when each is
    handed out alone; one at which several workers crashed is given up.

    Example:
        >>> blocks = Blocks(range(20))
        >>> blocks.take(workers=2, shards_per_second=1.0), blocks.take(workers=2, shards_per_second=0.1), len(blocks)
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [10], 9)
    """

    def __init__(self, numbers: Iterable[int]) -> None:
        self._waiting = deque(numbers)
        self._deaths: Counter[int] = Counter()
        self.given_up: list[int] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self, workers: int, shards_per_second: float | None) -> list[int]:
        """Hand out a block to one of some workers, by how many shards it computes in a second, if that is known."""
        if not self._waiting or self._deaths[self._waiting[0]]:
            return [self._waiting.popleft()] if self._waiting else []
        size = 1
        if shards_per_second is not None:
            least, most = (math.floor(seconds * shards_per_second) for seconds in (_MIN_SECONDS, _MAX_SECONDS))
            share = math.ceil(len(self._waiting) / workers)
            size = max(1, min(share, most, max(least, len(self._waiting) // (_BLOCKS_EACH * workers))))
        block: list[int] = []
        while len(block) < size and self._waiting and not self._deaths[self._waiting[0]]:
            block.append(self._waiting.popleft())
        return block

    def take_back(self, numbers: Sequence[int], *, died: bool) -> list[int]:
        """Take back what a worker will not compute; return those that are given up, because workers crashed at them."""
        given_up = []
        for number in numbers:
            self._deaths[number] += died
            if self._deaths[number] >= _MAX_DEATHS and len(numbers) == 1:
                given_up.append(number)
        self._waiting.extendleft(number for number in reversed(numbers) if number not in given_up)
        self.given_up += given_up
        return given_up
