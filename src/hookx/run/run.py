"""The straight line: pending shards -> batches -> record -> published shard."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from hookx.capture.rows import RowCapture
from hookx.errors import ImageError
from hookx.options import ExtractOptions, takes
from hookx.plan import Shard
from hookx.run.cores import single_threaded
from hookx.run.lane import Lane
from hookx.run.prepare import Job, prepare
from hookx.run.provenance import Provenance
from hookx.run.summary import Summary, Timing, summarize
from hookx.run.workers import batches
from hookx.store.directory import RunDirectory
from hookx.store.record import ShardRecord
from hookx.store.writer import ShardWriter

log = logging.getLogger("hookx")
_MAX_FAILURES_LOGGED = 10
_MAX_PASSES_IN_FLIGHT = 3  # on a GPU


@takes(ExtractOptions)
def extract(options: ExtractOptions) -> Summary:
    """Store the activations of a folder of images, as `hookx extract` does.

    The same call again finishes an interrupted run, or finds it done.

    Raises:
        HookxError: an argument is wrong, which shows before the first shard; or the disk fails on the way.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as out:
        ...     summary = extract("resnet18", "conv1,avgpool", "images", weights="none", out=out)
        >>> summary.images, [layer.shape for layer in summary.layers]
        (8, [(64, 112, 112), (512, 1, 1)])
    """
    return run(prepare(**vars(options)), options.progress)


def run(job: Job, progress: Callable[[int], None] = lambda images_done: None) -> Summary:
    """Compute the pending shards of a job, and write the index."""
    timing = Timing(job)
    with RunDirectory(job.out, job.plan) as directory:
        if job.pending:
            _compute(job, directory, timing, progress)
        directory.publish_index()  # Written again for a finished run: it is small, and may be missing.
    return summarize(job, timing)


def _compute(job: Job, directory: RunDirectory, timing: Timing, progress: Callable[[int], None]) -> None:
    plan, on_gpu = job.plan, job.device.type == "cuda"
    made = Provenance.of(job.model.distribution, job.device, plan.batch_size)
    failures = _FailureLog(strict=job.strict)
    with (
        single_threaded() if job.device.type == "cpu" else contextlib.nullcontext(),
        ShardWriter(
            directory,
            job.pending,
            plan.batch_size,
            functools.partial(_expected_record, job, made),
            processes=job.workers if job.workers_compute else 1,
            filled_at_once=_MAX_PASSES_IN_FLIGHT if on_gpu else 1,
            pin_memory=on_gpu,
        ) as writer,
        RowCapture(job.runner, job.targets) as capture,
    ):
        lane = Lane(capture, writer, plan)
        decoded = batches(  # Forks the workers, before there are threads.
            job.images,
            [positions for shard in job.pending for positions in shard.batches(plan.batch_size)],
            plan.preprocessing,
            workers=job.workers,
            decode_timeout_seconds=job.decode_timeout_seconds,
            pin_memory=on_gpu,
            in_worker=directory.release,
            transform=job.model.transform,
            lane=lane if job.workers_compute else None,
            device=job.device,
        )
        with contextlib.closing(decoded):
            # The one difference between a CPU and a GPU: workers have run the lane, or this process runs it.
            computed = decoded if job.workers_compute else map(lane.run, decoded)
            for shard in job.pending:
                record = ShardRecord(sizes_bytes=list(job.images.sizes_bytes[shard.start : shard.stop]))
                written = []
                for positions in shard.batches(plan.batch_size):
                    batch = next(computed)
                    failures.log(batch.failures)
                    record.keys += batch.keys
                    record.failures += batch.failures
                    record.rotations_ignored += batch.rotations_ignored
                    record.counts.add(batch.counts)
                    timing.reading += batch.reading_seconds
                    timing.model += batch.model_seconds
                    written.append(batch.written)
                    progress(len(positions))
                record.counts.add(capture.take_counts())
                record.made = replace(made, batch_size=lane.images_at_once).to_json()
                writer.publish(record, written)
            writer.finish()
    failures.log_how_many_more()
    timing.model += capture.gpu_seconds
    timing.copying = capture.gpu_copying_seconds
    timing.writing = writer.seconds


def _expected_record(job: Job, made: Provenance, shard: Shard) -> ShardRecord:
    """Return the record of a shard if every image can be read."""
    positions = slice(shard.start, shard.stop)
    return ShardRecord(
        keys=list(job.images.keys[positions]),
        sizes_bytes=list(job.images.sizes_bytes[positions]),
        made=made.to_json(),
    )


class _FailureLog:
    """Logs which images cannot be read, up to a number; the first is an error if `strict`."""

    def __init__(self, *, strict: bool) -> None:
        self._strict, self._count = strict, 0

    def log(self, failures: Sequence[tuple[str, str]]) -> None:
        for key, reason in failures:
            if self._strict:
                raise ImageError(f"cannot read '{key}': {reason}", "leave out --strict to go on without it")
            if self._count < _MAX_FAILURES_LOGGED:
                log.warning("cannot read '%s': %s", key, reason)
            self._count += 1

    def log_how_many_more(self) -> None:
        if self._count > _MAX_FAILURES_LOGGED:
            log.warning("and %d more that cannot be read; see failures.csv", self._count - _MAX_FAILURES_LOGGED)
