"""How the image list is cut into shards, what a shard stores for one image, and what is remarkable in its values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hookx.keys import LazySequence

# torch's name -> (safetensors' code, bytes per element), for every dtype that a safetensors file can hold.
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
_SENTENCES = {
    "non_finite": "NaN or infinity in {address} of {count:,} images",
    "all_zero": "{address} is all zero for {count:,} images",
    "overflowed": "{count:,} values of {address} became infinite in the stored type",
    "flushed": "{count:,} values of {address} became zero in the stored type",
}
_OTHER = "{count:,} of {address} are of another kind"  # which a later version of hookx counted
KINDS = tuple(_SENTENCES)

# Cut shards at multiples of a common batch size, so that few of them end in a small batch.
_CUT_IMAGES = 32


@dataclass(frozen=True)
class LayerSpec:
    """One tensor of every shard: its key, its shape for one image, and its stored dtype."""

    address: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes_per_image(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][1]


@dataclass(frozen=True)
class Shard:
    """Consecutive images that share a file: positions `start` to `stop` in the sorted list."""

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


class Shards(LazySequence[Shard]):
    """The shards of a plan, cut on access."""

    def __init__(self, image_count: int, images_per_shard: int) -> None:
        self._starts = range(0, image_count, images_per_shard)

    def __len__(self) -> int:
        return len(self._starts)

    def item(self, position: int) -> Shard:
        start = self._starts[position]
        return Shard(position, start, min(start + self._starts.step, self._starts.stop))


def images_per_shard(bytes_per_image: int, max_shard_bytes: int, max_images: int) -> int:
    """Return how many images share a shard: as many as both limits allow, at least one.

    Example:
        >>> images_per_shard(3_211_264, 512 * 2**20, 4096)  # conv1 of resnet18, fp32
        160
    """
    count = min(max_images, max_shard_bytes // max(bytes_per_image, 1))
    if _CUT_IMAGES < count < max_images:
        count -= count % _CUT_IMAGES
    return max(count, 1)


class ValueCounts(dict[str, dict[str, int]]):
    """Counts by address and kind (see `KINDS`); what did not occur is absent.

    'non_finite' and 'all_zero' count images; 'overflowed' and 'flushed' count values that the stored type made
    infinite or zero.

    Example:
        >>> counts = ValueCounts({"conv1": {"all_zero": 2}})
        >>> counts.add({"conv1": {"all_zero": 1, "overflowed": 5000}})
        >>> print("; ".join(counts.sentences()))
        conv1 is all zero for 3 images; 5,000 values of conv1 became infinite in the stored type
    """

    def add(self, counts: Mapping[str, Mapping[str, int]]) -> None:
        for address, by_kind in counts.items():
            total = self.setdefault(address, {})
            for kind, count in by_kind.items():
                total[kind] = total.get(kind, 0) + count

    def sentences(self) -> list[str]:
        return [
            _SENTENCES.get(kind, _OTHER).format(count=count, address=address)
            for address, by_kind in self.items()
            for kind, count in by_kind.items()
        ]
