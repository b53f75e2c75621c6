"""A model's modules by path, and how a batch goes through them: device, precision, memory format, an early end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hookx.capture.arithmetic import arithmetic

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def module_classes(model: nn.Module) -> dict[str, str]:
    """Return path -> class name of every module, in order of registration; the model itself is '.'."""
    return {path: type(module).__name__ for path, module in modules_of(model).items()}


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return path -> module, in order of registration; a module registered twice has both paths."""
    return {path or ".": module for path, module in model.named_modules(remove_duplicate=False)}


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class ForwardIsDone(BaseException):
    """Ends a forward pass early. Not an `Exception`: a model's own `except Exception` must not swallow it."""


@dataclass(frozen=True)
class Runner:
    """A module in eval mode, and how batches go through it.

    Example:
        >>> Runner.of(nn.Conv2d(3, 4, 1), precision="bf16").run(torch.rand(2, 3, 8, 8)).dtype
        torch.bfloat16
    """

    module: nn.Module
    forward: Callable[[Tensor], Any]  # takes a batch (N, 3, H, W) through the module; often the module itself
    device: torch.device  # of the module, and of the batches
    precision: str  # a key of PRECISIONS
    memory_format: str  # a key of MEMORY_FORMATS, for the batches; the caller converts the weights

    @classmethod
    def of(
        cls,
        module: nn.Module,
        forward: Callable[[Tensor], Any] | None = None,
        *,
        precision: str = "fp32",
        memory_format: str = "contiguous",
    ) -> Runner:
        """Run a module on the device of its first parameter, or else the CPU; `forward` defaults to the module."""
        device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
        return cls(module, module if forward is None else forward, device, precision, memory_format)

    def run(self, pixels_NCHW: Tensor, *, warn: bool = False) -> Any:
        """Return what the model returns for a batch, without gradients; exceptions pass through."""
        pixels_NCHW = pixels_NCHW.contiguous(memory_format=MEMORY_FORMATS[self.memory_format])
        # PyTorch's transformer fast path computes an encoder layer without calling its submodules.
        fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with torch.inference_mode(), arithmetic(self.precision, self.device, warn=warn):
                return self.forward(pixels_NCHW)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
