"""What a device reports: too little memory, a device that is broken, or a mistake of the model's."""

from __future__ import annotations

import pytest
import torch

from hookx.capture.failures import is_broken, is_out_of_memory, report_broken_device
from hookx.errors import DeviceError

# As PyTorch and the libraries below it word them.
TOO_LITTLE_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GB, other allocations: 1.1 GB)"),
    RuntimeError("nvjpegDecodeJpegDevice failed: 5"),
]
BROKEN = [
    RuntimeError("CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA`"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: uncorrectable ECC error encountered"),
    RuntimeError("CUDA driver error: unknown error"),
    RuntimeError("HIP error: unspecified launch failure"),
]
OF_THE_MODEL = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x512 and 256x10)"),
    RuntimeError("expected CUDA error handling to be tested"),
    ValueError("CUDA error: not a RuntimeError"),
]


@pytest.mark.parametrize("error", TOO_LITTLE_MEMORY, ids=str)
def test_too_little_memory_is_known_by_whichever_library_reports_it(error: Exception) -> None:
    assert is_out_of_memory(error) and not is_broken(error)


@pytest.mark.parametrize("error", BROKEN, ids=str)
def test_a_broken_device_ends_a_run_with_what_to_do(error: RuntimeError) -> None:
    assert is_broken(error) and not is_out_of_memory(error)
    with pytest.raises(DeviceError) as raised, report_broken_device():
        raise error
    first, *_, last = str(raised.value).splitlines()
    assert first == f"the device failed in the middle of a run: {str(error).splitlines()[0]}"
    assert last == "  finished shards are kept; run the same command again to resume"


@pytest.mark.skipif(not hasattr(torch, "AcceleratorError"), reason="PyTorch before 2.8")
def test_an_error_of_the_accelerator_is_one_however_it_is_worded() -> None:
    with pytest.raises(DeviceError, match="unheard of"), report_broken_device():
        raise torch.AcceleratorError("unheard of")


@pytest.mark.parametrize("error", OF_THE_MODEL, ids=str)
def test_a_mistake_of_the_model_passes_as_it_is(error: Exception) -> None:
    assert not is_broken(error) and not is_out_of_memory(error)
    with pytest.raises(type(error), match=r"multiplied|tested|RuntimeError"), report_broken_device():
        raise error
