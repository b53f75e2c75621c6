"""A run as torch's DataLoader wants it: a map-style dataset, and a shuffled order that walks the shards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from hookx.errors import UsageError
from hookx.keys import Keys
from hookx.options import parse_bytes
from hookx.read.activations import Activations, Positions

_STRETCH_BYTES = 2**20  # Long enough that a disk reads it at nearly its full speed.
_WINDOW_ROWS_AT_MOST = 2**20  # Of small rows many fit into a window, and their order is in memory too.


class ActivationDataset(Dataset[tuple[Any, str]]):
    """A map-style dataset of (activation, key); of several addresses, of ({address: activation}, key).

    It holds no open file, so worker processes can be forked or spawned. A DataLoader's batch is read at once, each
    shard's file in its order. A row is a copy: a transform may change it in place.

    Args:
        activations: by address, of the same rows.
        address: the one whose activations are items; None for a dict of all.
        transform: what an item's activation (or dict of them) becomes, in the process that reads it. To be spawned, it
            must be a function that can be pickled.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from torch.utils.data import DataLoader
        >>> import hookx
        >>> with TemporaryDirectory() as out:
        ...     _ = hookx.extract("resnet18", "avgpool,fc", "images", weights="none", out=out)
        ...     dataset = hookx.open(out).dataset(["avgpool", "fc"])
        ...     loader = DataLoader(dataset, batch_size=4, sampler=dataset.sampler(seed=0))
        ...     shapes = [{address: tuple(rows.shape) for address, rows in batch.items()} for batch, keys in loader]
        >>> shapes[0]
        {'avgpool': (4, 512, 1, 1), 'fc': (4, 1000)}
    """

    def __init__(
        self,
        activations: Mapping[str, Activations],
        address: str | None = None,
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        self.activations, self.address, self.transform = activations, address, transform
        self.rows = next(iter(activations.values())).rows

    @property
    def keys(self) -> Keys:
        """The image key of every item."""
        return self.rows.keys

    def __len__(self) -> int:
        return len(self.rows.keys)

    def __getitem__(self, row: int) -> tuple[Any, str]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[Any, str]]:
        """Return several items; a DataLoader asks for a batch with this."""
        read = {address: activations[rows] for address, activations in self.activations.items()}
        return [
            (self._item({address: tensor[number] for address, tensor in read.items()}), self.keys[row])
            for number, row in enumerate(rows)
        ]

    def _item(self, activations: dict[str, Any]) -> Any:
        item = activations if self.address is None else activations[self.address]
        return item if self.transform is None else self.transform(item)

    def _prefetch(self, start: int, stop: int) -> None:
        for activations in self.activations.values():
            activations.prefetch(start, stop)

    def sampler(self, *, seed: int = 0, window: str | int = "256MiB") -> ShardSampler:
        """Return a sampler for a DataLoader, which shuffles; `ShardSampler` says how.

        Args:
            seed: decides the order, together with the epoch.
            window: how much is shuffled at once. The next window is read from the disk while one is used, so the
                system's cache of files should have room for two.
        """
        row_bytes = max(1, sum(activations.bytes_per_row for activations in self.activations.values()))
        window_bytes = parse_bytes(window) if isinstance(window, str) else window
        return ShardSampler(
            self.rows.borders,
            self._prefetch,
            rows_per_stretch=max(1, _STRETCH_BYTES // row_bytes),
            rows_per_window=min(window_bytes // row_bytes, _WINDOW_ROWS_AT_MOST),
            seed=seed,
        )


class ShardSampler(Sampler[int]):
    """Every row once, in an order that is shuffled and yet reads the shards as a disk likes it.

    Neighbours in a shard are alike: keys are in order, so a folder's images, often a class, stand together. Shards are
    therefore cut into stretches of rows (about 1 MiB), all stretches are shuffled, and the rows of as many as fit into
    a window are shuffled among each other. So every window mixes rows from all over the run, and is read a stretch at
    a time. What is smaller than a window, and rows of a stretch's size, are shuffled without any such limit.

    Every iteration is the next epoch, with an order of its own; `set_epoch` goes to a certain one, as when training is
    resumed. The order follows from the seed and the epoch alone.

    Args:
        borders: the first row of every shard, and the number of all rows.
        prefetch: called with the first row of a stretch, and the one after its last, before its window is used.
        rows_per_stretch: the most rows that are kept together up to a window.
        rows_per_window: about how many rows are shuffled at once; at least those of a stretch.
        seed: decides the order, together with the epoch.
    """

    def __init__(
        self,
        borders: Positions,
        prefetch: Callable[[int, int], None] = lambda start, stop: None,
        *,
        rows_per_stretch: int,
        rows_per_window: int,
        seed: int = 0,
    ) -> None:
        if seed < 0:
            raise UsageError(f"the seed is {seed}; it is 0 or more")
        self.borders, self.prefetch, self.seed, self.epoch = borders, prefetch, seed, 0
        self.rows_per_stretch = rows_per_stretch
        self.stretches_per_window = max(1, rows_per_window // rows_per_stretch)

    def __len__(self) -> int:
        return int(self.borders[-1])

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be this epoch, counted from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        return self._order(np.random.default_rng([self.seed, epoch]))

    def _order(self, random: np.random.Generator) -> Iterator[int]:
        cut = [np.arange(start, stop, self.rows_per_stretch) for start, stop in pairwise(self.borders)]
        starts = np.concatenate([self.borders[:0], *cut])
        stretches = np.stack([starts, np.append(starts, len(self))[1:]], axis=1)
        # Of equal size, or the rest would be a last window that mixes little.
        window_count = max(1, math.ceil(len(stretches) / self.stretches_per_window))
        windows = np.array_split(random.permutation(stretches), window_count)
        coming = iter(windows)

        def prefetch() -> None:
            for start, stop in sorted(next(coming, stretches[:0]).tolist()):
                self.prefetch(start, stop)

        prefetch()
        for window in windows:
            prefetch()  # The disk reads the next window while this one is used.
            rows = np.concatenate([self.borders[:0], *(np.arange(start, stop) for start, stop in window)])
            random.shuffle(rows)
            yield from rows.tolist()
