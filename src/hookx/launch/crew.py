"""The workers of a run, wherever they are: started, listened to, and ended."""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from hookx.launch.messages import Message

log = logging.getLogger("hookx")
_POLL_SECONDS = 0.5
_MAX_LOGGED = 10  # warnings of one wording


class Worker(Protocol):
    """A process that computes: on this host, or on a node of a cluster."""

    def send(self, message: Message) -> None: ...

    def receive(self) -> Message | None:
        """Wait for its next message; None once it has ended."""

    def finish(self) -> None:
        """Let it end by itself."""

    def kill(self) -> None: ...

    def wait(self) -> str:
        """Wait until it has ended; return how, in words."""


class Place(Protocol):
    """Where a worker runs: a device of this host, or what a cluster gives."""

    @property
    def name(self) -> str: ...

    @property
    def option(self) -> str:
        """The device, as `--device` names it there."""

    def start(self) -> Worker: ...


@dataclass(eq=False)
class Member:
    """One of a crew: a place, the worker that runs there now, and what the worker has in hand."""

    place: Place
    worker: Worker | None = None
    is_ready: bool = False
    block: list[int] = field(default_factory=list)
    since: float = 0.0  # when it got the block
    shards_per_second: float | None = None
    images_in_hand: int = 0  # that it has computed of the block
    fruitless_starts: int = 0  # since it last finished a block


class Crew:
    """The workers of a run. Each has a thread that listens to it; `events` yields what all of them say."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.members = [Member(place) for place in places]
        self._events: queue.SimpleQueue[tuple[Member, Worker, Message | None]] = queue.SimpleQueue()
        self._said: Counter[str] = Counter()

    @property
    def working(self) -> list[Member]:
        return [member for member in self.members if member.worker is not None]

    def start(self, member: Member, message: Message) -> None:
        """Start a worker at a member's place, and send it its first message."""
        worker = member.worker = member.place.start()
        member.fruitless_starts += 1
        threading.Thread(target=self._listen, args=(member, worker), daemon=True, name="hookx-listener").start()
        worker.send(message)

    def _listen(self, member: Member, worker: Worker) -> None:
        while (message := worker.receive()) is not None:
            self._events.put((member, worker, message))
        self._events.put((member, worker, None))

    def events(self) -> Iterator[tuple[Member, Message | None]]:
        """Yield who says something and what, and None for one that has ended, until nobody works any more.

        What workers log is logged here: notes of the first only, because all say the same.
        """
        while self.working:
            try:
                member, worker, message = self._events.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue  # A signal may have come in.
            if member.worker is not worker:
                continue  # It was given up.
            if message is not None and "log" in message:
                self._log(member, *message["log"])
            else:
                yield member, message

    def _log(self, member: Member, level: int, template: str, text: str) -> None:
        if level < logging.WARNING:
            if member is self.members[0] and not self._said[text]:
                log.log(level, "%s", text)
                self._said[text] += 1
            return
        self._said[template] += 1
        if self._said[template] <= _MAX_LOGGED:
            log.log(level, "%s", text)

    def end(self) -> None:
        """End all workers, and wait until none of them can write any more; the shard that each has in hand is lost."""
        for member in self.working:
            assert member.worker is not None
            member.worker.kill()
        for member in self.working:
            assert member.worker is not None
            member.worker.wait()
            member.worker = None
        unsaid = sum(max(0, count - _MAX_LOGGED) for count in self._said.values())
        if unsaid:
            log.warning("and %d more warnings like these", unsaid)

    def finish(self) -> None:
        """Let those end by themselves that have nothing in hand; end those that are still getting ready."""
        for member in self.working:
            assert member.worker is not None
            if member.is_ready:
                member.worker.finish()
                member.worker.wait()
                member.worker = None
        self.end()
