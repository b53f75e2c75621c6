"""How the list of images is cut into shards, and what a shard holds for one image."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from hookx.keys import LazySequence

# torch's name -> (safetensors' code, bytes an element); the types that a safetensors file can hold.
DTYPES = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
    "complex64": ("C64", 8),
}

# Shards are cut at multiples of this many images, so that the last batch of a shard is seldom a small one.
_CUT = 32


@dataclass(frozen=True)
class LayerSpec:
    """One tensor of every shard: its key, the shape it has for one image, and its stored type."""

    address: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes_per_image(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][1]


@dataclass(frozen=True)
class Shard:
    """A run of consecutive images (positions `start` to `stop` in the sorted list) that share a file."""

    number: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def batches(self, batch_size: int) -> Iterator[range]:
        """Cut the shard into ranges of positions; a batch never straddles two shards.

        Example:
            >>> list(Shard(1, 4, 9).batches(2))
            [range(4, 6), range(6, 8), range(8, 9)]
        """
        for start in range(self.start, self.stop, batch_size):
            yield range(start, min(start + batch_size, self.stop))


class _Shards(LazySequence[Shard]):
    def __init__(self, image_count: int, images_per_shard: int) -> None:
        self._starts = range(0, image_count, images_per_shard)

    def __len__(self) -> int:
        return len(self._starts)

    def item(self, position: int) -> Shard:
        start = self._starts[position]
        return Shard(position, start, min(start + self._starts.step, self._starts.stop))


def images_per_shard(bytes_per_image: int, max_shard_bytes: int, max_images: int) -> int:
    """Decide how many images share a shard: as many as the limits allow, at least one.

    Example:
        >>> images_per_shard(3_211_264, 512 * 2**20, 4096)  # conv1 of resnet18, fp32
        160
    """
    count = min(max_images, max_shard_bytes // max(bytes_per_image, 1))
    if _CUT < count < max_images:
        count -= count % _CUT
    return max(count, 1)
