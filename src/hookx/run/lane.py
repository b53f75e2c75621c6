"""The pixels of a batch -> the rows of the writer, in whatever process has them; and, in a worker, on to the disk."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass

from torch import OutOfMemoryError, Tensor

from hookx.capture.rows import RowCapture
from hookx.errors import HookxError
from hookx.images.decoding import model_input
from hookx.plan import Preprocessing
from hookx.run.ready import out_of_memory
from hookx.store.shard_file import Written
from hookx.store.writer import BatchWriter

log = logging.getLogger("hookx")


class Filling:
    """Runs batches through the model, so that their rows in the writer's memory are filled."""

    def __init__(
        self, batches: BatchWriter, capture: RowCapture, preprocessing: Preprocessing, batch_size: int
    ) -> None:
        self.batches, self.capture = batches, capture
        self.images_at_once = batch_size  # of what the model is given; less once that was too much for a GPU
        self._preprocessing = preprocessing

    def __call__(self, positions: range, pixels_NCHW: Tensor | None) -> float:
        """Fill the rows of a batch; return the seconds that it took. A GPU has only begun by then."""
        rows = self.batches.rows(positions, 0 if pixels_NCHW is None else len(pixels_NCHW))
        if pixels_NCHW is None:
            return 0.0
        start, on_gpu = time.perf_counter(), self.capture.runner.device.type == "cuda"
        on_device = pixels_NCHW.to(self.capture.runner.device, non_blocking=on_gpu)
        self._run_in_parts(model_input(on_device, self._preprocessing), rows)
        return 0.0 if on_gpu else time.perf_counter() - start

    def _run_in_parts(self, pixels_NCHW: Tensor, rows: Mapping[str, Tensor]) -> None:
        """Run a batch, in halves of halves if the device's memory is too small."""
        start = 0
        while start < len(pixels_NCHW):
            stop = min(start + self.images_at_once, len(pixels_NCHW))
            try:
                places = {address: tensor[start:stop] for address, tensor in rows.items()}
                self.capture.run(pixels_NCHW[start:stop], places)
                start = stop
            except OutOfMemoryError as error:
                if stop - start == 1:
                    raise out_of_memory(1, error) from None
                self.images_at_once = (stop - start) // 2
                log.warning("out of memory with %d images at once: going on with %d", stop - start, self.images_at_once)


@dataclass(frozen=True)
class Filled:
    """What became of a batch that went through the model and to the disk, in a worker."""

    counts: Mapping[str, Mapping[str, int]]  # as RowCapture takes them
    seconds: float  # in the model
    written: Written


class FillingAndWriting:
    """Has a worker run and write what it decoded: a `Consumer` of batches."""

    def __init__(self, filling: Filling) -> None:
        self._filling = filling

    def __call__(self, positions: range, pixels_NCHW: Tensor | None) -> Future[Filled | HookxError]:
        """Run a batch; the outcome is there when it is on the disk, and is an error that a user may have caused."""
        outcome: Future[Filled | HookxError] = Future()
        try:
            seconds = self._filling(positions, pixels_NCHW)
        except HookxError as error:  # Returned: on its way out of a worker, an exception is wrapped in other words.
            outcome.set_result(error)
            return outcome
        counts = self._filling.capture.take_counts()

        def is_written(written: Future[Written]) -> None:
            problem = written.exception()
            if problem is None:
                outcome.set_result(Filled(counts, seconds, written.result()))
            elif isinstance(problem, HookxError):
                outcome.set_result(problem)
            else:
                outcome.set_exception(problem)

        self._filling.batches.write(positions).add_done_callback(is_written)
        return outcome

    def forget(self, positions: range) -> None:
        self._filling.batches.forget(positions)
