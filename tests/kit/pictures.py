"""Pictures for the tests, and how to prepare them."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from PIL import Image

from hookx.plan import Preprocessing
from hookx.run.lane import Batch

PHOTOGRAPHS = Path(__file__).parents[2] / "images"
CHELSEA = PHOTOGRAPHS / "animals" / "chelsea.jpg"
SMALL = Preprocessing(32, 24, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear")
PLAIN = Preprocessing(4, 4, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "nearest")  # The pixels themselves, divided by 255.
UPRIGHT = Preprocessing(4, 4, PLAIN.mean, PLAIN.std, "nearest", exif="apply")


@contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    """Turn a hang into a failure."""

    def too_long(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"not done after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def four_by_four() -> Image.Image:
    """Give a picture that looks different from every side."""
    pixels = torch.arange(16).reshape(4, 4, 1) * torch.tensor([16, 5, 1])
    return Image.fromarray(pixels.to(torch.uint8).numpy(), "RGB")


def process_ids() -> set[int]:
    return {process.pid for process in multiprocessing.active_children() if process.pid}


def copied(batches: Iterable[Batch]) -> list[Batch]:
    """Return all batches, each with a copy of its pixels: their memory is used again for later ones."""
    some = []
    for batch in batches:
        if batch.pixels_NCHW is not None:
            batch.pixels_NCHW = batch.pixels_NCHW.clone()
        some.append(batch)
    return some
