"""A shard as a safetensors file: its header, its bytes, its checksums."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hookx.errors import ShardError, StoreError, UnreadableError, one_line
from hookx.plan import DTYPES, LayerSpec
from hookx.store.crc import crc32
from hookx.store.files import check_is_file, report_read_errors

MAX_HEADER_BYTES = 32 * 2**20
_BYTES_AT_ONCE = 8 * 2**20


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor that is contiguous and not empty."""
    return memoryview(tensor.flatten().view(torch.uint8).numpy().data)


def checksum(tensor: Tensor) -> int:
    """Return the CRC-32 of a contiguous tensor's bytes."""
    return crc32(bytes_of(tensor)) if tensor.numel() else 0


def checksum_in_file(descriptor: int, start: int, stop: int) -> int:
    """Return the CRC-32 of a range of an open file; `EOFError` if the file ends before."""
    buffer, total = bytearray(min(_BYTES_AT_ONCE, stop - start)), 0
    while start < stop:
        # Not by mapping the file: where a disk cannot read, that crashes the process.
        piece = memoryview(buffer)[: min(len(buffer), stop - start)]
        count = os.preadv(descriptor, [piece], start)
        if not count:
            raise EOFError("it ends too early")
        total, start = crc32(piece[:count], total), start + count
    return total


def open_shard(file: Path) -> Any:
    """Open a shard for reading; check that its header is not too long and fits the file's size."""
    with open_at_header(file):
        try:
            return safe_open(file, framework="pt")
        except FileNotFoundError:  # What safetensors says whatever the reason.
            os.close(os.open(file, os.O_RDONLY))
            raise OSError("the system refused to open it once, and not again") from None


def data_ranges(file: Path) -> dict[str, tuple[int, int]]:
    """Return where in a shard's file each tensor begins and ends, in bytes."""
    with open_at_header(file) as (opened, header_bytes):
        header: dict[str, Any] = json.loads(opened.read(header_bytes))
        offsets = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
        return {name: (8 + header_bytes + start, 8 + header_bytes + stop) for name, (start, stop) in offsets.items()}


@contextlib.contextmanager
def open_at_header(file: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a shard at its header; yield the file and the length of the header; errors are those of `reading`."""
    try:
        with reading(file):
            check_is_file(file)
            with open(file, "rb") as opened:
                header_bytes = int.from_bytes(opened.read(8), "little")
                if header_bytes > MAX_HEADER_BYTES:
                    raise ValueError(f"its header claims {header_bytes:,} bytes")
                yield opened, header_bytes
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ShardError(file, f"is damaged: {error}") from None


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Raise `UnreadableError` if a shard cannot be read now, and `ShardError` if it was read and is damaged."""
    try:
        with report_read_errors(file):
            yield
    except (SafetensorError, EOFError, RecursionError) as error:
        raise ShardError(file, f"is damaged: {error}") from None
    except RuntimeError as error:  # torch has no other for a file that the system does not open or map.
        raise UnreadableError(file, one_line(error)) from None


def shard_header(layers: Sequence[LayerSpec], rows: int, metadata: Mapping[str, str], header_bytes: int = 0) -> bytes:
    """Return the beginning of a safetensors file: 8 bytes of length and a JSON header, padded to `header_bytes`.

    Source: https://github.com/huggingface/safetensors#format
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    places = tensor_places(layers, rows)
    for layer in in_file_order(layers):
        start = places[layer.address]
        header[layer.address] = {
            "dtype": DTYPES[layer.dtype][0],
            "shape": [rows, *layer.shape],
            "data_offsets": [start, start + rows * layer.bytes_per_image],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * max(header_bytes - 8 - len(text), -len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise StoreError(
            f"the names of a shard's images and layers take {len(text):,} of at most {MAX_HEADER_BYTES:,} bytes",
            "choose a smaller --shard-images and another --out",
        )
    return len(text).to_bytes(8, "little") + text


def in_file_order(layers: Sequence[LayerSpec]) -> list[LayerSpec]:
    """Sort layers by the width of their types, wide first, so that every tensor is aligned to its element's size."""
    return sorted(layers, key=lambda layer: (-DTYPES[layer.dtype][1], layer.address))


def tensor_places(layers: Sequence[LayerSpec], rows: int) -> dict[str, int]:
    """Return at which byte behind the header each tensor begins.

    Example:
        >>> tensor_places([LayerSpec("mask", (5,), "bool"), LayerSpec("conv", (2, 3), "float32")], rows=10)
        {'conv': 0, 'mask': 240}
    """
    in_order = in_file_order(layers)
    ends = itertools.accumulate(rows * layer.bytes_per_image for layer in in_order)
    return {layer.address: end - rows * layer.bytes_per_image for layer, end in zip(in_order, ends, strict=True)}
