"""The end of a run of many processes: its index, its totals, and what it was made on."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hookx.errors import StoreError
from hookx.plan import Plan
from hookx.run.made import kind_of
from hookx.run.parts import Part
from hookx.store.asides import MAX_AGE_SECONDS, remove_left_overs
from hookx.store.directory import present_shards, read_plan
from hookx.store.files import report_write_errors
from hookx.store.index import publish_index
from hookx.store.location import Location, location_of
from hookx.store.objects.path import ObjectPath
from hookx.store.record import ShardRecord, Totals

log = logging.getLogger("hookx")
_MAX_SHOWN = 8


@dataclass(frozen=True)
class Finished:
    """What a finished run holds.

    Args:
        made: the software and the hardware that made shards, and how many shards each made.
    """

    path: str
    plan: Plan
    totals: Totals
    made: tuple[tuple[Mapping[str, str], int], ...]


def finish(
    path: str | os.PathLike[str],
    parts: int | None = None,
    *,
    progress: Callable[[int], None] = lambda shards_read: None,
) -> Finished:
    """Complete a run whose shards are all there: write index.csv and failures.csv, remove what killed processes left.

    Args:
        parts: how many parts the run was cut into; an error then names those that are missing.
        progress: called with the number of shards read since the last call.

    Raises:
        StoreError: shards are missing (the message has the commands that compute them), damaged or unreadable.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import hookx
        >>> with TemporaryDirectory() as out:
        ...     for shard in ("0/2", "1/2"):
        ...         _ = hookx.extract("resnet18", "avgpool", "images", weights="none", out=out, shard=shard)
        ...     finished = finish(out)
        >>> finished.totals.rows, [shards for _, shards in finished.made]
        (8, [1])
    """
    run = location_of(path)
    plan = read_plan(run)
    present = {shard.number for shard in present_shards(run, plan)}
    missing = [number for number in range(len(plan.shards)) if number not in present]
    if missing:
        raise _not_finished(run, plan, missing, parts)
    totals, made = Totals(), dict[tuple[tuple[str, str], ...], int]()

    def see(record: ShardRecord) -> None:
        totals.add(record)
        kind = kind_of(record.made)
        made[kind] = made.get(kind, 0) + 1
        progress(1)

    publish_index(run, plan, see)
    if isinstance(run, ObjectPath):
        _abandon_uploads(run)
    else:
        with report_write_errors(run, resumable=True):
            remove_left_overs(run)
    return Finished(str(run), plan, totals, tuple((dict(kind), shards) for kind, shards in made.items()))


def _abandon_uploads(path: ObjectPath) -> None:
    """Give up what killed processes were sending: its parts are paid for, and in no listing."""
    try:
        if count := path.abandon_uploads(MAX_AGE_SECONDS):
            log.info("uploads that killed processes had begun: %d given up", count)
    except OSError as error:
        log.warning(
            "cannot look for uploads that killed processes had begun (%s): have the store give up what is older than a "
            "day, by a rule of the bucket",
            error,
        )


def _not_finished(path: Location, plan: Plan, missing: list[int], parts: int | None) -> StoreError:
    out, count = f"{path}/", len(plan.shards)
    shown = ", ".join(map(str, missing[:_MAX_SHOWN])) + (", ..." if len(missing) > _MAX_SHOWN else "")
    problem = f"{out} is not finished: {len(missing):,} of {count:,} shards are missing ({shown})"
    if parts is None:
        return StoreError(problem, "compute them with (reconstructed from the plan):", f"  {plan.command(out)}")
    absent = [number for number in range(parts) if any(shard % parts == number for shard in missing)]
    commands = [f"  {plan.command(out)} --shard {Part(number, parts)}" for number in absent[:_MAX_SHOWN]]
    others = [f"and parts {', '.join(map(str, absent[_MAX_SHOWN:]))}"] if len(absent) > _MAX_SHOWN else []
    return StoreError(
        f"{problem}, in {len(absent):,} of {parts:,} parts",
        "compute them with (reconstructed from the plan):",
        *commands,
        *others,
    )
