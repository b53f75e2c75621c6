"""What a run did, and where its time went."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from hookx.plan import LayerSpec, Plan, Preprocessing, ValueCounts
from hookx.run.defaults import device_name
from hookx.run.prepare import Job
from hookx.store.record import Totals, read_record


class Timing:
    """Seconds of work by part, added up over the processes that shared it, and which part was the slowest."""

    def __init__(self, job: Job) -> None:
        self.total = self.reading = self.model = self.copying = self.writing = 0.0
        self._processes = {"reading": max(job.workers, 1), "model": job.workers if job.workers_compute else 1}
        # The processes that read run the model too: together, reading and model are what is waited for.
        self._takes_turns = job.device.type == "cpu" and (job.workers_compute or not job.workers)
        self._start = time.perf_counter()

    def stop(self) -> None:
        self.total = time.perf_counter() - self._start

    @property
    def busy(self) -> dict[str, float]:
        """The share of the time for which each part worked."""
        parts = {"reading": self.reading, "model": self.model, "copying": self.copying, "writing": self.writing}
        return {part: round(seconds / self._processes.get(part, 1) / self.total, 3) for part, seconds in parts.items()}

    @property
    def bound_by(self) -> str:
        """The part that the others waited for."""
        busy = self.busy
        if self._takes_turns and busy["reading"] + busy["model"] > busy["writing"]:
            del busy["writing"]
        return max(busy, key=lambda part: busy[part])


@dataclass(frozen=True)
class Summary:
    """What a run did. The seconds of each part are of work, added up over the processes that shared it."""

    plan: Plan
    totals: Totals
    timing: Timing
    out: str
    device: str
    workers: int
    shards_computed: int  # by this call; the others were there already
    images_computed: int

    @property
    def model(self) -> str:
        return self.plan.model

    @property
    def weights(self) -> str:
        return self.plan.weights

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of the weights, such as what was unwrapped from a checkpoint."""
        return self.plan.notes

    @property
    def preprocessing(self) -> Preprocessing:
        return self.plan.preprocessing

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        return self.plan.layers

    @property
    def precision(self) -> str:
        return self.plan.precision

    @property
    def memory_format(self) -> str:
        return self.plan.memory_format

    @property
    def batch_size(self) -> int:
        return self.plan.batch_size

    @property
    def images(self) -> int:
        """Rows stored."""
        return self.totals.rows

    @property
    def failures(self) -> int:
        return self.totals.failures

    @property
    def rotations_ignored(self) -> int:
        return self.totals.rotations_ignored

    @property
    def counts(self) -> ValueCounts:
        return self.totals.counts

    @property
    def bytes(self) -> int:
        """The size of the activations."""
        return self.images * self.plan.bytes_per_image

    @property
    def shards(self) -> int:
        return len(self.plan.shards)

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(str(Path(self.out) / self.plan.shard_file(shard)) for shard in self.plan.shards)

    @property
    def seconds_total(self) -> float:
        return round(self.timing.total, 3)

    @property
    def seconds_reading(self) -> float:
        return round(self.timing.reading, 3)

    @property
    def seconds_model(self) -> float:
        return round(self.timing.model, 3)

    @property
    def seconds_copying(self) -> float:
        """The time of copies from a GPU."""
        return round(self.timing.copying, 3)

    @property
    def seconds_writing(self) -> float:
        return round(self.timing.writing, 3)

    @property
    def busy(self) -> dict[str, float]:
        """'reading', 'model', 'copying', 'writing' -> the share of the time for which it worked."""
        return self.timing.busy

    @property
    def bound_by(self) -> str:
        """Which of them the run waited for."""
        return self.timing.bound_by


def summarize(job: Job, timing: Timing) -> Summary:
    """Add up the shards of a finished run."""
    totals = Totals()
    for shard in job.plan.shards:  # One record in memory at a time: a run can have millions of images.
        totals.add(read_record(job.out, job.plan, shard))
    timing.stop()
    return Summary(
        plan=job.plan,
        totals=totals,
        timing=timing,
        out=str(job.out),
        device=device_name(job.device),
        workers=job.workers,
        shards_computed=len(job.pending),
        images_computed=sum(map(len, job.pending)),
    )
