"""Run hookx, or a contestant of scripts/benchmark_contestants.py, again and again in one process that stays warm.

    python -m gpu_check.contestant hand-written

Each line of standard input is a request in JSON, and each line of standard output the answer: the seconds from ready to
written, or why it failed. Importing torch and starting a GPU take longer than a measurement, and so happen once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOOKX = ("hookx", "nvjpeg")


@dataclass(frozen=True)
class Request:
    """One measurement."""

    model: str
    layers: str
    precision: str
    device: str
    workers: int
    batch_size: int
    images: str
    out: str


def run_hookx(request: Request, decode: str) -> dict[str, Any]:
    import hookx

    summary = hookx.extract(
        *(request.model, request.layers, request.images),
        weights="none",
        device=request.device,
        precision=request.precision,  # type: ignore[arg-type]
        decode=decode,  # type: ignore[arg-type]
        workers=request.workers,
        out=request.out,
    )
    return {"seconds": summary.seconds_total, "busy": summary.busy}


def run_by_hand(request: Request, name: str) -> dict[str, Any]:
    import torch
    from benchmark_contestants import CONTESTANTS, Compute, Photographs, Task, Wanted, build

    if request.device != "cpu":
        torch.backends.cudnn.allow_tf32 = False  # The contestants are compared with hookx in fp32.
    compute = Compute(request.device, request.precision, request.batch_size, request.workers)
    out = Path(request.out)
    out.mkdir()
    task = Task(
        build(request.model).to(request.device),
        [Wanted.parse(address) for address in request.layers.split(",")],
        Photographs(Path(request.images), request.model, compute),
        out,
        compute,
    )
    CONTESTANTS[name](task)
    seconds = time.perf_counter() - task.ready_at
    for file in out.glob("*.safetensors"):
        with open(file, "rb") as written:
            os.fsync(written.fileno())
    return {"seconds": seconds, "seconds_flushed": time.perf_counter() - task.ready_at}


def main() -> int:
    """Answer requests until there are no more."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("contestant", choices=[*HOOKX, "hand-written", "fx"])
    name = parser.parse_args().contestant
    answers, sys.stdout = sys.stdout, sys.stderr  # What a library prints is not an answer.
    for line in sys.stdin:
        request = Request(**json.loads(line))
        try:
            if name in HOOKX:
                answer = run_hookx(request, "nvjpeg" if name == "nvjpeg" else "exact")
            else:
                answer = run_by_hand(request, name)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
