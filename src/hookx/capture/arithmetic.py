"""The arithmetic of a pass: its precision, and deterministic algorithms on an accelerator.

These are settings of the whole process. They hold for the length of a pass, and what the caller had set is put back.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils import deterministic

T = TypeVar("T")

PRECISIONS = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

NOT_DETERMINISTIC = "does not have a deterministic implementation"
# Half of cuBLAS's matrix products add in another order from run to run, unless their workspace is fixed before the
# first of them: docs.nvidia.com/cuda/cublas, "Results reproducibility".
_CUBLAS_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def fix_workspace() -> None:
    """Have cuBLAS add in one order; called before the first pass on a GPU. A setting of the user's is kept."""
    os.environ.setdefault(*_CUBLAS_WORKSPACE)


@contextlib.contextmanager
def arithmetic(precision: str, device: torch.device, *, warn: bool = False) -> Iterator[None]:
    """Compute in a precision, a key of `PRECISIONS`, while the `with` block lasts.

    An NVIDIA GPU since Ampere multiplies float32 numbers as TF32 where that is allowed, with 10 bits of mantissa
    instead of 23: pytorch.org/docs/stable/notes/cuda.html. PyTorch allows it in convolutions. Here only 'tf32' allows
    it, in convolutions and in matrix products; in 'bf16' and 'fp16', which are autocast, what stays in float32 is
    computed in full. On an accelerator, algorithms are chosen by rule and deterministic ones are preferred; `warn` lets
    through PyTorch's warnings of operations that have none.

    Example:
        >>> torch.set_float32_matmul_precision("high")
        >>> with arithmetic("fp32", torch.device("cpu")):
        ...     torch.get_float32_matmul_precision()
        'highest'
        >>> torch.get_float32_matmul_precision()
        'high'
        >>> torch.set_float32_matmul_precision("highest")
    """
    autocast = PRECISIONS[precision]
    with (
        _float32_products(allow_tf32=precision == "tf32"),
        _deterministic(warn=warn) if device.type not in ("cpu", "meta") else contextlib.nullcontext(),
        torch.autocast(device.type, autocast) if autocast else contextlib.nullcontext(),
    ):
        yield


@contextlib.contextmanager
def _float32_products(*, allow_tf32: bool) -> Iterator[None]:
    """Allow or forbid TF32, and whatever else has fewer bits than float32, by all the names that PyTorch gives it.

    Since PyTorch 2.9 each kind of operation has a precision of its own. The older switches set these too, but raise an
    error when they are read after the newer ones were used: pytorch.org/docs/stable/notes/cuda.html.
    """
    kinds = _kinds_of_products()
    newer = [kind.fp32_precision for kind in kinds]
    cudnn, matrices = torch.backends.cudnn, torch.get_float32_matmul_precision
    older = _read_older(lambda: cudnn.allow_tf32, kinds), _read_older(matrices, kinds)
    try:
        _set(kinds, allow_tf32, "high" if allow_tf32 else "highest", ["tf32" if allow_tf32 else "ieee"] * len(kinds))
        yield
    finally:
        _set(kinds, *older, newer)


def _set(kinds: list[Any], allow_tf32: bool, matrices: str, newer: list[str]) -> None:
    torch.backends.cudnn.allow_tf32 = allow_tf32
    torch.set_float32_matmul_precision(matrices)
    for kind, precision in zip(kinds, newer, strict=True):  # At last: the older switches change the newer ones.
        kind.fp32_precision = precision


def _read_older(read: Callable[[], T], kinds: list[Any]) -> T:
    """Read an older switch; where the newer ones disagree with it, it can be read once these are set to agree."""
    for agreeing in ("ieee", "tf32"):
        try:
            return read()
        except RuntimeError:
            for kind in kinds:
                kind.fp32_precision = agreeing
    return read()


def _kinds_of_products() -> list[Any]:
    """Return what has a `fp32_precision` of its own, since PyTorch 2.9."""
    backends: Any = torch.backends
    cuda, cudnn, mkldnn = backends.cuda, backends.cudnn, backends.mkldnn
    if not hasattr(cudnn, "conv"):
        return []
    return [cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]


@contextlib.contextmanager
def _deterministic(*, warn: bool) -> Iterator[None]:
    """Choose algorithms by rule, not by timing, and deterministic ones where there are any."""
    cudnn = torch.backends.cudnn
    memory: Any = deterministic  # a module with a property
    flags = cudnn.benchmark, cudnn.deterministic, memory.fill_uninitialized_memory
    mode = torch.get_deterministic_debug_mode()
    cudnn.benchmark, cudnn.deterministic = False, True
    torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms would import PyTorch's compiler.
    memory.fill_uninitialized_memory = False  # It costs time, and captures nothing.
    try:
        with warnings.catch_warnings():
            if not warn:
                warnings.filterwarnings("ignore", f".*{NOT_DETERMINISTIC}")
            yield
    finally:
        cudnn.benchmark, cudnn.deterministic, memory.fill_uninitialized_memory = flags
        torch.set_deterministic_debug_mode(mode)
