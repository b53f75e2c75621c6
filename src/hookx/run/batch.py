"""A batch of images on its way: decoded, run through the model, written."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hookx.errors import HookxError
from hookx.images.decoding import decode_jpegs
from hookx.images.listing import ImageList
from hookx.plan import Preprocessing, ValueCounts
from hookx.store.shard_file import Written


@dataclass(eq=False)
class Batch:
    """The images at some positions of the list; each process on the way fills in its part."""

    positions: range
    # Decoded: `pixels_NCHW` is what `decode` returns, None if no image could be read or a lane has taken the pixels.
    pixels_NCHW: Tensor | None = None
    # Left to nvjpeg: the bytes of its files, one after the other, and of each file its position and length.
    encoded: tuple[Tensor, Tensor] | None = None
    reasons: dict[int, str] = field(default_factory=dict)  # position -> why it could not be read
    rotations_ignored: int = 0
    reading_seconds: float = 0.0
    # Computed and written, by a lane.
    counts: ValueCounts = field(default_factory=ValueCounts)
    model_seconds: float = 0.0
    written: Written | Future[Written] | None = None
    error: HookxError | None = None  # in place of `written`
    # Looked up in the main process: a message of up to 4,096 bytes is never left half written by a process that dies.
    keys: list[str] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)  # (key, reason)

    def look_up_keys(self, images: ImageList) -> None:
        self.keys = [images.keys[position] for position in self.positions if position not in self.reasons]
        self.failures = [(images.keys[position], reason) for position, reason in self.reasons.items()]

    def pin_memory(self) -> Batch:
        """Move the pixels to pinned memory, as a DataLoader asks what it hands over to do."""
        if self.pixels_NCHW is not None:
            self.pixels_NCHW = self.pixels_NCHW.pin_memory()
        return self

    def share(self) -> None:
        """Move what was decoded to shared memory.

        The thread of the DataLoader's queue would do so while an image is in hand, which a crash would be blamed on.
        """
        try:
            for tensor in (self.pixels_NCHW, *(self.encoded or ())):
                if tensor is not None:
                    tensor.share_memory_()
        except RuntimeError as error:  # torch has no other error for too little memory
            raise MemoryError(str(error)) from None

    def decode_rest(self, preprocessing: Preprocessing, device: torch.device) -> None:
        """Decode by nvjpeg what was left to it, and put it in its place among the other pixels."""
        if self.encoded is None:
            return
        start = time.perf_counter()
        content, files = self.encoded
        positions, sizes_bytes = (column.tolist() for column in files.unbind(1))
        decoded = dict(zip(positions, decode_jpegs(content.split(sizes_bytes), preprocessing, device), strict=True))
        refused = {position: str(result) for position, result in decoded.items() if not isinstance(result, Tensor)}
        self.reasons = dict(sorted((self.reasons | refused).items()))
        others: Iterator[Tensor] = iter(() if self.pixels_NCHW is None else self.pixels_NCHW.to(device))
        pixels = [
            decoded[position] if position in decoded else next(others)
            for position in self.positions
            if position not in self.reasons
        ]
        self.pixels_NCHW, self.encoded = stack(pixels), None
        self.reading_seconds += time.perf_counter() - start


def stack(pixels: list[Tensor]) -> Tensor | None:
    """Stack images to a batch; None for no image."""
    if not pixels:
        return None
    try:
        if pixels[0].dtype == torch.uint8:  # Channels stay innermost, as they were decoded.
            return torch.stack([pixels_CHW.permute(1, 2, 0) for pixels_CHW in pixels]).permute(0, 3, 1, 2)
        return torch.stack(pixels)
    except RuntimeError as error:  # torch has no other error for too little memory
        raise MemoryError(str(error)) from None
