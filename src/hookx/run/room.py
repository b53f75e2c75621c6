"""The room that a run needs on the disk of its output directory."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from hookx.errors import StoreError


def check_room(out: Path, bytes_to_write: int) -> None:
    """Raise `StoreError` if the file system of the output directory has less free."""
    if bytes_to_write > (free := bytes_free(out)):
        raise StoreError(
            f"the activations need {bytes_to_write:,} bytes and {_existing_parent(out)} has {free:,} free",
            "choose another --out, fewer --layers, a reduction such as @mean23, or --dtype fp16",
        )


def bytes_free(out: Path) -> int:
    try:
        return shutil.disk_usage(_existing_parent(out)).free
    except OSError:  # Not every file system tells; a full one says so while it is written to.
        return sys.maxsize


def _existing_parent(path: Path) -> Path:
    path = Path(os.path.abspath(path))
    return path if os.path.exists(path) or path == path.parent else _existing_parent(path.parent)
