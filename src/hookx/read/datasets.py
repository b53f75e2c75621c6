"""A run for torch's DataLoader: a map-style dataset, and a sampler that shuffles shard by shard."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from hookx.errors import UsageError
from hookx.keys import SortedKeys
from hookx.options import parse_bytes
from hookx.read.activations import Activations, Positions
from hookx.read.columns import Columns

_STRETCH_BYTES = 2**20  # Long enough for a disk to read at nearly full speed.
_MAX_WINDOW_ROWS = 2**20  # Bounds the memory for the order of small rows.


@dataclass(frozen=True)
class Targets:
    """A value for each row, which a model is to learn: a number, or the number of a class."""

    values: Sequence[Any]
    classes: tuple[str, ...] = ()

    @classmethod
    def of(cls, columns: Columns, name: str, keys: SortedKeys) -> Targets:
        """Take a column as targets; `UsageError` if a row has no value in it."""
        values, present = columns.read(name)
        if present is not None:
            lacking = np.flatnonzero(~present).tolist()
            raise UsageError(
                f"{len(lacking):,} of {len(values):,} rows have no {name}; the first: '{keys[lacking[0]]}'",
                "give each image one, or choose another column",
            )
        if columns.kinds[name] != "text":
            return cls(values.tolist())
        classes = sorted(set(values))
        numbers = {text: number for number, text in enumerate(classes)}
        return cls([numbers[text] for text in values], tuple(classes))


class ActivationDataset(Dataset[tuple[Any, Any]]):
    """A map-style dataset of (activation, key), or of ({address: activation}, key) for several addresses.

    It holds no open file, so worker processes can be forked or spawned. A DataLoader's batch is read at once, each
    shard in file order. A row is a copy, so a transform may change it in place. `keys` holds the key of every item.

    Args:
        activations: address -> activations, all over the same rows.
        address: the address whose activations are the items; None for a dict of all.
        transform: applied to each activation (or dict of them) where it is read; spawned workers need to pickle it.
        targets: what takes the place of the key in each item; None for the key.

    Attributes:
        classes: the texts that targets are numbers of; () if they are numbers themselves, or keys.

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
        targets: Targets | None = None,
    ) -> None:
        self.activations, self.address, self.transform, self.targets = activations, address, transform, targets
        self.classes = targets.classes if targets is not None else ()
        self.rows = next(iter(activations.values())).rows
        self.keys = self.rows.keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, row: int) -> tuple[Any, Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[Any, Any]]:
        """Return several items; a DataLoader gets each batch with one call."""
        read = {address: activations[rows] for address, activations in self.activations.items()}
        items: Iterable[Any]
        if self.address is not None:
            items = read[self.address]
        else:
            items = (dict(zip(read, tensors, strict=True)) for tensors in zip(*read.values(), strict=True))
        if self.transform is not None:
            items = map(self.transform, items)
        seconds = self.keys if self.targets is None else self.targets.values
        return [(item, seconds[row]) for item, row in zip(items, rows, strict=True)]

    def _prefetch(self, start: int, stop: int) -> None:
        for activations in self.activations.values():
            activations.prefetch(start, stop)

    def sampler(self, *, seed: int = 0, window: str | int = "256MiB") -> ShardSampler:
        """Return a shuffling sampler for a DataLoader; see `ShardSampler`.

        `window` says how much to shuffle at once, such as '1GiB'. The next window is read while one is in use, so the
        system's file cache should have room for two.
        """
        row_bytes = max(1, sum(activations.bytes_per_row for activations in self.activations.values()))
        window_bytes = parse_bytes(window) if isinstance(window, str) else window
        return ShardSampler(
            self.rows.borders,
            self._prefetch,
            rows_per_stretch=max(1, _STRETCH_BYTES // row_bytes),
            rows_per_window=min(window_bytes // row_bytes, _MAX_WINDOW_ROWS),
            seed=seed,
        )


class ShardSampler(Sampler[int]):
    """Yield every row once, in a shuffled order that a disk can read quickly.

    Neighbours in a shard are alike: keys are sorted, so the images of a folder, often a class, are adjacent. The
    sampler therefore cuts shards into stretches of rows (about 1 MiB), shuffles all stretches, and shuffles the rows of
    as many stretches as fit into a window. Every window mixes rows from the whole run and is read one stretch at a
    time. A run that fits into a window, or whose rows are as large as a stretch, is shuffled completely.

    Each iteration is the next epoch and has its own order; `set_epoch` selects one, for example to resume training.
    The order depends only on the seed and the epoch.

    Args:
        borders: the first row of every shard, and the number of all rows.
        prefetch: called with the first row of a stretch, and the one after its last, before its window is used.
        rows_per_stretch: the largest number of rows that stay together until their window is shuffled.
        rows_per_window: about how many rows to shuffle at once; at least one stretch.
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
            raise UsageError(f"the seed must be at least 0, got {seed}")
        self.borders, self.prefetch, self.seed, self.epoch = borders, prefetch, seed, 0
        self.rows_per_stretch = rows_per_stretch
        self.stretches_per_window = max(1, rows_per_window // rows_per_stretch)

    def __len__(self) -> int:
        return int(self.borders[-1])

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch of the next iteration, counted from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        return self._order(np.random.default_rng([self.seed, epoch]))

    def _order(self, random: np.random.Generator) -> Iterator[int]:
        cut = [np.arange(start, stop, self.rows_per_stretch) for start, stop in pairwise(self.borders)]
        starts = np.concatenate([self.borders[:0], *cut])
        stretches = np.stack([starts, np.append(starts, len(self))[1:]], axis=1)
        # Windows of equal size, because a small remainder at the end would mix little.
        window_count = max(1, math.ceil(len(stretches) / self.stretches_per_window))
        windows = np.array_split(random.permutation(stretches), window_count)
        # The disk reads the next window while one is in use.
        for window, coming in pairwise([stretches[:0], *windows, stretches[:0]]):
            for start, stop in sorted(coming.tolist()):
                self.prefetch(start, stop)
            rows = np.concatenate([self.borders[:0], *(np.arange(start, stop) for start, stop in window)])
            random.shuffle(rows)
            yield from rows.tolist()
