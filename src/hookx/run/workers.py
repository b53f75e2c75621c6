"""A list of images -> batches, by worker processes that decode ahead of the main process, or run a lane themselves.

A file can make a decoder hang, or crash its process. That costs the one image: a worker notes which image it has in
hand. If the worker crashes, that image is tried alone, and all workers are started again to go on behind it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from hookx.errors import THEN_RESUME, ImageError, one_line, system_failure
from hookx.images.decoding import known_formats
from hookx.images.listing import ImageList
from hookx.images.loaders import Loader
from hookx.images.retries import Retries
from hookx.options import RETRY_SECONDS
from hookx.plan import Preprocessing
from hookx.run.alone import read_alone
from hookx.run.children import NO_MEMORY, how_it_ended
from hookx.run.in_hand import InHand
from hookx.run.lane import Batch, Lane
from hookx.run.nvjpeg import decode_rest
from hookx.run.processes import Processes
from hookx.run.reader import Decoded, Reader
from hookx.run.slots import Piece, Slots, cut
from hookx.run.worker import Worker

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger("hookx")
_Started = TypeVar("_Started")
_CPU = torch.device("cpu")
_WAIT_FOR_DISK_SECONDS = 60
_MAX_FRUITLESS_STARTS = 3  # of workers that crash at the same batch with no image in hand
_BY_MEMORY = (-signal.SIGKILL, NO_MEMORY)


def batches(
    images: ImageList,
    positions: Sequence[range],
    preprocessing: Preprocessing,
    *,
    workers: int,
    decode_timeout_seconds: float = 0,
    retry_seconds: float = RETRY_SECONDS,
    unavailable_is_failure: bool = False,
    in_worker: Callable[[], None] = lambda: None,
    transform: Callable[[Image], Tensor] | None = None,
    loader: Loader | None = None,
    lane: Lane | None = None,
    is_copied: Callable[[int], bool] | None = None,
    device: torch.device = _CPU,
) -> Generator[Batch]:
    """Decode the given ranges of positions, one batch a range, in order, `workers` processes ahead of the consumer.

    The pixels of a batch are good until the next batch is requested: their memory is used again.

    An image that takes longer than `decode_timeout_seconds` (0: any time), or that crashes its process, is a failure
    like any other, if it does so alone as well. Without workers this process decodes, unprotected. The workers are
    forked by this call, not by the first batch, so that a caller can fork them before there are threads. Those started
    after a crash are forked among threads, which Linux allows: they wait for no lock that one of them holds.

    Args:
        retry_seconds: how long to try again to read what the system cannot read, or to start what it cannot start now.
        unavailable_is_failure: what cannot be read in that time is a failure of the image, and no error.
        in_worker: runs in each worker before its first batch.
        transform: a model's own preprocessing, in place of what `preprocessing` says.
        loader: the user's own, in place of Pillow.
        lane: what each worker runs its batches through; they come without pixels then, but written.
        is_copied: says by its position whether an image is copied from another run, and so not read.
        device: where nvjpeg decodes, if the preprocessing says so; the pixels are there then.

    Raises:
        ImageError: (while iterating) the system cannot read an image, or workers crash and no image is to blame.
        HookxError: the system cannot start the workers; or (while iterating) whatever stopped a lane.
    """
    reader = Reader(images, preprocessing, transform, retry_seconds, unavailable_is_failure, loader)
    only_decode = workers > 0 and lane is None
    pieces = cut(positions, whole=not only_decode)
    bytes_per_image = len(preprocessing.mean) * math.prod(preprocessing.size_px) * (4 if transform or loader else 1)
    slots = Slots(positions, bytes_per_image, workers, device) if only_decode else None
    known: dict[int, Decoded] = {}  # what became of images that were read alone

    def start(first: int, workers: int) -> Processes:
        def start_now() -> Processes:
            in_hand = InHand(workers, decode_timeout_seconds)
            worker = Worker(reader, pieces[first:], lane, known, in_hand, in_worker)
            worker.slots = slots
            if is_copied is not None:
                worker.is_copied = is_copied
            return Processes(worker, workers=workers)

        return _start_patiently(start_now, retry_seconds)

    known_formats()  # Imports the decoders: not in every worker, and not in the time of its first image.
    processes = start(0, workers)

    def received() -> Generator[tuple[Piece, Batch]]:
        nonlocal processes, workers
        fruitless = 0
        try:
            for number, piece in enumerate(pieces):
                expected = piece.positions
                while (batch := processes.receive(expected)) is None:
                    crashes = processes.crashes()
                    all_ended = processes.end(wait_seconds=_WAIT_FOR_DISK_SECONDS if lane else 1)
                    if lane is not None:
                        if not all_ended:  # What it still writes could replace what is written again.
                            raise ImageError("a worker that was killed does not exit", "does the disk still answer?")
                        lane.writer.forget(expected)
                    suspects = sorted({position for _, position in crashes if position >= 0})
                    for position in suspects:
                        known[position] = _start_patiently(
                            functools.partial(read_alone, reader, position, decode_timeout_seconds), retry_seconds
                        )
                    fruitless = 0 if suspects else fruitless + 1
                    if fruitless > _MAX_FRUITLESS_STARTS:
                        raise _out_of_memory(processes.problem, crashes)
                    workers = _fewer_if_memory_lacks(workers, crashes)
                    processes = start(number, workers)
                fruitless = 0
                if batch.error is not None:
                    raise batch.error
                for position in expected:
                    known.pop(position, None)
                yield piece, batch
        finally:
            processes.end()

    def joined(received: Iterator[tuple[Piece, Batch]]) -> Iterator[Batch]:
        parts = []
        for piece, batch in received:
            parts.append((piece, batch))
            if piece.positions.stop == positions[piece.batch].stop:
                yield batch if slots is None else slots.join(parts)
                parts = []

    def in_order() -> Generator[Batch]:
        with (
            contextlib.closing(slots) if slots is not None else contextlib.nullcontext(),
            contextlib.closing(received()) as in_pieces,
            contextlib.closing(decode_rest(joined(in_pieces), preprocessing, device)) as whole,
        ):
            decoded = slots.lend(whole) if slots is not None else whole
            for batch in decoded:
                batch.keys = [images.keys[position] for position in batch.positions if position not in batch.reasons]
                batch.ranges = batch.ranges.named(images.keys)
                batch.failures = [(images.keys[position], reason) for position, reason in batch.reasons.items()]
                yield batch

    return in_order()


def _how(crashes: Sequence[tuple[int, int]]) -> str:
    return ", ".join(sorted({how_it_ended(exit_code) for exit_code, _ in crashes}))


def _fewer_if_memory_lacks(workers: int, crashes: Sequence[tuple[int, int]]) -> int:
    """Return with how many workers to go on; the system kills what takes too much memory."""
    lacks_memory = not crashes or any(position < 0 or exit_code in _BY_MEMORY for exit_code, position in crashes)
    if workers <= 1 or not lacks_memory:
        return workers
    how = f"a worker ended ({_how(crashes)})" if crashes else "a worker's message was lost"
    log.warning("%s: going on with %d of %d workers", how, workers // 2, workers)
    return workers // 2


def _start_patiently(start: Callable[[], _Started], retry_seconds: float) -> _Started:
    """Start processes, and try again for a while if the system has no room for them; `HookxError` after that."""
    retries = Retries(retry_seconds)
    while True:
        try:
            return start()
        except OSError as error:
            if not retries.wait():
                raise system_failure(error, "cannot start a worker") or error from None


def _out_of_memory(problem: Exception | None, crashes: Sequence[tuple[int, int]]) -> ImageError:
    how = one_line(problem) if problem else _how(crashes)
    return ImageError(
        f"a worker exited unexpectedly: {how}",
        "most often the machine ran out of memory: try fewer --workers or a smaller --batch-size",
        THEN_RESUME,
    )
