"""What a shard says about itself: keys, failures, counts, checksums and how it was made."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from hookx.errors import ShardError
from hookx.keys import key_bytes
from hookx.plan import DTYPES, FORMAT, Plan, RangeCounts, Shard, ValueCounts, are_range_counts
from hookx.store.crc import crc32
from hookx.store.format import open_shard
from hookx.store.location import Location


@dataclass
class ShardRecord:
    """What a shard stores beside its activations."""

    keys: list[str] = field(default_factory=list)  # of the rows, in order
    failures: list[tuple[str, str]] = field(default_factory=list)  # (key, reason)
    rotations_ignored: int = 0
    counts: ValueCounts = field(default_factory=ValueCounts)
    made: dict[str, Any] = field(default_factory=dict)  # the software, the device and the batch size
    checksums: dict[str, int] = field(default_factory=dict)  # address -> CRC-32 of its bytes in the file
    sizes_bytes: list[int] = field(default_factory=list)  # of all listed images, read or not, by key
    # How many rows were computed again in other company before the shard was published, and found to be the same; None
    # if the run did not check itself.
    self_checked: int | None = None
    # The size in bytes of images that could not be read at first and were changed until they could: key -> size.
    mended: dict[str, int] | None = None
    # Images of more than 8 bits that use little of their range, or go beyond it; None if there are none.
    ranges: RangeCounts | None = None

    @property
    def keys_of_images(self) -> list[str]:
        """The keys of all listed images, those of rows and those of failures, in order, as `sizes_bytes` has them."""
        return sorted([*self.keys, *(key for key, _ in self.failures)], key=key_bytes)

    @property
    def made_in_batches_of(self) -> int | None:
        """The most images that went through the model together; None if the record does not say so."""
        size = self.made.get("batch_size")
        return size if isinstance(size, int) and size > 0 else None

    @property
    def reused(self) -> int:
        """How many activations were copied from other runs."""
        count = self.made.get("reused")
        return count if isinstance(count, int) and count > 0 else 0

    def to_metadata(self, plan: Plan, shard: Shard) -> dict[str, str]:
        """Return the metadata of a safetensors file, with a CRC-32 of its own."""
        metadata = {"format": FORMAT, "fingerprint": plan.fingerprint, "shard": str(shard.number)}
        metadata |= {name: json.dumps(value) for name, value in vars(self).items() if value is not None}
        return {**metadata, "checksum": _checksum_of_metadata(metadata)}


@dataclass
class Totals:
    """The sums of shard records, without the records: a run can have millions of images."""

    rows: int = 0
    failures: int = 0
    rotations_ignored: int = 0
    counts: ValueCounts = field(default_factory=ValueCounts)
    ranges: RangeCounts = field(default_factory=RangeCounts)
    self_checked: int | None = None  # None if no shard was
    batch_size: int | None = None  # the most images that went through the model together, in the last shard
    reused: int = 0  # activations that were copied from other runs

    def add(self, record: ShardRecord) -> None:
        self.rows += len(record.keys)
        self.failures += len(record.failures)
        self.rotations_ignored += record.rotations_ignored
        self.counts.add(record.counts)
        self.ranges.add(record.ranges or {})
        self.batch_size = record.made_in_batches_of or self.batch_size
        self.reused += record.reused
        if record.self_checked is not None:
            self.self_checked = (self.self_checked or 0) + record.self_checked


def version_of(distribution: str) -> str:
    """Return the version of a distribution, for the record; 'not installed' if it is only on Python's path."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _checksum_of_metadata(metadata: Mapping[str, str]) -> str:
    fields = {name: text for name, text in sorted(metadata.items()) if name != "checksum"}
    return str(crc32(json.dumps(fields).encode()))


def read_record(path: Location, plan: Plan, shard: Shard) -> ShardRecord:
    """Read a shard's record.

    Raises:
        ShardError: the file is damaged, or not this shard of this plan.
        UnreadableError: the file cannot be read now.
    """
    return read_sized_record(path, plan, shard)[0]


def read_sized_record(path: Location, plan: Plan, shard: Shard) -> tuple[ShardRecord, int]:
    """Read a shard's record, and the size of its file in bytes; see `read_record`."""
    file = path / plan.shard_file(shard)
    with open_shard(file) as (opened, header):
        size_bytes = opened.size_bytes
        metadata = header.metadata
        tensors = {address: (place.dtype, place.shape) for address, place in header.tensors.items()}
    if metadata.get("fingerprint") != plan.fingerprint:
        raise ShardError(file, "belongs to another run")
    try:
        if metadata["checksum"] != _checksum_of_metadata(metadata):
            raise ValueError("its record was altered")
        if metadata["shard"] != str(shard.number):
            raise ShardError(file, f"is shard {metadata['shard']} of this run, and was renamed")
        record = _parse(metadata)
        if len(record.keys) + len(record.failures) != len(shard):
            raise ValueError(f"it does not account for {len(shard)} images")
        rows = len(record.keys)
        if tensors != {layer.address: (DTYPES[layer.dtype][0], (rows, *layer.shape)) for layer in plan.layers}:
            raise ValueError("its tensors are not those of the plan")
        return record, size_bytes
    except KeyError as error:
        raise ShardError(file, f"is damaged: its record has no {error}") from None
    except (ValueError, RecursionError) as error:
        raise ShardError(file, f"is damaged: {error}") from None


def _is_text(value: Any) -> bool:
    # File names hold no lone surrogates but U+DC80 to U+DCFF, which os.fsdecode makes of bytes that are not UTF-8.
    return isinstance(value, str) and not re.search("[\ud800-\udc7f\udd00-\udfff]", value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int)


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _dict_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "keys": _list_of(_is_text),
    "failures": _list_of(lambda failure: _list_of(_is_text)(failure) and len(failure) == 2),
    "rotations_ignored": _is_whole,
    "counts": _dict_of(_dict_of(_is_whole)),
    "made": _dict_of(lambda _: True),
    "checksums": _dict_of(_is_whole),
    "sizes_bytes": _list_of(_is_whole),
    "self_checked": _is_whole,
    "mended": _dict_of(_is_whole),
    "ranges": are_range_counts,
}
_OPTIONAL = ("self_checked", "mended", "ranges")  # absent from the shards of earlier versions


def _parse(metadata: Mapping[str, str]) -> ShardRecord:
    """Parse a shard's metadata, trusting no type in it; `KeyError` or `ValueError` if it is not a record."""
    values = {}
    for name, fits in _FIELDS.items():
        if name in _OPTIONAL and name not in metadata:
            continue
        values[name] = json.loads(metadata[name])
        if not fits(values[name]):
            raise ValueError(f"its record's {name} cannot be understood")
    values["failures"], values["counts"] = list(map(tuple, values["failures"])), ValueCounts(values["counts"])
    values["ranges"] = RangeCounts(values.get("ranges", {})) or None
    return ShardRecord(**values)
