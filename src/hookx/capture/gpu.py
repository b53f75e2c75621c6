"""Copy activations from a GPU to pinned memory while the next passes run."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor


class GPUCopies:
    """Copies to pinned memory on a separate stream, overlapping the passes that follow.

    A live activation is first cloned on the GPU, in stream order, so that a later in-place operation cannot reach it
    before it is copied. The clones take memory until their pass is waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self.model_seconds = self.copying_seconds = 0.0
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._begin = self._now()
        self._copies: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._passes: deque[tuple[torch.cuda.Event, torch.cuda.Event, list[Any]]] = deque()
        self._finished = 0

    def begin_pass(self) -> None:
        self._begin, self._copies = self._now(), []

    def copy(self, rows: Tensor, value: Tensor, *, is_live: bool) -> None:
        snapshot = value.clone(memory_format=torch.contiguous_format) if is_live else value.contiguous()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            begin = self._now()
            rows.copy_(snapshot, non_blocking=True)
            self._copies.append((begin, self._now()))
        snapshot.record_stream(self._stream)  # The allocator must not reuse its memory before it is copied.

    def end_pass(self) -> None:
        self._passes.append((self._begin, self._now(), self._copies))

    def wait(self, passes: int) -> None:
        while self._finished < passes:
            self._finish_oldest()
            self._finished += 1

    def _finish_oldest(self) -> None:
        begin, end, copies = self._passes.popleft()
        end.synchronize()
        self.model_seconds += begin.elapsed_time(end) / 1000
        for begin, end in copies:
            end.synchronize()
            self.copying_seconds += begin.elapsed_time(end) / 1000

    def _now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
