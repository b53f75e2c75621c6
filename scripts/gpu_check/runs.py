"""Steps of scripts/gpu-check about whole runs: the same bytes, late errors, full memory, and memory at rest."""

from __future__ import annotations

import contextlib
import filecmp
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark import largest_difference
from PIL import Image

from gpu_check.step import Report, Settings

SHARDS = "shard-*.safetensors"
ROUNDING = 1e-5  # between two batch sizes in fp32, relative to a row's largest value


def link_images(photographs: Path, folder: Path, count: int) -> Path:
    """Make a folder of `count` links to the photographs, which repeat."""
    folder.mkdir(parents=True)
    files = itertools.cycle(sorted(photographs.iterdir()))
    for number, file in zip(range(count), files, strict=False):
        (folder / f"{number:06}{file.suffix}").symlink_to(file.resolve())
    return folder


def hookx(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "hookx", *map(str, arguments)]


def extract(settings: Settings, images: Path, out: Path, *options: str) -> list[str]:
    return hookx("extract", "--weights", "none", "--device", settings.device, *options, "--out", out, images)


def run(
    command: Sequence[str], report: Report, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        text=True,
        capture_output=True,
        check=False,
        timeout=max(1.0, report.seconds_left - 2),
        env={**os.environ, **(environment or {})},
    )


def last_words(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return f"exit code {done.returncode}: {' | '.join(lines[-3:])[-300:]}"


def shards_in(folder: Path) -> list[Path]:
    return sorted(folder.glob(SHARDS))


def read_made(shard: Path) -> dict[str, Any]:
    """Read how a shard was made, from the metadata of its file."""
    with open(shard, "rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return dict(json.loads(header["__metadata__"]["made"]))


def differing_files(one: Path, other: Path) -> list[str]:
    """Return what differs between two output directories, byte by byte."""
    names = [{file.name for file in folder.glob("*") if file.is_file()} for folder in (one, other)]
    different = sorted(names[0] ^ names[1])
    return different + [
        name for name in sorted(names[0] & names[1]) if not filecmp.cmp(one / name, other / name, shallow=False)
    ]


# --- determinism ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A plan, and how often its run is killed."""

    name: str
    kills: int
    options: tuple[str, ...]


CASES = [
    Case("resnet18 fp32", 2, ("--model", "resnet18", "--layers", "conv1@mean23,layer3@mean23,avgpool")),
    Case(
        "resnet18 bf16 nvjpeg",
        1,
        (
            *("--model", "resnet18", "--layers", "layer1@mean23,avgpool"),
            *("--precision", "bf16", "--decode", "nvjpeg"),
        ),
    ),
    Case(
        "vit_b_16 bf16",
        0,
        ("--model", "vit_b_16", "--layers", "encoder.layers.*@cls", "--precision", "bf16"),
    ),
]


def determinism(settings: Settings, report: Report) -> None:
    """Compare the bytes of the same plan: two processes at once, and one that is killed again and again."""
    cases, count = CASES, 2560
    options = ["--shard-images", "128", "--workers", "3", "--quiet"]
    if not settings.on_gpu:
        cases = [case for case in cases if "nvjpeg" not in case.options]
    if settings.quick:
        cases, count = cases[:1], 24
        options = ["--shard-images", "4", "--workers", "1", "--quiet", "--batch-size", "2"]
    images = link_images(settings.photographs, settings.scratch / "images", count)
    lock, done, kills = threading.Lock(), [], []

    def compare(case: Case) -> None:
        folder = settings.scratch / case.name.replace(" ", "-")
        command = [*case.options, *options]
        at_once = [
            subprocess.Popen(
                extract(settings, images, folder / which, *command), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            for which in ("one", "other")
        ]
        moments: list[str] = []
        problems: list[str] = []
        if case.kills:
            killed = extract(settings, images, folder / "killed", *command)
            if error := kill_and_resume(killed, folder / "killed", case.kills, moments):
                problems.append(f"{case.name}, killed and resumed: {error}")
        for process in at_once:
            _, errors = process.communicate(timeout=max(1.0, report.seconds_left - 2))
            if process.returncode:
                problems.append(f"{case.name}: exit code {process.returncode}: {errors.decode()[-300:]}")
        if not problems:
            comparisons = {"other": "two at once"}
            if case.kills:
                comparisons["killed"] = f"killed {len(moments)} times and resumed"
            for which, how in comparisons.items():
                if different := differing_files(folder / "one", folder / which):
                    names = ", ".join(different[:3])
                    problems.append(f"{case.name}, {how}: {len(different)} files differ: {names}")
        with lock:
            report.problems += problems
            done.append(case.name)
            kills.extend(moments)
            report.figures[case.name] = {"killed": moments, "shards": len(shards_in(folder / "one"))}
            report.figure = f"{', '.join(sorted(done))}: the same bytes from two at once, and after {len(kills)} kills"
            if report.problems:
                report.figure = f"{len(report.problems)} problems in {len(done)} plans"
            report.save()
        shutil.rmtree(folder, ignore_errors=True)

    with ThreadPoolExecutor(len(cases)) as pool:
        for future in [pool.submit(compare, case) for case in cases]:
            future.result()
    if not kills:
        report.left_out.append("no run lasted long enough to be killed")


def kill_and_resume(command: list[str], out: Path, kills: int, moments: list[str]) -> str:
    """Kill a run several times, at random moments after it has begun to write, then let it finish; return its error."""
    for number in range(kills + 1):
        start_ns = time.time_ns()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if number < kills:
            # A file that is not whole yet shows that this process, and not one before it, has begun to write.
            while process.poll() is None and not has_begun_since(start_ns, out):
                time.sleep(0.01)
            seconds = random.uniform(0.05, 1.0)
            time.sleep(seconds)
            if process.poll() is None:
                process.kill()
                process.communicate()
                moments.append(f"{len(shards_in(out))} shards, {seconds:.2f} s")
                continue
        _, errors = process.communicate()
        return errors.decode()[-300:] if process.returncode else ""
    raise AssertionError("the last run is not killed")


def has_begun_since(start_ns: int, out: Path) -> bool:
    """Return whether a file is there that is not whole yet and younger than the start."""
    for file in out.glob(".shard-*"):
        with contextlib.suppress(FileNotFoundError):  # It has got its name meanwhile.
            if file.stat().st_ctime_ns > start_ns:
                return True
    return False


# --- errors that surface late --------------------------------------------------------------------------------------

LATE = """
    import torch
    from torch import nn


    class Late(nn.Module):
        # A kernel of this net fails on a white image; a GPU reports that at some later call.

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 64, 7, 2)
            self.pool = nn.AdaptiveAvgPool2d(1)

        def forward(self, pixels_NCHW):
            white = (pixels_NCHW.amin((1, 2, 3)) > 2) & (pixels_NCHW.amax((1, 2, 3)) < 3)
            torch._assert_async(~white.any())
            return self.pool(self.conv(pixels_NCHW))
"""


def late_error(settings: Settings, report: Report) -> None:
    """Let a kernel fail in the middle of a run, look at how it ends, take the image away, and resume."""
    count, per_shard = (40, 4) if settings.quick else (1024, 64)
    images = link_images(settings.photographs, settings.scratch / "images", count)
    model = settings.scratch / "late.py"
    model.write_text(textwrap.dedent(LATE).lstrip())
    bad = images / f"{count * 3 // 4:06}.jpg"
    size = Image.open(bad).size
    bad.unlink()
    dark = settings.scratch / "dark.jpg"
    Image.new("RGB", size, "black").save(dark)
    Image.new("RGB", size, "white").save(bad)
    # A JPEG may be followed by zeros. With the size of the other one, the list of images stays the same.
    length = max(bad.stat().st_size, dark.stat().st_size)
    for file in (bad, dark):
        file.write_bytes(file.read_bytes().ljust(length, b"\0"))
    out = settings.scratch / "out"
    options = ["--model", f"{model}:Late", "--layers", "conv@mean23,pool", "--shard-images", str(per_shard)]
    options += ["--workers", "4", "--batch-size", str(min(per_shard, 64))]
    command = extract(settings, images, out, *options)
    # The run to compare with, at the same time: on the same list of images, without the one that is white.
    others = settings.scratch / "others"
    shutil.copytree(images, others, symlinks=True)
    (others / bad.name).write_bytes(dark.read_bytes())
    alone = settings.scratch / "alone"
    beside = subprocess.Popen(
        extract(settings, others, alone, *options), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        done = run(command, report)
    except subprocess.TimeoutExpired:
        report.problems.append("it hangs: no end after the error")
        return
    finished = shards_in(out)
    report.figures = {"stderr": done.stderr[-2000:], "exit code": done.returncode, "shards": len(finished)}
    report.figure = f"exit code {done.returncode}, {len(finished)} shards kept"
    report.save()
    if done.returncode != 1:
        report.problems.append(f"{last_words(done)} (expected: 1)")
    if "Traceback" in done.stderr:
        report.problems.append(f"a traceback: {last_words(done)}")
    said = done.stderr[done.stderr.rfind("error:") :].splitlines() if "error:" in done.stderr else []
    if not any(line.startswith("  ") for line in said):
        report.problems.append(f"no error that says what to do next: {last_words(done)}")
    times = {file: file.stat().st_mtime_ns for file in finished}
    if not finished:
        report.problems.append("no shard was kept of those before the image")
    bad.write_bytes(dark.read_bytes())
    done = run(command, report)
    if done.returncode:
        report.problems.append(f"resuming: {last_words(done)}")
        return
    if any(file.stat().st_mtime_ns != before for file, before in times.items()):
        report.problems.append("a finished shard was computed again")
    _, errors = beside.communicate(timeout=max(1.0, report.seconds_left - 2))
    if beside.returncode:
        report.problems.append(f"the run to compare with: {errors[-300:]}")
    elif different := differing_files(out, alone):
        report.problems.append(
            f"{len(different)} files differ from a run without the error: {', '.join(different[:3])}"
        )
    report.figure += f", {len(shards_in(out))} after the same command again"


# --- memory at rest ------------------------------------------------------------------------------------------------


def rest(settings: Settings, report: Report) -> None:
    """Compare the memory that torch has allocated on the device before and after `hookx.extract`."""
    import gc

    import torch

    import hookx as library

    images = link_images(settings.photographs, settings.scratch / "images", 6 if settings.quick else 200)

    def allocated() -> int:
        if not settings.on_gpu:
            return 0
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def extract_into(name: str) -> None:
        library.extract(
            *("resnet18", "conv1,layer2,avgpool", images),
            weights="none",
            device=settings.device,
            workers=1 if settings.quick else 4,
            out=settings.scratch / name,
        )
        shutil.rmtree(settings.scratch / name)

    # cuBLAS and cuDNN keep workspaces from their first use on; the first extraction makes them.
    start = allocated()
    extract_into("first")
    gc.collect()
    before = allocated()
    extract_into("second")
    at_once = allocated() - before
    gc.collect()
    left = allocated() - before
    report.figure = f"{left:,} bytes more than before ({at_once:,} before Python collects garbage)"
    report.figures = {"left by the first": before - start, "at once": at_once, "after collection": left}
    report.figure += f"; the first run left {before - start:,}"
    if left:
        report.problems.append(f"{left:,} bytes stay allocated")
    if before - start > 128 * 2**20:
        report.problems.append(f"the first run left {before - start:,} bytes, more than workspaces take")


# --- memory that does not suffice ----------------------------------------------------------------------------------

MEASURE = """
    import json, sys, torch, torchvision, hookx
    images, out, given = sys.argv[1:]
    options = json.loads(given)
    hookx.extract("resnet18", "layer1@mean23,avgpool", images, out=out, **options)
    reserved, free = torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[0]
    model = torchvision.models.resnet18().cuda().eval()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    pixels_NCHW = torch.zeros(options["batch_size"], 3, options["crop"], options["crop"], device="cuda")
    with torch.inference_mode():
        model.maxpool(model.relu(model.bn1(model.conv1(pixels_NCHW))))
    print(json.dumps({"pass": torch.cuda.max_memory_allocated(), "reserved": reserved, "free": free}))
"""
SHARE_OF_PASS = 0.75  # A whole batch does not fit, and half a batch does.


def memory(settings: Settings, report: Report) -> None:
    """Fill the card so that a whole batch does not fit, and make room again after the second shard."""
    import torch

    side, count, per_shard, batch = 640, 768, 64, 64
    images = link_images(settings.photographs, settings.scratch / "images", count)
    free, total = torch.cuda.mem_get_info()
    options = {
        **{"weights": "none", "device": "cuda", "resize": side, "crop": side, "batch_size": batch},
        **{"shard_images": per_shard, "workers": 12},
    }
    plain = settings.scratch / "plain"
    script = [sys.executable, "-c", textwrap.dedent(MEASURE), str(images), str(plain), json.dumps(options)]
    done = run(script, report)
    if done.returncode:
        report.problems.append(f"without pressure: {last_words(done)}")
        return
    measured = json.loads(done.stdout.splitlines()[-1])
    overhead = free - measured["free"] - measured["reserved"]  # of a CUDA context and its libraries
    room = overhead + int(SHARE_OF_PASS * measured["pass"])
    report.figures = {"measured": measured, "overhead": overhead, "room": room, "total": total}
    report.save()

    out = settings.scratch / "full"
    flags = ["--resize", str(side), "--crop", str(side), "--batch-size", str(batch), "--shard-images", str(per_shard)]
    flags += ["--model", "resnet18", "--layers", "layer1@mean23,avgpool", "--workers", "12"]
    free, _ = torch.cuda.mem_get_info()
    ballast: list[torch.Tensor] = [torch.empty(free - room, dtype=torch.uint8, device="cuda")]
    process = subprocess.Popen(
        extract(settings, images, out, *flags), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and len(shards_in(out)) < 2 and report.seconds_left > 5:
        time.sleep(0.01)
    ballast.clear()
    torch.cuda.empty_cache()
    _, errors = process.communicate(timeout=max(1.0, report.seconds_left - 2))
    if process.returncode:
        report.problems.append(f"exit code {process.returncode}: {errors[-400:]}")
        return
    said = [line for line in errors.splitlines() if "out of memory" in line]
    sizes = [int(read_made(shard).get("batch_size", 0)) for shard in shards_in(out)]
    difference = largest_difference(plain, out)
    report.figures |= {"batch sizes": sizes, "said": said[:4], "largest difference": difference}
    report.figure = f"images at once, by shard: {' '.join(map(str, sizes))}; rows differ by {difference:.1e}"
    if not said:
        report.problems.append("nothing was said about a smaller batch")
    if not 0 < sizes[0] < batch:
        report.problems.append(f"the first shard's record says {sizes[0]} images at once")
    if sizes[-1] != batch:
        report.problems.append(f"there was room again, and the last shard's record says {sizes[-1]} images at once")
    if difference > ROUNDING:
        report.problems.append(f"rows differ by {difference:.1e} of their largest value")
