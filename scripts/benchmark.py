#!/usr/bin/env python
"""Measure the speed and memory of hookx on the CPU, against six other ways and against the limits of the machine.

    scripts/benchmark.py --quick                                           a check that all parts work, 1 to 2 minutes
    scripts/benchmark.py --models resnet18 --layers pooled                 one row of the table, some minutes
    scripts/benchmark.py --json speed.json --picture speed.svg             the whole table, some hours on 2 cores
    scripts/benchmark.py --models resnet18 --layers pooled first --count 1000       the goal for memory
    scripts/benchmark.py --models efficientnet_b0 densenet121 convnext_tiny --layers pooled
    scripts/benchmark.py --models regnet_y_400mf --layers stem,avgpool     any model and layers
    scripts/benchmark.py --models resnet18 --layers pooled --contestants hookx hookx-devices --count 6000

Install the dependencies with `scripts/setup bench`, and run it on an otherwise idle machine. The contestants are the
functions of scripts/benchmark_contestants.py. scripts/benchmark_report.py redraws the picture from the JSON.

A row of the table is a model and a set of layers. First, every contestant runs once, untimed: the script records its
memory and compares everything it stored with what hookx stored. A contestant that disagrees is reported as wrong and
not timed. Then come the rounds. In each round every contestant runs once, one after the other, and then the limits.
Every run is a separate process on the same images (by then in the page cache) with the same random weights. Its output
is removed and the disk is flushed before the next run. hookx and torchlens flush their output to the disk before they
finish; the others do not.

- steady: images divided by the seconds from 'ready' (imported, built, hooked; no image read) to 'done' (written). For
  hookx this is `seconds_total` of its own report, which starts when all checks are done.
- whole: images divided by the seconds from the start of the process to its exit.
- CPU: user and system seconds per image, for the process and all its descendants, imports included.
- memory: the peak of the summed proportional set sizes (PSS, Linux; shared pages count once) of the process tree, or of
  the unique set sizes (USS) where there is no PSS; sampled every 50 ms.
- ratios are paired: hookx and another contestant in the same round. The table shows the median over the rounds, and the
  lowest and highest.

The limits (scripts/benchmark_limits.py) are decode only, forward only and write only. From them follows the bound of a
program that wastes nothing: no core idles, nothing is done twice, and the disk is busy while the cores work. C cores
decode D images per second in total, so decoding costs C/D core-seconds per image, and forward passes cost C/F. Writing
the bytes of an image takes t seconds by the clock, w of them core-seconds that the kernel spends copying. All three
compete for the same cores, so an image takes at least (C/D + C/F + w)/C = 1/D + 1/F + w/C seconds. The t - w seconds
that the writer waits for the disk compete with nothing, but they cannot be shortened: the disk has to take the bytes.
In images per second,

    bound = 1 / max(1/D + 1/F + w/C, t - w)

A program can exceed the bound only if it decodes, computes or writes with fewer instructions than the limits do.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_report import Spread, bound_of, draw, goals_of, ratios_of, sentence_of, table_of
from numpy.typing import NDArray
from PIL import Image

SCRIPTS = Path(__file__).resolve().parent
PHOTOGRAPHS = SCRIPTS.parent / "images"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

BY_HAND = ["hand-written", "fx", "naive", "torchhook", "torchextractor", "torchlens"]
OF_HOOKX = {"hookx": [], "hookx-bf16": ["--precision", "bf16"]}
# Several processes in place of one, which costs their starts and the handing out: compare the CPU seconds of a minute.
MANY_WORKERS = {"hookx-devices": ["--devices", f"cpu*{CORES}", "--shard-images", "256"]}
# Largest accepted difference, relative to the largest value of a row. Batch sizes, memory formats and kernels change
# the order of sums; bf16 has 8 significant bits.
TOLERANCE = {"hookx-bf16": 0.05}
ROUNDING = 1e-4


@dataclass(frozen=True)
class Model:
    """The layers in each set, and the number of images that keeps 2 cores busy for about ten seconds."""

    images: int
    pooled: str
    first: str
    early: str
    middle: str

    def layers(self, name: str) -> str:
        sets = {
            "pooled": self.pooled,
            "first+pooled": f"{self.first},{self.pooled}",
            "early": self.early,
            "first": self.first,
            "middle": self.middle,
            "convolutions": "type:Conv2d",
        }
        return sets[name]


SETS = ["pooled", "first+pooled", "early", "first", "middle", "convolutions"]
MODELS = {
    "resnet18": Model(500, "avgpool", "conv1", "layer1", "layer2@mean23"),
    "resnet50": Model(200, "avgpool", "conv1", "layer1", "layer2@mean23"),
    "vit_b_16": Model(
        64, "encoder.ln@cls", "conv_proj", "encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_5@mean1"
    ),
    "mobilenet_v3_small": Model(1000, "avgpool", "features.0", "features.1", "features.6@mean23"),
    "efficientnet_b0": Model(300, "avgpool", "features.0", "features.1", "features.4@mean23"),
    "densenet121": Model(200, "classifier/in", "features.conv0", "features.denseblock1", "features.denseblock2@mean23"),
    "convnext_tiny": Model(150, "avgpool", "features.0", "features.1", "features.3@mean23"),
}
DEFAULT_MODELS = ["resnet18", "resnet50", "vit_b_16", "mobilenet_v3_small"]
OTHER_IMAGES = 200
# Most contestants hold all activations in memory, some of them twice.
MAX_BYTES = 2 * 10**9


# --- images --------------------------------------------------------------------------------------------------------


def make_images(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Make photographs of about 500 x 375 pixels: scaled and partly mirrored crops of the project's photographs."""
    choose = random.Random(seed)
    photographs = []
    for file in sorted(PHOTOGRAPHS.rglob("*.jpg")):
        with Image.open(file) as image:
            photographs.append(image.convert("RGB"))
    files = []
    for number in range(count):
        photograph = choose.choice(photographs)
        width, height = (500, 375) if choose.random() < 0.75 else (375, 500)
        width, height = width + choose.randint(-25, 25), height + choose.randint(-25, 25)
        scale = min(photograph.width / width, photograph.height / height) * choose.uniform(0.6, 1)
        left = choose.uniform(0, photograph.width - scale * width)
        top = choose.uniform(0, photograph.height - scale * height)
        box = (left, top, left + scale * width, top + scale * height)
        made = photograph.resize((width, height), Image.Resampling.BICUBIC, box)
        if choose.random() < 0.5:
            made = made.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        files.append(folder / f"{number:06}.jpg")
        made.save(files[-1], quality=95)
    return files


def list_images(folder: Path) -> list[Path]:
    suffixes = {".jpg", ".jpeg", ".png", ".webp"}
    files = sorted(file.resolve() for file in folder.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
    if not files:
        raise SystemExit(f"error: no images in {folder}")
    return files


def link_images(files: Sequence[Path], folder: Path) -> Path:
    """Make a flat folder of links to the images, named so that every contestant sorts them in the same order."""
    folder.mkdir()
    for number, file in enumerate(files):
        (folder / f"{number:06}{file.suffix}").symlink_to(file)
    return folder


# --- one run of one contestant -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    """A process that exited, and what it used."""

    exit_code: int
    stdout: str
    stderr: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int | None  # None unless memory was watched

    @property
    def last_words(self) -> str:
        lines = self.stderr.strip().splitlines()
        return lines[-1][:100] if lines else f"exit code {self.exit_code}"


def run(command: Sequence[str], *, watch_memory: bool = False) -> Finished:
    """Run a command until it exits. Watching memory slows it down, so do not time that run."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HOOKX_")}
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        start, peak_bytes = time.perf_counter(), 0
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment)
        try:
            # Only wait4 reports the CPU seconds of a single child, including the descendants that it waited for.
            pid, status, usage = os.wait4(process.pid, os.WNOHANG if watch_memory else 0)
            while pid == 0:
                peak_bytes = max(peak_bytes, memory_of_tree(process.pid))
                time.sleep(0.05)
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            seconds = time.perf_counter() - start
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if process.returncode is None:
                process.kill()
                process.wait()
        stdout.seek(0)
        stderr.seek(0)
        return Finished(
            exit_code=process.returncode,
            stdout=stdout.read().decode(),
            stderr=stderr.read().decode(errors="replace"),
            seconds=seconds,
            cpu_seconds=usage.ru_utime + usage.ru_stime,
            peak_bytes=peak_bytes if watch_memory else None,
        )


def memory_of_tree(pid: int) -> int:
    """Return the memory of a process and its descendants in bytes, counted as the docstring of this file says."""
    import psutil

    total = 0
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in processes:
        try:
            info = process.memory_full_info()
            total += getattr(info, "pss", info.uss)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            pass  # It exited after it was listed.
    return total


@dataclass(frozen=True)
class Request:
    """A model, some of its layers, and a number of images."""

    model: str
    layers: str  # name of a set, or selectors
    selectors: str
    images: int


@dataclass(frozen=True)
class Row(Request):
    """A row of the table: the request, and what it means according to hookx."""

    addresses: tuple[str, ...]
    bytes_per_image: int


def command_of_hookx(request: Request, images: Path, out: Path, *options: str) -> list[str]:
    what = ["--model", request.model, "--layers", request.selectors, "--weights", "none", "--device", "cpu"]
    return [sys.executable, "-m", "hookx", "extract", *what, "--json", *options, "--out", str(out), str(images)]


def is_hookx(contestant: str) -> bool:
    return contestant in OF_HOOKX | MANY_WORKERS


def command_of(contestant: str, row: Row, images: Path, out: Path) -> list[str]:
    if is_hookx(contestant):
        return command_of_hookx(row, images, out, *(OF_HOOKX | MANY_WORKERS)[contestant])
    what = ["--model", row.model, "--layers", ",".join(row.addresses), "--out", str(out), str(images)]
    return [sys.executable, str(SCRIPTS / "benchmark_contestants.py"), contestant, *what]


def steady_seconds(contestant: str, finished: Finished) -> float:
    document = json.loads(finished.stdout)
    return float(document["seconds_total" if is_hookx(contestant) else "seconds"])


# --- agreement -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """The rows of one layer in one file. numpy has no bf16, so such rows are the upper halves of fp32 numbers."""

    values: NDArray[Any]
    is_bf16: bool

    def rows(self) -> Iterator[NDArray[np.float32]]:
        for row in self.values:
            if self.is_bf16:
                yield (np.ravel(row).astype(np.uint32) << 16).view(np.float32)
            else:
                yield np.ravel(row).astype(np.float32)


def map_stored(folder: Path) -> dict[str, list[Stored]]:
    """Map every tensor in a folder of safetensors files into memory, by layer in the order of the files."""
    types = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "U8": "u1"}
    arrays: dict[str, list[Stored]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as opened:
            header_bytes = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(header_bytes))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            offset = 8 + header_bytes + entry["data_offsets"][0]
            values: NDArray[Any] = np.memmap(file, types[entry["dtype"]], "r", offset, tuple(entry["shape"]))
            # torchlens does not allow a slash in a name, so its contestant writes | instead.
            arrays.setdefault(name.replace("|", "/"), []).append(Stored(values, entry["dtype"] == "BF16"))
    return arrays


def largest_difference(ours: Path, theirs: Path, most_rows: int | None = None) -> float:
    """Return the largest difference between two folders of activations, relative to the largest value of its row.

    Args:
        ours: safetensors files with the rows that the others are compared with.
        theirs: safetensors files with the same rows, cut into files in any way.
        most_rows: compare only the first rows of each layer.

    Raises:
        ValueError: the layers, the shapes or the numbers of rows differ.
    """
    a, b = map_stored(ours), map_stored(theirs)
    if a.keys() != b.keys():
        raise ValueError(f"stored {', '.join(sorted(b)) or 'nothing'} instead of {', '.join(sorted(a))}")
    largest = 0.0
    for address in a:
        shapes = [
            [sum(len(part.values) for part in parts), *parts[0].values.shape[1:]] for parts in (a[address], b[address])
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(f"'{address}' is {shapes[1]} instead of {shapes[0]}")
        rows, others = (itertools.chain.from_iterable(part.rows() for part in parts[address]) for parts in (a, b))
        pairs = itertools.islice(zip(rows, others, strict=True), most_rows)
        for row, other in pairs:
            difference, scale = float(np.abs(row - other).max(initial=0)), float(np.abs(row).max(initial=0))
            if not difference <= 0:  # Also true for NaN.
                largest = max(largest, difference / scale if scale > 0 and math.isfinite(difference) else math.inf)
    return largest


# --- the rounds of one row -----------------------------------------------------------------------------------------


@dataclass
class Contestant:
    """Measurements of a contestant: once untimed, then in every round."""

    name: str
    status: str = "agrees"  # or 'wrong' or 'cannot'
    reason: str = ""
    largest_difference: float | None = None
    peak_bytes: int | None = None
    bytes_written: int | None = None
    steady: list[float] = field(default_factory=list)  # images per second, by round
    whole: list[float] = field(default_factory=list)
    cpu_seconds_per_image: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Measured:
    """A row and all its rounds."""

    row: Row
    contestants: dict[str, Contestant]
    limits: list[dict[str, dict[str, Any]]]  # by round


def measure(request: Request, names: Sequence[str], rounds: int, files: Sequence[Path], seconds: float) -> Measured:
    """Compare each contestant of a row with hookx, then time those that agree in turn."""
    contestants = {name: Contestant(name) for name in dict.fromkeys(["hookx", *names])}
    others = [one for name, one in contestants.items() if name != "hookx"]
    with tempfile.TemporaryDirectory(prefix="hookx-benchmark-") as scratch:
        place = Path(scratch)
        images, ours = link_images(files[: request.images], place / "images"), place / "hookx"
        log(f"{request.model} {request.layers}: hookx")
        row = run_reference(contestants["hookx"], request, images, ours)
        check_disk(row, place)
        for contestant in others:
            log(f"{request.model} {request.layers}: comparing {contestant.name}")
            check(contestant, row, images, place / "out", ours)
            remove(place / "out")
        for shard in ours.glob("*.safetensors"):
            shard.unlink()  # plan.json stays, because the limits read it.
        os.sync()

        def limits(*options: str) -> dict[str, dict[str, Any]]:
            script = [str(SCRIPTS / "benchmark_limits.py"), "--run", str(ours), "--seconds", str(seconds)]
            finished = run([sys.executable, *script, *options, str(images)])
            if finished.exit_code:
                raise SystemExit(f"error: cannot measure the limits: {finished.last_words}")
            return dict(json.loads(finished.stdout))

        by_round: list[dict[str, dict[str, Any]]] = []
        for number in range(1, rounds + 1):
            for contestant in contestants.values():
                if contestant.status == "agrees":
                    log(f"{row.model} {row.layers}: round {number} of {rounds}, {contestant.name}")
                    time_once(contestant, row, images, place / "out")
                    remove(place / "out")
            log(f"{row.model} {row.layers}: round {number} of {rounds}, limits")
            # The first round finds the fastest kind of forward pass; the others repeat only that one.
            by_round.append(limits(*(["--pass", by_round[0]["forward"]["pass"]] if by_round else [])))
            os.sync()
    return Measured(row, contestants, by_round)


def run_reference(hookx: Contestant, request: Request, images: Path, out: Path) -> Row:
    """Run hookx once and record its memory. Its output is the reference for the others."""
    finished = run(command_of_hookx(request, images, out), watch_memory=True)
    if finished.exit_code:
        raise SystemExit(finished.stderr.strip())
    hookx.peak_bytes, hookx.bytes_written = finished.peak_bytes, bytes_in(out)
    document = json.loads(finished.stdout)
    addresses = tuple(layer["address"] for layer in document["layers"])
    return Row(**asdict(request), addresses=addresses, bytes_per_image=document["bytes"] // request.images)


def check(contestant: Contestant, row: Row, images: Path, out: Path, ours: Path) -> None:
    """Run a contestant once; record its memory and whether it stored the same values as hookx."""
    if contestant.name in BY_HAND:
        out.mkdir()  # hookx creates its own.
        # torchlens is the only one that does not hold all activations in memory.
        if contestant.name != "torchlens" and (lacking := bytes_lacking(row)) > 0:
            contestant.status, contestant.reason = "cannot", f"needs {lacking:,} bytes more memory than is available"
            return
    finished = run(command_of(contestant.name, row, images, out), watch_memory=True)
    if finished.exit_code:
        contestant.status, contestant.reason = "cannot", finished.last_words
        return
    contestant.peak_bytes, contestant.bytes_written = finished.peak_bytes, bytes_in(out)
    try:
        contestant.largest_difference = largest_difference(ours, out)
    except ValueError as error:
        contestant.status, contestant.reason = "wrong", str(error)
        return
    if contestant.largest_difference > TOLERANCE.get(contestant.name, ROUNDING):
        contestant.status = "wrong"
        contestant.reason = f"differs by {contestant.largest_difference:.2g} of a row's largest value"


def time_once(contestant: Contestant, row: Row, images: Path, out: Path) -> None:
    if contestant.name in BY_HAND:
        out.mkdir()
    finished = run(command_of(contestant.name, row, images, out))
    if finished.exit_code:
        if contestant.name == "hookx":
            raise SystemExit(finished.stderr.strip())
        contestant.status, contestant.reason = "cannot", finished.last_words
        return
    contestant.whole.append(row.images / finished.seconds)
    contestant.steady.append(row.images / steady_seconds(contestant.name, finished))
    contestant.cpu_seconds_per_image.append(finished.cpu_seconds / row.images)


def bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def bytes_lacking(row: Row) -> int:
    """Return how much memory is missing to hold all activations twice (a list, and its concatenation) and 1 GiB."""
    import psutil

    return int(2 * row.images * row.bytes_per_image + 2**30 - psutil.virtual_memory().available)


def check_disk(row: Row, folder: Path) -> None:
    needed, free = row.images * row.bytes_per_image, shutil.disk_usage(folder).free
    if needed > free:
        raise SystemExit(
            f"error: {row.model} {row.layers} needs {needed:,} bytes in {folder.parent}; only {free:,} are free\n"
            "  use fewer images: --count N    or another disk: TMPDIR=..."
        )


def remove(folder: Path) -> None:
    """Remove an output and flush the disk, so that no contestant waits for the writes of another."""
    shutil.rmtree(folder, ignore_errors=True)
    os.sync()


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- figures -------------------------------------------------------------------------------------------------------


def document_of(measured: Measured) -> dict[str, Any]:
    """Return the measurements of a row as plain JSON values."""
    contestants: dict[str, dict[str, Any]] = {}
    for name, one in measured.contestants.items():
        contestants[name] = {
            "status": one.status,
            "reason": one.reason,
            "largest_difference": one.largest_difference,
            "peak_bytes": one.peak_bytes,
            "bytes_written": one.bytes_written,
        }
        if one.status == "agrees":
            contestants[name] |= {
                "images_per_second": {"steady": asdict(Spread.of(one.steady)), "whole": asdict(Spread.of(one.whole))},
                "cpu_seconds_per_image": asdict(Spread.of(one.cpu_seconds_per_image)),
            }
    limits: dict[str, Any] = {
        f"{name} only": asdict(Spread.of([of[name]["images_per_second"] for of in measured.limits]))
        for name in ("decode", "forward", "write")
    }
    limits["forward only"]["pass"] = measured.limits[0]["forward"]["pass"]
    limits["write only"]["cpu_seconds_per_image"] = asdict(
        Spread.of([of["write"]["cpu_seconds_per_image"] for of in measured.limits])
    )
    limits["hookx's writer"] = asdict(Spread.of([of["hookx_write"]["images_per_second"] for of in measured.limits]))
    limits["bound"] = asdict(Spread.of([bound_of(of, CORES) for of in measured.limits]))
    return {
        **asdict(measured.row),
        "cores": CORES,
        "contestants": contestants,
        "limits": limits,
        "ratios": ratios_of(contestants, limits),
    }


# --- the command ---------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Describe the machine and the versions that the figures come from."""
    import psutil

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    packages = ["hookx-vision", "torch", "torchvision", "pillow", "torchhook", "torchextractor", "torchlens"]
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": CORES,
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


def selectors_of(model: str, layers: str) -> str:
    if layers not in SETS:
        return layers
    if model not in MODELS:
        raise SystemExit(
            f"error: the set '{layers}' is not defined for {model}: name its layers, as in --layers conv1,avgpool"
        )
    return MODELS[model].layers(layers)


def image_count(model: str, selectors: str, files: Sequence[Path]) -> int:
    """Choose the number of images for a row if --count does not give it."""
    count = MODELS[model].images if model in MODELS else OTHER_IMAGES
    with tempfile.TemporaryDirectory() as folder:
        one_image = Request(model, "", selectors, 1)
        finished = run(command_of_hookx(one_image, files[0], Path(folder) / "out", "--dry-run"))
    if finished.exit_code:
        raise SystemExit(finished.stderr.strip())
    return max(1, min(count, MAX_BYTES // json.loads(finished.stdout)["bytes_to_write"], len(files)))


def main() -> int:
    """Measure the rows named on the command line; print each one as soon as it is finished."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sets_help = f"sets ({', '.join(SETS)}), or comma-separated addresses; default: all sets"
    parser.add_argument("--models", nargs="+", metavar="MODEL", help=f"default: {' '.join(DEFAULT_MODELS)}")
    parser.add_argument("--layers", nargs="+", metavar="SET", help=sets_help)
    names = [*OF_HOOKX, *BY_HAND]
    parser.add_argument(
        "--contestants",
        nargs="+",
        choices=[*names, *MANY_WORKERS],
        metavar="NAME",
        help=f"default: all of {', '.join(names)}; also: {', '.join(MANY_WORKERS)}",
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="your own photographs; default: generated ones")
    parser.add_argument("--count", type=int, help="images per run; default: enough for about ten seconds, at most 2 GB")
    parser.add_argument("--rounds", type=int, help="default: 3")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the table to FILE, .svg or .png")
    parser.add_argument("--quick", action="store_true", help="one row, 8 images, 1 round: check that all parts work")
    arguments = parser.parse_args()
    # Exit as after Ctrl-C: stop the running process and remove gigabytes of output.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    quick = arguments.quick
    models = arguments.models or (["resnet18"] if quick else DEFAULT_MODELS)
    sets = arguments.layers or (["pooled"] if quick else SETS)
    count = arguments.count or (8 if quick else None)
    rounds = arguments.rounds or (1 if quick else 3)
    try:
        document: dict[str, Any] = {"machine": machine(), "rounds": rounds, "images": str(arguments.images or "made")}
    except ModuleNotFoundError as error:
        raise SystemExit(f"error: {error.name} is not installed: run scripts/setup bench") from None

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="hookx-photographs-") as folder:
        if arguments.images:
            files = list_images(arguments.images)
            if count and count > len(files):
                raise SystemExit(f"error: --count is {count}, but {arguments.images} holds only {len(files)} images")
        else:
            most = max(MODELS[model].images if model in MODELS else OTHER_IMAGES for model in models)
            files = make_images(Path(folder), count or most)
        for model, layers in itertools.product(models, sets):
            selectors = selectors_of(model, layers)
            images = count or image_count(model, selectors, files)
            request, seconds = Request(model, layers, selectors, images), 0.2 if quick else 3.0
            measured = measure(request, arguments.contestants or names, rounds, files, seconds)
            rows.append(document_of(measured))
            print(table_of(rows[-1]), flush=True)
            # Write after every row, so that an interruption does not lose hours of measurements.
            document |= {"rows": rows, "goals": goals_of(rows)}
            if arguments.json:
                arguments.json.write_text(json.dumps(document, indent=2) + "\n")
            if arguments.picture:
                draw(rows, arguments.picture)
    for goal in document["goals"]:
        print(sentence_of(goal))
    return 0


if __name__ == "__main__":
    sys.exit(main())
