"""A list of paths on standard input."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from hookx.errors import ImageError
from hookx.images.addresses import is_url
from hookx.images.retries import reason_of
from hookx.images.sources.kinds import refuse_listed
from hookx.images.sources.named import find_named, normalise
from hookx.images.sources.source import Found, Look

_BLOCK_BYTES = 2**20  # read at once


@dataclass(frozen=True)
class StandardInput:
    """The files that standard input names; their keys are relative to the working directory, or to `--root`.

    Args:
        end: what ends a path, a line break or NUL.
    """

    end: bytes

    def find(self, look: Look) -> Iterator[Found]:
        try:
            here = os.path.join(os.getcwdb(), b"")
        except OSError as error:
            raise ImageError(
                f"cannot tell the working directory: {reason_of(error)}", "change to one that exists"
            ) from None
        for block in _read_blocks(self.end):
            paths = _split(block, self.end)
            refuse_listed(paths)
            yield from find_named(paths, here, b"", look, "standard input")


def _split(block: bytes, end: bytes) -> list[bytes]:
    """Return the paths of a block, normalised."""
    block = end + block + end
    if end == b"\n":
        block = block.replace(b"\r\n", b"\n")
        if b"\0" in block:
            raise ImageError("the list on standard input contains a NUL", "if NULs end the paths, write -0")
    # Normalising every path would take longer than listing it, and few lists need it; but `find .` writes './'
    # before each path.
    is_plain = not any(text in block for text in (b"//", b"/.", b"/" + end, end + end))
    if is_plain:
        block = block.replace(end + b"./", end)
    paths = block[1:-1].split(end)
    if not is_plain or end + b"." in block:
        paths = [path if is_url(path) else normalise(path) for path in paths if path]
    return paths


def _read_blocks(end: bytes) -> Iterator[bytes]:
    """Read standard input in blocks that are cut at the end of a path, without that end."""
    if sys.stdin is None:
        raise ImageError("cannot read the list: standard input is closed", "pipe the paths in: find images/ | ...")
    rest = b""
    try:
        while more := sys.stdin.buffer.read(_BLOCK_BYTES):
            block, _, rest = (rest + more).rpartition(end)
            yield block
    except OSError as error:
        raise ImageError(f"cannot read the list on standard input: {reason_of(error)}") from None
    yield rest
