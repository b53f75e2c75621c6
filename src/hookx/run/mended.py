"""Images that a run could not read, and that have changed since: they are still those that the run was begun with."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace

from hookx.errors import ImageError
from hookx.images.listing import ImageList
from hookx.keys import images_sha256
from hookx.plan import Plan, Shard
from hookx.store.directory import present_shards
from hookx.store.location import Location
from hookx.store.record import ShardRecord, read_record

log = logging.getLogger("hookx")


def as_begun(out: Location, begun: Plan | None, plan: Plan, images: ImageList) -> tuple[Plan, Sequence[int]]:
    """Return the plan with the images of the run that was begun, and the sizes in bytes that they had then.

    The fingerprint covers the size of every file. A file that could not be read has left no number in any shard, so
    mending it must not make another run: it keeps the size with which the run was begun, and so do those that a run has
    read since. If anything else differs, both are returned as they are.
    """
    sizes_bytes = images.sizes_bytes
    if begun is None or begun.image_count != len(images) or begun.images_sha256 == plan.images_sha256:
        return plan, sizes_bytes
    then_bytes = array("q", sizes_bytes)
    for shard in present_shards(out, begun):
        for key, size_bytes in _changed(read_record(out, begun, shard), images):
            position = images.keys.place(key)
            if position in range(shard.start, shard.stop) and images.keys[position] == key:
                then_bytes[position] = size_bytes
    if images_sha256(images.keys, then_bytes) != begun.images_sha256:
        return plan, sizes_bytes
    return replace(plan, images_sha256=begun.images_sha256), then_bytes


def _changed(record: ShardRecord, images: ImageList) -> Iterator[tuple[str, int]]:
    """Yield what may have changed since the run was begun, and the size that it had."""
    mended, failed = record.mended or {}, {key for key, _ in record.failures}
    for key, then_bytes in zip(record.keys_of_images, record.sizes_bytes, strict=False):
        is_as_mended = key in mended and key in images.keys
        if is_as_mended and images.sizes_bytes[images.keys.index(key)] != mended[key]:
            continue  # It was changed again after it was read.
        if is_as_mended or key in failed:
            yield key, then_bytes


def mended_in(shard: Shard, images: ImageList, then_bytes: Sequence[int]) -> dict[str, int]:
    """Return the images of a shard whose size has changed since the run was begun, with their size now."""
    return {
        images.keys[position]: images.sizes_bytes[position]
        for position in range(shard.start, shard.stop)
        if images.sizes_bytes[position] != then_bytes[position]
    }


def failing_shards(out: Location, plan: Plan, finished: Sequence[Shard]) -> frozenset[int]:
    """Return the numbers of the finished shards that lack images which could not be read."""
    failing = {shard.number for shard in finished if read_record(out, plan, shard).failures}
    if not failing:
        log.info("there are no failures to try again")
    return frozenset(failing)


def check_nothing_lost(out: Location, plan: Plan, shard: Shard, record: ShardRecord) -> None:
    """Raise `ImageError` if a shard would take the place of one that holds an image which it lacks."""
    there = set(read_record(out, plan, shard).keys)
    for key, reason in record.failures:
        if key in there:
            raise ImageError(
                f"cannot read '{key}' now, which {out / plan.shard_file(shard)} holds: {reason}",
                "the shard is kept as it is; restore the image, and run the same command again",
            )
