"""A shard as a safetensors file: its header, its bytes, its checksums."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from hookx.errors import ShardError, StoreError, UnreadableError, one_line
from hookx.plan import DTYPES, LayerSpec
from hookx.store.crc import crc32
from hookx.store.files import open_file, report_read_errors
from hookx.store.location import Location
from hookx.store.reading import Readable, read_range

MAX_HEADER_BYTES = 32 * 2**20
_BYTES_AT_ONCE = 8 * 2**20
_WIDTHS = dict(DTYPES.values())  # of a value in bytes


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor that is contiguous and not empty."""
    return memoryview(tensor.flatten().view(torch.uint8).numpy().data)


def checksum(tensor: Tensor) -> int:
    """Return the CRC-32 of a contiguous tensor's bytes."""
    return crc32(bytes_of(tensor)) if tensor.numel() else 0


def checksum_in_file(file: Readable, start: int, stop: int, total: int = 0) -> int:
    """Return the CRC-32 of a range of an open file, behind what has `total`; `EOFError` if the file ends before."""
    buffer = bytearray(min(_BYTES_AT_ONCE, stop - start))
    while start < stop:
        piece = memoryview(buffer)[: min(len(buffer), stop - start)]
        file.read([(start, piece)])
        total, start = crc32(piece, total), start + len(piece)
    return total


@dataclass(frozen=True)
class TensorPlace:
    """A tensor as a header describes it: its type as safetensors names it, its shape, and its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """What the header of a safetensors file says."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorPlace]

    @classmethod
    def parse(cls, text: bytes, data_start: int, size_bytes: int) -> Header:
        """Parse a header whose tensors lie behind it; `ValueError` and the like unless they fill the file exactly.

        Source: https://github.com/huggingface/safetensors#format
        """
        entries = json.loads(text)
        metadata = entries.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is not text")
        places = {name: _place_of(entry, data_start) for name, entry in entries.items()}
        end = data_start
        for start, stop in sorted((place.start, place.stop) for place in places.values()):
            if start != end:
                raise ValueError("its tensors overlap, or leave gaps")
            end = stop
        if end != size_bytes:
            raise ValueError(f"it has {size_bytes:,} bytes, where its header promises {end:,}")
        return cls(metadata, places)


def _place_of(entry: Mapping[str, Any], data_start: int) -> TensorPlace:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, *offsets)):
        raise ValueError("its header has numbers that no tensor has")
    start, stop = offsets
    if stop - start != math.prod(shape) * _WIDTHS[dtype]:
        raise ValueError("its header gives tensors more or fewer bytes than they have")
    return TensorPlace(dtype, tuple(shape), data_start + start, data_start + stop)


@contextlib.contextmanager
def open_shard(file: Location) -> Iterator[tuple[Readable, Header]]:
    """Open a shard and read its header, which fits the file; errors are those of `reading`."""
    with reading(file), open_file(file) as opened:
        try:
            size_bytes = opened.size_bytes
            data_start = 8 + int.from_bytes(read_range(opened, 0, 8), "little")
            if data_start > min(size_bytes, 8 + MAX_HEADER_BYTES):
                raise ValueError(f"its header claims {data_start - 8:,} bytes")
            header = Header.parse(read_range(opened, 8, data_start), data_start, size_bytes)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ShardError(file, f"is damaged: {error}") from None
        yield opened, header


def check_of_run(file: Location, header: Header, fingerprint: str) -> None:
    """Raise `ShardError` if a shard is one of another run, or another one of this run than its name says."""
    if header.metadata.get("fingerprint") != fingerprint:
        raise ShardError(file, "belongs to another run")
    number = header.metadata.get("shard", "")
    if not file.name.startswith(f"shard-{number:0>5}-of-"):
        raise ShardError(file, f"is shard {number} of this run, and was renamed")


@contextlib.contextmanager
def reading(file: Location) -> Iterator[None]:
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
