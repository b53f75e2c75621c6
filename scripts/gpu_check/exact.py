"""Steps of scripts/gpu-check about exact values: the marked tests, conformance on the device, and the precision."""

from __future__ import annotations

import itertools
import multiprocessing
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch import nn

from gpu_check.step import CORES, Report, Settings

ROOT = Path(__file__).resolve().parents[2]

# Small models of torchvision's families and of some of timm's; the slowest first, because several processes share them.
FAMILIES = {
    "maxvit_t": "classification",
    "inception_v3": "classification",
    "densenet121": "classification",
    "googlenet": "classification",
    "swin_v2_t": "classification",
    "swin_t": "classification",
    "xcit_nano_12_p8_224": "timm",
    "caformer_s18": "timm",
    "convnext_tiny": "classification",
    "efficientnet_b0": "classification",
    "edgenext_xx_small": "timm",
    "mobilevit_xxs": "timm",
    "poolformerv2_s12": "timm",
    "convnextv2_atto": "timm",
    "vit_b_32": "classification",
    "regnet_y_400mf": "classification",
    "mobilenet_v3_small": "classification",
    "shufflenet_v2_x0_5": "classification",
    "vgg11_bn": "classification",
    "mnasnet0_5": "classification",
    "squeezenet1_1": "classification",
    "resnet18": "classification",
}
PRECISIONS = ("fp32", "bf16", "tf32", "fp16")
FORMATS = ("contiguous", "channels_last")
QUICK = ("resnet18", "squeezenet1_1")
PROCESSES = max(1, CORES - 1)


# --- tests ---------------------------------------------------------------------------------------------------------


def tests(settings: Settings, report: Report) -> None:
    """Run the tests that are marked with `gpu`."""
    files = [str(file) for file in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in file.read_text()]
    junit = settings.scratch / "junit.xml"
    options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={junit}", "-n", "1" if settings.quick else "4"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files], cwd=ROOT, text=True, capture_output=True, check=False
    )
    print(done.stdout[-3000:], done.stderr[-1000:])
    if not junit.exists():
        report.problems.append(f"pytest exited with {done.returncode}: {last_line(done.stdout + done.stderr)}")
        return
    passed = skipped = 0
    for case in ElementTree.parse(junit).iter("testcase"):
        outcomes = {child.tag: child for child in case}
        failure = outcomes.get("failure", outcomes.get("error"))
        if failure is not None:
            report.problems.append(f"{case.get('name')}: {last_line(failure.get('message') or failure.text or '')}")
        elif "skipped" in outcomes:
            skipped += 1
        else:
            passed += 1
    report.figure = f"{passed} passed, {len(report.problems)} failed, {skipped} skipped"
    if skipped:
        report.left_out.append(f"{skipped} tests were skipped")
    if not passed and not skipped:
        report.problems.append("no test ran")


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no output"


# --- conformance ---------------------------------------------------------------------------------------------------


def compare(name: str, device: str, precisions: tuple[str, ...], deadline: float) -> list[dict[str, Any]]:
    """Compare all activations of one model in every way, as far as the time goes; runs in a process of its own.

    Returns:
        A row of scripts/conformance.py for each way, with the name of the way, or with an error.
    """
    import conformance

    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)
    warnings.simplefilter("ignore")
    found: list[dict[str, Any]] = []
    built = build(name, device)
    for precision, memory_format in itertools.product(precisions, FORMATS):
        if time.time() > deadline:
            break
        way = f"{precision} {memory_format}"
        channels_last = memory_format == "channels_last"
        try:
            row = conformance.check(
                name, FAMILIES[name], channels_last=channels_last, device=device, precision=precision, built=built
            )
            found.append({**asdict(row), "way": way})
        except Exception as error:
            traceback.print_exc()
            found.append({"model": name, "way": way, "error": f"{type(error).__name__}: {first_line(str(error))}"})
    return found


def build(name: str, device: str) -> tuple[nn.Module, int]:
    """Build a model on a device, whose random numbers come faster; on the CPU where its code expects that."""
    import conformance

    try:
        with torch.device(device):
            return conformance.small(name, FAMILIES[name])
    except Exception:
        return conformance.small(name, FAMILIES[name])


def first_line(text: str) -> str:
    return text.strip().splitlines()[0][:200] if text.strip() else ""


def conformance(settings: Settings, report: Report) -> None:
    """Compare every activation of the models in every precision and memory format, in several processes."""
    names = QUICK if settings.quick else tuple(FAMILIES)
    precisions = PRECISIONS[:2] if settings.quick else PRECISIONS
    checks = len(names) * len(precisions) * len(FORMATS)
    sums: Counter[str] = Counter()
    ways: dict[str, Counter[str]] = {}
    deadline = time.time() + report.seconds_left
    pool = ProcessPoolExecutor(1 if settings.quick else PROCESSES, mp_context=multiprocessing.get_context("spawn"))
    try:
        running = [pool.submit(compare, name, settings.device, precisions, deadline - 6) for name in names]
        for future in as_completed(running, timeout=max(1.0, report.seconds_left - 1)):
            for row in future.result():
                sums["done"] += 1
                name = f"{row['model']}, {row['way']}"
                if "error" in row:
                    report.problems.append(f"{name}: {row['error']}")
                    continue
                counts = {key: row[key] for key in ("compared", "wrong", "missed", "usual_hook_differs", "seconds")}
                sums.update(counts)
                ways.setdefault(row["way"], Counter()).update({"models": 1, **counts})
                if row["wrong"] or row["missed"]:
                    report.problems.append(f"{name}: {row['wrong']} wrong, {row['missed']} missed")
            report.figure = (
                f"{sums['compared']:,} tensors, {sums['done']} of {checks} models x ways: {sums['wrong']} wrong, "
                f"{sums['missed']} missed; a usual hook: {sums['usual_hook_differs']:,} wrong"
            )
            report.figures = {"by way": ways, "sums": sums, "checks": checks}
            report.save()
    except TimeoutError:
        pass  # What was not done is counted below.
    except Exception as error:  # One of the processes crashed.
        report.problems.append(f"{type(error).__name__}: {first_line(str(error))}")
    if sums["done"] < checks:
        report.left_out.append(f"{checks - sums['done']} of {checks} models x ways")
    for process in list(getattr(pool, "_processes", {}).values()):
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)


# --- precision -----------------------------------------------------------------------------------------------------

PRECISE = ("resnet18", "mobilenet_v3_small", "densenet121", "vit_b_32", "convnext_tiny")
# The device adds in another order than the CPU, so it may round up to this many times as much as the CPU's own fp32.
# TF32 keeps 10 of fp32's 23 bits: 8,000 times the rounding.
MOST_TIMES_CPU = 16.0
LEAST_TIMES_FP32 = 16.0


def precision(settings: Settings, report: Report) -> None:
    """Compare fp32 and tf32 on the device, and fp32 on the CPU, with float64 on the CPU, layer by layer."""
    import conformance as checks

    torch.set_num_threads(1)  # Several steps share the cores.
    torch.backends.mha.set_fastpath_enabled(False)
    on_cpu, on_device, with_tf32 = [], [], []
    for name in PRECISE[:1] if settings.quick else PRECISE:
        kind = FAMILIES[name]
        if report.seconds_left < 12:
            report.left_out.append(name)
            continue
        model, side = checks.small(name, kind)
        pixels_NCHW = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(1))
        exact = checks.by_cloning(model.double(), kind, pixels_NCHW[: checks.BATCH].double())[0]
        model = model.float()

        def largest_error(device: str, how: str) -> tuple[float, str]:
            there = model.to(device)  # noqa: B023 - called in this pass of the loop only
            captured = checks.capture(name, kind, there, pixels_NCHW.to(device), how, "contiguous")  # noqa: B023
            largest, where = 0.0, ""
            for target in captured.selection.targets:
                row = captured.rows[str(target.address)]
                reference = checks.split_images(target, exact[checks.key_of(target)])  # noqa: B023
                scale = float(reference.abs().max()) if row.is_floating_point() and row.numel() else 0.0
                if scale > 0:
                    error = float((row.double() - reference).abs().max()) / scale
                    largest, where = max((largest, where), (error, str(target.address)))
            return largest, where

        errors = {"cpu": largest_error("cpu", "fp32")[0]}
        on_cpu.append(errors["cpu"])
        errors["fp32"], where = largest_error(settings.device, "fp32")
        on_device.append(errors["fp32"])
        if errors["fp32"] > MOST_TIMES_CPU * errors["cpu"]:
            report.problems.append(
                f"{name}: fp32 is off by {errors['fp32']:.1e} at {where}; fp32 on the CPU by {errors['cpu']:.1e}"
            )
        if settings.on_gpu and torch.cuda.get_device_capability()[0] >= 8:
            try:
                errors["tf32"], where = largest_error(settings.device, "tf32")
            except KeyError as error:
                report.problems.append(f"there is no precision {error}")
            else:
                with_tf32.append(errors["tf32"])
                if errors["tf32"] < LEAST_TIMES_FP32 * errors["fp32"]:
                    report.problems.append(f"{name}: tf32 is off by {errors['tf32']:.1e} only: it is not on")
        report.figures[name] = errors
        report.figure = f"largest error against float64: fp32 {max(on_device):.1e}, on the CPU {max(on_cpu):.1e}"
        if with_tf32:
            report.figure += f"; tf32 {max(with_tf32):.1e}"
        report.save()
