"""Forward -> rows -> disk, for one decoded batch after another."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Mapping

from torch import OutOfMemoryError, Tensor

from hookx.capture.rows import RowCapture
from hookx.images.decoding import model_input
from hookx.plan import Plan
from hookx.run.batch import Batch
from hookx.run.ready import out_of_memory
from hookx.store.writer import ShardWriter

log = logging.getLogger("hookx")


class Lane:
    """Takes decoded batches through the model and on to the disk.

    A worker on the CPU runs the lane behind its own decoder; beside a GPU, the main process runs it, and workers feed
    it. The forward pass of a batch, its copy from a GPU and its way to the disk overlap with those of the next ones, as
    far as the writer has memory for their rows.
    """

    def __init__(self, capture: RowCapture, writer: ShardWriter, plan: Plan) -> None:
        self.capture, self.writer, self.plan = capture, writer, plan
        self.images_at_once = plan.batch_size  # in the model; fewer once that was too much for a GPU

    def run(self, batch: Batch) -> Batch:
        """Run a batch, and start to write it; a GPU has only started the pass when this returns."""
        pixels_NCHW, batch.pixels_NCHW = batch.pixels_NCHW, None
        rows = self.writer.rows(batch.positions, 0 if pixels_NCHW is None else len(pixels_NCHW))
        device = self.capture.runner.device
        if pixels_NCHW is not None:
            start = time.perf_counter()
            on_device = pixels_NCHW.to(device, non_blocking=device.type == "cuda")
            self._run_in_parts(model_input(on_device, self.plan.preprocessing), rows)
            if device.type != "cuda":  # A GPU measures its own time.
                batch.model_seconds = time.perf_counter() - start
        if device.type == "cpu":  # Elsewhere the counts of a shard are taken at its end: they wait for the device.
            batch.counts = self.capture.take_counts()
        batch.written = self.writer.write(batch.positions, functools.partial(self.capture.wait, self.capture.passes))
        return batch

    def _run_in_parts(self, pixels_NCHW: Tensor, rows: Mapping[str, Tensor]) -> None:
        """Run a batch, in halves of halves if the device has too little memory."""
        start = 0
        while start < len(pixels_NCHW):
            stop = min(start + self.images_at_once, len(pixels_NCHW))
            try:
                self.capture.run(pixels_NCHW[start:stop], {address: rows[address][start:stop] for address in rows})
                start = stop
            except OutOfMemoryError as error:
                if stop - start == 1:
                    raise out_of_memory(1, error) from None
                self.images_at_once = (stop - start) // 2
                log.warning("out of memory with %d images at once: going on with %d", stop - start, self.images_at_once)
