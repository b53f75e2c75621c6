"""What a user may ask for. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class ModelOptions:
    """What a user can say of a model beside its name and its weights.

    Args:
        seed: of random weights.
        weights_key: the entry of a checkpoint that holds the weights, as in 'model_ema'.
        allow_missing: globs over state-dict keys that a file need not hold; what it lacks stays random.
        trust_checkpoint: read a pickled module, which runs the code that the file names.
        model_args: the arguments of a factory, 'name' -> text.
        transform: 'python:package.module:factory' of a preprocessing of one's own.
    """

    seed: int = 0
    weights_key: str | None = None
    allow_missing: tuple[str, ...] = ()
    trust_checkpoint: bool = False
    model_args: Mapping[str, str] = field(default_factory=dict)
    transform: str | None = None


@dataclass(frozen=True)
class PreprocessingOptions:
    """What a user asks of the preprocessing in place of what came with the weights; None: as it came."""

    resize: int | None = None
    crop: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    interpolation: str | None = None
    exif: str = "ignore"
    decode: str = "exact"
