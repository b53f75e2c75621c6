"""The types of options whose values are more than a number or a path, and how to read them from text."""

# No `from __future__ import annotations`: the annotations are read at run time.

import math
import operator
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal, SupportsIndex

from hookx.errors import UsageError

Device = Literal["auto", "cpu", "cuda", "mps"] | str  # the words that a shell offers, or another, as in cuda:1
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
MemoryFormat = Literal["contiguous", "channels_last"]
Dtype = Literal["fp64", "fp32", "fp16", "bf16"]
Exif = Literal["ignore", "apply"]
Decode = Literal["exact", "fast", "nvjpeg"]
Interpolation = Literal["nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos"]
Fit = Literal["crop", "squash", "pad"]
OnIOError = Literal["stop", "fail"]
Launcher = Literal["slurm", "ray"]
Label = Literal["parent"]
Layout = Literal["nchw", "nhwc", "tokens"]
ChannelReduction = Literal["mean", "max", "norm"]

AnyPath = str | os.PathLike[str]
Paths = AnyPath | Iterable[AnyPath]

InputSize = str | SupportsIndex | Sequence[int]  # in pixels: one number for both sides, or height and width

# A plan and a shard have the long names, which are torch's.
DTYPE_NAMES: dict[str, str] = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

# Unless a user says otherwise:
MAX_SHARD_BYTES, MAX_SHARD_IMAGES = 512 * 2**20, 4096
RETRY_SECONDS = 10.0
MAX_SIDE_PX = 2**16  # of a model's input


def parse_bytes(text: str) -> int:
    """Read a size: '512MiB', '2GB', '1.5 GiB', '4096'.

    Example:
        >>> parse_bytes("512MiB"), parse_bytes("2GB"), parse_bytes("4096")
        (536870912, 2000000000, 4096)
    """
    try:
        return read_size(text)
    except ValueError as error:
        raise UsageError(f"'{text}' is not a size; {error}") from None


def list_paths(paths: Paths) -> list[AnyPath]:
    """Return one path, or several, as a list."""
    return [paths] if isinstance(paths, str | os.PathLike) else list(paths)


def read_size(value: str | int) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B?\s*", str(value))
    size = 0
    if match and (match[2] or not match[3]):
        power = " KMGT".index(match[2].upper() or " ")
        size = int(Fraction(match[1]) * (1024 if match[3] else 1000) ** power)
    if size == 0:
        raise ValueError("write it as in 512MiB, 2GB or 4096")
    return size


def read_channels(value: str | Iterable[float]) -> tuple[float, ...]:
    """Read a number for each channel."""
    try:
        numbers = tuple(float(number) for number in (value.split(",") if isinstance(value, str) else value))
    except (TypeError, ValueError):
        numbers = ()
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ValueError("give a number for each channel, as in 0.485,0.456,0.406")
    return numbers


def read_deviations(value: str | Iterable[float]) -> tuple[float, ...]:
    numbers = read_channels(value)
    if 0.0 in numbers:
        raise ValueError("no deviation can be 0")
    return numbers


def read_input_size(value: Any) -> tuple[int, int]:
    """Read the height and the width of a model's input.

    Example:
        >>> read_input_size("518"), read_input_size("256x128"), read_input_size((256, 128))
        ((518, 518), (256, 128), (256, 128))
    """
    wrong = ValueError("give a number of pixels, as in 518, or height x width, as in 256x128")
    if isinstance(value, str):
        texts = re.fullmatch(r"\s*(\d{1,9})\s*(?:[xX×,]\s*(\d{1,9})\s*)?", value)
        if texts is None:
            raise wrong
        sides = [int(texts[1]), int(texts[2] or texts[1])]
    else:
        both = value if isinstance(value, Sequence) else [value, value]
        try:
            sides = [operator.index(one) for one in both]
        except TypeError:
            raise wrong from None
    if len(sides) != 2 or isinstance(value, bool):
        raise wrong
    if not all(1 <= side <= MAX_SIDE_PX for side in sides):
        raise ValueError(f"a side has 1 to {MAX_SIDE_PX:,} pixels")
    return sides[0], sides[1]


def read_grey_range(value: str | Iterable[float]) -> str:
    """Read what is black and white, and write it in one way, which a plan records.

    Example:
        >>> read_grey_range("0, 4095.0"), read_grey_range((-1000, 0.5)), read_grey_range("minmax")
        ('0,4095', '-1000,0.5', 'minmax')
    """
    if value in ("full", "minmax"):
        return str(value)
    try:
        black, white = (float(number) for number in (value.split(",") if isinstance(value, str) else value))
    except (TypeError, ValueError):
        black = white = math.nan
    if not (black < white and math.isfinite(white - black)):
        raise ValueError("give full, minmax, or two numbers, the lower first, as in 0,4095")
    return ",".join(str(int(number)) if number.is_integer() else repr(number) for number in (black, white))


def read_loader(value: str | Callable[[Any], Any]) -> str | Callable[[Any], Any]:
    if not (isinstance(value, str) or callable(value)):
        raise ValueError("give a function, or its name, as in file.py:function")
    return value


def read_suffixes(value: str | Iterable[str]) -> tuple[str, ...]:
    """Read suffixes with commas between; '*' stands for all files.

    Example:
        >>> read_suffixes([".dcm,NPY", "nii.gz"]), read_suffixes("*")
        (('.dcm', '.npy', '.nii.gz'), ('*',))
    """
    texts = [value] if isinstance(value, str) else list(value)
    suffixes = [one.strip().lower() for text in texts for one in text.split(",")]
    if not all(one and "/" not in one and (one == "*" or "*" not in one) for one in suffixes):
        raise ValueError("write it as in .dcm,.npy, or '*' for all files")
    return tuple(dict.fromkeys(one if one == "*" else f".{one.removeprefix('.')}" for one in suffixes))


def read_arguments(value: Mapping[str, str] | Iterable[str]) -> dict[str, str]:
    if isinstance(value, Mapping):
        return dict(value)
    pairs = [text.partition("=") for text in value]
    if not all(equals for _, equals, _ in pairs):
        raise ValueError("write key=value, as in width=2")
    return {key: text for key, _, text in pairs}


def read_globs(value: str | Iterable[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def read_columns(value: str | Iterable[str]) -> tuple[str, ...]:
    """Read the names of columns, separated by commas in a text."""
    return tuple(filter(None, value.split(","))) if isinstance(value, str) else tuple(value)


def read_runs(value: AnyPath | Iterable[AnyPath]) -> tuple[str, ...]:
    """Take the places of runs as texts, which other processes are told."""
    return tuple(os.fspath(one) for one in ([value] if isinstance(value, str | os.PathLike) else value))


def read_dtype(name: str) -> str:
    """Return the short name of a type that may have been given by its long one."""
    return next((short for short, long in DTYPE_NAMES.items() if long == name), name)


def ignore_progress(count: int) -> None:
    """Report no progress."""


def read_shard(value: str) -> str:
    """Read a part of a run: '3/16', or 'all'."""
    if value == "all":
        return value
    match = re.fullmatch(r"\s*(\d{1,9})\s*/\s*(\d{1,9})\s*", str(value))
    if match is None:
        raise ValueError("write it as in 3/16, for part 3 of 16, numbered from 0; or all")
    number, count = int(match[1]), int(match[2])
    if count == 0:
        raise ValueError("there must be at least 1 part, as in 0/1")
    if number >= count:
        raise ValueError(f"parts are numbered from 0, so the last of {count} is {count - 1}/{count}")
    return f"{number}/{count}"


def read_path(value: AnyPath) -> AnyPath:
    """Take a path of the file system; the address of an object store would become a folder called 's3:'."""
    if re.match("[a-z][a-z0-9+.-]*://", os.fspath(value)):
        raise ValueError("only runs lie in object stores: name a path of this system, and copy it there")
    return value


def read_root(value: AnyPath) -> str:
    """Take a path as a text, which other processes are told."""
    return os.fspath(value)
