"""The output directory: files that are whole or absent, what shards say of themselves, and an index."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hookx.errors import StoreError
from hookx.plan import Plan, Shard
from hookx.store.files import ASIDE, check_is_file, write_whole
from hookx.store.record import ShardRecord, read_record

PLAN, INDEX, FAILURES = "plan.json", "index.csv", "failures.csv"

# What is read into memory at once is bounded before it is read: somebody else may have made it. JSON takes up to some
# 25 times its length as Python objects.
_PLAN_BYTES_AT_MOST = 16 * 2**20


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
        check_is_file(path / PLAN)
        with open(path / PLAN, "rb") as file:
            text = file.read(_PLAN_BYTES_AT_MOST + 1)
        if len(text) > _PLAN_BYTES_AT_MOST:
            raise StoreError(f"{PLAN} is longer than {_PLAN_BYTES_AT_MOST:,} bytes; hookx has not written that")
        return Plan.from_json(text.decode())
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{path}/ holds no run of hookx: cannot read {PLAN} ({error})") from None
    except StoreError as error:
        raise StoreError(f"{path}/{error}") from None


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[bytes]:
    for row in itertools.chain([header], rows):
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(row)
        # A file name that is no UTF-8 keeps its bytes.
        yield line.getvalue().encode("utf-8", "surrogateescape")
