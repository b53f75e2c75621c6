"""Step of scripts/gpu-check about speed: hookx, other ways and the limits of the machine, and the goals.

The words are those of scripts/benchmark.py: 'steady' is from ready to written, 'whole' is a process from its start to
its exit. A row of the table is a model, its layers and a precision.

Every contestant stays one warm process, because a GPU takes longer to start than a measurement lasts; only the first
row is measured whole, too. The contestants take turns on the same images with the same random weights, and their
outputs are compared with those of hookx. The rounds go on as long as there is time: hookx and the script by hand, hookx
and torchvision's feature extractor, then all. Ratios are those of one round, and the median over the rounds counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmark import CORES, largest_difference

from gpu_check.contestant import Request
from gpu_check.runs import link_images
from gpu_check.step import Report, Settings

SCRIPTS = Path(__file__).resolve().parents[1]
BATCH = 128
WORKERS = max(1, CORES - 1)  # that decode, in every contestant
VIT_BLOCKS = ",".join(f"encoder.layers.encoder_layer_{number}@cls" for number in range(12))
# Different kernels and memory formats add in another order; bf16 has 8 significant bits.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.06}
NVJPEG_TOLERANCE = 0.1
COMPARED_ROWS = 64
SECONDS_OF_WORK, SECONDS_OF_WRITING = 6.0, 12.0
MOST_BYTES = 12 * 10**9  # The script by hand holds them in memory, twice.
MOST_IMAGES = 24_000

BUSY, FIRST, POOLED, NVJPEG = 0.9, 3.0, 1.5, 2.0  # the goals


@dataclass
class Row:
    """A model, its layers and a precision, and what was measured."""

    model: str
    layers: str
    precision: str
    shown: str = ""
    has_nvjpeg: bool = False
    images: int = 0
    bytes_per_image: int = 0
    limits: dict[str, float] = field(default_factory=dict)  # images per second of each part alone
    steady: dict[str, dict[int, float]] = field(default_factory=dict)  # images per second, by contestant and round
    flushed: dict[str, dict[int, float]] = field(default_factory=dict)  # until the files are on the disk
    whole: dict[str, dict[int, float]] = field(default_factory=dict)
    busy: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)  # why a contestant is not timed

    @property
    def name(self) -> str:
        return f"{self.model} {self.shown or self.layers} {self.precision}"

    def contestants(self, number: int) -> list[str]:
        """Return who runs in a round, hookx first."""
        names = ["hookx", *["nvjpeg"] * self.has_nvjpeg, "hand-written", "fx"]
        left_out = {1: ["fx"], 2: ["nvjpeg", "hand-written"]}.get(number, [])
        return [name for name in names if name not in left_out]

    def bound_by(self, contestant: str) -> str:
        """Return the slowest part."""
        decoder = "nvjpeg" if contestant == "nvjpeg" else "decode"
        parts = [decoder, *(part for part in self.limits if part not in ("decode", "nvjpeg"))]
        return min(parts, key=lambda part: self.limits[part])

    def ratio(self, one: str, other: str, how: str = "steady") -> float | None:
        """Return the median of the paired ratios of two contestants."""
        ours, theirs = (getattr(self, how).get(name, {}) for name in (one, other))
        ratios = [ours[number] / theirs[number] for number in ours.keys() & theirs.keys()]
        return statistics.median(ratios) if ratios else None


ROWS = [
    ("resnet18", "avgpool", "fp32", "", True),
    ("resnet18", "conv1,avgpool", "fp32", "", False),
    ("resnet18", "avgpool", "bf16", "", True),
    ("vit_b_16", VIT_BLOCKS, "bf16", "blocks@cls", False),
    ("resnet18", "conv1,avgpool", "bf16", "", False),
    ("resnet18", "layer3@mean23", "fp32", "", False),
    ("vit_b_16", VIT_BLOCKS, "fp32", "blocks@cls", False),
    ("resnet18", "layer3@mean23", "bf16", "", False),
]


def speed(settings: Settings, report: Report) -> None:
    """Measure the limits, then round after round."""
    rows = [Row(*row) for row in ROWS]
    if settings.quick:
        rows = [Row("resnet18", "conv1,avgpool", "fp32")]
    limits = measure_limits(settings, report, rows)
    if limits is None:
        return
    for row in rows:
        row.images = choose_count(settings, row)
    with Contestants(settings, report) as contestants:
        for number in range(1, 3 if settings.quick else 100):
            if not run_round(settings, report, rows, number, contestants, limits):
                break
            if number == 2:
                measure_whole(settings, report, rows[0])
    show(report, rows, limits, settings)
    if unmeasured := [row.name for row in rows if not row.steady.get("hookx")]:
        report.left_out.append(f"rows: {', '.join(unmeasured)}")
    for name in ("hand-written", "fx"):
        if missing := [row for row in rows if row.steady.get("hookx") and not row.steady.get(name)]:
            missing = [row for row in missing if name not in row.problems]
            report.left_out += [f"{name}: {len(missing)} rows"] * bool(missing)


# --- limits --------------------------------------------------------------------------------------------------------


def measure_limits(settings: Settings, report: Report, rows: list[Row]) -> dict[str, Any] | None:
    """Fill in the limits of every row; return the measurements, or None if they failed."""
    seconds = "0.1" if settings.quick else "0.5"
    photographs = ["--photographs", str(settings.photographs), "--seconds", seconds]
    commands = {
        "decode": ["decode", *photographs],
        "disk": ["disk", "--scratch", str(settings.scratch), "--seconds", seconds],
        "device": ["device", "--device", settings.device, *photographs],
    }
    for row in rows:
        commands["device"] += ["--row", row.model, row.layers, row.precision]
    found: dict[str, Any] = {}
    for name, command in commands.items():
        done = subprocess.run(
            [sys.executable, "-m", "gpu_check.limits", *command],
            text=True,
            capture_output=True,
            check=False,
        )
        if done.returncode:
            report.problems.append(f"limit {name}: {done.stderr.strip().splitlines()[-1:]}")
            return None
        found[name] = json.loads(done.stdout.splitlines()[-1])
    for row, measured in zip(rows, found["device"]["rows"], strict=True):
        row.bytes_per_image = measured["bytes_per_image"]
        row.limits = {
            "decode": found["decode"]["images_per_second"],
            "forward": measured["images_per_second"],
            "write": found["disk"]["bytes_per_second"] / row.bytes_per_image,
        }
        if settings.on_gpu:
            row.limits["copy"] = found["device"]["copies"]["bytes_per_second"] / row.bytes_per_image
            row.limits["nvjpeg"] = found["device"]["nvjpeg"]["images_per_second"]
    return found


def choose_count(settings: Settings, row: Row) -> int:
    """Return how many images keep the slowest part busy for some seconds, as far as memory and disk allow."""
    if settings.quick:
        return 8
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    most_bytes = min(MOST_BYTES, memory_bytes // 8, shutil.disk_usage(settings.scratch).free // 4)
    part = row.bound_by("hookx")
    # A disk may be faster for a run than for the measurement of its limit.
    seconds = SECONDS_OF_WRITING if part == "write" else SECONDS_OF_WORK
    wanted = int(seconds * row.limits[part]) // BATCH * BATCH
    return max(BATCH, min(wanted, MOST_IMAGES, most_bytes // row.bytes_per_image))


# --- rounds --------------------------------------------------------------------------------------------------------


class Contestants:
    """One warm process for each contestant, started when it is first needed."""

    def __init__(self, settings: Settings, report: Report) -> None:
        self._settings, self._report = settings, report
        self._processes: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> Contestants:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()

    def measure(self, name: str, row: Row, images: Path, out: Path) -> dict[str, Any]:
        """Run a contestant once; return its answer, or the error that ended it."""
        if name not in self._processes:
            process = self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", "gpu_check.contestant", name],
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=None,  # What is printed there is shown if this step fails.
            )
            # The first pass of a process loads kernels, which belongs to no measurement.
            warm = out.with_name(f"{out.name}-warm")
            first = link_images(self._settings.photographs, out.with_name(f"{out.name}-images"), 8)
            self._ask(process, name, row, first, warm)
            shutil.rmtree(warm, ignore_errors=True)
        return self._ask(self._processes[name], name, row, images, out)

    def _ask(self, process: subprocess.Popen[str], name: str, row: Row, images: Path, out: Path) -> dict[str, Any]:
        assert process.stdin is not None and process.stdout is not None
        request = Request(
            *(row.model, row.layers, row.precision, self._settings.device, WORKERS, BATCH, str(images), str(out))
        )
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(asdict(request)) + "\n")
            process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], max(1.0, self._report.seconds_left - 2))
        answer = process.stdout.readline() if ready else ""
        if answer:
            return dict(json.loads(answer))
        process.kill()
        exit_code = process.wait()
        del self._processes[name]
        return {"error": f"its process crashed (exit code {exit_code})" if ready else "no time was left for its end"}


def run_round(
    settings: Settings, report: Report, rows: list[Row], number: int, contestants: Contestants, limits: dict[str, Any]
) -> bool:
    """Run the contestants of a round in every row; return False if there was no time for one."""
    for row in rows:
        folder = settings.scratch / "row"
        images, ours = link_images(settings.photographs, folder / "images", row.images), folder / "hookx"
        try:
            for name in row.contestants(number):
                if name in row.problems:
                    continue
                # A warm process takes about this long beside its work, and a script by hand 3 times as long for that.
                expected = 5 + 3 * row.images / row.limits[row.bound_by(name)]
                if expected > report.seconds_left and not settings.quick:
                    return False
                answer = contestants.measure(name, row, images, folder / name)
                note(row, name, number, answer)
                if name != "hookx":
                    if "error" not in answer and number <= 2:
                        check_agreement(row, name, ours, folder / name)
                    shutil.rmtree(folder / name, ignore_errors=True)
                show(report, rows, limits, settings)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.sync()
    return True


def note(row: Row, name: str, number: int, answer: Mapping[str, Any]) -> None:
    """Note what a contestant answered."""
    if "error" in answer:
        row.problems[name] = str(answer["error"])
        return
    row.steady.setdefault(name, {})[number] = row.images / answer["seconds"]
    row.flushed.setdefault(name, {})[number] = row.images / answer.get("seconds_flushed", answer["seconds"])
    if "busy" in answer:
        row.busy.setdefault(name, []).append(answer["busy"])


def measure_whole(settings: Settings, report: Report, row: Row) -> None:
    """Measure hookx and the script by hand as processes, from their start to their exit."""
    folder = settings.scratch / "whole"
    images = link_images(settings.photographs, folder / "images", row.images)
    what = ["--model", row.model, "--layers", row.layers, "--device", settings.device, "--precision", row.precision]
    script = [sys.executable, str(SCRIPTS / "benchmark_contestants.py"), "hand-written", "--batch-size", str(BATCH)]
    commands = {
        "hookx": [sys.executable, "-m", "hookx", "extract", "--weights", "none", "--quiet"],
        "hand-written": script,
    }
    for name, command in commands.items():
        if report.seconds_left < 20 + 2 * row.images / row.limits[row.bound_by(name)] and not settings.quick:
            report.left_out.append(f"whole processes: {name}")
            break
        out = folder / name
        if name != "hookx":
            out.mkdir()
        command = [*command, *what, "--workers", str(WORKERS), "--out", str(out), str(images)]
        start = time.perf_counter()
        done = subprocess.run(command, text=True, capture_output=True, check=False)
        if done.returncode:
            row.problems[name] = f"as a process: {done.stderr.strip().splitlines()[-1:]}"
        row.whole.setdefault(name, {})[1] = row.images / (time.perf_counter() - start)
        shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(folder)


def check_agreement(row: Row, contestant: str, ours: Path, out: Path) -> None:
    tolerance = NVJPEG_TOLERANCE if contestant == "nvjpeg" else TOLERANCE[row.precision]
    try:
        difference = largest_difference(ours, out, COMPARED_ROWS)
    except ValueError as error:
        row.problems[contestant] = f"wrong: {error}"
        return
    if difference > tolerance:
        row.problems[contestant] = f"wrong: differs by {difference:.2g} of a row's largest value"


# --- figures -------------------------------------------------------------------------------------------------------


def number_text(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def goals_of(rows: list[Row]) -> list[tuple[str, float, float]]:
    """Return each goal that the measurements decide: what, measured, at least."""
    goals = []
    for row in rows:
        for contestant in ("hookx", "nvjpeg"):
            if measured := row.busy.get(contestant, []):
                shares = [max(one.values()) for one in measured]
                part = max(measured[-1], key=lambda part: measured[-1][part])
                what = f"{row.name}{', nvjpeg' * (contestant == 'nvjpeg')}: busy share of the slowest part ({part})"
                goals.append((what, statistics.median(shares), BUSY))
    for layers, least in (("conv1,avgpool", FIRST), ("avgpool", POOLED)):
        for row in rows:
            if row.layers == layers and (ratio := row.ratio("hookx", "hand-written")) is not None:
                goals.append((f"{row.name}: hookx/hand-written", ratio, least))
    for row in rows:
        if (ratio := row.ratio("nvjpeg", "hookx")) is not None:
            goals.append((f"{row.name}: nvjpeg/Pillow", ratio, NVJPEG))
    return goals


def describe(row: Row) -> list[str]:
    """Return the lines of a row: every contestant, and the limits."""
    lines = [f"{row.name}: {row.images:,} images, {row.bytes_per_image:,} bytes each"]
    for name in ("hookx", "nvjpeg", "hand-written", "fx"):
        if name in row.problems:
            lines.append(f"  {name:12} {row.problems[name][:140]}")
        elif rates := row.steady.get(name):
            steady = statistics.median(rates.values())
            text = f"  {name:12} {number_text(steady):>7}/s"
            if whole := row.whole.get(name):
                text += f" (whole process {number_text(whole[1])})"
            if name in row.busy:
                part = row.bound_by(name)
                busy = " ".join(f"{part} {share:.0%}" for part, share in row.busy[name][-1].items())
                text += f", {steady / row.limits[part]:.0%} of {part}; busy: {busy}"
            else:
                ratios = [number_text(row.ratio("hookx", name, how)) for how in ("steady", "flushed")]
                text += f"; hookx/this {ratios[0]}, flushed {ratios[1]}"
            lines.append(text)
    lines.append("  alone        " + ", ".join(f"{part} {number_text(rate)}" for part, rate in row.limits.items()))
    return lines


def show(report: Report, rows: list[Row], limits: Mapping[str, Any], settings: Settings) -> None:
    """Put everything that was measured so far into the report."""
    report.lines = [line for row in rows if row.steady or row.problems for line in describe(row)]
    goals = goals_of(rows) if settings.on_gpu else []
    missed = [goal for goal in goals if goal[1] < goal[2]]
    report.lines += [
        f"goal {'met' if measured >= least else 'MISSED'}: {what} {measured:.2f} (at least {least:g})"
        for what, measured, least in goals
        if least != BUSY
    ]
    report.problems = [f"{row.name}, {name}: {why}" for row in rows for name, why in row.problems.items()]
    report.problems += [f"goal missed: {what} {measured:.2f} (at least {least:g})" for what, measured, least in missed]
    measured_rows = [row for row in rows if row.steady.get("hookx")]
    report.figure = f"{len(goals) - len(missed)} of {len(goals)} goals met in {len(measured_rows)} of {len(rows)} rows"
    report.figures = {
        "limits": dict(limits),
        "goals": [{"what": what, "measured": measured, "at least": least} for what, measured, least in goals],
        "rows": [{"name": row.name, **vars(row)} for row in rows],
    }
    report.save()
