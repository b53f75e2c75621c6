"""A batch of images on its way: decoded, run through the model, written."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from hookx.capture.copies import has_streams
from hookx.capture.failures import is_out_of_memory
from hookx.capture.rows import RowCapture
from hookx.errors import THEN_RESUME, HookxError, ImageError, one_line
from hookx.images.decoding import model_input
from hookx.plan import Plan, Preprocessing, RangeCounts, ValueCounts
from hookx.run.ready import out_of_memory
from hookx.run.reuse import Reuse
from hookx.run.selfcheck import SelfCheck
from hookx.store.writer import ShardWriter, Written

log = logging.getLogger("hookx")


class Placed(NamedTuple):
    """A tensor that was left in shared memory."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(eq=False)
class Batch:
    """The images at some positions of the list; each process on the way fills in its part."""

    positions: range
    # Decoded: `pixels_NCHW` is what `decode` returns, None if no image could be read or a lane has taken the pixels.
    pixels_NCHW: Tensor | None = None
    # Left to nvjpeg: the bytes of some files, one after the other, and of each file its position and length.
    encoded: list[tuple[Tensor | None, list[tuple[int, int]]]] = field(default_factory=list)
    placed: Placed | None = None  # what lies in a slot, in place of the pixels or of these bytes
    reasons: dict[int, str] = field(default_factory=dict)  # position -> why it could not be read
    failed_first: str = ""  # why the system could not read one of them at the first try
    rotations_ignored: int = 0
    ranges: RangeCounts = field(default_factory=RangeCounts)
    reading_seconds: float = 0.0
    nvjpeg_seconds: float = 0.0
    # Computed and written, by a lane.
    counts: ValueCounts = field(default_factory=ValueCounts)
    copied: int = 0  # activations that other runs had
    self_checked: int = 0  # rows that were computed again
    model_seconds: float = 0.0
    written: Written | Future[Written] | None = None
    error: HookxError | None = None  # in place of `written`
    # Looked up in the main process: a message of up to 4,096 bytes is never left half written by a process that dies.
    keys: list[str] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)  # (key, reason)

    def add(self, piece: Batch) -> None:
        """Add what is known of a piece of this batch, but for its pixels."""
        self.encoded += piece.encoded
        self.reasons |= piece.reasons
        self.failed_first = self.failed_first or piece.failed_first
        self.rotations_ignored += piece.rotations_ignored
        self.ranges.add(piece.ranges)
        self.reading_seconds += piece.reading_seconds

    def share(self) -> None:
        """Move what was decoded to shared memory.

        The thread of the DataLoader's queue would do so while an image is in hand, which a crash would be blamed on.
        """
        try:
            for tensor in (self.pixels_NCHW, *(content for content, _ in self.encoded)):
                if tensor is not None:
                    tensor.share_memory_()
        except (OSError, RuntimeError) as error:
            raise ImageError(
                f"no shared memory for a batch: {one_line(error)}",
                "make /dev/shm larger (in Docker: --shm-size 2g), or try fewer --workers or a smaller --batch-size",
                THEN_RESUME,
            ) from None


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


def to_input(pixels_NCHW: Tensor, device: torch.device, preprocessing: Preprocessing) -> Tensor:
    """Make a model's input, on its device, of decoded pixels; a GPU may still be at it when this returns."""
    return model_input(pixels_NCHW.to(device, non_blocking=has_streams(device)), preprocessing)


class Lane:
    """Takes decoded batches through the model and on to the disk.

    A worker on the CPU runs the lane behind its own decoder; beside a GPU, the main process runs it. The forward pass
    of a batch, its copy from a GPU and its way to the disk overlap with those of the next ones, as far as the writer
    has memory for their rows.
    """

    def __init__(
        self,
        capture: RowCapture,
        writer: ShardWriter,
        plan: Plan,
        check: SelfCheck | None = None,
        reuse: Reuse | None = None,
    ) -> None:
        self.capture, self.writer, self.plan, self.check, self.reuse = capture, writer, plan, check, reuse
        self.images_at_once = plan.batch_size  # in the model; fewer in the rest of a shard for which that was too much
        self._shard = -1

    def run(self, batch: Batch) -> Batch:
        """Run a batch, and start to write it; a GPU has only started the pass when this returns."""
        self._begin_shard(batch.positions.start // self.plan.images_per_shard)
        pixels_NCHW, batch.pixels_NCHW = batch.pixels_NCHW, None
        readable = [position for position in batch.positions if position not in batch.reasons]
        rows = self.writer.rows(batch.positions, len(readable))
        device = self.capture.runner.device
        if pixels_NCHW is not None:
            start = time.perf_counter()
            if self.reuse is None:
                self._run(batch, pixels_NCHW, rows)
            else:
                self._run_rest(batch, pixels_NCHW, rows, readable, self.reuse)
            if not has_streams(device):  # A GPU measures its own time.
                batch.model_seconds = time.perf_counter() - start
        if self.reuse is not None:
            self._copy(batch, rows, readable, self.reuse)
        if device.type == "cpu":  # Elsewhere the counts of a shard are taken at its end: they wait for the device.
            batch.counts = self.capture.take_counts()
        batch.written = self.writer.write(batch.positions, functools.partial(self.capture.wait, self.capture.passes))
        return batch

    def _run_rest(
        self, batch: Batch, pixels_NCHW: Tensor, rows: Mapping[str, Tensor], readable: Sequence[int], reuse: Reuse
    ) -> None:
        """Run the images of a batch that no other run has whole, up to the last layer that any of them lacks."""
        places = [place for place, position in enumerate(readable) if not reuse.is_whole(position)]
        if len(places) == len(readable):
            self._run(batch, pixels_NCHW, {address: rows[address] for address in reuse.lacking})
        else:
            some = {address: torch.empty_like(rows[address][: len(places)]) for address in reuse.lacking}
            self._run_in_parts(pixels_NCHW, some)
            self.capture.wait()
            for address, computed in some.items():
                rows[address][places] = computed

    def _copy(self, batch: Batch, rows: Mapping[str, Tensor], readable: Sequence[int], reuse: Reuse) -> None:
        """Copy what other runs have of a batch, in place of what was computed of the same images."""
        self.capture.wait()
        for address, places in reuse.copy(readable, rows).items():
            batch.copied += len(places)
            is_computed = address in reuse.lacking  # and so counted, but for the images that are copied whole
            counted = [place for place in places if not is_computed or reuse.is_whole(readable[place])]
            if counted:
                self.capture.count(address, rows[address][counted])

    def _begin_shard(self, number: int) -> None:
        """Begin every shard with whole batches, so that its bytes do not depend on the shards before it."""
        if number != self._shard:
            self._shard, self.images_at_once = number, self.plan.batch_size

    def finish(self) -> None:
        """Do what a process does after its last batch: raise if its first rows are others by now."""
        if self.check is not None:
            with self._report_memory():
                self.check.finish()

    def _run(self, batch: Batch, pixels_NCHW: Tensor, rows: Mapping[str, Tensor]) -> None:
        """Run a batch, and check it if it is one of those to check."""
        copy_NCHW = None
        if self.check is not None and self.check.needs(batch.positions, len(pixels_NCHW)):
            # What is a model's input already, the model may write to.
            copy_NCHW = pixels_NCHW if pixels_NCHW.dtype == torch.uint8 else pixels_NCHW.clone()
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
                input_NCHW = to_input(pixels_NCHW[start:stop], self.capture.runner.device, self.plan.preprocessing)
                self.capture.run(input_NCHW, {address: rows[address][start:stop] for address in rows})
                parts.append(range(start, stop))
                start = stop
                continue
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                failure = error.with_traceback(None)  # It would keep the activations of the failed pass alive.
            if self.capture.wait_for_all():
                continue  # Once more, without the copies of earlier passes, which held memory.
            if stop - start == 1:
                raise out_of_memory(1, failure)
            self.images_at_once = (stop - start) // 2
            log.warning("out of memory with %d images at once: going on with %d", stop - start, self.images_at_once)
        return parts

    @contextlib.contextmanager
    def _report_memory(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(self.images_at_once, error) from None
