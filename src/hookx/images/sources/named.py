"""Files that a list or a table names."""

from __future__ import annotations

import os
from collections.abc import Iterator

from hookx.errors import ImageError
from hookx.images.sources.source import Found, Look


def find_named(paths: list[bytes], here: bytes, root_of_here: bytes, look: Look, named_by: str) -> Iterator[Found]:
    """Yield files by normalised paths, with keys relative to `here`, to `--root` if it is given, or else to '/'.

    Args:
        here: the folder that relative paths begin in, with '/' at its end.
        root_of_here: how errors and the system are told that folder.
    """
    if look.root:
        root = os.path.join(os.path.abspath(os.fsencode(look.root)), b"")
        whole = [path if path.startswith(b"/") else here + path for path in paths]
        outside = next((path for path in whole if not path.startswith(root)), None)
        if outside is not None:
            raise ImageError(
                f"'{os.fsdecode(outside)}', named by {named_by}, is not within --root '{look.root}'",
                "name a folder above all of them",
            )
        yield Found(root, [path.removeprefix(root) for path in whole], is_named=True)
        return
    inside = [path.removeprefix(here) for path in paths if path.startswith(here) or not path.startswith(b"/")]
    yield Found(root_of_here, inside, is_named=True)
    others = [path.lstrip(b"/") for path in paths if path.startswith(b"/") and not path.startswith(here)]
    yield Found(b"/", others, is_named=True)


def normalise(path: bytes) -> bytes:
    """Return the absolute path of a file, in one spelling."""
    if b".." in path.split(b"/"):  # After a link, '..' is not the folder before it.
        path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    return os.path.abspath(path)
