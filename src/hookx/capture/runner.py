"""Run a forward pass: on which device, in which precision and memory format, and how to end it early."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hookx.capture.modules import device_of

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class ForwardIsDone(BaseException):
    """Ends a forward pass early. Not an `Exception`: a model's own `except Exception` must not swallow it."""


@dataclass(frozen=True)
class Runner:
    """A module, and how batches go through it.

    Attributes:
        module: the model, in eval mode.
        forward: takes a batch (N, 3, H, W) through the module; often the module itself.
        device: the device of the module, and of the batches.
        precision: 'fp32', or 'bf16' or 'fp16' (autocast).
        memory_format: 'contiguous' or 'channels_last', for the batches; the caller converts the weights.

    Example:
        >>> Runner.of(nn.Conv2d(3, 4, 1), precision="bf16").run(torch.rand(2, 3, 8, 8)).dtype
        torch.bfloat16
    """

    module: nn.Module
    forward: Callable[[Tensor], Any]
    device: torch.device
    precision: str
    memory_format: str

    @classmethod
    def of(
        cls,
        module: nn.Module,
        forward: Callable[[Tensor], Any] | None = None,
        *,
        precision: str = "fp32",
        memory_format: str = "contiguous",
    ) -> Runner:
        """Run a module on the device that it is on; `forward` defaults to the module."""
        return cls(module, module if forward is None else forward, device_of(module), precision, memory_format)

    def run(self, pixels_NCHW: Tensor) -> Any:
        """Return what the model returns for a batch, without gradients; exceptions pass through."""
        pixels_NCHW = pixels_NCHW.contiguous(memory_format=MEMORY_FORMATS[self.memory_format])
        autocast = PRECISIONS[self.precision]
        # PyTorch's transformer fast path computes an encoder layer without calling its submodules.
        fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with (
                torch.inference_mode(),
                torch.autocast(self.device.type, autocast) if autocast else contextlib.nullcontext(),
            ):
                return self.forward(pixels_NCHW)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
