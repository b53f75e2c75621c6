"""The output directory of a run: who may write to it, which shards it holds, and its tables."""

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

# Bound what is read into memory at once: a stranger may have made it, and JSON grows up to 25-fold as Python objects.
_MAX_PLAN_BYTES = 16 * 2**20


class RunDirectory:
    """An output directory, locked by this process while the `with` block lasts.

    Entering creates the directory, removes the half-written files of a killed run, and writes plan.json. It raises
    `StoreError` if the directory holds another run, another process has locked it, or it cannot be written.
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
            try:
                # The kernel drops the lock with its last descriptor, so a killed run leaves no stale lock.
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreError(
                    f"another hookx process is writing to {self.path}{_holder(self._descriptor)}",
                    "wait for it, or choose another --out",
                ) from None
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
        # A spawned worker, unlike a forked one, has not inherited the descriptor, only its number.
        return {**self.__dict__, "_descriptor": -1}

    def file_of(self, shard: Shard) -> Path:
        return self.path / self.plan.shard_file(shard)

    def release(self) -> None:
        """Unlock the directory; forked workers do so too, or they would keep the lock of a killed run."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def publish_index(self) -> None:
        """Write index.csv, and failures.csv if there are failures, from the shards; this completes the run."""
        tables = derived_tables(self.path, self.plan)
        if FAILURES not in tables:
            (self.path / FAILURES).unlink(missing_ok=True)  # Left by a shard that was removed and computed again.
        for name, lines in tables.items():
            write_whole(self.path / name, lines)


def derived_tables(path: Path, plan: Plan) -> dict[str, Iterator[bytes]]:
    """Derive the lines of index.csv, and of failures.csv if there are failures, from the shards of a finished run."""

    def records() -> Iterator[tuple[str, ShardRecord]]:
        # One at a time in memory: a run can have millions of images.
        return ((plan.shard_file(shard), read_record(path, plan, shard)) for shard in plan.shards)

    tables = {}
    if any(record.failures for _, record in records()):
        tables[FAILURES] = _csv(("key", "reason"), (failure for _, record in records() for failure in record.failures))
    rows = ((key, name, row) for name, record in records() for row, key in enumerate(record.keys))
    tables[INDEX] = _csv(("key", "shard", "row"), rows)
    return tables


def _holder(descriptor: int) -> str:
    """Name the process that holds the lock of an open directory, if the system tells."""
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
    """Return the shards that have a file, whatever it holds."""
    # Look in the directory, not through the plan, which may name any number of shards.
    names = {file.name for file in path.glob("shard-*-of-*.safetensors")}
    numbers = sorted({int(name.split("-")[1]) for name in names if name.split("-")[1].isdecimal()})
    shards = [plan.shards[number] for number in numbers if number < len(plan.shards)]
    return [shard for shard in shards if plan.shard_file(shard) in names]


def read_plan(path: Path) -> Plan:
    """Read a directory's plan.json."""
    try:
        check_is_file(path / PLAN)
        with open(path / PLAN, "rb") as file:
            text = file.read(_MAX_PLAN_BYTES + 1)
        if len(text) > _MAX_PLAN_BYTES:
            raise StoreError(f"{PLAN} is longer than {_MAX_PLAN_BYTES:,} bytes, and so not from hookx")
        return Plan.from_json(text.decode())
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{path}/ holds no run of hookx: cannot read {PLAN} ({error})") from None
    except StoreError as error:
        raise StoreError(f"{path}/{error}") from None


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[bytes]:
    for row in itertools.chain([header], rows):
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(row)
        # A file name that is not UTF-8 keeps its bytes.
        yield line.getvalue().encode("utf-8", "surrogateescape")
