"""The room that a run needs on the disk: where its shards stay, or where they are built for an object store."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from hookx.errors import StoreError
from hookx.plan import Plan, Shard
from hookx.store.location import Location
from hookx.store.objects.path import ObjectPath
from hookx.store.scratch import scratch_parent
from hookx.store.writer import MAX_WAITING

_SHARDS_AT_ONCE = MAX_WAITING + 3  # on their way to the store, and in the hands of the processes that compute


def check_room(
    out: Location, pending: Sequence[Shard], plan: Plan, scratch: str | os.PathLike[str] | None, places: int = 1
) -> None:
    """Raise `StoreError` if a file system has too little room for what a run writes to it.

    Args:
        places: how many processes of this host build shards, each on its own.
    """
    bytes_to_write = sum(map(len, pending)) * plan.bytes_per_image
    if isinstance(out, ObjectPath):
        shard_bytes = max(map(len, pending), default=0) * plan.bytes_per_image
        needed = min(bytes_to_write, places * _SHARDS_AT_ONCE * shard_bytes)
        what = "the shards that are built before they go to the store need"
        _check(scratch_parent(scratch), needed, what, "choose another --scratch, or a smaller --max-shard-size")
    else:
        then = "choose another --out, fewer --layers, a reduction such as @mean23, or --dtype fp16"
        _check(out, bytes_to_write, "the activations need", then)


def _check(folder: Path, needed_bytes: int, what: str, then: str) -> None:
    if needed_bytes > (free := bytes_free(folder)):
        raise StoreError(f"{what} {needed_bytes:,} bytes and {_existing_parent(folder)} has {free:,} free", then)


def bytes_free(folder: Path) -> int:
    try:
        return shutil.disk_usage(_existing_parent(folder)).free
    except OSError:  # Not every file system tells; a full one says so while it is written to.
        return sys.maxsize


def _existing_parent(path: Path) -> Path:
    path = Path(os.path.abspath(path))
    return path if os.path.exists(path) or path == path.parent else _existing_parent(path.parent)
