"""The images of a batch that are left to nvjpeg: decoded on a GPU, ahead of the model."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from hookx.capture.copies import as_current, has_streams
from hookx.capture.failures import is_out_of_memory, report_broken_device
from hookx.images.decoding import decode_jpegs
from hookx.images.unreadable import UnreadableError
from hookx.plan import Preprocessing
from hookx.run.lane import Batch
from hookx.run.ready import out_of_memory

NVJPEG_THREADS = 3  # One prepares a batch while the GPU decodes and resizes those of the others.


def decode_rest(batches: Iterator[Batch], preprocessing: Preprocessing, device: torch.device) -> Generator[Batch]:
    """Decode what was left to nvjpeg, and put it in its place among the other pixels; the batches stay in order.

    On a GPU this happens in threads, on streams of their own, some batches ahead of the consumer.
    """
    if preprocessing.decode != "nvjpeg" or not has_streams(device):
        for batch in batches:
            _decode_rest(batch, preprocessing, device)
            yield batch
        return
    streams = threading.local()

    def work(batch: Batch) -> torch.Event:
        if not hasattr(streams, "own"):
            streams.own = torch.Stream(device)
        with as_current(streams.own):
            _decode_rest(batch, preprocessing, device)
        done: torch.Event = streams.own.record_event()
        return done

    ahead: deque[tuple[Batch, Future[torch.Event]]] = deque()

    def finish() -> Batch:
        batch, working = ahead.popleft()
        done, current = working.result(), torch.accelerator.current_stream(device)
        current.wait_event(done)
        if batch.pixels_NCHW is not None:
            batch.pixels_NCHW.record_stream(current)
        return batch

    with ThreadPoolExecutor(NVJPEG_THREADS, thread_name_prefix="hookx-nvjpeg") as threads:
        for batch in batches:
            ahead.append((batch, threads.submit(work, batch)))
            if len(ahead) > NVJPEG_THREADS:
                yield finish()
        while ahead:
            yield finish()


def _decode_rest(batch: Batch, preprocessing: Preprocessing, device: torch.device) -> None:
    if not batch.encoded:
        return
    start = time.perf_counter()
    positions: list[int] = []
    contents: list[Tensor] = []
    for content, files in batch.encoded:
        assert content is not None
        positions += [position for position, _ in files]
        contents += content.split([size_bytes for _, size_bytes in files])
    with report_broken_device():
        decoded_NCHW, refused = _decode(contents, preprocessing, device)
    batch.reasons.update({positions[number]: str(reason) for number, reason in refused.items()})
    batch.reasons = dict(sorted(batch.reasons.items()))
    by_nvjpeg = set(positions)
    others = [position for position in batch.positions if position not in by_nvjpeg and position not in batch.reasons]
    if others:
        assert batch.pixels_NCHW is not None
        decoded_NCHW = torch.cat([decoded_NCHW, batch.pixels_NCHW.to(device)])
    if others or refused:
        place_of = {position: place for place, position in enumerate([*positions, *others])}
        wanted = [place_of[position] for position in batch.positions if position not in batch.reasons]
        decoded_NCHW = decoded_NCHW[wanted]
    batch.pixels_NCHW, batch.encoded = decoded_NCHW if len(decoded_NCHW) else None, []
    batch.nvjpeg_seconds = time.perf_counter() - start


def _decode(
    files: Sequence[Tensor], preprocessing: Preprocessing, device: torch.device
) -> tuple[Tensor, dict[int, UnreadableError]]:
    """Decode files, in halves of halves if the device has too little memory for their pixels."""
    try:
        return decode_jpegs(files, preprocessing, device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if len(files) == 1:
            raise out_of_memory(1, error) from None
    half = len(files) // 2
    (first, refused), (second, refused_later) = (
        _decode(part, preprocessing, device) for part in (files[:half], files[half:])
    )
    return torch.cat([first, second]), refused | {half + number: error for number, error in refused_later.items()}
