"""A list of images -> batches of pixels, by processes that decode ahead of the consumer, or consume them themselves.

A file can make a decoder hang, or crash the process that it runs in. That costs the one image: the process notes which
image it has in hand, and where it dies, the image is a failure and all processes are started again without it.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hookx.errors import ImageError
from hookx.images.decoding import decode, decode_jpegs, failure_reason, known_formats
from hookx.images.listing import ImageList
from hookx.plan import Preprocessing
from hookx.signals import held_back

if TYPE_CHECKING:
    from PIL.Image import Image
DECODE_TIMEOUT_SECONDS = 60.0
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
_NOTHING, _NO_MORE = -1, -2  # in hand, in place of a position
_CPU = torch.device("cpu")
_POLL_SECONDS = 0.2
_WAITING_FOR_A_DEATH_SECONDS, _WAITING_FOR_A_DISK_SECONDS = 20, 60
_PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when the thread that forked it ends


@dataclass(frozen=True)
class Batch:
    """Decoded images, in the order of their positions; those that could not be read are in `failures`.

    `pixels_NCHW`, as `decode` returns them, is None when no image of the batch could be read, or when they have been
    consumed: `outcome` is what came of that.
    """

    positions: range
    pixels_NCHW: Tensor | None
    outcome: Any
    keys: list[str]
    failures: list[tuple[str, str]]  # (key, reason)
    rotations_ignored: int
    seconds: float  # of decoding


class Consumer(Protocol):
    """Takes the pixels of batches where they were decoded, in any process."""

    def __call__(self, positions: range, pixels_NCHW: Tensor | None) -> Future[Any]:
        """Take a batch (None: no image of it could be read); what takes long may go on while the next is decoded."""

    def forget(self, positions: range) -> None:
        """Have nobody rely on this batch and those behind it, which other processes took: they are decoded again."""


def batches(
    images: ImageList,
    positions: Sequence[range],
    preprocessing: Preprocessing,
    *,
    workers: int,
    decode_timeout_seconds: float = DECODE_TIMEOUT_SECONDS,
    pin_memory: bool = False,
    in_worker: Callable[[], None] = lambda: None,
    transform: Callable[[Image], Tensor] | None = None,
    consume: Consumer | None = None,
    device: torch.device = _CPU,
) -> Generator[Batch]:
    """Decode the given ranges of positions, one batch a range, in order, `workers` processes ahead of the consumer.

    An image that takes longer than `decode_timeout_seconds` (0: any time), or that crashes its process, is a failure
    like any other. Without workers there is no such protection: this process decodes. `in_worker` runs once in each
    worker. `transform` is a model's own preprocessing, in place of what `preprocessing` says. `consume` takes each
    batch, in the process that decoded it. `device` is where nvjpeg decodes, if the preprocessing says so; the pixels
    are there then.

    Raises:
        ImageError: (while iterating) a decoding process died, and no image is to blame.
    """
    reasons: dict[int, str] = {}  # why the images at these positions are not to be tried again

    def start(first: int) -> _Processes:
        dataset = _Batches(
            images, positions[first:], preprocessing, transform, consume, reasons, decode_timeout_seconds, workers
        )
        return _Processes(dataset, workers=workers, pin_memory=pin_memory, in_worker=in_worker)

    known_formats()  # Imports what decodes: not in every process, and not in the time of its first image.
    # The processes are forked here, not at the first batch, so that a caller can do it before there are threads. Those
    # that follow a crash are forked among threads, which Linux allows: they wait for no lock that one of them holds.
    processes = start(0)

    def in_order() -> Generator[Batch]:
        nonlocal processes
        try:
            for number, of_batch in enumerate(positions):
                while (decoded := processes.next()) is None:
                    reasons.update(processes.fatal_images())
                    all_ended = processes.end(wait_seconds=_WAITING_FOR_A_DISK_SECONDS if consume else 1)
                    if consume is not None:
                        if not all_ended:  # What it still writes could replace what is written again.
                            raise ImageError("a worker that was killed does not end", "does the disk still answer?")
                        consume.forget(of_batch)
                    processes = start(number)
                if decoded.encoded is not None:
                    decoded = _decoded_on(device, decoded, of_batch, preprocessing)
                yield _batch(images, of_batch, decoded)
        finally:
            processes.end()

    return in_order()


@dataclass
class _Decoded:
    """What a decoding process hands over. No keys: a message of up to 4,096 bytes is never left half written."""

    number: int  # of the batch
    pixels_NCHW: Tensor | None = None
    # Left to nvjpeg: the bytes of all its files, one after the other; and of each its position and how many they are.
    encoded: tuple[Tensor, Tensor] | None = None
    outcome: Any = None
    seconds: float = 0.0
    reasons: dict[int, str] = field(default_factory=dict)  # of the positions that could not be read
    rotations_ignored: int = 0

    def pin_memory(self) -> _Decoded:
        """Return it in pinned memory; a DataLoader asks for that, and leaves what cannot do so as it is."""
        return self if self.pixels_NCHW is None else replace(self, pixels_NCHW=self.pixels_NCHW.pin_memory())


def _batch(images: ImageList, positions: range, decoded: _Decoded) -> Batch:
    return Batch(
        positions=positions,
        pixels_NCHW=decoded.pixels_NCHW,
        outcome=decoded.outcome,
        keys=[images.keys[position] for position in positions if position not in decoded.reasons],
        failures=[(images.keys[position], reason) for position, reason in decoded.reasons.items()],
        rotations_ignored=decoded.rotations_ignored,
        seconds=decoded.seconds,
    )


def _decoded_on(device: torch.device, decoded: _Decoded, positions: range, preprocessing: Preprocessing) -> _Decoded:
    """Decode what was left to nvjpeg, and put it between the pixels of the others."""
    assert decoded.encoded is not None
    start = time.perf_counter()
    content, files = decoded.encoded
    left, sizes_bytes = files.unbind(1)
    found = dict(
        zip(left.tolist(), decode_jpegs(content.split(sizes_bytes.tolist()), preprocessing, device), strict=True)
    )
    reasons = decoded.reasons | {at: str(what) for at, what in found.items() if not isinstance(what, Tensor)}
    others: Iterator[Tensor] = iter(() if decoded.pixels_NCHW is None else decoded.pixels_NCHW.to(device))
    pixels = [
        found[position] if position in found else next(others) for position in positions if position not in reasons
    ]
    return replace(
        decoded,
        pixels_NCHW=_stacked(pixels) if pixels else None,
        encoded=None,
        seconds=decoded.seconds + time.perf_counter() - start,
        reasons=dict(sorted(reasons.items())),
    )


class _Batches(IterableDataset[_Decoded]):
    """The batches that a process decodes, each when it is asked for."""

    def __init__(
        self,
        images: ImageList,
        positions: Sequence[range],
        preprocessing: Preprocessing,
        transform: Callable[[Image], Tensor] | None,
        consume: Consumer | None,
        reasons: Mapping[int, str],
        timeout_seconds: float,
        workers: int,
    ) -> None:
        self.images, self.positions = images, positions
        self.preprocessing, self.transform, self.consume = preprocessing, transform, consume
        self.reasons, self.timeout_seconds = reasons, timeout_seconds
        # In shared memory, a row a process: its id, and the position that it has in hand.
        self.in_hand = torch.full((workers, 2), _NOTHING).share_memory_()
        self._next = multiprocessing.Value("q", 0)  # the batch that nobody has taken

    def __iter__(self) -> Iterator[_Decoded]:
        consumed: _Decoded | None = None  # the batch before, with which the consumer may still be busy
        for number in self._numbers():
            batch, pixels_NCHW = self._decoded(number)
            if self.consume is None:
                yield batch
                continue
            if consumed is not None and consumed.outcome.done():
                yield _with_outcome(consumed)
                consumed = None
            with _interruptible():
                batch.outcome = self.consume(self.positions[number], pixels_NCHW)
            if consumed is not None:
                yield _with_outcome(consumed)
            consumed = batch
        if consumed is not None:
            yield _with_outcome(consumed)
        self._take_in_hand(_NO_MORE)

    def _numbers(self) -> Iterator[int]:
        """Yield which batches this process decodes.

        Consumers take their time, and one is held up more than another: each takes a batch when it has none, and no run
        ends with one of them alone. What is only decoded comes in turn, as the loader asks for it: behind an image that
        takes long, it would pile up.
        """
        worker = get_worker_info()
        if worker is None or self.consume is None:
            first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
            yield from range(first, len(self.positions), step)
            return
        while True:
            with self._next.get_lock():
                number = self._next.value
                self._next.value += 1
            if number >= len(self.positions):
                return
            yield number

    def _decoded(self, number: int) -> tuple[_Decoded, Tensor | None]:
        batch, pixels, encoded, start = _Decoded(number), [], {}, time.perf_counter()
        for position in self.positions[number]:
            if position in self.reasons:
                batch.reasons[position] = self.reasons[position]
                continue
            self._take_in_hand(position)
            try:
                file, listed_bytes = self.images.files[position], self.images.sizes_bytes[position]
                pixels_CHW, rotation_ignored = decode(file, self.preprocessing, listed_bytes, self.transform)
            except Exception as error:  # Whatever a decoder raises on foreign bytes is that image's failure.
                batch.reasons[position] = failure_reason(error)
            else:
                if pixels_CHW.ndim == 1:
                    encoded[position] = pixels_CHW
                else:
                    pixels.append(pixels_CHW)
                batch.rotations_ignored += rotation_ignored
            self._take_in_hand(_NOTHING)
        pixels_NCHW = _stacked(pixels) if pixels else None
        if encoded:
            assert self.consume is None, "what a GPU decodes is not consumed beside it"
            files = torch.tensor([(position, len(content)) for position, content in encoded.items()])
            batch.encoded = torch.cat(list(encoded.values())), files
            if get_worker_info() is not None:
                for tensor in batch.encoded:
                    _shared(tensor)
        batch.seconds = time.perf_counter() - start
        if self.consume is None:
            batch.pixels_NCHW = pixels_NCHW if get_worker_info() is None else _shared(pixels_NCHW)
        return batch, pixels_NCHW

    def _take_in_hand(self, position: int) -> None:
        """Note which image this process decodes, and have the system end the process if that takes too long.

        The alarm's signal works where a decoder written in C keeps Python from running, and where the parent is gone.
        It is blocked whenever there is no image in hand: the process could hold a lock that the parent needs.
        """
        if (worker := get_worker_info()) is None:
            return
        if position < 0:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
            self.in_hand[worker.id, 1] = position
        else:
            self.in_hand[worker.id, 1] = position
            signal.setitimer(signal.ITIMER_REAL, self.timeout_seconds)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])


def _with_outcome(consumed: _Decoded) -> _Decoded:
    with _interruptible():
        return replace(consumed, outcome=consumed.outcome.result())


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let the alarm's signal end this process, as it may while an image is in hand: `_Processes.end` sends it."""
    if get_worker_info() is None:
        yield
        return
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])


def _stacked(pixels: list[Tensor]) -> Tensor:
    try:
        if pixels[0].dtype == torch.uint8:  # Channels stay innermost, as they were decoded.
            return torch.stack([pixels_CHW.permute(1, 2, 0) for pixels_CHW in pixels]).permute(0, 3, 1, 2)
        return torch.stack(pixels)
    except RuntimeError as error:  # torch's only word for it
        raise MemoryError(str(error)) from None


def _shared(pixels_NCHW: Tensor | None) -> Tensor | None:
    # Shared here: the queue's thread would do it while an image is in hand, and that would be blamed if it crashes.
    try:
        return pixels_NCHW if pixels_NCHW is None else pixels_NCHW.share_memory_()
    except RuntimeError as error:
        raise MemoryError(str(error)) from None


class _Processes:
    """The decoding processes of a DataLoader, from their start to their end. Without workers there are none."""

    def __init__(self, dataset: _Batches, *, workers: int, pin_memory: bool, in_worker: Callable[[], None]) -> None:
        self._dataset = dataset
        self._next = 0  # the number of the batch that is asked for next
        self._early: dict[int, _Decoded] = {}  # by number, those that came before they were asked for
        others = set(multiprocessing.active_children())
        loader = DataLoader(
            dataset,
            batch_size=None,  # The dataset's items are batches already: they follow the shards.
            num_workers=workers,
            pin_memory=pin_memory,
            worker_init_fn=_WorkerStart(in_worker, dataset.in_hand),
            in_order=dataset.consume is None,
            timeout=_POLL_SECONDS if workers else 0,
            # Forked workers share the list of images and start in milliseconds; they never touch a GPU.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        )
        self._processes: list[multiprocessing.process.BaseProcess] = []
        try:
            with held_back(), _child_signals_kept():
                self._batches: Iterator[_Decoded] = iter(loader)
                self._processes = [process for process in multiprocessing.active_children() if process not in others]
        except BaseException:
            self.end()
            raise

    def next(self) -> _Decoded | None:
        """Return the next batch, or None if a process died."""
        while self._next not in self._early:
            if (decoded := self._received()) is None:
                return None
            self._early[decoded.number] = decoded
        self._next += 1
        return self._early.pop(self._next - 1)

    def _received(self) -> _Decoded | None:
        while True:
            try:
                return next(self._batches)
            except MemoryError:
                raise _out_of_memory("a decoding process has no memory for its batch") from None
            except TimeoutError:
                raise  # By an alarm of the caller's: no message of a process that dies ends so.
            except Exception as error:
                if str(error).startswith("DataLoader timed out"):
                    continue  # Nothing is ready and nobody died: the loader looks every _POLL_SECONDS.
                # A process that dies leaves unreadable messages behind, sometimes a while before it is gone.
                deadline = time.monotonic() + _WAITING_FOR_A_DEATH_SECONDS
                while self._processes and (seconds_left := deadline - time.monotonic()) > 0:
                    # Listed before anybody looks who died: whoever dies in between is not waited for in vain.
                    alive = [process.sentinel for process in self._processes if process.exitcode is None]
                    if any(self._died()):
                        return None
                    multiprocessing.connection.wait(alive, timeout=seconds_left)
                raise

    def fatal_images(self) -> dict[int, str]:
        """Return the positions of the images that killed the processes which died, each with the reason.

        Raises:
            ImageError: a process was killed from outside, or had no image in hand.
        """
        fatal = {}
        for exit_code, position in self._died():
            how = signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"
            if position == _NOTHING or not (exit_code >= 0 or -exit_code in (signal.SIGALRM, *_CRASHES)):
                raise _out_of_memory(f"a worker died: {how}")
            if exit_code == -signal.SIGALRM:
                fatal[position] = f"took longer than {self._dataset.timeout_seconds:g} s to decode"
            else:
                fatal[position] = f"the decoder crashed ({how})"
        return fatal

    def _died(self) -> Iterator[tuple[int, int]]:
        """Yield, of every process that ended before its work did, its exit code and the position it had in hand."""
        in_hand = dict(self._dataset.in_hand.tolist())
        for process in self._processes:
            position = in_hand.get(process.pid, _NOTHING)
            if process.exitcode is not None and position != _NO_MORE:
                yield process.exitcode, position

    def end(self, wait_seconds: float = 1) -> bool:
        """End what still runs; return whether it ended in time. An image that takes its time is not waited for."""
        for process in self._processes:
            if process.is_alive() and process.pid:
                os.kill(process.pid, signal.SIGALRM)
        if self._processes:
            # What the loader does when it is deleted. Here it may be kept alive, by the traceback of an exception.
            self._batches._shutdown_workers()  # type: ignore[attr-defined]
        for process in self._processes:
            process.kill()
            process.join(timeout=wait_seconds)  # What is stuck in the kernel cannot be killed.
        return not any(process.is_alive() for process in self._processes)


def _out_of_memory(problem: str) -> ImageError:
    return ImageError(
        problem,
        "most often the machine ran out of memory: try fewer --workers or a smaller --batch-size",
        "finished shards are kept; the same command goes on from there",
    )


@contextlib.contextmanager
def _child_signals_kept() -> Iterator[None]:
    """Take back the DataLoader's handler for dead workers: it raises in the middle of whatever the consumer does.

    Without it the loader finds a dead worker when it waits for its batch.
    """
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)


class _WorkerStart:
    """What a decoding process does first."""

    def __init__(self, in_worker: Callable[[], None], in_hand: Tensor) -> None:
        self.in_worker, self.in_hand, self.parent = in_worker, in_hand, os.getpid()

    def __call__(self, worker_number: int) -> None:
        # The loader's own watch over the parent begins later, and takes whoever is the parent by then for the one.
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self.parent:
            os._exit(1)  # Killed already; nobody will ever ask for a batch.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        # The terminal sends Ctrl-C to every process; the parent alone decides, and then ends its workers.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # A crash is told by the parent; torch's handlers would write lines of their own to the terminal.
        for number in (signal.SIGTERM, signal.SIGALRM, *_CRASHES):
            signal.signal(number, signal.SIG_DFL)
        # Pillow's log would, too.
        logging.getLogger("PIL").setLevel(logging.CRITICAL)
        self.in_hand[worker_number, 0] = os.getpid()
        self.in_worker()
