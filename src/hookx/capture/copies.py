"""Activations on their way from an accelerator to rows in pinned memory, beside the passes that follow."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor


def has_streams(device: torch.device) -> bool:
    """Return whether a device computes while its process goes on: CUDA, ROCm or XPU. MPS is used without streams."""
    return device.type not in ("cpu", "meta", "mps")


@dataclass
class _Pass:
    """The events of one pass and of its copies, in stream order."""

    begin: torch.Event
    end: torch.Event | None = None
    copies: list[tuple[torch.Event, torch.Event]] = field(default_factory=list)


class Copies:
    """Copies to pinned memory on a separate stream, overlapping the passes that follow.

    A live activation is first cloned on the device, in stream order, so that a later in-place operation cannot reach it
    before it is copied. The clones take memory until their copies are done.

    One thread runs the passes; any thread may wait for them.
    """

    def __init__(self, device: torch.device) -> None:
        self.model_seconds = self.copying_seconds = 0.0
        self._device = device
        self._stream = torch.Stream(device)
        self._pass = _Pass(self._now())
        self._passes: deque[_Pass] = deque()
        self._ended = self._finished = 0  # passes: all of them, and those whose copies were waited for
        self._waited_for = 0  # passes, with whatever else the device was doing
        self._waiting = threading.Lock()

    def begin_pass(self) -> None:
        self._pass = _Pass(self._now())

    def copy(self, rows: Tensor, value: Tensor, *, is_live: bool) -> None:
        """Copy an activation into pinned rows; they are complete once its pass is waited for.

        Args:
            is_live: whether the model holds the same memory, and may overwrite it.
        """
        snapshot = value.clone(memory_format=torch.contiguous_format) if is_live else value.contiguous()
        self._stream.wait_stream(torch.accelerator.current_stream(self._device))
        with as_current(self._stream):
            begin = self._now()
            rows.copy_(snapshot, non_blocking=True)
            self._pass.copies.append((begin, self._now()))
        snapshot.record_stream(self._stream)  # The allocator must not reuse its memory before it is copied.

    def end_pass(self) -> None:
        self._pass.end = self._now()
        self._passes.append(self._pass)
        self._ended += 1

    def wait(self, passes: int) -> None:
        """Wait for the first `passes` passes that have ended, and for their copies."""
        with self._waiting:
            while self._finished < passes:
                one = self._passes.popleft()
                assert one.end is not None
                one.end.synchronize()
                self.model_seconds += one.begin.elapsed_time(one.end) / 1000
                for begin, end in one.copies:
                    end.synchronize()
                    self.copying_seconds += begin.elapsed_time(end) / 1000
                self._finished += 1

    def wait_for_all(self) -> bool:
        """Wait for whatever is on its way, that of a pass that failed included; return whether there was any."""
        torch.accelerator.synchronize(self._device)
        before, self._waited_for = self._waited_for, self._ended
        return self._ended > before

    def _now(self) -> torch.Event:
        # Waiting without `blocking` takes a core, which could decode images.
        event = torch.Event(self._device, enable_timing=True, blocking=True)
        event.record(torch.accelerator.current_stream(self._device))
        return event


@contextmanager
def as_current(stream: torch.Stream) -> Iterator[None]:
    """Make a stream the current one; `with stream:` is newer than the oldest PyTorch that hookx runs on."""
    before = torch.accelerator.current_stream(stream.device)
    torch.accelerator.set_stream(stream)
    try:
        yield
    finally:
        torch.accelerator.set_stream(before)
