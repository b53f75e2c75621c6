"""What goes wrong on a device rather than in a model: memory that runs out, and errors that surface late."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch

from hookx.errors import THEN_RESUME, DeviceError

# Libraries that find no memory for themselves raise a RuntimeError, as MPS does for any memory.
_NO_MEMORY = re.compile(
    r"out of memory|_STATUS_(ALLOC_FAILED|\w*OUT_OF_\w*MEMORY)|nvjpeg\w* failed: 5\b",  # 5: ALLOCATOR_FAILURE
    re.IGNORECASE,
)
# After one of these, PyTorch 2.8 and later raise torch.AcceleratorError; before, it was a RuntimeError.
_BROKEN = re.compile(
    r"^(CUDA|HIP|XPU|MPS)( driver)? error|device-side assert|illegal memory access|ECC error", re.IGNORECASE
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that a device has too little memory, whichever library reports it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error)))


def is_broken(error: BaseException) -> bool:
    """Return whether an error comes from the device itself, which then computes nothing more for this process."""
    newer = getattr(torch, "AcceleratorError", ())
    return not is_out_of_memory(error) and (
        isinstance(error, newer) or (isinstance(error, RuntimeError) and bool(_BROKEN.search(str(error))))
    )


@contextlib.contextmanager
def report_broken_device(when: str = "in the middle of a run") -> Iterator[None]:
    """Raise `DeviceError` for an error of the device, which can surface in any call after the one that caused it."""
    try:
        yield
    except RuntimeError as error:
        if not is_broken(error):
            raise
        first_line = str(error).splitlines()[0]
        raise DeviceError(
            f"the device failed {when}: {first_line}",
            "if it fails at the same place, find the operation: CUDA_LAUNCH_BLOCKING=1, or --device cpu",
            THEN_RESUME,
        ) from None
