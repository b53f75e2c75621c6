"""How a forward pass runs: precision, memory format, and no transformer fast path."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@contextlib.contextmanager
def _every_submodule_is_called() -> Iterator[None]:
    """Switch off PyTorch's transformer fast path, which computes a whole encoder layer without calling its parts."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def inference(device: torch.device, precision: str) -> Iterator[None]:
    autocast = PRECISIONS[precision]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(_every_submodule_is_called())
        if autocast is not None:
            stack.enter_context(torch.autocast(device.type, autocast))
        yield


class ForwardIsDone(BaseException):
    """Ends a forward pass early. Not an `Exception`, so that no `except Exception` of a model swallows it."""
