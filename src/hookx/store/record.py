"""What a shard says about itself: keys, failures, counts, checksums and how it was made."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zlib_ng import zlib_ng  # The same CRC-32 as zlib's, ten times as fast.

from hookx.errors import ShardError
from hookx.plan import DTYPES, FORMAT, Plan, Shard
from hookx.store.format import open_shard


@dataclass
class ShardRecord:
    """What a shard says of itself, beside its activations."""

    keys: list[str] = field(default_factory=list)  # of the rows, in order
    failures: list[tuple[str, str]] = field(default_factory=list)  # (key, reason)
    rotations_ignored: int = 0
    counts: dict[str, dict[str, int]] = field(default_factory=dict)  # address -> what was remarkable -> how often
    made: dict[str, Any] = field(default_factory=dict)  # the versions, the device and the batch size
    checksums: dict[str, int] = field(default_factory=dict)  # address -> CRC-32 of its bytes in the file
    sizes_bytes: list[int] = field(default_factory=list)  # of the images, rows and failures together, by key

    def add_counts(self, counts: Mapping[str, Mapping[str, int]]) -> None:
        """Add what was remarkable in a batch."""
        add_counts(self.counts, counts)

    def to_metadata(self, plan: Plan, shard: Shard) -> dict[str, str]:
        """Return the record as a safetensors file holds it, with a CRC-32 of its own."""
        metadata = {
            "format": FORMAT,
            "fingerprint": plan.fingerprint,
            "shard": str(shard.number),
            "keys": json.dumps(self.keys),
            "failures": json.dumps(self.failures),
            "rotations_ignored": str(self.rotations_ignored),
            "counts": json.dumps(self.counts),
            "made": json.dumps(self.made),
            "checksums": json.dumps(self.checksums),
            "sizes_bytes": json.dumps(self.sizes_bytes),
        }
        return {**metadata, "checksum": _checksum_of_record(metadata)}


@dataclass
class Totals:
    """What shard records add up to; keeps no record."""

    rows: int = 0
    failures: int = 0
    rotations_ignored: int = 0
    counts: dict[str, dict[str, int]] = field(default_factory=dict)

    def add(self, record: ShardRecord) -> None:
        """Add one shard's record."""
        self.rows += len(record.keys)
        self.failures += len(record.failures)
        self.rotations_ignored += record.rotations_ignored
        add_counts(self.counts, record.counts)


def add_counts(totals: dict[str, dict[str, int]], counts: Mapping[str, Mapping[str, int]]) -> None:
    for address, by_what in counts.items():
        total = totals.setdefault(address, {})
        for what, count in by_what.items():
            total[what] = total.get(what, 0) + count


def _checksum_of_record(metadata: Mapping[str, str]) -> str:
    fields = {name: text for name, text in sorted(metadata.items()) if name != "checksum"}
    return str(zlib_ng.crc32(json.dumps(fields).encode()))


def read_record(path: Path, plan: Plan, shard: Shard) -> ShardRecord:
    """Read what a shard says of itself; `StoreError` if the file is damaged or not this shard of this plan."""
    file = path / plan.shard_file(shard)
    with open_shard(file) as opened:
        metadata = opened.metadata() or {}
        addresses = list(opened.keys())
        if len(addresses) == len(plan.layers):
            slices = {address: opened.get_slice(address) for address in addresses}
        else:
            slices = {}
        tensors = {address: (data.get_dtype(), data.get_shape()) for address, data in slices.items()}
    if metadata.get("fingerprint") != plan.fingerprint:
        raise ShardError(file, "belongs to another run")
    try:
        if metadata["checksum"] != _checksum_of_record(metadata):
            raise ValueError("its record was altered")
        if metadata["shard"] != str(shard.number):
            raise ShardError(file, f"is shard {metadata['shard']} of this run, and was renamed")
        record = _record_of(metadata)
        if len(record.keys) + len(record.failures) != len(shard):
            raise ValueError(f"it does not account for {len(shard)} images")
        rows = len(record.keys)
        if tensors != {layer.address: (DTYPES[layer.dtype][0], [rows, *layer.shape]) for layer in plan.layers}:
            raise ValueError("its tensors are not those of the plan")
        return record
    except KeyError as error:
        raise ShardError(file, f"is damaged: its record has no {error}") from None
    except (ValueError, RecursionError) as error:
        raise ShardError(file, f"is damaged: {error}") from None


def _record_of(metadata: Mapping[str, str]) -> ShardRecord:
    """Read a record out of a shard's metadata; `KeyError` or `ValueError` if it is not one. Trusts no type in it."""

    def parsed(name: str, fits: Callable[[Any], bool]) -> Any:
        value = json.loads(metadata[name])
        if not fits(value):
            raise ValueError(f"its record's {name} cannot be understood")
        return value

    def is_list(value: Any, of: Callable[[Any], bool]) -> bool:
        return isinstance(value, list) and all(map(of, value))

    def is_dict(value: Any, of: Callable[[Any], bool]) -> bool:
        return isinstance(value, dict) and all(map(of, value.values()))

    def is_text(value: Any) -> bool:
        # Half a character is no part of a file name: os.fsdecode makes only those from U+DC80 to U+DCFF.
        return isinstance(value, str) and not re.search("[\ud800-\udc7f\udd00-\udfff]", value)

    def is_whole(value: Any) -> bool:
        return isinstance(value, int)

    def is_failure(value: Any) -> bool:
        return is_list(value, is_text) and len(value) == 2

    return ShardRecord(
        keys=parsed("keys", lambda value: is_list(value, is_text)),
        failures=[(key, reason) for key, reason in parsed("failures", lambda value: is_list(value, is_failure))],
        rotations_ignored=parsed("rotations_ignored", is_whole),
        counts=parsed("counts", lambda value: is_dict(value, lambda by_what: is_dict(by_what, is_whole))),
        made=parsed("made", lambda value: is_dict(value, lambda _: True)),
        checksums=parsed("checksums", lambda value: is_dict(value, is_whole)),
        sizes_bytes=parsed("sizes_bytes", lambda value: is_list(value, is_whole)),
    )
