"""The output directory: files that are whole or absent, what shards say of themselves, and an index."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from zlib_ng import zlib_ng  # The same CRC-32 as zlib's, ten times as fast.

from hookx.errors import ShardError, StoreError
from hookx.plan import DTYPES, FORMAT, Plan, Shard

PLAN, INDEX, FAILURES = "plan.json", "index.csv", "failures.csv"
ASIDE = ".aside"  # The suffix of a file that is still being written.
# What is read into memory at once is bounded before it is read: somebody else may have made it. JSON takes up to some
# 25 times its length as Python objects.
_PLAN_BYTES_AT_MOST = 16 * 2**20
HEADER_BYTES_AT_MOST = 32 * 2**20


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
        _add_counts(self.counts, counts)

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
        _add_counts(self.counts, record.counts)


def _add_counts(totals: dict[str, dict[str, int]], counts: Mapping[str, Mapping[str, int]]) -> None:
    for address, by_what in counts.items():
        total = totals.setdefault(address, {})
        for what, count in by_what.items():
            total[what] = total.get(what, 0) + count


# --- writing -------------------------------------------------------------------------------------------------------


def write_whole(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a file so that it is whole or absent: aside, flushed to the disk, then renamed into place."""
    aside = aside_of(path)
    try:
        with told_as_store_error(path):
            aside.unlink(missing_ok=True)
            with open(aside, "xb") as file:  # x: never through a link that somebody put there.
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                put_in_place(file.fileno(), path)
    finally:
        aside.unlink(missing_ok=True)


def aside_of(path: Path) -> Path:
    """Return where a file is written before it is whole; what a killed run left there, the next one removes."""
    return path.with_name(f".{path.name}{ASIDE}")


def put_in_place(descriptor: int, path: Path) -> None:
    """Flush the open file that was written aside to the disk, and give it its name."""
    os.fsync(descriptor)
    os.replace(aside_of(path), path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # The rename itself is only durable once the directory is.
    finally:
        os.close(directory)


@contextlib.contextmanager
def told_as_store_error(path: Path) -> Iterator[None]:
    """Tell a user, where the system refuses to write a file, which and why."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"cannot write {path}: {error.strerror}", "mend that, and run the same command again: it resumes"
        ) from None


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor that is contiguous and not empty."""
    return memoryview(tensor.flatten().view(torch.uint8).numpy().data)


def checksum(tensor: Tensor) -> int:
    """Return the CRC-32 of a contiguous tensor's bytes, as they stand in a shard."""
    return zlib_ng.crc32(bytes_of(tensor)) if tensor.numel() else 0


def checksum_of_both(first: int, second: int, second_bytes: int) -> int:
    """Return the CRC-32 of bytes and those behind them, from the CRC-32 of each and how many bytes the latter are."""
    return zlib_ng.crc32_combine(first, second, second_bytes)


def _checksum_of_record(metadata: Mapping[str, str]) -> str:
    fields = {name: text for name, text in sorted(metadata.items()) if name != "checksum"}
    return str(zlib_ng.crc32(json.dumps(fields).encode()))


class RunDirectory:
    """An output directory, held by this process alone while the `with` block lasts.

    Entering makes the directory, refuses one that holds another run or is held by another process, removes files that
    a killed run left half written, and writes plan.json.

    Raises:
        StoreError: another plan, another process, a damaged shard, or a directory that cannot be written.
    """

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path, self.plan = path, plan
        self._descriptor = -1

    def __enter__(self) -> RunDirectory:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise StoreError(f"cannot use {self.path} as the output directory: {error.strerror}") from None
        try:
            self._lock()
            check_resumable(self.path, self.plan)
            for left_over in self.path.glob(f".*{ASIDE}"):
                if left_over.is_symlink() or not left_over.is_dir():
                    left_over.unlink()
            if not (self.path / PLAN).exists():
                write_whole(self.path / PLAN, [self.plan.to_json().encode()])
        except BaseException:
            self.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is spawned instead of forked has not inherited the descriptor, only its number.
        return {**self.__dict__, "_descriptor": -1}

    def _lock(self) -> None:
        # The kernel drops the lock with the last descriptor of it, so a killed run leaves nothing stale behind.
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(
                f"another hookx process is writing to {self.path}{_holder(self._descriptor)}",
                "wait for it, or choose another --out",
            ) from None

    def file_of(self, shard: Shard) -> Path:
        """Return where a shard is, or will be."""
        return self.path / self.plan.shard_file(shard)

    def release(self) -> None:
        """Let go of the directory; forked workers do so, or they would keep the lock of a killed run."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def publish_index(self) -> None:
        """Write index.csv (and failures.csv, if there are any) from the shards; the run is complete with this."""
        tables = derived_tables(self.path, self.plan)
        if FAILURES not in tables:
            (self.path / FAILURES).unlink(missing_ok=True)  # Left by a shard that was removed and computed again.
        for name, lines in tables.items():
            write_whole(self.path / name, lines)


def derived_tables(path: Path, plan: Plan) -> dict[str, Iterator[bytes]]:
    """Return, from the shards of a finished run, the lines of failures.csv (if there are any) and of index.csv."""

    def records() -> Iterator[tuple[str, ShardRecord]]:
        # One at a time in memory: a run can have millions of images.
        return ((plan.shard_file(shard), read_record(path, plan, shard)) for shard in plan.shards)

    tables = {}
    if any(record.failures for _, record in records()):
        failures = (failure for _, record in records() for failure in record.failures)
        tables[FAILURES] = _csv(("key", "reason"), failures)
    rows = ((key, name, row) for name, record in records() for row, key in enumerate(record.keys))
    tables[INDEX] = _csv(("key", "shard", "row"), rows)
    return tables


def _holder(descriptor: int) -> str:
    """Name the process that holds the lock of an open directory, as far as the system tells."""
    inode = str(os.fstat(descriptor).st_ino)
    with contextlib.suppress(OSError):  # Only Linux has this file.
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if "FLOCK" in fields and fields[-3].rpartition(":")[2] == inode:
                return f" (pid {fields[-4]})"
    return ""


def check_resumable(path: Path, plan: Plan) -> None:
    """Raise `StoreError` unless a run of this plan may write to the directory."""
    if path.exists() and not path.is_dir():
        raise StoreError(f"{path} is a file, not a directory", "choose another --out")
    if (path / PLAN).exists():
        there = read_plan(path)
        if there.fingerprint != plan.fingerprint:
            raise StoreError(f"{path}/ holds another run: {'; '.join(there.differences(plan))}; choose another --out")
    elif any(path.glob("shard-*.safetensors")):
        raise StoreError(f"{path}/ holds shards without a {PLAN}; choose another --out")


def finished_shards(path: Path, plan: Plan) -> list[Shard]:
    """Return the shards whose files exist; `StoreError` for one that is damaged or belongs to another run."""
    present = present_shards(path, plan)
    for shard in present:
        read_record(path, plan, shard)
    return present


def present_shards(path: Path, plan: Plan) -> list[Shard]:
    """Return the shards for which there is a file, whatever it holds."""
    # What is there is looked up in the directory, not in the plan, which may name any number of shards.
    names = {file.name for file in path.glob("shard-*-of-*.safetensors")}
    numbers = sorted({int(name.split("-")[1]) for name in names if name.split("-")[1].isdecimal()})
    shards = [plan.shards[number] for number in numbers if number < len(plan.shards)]
    return [shard for shard in shards if plan.shard_file(shard) in names]


def read_plan(path: Path) -> Plan:
    """Read a directory's plan.json."""
    try:
        _check_is_file(path / PLAN)
        with open(path / PLAN, "rb") as file:
            text = file.read(_PLAN_BYTES_AT_MOST + 1)
        if len(text) > _PLAN_BYTES_AT_MOST:
            raise StoreError(f"{PLAN} is longer than {_PLAN_BYTES_AT_MOST:,} bytes; hookx has not written that")
        return Plan.from_json(text.decode())
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{path}/ holds no run of hookx: cannot read {PLAN} ({error})") from None
    except StoreError as error:
        raise StoreError(f"{path}/{error}") from None


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


def open_shard(file: Path) -> Any:
    """Open a shard for reading; its header is bounded, and checked against the file's size."""
    try:
        with _opened_behind_length(file):
            return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ShardError(file, f"is damaged: {error}") from None


def data_range(file: Path, address: str) -> tuple[int, int]:
    """Return which bytes of a shard's file are a tensor: its first, and the one after its last."""
    try:
        with _opened_behind_length(file) as (opened, header_bytes):
            start, stop = json.loads(opened.read(header_bytes))[address]["data_offsets"]
    except (ValueError, LookupError, TypeError, RecursionError, OSError) as error:
        raise ShardError(file, f"is damaged: {error}") from None
    return 8 + header_bytes + start, 8 + header_bytes + stop


@contextlib.contextmanager
def _opened_behind_length(file: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a shard where its header begins; yields the file and the bounded length of the header."""
    _check_is_file(file)
    with open(file, "rb") as opened:
        header_bytes = int.from_bytes(opened.read(8), "little")
        if header_bytes > HEADER_BYTES_AT_MOST:
            raise ShardError(file, f"is damaged: its header claims {header_bytes:,} bytes")
        yield opened, header_bytes


def _check_is_file(path: Path) -> None:
    """Raise `OSError` for a pipe or a device, which would be read for ever."""
    if path.exists() and not path.is_file():
        raise OSError("it is not a file")


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[bytes]:
    for row in itertools.chain([header], rows):
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(row)
        # A file name that is no UTF-8 keeps its bytes.
        yield line.getvalue().encode("utf-8", "surrogateescape")
