"""The straight line: pending shards -> batches -> record -> published shard."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hookx.capture.copies import has_streams
from hookx.capture.failures import report_broken_device
from hookx.capture.rows import RowCapture
from hookx.capture.second_look import SecondLook
from hookx.errors import ImageError, OtherRunError, UsageError
from hookx.images.files import first_with_query
from hookx.images.mapped import write_list
from hookx.options import ExtractOptions
from hookx.plan import RangeCounts, Shard
from hookx.run.defaults import device_name, single_threaded
from hookx.run.lane import Lane, to_input
from hookx.run.listed import LIST, absolute_sources, list_images_of
from hookx.run.made import check_same_hardware, describe_process
from hookx.run.mended import check_nothing_lost, mended_in
from hookx.run.prepare import Job, prepare_again, prepare_listed
from hookx.run.selfcheck import SelfCheck, choose_batches
from hookx.run.summary import Summary, Timing, summarize
from hookx.run.workers import batches
from hookx.store.directory import Lock, RunDirectory
from hookx.store.record import ShardRecord, Totals
from hookx.store.writer import ShardWriter

log = logging.getLogger("hookx")
_MAX_FAILURES_LOGGED = 10
_MAX_PASSES_IN_FLIGHT = 3  # on a GPU


def run(job: Job, progress: Callable[[int], None] = lambda images_done: None) -> Summary:
    """Compute the pending shards of a job, and write the index."""
    timing, totals = Timing.of(job), Totals()
    with begin(job) as (directory, job):
        if job.pending:
            totals = compute(job, directory, timing, progress)
        if job.part is None or directory.is_complete:  # The last of the parts completes the run.
            whole = Totals()
            directory.publish_index(whole.add)  # Written again for a finished run: it may be missing.
            if job.part is None:
                totals = whole
    device, workers = device_name(job.device), job.workers
    summary = summarize(
        *(job.plan, job.out, job.pending, job.part, totals, timing),
        device=device,
        workers=workers,
        remarks=job.images.remarks,
    )
    if summary.failures and not job.pending:
        log.info("to try the images again that could not be read: --retry-failures")
    return summary


def plan(options: ExtractOptions, chosen_for: str | None = None, *, with_list: bool = False) -> Job:
    """Check a run as `prepare` does, and write its plan.json, so that it is begun and no shard is computed.

    With `with_list` the list of images is written as well. A later call with the same sources takes them from there,
    without looking at a single file: an image that has changed since is a failure when it is read.
    """
    if options.append:
        raise UsageError("a plan begins a run, and --append adds to one", "leave out --append")
    options = dataclasses.replace(options, shard=None)
    sources = absolute_sources(options)
    if with_list and not sources:
        raise UsageError("a list on standard input is not written again", "name folders, or leave out --with-list")
    images = list_images_of(options)
    if with_list and (signed := first_with_query(images.files, sources)):
        raise UsageError(
            f"--with-list writes addresses, and '{signed}' has a query, which may be a signature",
            "leave out --with-list: each part lists the images by itself",
        )
    job = prepare_listed(options, images, chosen_for)
    with begin(job, "shared") as (directory, job):
        if with_list:
            directory.publish(LIST, lambda aside: write_list(job.images, aside, sources))
        return job


@contextlib.contextmanager
def begin(job: Job, lock: Lock | None = None) -> Iterator[tuple[RunDirectory, Job]]:
    """Begin a run, or go on with it, while the block lasts; yield its directory, and the job as it was begun.

    Another process may have begun it since the job was prepared, on another kind of device perhaps, for which it chose
    other batches and another memory format: the first to publish its plan has chosen for all.
    """
    if lock is None:
        lock = "alone" if job.part is None else "shared"
    directory = RunDirectory(job.out, job.plan, lock=lock, scratch=job.options.scratch)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(directory)
        except OtherRunError:
            if job.begun is not None or job.options.memory_format != "auto":
                raise
            job = prepare_again(job)
            directory = RunDirectory(job.out, job.plan, lock=lock, scratch=job.options.scratch)
            stack.enter_context(directory)
        if job.options.batch_size == "auto":
            plan = dataclasses.replace(job.plan, batch_size=directory.begun.batch_size)
            job = dataclasses.replace(job, plan=plan)
        if job.images.columns:
            directory.publish_columns(job.images.columns)
        if job.options.same_hardware:
            check_same_hardware(job.out, directory.begun, job.plan.hardware)
        yield directory, job


def compute(job: Job, directory: RunDirectory, timing: Timing, progress: Callable[[int], None]) -> Totals:
    """Compute the pending shards of a job, and publish them; return what they hold."""
    with report_broken_device():  # Outermost: what clears up behind a broken device fails as well.
        return _compute(job, directory, timing, progress)


def _compute(job: Job, directory: RunDirectory, timing: Timing, progress: Callable[[int], None]) -> Totals:
    totals = Totals()
    plan, ready, on_gpu = job.plan, job.ready, has_streams(job.device)
    made = describe_process(ready, plan.batch_size)
    failures, has_failed_first = 0, False
    with (
        single_threaded(),
        ShardWriter(
            directory,
            job.pending,
            plan.batch_size,
            functools.partial(_expected_record, job, made),
            processes=job.workers if job.workers_compute else 1,
            filled_at_once=_MAX_PASSES_IN_FLIGHT if on_gpu else 1,
            pin_memory=on_gpu,
            replaced=job.replaced,
        ) as writer,
        RowCapture(ready.runner, ready.selection.targets, ready.settled) as capture,
    ):
        lane = Lane(capture, writer, plan, _self_check(job, capture), job.reuse)
        decoded = batches(  # Forks the workers, before there are threads.
            job.images,
            [positions for shard in job.pending for positions in shard.batches(plan.batch_size)],
            plan.preprocessing,
            workers=job.workers,
            decode_timeout_seconds=job.options.decode_timeout,
            retry_seconds=job.options.retry_for,
            unavailable_is_failure=job.options.on_io_error == "fail",
            # A process that is not forked has inherited nothing of the writer, which cannot be pickled either.
            in_worker=functools.partial(_release, directory, writer) if job.workers_compute else directory.release,
            transform=ready.loaded.transform,
            loader=ready.loaded.loader,
            lane=lane if job.workers_compute else None,
            is_copied=job.reuse.is_whole if job.reuse is not None else None,
            device=job.device,
        )
        with contextlib.closing(decoded):
            # The one difference between a CPU and a GPU: workers have run the lane, or this process runs it.
            computed = decoded if job.workers_compute else map(lane.run, decoded)
            for shard in job.pending:
                record = ShardRecord(sizes_bytes=list(job.then_bytes[shard.start : shard.stop]))
                record.self_checked, copied = 0 if lane.check else None, 0
                written, ranges = [], RangeCounts()
                for positions in shard.batches(plan.batch_size):
                    writer.check()
                    batch = next(computed)
                    failures = _report(batch.failures, failures, strict=job.options.strict)
                    if batch.failed_first and not has_failed_first:
                        has_failed_first = True
                        log.warning("an image could only be read at a later try; the first: %s", batch.failed_first)
                    record.keys += batch.keys
                    record.failures += batch.failures
                    record.rotations_ignored += batch.rotations_ignored
                    record.counts.add(batch.counts)
                    copied += batch.copied
                    ranges.add(batch.ranges)
                    if record.self_checked is not None:
                        record.self_checked += batch.self_checked
                    timing.reading += batch.reading_seconds
                    timing.nvjpeg += batch.nvjpeg_seconds
                    timing.model += batch.model_seconds
                    written.append(batch.written)
                    progress(len(positions))
                if shard is job.pending[-1] and not job.workers_compute:
                    lane.finish()
                record.counts.add(capture.take_counts())
                record.made = {**made, "batch_size": lane.images_at_once, **({"reused": copied} if copied else {})}
                record.ranges = ranges or None
                mended = mended_in(shard, job.images, job.then_bytes)
                record.mended = {key: mended[key] for key in record.keys if key in mended} or None
                if shard.number in job.replaced:
                    check_nothing_lost(job.out, plan, shard, record)
                writer.publish(record, written)
                totals.add(record)
            writer.finish()
    if failures > _MAX_FAILURES_LOGGED:
        log.warning("and %d more that cannot be read; see failures.csv", failures - _MAX_FAILURES_LOGGED)
    timing.model += capture.gpu_seconds
    timing.copying = capture.gpu_copying_seconds
    timing.writing = writer.seconds
    return totals


def _release(directory: RunDirectory, writer: ShardWriter) -> None:
    """Let go, in a worker, of what only the process that owns the run keeps open."""
    directory.release()
    writer.release()


def _self_check(job: Job, capture: RowCapture) -> SelfCheck | None:
    starts = choose_batches(job.plan, job.options.self_check)
    targets = job.ready.selection.targets
    computed = {str(target.address) for target in targets}
    look = SecondLook(capture, targets, [layer for layer in job.plan.layers if layer.address in computed])
    to_input_of_run = functools.partial(to_input, device=job.device, preprocessing=job.plan.preprocessing)
    return SelfCheck(look, job.plan, starts, job.images.keys, to_input_of_run) if starts else None


def _expected_record(job: Job, made: dict[str, Any], shard: Shard) -> ShardRecord:
    """Return the record of a shard if every image can be read."""
    positions = slice(shard.start, shard.stop)
    return ShardRecord(
        keys=list(job.images.keys[positions]),
        made={**made, "reused": len(shard) * len(job.plan.layers)} if job.reuse is not None else made,
        sizes_bytes=list(job.then_bytes[positions]),
        mended=mended_in(shard, job.images, job.then_bytes) or None,
        self_checked=None if job.options.self_check == "off" else len(shard),
    )


def _report(failures: Sequence[tuple[str, str]], count: int, *, strict: bool) -> int:
    """Log images that cannot be read, after `count` others; return how many that makes. Raise the first if `strict`."""
    for number, (key, reason) in enumerate(failures, count):
        if strict:
            raise ImageError(f"cannot read '{key}': {reason}", "leave out --strict to go on without it")
        if number < _MAX_FAILURES_LOGGED:
            log.warning("cannot read '%s': %s", key, reason)
    return count + len(failures)
