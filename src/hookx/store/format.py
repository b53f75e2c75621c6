"""A shard as a safetensors file: its header, its bytes, its checksums."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from zlib_ng import zlib_ng  # The same CRC-32 as zlib's, ten times as fast.

from hookx.errors import ShardError, StoreError
from hookx.plan import DTYPES, LayerSpec
from hookx.store.files import check_is_file

HEADER_BYTES_AT_MOST = 32 * 2**20


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor that is contiguous and not empty."""
    return memoryview(tensor.flatten().view(torch.uint8).numpy().data)


def checksum(tensor: Tensor) -> int:
    """Return the CRC-32 of a contiguous tensor's bytes, as they stand in a shard."""
    return zlib_ng.crc32(bytes_of(tensor)) if tensor.numel() else 0


def checksum_of_both(first: int, second: int, second_bytes: int) -> int:
    """Return the CRC-32 of bytes and those behind them, from the CRC-32 of each and how many bytes the latter are."""
    return zlib_ng.crc32_combine(first, second, second_bytes)


def open_shard(file: Path) -> Any:
    """Open a shard for reading; its header is bounded, and checked against the file's size."""
    try:
        with opened_behind_length(file):
            return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ShardError(file, f"is damaged: {error}") from None


def data_range(file: Path, address: str) -> tuple[int, int]:
    """Return which bytes of a shard's file are a tensor: its first, and the one after its last."""
    try:
        with opened_behind_length(file) as (opened, header_bytes):
            start, stop = json.loads(opened.read(header_bytes))[address]["data_offsets"]
    except (ValueError, LookupError, TypeError, RecursionError, OSError) as error:
        raise ShardError(file, f"is damaged: {error}") from None
    return 8 + header_bytes + start, 8 + header_bytes + stop


@contextlib.contextmanager
def opened_behind_length(file: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a shard where its header begins; yields the file and the bounded length of the header."""
    check_is_file(file)
    with open(file, "rb") as opened:
        header_bytes = int.from_bytes(opened.read(8), "little")
        if header_bytes > HEADER_BYTES_AT_MOST:
            raise ShardError(file, f"is damaged: its header claims {header_bytes:,} bytes")
        yield opened, header_bytes


def shard_header(layers: Sequence[LayerSpec], rows: int, metadata: Mapping[str, str], header_bytes: int = 0) -> bytes:
    """Return what a safetensors file begins with: 8 bytes of length and a JSON header, padded to `header_bytes`.

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
    if len(text) > HEADER_BYTES_AT_MOST:
        raise StoreError(
            f"the names of a shard's images and layers take {len(text):,} bytes; {HEADER_BYTES_AT_MOST:,} is the most",
            "choose a smaller --shard-images and another --out",
        )
    return len(text).to_bytes(8, "little") + text


def in_file_order(layers: Sequence[LayerSpec]) -> list[LayerSpec]:
    """Return layers, wide types first: every tensor begins at a multiple of its element's size."""
    return sorted(layers, key=lambda layer: (-DTYPES[layer.dtype][1], layer.address))


def tensor_places(layers: Sequence[LayerSpec], rows: int) -> dict[str, int]:
    """Return where behind the header each tensor begins.

    Example:
        >>> tensor_places([LayerSpec("mask", (5,), "bool"), LayerSpec("conv", (2, 3), "float32")], rows=10)
        {'conv': 0, 'mask': 240}
    """
    in_order = in_file_order(layers)
    ends = itertools.accumulate(rows * layer.bytes_per_image for layer in in_order)
    return {layer.address: end - rows * layer.bytes_per_image for layer, end in zip(in_order, ends, strict=True)}
