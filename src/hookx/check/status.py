"""How far a run is, from the names and times of its files alone: no shard is opened."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hookx.plan import Plan
from hookx.store.asides import Aside, asides_in, clock_of
from hookx.store.directory import FAILURES, INDEX, names_in, present_shards, read_plan
from hookx.store.files import report_read_errors

_WINDOW_SECONDS = 3600  # Only shards that were finished in this time before the last one count for the rate.
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
        images_per_second: rate of all processes together, over the last hour; None with fewer than two shards.
        seconds_left: at that rate; None if nobody is writing, or there is no rate yet.
        seconds_ago: time since the last shard was finished; None before the first.
    """

    path: str
    plan: Plan
    shards_finished: int
    images_finished: int
    has_index: bool
    has_failures: bool
    writers: tuple[Writer, ...]
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
    path = Path(path)
    plan = read_plan(path)
    finished = present_shards(path, plan)
    times = []
    for shard in finished:
        with contextlib.suppress(OSError):  # It was removed just now.
            times.append((os.stat(path / plan.shard_file(shard)).st_mtime, len(shard)))
    with report_read_errors(path):
        asides = list(asides_in(path))
    try:
        now = clock_of(path)
    except OSError:  # Who only looks need not be allowed to write.
        now = time.time()
    names = names_in(path)
    writers = _writers(asides, now)
    images = sum(map(len, finished))
    rate = _rate(sorted(times))
    left = plan.image_count - images
    return Status(
        path=str(path),
        plan=plan,
        shards_finished=len(finished),
        images_finished=images,
        has_index=INDEX in names,
        has_failures=FAILURES in names,
        writers=writers,
        images_per_second=rate,
        seconds_left=left / rate if rate and left and writers else None,
        seconds_ago=max(0.0, now - max(times)[0]) if times else None,
    )


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
