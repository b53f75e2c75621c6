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

from hookx.errors import ShardError, StoreError
from hookx.plan import DTYPES, LayerSpec
from hookx.store.crc import crc32
from hookx.store.files import check_is_file

MAX_HEADER_BYTES = 32 * 2**20


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor that is contiguous and not empty."""
    return memoryview(tensor.flatten().view(torch.uint8).numpy().data)


def checksum(tensor: Tensor) -> int:
    """Return the CRC-32 of a contiguous tensor's bytes."""
    return crc32(bytes_of(tensor)) if tensor.numel() else 0


def open_shard(file: Path) -> Any:
    """Open a shard for reading; check that its header is not too long and fits the file's size."""
    with _open_at_header(file):
        return safe_open(file, framework="pt")


def data_range(file: Path, address: str) -> tuple[int, int]:
    """Return where in a shard's file a tensor begins and ends, in bytes."""
    with _open_at_header(file) as (opened, header_bytes):
        start, stop = json.loads(opened.read(header_bytes))[address]["data_offsets"]
    return 8 + header_bytes + start, 8 + header_bytes + stop


@contextlib.contextmanager
def _open_at_header(file: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a shard at its header; yield the file and the length of the header; `ShardError` if reading it fails."""
    try:
        check_is_file(file)
        with open(file, "rb") as opened:
            header_bytes = int.from_bytes(opened.read(8), "little")
            if header_bytes > MAX_HEADER_BYTES:
                raise ValueError(f"its header claims {header_bytes:,} bytes")
            yield opened, header_bytes
    except (SafetensorError, ValueError, LookupError, TypeError, RecursionError, OSError) as error:
        raise ShardError(file, f"is damaged: {error}") from None


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
