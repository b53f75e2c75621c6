"""What a user may ask for. No torch."""

from __future__ import annotations

import re
from fractions import Fraction

from hookx.errors import UsageError

# What `Preprocessing` can do about the rotations that cameras record, and how it can decode; the usual first.
EXIF = ("ignore", "apply")
DECODE = ("exact", "fast", "nvjpeg")

# What `hookx extract` does unless it is told otherwise.
MAX_SHARD_BYTES, MAX_SHARD_IMAGES = 512 * 2**20, 4096


def parse_bytes(text: str) -> int:
    """Read a size: '512MiB', '2GB', '1.5 GiB', '4096'.

    Example:
        >>> parse_bytes("512MiB"), parse_bytes("2GB"), parse_bytes("4096")
        (536870912, 2000000000, 4096)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B?\s*", text)
    size = 0
    if match and (match[2] or not match[3]):
        power = " KMGT".index(match[2].upper() or " ")
        size = int(Fraction(match[1]) * (1024 if match[3] else 1000) ** power)
    if size == 0:
        raise UsageError(f"'{text}' is not a size; write it as in 512MiB, 2GB or 4096")
    return size
