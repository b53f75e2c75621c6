"""How far a run is, from the names and times of its files alone: no shard is opened."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hookx.plan import Plan, Shard
from hookx.store.asides import Aside, asides_in, clock_of
from hookx.store.directory import names_in, present_shards, read_plan
from hookx.store.files import report_read_errors
from hookx.store.index import FAILURES, INDEX, SHARDS
from hookx.store.location import location_of
from hookx.store.objects.path import ObjectPath

_WINDOW_SECONDS = 3600  # Only shards that were finished in this time before the last one count for the rate.
_RECENT_SECONDS = 600
_MIN_FOR_RATE = 2


@dataclass(frozen=True)
class Writer:
    """A process that is writing shards, or was when it was killed.

    Args:
        seconds_ago: time since it wrote last, by the clock of the file system.
    """

    host: str
    process: int
    shards: tuple[int, ...]
    seconds_ago: float


@dataclass(frozen=True)
class Status:
    """How far a run is.

    Args:
        images_finished: rows and failures of the finished shards.
        writers: who writes shards; None in an object store, which does not tell.
        images_per_second: rate of all processes together, over the last hour; None with fewer than two shards.
        seconds_left: at that rate; None if nobody is writing, or there is no rate yet. Who writes to an object store
            cannot be seen: there, it is None if no shard was finished in the last ten minutes.
        seconds_ago: time since the last shard was finished; None before the first.
    """

    path: str
    plan: Plan
    shards_finished: int
    images_finished: int
    has_index: bool
    has_failures: bool
    writers: tuple[Writer, ...] | None
    images_per_second: float | None
    seconds_left: float | None
    seconds_ago: float | None

    @property
    def is_finished(self) -> bool:
        return self.shards_finished == len(self.plan.shards) and self.has_index


def status(path: str | os.PathLike[str]) -> Status:
    """Report how far a run is, who computes it, how fast, and how long it will take.

    Raises:
        StoreError: the directory holds no run, or cannot be read.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import hookx
        >>> with TemporaryDirectory() as out:
        ...     _ = hookx.extract("resnet18", "avgpool", "images", weights="none", out=out, shard_images=4, shard="0/2")
        ...     found = status(out)
        >>> found.shards_finished, found.images_finished, found.is_finished, found.writers
        (1, 4, False, ())
    """
    run = location_of(path)
    plan = read_plan(run)
    finished = present_shards(run, plan)
    names = names_in(run)
    if isinstance(run, ObjectPath):
        times, writers, now = _times_of_objects(run, plan, finished), None, time.time()
    else:
        times, now = _times_of_files(run, plan, finished), _now(run)
        with report_read_errors(run):
            writers = _writers(list(asides_in(run)), now)
    ago = max(0.0, now - max(times)[0]) if times else None
    is_going_on = bool(writers) if writers is not None else ago is not None and ago < _RECENT_SECONDS
    images = sum(map(len, finished))
    rate = _rate(sorted(times))
    left = plan.image_count - images
    return Status(
        path=str(run),
        plan=plan,
        shards_finished=len(finished),
        images_finished=images,
        has_index=bool({INDEX, SHARDS} & names),
        has_failures=FAILURES in names,
        writers=writers,
        images_per_second=rate,
        seconds_left=left / rate if rate and left and is_going_on else None,
        seconds_ago=ago,
    )


def _times_of_files(run: Path, plan: Plan, finished: Sequence[Shard]) -> list[tuple[float, int]]:
    """Return when each shard was finished, by the clock of the file system, and how many images it has."""
    times = []
    for shard in finished:
        with contextlib.suppress(OSError):  # It was removed just now.
            times.append((os.stat(run / plan.shard_file(shard)).st_mtime, len(shard)))
    return times


def _times_of_objects(run: ObjectPath, plan: Plan, finished: Sequence[Shard]) -> list[tuple[float, int]]:
    with report_read_errors(run):
        listed = run.names()
    found = ((listed.get(plan.shard_file(shard)), len(shard)) for shard in finished)
    return [(one.time, images) for one, images in found if one]


def _now(run: Path) -> float:
    try:
        return clock_of(run)
    except OSError:  # Who only looks need not be allowed to write.
        return time.time()


def _writers(asides: Sequence[Aside], now: float) -> tuple[Writer, ...]:
    """Return who writes shards: on this host, processes that are there; on others, those whose files are there."""
    by_mark: dict[str, list[Aside]] = {}
    for aside in asides:
        if aside.shard is not None and (aside.is_in_use or not aside.is_of_this_host):
            by_mark.setdefault(aside.mark, []).append(aside)
    writers = []
    for own in by_mark.values():
        written = []
        for aside in own:
            with contextlib.suppress(OSError):  # It was published just now.
                written.append(os.lstat(aside.path).st_mtime)
        if written:
            host = own[0].host.rpartition(".")[0]
            shards = tuple(sorted(aside.shard for aside in own if aside.shard is not None))
            writers.append(Writer(host, own[0].process, shards, max(0.0, now - max(written))))
    return tuple(sorted(writers, key=lambda writer: (writer.host, writer.process)))


def _rate(times: Sequence[tuple[float, int]]) -> float | None:
    """Return images a second of shards, each with the time when it was finished: all but the first, since the first."""
    recent = [(time, images) for time, images in times if time >= times[-1][0] - _WINDOW_SECONDS]
    if len(recent) < _MIN_FOR_RATE or recent[-1][0] <= recent[0][0]:
        return None
    return sum(images for _, images in recent[1:]) / (recent[-1][0] - recent[0][0])
