"""Run one step of scripts/gpu-check in a process of its own, which writes what it found to a file as it goes.

    python -m gpu_check.step gpu_check.exact:conformance --device cuda --seconds 90 --scratch DIR --photographs DIR
        --result FILE

scripts/gpu-check starts this, ends it when its time is over, and reads the file, so that a hang or a poisoned CUDA
context costs no other step.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Step:
    """What a step proves, where its code is, and what it takes."""

    name: str
    proves: str
    module: str  # holds a function with the name of the step
    group: int  # The steps of a group run side by side, and the groups one after the other.
    processes: int  # that it keeps busy
    least_seconds: int  # on a GPU; with less it is not begun
    most_seconds: int
    needs_gpu: bool = False


# The most valuable first: what has no time left is the end of the list.
STEPS = [
    Step(
        "tests",
        "the tests that need a GPU pass",
        "gpu_check.exact",
        group=1,
        processes=4,
        least_seconds=20,
        most_seconds=150,
    ),
    Step(
        "determinism",
        "the same plan gives the same bytes: two at once on one card, and killed and resumed",
        "gpu_check.runs",
        group=1,
        processes=6,
        least_seconds=30,
        most_seconds=150,
    ),
    Step(
        "precision",
        "fp32 is fp32 (against float64 on the CPU), and tf32 is TF32",
        "gpu_check.exact",
        group=1,
        processes=1,
        least_seconds=15,
        most_seconds=90,
    ),
    Step(
        "copies",
        "copies in flight equal a synchronous reference while layers are overwritten in place under load",
        "gpu_check.copies",
        group=1,
        processes=2,
        least_seconds=15,
        most_seconds=90,
    ),
    Step(
        "late_error",
        "an error of the device in mid-run ends with exit code 1, a next step and whole shards, and can be resumed",
        "gpu_check.runs",
        group=1,
        processes=3,
        least_seconds=25,
        most_seconds=90,
        needs_gpu=True,
    ),
    Step(
        "rest",
        "device memory after hookx.extract is what it was before",
        "gpu_check.runs",
        group=1,
        processes=1,
        least_seconds=12,
        most_seconds=60,
    ),
    Step(
        "nvjpeg",
        "nvjpeg moves pixels by a few levels: by how many, and activations by how much",
        "gpu_check.copies",
        group=1,
        processes=1,
        least_seconds=15,
        most_seconds=90,
    ),
    Step(
        "conformance",
        "every activation of 22 models equals the model's own pass bit for bit: fp32, tf32, bf16, fp16, both formats",
        "gpu_check.exact",
        group=2,
        processes=CORES,
        least_seconds=20,
        most_seconds=200,
    ),
    Step(
        "memory",
        "a full card halves the batch, says so, stores the same rows, and begins a later shard with the whole batch",
        "gpu_check.runs",
        group=3,
        processes=2,
        least_seconds=25,
        most_seconds=90,
        needs_gpu=True,
    ),
    Step(
        "speed",
        "the speed goals, against a script by hand, torchvision's feature extractor and the limits of the machine",
        "gpu_check.speed",
        group=4,
        processes=CORES,
        least_seconds=40,
        most_seconds=3600,
    ),
]


@dataclass(frozen=True)
class Settings:
    """Where a step runs, and on what."""

    device: str
    scratch: Path  # an empty folder of its own, removed afterwards
    photographs: Path  # a folder of JPEGs of about 500 x 375 pixels
    quick: bool  # a check that the step works: as little as means something

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"


@dataclass
class Report:
    """What a step found. `problems` are why it is not proved, and `left_out` is what there was no time for."""

    file: Path
    deadline: float  # by time.monotonic()
    figure: str = ""
    problems: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)  # more figures, each a line below the table
    figures: dict[str, Any] = field(default_factory=dict)  # for the JSON alone
    is_done: bool = False

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def save(self) -> None:
        """Write the file whole, so that whoever ends this process finds the last state."""
        names = ("figure", "problems", "left_out", "lines", "figures", "is_done")
        aside = self.file.with_suffix(".aside")
        aside.write_text(json.dumps({name: getattr(self, name) for name in names}))
        os.replace(aside, self.file)


def main() -> int:
    """Run the step named on the command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("function", metavar="MODULE:FUNCTION", help="takes Settings and a Report")
    parser.add_argument("--device", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--photographs", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    settings = Settings(arguments.device, arguments.scratch, arguments.photographs, arguments.quick)
    report = Report(arguments.result, time.monotonic() + arguments.seconds)
    module, function = arguments.function.split(":")
    getattr(import_module(module), function)(settings, report)
    report.is_done = True
    report.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
