"""Measure how fast a machine with a GPU can do each part of an extraction alone: the limits of scripts/gpu-check.

    python -m gpu_check.limits disk --scratch DIR --seconds 1
    python -m gpu_check.limits decode --photographs DIR --seconds 1
    python -m gpu_check.limits device --device cuda --photographs DIR --seconds 1 --row resnet18 conv1,avgpool bf16

It prints one line of JSON:

- disk: the bytes per second of random files with write() and fsync(), through the page cache and past it, from 1 and
  from 4 threads; the fastest way counts.
- decode: the images per second that Pillow decodes, resizes and crops, in one process per core.
- device: for each row, the bytes of an image's activations and the images per second of forward passes up to the last
  layer, in the faster memory format; the bytes per second from the device to pinned memory; nvjpeg's images per second.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import mmap
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

BATCH = 128
_BLOCK_BYTES = 32 * 2**20


# --- disk ----------------------------------------------------------------------------------------------------------


def write_file(file: Path, size_bytes: int, direct: bool) -> None:
    memory = mmap.mmap(-1, _BLOCK_BYTES)  # O_DIRECT needs a page-aligned buffer.
    memory.write(os.urandom(2**20) * (_BLOCK_BYTES // 2**20))
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | (os.O_DIRECT if direct else 0))
    try:
        for _ in range(max(1, size_bytes // _BLOCK_BYTES)):
            view = memoryview(memory)
            while view:
                view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk(scratch: Path, seconds: float) -> dict[str, Any]:
    """Return the bytes per second that the disk of a folder takes, by the way of writing."""
    rates: dict[str, float] = {}
    size_bytes = _BLOCK_BYTES * 4
    for threads, direct in itertools.product((1, 4), (False, True)):
        name = f"{threads} thread{'s' * (threads > 1)}{', past the page cache' * direct}"
        # The file system may not support O_DIRECT.
        with contextlib.suppress(OSError), tempfile.TemporaryDirectory(dir=scratch) as folder:
            written, start = 0, time.perf_counter()
            with ThreadPoolExecutor(threads) as pool:
                while time.perf_counter() - start < seconds:
                    files = [Path(folder) / f"{written}-{thread}" for thread in range(threads)]
                    for one in [pool.submit(write_file, file, size_bytes, direct) for file in files]:
                        one.result()
                    written += threads * max(1, size_bytes // _BLOCK_BYTES) * _BLOCK_BYTES
                    for file in files:
                        file.unlink()
            rates[name] = written / (time.perf_counter() - start)
    best = max(rates, key=rates.__getitem__)
    return {"bytes_per_second": rates[best], "way": best, "of": rates}


# --- decode --------------------------------------------------------------------------------------------------------


def decode(photographs: Path, seconds: float) -> dict[str, Any]:
    """Return the images per second that one process per core decodes to the pixels of a 224 x 224 model."""
    from benchmark_limits import run_on_all_cores
    from PIL import Image
    from torchvision.transforms import functional as F  # noqa: N812 - its own documentation's name

    files = sorted(photographs.iterdir())

    def work(number: int) -> Any:
        mine = itertools.cycle(files[number % len(files) :: 7])

        def step() -> int:
            with Image.open(next(mine)) as image:
                F.center_crop(F.resize(image.convert("RGB"), [256]), [224, 224]).tobytes()
            return 1

        return step

    return {"images_per_second": run_on_all_cores(work, seconds)}


# --- device --------------------------------------------------------------------------------------------------------


def device(where: str, photographs: Path, seconds: float, rows: list[list[str]]) -> dict[str, Any]:
    """Measure forward passes, copies and nvjpeg on a device."""
    import torch

    torch.backends.cudnn.allow_tf32 = False
    torch.set_grad_enabled(False)

    def wait() -> None:
        if where != "cpu":
            torch.cuda.synchronize()

    def rate_of(step: Any, amount: float) -> float:
        step()
        wait()
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            step()
            count += 1
            if count % 4 == 0:
                wait()  # Or the queue would grow far beyond the time.
        wait()
        return amount * count / (time.perf_counter() - start)

    measured = [forward(where, model, layers, precision, rate_of) for model, layers, precision in rows]
    found: dict[str, Any] = {"rows": measured}
    if where != "cpu":
        source = torch.empty(256 * 2**20, dtype=torch.uint8, device=where)
        target = torch.empty(256 * 2**20, dtype=torch.uint8, pin_memory=True)
        found["copies"] = {"bytes_per_second": rate_of(lambda: target.copy_(source, non_blocking=True), source.nbytes)}
        found["nvjpeg"] = {"images_per_second": decode_on(where, photographs, rate_of)}
    return found


def forward(where: str, model_name: str, layers: str, precision: str, rate_of: Any) -> dict[str, Any]:
    """Measure passes of a model up to its last requested layer, without storing anything."""
    import torch
    from benchmark_contestants import Wanted, build
    from benchmark_limits import LAYOUTS, Reached, end_after

    wanted = [Wanted.parse(address) for address in layers.split(",")]
    batch = BATCH if where != "cpu" else 4
    pixels_NCHW = torch.rand(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(where)
    model = build(model_name).to(where)
    bytes_per_image = 0

    def add(one: Wanted, output: Any) -> None:
        nonlocal bytes_per_image
        bytes_per_image += one.reduce(output).nbytes // batch

    handles = [
        model.get_submodule(one.path).register_forward_hook(lambda _m, _i, output, one=one: add(one, output))
        for one in wanted
    ]
    rates = {}
    with torch.inference_mode(), torch.autocast(where, torch.bfloat16, enabled=precision == "bf16"):
        model(pixels_NCHW)
        for handle in handles:
            handle.remove()
        end_after(model, wanted, pixels_NCHW)
        for layout, memory_format in LAYOUTS.items():
            model = model.to(memory_format=memory_format)
            pixels = pixels_NCHW.contiguous(memory_format=memory_format)

            def step() -> None:
                with contextlib.suppress(Reached):
                    model(pixels)  # noqa: B023 - called in this pass of the loop only

            rates[layout] = rate_of(step, batch)
    best = max(rates, key=rates.__getitem__)
    return {"bytes_per_image": bytes_per_image, "images_per_second": rates[best], "memory_format": best, "of": rates}


def decode_on(where: str, photographs: Path, rate_of: Any) -> float:
    """Measure nvjpeg, with resizing and cropping on the GPU."""
    import warnings

    import torch
    from torchvision.io import ImageReadMode, decode_jpeg, read_file
    from torchvision.transforms import functional as F  # noqa: N812 - its own documentation's name

    warnings.simplefilter("ignore")
    files = [read_file(str(file)) for file in sorted(photographs.iterdir())[:256]]
    batches = itertools.cycle([files[start : start + BATCH] for start in range(0, len(files), BATCH)])

    def step() -> None:
        pictures = decode_jpeg(next(batches), ImageReadMode.RGB, where)
        torch.stack([F.center_crop(F.resize(picture, [256], antialias=True), [224, 224]) for picture in pictures])

    return float(rate_of(step, min(BATCH, len(files))))


def main() -> int:
    """Measure the limit named on the command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("limit", choices=["disk", "decode", "device"])
    parser.add_argument("--scratch", type=Path, help="disk: a folder on it")
    parser.add_argument("--photographs", type=Path, help="decode, device: a folder of JPEGs")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each measurement")
    parser.add_argument("--row", nargs=3, action="append", default=[], metavar=("MODEL", "LAYERS", "PRECISION"))
    arguments = parser.parse_args()
    if arguments.limit == "disk":
        found = disk(arguments.scratch, arguments.seconds)
    elif arguments.limit == "decode":
        found = decode(arguments.photographs, arguments.seconds)
    else:
        found = device(arguments.device, arguments.photographs, arguments.seconds, arguments.row)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
