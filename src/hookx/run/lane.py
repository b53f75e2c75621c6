"""A batch of images on its way: decoded, run through the model, written."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import OutOfMemoryError, Tensor

from hookx.capture.rows import RowCapture
from hookx.errors import HookxError
from hookx.images.decoding import decode_jpegs, model_input
from hookx.plan import Plan, Preprocessing, ValueCounts
from hookx.run.ready import out_of_memory
from hookx.run.selfcheck import SelfCheck
from hookx.store.writer import ShardWriter, Written

log = logging.getLogger("hookx")


@dataclass(eq=False)
class Batch:
    """The images at some positions of the list; each process on the way fills in its part."""

    positions: range
    # Decoded: `pixels_NCHW` is what `decode` returns, None if no image could be read or a lane has taken the pixels.
    pixels_NCHW: Tensor | None = None
    # Left to nvjpeg: the bytes of its files, one after the other, and of each file its position and length.
    encoded: tuple[Tensor, Tensor] | None = None
    reasons: dict[int, str] = field(default_factory=dict)  # position -> why it could not be read
    rotations_ignored: int = 0
    reading_seconds: float = 0.0
    # Computed and written, by a lane.
    counts: ValueCounts = field(default_factory=ValueCounts)
    self_checked: int = 0  # rows that were computed again
    model_seconds: float = 0.0
    written: Written | Future[Written] | None = None
    error: HookxError | None = None  # in place of `written`
    # Looked up in the main process: a message of up to 4,096 bytes is never left half written by a process that dies.
    keys: list[str] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)  # (key, reason)

    def pin_memory(self) -> Batch:
        """Move the pixels to pinned memory, as a DataLoader asks what it hands over to do."""
        if self.pixels_NCHW is not None:
            self.pixels_NCHW = self.pixels_NCHW.pin_memory()
        return self

    def share(self) -> None:
        """Move what was decoded to shared memory.

        The thread of the DataLoader's queue would do so while an image is in hand, which a crash would be blamed on.
        """
        try:
            for tensor in (self.pixels_NCHW, *(self.encoded or ())):
                if tensor is not None:
                    tensor.share_memory_()
        except RuntimeError as error:  # torch has no other error for too little memory
            raise MemoryError(str(error)) from None

    def decode_rest(self, preprocessing: Preprocessing, device: torch.device) -> None:
        """Decode by nvjpeg what was left to it, and put it in its place among the other pixels."""
        if self.encoded is None:
            return
        start = time.perf_counter()
        content, files = self.encoded
        positions, sizes_bytes = (column.tolist() for column in files.unbind(1))
        decoded = dict(zip(positions, decode_jpegs(content.split(sizes_bytes), preprocessing, device), strict=True))
        refused = {position: str(result) for position, result in decoded.items() if not isinstance(result, Tensor)}
        self.reasons = dict(sorted((self.reasons | refused).items()))
        others: Iterator[Tensor] = iter(() if self.pixels_NCHW is None else self.pixels_NCHW.to(device))
        pixels = [
            decoded[position] if position in decoded else next(others)
            for position in self.positions
            if position not in self.reasons
        ]
        self.pixels_NCHW, self.encoded = stack(pixels), None
        self.reading_seconds += time.perf_counter() - start


def stack(pixels: list[Tensor]) -> Tensor | None:
    """Stack images to a batch; None for no image."""
    if not pixels:
        return None
    try:
        if pixels[0].dtype == torch.uint8:  # Channels stay innermost, as they were decoded.
            return torch.stack([pixels_CHW.permute(1, 2, 0) for pixels_CHW in pixels]).permute(0, 3, 1, 2)
        return torch.stack(pixels)
    except RuntimeError as error:  # torch has no other error for too little memory
        raise MemoryError(str(error)) from None


class Lane:
    """Takes decoded batches through the model and on to the disk.

    A worker on the CPU runs the lane behind its own decoder; beside a GPU, the main process runs it. The forward pass
    of a batch, its copy from a GPU and its way to the disk overlap with those of the next ones, as far as the writer
    has memory for their rows.
    """

    def __init__(self, capture: RowCapture, writer: ShardWriter, plan: Plan, check: SelfCheck | None = None) -> None:
        self.capture, self.writer, self.plan, self.check = capture, writer, plan, check
        self.images_at_once = plan.batch_size  # in the model; fewer once that was too much for a GPU

    def run(self, batch: Batch) -> Batch:
        """Run a batch, and start to write it; a GPU has only started the pass when this returns."""
        pixels_NCHW, batch.pixels_NCHW = batch.pixels_NCHW, None
        rows = self.writer.rows(batch.positions, 0 if pixels_NCHW is None else len(pixels_NCHW))
        device = self.capture.runner.device
        if pixels_NCHW is not None:
            start = time.perf_counter()
            on_device = pixels_NCHW.to(device, non_blocking=device.type == "cuda")
            self._run(batch, model_input(on_device, self.plan.preprocessing), rows)
            if device.type != "cuda":  # A GPU measures its own time.
                batch.model_seconds = time.perf_counter() - start
        if device.type == "cpu":  # Elsewhere the counts of a shard are taken at its end: they wait for the device.
            batch.counts = self.capture.take_counts()
        batch.written = self.writer.write(batch.positions, functools.partial(self.capture.wait, self.capture.passes))
        return batch

    def finish(self) -> None:
        """Do what a process does after its last batch: raise if its first rows are others by now."""
        if self.check is not None:
            with self._report_memory():
                self.check.finish()

    def _run(self, batch: Batch, pixels_NCHW: Tensor, rows: Mapping[str, Tensor]) -> None:
        """Run a batch, and check it if it is one of those to check."""
        copy_NCHW = None if self.check is None else self.check.copy_pixels(batch.positions, pixels_NCHW)
        parts = self._run_in_parts(pixels_NCHW, rows)
        if self.check is not None and copy_NCHW is not None:
            readable = [position for position in batch.positions if position not in batch.reasons]
            with self._report_memory():
                self.capture.wait()
                batch.self_checked = self.check.check(
                    batch.positions, readable, copy_NCHW, rows, parts, self.images_at_once
                )

    def _run_in_parts(self, pixels_NCHW: Tensor, rows: Mapping[str, Tensor]) -> list[range]:
        """Run a batch, in halves of halves if the device has too little memory; return what ran together."""
        parts: list[range] = []
        start = 0
        while start < len(pixels_NCHW):
            stop = min(start + self.images_at_once, len(pixels_NCHW))
            try:
                self.capture.run(pixels_NCHW[start:stop], {address: rows[address][start:stop] for address in rows})
                parts.append(range(start, stop))
                start = stop
            except OutOfMemoryError as error:
                if stop - start == 1:
                    raise out_of_memory(1, error) from None
                self.images_at_once = (stop - start) // 2
                log.warning("out of memory with %d images at once: going on with %d", stop - start, self.images_at_once)
        return parts

    @contextlib.contextmanager
    def _report_memory(self) -> Iterator[None]:
        try:
            yield
        except OutOfMemoryError as error:
            raise out_of_memory(self.images_at_once, error) from None
