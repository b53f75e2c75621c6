#!/usr/bin/env python
"""Measure how fast the machine can do each part of an extraction alone: the limits of scripts/benchmark.py.

    scripts/benchmark_limits.py --run features/ --seconds 3 images/

`--run` is a finished run of hookx over these images with `--weights none`; its plan gives the model, the layers and the
shards. The script prints one line of JSON:

- decode: images/s that one single-threaded process per core decodes and preprocesses, without a model.
- forward: images/s that one single-threaded process per core computes up to the last requested layer, on random pixels
  and with reused memory; the best of two memory formats and two batch sizes, or of those that `--pass` names.
- write: images/s when the shards of the run, the same bytes in as many files, are written with write() and fsync(),
  through the page cache or past it, whichever is faster; and the CPU seconds per image.
- hookx_write: the same with hookx's writer in one process per core, including checksums and records.
"""

from __future__ import annotations

import argparse
import itertools
import json
import mmap
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmark_contestants import CORES, Photographs, Wanted, build
from torch import Tensor, nn
from torchvision.models import get_model_weights

from hookx.plan import Plan, Shard
from hookx.run.defaults import keep_freed_memory
from hookx.store.directory import RunDirectory, read_plan
from hookx.store.record import ShardRecord
from hookx.store.writer import ShardWriter

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
PASSES = [f"{layout},{batch}" for layout in LAYOUTS for batch in (4, 16)]


def run_on_all_cores(work: Callable[[int], Callable[[], int]], seconds: float) -> float:
    """Repeat a step in one single-threaded process per core; return their images per second in total.

    Args:
        work: returns the step for process number 0, 1, ...; a step returns the number of images it finished.
        seconds: how long every process repeats its step, after one untimed step.
    """
    context = multiprocessing.get_context("fork")
    all_ready, rates = context.Barrier(CORES), context.SimpleQueue()

    def repeat(number: int) -> None:
        torch.set_num_threads(1)
        keep_freed_memory()
        step, images = work(number), 0
        step()
        all_ready.wait()
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            images += step()
        rates.put(images / (time.perf_counter() - start))

    processes = [context.Process(target=repeat, args=(number,), daemon=True) for number in range(CORES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise SystemExit(f"error: a process exited with {process.exitcode}")
    return sum(rates.get() for _ in processes)


# --- decode --------------------------------------------------------------------------------------------------------


def decode(photographs: Photographs, seconds: float) -> dict[str, Any]:
    def work(number: int) -> Callable[[], int]:
        mine = itertools.cycle(range(number % len(photographs), len(photographs), CORES))

        def step() -> int:
            photographs[next(mine)]
            return 1

        return step

    return {"images_per_second": run_on_all_cores(work, seconds)}


# --- forward -------------------------------------------------------------------------------------------------------


class Reached(BaseException):
    """Stops a forward pass after the last requested layer."""


def end_after(model: nn.Module, wanted: list[Wanted], pixels_NCHW: Tensor) -> None:
    """Hook a model so that a pass raises `Reached` after the last of these layers in execution order."""
    order: list[Wanted] = []

    def hook(one: Wanted, then: Callable[[], None]) -> Any:
        module = model.get_submodule(one.path)
        if one.is_input:
            return module.register_forward_pre_hook(lambda _module, _inputs: then())
        return module.register_forward_hook(lambda _module, _inputs, _output: then())

    def reached() -> None:
        raise Reached

    handles = [hook(one, lambda one=one: order.append(one)) for one in wanted]  # type: ignore[misc]
    model(pixels_NCHW)
    for handle in handles:
        handle.remove()
    hook(order[-1], reached)


def forward(name: str, wanted: list[Wanted], passes: list[str], seconds: float) -> dict[str, Any]:
    side_px: int = get_model_weights(name).DEFAULT.transforms().crop_size[0]
    pixels_NCHW = torch.rand(16, 3, side_px, side_px, generator=torch.Generator().manual_seed(0))
    model = build(name)
    with torch.inference_mode():
        end_after(model, wanted, pixels_NCHW[:1])

    def rate_of(layout: str, batch: int) -> float:
        def work(_number: int) -> Callable[[], int]:
            mine = model.to(memory_format=LAYOUTS[layout])
            pixels = pixels_NCHW[:batch].contiguous(memory_format=LAYOUTS[layout])

            def step() -> int:
                try:
                    with torch.inference_mode():
                        mine(pixels)
                except Reached:
                    return batch
                raise AssertionError("the pass continued after the last layer")

            return step

        return run_on_all_cores(work, seconds)

    rates = {name: rate_of(name.split(",")[0], int(name.split(",")[1])) for name in passes}
    best = max(rates, key=rates.__getitem__)
    return {"images_per_second": rates[best], "pass": best, "of": rates}


# --- write ---------------------------------------------------------------------------------------------------------


@dataclass
class Stopwatch:
    """Wall-clock and CPU seconds of a `with` block."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds, self.cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu

    def per_image(self, images: int) -> dict[str, Any]:
        return {
            "images_per_second": images / self.seconds,
            "seconds_per_image": self.seconds / images,
            "cpu_seconds_per_image": self.cpu_seconds / images,
        }


def random_rows(plan: Plan) -> dict[str, Tensor]:
    """Return the tensors of the largest shard, filled with random bytes that no disk can compress."""
    rows, generator = max(map(len, plan.shards)), torch.Generator().manual_seed(0)
    return {
        layer.address: torch.randint(256, (rows, layer.bytes_per_image), dtype=torch.uint8, generator=generator)
        .view(getattr(torch, layer.dtype))
        .reshape(rows, *layer.shape)
        for layer in plan.layers
    }


def write(plan: Plan, buffer: dict[str, Tensor], folder: Path) -> dict[str, Any]:
    stopwatch = Stopwatch()
    with stopwatch.running():
        for shard in plan.shards:
            with open(folder / plan.shard_file(shard), "xb") as file:
                for tensor in buffer.values():
                    file.write(tensor[: len(shard)].flatten().view(torch.uint8).numpy().data)
                file.flush()
                os.fsync(file.fileno())
    return stopwatch.per_image(plan.image_count)


def write_directly(plan: Plan, buffer: dict[str, Tensor], folder: Path) -> dict[str, Any]:
    bytes_at_once = 64 * 2**20
    memory = mmap.mmap(-1, bytes_at_once)  # O_DIRECT needs a page-aligned buffer.
    memory.write(next(iter(buffer.values())).flatten().view(torch.uint8)[:bytes_at_once].numpy().tobytes())
    stopwatch = Stopwatch()
    with stopwatch.running():
        for shard in plan.shards:
            file = os.open(folder / plan.shard_file(shard), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT)
            bytes_left = len(shard) * plan.bytes_per_image // mmap.PAGESIZE * mmap.PAGESIZE
            while bytes_left:
                bytes_left -= os.write(file, memoryview(memory)[: min(bytes_at_once, bytes_left)])
            os.fsync(file)
            os.close(file)
    return stopwatch.per_image(plan.image_count)


def hookx_write(plan: Plan, buffer: dict[str, Tensor], folder: Path) -> dict[str, Any]:
    def record(shard: Shard) -> ShardRecord:
        return ShardRecord([f"{n:06}.jpg" for n in range(shard.start, shard.stop)], sizes_bytes=[1] * len(shard))

    context = multiprocessing.get_context("fork")
    stopwatch, all_ready = Stopwatch(), context.Barrier(CORES + 1)
    queues = [context.SimpleQueue() for _ in range(CORES)]
    batches = [positions for shard in plan.shards for positions in shard.batches(plan.batch_size)]

    def work(number: int) -> None:
        torch.set_num_threads(1)
        keep_freed_memory()
        mine = batches[number::CORES]
        for positions in mine[:2]:  # A worker reuses memory for two batches: touch it, and fill it with nonzero bytes.
            for address, rows in writer.rows(positions, len(positions)).items():
                rows[:] = buffer[address][: len(rows)]
        all_ready.wait()
        for positions in mine:
            if positions not in mine[:2]:
                writer.rows(positions, len(positions))
            writer.write(positions).add_done_callback(lambda written: queues[number].put(written.result()))
        writer.close()

    with (
        RunDirectory(folder / "run", plan) as directory,
        ShardWriter(directory, plan.shards, plan.batch_size, record, processes=CORES) as writer,
    ):
        processes = [context.Process(target=work, args=(number,)) for number in range(CORES)]
        for process in processes:
            process.start()
        all_ready.wait()
        with stopwatch.running():
            next_queue = itertools.cycle(queues)
            for shard in plan.shards:
                writer.publish(record(shard), [next(next_queue).get() for _ in shard.batches(plan.batch_size)])
            writer.finish()
        for process in processes:
            process.join()
    return stopwatch.per_image(plan.image_count)


def main() -> int:
    """Measure each limit once."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="directory of a run; only plan.json is read")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for decode and for each kind of forward pass")
    parser.add_argument("--pass", dest="passes", action="append", choices=PASSES, help="repeatable; default: all")
    parser.add_argument("images", type=Path, help="a flat folder of images")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    plan = read_plan(arguments.run)
    wanted = [Wanted.parse(layer.address) for layer in plan.layers]
    limits = {
        "decode": decode(Photographs(arguments.images, plan.model), arguments.seconds),
        "forward": forward(plan.model, wanted, arguments.passes or PASSES, arguments.seconds),
    }
    buffer, writing = random_rows(plan), {}
    for writer in (write, write_directly, hookx_write):
        # In the directory of the run, so on the same disk; removed before the next begins, so that it is not flushed.
        # The file system may not support O_DIRECT.
        with tempfile.TemporaryDirectory(dir=arguments.run) as folder, suppress(OSError):
            writing[writer.__name__] = writer(plan, buffer, Path(folder))
        os.sync()  # Removing files keeps the disk busy, too.
    limits["hookx_write"] = writing.pop("hookx_write")
    limits["write"] = min(writing.values(), key=lambda figures: float(figures["seconds_per_image"]))
    print(json.dumps(limits))
    return 0


if __name__ == "__main__":
    sys.exit(main())
