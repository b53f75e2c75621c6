"""Check that a run is whole: compare its plan, shards and tables, and report everything that is wrong."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from hookx.errors import ShardError, StoreError, UnreadableError
from hookx.keys import image_lines, key_bytes
from hookx.plan import Plan, Shard
from hookx.store.asides import is_aside
from hookx.store.columns import COLUMNS, open_columns
from hookx.store.directory import PLAN, names_in, present_shards, read_plan
from hookx.store.files import is_there, open_file, report_read_errors
from hookx.store.format import checksum_in_file, open_shard
from hookx.store.index import FAILURES, INDEX, SHARDS, table_lines, tables_of
from hookx.store.location import Location, location_of
from hookx.store.objects.path import ObjectPath
from hookx.store.reading import as_stream
from hookx.store.record import ShardRecord, Totals, read_record

_MAX_NOTES = 20


@dataclass(frozen=True)
class Problem:
    """What is wrong with one file of the directory; `what` completes a sentence that begins with the file's name."""

    file: str
    what: str


@dataclass(frozen=True)
class Verification:
    """What `verify` found. Notes concern files that do not belong to the run; they are not errors."""

    path: str
    shards: int  # in the plan
    shards_whole: int
    shards_unreadable: int  # They could not be read now, and may be whole.
    rows: int  # in readable shards, like failures and bytes
    failures: int
    bytes: int
    problems: tuple[Problem, ...]
    notes: tuple[Problem, ...] = ()

    @property
    def is_whole(self) -> bool:
        return not self.problems


def verify(path: str | os.PathLike[str], *, progress: Callable[[int], None] = lambda shards_read: None) -> Verification:
    """Read a run once, one shard at a time, and report everything that is wrong with it.

    Checked: the plan matches its fingerprint, and every shard matches the plan; every shard exists, under its name,
    with the planned tensors, shapes and types; rows and failures are the listed images (key and size), each once and
    in order; the checksums taken while the shards were written match; index.csv and failures.csv match the shards, and
    columns.safetensors its checksum.

    Args:
        progress: called with the number of shards read since the last call.

    Raises:
        StoreError: the directory does not exist, or cannot be read. Problems inside it are in the result.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from hookx.launch.extract import extract
        >>> with TemporaryDirectory() as out:
        ...     _ = extract("resnet18", "avgpool", "images", weights="none", out=out)
        ...     whole = verify(out)
        ...     (Path(out) / "shard-00000-of-00001.safetensors").unlink()
        ...     damaged = verify(out)
        >>> whole.is_whole, whole.rows
        (True, 8)
        >>> damaged.problems
        (Problem(file='shard-00000-of-00001.safetensors', what='is missing'),)
    """
    run = location_of(path)
    if not isinstance(run, ObjectPath):
        with report_read_errors(run):
            if not is_there(run) or not stat.S_ISDIR(os.stat(run).st_mode):
                raise StoreError(f"there is no directory '{run}'")
    try:
        plan = read_plan(run)
    except UnreadableError as error:
        return Verification(str(run), 0, 0, 0, 0, 0, 0, (Problem(PLAN, error.what),))
    except StoreError as error:
        what = str(error).removeprefix(f"{run}/{PLAN} ")
        return Verification(str(run), 0, 0, 0, 0, 0, 0, (Problem(PLAN, what),))

    present = present_shards(run, plan)
    problems = list(_missing(plan, present))
    images, totals, whole, unreadable = _ImageList(), Totals(), 0, 0
    for shard in present:
        file = plan.shard_file(shard)
        try:
            record = read_record(run, plan, shard)
            found = [*images.add(shard, record), *_changed_tensors(run / file, plan, record)]
        except (ShardError, UnreadableError) as error:
            found = [error.what]
            unreadable += isinstance(error, UnreadableError)
        else:
            totals.add(record)
            whole += not found
        problems += (Problem(file, what) for what in found)
        progress(1)

    foreign, notes = _other_files(run, plan, present)
    damaged = list(_damaged_columns(run, plan))
    problems += [*foreign, *damaged]
    if whole == len(plan.shards):
        if images.digest.hexdigest() != plan.images_sha256:
            problems.append(Problem(PLAN, "lists images (names or sizes) other than those in the shards"))
        problems += _wrong_tables(run, plan, totals.failures > 0, [INDEX] if damaged else [])
    elif INDEX in names_in(run):
        notes.insert(0, Problem(INDEX, "was not compared, because not all shards are whole"))
    return Verification(
        path=str(run),
        shards=len(plan.shards),
        shards_whole=whole,
        shards_unreadable=unreadable,
        rows=totals.rows,
        failures=totals.failures,
        bytes=totals.rows * plan.bytes_per_image,
        problems=tuple(problems),
        notes=tuple(notes),
    )


def _missing(plan: Plan, present: list[Shard]) -> Iterator[Problem]:
    # Consecutive missing shards are one problem, because a plan can promise any number of shards.
    expected = 0
    for number in [*(shard.number for shard in present), len(plan.shards)]:
        if number > expected:
            what = "is missing"
            if number > expected + 1:
                last = plan.shard_file(plan.shards[number - 1])
                what += f", and so are all up to {last} ({number - expected:,} shards)"
            yield Problem(plan.shard_file(plan.shards[expected]), what)
        expected = number + 1


class _ImageList:
    """The list of images, put together from the shards: its digest, and the last key so far."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self._last_key: str | None = None

    def add(self, shard: Shard, record: ShardRecord) -> Iterator[str]:
        """Add the images of the next shard, rows and failures alike, and report those out of order."""
        failed = [key for key, _ in record.failures]
        keys = record.keys_of_images
        if sorted(record.keys, key=key_bytes) != record.keys or sorted(failed, key=key_bytes) != failed:
            yield "does not hold its images in the order of their keys"
        for one, other in pairwise(keys):
            if one == other:
                yield f"holds the image '{one}' twice"
        if self._last_key is not None and key_bytes(keys[0]) <= key_bytes(self._last_key):
            yield f"begins with the image '{keys[0]}', which does not come after '{self._last_key}' in an earlier shard"
        self._last_key = keys[-1]
        if len(record.sizes_bytes) != len(shard):
            yield f"records the sizes of {len(record.sizes_bytes)} images, but holds {len(shard)}"
            return
        self.digest.update(image_lines(zip(keys, record.sizes_bytes, strict=True)))


def _changed_tensors(file: Location, plan: Plan, record: ShardRecord) -> Iterator[str]:
    with open_shard(file) as (opened, header):
        for layer in plan.layers:
            place = header.tensors[layer.address]
            if checksum_in_file(opened, place.start, place.stop) != record.checksums.get(layer.address):
                yield f"is damaged: '{layer.address}' does not match the checksum taken when it was written"


def _other_files(path: Location, plan: Plan, present: list[Shard]) -> tuple[list[Problem], list[Problem]]:
    """Return problems about shards that are not in the plan, and notes about all other files foreign to the run."""
    known = {PLAN, INDEX, FAILURES, SHARDS, COLUMNS, *(plan.shard_file(shard) for shard in present)}
    foreign, notes = [], []
    for name in sorted(set(names_in(path)) - known):
        if name.startswith("shard-") and name.endswith(".safetensors"):
            foreign.append(Problem(name, f"is not one of the {len(plan.shards):,} shards of this plan"))
        elif is_aside(name):
            notes.append(Problem(name, "is being written, or was left by a killed run"))
        else:
            notes.append(Problem(name, "is not part of this run"))
    if len(notes) > _MAX_NOTES:
        more = len(notes) - _MAX_NOTES
        notes[_MAX_NOTES:] = [Problem(f"and {more:,} more", "that are not part of this run")]
    return foreign, notes


def _damaged_columns(path: Location, plan: Plan) -> Iterator[Problem]:
    try:
        if (columns := open_columns(path, plan)) and columns.is_damaged():
            yield Problem(COLUMNS, "is damaged: it does not match the checksum taken when it was written")
    except (ShardError, UnreadableError) as error:
        yield Problem(COLUMNS, error.what)


def _wrong_tables(path: Location, plan: Plan, has_failures: bool, but: Sequence[str]) -> Iterator[Problem]:
    there, expected = names_in(path), tables_of(plan)
    if SHARDS not in there and INDEX in there:
        expected = [INDEX]  # It was written by an earlier version, which had no other.
    expected = [name for name in expected if name not in but]
    for name in [FAILURES, *expected] if has_failures else expected:
        try:
            with report_read_errors(path / name):
                what = _difference(path / name, table_lines(path, plan, name))
                if what and not _difference(path / name, table_lines(path, plan, name, as_fields=False)):
                    what = ""  # It was written before keys were kept from becoming formulas.
        except (ShardError, UnreadableError) as error:  # A shard can have become unreadable since.
            what = error.what if error.file.name == name else f"cannot be compared: {error.file.name} {error.what}"
        if what:
            yield Problem(name, what)
    if not has_failures and FAILURES in there:
        yield Problem(FAILURES, "exists, but no shard has failures")


def _difference(table: Location, lines: Iterator[bytes]) -> str:
    """Return how a table differs from the lines derived from the shards, '' if it does not; reads line by line."""
    if not is_there(table):
        return "is missing"
    number = 0
    with open_file(table) as opened:
        file = as_stream(opened)
        for number, line in enumerate(lines, 1):
            if file.read(len(line)) != line:
                should_be = line.decode("utf-8", "surrogateescape").rstrip("\n")
                return f"differs from the shards in line {number:,}, which should be: {should_be}"
        return f"continues after the {number:,} lines derived from the shards" if file.read(1) else ""
