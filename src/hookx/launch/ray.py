"""A run on a cluster of Ray: an actor for each GPU, or for each node without one, which owns a worker.

The only file that imports ray. A worker is a process of its own, because an actor's must not fork, and hookx forks its
decoders. Ray carries messages of some hundred bytes; images and activations never pass through it.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import re
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hookx.errors import HookxError
from hookx.launch.local import LocalWorker
from hookx.launch.messages import Message
from hookx.options import ExtractOptions

log = logging.getLogger("hookx")
_WAIT_FOR_CLUSTER_SECONDS = 5
_WAIT_SECONDS = 0.2  # of an actor, for a message of its worker


class Actor:
    """Owns a worker on whichever node Ray chose, and passes its messages on."""

    def __init__(self) -> None:
        self._worker = LocalWorker({})
        self._messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while (message := self._worker.receive()) is not None:
            self._messages.put(message)
        self._messages.put(None)

    def exchange(self, sent: Sequence[Message]) -> list[Message | None]:
        """Pass messages to the worker; return what it said since, and None at its end."""
        for message in sent:
            self._worker.send(message)
        said: list[Message | None] = []
        with contextlib.suppress(queue.Empty):
            said.append(self._messages.get(timeout=_WAIT_SECONDS))
            while True:
                said.append(self._messages.get_nowait())
        return said

    def how_it_ended(self) -> str:
        return self._worker.wait()


class RayWorker:
    """A worker whose actor may be on any node."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._unsent: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._said: list[Message | None] = []
        self._problem = ""

    def send(self, message: Message) -> None:
        self._unsent.put(message)

    def receive(self) -> Message | None:
        """Wait for its next message; None once it, its actor or its node has ended."""
        import ray

        while not self._said:
            sent = []
            with contextlib.suppress(queue.Empty):
                while True:
                    sent.append(self._unsent.get_nowait())
            try:
                self._said += ray.get(self._actor.exchange.remote(sent))
            except ray.exceptions.RayError as error:
                self._problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                return None
        return self._said.pop(0)

    def finish(self) -> None:
        """Let it end; it has nothing in hand, so its actor can go with it."""
        self.kill()

    def kill(self) -> None:
        import ray

        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(self._actor)  # Its worker ends with it.

    def wait(self) -> str:
        """Return how it ended, in words."""
        import ray

        if self._problem:
            return self._problem
        try:
            return str(ray.get(self._actor.how_it_ended.remote(), timeout=_WAIT_SECONDS))
        except ray.exceptions.RayError as error:
            return type(error).__name__


@dataclass(frozen=True)
class RayPlace:
    """What an actor takes of a cluster: cores, GPUs, and the node where it is best placed."""

    name: str
    cores: int
    gpus: float
    node: str = ""
    option: str = "auto"

    def start(self) -> RayWorker:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        where = NodeAffinitySchedulingStrategy(self.node, soft=True) if self.node else "SPREAD"
        options = {"num_cpus": self.cores, "num_gpus": self.gpus, "max_restarts": 0, "scheduling_strategy": where}
        return RayWorker(ray.remote(Actor).options(**options).remote())


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Use a cluster of Ray while the block lasts: the one at an address, the one that runs here, or a new one."""
    try:
        import ray
    except ImportError:
        raise HookxError("--launcher ray needs Ray", "install it: pip install 'hookx-vision[ray]'") from None
    try:
        if address and (match := re.fullmatch(r"(?:ray://)?(.+):(\d{1,5})", address)):
            # Ray itself tries for minutes.
            socket.create_connection((match[1], int(match[2])), timeout=_WAIT_FOR_CLUSTER_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except (OSError, OverflowError, ValueError, RuntimeError) as error:
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise HookxError(
            f"cannot reach a cluster of Ray at {address or 'this host'}: {first_line}",
            "see ray status; name another: --ray-address HOST:6379",
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def places_of(options: ExtractOptions) -> list[RayPlace]:
    """Return where workers run: for each GPU of the cluster, or for each node if it has none; or `--tasks` of them."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    gpus_each = options.gpus_per_worker
    if gpus_each is None:
        gpus_each = 1.0 if any(node["Resources"].get("GPU") for node in nodes) else 0.0
    places = []
    for node in nodes:
        cores, gpus = int(node["Resources"].get("CPU", 0)), node["Resources"].get("GPU", 0.0)
        count = int(gpus / gpus_each) if gpus_each else min(1, cores)
        for number in range(count):
            name = f"{node['NodeManagerAddress']} ({number})" if count > 1 else str(node["NodeManagerAddress"])
            places.append(RayPlace(name, _cores_each(options, max(1, cores // count)), gpus_each, node["NodeID"]))
    if options.tasks is not None:  # A cluster that grows has them later.
        cores = min([place.cores for place in places], default=_cores_each(options, 1))
        named = places[: options.tasks]
        places = named + [RayPlace(f"worker {n}", cores, gpus_each) for n in range(len(named), options.tasks)]
    if not places:
        kind = "GPU" if gpus_each else "core"
        raise HookxError(
            f"this cluster of Ray has no free {kind}", "see ray status; if it grows on demand, say how many: --tasks 8"
        )
    return places


def _cores_each(options: ExtractOptions, share: int) -> int:
    """Return how many cores an actor asks Ray for: those of its decoders, and one that runs the GPU."""
    return share if options.workers is None else min(share, max(1, options.workers))


def workers_each(options: ExtractOptions, places: Sequence[RayPlace]) -> int:
    """Return how many processes decode, or compute, for each worker."""
    if options.workers is not None:
        return options.workers
    cores = min(place.cores for place in places)
    return max(1, cores - 1 if places[0].gpus else cores)
