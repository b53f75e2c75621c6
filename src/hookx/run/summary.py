"""What a run did, and where its time went."""

from __future__ import annotations

import time
from dataclasses import dataclass

from hookx.plan import LayerSpec, Preprocessing
from hookx.run.prepare import Job
from hookx.run.provenance import device_name
from hookx.store.record import Totals, read_record


@dataclass(frozen=True)
class Summary:
    """What a run did. The seconds of each part are of work, added up over the processes that shared it."""

    out: str
    model: str
    weights: str
    notes: tuple[str, ...]  # of the weights, such as what was unwrapped from a checkpoint
    preprocessing: Preprocessing
    layers: tuple[LayerSpec, ...]
    images: int  # rows stored
    failures: int
    shards: int
    shards_computed: int  # by this call; the others were there already
    images_computed: int
    bytes: int  # of activations
    device: str
    precision: str
    memory_format: str
    batch_size: int
    workers: int
    rotations_ignored: int
    counts: dict[str, dict[str, int]]  # address -> 'non_finite', 'all_zero' images, 'overflowed', 'flushed' values
    seconds_total: float
    seconds_reading: float
    seconds_model: float
    seconds_copying: float  # from a GPU
    seconds_writing: float
    busy: dict[str, float]  # 'reading', 'model', 'copying', 'writing' -> the share of the time for which it worked
    bound_by: str  # which of them the run waited for
    files: tuple[str, ...]


def summarize(job: Job, clock: Clock) -> Summary:
    plan = job.plan
    totals = Totals()
    for shard in plan.shards:  # One record in memory at a time: a run can have millions of images.
        totals.add(read_record(job.out, plan, shard))
    return Summary(
        out=str(job.out),
        model=plan.model,
        weights=plan.weights,
        notes=plan.notes,
        preprocessing=plan.preprocessing,
        layers=plan.layers,
        images=totals.rows,
        failures=totals.failures,
        shards=len(plan.shards),
        shards_computed=len(job.pending),
        images_computed=sum(map(len, job.pending)),
        bytes=totals.rows * plan.bytes_per_image,
        device=device_name(job.device),
        precision=plan.precision,
        memory_format=plan.memory_format,
        batch_size=plan.batch_size,
        workers=job.workers,
        rotations_ignored=totals.rotations_ignored,
        counts=totals.counts,
        seconds_total=round(clock.total_seconds, 3),
        seconds_reading=round(clock.reading_seconds, 3),
        seconds_model=round(clock.model_seconds, 3),
        seconds_copying=round(clock.copying_seconds, 3),
        seconds_writing=round(clock.writing_seconds, 3),
        busy=clock.busy(job),
        bound_by=clock.bound_by(job),
        files=tuple(str(job.out / plan.shard_file(shard)) for shard in plan.shards),
    )


class Clock:
    """Seconds of work, by part, and what they say of the whole."""

    def __init__(self) -> None:
        self.reading_seconds = self.model_seconds = self.copying_seconds = self.writing_seconds = 0.0
        self._start = time.perf_counter()

    @property
    def total_seconds(self) -> float:
        return time.perf_counter() - self._start

    def busy(self, job: Job) -> dict[str, float]:
        workers = max(job.workers, 1)
        shares = {
            "reading": self.reading_seconds / workers,
            "model": self.model_seconds / (workers if job.workers_compute else 1),
            "copying": self.copying_seconds,
            "writing": self.writing_seconds,
        }
        return {part: round(seconds / self.total_seconds, 3) for part, seconds in shares.items()}

    def bound_by(self, job: Job) -> str:
        busy = self.busy(job)
        if job.workers_compute and busy["reading"] + busy["model"] > busy["writing"]:
            del busy["writing"]  # Reading and model share the workers, and together are what is waited for.
        return max(busy, key=lambda part: busy[part])
