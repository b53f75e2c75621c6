"""How the images of a run differ from those of a list: what is new, what is gone, and what has another size."""

from __future__ import annotations

from dataclasses import dataclass, field

from hookx.errors import OtherRunError
from hookx.images.listing import ImageList
from hookx.keys import key_bytes
from hookx.plan import Plan
from hookx.run.reuse import MAY_GROW
from hookx.store.directory import present_shards
from hookx.store.location import Location
from hookx.store.record import read_record

_SHOWN = 3


@dataclass
class Images:
    """Images of one kind: how many there are, and the first keys."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, key: str) -> None:
        self.count += 1
        if len(self.first) < _SHOWN:
            self.first.append(key)

    def __str__(self) -> str:
        return ", ".join([*self.first, *(["..."] if self.count > _SHOWN else [])])


@dataclass
class Growth:
    """What a list has that a run has not, and the other way round."""

    new: Images = field(default_factory=Images)
    gone: Images = field(default_factory=Images)
    changed: Images = field(default_factory=Images)

    @classmethod
    def between(cls, path: Location, there: Plan, images: ImageList) -> Growth:
        """Compare a list with the images that the shards of a run account for."""
        growth, position = cls(), 0
        for shard in present_shards(path, there):
            record = read_record(path, there, shard)
            mended = record.mended or {}
            for key, size_bytes in zip(record.keys_of_images, record.sizes_bytes, strict=True):
                encoded = key_bytes(key)
                while position < len(images) and images.keys.encoded(position) < encoded:
                    growth.new.add(images.keys[position])
                    position += 1
                if position == len(images) or images.keys.encoded(position) != encoded:
                    growth.gone.add(key)
                    continue
                if images.sizes_bytes[position] not in (size_bytes, mended.get(key)):
                    growth.changed.add(key)
                position += 1
        for rest in range(position, len(images)):
            growth.new.add(images.keys[rest])
        return growth

    def sentences(self) -> list[str]:
        """Write what differs.

        Example:
            >>> growth = Growth(new=Images(1, ["cats/new.jpg"]), changed=Images(4, ["a.jpg", "b.jpg", "c.jpg"]))
            >>> growth.sentences()
            ['1 image is new: cats/new.jpg', '4 images have another size: a.jpg, b.jpg, c.jpg, ...']
        """
        kinds = [(self.new, "is new", "are new"), (self.gone, "is gone", "are gone")]
        kinds.append((self.changed, "has another size", "have another size"))
        return [
            f"1 image {one}: {images}" if images.count == 1 else f"{images.count:,} images {many}: {images}"
            for images, one, many in kinds
            if images.count
        ]


def explain(error: OtherRunError, path: Location, plan: Plan, there: Plan | None, images: ImageList) -> OtherRunError:
    """Return the error for a directory that holds another run, with what is new and how to compute only that."""
    if there is None or there.differences(plan, but=MAY_GROW):  # None: another process has begun it since.
        return error
    has_other_images = there.images_sha256 != plan.images_sha256
    growth = Growth.between(path, there, images) if has_other_images else Growth()
    is_longer = {layer.address for layer in there.layers} <= {layer.address for layer in plan.layers}
    steps = [f"to copy its rows into another run: --reuse {path}/ with another --out"]
    if is_longer and not growth.gone.count and not growth.changed.count:
        steps.insert(0, "to add what is new, and compute only that: the same command with --append")
    return OtherRunError(str(error), *growth.sentences(), *steps)
