"""A run whose shards are handed out to workers: the same loop for the devices of a host and for the nodes of a cluster.

The process that runs the loop owns the run: it has the directory's lock, shows the progress, and writes the index. It
computes nothing, and the bytes do not depend on it: if two workers compute one shard, the first to publish wins. So a
worker that exits, freezes or comes back costs time only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hookx.errors import THEN_RESUME, DeviceError, HookxError
from hookx.images.listing import ImageList
from hookx.images.mapped import write_list
from hookx.launch.blocks import Blocks
from hookx.launch.crew import Crew, Member, Place
from hookx.launch.messages import Message, error_from_json, options_to_json
from hookx.options import ExtractOptions
from hookx.plan import Plan, Shard
from hookx.run.listed import list_images_of
from hookx.run.mended import failing_shards
from hookx.run.parts import Part, describe_part
from hookx.run.room import check_room
from hookx.run.summary import Summary, Timing, summarize
from hookx.store.asides import aside_of, new_mark, remove_left_overs
from hookx.store.directory import Lock, RunDirectory, finished_shards, present_shards
from hookx.store.files import remove, report_write_errors
from hookx.store.location import Location, absolute, location_of
from hookx.store.objects.path import ObjectPath
from hookx.store.record import Totals, read_record
from hookx.store.scratch import scratch_folder

log = logging.getLogger("hookx")
_MAX_FRUITLESS_STARTS = 3  # of a worker that does not finish a block in between
_MAX_SHOWN = 8


class HandedOut:
    """A run that workers compute. Entering it lists the images and begins the run; `run` hands its shards out.

    Args:
        options: those of the run.
        places: where workers are to run.
        workers_each: how many processes decode, or compute, for each; None: as many as a worker finds cores.
        is_local: all workers are on this host; otherwise the list of images lies in the output directory.
    """

    def __init__(
        self,
        options: ExtractOptions,
        places: Sequence[Place],
        workers_each: int | None,
        *,
        is_local: bool = True,
        images: ImageList | None = None,
    ) -> None:
        self.options, self.out, self.part = options, location_of(options.out), Part.parse(options.shard)
        self._workers_each, self._is_local, self._listed = workers_each, is_local, images
        self._crew = Crew(places)
        self._stack = contextlib.ExitStack()
        self._described: dict[Member, Message] = {}  # what workers have said about themselves
        self._counted_twice = 0  # images of the progress that are computed again

    def __enter__(self) -> HandedOut:
        with contextlib.ExitStack() as stack:
            images = self._listed or list_images_of(self.options)
            self._listed = None
            self._list = stack.enter_context(self._list_for_workers(images))
            self._remarks, columns = images.remarks, images.columns
            del images  # The workers map the file; this process needs none of it but what no worker knows.
            stack.callback(self._clear_up)
            stack.callback(self._crew.end)
            plan = self._prepare_first()
            lock: Lock = "shared" if self.part else "alone"
            self._directory = RunDirectory(self.out, plan, lock=lock, scratch=self.options.scratch)
            stack.enter_context(self._directory)
            if columns:
                self._directory.publish_columns(columns)
            if self.options.batch_size == "auto":
                plan = dataclasses.replace(plan, batch_size=self._directory.begun.batch_size)
            self.plan = plan
            self.pending, self._replaced = self._find_pending()
            places = len(self._crew.members) if self._is_local else 0
            check_room(self.out, self.pending, plan, self.options.scratch, places)
            self._stack = stack.pop_all()
        return self

    @contextlib.contextmanager
    def _list_for_workers(self, images: ImageList) -> Iterator[Location]:
        """Write the list of images where all workers see it; yield where, for as long as the block lasts."""
        if self._is_local:
            with tempfile.TemporaryDirectory(prefix="hookx-") as folder:
                write_list(images, Path(folder, "images"))
                yield Path(folder, "images")
            return
        name = aside_of(Path("images"), new_mark()).name
        if isinstance(self.out, ObjectPath):
            with scratch_folder(self.options.scratch) as folder:
                write_list(images, folder / name)
                with report_write_errors(self.out, resumable=True):
                    (self.out / name).put(folder / name, replace=False)
        else:
            with report_write_errors(self.out, resumable=True):
                self.out.mkdir(parents=True, exist_ok=True)
            write_list(images, self.out / name)
        try:
            yield absolute(self.out / name)
        finally:
            with contextlib.suppress(OSError):  # A later run removes it; the directory stays if it holds a run.
                remove(self.out / name)
                if isinstance(self.out, Path):
                    self.out.rmdir()

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def image_count(self) -> int:
        """How many images this process is to account for, computed or not."""
        return sum(len(self.plan.shards[number]) for number in self._numbers)

    @property
    def images_done(self) -> int:
        return self.image_count - sum(map(len, self.pending))

    @property
    def _numbers(self) -> range:
        count = len(self.plan.shards)
        return self.part.numbers(count) if self.part else range(count)

    def _clear_up(self) -> None:
        if isinstance(self.out, Path):
            with contextlib.suppress(OSError):  # There may be no directory yet.
                remove_left_overs(self.out)

    def _prepare_first(self) -> Plan:
        """Let the first worker check the run; return its plan, or raise what is wrong."""
        first = self._crew.members[0]
        self._start(first)
        for member, message in self._crew.events():
            if message is None:
                self._restart(member, self._how_it_ended(member))
            elif "error" in message:
                raise error_from_json(message["error"])
            elif "ready" in message:
                self._meet(member, message["ready"])
                break
        return Plan.from_json(self._described[first]["plan"])

    def _find_pending(self) -> tuple[list[Shard], frozenset[int]]:
        there = present_shards(self.out, self.plan) if self.part else finished_shards(self.out, self.plan)
        there = [shard for shard in there if shard.number in self._numbers]
        replaced = failing_shards(self.out, self.plan, there) if self.options.retry_failures else frozenset()
        kept = {shard.number for shard in there} - replaced
        pending = [self.plan.shards[number] for number in self._numbers if number not in kept]
        if self.part:
            log.info("part %s", describe_part(self.part, self.plan, len(pending)))
        return pending, replaced

    # --- workers ----------------------------------------------------------------------------------------------------

    def _start(self, member: Member) -> None:
        options = dataclasses.replace(self.options, device=member.place.option, workers=self._workers_each)
        message = {"options": options_to_json(options), "images": str(self._list), "folder": os.getcwd()}
        self._crew.start(member, message)

    def _meet(self, member: Member, description: Message) -> None:
        member.is_ready, self._described[member] = True, description

    def _how_it_ended(self, member: Member) -> str:
        assert member.worker is not None
        how, member.worker, member.is_ready = member.worker.wait(), None, False
        return how

    def _restart(self, member: Member, how: str) -> None:
        """Start a worker again that ended unexpectedly; give its place up if that was of no use before."""
        if member.fruitless_starts < _MAX_FRUITLESS_STARTS:
            log.warning("the worker at %s ended unexpectedly (%s); it is started again", member.place.name, how)
            self._start(member)
            return
        times = f"{_MAX_FRUITLESS_STARTS} times, the last by {how}"
        problem = HookxError(
            f"the worker at {member.place.name} ended unexpectedly {times}",
            "most often the machine ran out of memory: try fewer --workers or a smaller --batch-size",
            THEN_RESUME,
        )
        self._give_up(member, problem)

    def _give_up(self, member: Member, problem: HookxError) -> None:
        """Go on without a place, if there are others."""
        if not self._crew.working:
            raise problem
        log.warning("%s: going on without %s", str(problem).splitlines()[0], member.place.name)

    # --- the loop ---------------------------------------------------------------------------------------------------

    def run(self, progress: Callable[[int], None] = lambda images_done: None) -> Summary:
        """Compute the pending shards, and write the index.

        Raises:
            HookxError: what stops a run in one process stops this one, too; or no place is left; or a shard is missing
                at which workers crashed, when all others are computed.
        """
        timing = self._timing()
        if self.pending:
            blocks = Blocks(shard.number for shard in self.pending)
            self._hand_out(blocks, timing, progress)
            if blocks.given_up:
                raise self._deadly(sorted(blocks.given_up))
        self._crew.finish()
        totals, computed = Totals(), Totals()
        if self.part is None or self._directory.is_complete:
            self._directory.publish_index(totals.add)
        for shard in self.pending if self.part else ():
            computed.add(read_record(self.out, self.plan, shard))
        devices = Counter(described["device"] for described in self._described.values())
        return summarize(
            *(self.plan, self.out, self.pending, self.part, computed if self.part else totals, timing),
            device=", ".join(f"{count} x {name}" if count > 1 else name for name, count in devices.items()),
            workers=sum(described["workers"] for described in self._described.values()),
            remarks=self._remarks,
        )

    def _timing(self) -> Timing:
        first, count = self._described[self._crew.members[0]], min(len(self._crew.members), max(1, len(self.pending)))
        return Timing({part: count * number for part, number in first["processes"].items()}, first["takes_turns"])

    def _hand_out(self, blocks: Blocks, timing: Timing, progress: Callable[[int], None]) -> None:
        members = self._crew.members[: len(self.pending)]  # No more than have a shard each.
        each = self._described[members[0]]["workers"]
        what = f"{each} process{'es' * (each != 1)} each"
        log.info("workers: %d (%s), %s", len(members), _names_of(members), what)
        for member in members[1:]:
            self._start(member)
        self._serve_idle(blocks)
        for member, message in self._crew.events():
            if message is None:
                self._take_back(member, blocks, died=True)
                self._restart(member, self._how_it_ended(member))
            elif "error" in message:
                error = error_from_json(message["error"])
                if not isinstance(error, DeviceError):
                    raise error
                self._take_back(member, blocks, died=False)
                self._how_it_ended(member)
                self._give_up(member, error)
            elif "ready" in message:
                self._meet(member, message["ready"])
            elif "progress" in message:
                member.images_in_hand += message["progress"]
                progress(self._count(message["progress"]))
            elif "done" in message:
                timing.add(message["seconds"])
                member.shards_per_second = len(member.block) / max(time.monotonic() - member.since, 1e-6)
                member.fruitless_starts, member.images_in_hand, member.block = 0, 0, []
            self._serve_idle(blocks)
            if not blocks and not any(one.block for one in self._crew.working):
                return

    def _serve_idle(self, blocks: Blocks) -> None:
        for member in self._crew.working:
            if blocks and member.is_ready and not member.block:
                assert member.worker is not None
                member.block = blocks.take(len(self._crew.working), member.shards_per_second)
                member.since = time.monotonic()
                replaced = [number for number in member.block if number in self._replaced]
                member.worker.send({"shards": member.block, "replaced": replaced})

    def _take_back(self, member: Member, blocks: Blocks, *, died: bool) -> None:
        """Take back what a worker has not published of its block."""
        block, counted, member.block, member.images_in_hand = member.block, member.images_in_hand, [], 0
        there = {shard.number for shard in present_shards(self.out, self.plan)} - self._replaced
        missing = [number for number in block if number not in there]
        published = sum(len(self.plan.shards[number]) for number in block if number in there)
        self._counted_twice += max(0, counted - published)
        for number in blocks.take_back(missing, died=died):
            log.warning("shard %d is left out: each worker that computed it crashed", number)

    def _count(self, images: int) -> int:
        """Return how much a progress is worth, without images that were counted before a worker crashed."""
        again = min(images, self._counted_twice)
        self._counted_twice -= again
        return images - again

    def _deadly(self, numbers: Sequence[int]) -> HookxError:
        shown = ", ".join(map(str, numbers[:_MAX_SHOWN])) + (", ..." if len(numbers) > _MAX_SHOWN else "")
        return HookxError(
            f"{len(numbers):,} shards are missing ({shown}): every worker that computed one of them crashed",
            "all others are computed; to see what happens, compute them in one process:",
            f"  {self.plan.command(f'{self.out}/')}",
        )


def _names_of(members: Sequence[Member]) -> str:
    names = [member.place.name for member in members]
    return ", ".join(names if len(names) <= _MAX_SHOWN else [*names[:_MAX_SHOWN], "..."])
