"""A list of images in a file that any number of processes map: one copy in the page cache, however many they are.

A line of JSON says where the images lie and how long the parts are; behind it, at multiples of 8 bytes, follow the
numbers of the keys' ends and of the files' sizes; if there are archives, those of the members' offsets and of the bytes
that they take there; if a table gives the keys, those of the paths' ends; those of the roots; and then the keys and the
paths, one after the other.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import mmap
import os
import sys
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hookx.errors import ImageError
from hookx.images.files import Archive, Files
from hookx.images.listing import ImageList, Remarks
from hookx.keys import Keys

_ALIGNMENT = 8
_BEGIN_AGAIN = "move it away, and begin the run again"
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)


def write_list(images: ImageList, path: Path, sources: Sequence[str] = ()) -> None:
    """Write a list to a new file, for the processes of one run on machines of one kind.

    Args:
        sources: what was listed; see `sources_of`.
    """
    keys, files = images.keys, images.files
    header = {
        "images": len(images),
        "sources": list(sources),
        "sha256": images.sha256,
        "roots": [os.fsdecode(root) for root in files.roots],
        "key_bytes": keys.ends[-1],
        "byte_order": sys.byteorder,
        "path_bytes": files.paths.ends[-1] if files.paths is not None else None,
        "named": sorted(files.named),
        "archives": [[number, *dataclasses.astuple(archive)] for number, archive in files.archives.items()],
        "remarks": dataclasses.asdict(images.remarks),
    }
    line = json.dumps(header).encode()
    with open(path, "xb") as file:
        file.write(line + b" " * (-(len(line) + 1) % _ALIGNMENT) + b"\n")
        file.write(keys.ends)
        file.write(memoryview(array("q", images.sizes_bytes)))
        if files.archives:
            file.write(memoryview(array("q", files.offsets)))
            file.write(memoryview(array("q", files.stored_bytes)))
        if files.paths is not None:
            file.write(files.paths.ends)
        file.write(memoryview(array("i", files.root_of)))
        file.write(keys.block)
        if files.paths is not None:
            file.write(files.paths.block)


def map_list(path: Path) -> ImageList:
    """Map a list that `write_list` wrote; `ImageError` if the file cannot be read, or is of another kind of machine.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from hookx.images.listing import list_images
        >>> with TemporaryDirectory() as folder:
        ...     write_list(list_images(["images"]), Path(folder, "list"))
        ...     images = map_list(Path(folder, "list"))
        >>> len(images), images.keys[0], images.files[0], images.sizes_bytes[0]
        (8, 'animals/chelsea.jpg', 'images/animals/chelsea.jpg', 27833)
    """
    try:
        with open(path, "rb") as file:
            line = file.readline()
            whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        raise ImageError(
            f"cannot read the list of images {path}: {error}", "does this machine see that folder?"
        ) from None
    header = _parse(line, path)
    if header["byte_order"] != sys.byteorder:
        raise ImageError(f"the list of images {path} was written on another kind of machine")
    count, start = header["images"], len(line)
    # A list that an earlier version wrote says nothing about archives.
    archives = {number: Archive(*described) for number, *described in header.get("archives", ())}
    path_bytes = header.get("path_bytes")
    wide = 2 + 2 * bool(archives) + (path_bytes is not None)
    if len(whole) != start + (8 * wide + 4) * count + header["key_bytes"] + (path_bytes or 0):
        raise ImageError(f"{path} is not a list of images, or was cut short", _BEGIN_AGAIN)
    starts = range(start, start + 8 * wide * count + 1, 8 * count)
    ends, sizes, *places = (whole[one : one + 8 * count].cast("q") for one in starts[:-1])
    root_of = whole[starts[-1] : starts[-1] + 4 * count].cast("i")
    first = starts[-1] + 4 * count
    keys = Keys(whole[first : first + header["key_bytes"]], ends)
    paths = Keys(whole[first + header["key_bytes"] :], places.pop()) if path_bytes is not None else None
    offsets, stored_bytes = places or (None, None)
    roots = [os.fsencode(root) for root in header["roots"]]
    files = Files(keys, roots, root_of, archives, offsets, stored_bytes, header.get("named"), paths)
    images = ImageList(keys, files, sizes, Remarks(**header.get("remarks", {})))
    vars(images)["sha256"] = header["sha256"]  # Computing it anew would read all of the file.
    return images


def sources_of(path: Path) -> list[str] | None:
    """Return what the list in a file was made of; None if there is no such file."""
    try:
        with open(path, "rb") as file:
            return list(_parse(file.readline(), path)["sources"])
    except OSError as error:
        if error.errno in _NO_FILE:  # What is wrong with the name of an output directory is said where it is begun.
            return None
        raise ImageError(f"cannot read the list of images {path}: {error}") from None


def _parse(line: bytes, path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except ValueError:
        raise ImageError(f"{path} is not a list of images", _BEGIN_AGAIN) from None
