"""The output directory of a run: who writes to it, which shards it holds, and its tables."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from hookx.errors import OtherRunError, StoreError, UnreadableError
from hookx.plan import Plan, Shard
from hookx.store.asides import aside_of, new_mark, remove_left_overs
from hookx.store.columns import COLUMNS, Column, write_columns
from hookx.store.files import (
    check_is_file,
    is_there,
    open_file,
    patiently,
    put_in_place,
    reason_of,
    removed_at_the_end,
    report_read_errors,
    report_write_errors,
    write_whole,
)
from hookx.store.index import FAILURES, INDEX, SHARDS, publish_index
from hookx.store.location import Location
from hookx.store.objects.path import ObjectPath
from hookx.store.reading import as_stream
from hookx.store.record import ShardRecord, read_record
from hookx.store.scratch import scratch_folder

log = logging.getLogger("hookx")

PLAN = "plan.json"
Lock = Literal["alone", "shared", ""]

# Bound what is read into memory at once: a stranger may have made it, and JSON grows up to 25-fold as Python objects.
_MAX_PLAN_BYTES = 16 * 2**20


class RunDirectory:
    """An output directory that this process writes to while the `with` block lasts.

    Entering creates the directory, removes the half-written files of a killed run, and writes plan.json, unless another
    process was first. It raises `StoreError` if the directory holds another run, another process has locked it, or it
    cannot be written. The lock spares two processes the same work; where a file system has none, or one that does
    nothing, both compute all shards, and the first to publish one wins.

    Args:
        lock: 'alone' of who computes every shard; 'shared' of those that compute a part each; '' of those that compute
            for a process that holds the lock.
        scratch: where shards are built that go to an object store, which has no locks: a folder of this machine, by
            default that for temporary files.

    Attributes:
        plan: what is computed.
        begun: the plan that the directory holds; it can differ in what the fingerprint does not cover.
    """

    def __init__(
        self, path: Location, plan: Plan, *, lock: Lock = "alone", scratch: str | os.PathLike[str] | None = None
    ) -> None:
        self.path, self.plan, self.begun = path, plan, plan
        self._kind_of_lock, self._scratch = lock, scratch
        self._asides = path if isinstance(path, Path) else Path()  # where files are written before they are whole
        self._stack = contextlib.ExitStack()
        self._mark = new_mark()  # Forked and spawned workers keep that of the process that owns the run.
        self._descriptor = -1

    def __enter__(self) -> RunDirectory:
        try:
            if isinstance(self.path, ObjectPath):
                self._asides = self._stack.enter_context(scratch_folder(self._scratch))
                if self._kind_of_lock:
                    _check_store(self.path)
            else:
                self._open(self.path)
            begun = check_resumable(self.path, self.plan)
            if isinstance(self.path, Path):
                with report_write_errors(self.path, resumable=True):
                    remove_left_overs(self.path)
            if begun is None:
                write_whole(self.path / PLAN, [self.plan.to_json().encode()], replace=False)
                begun = check_resumable(self.path, self.plan)  # Another process may have been first with another plan.
            self.begun = begun or self.plan
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        self._stack.close()

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker, unlike a forked one, has not inherited the descriptor, only its number.
        return {**self.__dict__, "_descriptor": -1, "_stack": None}

    def _open(self, path: Path) -> None:
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise _unusable(path, error) from None
        self._lock()

    def _lock(self) -> None:
        if not self._kind_of_lock:
            return
        is_shared = self._kind_of_lock == "shared"
        try:
            # The kernel drops the lock with its last descriptor, so a killed run leaves no stale lock.
            fcntl.flock(self._descriptor, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(
                f"another hookx process is writing to {self.path}{_holder(self._descriptor)}"
                + (", and computes every shard" if is_shared else ""),
                "wait for it, or choose another --out",
                *([] if is_shared else ["if it computes a part, compute another beside it: --shard I/N"]),
            ) from None
        except OSError as error:
            log.warning(
                "this file system cannot lock %s (%s): a second hookx process that writes there would do the same work "
                "again, and harm nothing",
                self.path,
                reason_of(error),
            )

    def file_of(self, shard: Shard) -> Location:
        return self.path / self.plan.shard_file(shard)

    def aside_of(self, shard: Shard) -> Path:
        """Return where this run writes a shard before it is whole, in any of its processes."""
        return aside_of(self._asides / self.plan.shard_file(shard), self._mark)

    def release(self) -> None:
        """Unlock the directory; forked workers do so too, or they would keep the lock of a killed run."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    @property
    def is_complete(self) -> bool:
        """Whether every shard has its file, as far as the file system shows by now."""
        return len(present_shards(self.path, self.plan)) == len(self.plan.shards)

    def publish_index(self, see: Callable[[ShardRecord], None] = lambda record: None) -> None:
        """Write the tables of a run whose shards are all there; `see` is called with the record of each."""
        publish_index(self.path, self.plan, see)

    def publish_columns(self, columns: Sequence[Column]) -> None:
        """Write what is known of the images, unless it is there; `StoreError` if the file cannot be written."""

        def write(aside: Path) -> None:
            write_columns(aside, columns, self.plan.image_count)

        self.publish(COLUMNS, write)

    def publish(self, name: str, write: Callable[[Path], None]) -> None:
        """Have a file written aside, and give it its name in place of any other."""
        file, aside = self.path / name, aside_of(self._asides / name, self._mark)
        with report_write_errors(file, resumable=True), removed_at_the_end(aside):
            write(aside)
            with open(aside, "rb") as written:
                put_in_place(written.fileno(), aside, file, replace=True)


def _check_store(path: ObjectPath) -> None:
    """Raise `StoreError` if a store cannot be written to; warn if it does not keep what is there."""
    try:
        if not path.keeps_the_first():
            log.warning(
                "this store replaces what it was asked to create only: if two processes write the same shard the "
                "last wins, with the same bytes; do not begin two runs in %s at the same time",
                path,
            )
    except OSError as error:
        raise _unusable(path, error) from None


def _holder(descriptor: int) -> str:
    """Name the process that holds the lock of an open directory, if the system tells."""
    with contextlib.suppress(OSError, IndexError):  # Only Linux has this file.
        inode = str(os.fstat(descriptor).st_ino)
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if "FLOCK" in fields and fields[-3].rpartition(":")[2] == inode:
                return f" (pid {fields[-4]})"
    return ""


def check_resumable(path: Location, plan: Plan) -> Plan | None:
    """Raise `StoreError` unless a run of this plan may write to the directory; return the plan that is there."""
    names, there = names_in(path, is_output=True), None
    if PLAN in names:
        there = read_plan(path)
        if there.fingerprint != plan.fingerprint:
            raise OtherRunError(
                f"{path}/ holds another run: {'; '.join(there.differences(plan))}; choose another --out"
            )
    elif any(name.startswith("shard-") and name.endswith(".safetensors") for name in names):
        raise StoreError(f"{path}/ holds shards without a {PLAN}; choose another --out")
    for name in {INDEX, FAILURES, SHARDS, COLUMNS} & names:  # Now, and not when all shards are computed.
        with report_read_errors(path / name):
            check_is_file(path / name)
    return there


def begun_plan(path: Location) -> Plan | None:
    """Return the plan of the run that a directory holds; None if it holds none, or does not exist."""
    return read_plan(path) if PLAN in names_in(path, is_output=True) else None


def names_in(path: Location, *, is_output: bool = False) -> set[str]:
    """List a directory; with `is_output` it need not exist."""
    try:
        if isinstance(path, ObjectPath):
            return set(path.names())
        return set(patiently(os.listdir, path))
    except FileNotFoundError as error:
        with contextlib.suppress(OSError):
            if is_output and not is_there(path):
                return set()
        reason: OSError = error
    except NotADirectoryError as error:
        if is_output and isinstance(path, Path) and path.is_file():
            raise StoreError(f"{path} is a file, not a directory", "choose another --out") from None
        reason = error
    except OSError as error:
        reason = error
    raise _unusable(path, reason) if is_output else UnreadableError(path, reason_of(reason))


def _unusable(path: Location, error: OSError) -> StoreError:
    return StoreError(
        f"cannot use {path} as the output directory: {reason_of(error)}", "fix that, or choose another --out"
    )


def finished_shards(path: Location, plan: Plan) -> list[Shard]:
    """Return the shards whose files exist; `StoreError` for one that cannot be read, is damaged or of another run."""
    present = present_shards(path, plan, is_output=True)
    for shard in present:
        read_record(path, plan, shard)
    return present


def present_shards(path: Location, plan: Plan, *, is_output: bool = False) -> list[Shard]:
    """Return the shards that have a file, whatever it holds; with `is_output` the directory need not exist."""
    # Look in the directory, not through the plan, which may name any number of shards.
    names = names_in(path, is_output=is_output)
    found = (re.fullmatch(r"shard-(\d+)-of-\d+\.safetensors", name) for name in names)
    numbers = sorted({int(match[1]) for match in found if match})
    shards = [plan.shards[number] for number in numbers if number < len(plan.shards)]
    return [shard for shard in shards if plan.shard_file(shard) in names]


def read_plan(path: Location) -> Plan:
    """Read a directory's plan.json; `UnreadableError` if it is there and cannot be read now."""
    file = path / PLAN
    try:
        with report_read_errors(file):
            check_is_file(file)
            with open_file(file) as opened:
                text = as_stream(opened).read(_MAX_PLAN_BYTES + 1)
        if len(text) > _MAX_PLAN_BYTES:
            raise StoreError(f"{PLAN} is longer than {_MAX_PLAN_BYTES:,} bytes, and so not from hookx")
        return Plan.from_json(text.decode())
    except UnicodeDecodeError as error:
        raise StoreError(f"{path}/ holds no run of hookx: cannot read {PLAN} ({error})") from None
    except UnreadableError as error:
        with report_read_errors(path):
            if not is_there(file):
                raise StoreError(f"{path}/ holds no run of hookx: cannot read {PLAN} (there is none)") from None
        raise error from None
    except StoreError as error:
        raise StoreError(f"{path}/{error}") from None
