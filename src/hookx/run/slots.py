"""Memory in which processes that only decode leave the pixels of a batch for the process that runs the model.

It is shared, allocated once, and used again and again: a slot for each batch on its way. To touch memory for the first
time is slow on a virtual machine. A process that takes a fresh piece of shared memory for every batch spends more time
on its pages, 9 microseconds each beside an H100, than the GPU spends on the batch.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from hookx.capture.copies import has_streams
from hookx.run.in_hand import shared_numbers
from hookx.run.lane import Batch, Placed

_PIECES_PER_BATCH, _MIN_IMAGES_IN_PIECE = 8, 4
_PASSES_IN_FLIGHT = 3  # batches that a GPU may still copy from
_POLL_SECONDS = 0.002


class Piece(NamedTuple):
    """What a process decodes at a time: a part of a batch.

    A GPU wants large batches. Decoded whole, the first would come late, and at the end most processes would have
    nothing to do while the last are decoded.
    """

    positions: range
    batch: int  # its number
    first: int  # images of the batch before these


def cut(batches: Sequence[range], *, whole: bool) -> list[Piece]:
    """Cut batches into pieces, or make a piece of each."""
    largest = max(map(len, batches), default=1)
    size = largest if whole else max(_MIN_IMAGES_IN_PIECE, math.ceil(largest / _PIECES_PER_BATCH))
    return [
        Piece(positions[first : first + size], number, first)
        for number, positions in enumerate(batches)
        for first in range(0, len(positions), size)
    ]


class Slots:
    """A slot for each of the batches that may be on their way at the same time.

    A process that decodes waits until the slot of its batch is free, and leaves there what it has decoded. The process
    that has made the slots joins the pieces of a batch, and gives the slot back once the model has the pixels.

    Where processes cannot be forked, what is decoded travels in messages, and the slots only count.

    Args:
        batches: all of them, in order.
        bytes_per_image: room for one; a piece that needs more travels in a message.
        workers: how many processes decode.
        device: copies the pixels to itself.
    """

    def __init__(self, batches: Sequence[range], bytes_per_image: int, workers: int, device: torch.device) -> None:
        self._bytes_per_image, self._device = bytes_per_image, device
        decoded_at_once = math.ceil(workers / _PIECES_PER_BATCH) + 1
        # For every second process a batch that waits for its turn, behind one with a slow image.
        self._count = decoded_at_once + workers // 2 + _PASSES_IN_FLIGHT
        largest = max(map(len, batches), default=1)
        self._slot_bytes = math.ceil(largest * bytes_per_image / mmap.PAGESIZE) * mmap.PAGESIZE
        self._released = shared_numbers(1)  # how many batches
        self._memory: Tensor | None = None
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # So little memory is left that messages need it piece by piece.
                self._memory = torch.frombuffer(mmap.mmap(-1, self._count * self._slot_bytes), dtype=torch.uint8)
        self._registered: set[int] = set()  # addresses of slots that a GPU copies from by itself
        self._in_use: deque[torch.Event] = deque()  # of the batches that were joined and not yet given back

    # --- in a process that decodes ---------------------------------------------------------------------------------

    def wait_for(self, piece: Piece) -> None:
        """Wait until the slot of a batch is free."""
        while piece.batch >= self._released[0] + self._count:
            time.sleep(_POLL_SECONDS)

    def place(self, piece: Piece, tensors: Sequence[Tensor]) -> Placed | None:
        """Leave tensors in a slot, one behind the other: images of one shape, or bytes. Return None if that fails."""
        first, sizes_bytes = tensors[0], [one.nbytes for one in tensors]
        is_alike = all(one.dtype == first.dtype and (one.ndim == 1 or one.shape == first.shape) for one in tensors)
        if self._memory is None or not is_alike or sum(sizes_bytes) > len(piece.positions) * self._bytes_per_image:
            return None
        # The channels of bytes are innermost, as they were decoded.
        is_picture = first.ndim == 3 and first.dtype == torch.uint8
        flat = [(one.permute(1, 2, 0) if is_picture else one).flatten() for one in tensors]
        torch.cat(flat, out=self._area(piece)[: sum(sizes_bytes)].view(first.dtype))
        shape = (sum(sizes_bytes),) if first.ndim == 1 else (len(tensors), *first.shape)
        return Placed(str(first.dtype).removeprefix("torch."), shape)

    # --- in the process that has made the slots --------------------------------------------------------------------

    def join(self, pieces: Sequence[tuple[Piece, Batch]]) -> Batch:
        """Make one batch of its pieces, with its pixels where a GPU can copy them from by itself."""
        start, stop = pieces[0][1].positions.start, pieces[-1][1].positions.stop
        whole, pixels = Batch(range(start, stop)), list[Tensor]()
        for piece, part in pieces:
            if part.placed is not None:
                content = self._find(piece, part.placed)
                if part.encoded:
                    part.encoded = [(content, part.encoded[0][1])]
                else:
                    part.pixels_NCHW = content
            if part.pixels_NCHW is not None:
                pixels.append(part.pixels_NCHW)
            whole.add(part)
        if pixels:
            whole.pixels_NCHW = self._pinned(pieces[0][0], _joined(pixels))
        return whole

    def lend(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Pass batches on, in order, and take the slot of each back when the model has it."""
        for batch in batches:
            yield batch
            if has_streams(self._device):
                done = torch.Event(self._device, blocking=True)  # Waiting without takes a core.
                done.record(torch.accelerator.current_stream(self._device))
                self._in_use.append(done)
                while self._in_use and (len(self._in_use) > _PASSES_IN_FLIGHT or self._in_use[0].query()):
                    self._in_use.popleft().synchronize()
                    self._released[0] += 1
            else:
                self._released[0] += 1

    def close(self) -> None:
        """Give back what a GPU knows of this memory, once it copies from it no more."""
        if self._registered:
            torch.accelerator.synchronize(self._device)
            for address in self._registered:
                torch.cuda.cudart().cudaHostUnregister(address)
            self._registered.clear()

    def _area(self, piece: Piece) -> Tensor:
        assert self._memory is not None
        start = piece.batch % self._count * self._slot_bytes + piece.first * self._bytes_per_image
        return self._memory[start : start + len(piece.positions) * self._bytes_per_image]

    def _find(self, piece: Piece, placed: Placed) -> Tensor:
        dtype, area = getattr(torch, placed.dtype), self._area(piece)
        content = area[: math.prod(placed.shape) * dtype.itemsize].view(dtype)
        if len(placed.shape) == 1 or dtype != torch.uint8:
            return content.view(placed.shape)
        images, channels, height_px, width_px = placed.shape
        return content.view(images, height_px, width_px, channels).permute(0, 3, 1, 2)

    def _pinned(self, piece: Piece, pixels_NCHW: Tensor) -> Tensor:
        """Have a GPU know the memory of a batch's pixels, or return a copy of them in memory that it knows."""
        if not has_streams(self._device):
            return pixels_NCHW
        address = pixels_NCHW.data_ptr()
        is_in_slot = self._memory is not None and address == self._area(piece).data_ptr()
        if not is_in_slot or self._device.type != "cuda":
            return pixels_NCHW.pin_memory()
        if address not in self._registered:
            # Only now: the pages of a slot that is in use are there, and registering them takes 2 ms.
            status = torch.cuda.cudart().cudaHostRegister(address, self._slot_bytes, 0)
            if int(status) != 0:
                return pixels_NCHW.pin_memory()
            self._registered.add(address)
        return pixels_NCHW


def _joined(pieces_NCHW: Sequence[Tensor]) -> Tensor:
    """Return pieces of one batch as a batch: the memory that they have already, if they follow each other."""
    first = pieces_NCHW[0]
    follow = all(
        other.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and other.dtype == first.dtype
        and other.data_ptr() == one.data_ptr() + one.nbytes
        for one, other in pairwise(pieces_NCHW)
    )
    if not follow:
        return torch.cat(list(pieces_NCHW))
    return first.as_strided((sum(map(len, pieces_NCHW)), *first.shape[1:]), first.stride())
