"""The straight line: images, model and layers -> probe -> plan -> batches -> capture -> shards -> summary."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hookx.capture.rows import RowCapture
from hookx.errors import HookxError, ImageError
from hookx.options import ExtractOptions, takes
from hookx.plan import Shard
from hookx.run.cores import keep_freed_memory, single_threaded
from hookx.run.lane import Filling, FillingAndWriting
from hookx.run.prepare import Job, prepare
from hookx.run.provenance import provenance
from hookx.run.summary import Clock, Summary, summarize
from hookx.run.workers import batches as decoded_batches
from hookx.store.directory import RunDirectory
from hookx.store.record import ShardRecord
from hookx.store.writer import BatchWriter, ShardWriter

log = logging.getLogger("hookx")
_FAILURES_SAID_ALOUD = 10
_PASSES_IN_FLIGHT = 2  # on a GPU, beside the one that is being asked for


@takes(ExtractOptions)
def extract(options: ExtractOptions) -> Summary:
    """Store the activations of a folder of images; what `hookx extract` does.

    Running it again with the same arguments finishes what an interrupted run left, or finds it done.

    Raises:
        HookxError: whatever is wrong with the arguments, before the first shard; or the disk, on the way.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as out:
        ...     summary = extract("resnet18", "conv1,avgpool", "images", weights="none", out=out)
        >>> summary.images, [layer.shape for layer in summary.layers]
        (8, [(64, 112, 112), (512, 1, 1)])
    """
    return run(prepare(**vars(options)), options.progress)


def run(job: Job, progress: Callable[[int], None] = lambda images_done: None) -> Summary:
    """Compute the shards of a job that are pending, and write the index."""
    plan, clock = job.plan, Clock()
    with RunDirectory(job.out, plan) as directory:
        if job.pending:
            _compute(job, directory, clock, progress)
        directory.publish_index()  # Written again on a finished run: it is small, and may be missing.
    return summarize(job, clock)


def _compute(job: Job, directory: RunDirectory, clock: Clock, progress: Callable[[int], None]) -> None:
    plan, on_gpu = job.plan, job.device.type == "cuda"
    made = provenance(job.model.distribution, job.device, plan.batch_size)
    with (
        single_threaded() if job.device.type == "cpu" else contextlib.nullcontext(),
        ShardWriter(
            BatchWriter(
                directory,
                job.pending,
                plan.batch_size,
                functools.partial(_expected, job, made),
                at_once=_PASSES_IN_FLIGHT + 1 if on_gpu else 1,
                pin_memory=on_gpu,
            ),
            processes=max(1, job.workers) if job.workers_compute else 1,
        ) as writer,
        RowCapture(job.runner, job.targets) as capture,
    ):
        filling = Filling(writer.batches, capture, plan.preprocessing, plan.batch_size)
        # The workers are forked here, before there are threads.
        batches = decoded_batches(
            job.images,
            [positions for shard in job.pending for positions in shard.batches(plan.batch_size)],
            plan.preprocessing,
            workers=job.workers,
            decode_timeout_seconds=job.decode_timeout_seconds,
            pin_memory=on_gpu,
            in_worker=functools.partial(_begin_worker, directory),
            transform=job.model.transform,
            consume=FillingAndWriting(filling) if job.workers_compute else None,
            device=job.device,
        )
        failures = _Failures(strict=job.strict)
        with contextlib.closing(batches):
            for shard in job.pending:
                expected = _expected(job, made, shard)
                record = ShardRecord(sizes_bytes=expected.sizes_bytes)
                in_flight: deque[tuple[range, int]] = deque()
                for positions in shard.batches(plan.batch_size):
                    batch = next(batches)
                    failures.say(batch.failures)
                    if job.workers_compute:
                        filled = batch.outcome
                        if isinstance(filled, HookxError):
                            raise filled
                        record.add_counts(filled.counts)
                        clock.model_seconds += filled.seconds
                        writer.add(filled.written)
                    else:
                        clock.model_seconds += filling(positions, batch.pixels_NCHW)
                        in_flight.append((positions, capture.passes))
                        if len(in_flight) > (_PASSES_IN_FLIGHT if on_gpu else 0):
                            _hand_over(in_flight, capture, writer)
                    clock.reading_seconds += batch.seconds
                    record.keys += batch.keys
                    record.failures += batch.failures
                    record.rotations_ignored += batch.rotations_ignored
                    progress(len(positions))
                while in_flight:
                    _hand_over(in_flight, capture, writer)
                record.add_counts(capture.take_counts())
                record.made = {**made, "batch_size": filling.images_at_once}
                writer.publish(record)
            writer.finish()
        failures.say_how_many_more()
        clock.model_seconds += capture.gpu_seconds
        clock.copying_seconds = capture.gpu_copying_seconds
        clock.writing_seconds = writer.seconds


def _expected(job: Job, made: Mapping[str, Any], shard: Shard) -> ShardRecord:
    """Return what a shard will say of itself if every image can be read."""
    positions = slice(shard.start, shard.stop)
    return ShardRecord(
        keys=list(job.images.keys[positions]),
        sizes_bytes=list(job.images.sizes_bytes[positions]),
        made=dict(made),
    )


def _hand_over(in_flight: deque[tuple[range, int]], capture: RowCapture, writer: ShardWriter) -> None:
    """Have the oldest batch written, once a GPU has copied it."""
    positions, passes = in_flight.popleft()
    capture.wait(passes)
    writer.add(writer.batches.write(positions))


class _Failures:
    """Says aloud which images cannot be read, up to a number."""

    def __init__(self, *, strict: bool) -> None:
        self._strict, self._count = strict, 0

    def say(self, failures: Sequence[tuple[str, str]]) -> None:
        for key, reason in failures:
            if self._strict:
                raise ImageError(f"cannot read '{key}': {reason}", "leave out --strict to go on without it")
            if self._count < _FAILURES_SAID_ALOUD:
                log.warning("cannot read '%s': %s", key, reason)
            self._count += 1

    def say_how_many_more(self) -> None:
        if self._count > _FAILURES_SAID_ALOUD:
            log.warning("and %d more that cannot be read; see failures.csv", self._count - _FAILURES_SAID_ALOUD)


def _begin_worker(directory: RunDirectory) -> None:
    directory.release()
    keep_freed_memory()
    # Only the thread that hands tensors over reports here, when the parent was killed in the middle of taking one.
    sys.excepthook = lambda *_: None
