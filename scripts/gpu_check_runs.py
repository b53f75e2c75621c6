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
from pathlib import Path
from typing import Any

from benchmark import largest_difference
from gpu_check_step import Report, Settings
from PIL import Image

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

PLANS = {
    "resnet18 fp32": ["--model", "resnet18", "--layers", "conv1@mean23,layer3@mean23,avgpool"],
    "vit_b_16 bf16": ["--model", "vit_b_16", "--layers", "encoder.layers.*@cls", "--precision", "bf16"],
    "resnet18 bf16 nvjpeg": [
        *("--model", "resnet18", "--layers", "layer1@mean23,avgpool", "--precision", "bf16", "--decode", "nvjpeg"),
    ],
}
KILLS = 3


def determinism(settings: Settings, report: Report) -> None:
    """Compare the bytes of the same plan: two processes at once, and one that is killed again and again."""
    plans = dict(PLANS)
    if not settings.on_gpu:
        del plans["resnet18 bf16 nvjpeg"]
    count, options = 4000, ["--shard-images", "256", "--workers", "4", "--quiet"]
    if settings.quick:
        plans = dict(list(plans.items())[:1])
        count, options = 24, ["--shard-images", "4", "--workers", "1", "--quiet", "--batch-size", "2"]
    images = link_images(settings.photographs, settings.scratch / "images", count)
    lock, done, kills = threading.Lock(), [], []

    def compare(name: str) -> None:
        folder = settings.scratch / name.replace(" ", "-")
        command = [*plans[name], *options]
        at_once = [
            subprocess.Popen(
                extract(settings, images, folder / which, *command), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            for which in ("one", "other")
        ]
        moments: list[str] = []
        resumed = kill_and_resume(extract(settings, images, folder / "killed", *command), folder / "killed", moments)
        problems = []
        for process in at_once:
            _, errors = process.communicate(timeout=max(1.0, report.seconds_left - 2))
            if process.returncode:
                problems.append(f"{name}: exit code {process.returncode}: {errors.decode()[-300:]}")
        if resumed:
            problems.append(f"{name}, killed and resumed: {resumed}")
        if not problems:
            for which, how in (("other", "two at once"), ("killed", f"killed {len(moments)} times and resumed")):
                if different := differing_files(folder / "one", folder / which):
                    problems.append(f"{name}, {how}: {len(different)} files differ: {', '.join(different[:3])}")
        with lock:
            report.problems += problems
            done.append(name)
            kills.extend(moments)
            report.figures[name] = {"killed": moments, "shards": len(shards_in(folder / "one"))}
            report.figure = f"{len(done)} plans ({', '.join(sorted(done))}), {len(kills)} kills: the same bytes"
            if report.problems:
                report.figure = f"{len(report.problems)} differences in {len(done)} plans"
            report.save()
        shutil.rmtree(folder, ignore_errors=True)

    with ThreadPoolExecutor(len(plans)) as pool:
        for future in [pool.submit(compare, name) for name in plans]:
            future.result()
    if not kills:
        report.left_out.append("no run lasted long enough to be killed")


def kill_and_resume(command: list[str], out: Path, moments: list[str]) -> str:
    """Kill a run `KILLS` times at random moments after its plan is written, then let it finish; return its error."""
    for number in range(KILLS + 1):
        start_ns = time.time_ns()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if number < KILLS:
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
    count, per_shard = (40, 4) if settings.quick else (2000, 128)
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
    options += ["--workers", "2", "--batch-size", str(min(per_shard, 64))]
    command = extract(settings, images, out, *options)
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
    errors = done.stderr[done.stderr.rfind("error:") :].splitlines() if "error:" in done.stderr else []
    if not any(line.startswith("  ") for line in errors):
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
    alone = settings.scratch / "alone"
    if (done := run(extract(settings, images, alone, *options), report)).returncode:
        report.problems.append(f"the run to compare with: {last_words(done)}")
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
    import json, sys, torch, hookx
    images, out, *options = sys.argv[1:]
    hookx.extract("resnet18", "layer1@mean23,avgpool", images, out=out, **json.loads(options[0]))
    peak, reserved, free = torch.cuda.max_memory_reserved(), torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[0]
    print(json.dumps({"peak": peak, "reserved": reserved, "free": free}))
"""


def memory(settings: Settings, report: Report) -> None:
    """Fill the card so that a whole batch does not fit, and let go of it after the first shard."""
    import torch

    side, count, per_shard, batch = 640, 1024, 128, 64
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
    room = overhead + int(0.6 * measured["peak"])
    report.figures = {"measured": measured, "overhead": overhead, "room": room, "total": total}
    report.save()

    flags = ["--resize", str(side), "--crop", str(side), "--batch-size", str(batch), "--shard-images", str(per_shard)]
    flags += ["--model", "resnet18", "--layers", "layer1@mean23,avgpool", "--workers", "12"]
    problems: dict[str, list[int]] = {}
    for name, release in (("full to the end", False), ("full until the first shard", True)):
        out = settings.scratch / name.replace(" ", "-")
        free, _ = torch.cuda.mem_get_info()
        ballast: list[torch.Tensor] = [torch.empty(free - room, dtype=torch.uint8, device="cuda")]
        process = subprocess.Popen(
            extract(settings, images, out, *flags), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        if release:
            while process.poll() is None and not shards_in(out) and report.seconds_left > 5:
                time.sleep(0.01)
            ballast.clear()
            torch.cuda.empty_cache()
        _, errors = process.communicate(timeout=max(1.0, report.seconds_left - 2))
        ballast.clear()
        torch.cuda.empty_cache()
        if process.returncode:
            report.problems.append(f"{name}: exit code {process.returncode}: {errors[-300:]}")
            continue
        said = [line for line in errors.splitlines() if "out of memory" in line]
        sizes = problems[name] = [int(read_made(shard).get("batch_size", 0)) for shard in shards_in(out)]
        report.figures[name] = {"batch sizes": sizes, "said": said[:4]}
        if not said:
            report.problems.append(f"{name}: nothing was said of a smaller batch")
        if not 0 < sizes[0] < batch:
            report.problems.append(f"{name}: the first shard's record says {sizes[0]} images at once")
        if release and sizes[-1] != batch:
            report.problems.append(f"{name}: the last shard's record says {sizes[-1]} images at once, not {batch}")
        difference = largest_difference(plain, out)
        report.figures[name]["largest difference"] = difference
        if difference > ROUNDING:
            report.problems.append(f"{name}: rows differ by {difference:.1e} of their largest value")
        report.figure = (
            f"batches by shard: {'; '.join(' '.join(map(str, sizes)) for sizes in problems.values())}; "
            f"rows differ by {difference:.1e}"
        )
        report.save()
        shutil.rmtree(out)
