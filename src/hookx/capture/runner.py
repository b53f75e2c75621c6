"""Run a forward pass: on which device, in which precision and memory format, and how to end it early."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hookx.capture.modules import device_of

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@contextlib.contextmanager
def _without_fast_path() -> Iterator[None]:
    """Switch off PyTorch's transformer fast path, which computes an encoder layer without calling its submodules."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@dataclass(frozen=True)
class Runner:
    """A module and how batches go through it.

    Example:
        >>> Runner.of(nn.Conv2d(3, 4, 1), precision="bf16").run(torch.rand(2, 3, 8, 8)).dtype
        torch.bfloat16
    """

    module: nn.Module
    forward: Callable[[Tensor], Any]
    """Takes a batch (N, 3, H, W) through the module; often the module itself."""
    device: torch.device
    """Where the module is."""
    precision: str
    """'fp32', or 'bf16' or 'fp16' (autocast)."""
    memory_format: str
    """'contiguous' or 'channels_last', for the images; moving the weights is up to the caller."""

    @classmethod
    def of(
        cls,
        module: nn.Module,
        forward: Callable[[Tensor], Any] | None = None,
        *,
        precision: str = "fp32",
        memory_format: str = "contiguous",
    ) -> Runner:
        """Run a module where it is; `forward` defaults to a call of the module."""
        return cls(module, module if forward is None else forward, device_of(module), precision, memory_format)

    def run(self, pixels_NCHW: Tensor) -> Any:
        """Take a batch on the module's device through the model without gradients; return what the model returns.

        Exceptions pass through, `ForwardIsDone` included.
        """
        pixels_NCHW = pixels_NCHW.contiguous(memory_format=MEMORY_FORMATS[self.memory_format])
        with inference(self.device, self.precision):
            return self.forward(pixels_NCHW)


@contextlib.contextmanager
def inference(device: torch.device, precision: str) -> Iterator[None]:
    """Switch off gradients and the transformer fast path, and set autocast for a precision."""
    autocast = PRECISIONS[precision]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(_without_fast_path())
        if autocast is not None:
            stack.enter_context(torch.autocast(device.type, autocast))
        yield


class ForwardIsDone(BaseException):
    """Ends a forward pass early. Not an `Exception`: a model's own `except Exception` must not swallow it."""
