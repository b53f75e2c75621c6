"""Step of scripts/gpu-check about speed: hookx, other ways and the limits of the machine, and the goals.

The words are those of scripts/benchmark.py: 'steady' is from ready to written, 'whole' is the process from its start to
its exit. A row of the table is a model, its layers and a precision. Every contestant runs once in a round, as a process
of its own, on the same images with the same random weights; there are as many rounds as the time allows, and the ratios
are paired and their medians shown. In the first round the rows that the others stored are compared with those of hookx.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmark import CORES, Finished, largest_difference

from gpu_check.runs import link_images
from gpu_check.step import Report, Settings

SCRIPTS = Path(__file__).resolve().parents[1]
BATCH = 64
VIT_BLOCKS = ",".join(f"encoder.layers.encoder_layer_{number}@cls" for number in range(12))
# Different kernels and memory formats add in another order; bf16 has 8 significant bits.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.06}
NVJPEG_TOLERANCE = 0.1
COMPARED_ROWS = 64
SECONDS_OF_WORK = 5.0
MOST_BYTES = 6 * 10**9  # The script by hand holds them in memory, twice.
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
    steady: dict[str, list[float]] = field(default_factory=dict)  # images per second, by contestant and round
    whole: dict[str, list[float]] = field(default_factory=dict)
    flushed: dict[str, list[float]] = field(default_factory=dict)
    busy: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)  # why a contestant is not timed

    @property
    def name(self) -> str:
        return f"{self.model} {self.shown or self.layers} {self.precision}"

    @property
    def contestants(self) -> list[str]:
        return ["hookx", *(["nvjpeg"] if self.has_nvjpeg else []), "hand-written", "fx"]

    def bound_by(self, contestant: str) -> str:
        """Return the slowest part."""
        decoder = "nvjpeg" if contestant == "nvjpeg" else "decode"
        parts = [decoder, *(part for part in self.limits if part not in ("decode", "nvjpeg"))]
        return min(parts, key=lambda part: self.limits[part])

    def ratio(self, one: str, other: str, how: str = "steady") -> float | None:
        """Return the median of the paired ratios of two contestants."""
        rates = getattr(self, how)
        pairs = list(zip(rates.get(one, []), rates.get(other, []), strict=False))
        return statistics.median(a / b for a, b in pairs) if pairs else None


ROWS = [
    ("resnet18", "avgpool", "fp32", "", True),
    ("resnet18", "conv1,avgpool", "fp32", "", False),
    ("resnet18", "avgpool", "bf16", "", True),
    ("vit_b_16", VIT_BLOCKS, "fp32", "blocks@cls", False),
    ("resnet18", "layer3@mean23", "fp32", "", False),
    ("resnet18", "conv1,avgpool", "bf16", "", False),
    ("vit_b_16", VIT_BLOCKS, "bf16", "blocks@cls", False),
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
    longest: dict[str, float] = {}
    rounds = 0
    while not settings.quick or not rounds:
        rounds += 1
        for row in rows:
            if not run_round(settings, report, row, rounds, longest):
                break
            show(report, rows, limits, settings)
        else:
            continue
        break
    show(report, rows, limits, settings)
    unmeasured = [row.name for row in rows if len(row.steady.get("hookx", [])) == 0]
    if unmeasured:
        report.left_out.append(f"rows: {', '.join(unmeasured)}")


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
    slowest = row.limits[row.bound_by("hookx")]
    wanted = int(SECONDS_OF_WORK * slowest) // BATCH * BATCH
    return max(BATCH, min(wanted, MOST_IMAGES, most_bytes // row.bytes_per_image))


# --- rounds --------------------------------------------------------------------------------------------------------


def run_round(settings: Settings, report: Report, row: Row, number: int, longest: dict[str, float]) -> bool:
    """Run every contestant of a row once; return False if there is no time for the next one."""
    folder = settings.scratch / "row"
    images = link_images(settings.photographs, folder / "images", row.images)
    ours = folder / "hookx"
    try:
        for contestant in row.contestants:
            if contestant in row.problems:
                continue
            if longest.get(contestant, 12.0) * 1.3 + 3 > report.seconds_left and not settings.quick:
                if number == 1:
                    report.left_out.append(f"{row.name}: {contestant}")
                return False
            out = folder / contestant
            finished = run_contestant(settings, report, row, contestant, images, out)
            if finished is None:
                continue
            longest[contestant] = max(longest.get(contestant, 0.0), finished.seconds)
            if number == 1 and contestant != "hookx" and out.exists() and ours.exists():
                check_agreement(row, contestant, ours, out)
            if contestant != "hookx" or number > 1:
                shutil.rmtree(out, ignore_errors=True)
        return True
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.sync()


def run_contestant(
    settings: Settings, report: Report, row: Row, contestant: str, images: Path, out: Path
) -> Finished | None:
    """Run one contestant and note its speed; None if it failed."""
    workers = max(1, CORES - 1)
    what = ["--model", row.model, "--layers", row.layers, "--device", settings.device, "--precision", row.precision]
    what += ["--workers", str(workers), "--out", str(out), str(images)]
    if contestant in ("hookx", "nvjpeg"):
        options = ["--decode", "nvjpeg"] if contestant == "nvjpeg" else []
        command = [sys.executable, "-m", "hookx", "extract", "--weights", "none", "--json", *options, *what]
    else:
        out.mkdir()
        script = str(SCRIPTS / "benchmark_contestants.py")
        command = [sys.executable, script, contestant, "--batch-size", str(BATCH), *what]
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command, text=True, capture_output=True, check=False, timeout=max(1.0, report.seconds_left - 2)
        )
    except subprocess.TimeoutExpired:
        row.problems[contestant] = "it did not finish in the time that was left"
        return None
    finished = Finished(done.returncode, done.stdout, done.stderr, time.perf_counter() - start, 0.0, None)
    if finished.exit_code:
        row.problems[contestant] = finished.last_words
        return None
    document = json.loads(done.stdout.splitlines()[-1] if contestant not in ("hookx", "nvjpeg") else done.stdout)
    seconds = float(document["seconds_total" if contestant in ("hookx", "nvjpeg") else "seconds"])
    row.steady.setdefault(contestant, []).append(row.images / seconds)
    row.whole.setdefault(contestant, []).append(row.images / finished.seconds)
    row.flushed.setdefault(contestant, []).append(row.images / float(document.get("seconds_flushed", seconds)))
    if "busy" in document:
        row.busy.setdefault(contestant, []).append(document["busy"])
    return finished


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


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def goals_of(rows: list[Row]) -> list[tuple[str, float, float]]:
    """Return each goal that the measurements decide: what, measured, at least."""
    goals = []
    for row in rows:
        for contestant in ("hookx", "nvjpeg"):
            if measured := row.busy.get(contestant):
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
    for contestant in row.contestants:
        if contestant in row.problems:
            lines.append(f"  {contestant:12} {row.problems[contestant][:140]}")
        elif row.steady.get(contestant):
            steady, whole = (statistics.median(rates[contestant]) for rates in (row.steady, row.whole))
            text = f"  {contestant:12} {number(steady):>7}/s steady {number(whole):>7} whole"
            if contestant in row.busy:
                part = row.bound_by(contestant)
                busy = " ".join(f"{name} {share:.0%}" for name, share in row.busy[contestant][-1].items())
                text += f"; {steady / row.limits[part]:.0%} of the limit ({part}); busy: {busy}"
            else:
                ratios = [row.ratio("hookx", contestant, how) for how in ("steady", "whole", "flushed")]
                text += f"; hookx/this {number(ratios[0])} steady {number(ratios[1])} whole {number(ratios[2])} flushed"
            lines.append(text)
    lines.append("  limits       " + ", ".join(f"{part} {number(rate)}/s" for part, rate in row.limits.items()))
    return lines


def show(report: Report, rows: list[Row], limits: Mapping[str, Any], settings: Settings) -> None:
    """Put everything that was measured so far into the report."""
    report.lines = [line for row in rows if row.steady or row.problems for line in describe(row)]
    goals = goals_of(rows) if settings.on_gpu else []
    missed = [goal for goal in goals if goal[1] < goal[2]]
    report.lines += [
        f"goal {'met' if measured >= least else 'MISSED'}: {what} {measured:.2f} (at least {least:g})"
        for what, measured, least in goals
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
