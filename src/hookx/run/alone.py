"""Decode one image in a process of its own, after a worker that had it in hand has ended.

A worker can end for reasons that have nothing to do with its image: the machine ran out of memory, or somebody killed
it. So an image is to blame only if nothing but the image was there, and every process that tried it has crashed.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
from dataclasses import dataclass

import torch

from hookx.errors import THEN_RESUME, ImageError
from hookx.images.decoding import size_from_header
from hookx.images.retries import Retries
from hookx.plan import RangeUse
from hookx.run.children import NO_MEMORY, begin_decoding, how_it_ended
from hookx.run.in_hand import InHand
from hookx.run.reader import Decoded, Reader
from hookx.signals import defer_signals

_MAX_CRASHES = 3
_WAIT_FOR_EXIT_SECONDS = 20
# Whoever cannot get the memory for less than this cannot get it for any image: the machine is to blame.
_LARGE_PIXELS = 16 * 2**20


def read_alone(reader: Reader, position: int, timeout_seconds: float) -> Decoded:
    """Decode the image at a position of the list in processes that do nothing else, one after the other.

    Raises:
        ImageError: the system could not read it, or there is too little memory for any image.
    """
    retries, crashes = Retries(reader.retry_seconds), 0
    while True:
        answer = _ask_process(reader, position, timeout_seconds)
        if isinstance(answer.error, str):
            raise ImageError(*answer.error.split("\n  "))
        if answer.decoded is not None:
            return answer.decoded
        if answer.exit_code == -signal.SIGALRM:
            return Decoded(reason=f"took longer than {timeout_seconds:g} s to decode")
        if answer.exit_code == NO_MEMORY:
            if retries.wait():
                continue
            width, height = answer.size
            if width * height < _LARGE_PIXELS and not reader.unavailable_is_failure:
                raise ImageError(
                    f"too little memory to decode '{reader.images.files[position]}', with nothing else beside it",
                    THEN_RESUME,
                )
            return Decoded(reason=f"{width} x {height} pixels take more memory than there is")
        crashes += 1
        if crashes == _MAX_CRASHES:
            return Decoded(reason=f"the decoder crashed ({how_it_ended(answer.exit_code)})")


@dataclass(frozen=True)
class _Answer:
    """What a process sent, or how it ended."""

    decoded: Decoded | None = None
    error: str | None = None
    size: tuple[int, int] = (0, 0)  # of the image, if memory was lacking
    exit_code: int = 0


def _ask_process(reader: Reader, position: int, timeout_seconds: float) -> _Answer:
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(reader, position, timeout_seconds, sending, os.getpid()))
    try:
        with defer_signals():
            process.start()
        sending.close()
        # The alarm of the image ends most hangs; a process that was forked among threads can hang elsewhere, too.
        limit_seconds = timeout_seconds + reader.retry_seconds + _WAIT_FOR_EXIT_SECONDS if timeout_seconds else None
        content = b""
        with contextlib.suppress(EOFError):
            if receiving.poll(limit_seconds):
                content = receiving.recv_bytes()
            else:
                process.kill()
        process.join(_WAIT_FOR_EXIT_SECONDS)
    finally:
        receiving.close()
        if process.pid is not None:
            process.kill()
            process.join(_WAIT_FOR_EXIT_SECONDS)
    exit_code = process.exitcode or 0
    if not content:
        return _Answer(exit_code=exit_code)
    kind, *values = torch.load(io.BytesIO(content), weights_only=True)
    if kind == "decoded":
        pixels_CHW, rotation_ignored, reason, failed_first, use = values
        decoded = Decoded(pixels_CHW, rotation_ignored, reason, failed_first, use and RangeUse(*use))
        return _Answer(decoded=decoded)
    return _Answer(error=values[0]) if kind == "error" else _Answer(size=values[0], exit_code=NO_MEMORY)


def _answer(
    reader: Reader,
    position: int,
    timeout_seconds: float,
    sending: multiprocessing.connection.Connection,
    parent: int,
) -> None:
    begin_decoding(parent)
    in_hand = InHand(1, timeout_seconds)
    in_hand.begin(0)
    answer: tuple[object, ...]
    try:
        decoded = reader.read(position, in_hand)
        answer = ("decoded", decoded.pixels_CHW, decoded.rotation_ignored, decoded.reason, decoded.failed_first)
        answer += (decoded.range_use and tuple(decoded.range_use),)
    except ImageError as error:
        answer = ("error", str(error))
    except MemoryError:
        answer = ("memory", size_from_header(reader.images.files[position]))
    buffer = io.BytesIO()
    torch.save(answer, buffer)
    sending.send_bytes(buffer.getbuffer())
    os._exit(0)
