"""What a run uses where the user names nothing: its device, processes, threads, memory, batches and memory format.

Rules choose them, not measurements: on a busy machine these differ, and the same command would store other bits.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from hookx.capture.arithmetic import fix_workspace
from hookx.capture.copies import has_streams
from hookx.errors import UsageError
from hookx.run.parts import count_shared_cores

# On the CPU, a batch has 16 images of up to 256 x 256 pixels, or fewer larger images with as many pixels: every worker
# holds one in memory. Below 16, convolutions spend noticeable time on the layout of their weights. Batches are smaller
# for a short list, so that every worker has work, and for large activations, because touching fresh memory is slow: 4
# or 8 images then, which divide a shard.
_BATCH_ON_CPU, _BATCHES_ON_CPU, _SMALL_BATCH_ON_CPU = 16, 16, 4
_USUAL_PX = 256 * 256
_BATCH_ON_CPU_BYTES = 32 * 2**20
# On a GPU, batches are larger, because launching the kernels of a pass takes as long for many images as for few: 128
# images of up to 256 x 256 pixels, but not more than half a gigabyte of activations, which wait in pinned memory.
_BATCH_ON_GPU, _SMALL_BATCH_ON_GPU, _BATCH_ON_GPU_BYTES = 128, 8, 512 * 2**20
_COLOURS = 3
_FIRST_WITH_TF32 = (8, 0)  # compute capability: Ampere
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # from glibc's malloc.h
_HEAP_BYTES = 512 * 2**20


def choose_device(name: str) -> torch.device:
    """Turn 'auto', 'cpu', 'cuda', 'cuda:1', 'xpu' or 'mps' into a device; `UsageError` for one that is absent."""
    present = ["cpu"]
    if torch.accelerator.is_available() and (accelerator := torch.accelerator.current_accelerator()) is not None:
        kind, count = accelerator.type, torch.accelerator.device_count()
        present += [kind, *(f"{kind}:{number}" for number in range(count))]
    if name == "auto":
        name = present[1] if len(present) > 1 else "cpu"
    if name not in present:
        raise UsageError(
            f"invalid --device '{name}': this machine has {', '.join(present)}", "or let hookx choose: --device auto"
        )
    device = torch.device(name)
    if device.type == "cuda":
        fix_workspace()
    if device.index is None and has_streams(device):
        return torch.device(device.type, torch.get_device_module(device).current_device())
    return device


def device_at(place: int) -> str:
    """Name the device of one of the processes of a run on this host; 'auto' where each process sees a single one.

    Slurm shows a task its own GPU if it is asked to; torchrun shows all of them to every process.
    """
    if torch.accelerator.is_available() and (count := torch.accelerator.device_count()) > 1:
        accelerator = torch.accelerator.current_accelerator()
        return f"{accelerator.type}:{place % count}" if accelerator is not None else "auto"
    return "auto"


def check_precision(precision: str, device: torch.device) -> None:
    """Raise `UsageError` if a device cannot compute in a precision."""
    if precision != "tf32":
        return
    if device.type != "cuda":
        raise UsageError(f"--precision tf32 needs an NVIDIA GPU, but the device is {device}", "write --precision fp32")
    if torch.version.cuda and torch.cuda.get_device_capability(device) < _FIRST_WITH_TF32:
        raise UsageError(f"{device_name(device)} has no TF32", "write --precision fp32")


def device_name(device: torch.device) -> str:
    """Name a device as a person knows it, without its number: 'cpu', or 'cuda (NVIDIA H100 80GB HBM3)'."""
    name_of = getattr(torch.get_device_module(device), "get_device_name", None)
    return f"{device.type} ({name_of(device)})" if name_of is not None else device.type


def describe_device(device: torch.device) -> dict[str, str]:
    """Return what else decides the bits that a device computes, for the record of a shard."""
    if device.type == "cuda":
        libraries = {"cuda": torch.version.cuda, "hip": torch.version.hip, "cudnn": torch.backends.cudnn.version()}
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return {"capability": capability} | {name: str(value) for name, value in libraries.items() if value}
    # Which instructions torch uses: the nodes of one cluster can differ, and sums of other lengths round otherwise.
    return {"instructions": torch.backends.cpu.get_cpu_capability()} if device.type == "cpu" else {}


def count_usable_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Return how many cores this process may use, by its affinity and the quota of its container, if it has one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # No cgroup, or no quota: "max".
        quota_us, period_us = map(int, quota.read_text().split())
        cores = min(cores, max(1, round(quota_us / period_us)))
    return cores


def choose_workers(workers: int | None, device: torch.device, cores: int | None = None) -> int:
    """Return how many worker processes to start: on the CPU they compute, too; beside a GPU they only decode."""
    if workers is not None:
        return workers
    cores = count_shared_cores(count_usable_cores()) if cores is None else cores
    return cores if device.type == "cpu" else max(1, cores - 1)


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """Compute on one thread, as every worker does, while the `with` block lasts.

    Several processes on one thread each beat one forward pass on many threads, because none waits for another. And a
    pass on one thread adds in one order, so its bits do not depend on the number of cores. Beside a GPU, the processes
    that decode have all cores, and what is left for this process would wait for each of its threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def keep_freed_memory() -> None:
    """Make this process reuse the memory of freed tensors; glibc returns each of more than 32 MiB to the system.

    A forward pass allocates the same tensors again and again. The system zeroes fresh pages, one page fault each: for
    an addition over 25 MB that is most of the time. The heap for the tensors grows at once, in addresses and not in
    memory, with pages of 2 MiB: 512 times fewer page faults, and fewer TLB misses.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(mmap, "MADV_HUGEPAGE"):
        return  # Not glibc, or not Linux.
    libc.mallopt(_M_MMAP_THRESHOLD, 2**30)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_M_TOP_PAD, 64 * 2**20)
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if heap := libc.malloc(_HEAP_BYTES):
        pages = -(-heap // mmap.PAGESIZE) * mmap.PAGESIZE, _HEAP_BYTES - mmap.PAGESIZE
        # It begins in memory that the parent had freed: small pages, which would be copied.
        libc.madvise(*pages, mmap.MADV_DONTNEED)
        libc.madvise(*pages, mmap.MADV_HUGEPAGE)  # A system without such pages refuses.
        libc.free(heap)  # It stays on the heap, which no longer returns anything.


def choose_batch_size(
    batch_size: int | str,
    device: torch.device,
    size_px: int | tuple[int, int],
    image_count: int,
    bytes_per_image: int,
) -> int:
    """Return the number of images in a forward pass; `size_px` is their height and width, or their side.

    Example:
        >>> cpu, avgpool_bytes, conv1_bytes = torch.device("cpu"), 4 * 512, 4 * 64 * 112 * 112
        >>> runs = (224, 10_000, avgpool_bytes), (518, 10_000, avgpool_bytes), (224, 100, avgpool_bytes)
        >>> [choose_batch_size("auto", cpu, *run) for run in runs]
        [16, 3, 6]
        >>> choose_batch_size("auto", cpu, 224, 10_000, conv1_bytes)
        8
        >>> [choose_batch_size("auto", torch.device("cuda"), *run) for run in runs]
        [128, 31, 128]
    """
    if batch_size != "auto":
        return int(batch_size)
    on_cpu = device.type == "cpu"
    largest, smallest, most_bytes = (
        (_BATCH_ON_CPU, _SMALL_BATCH_ON_CPU, _BATCH_ON_CPU_BYTES)
        if on_cpu
        else (_BATCH_ON_GPU, _SMALL_BATCH_ON_GPU, _BATCH_ON_GPU_BYTES)
    )
    by_count = max(smallest, image_count // _BATCHES_ON_CPU) if on_cpu else largest
    by_bytes = most_bytes // max(bytes_per_image, 1)
    power_of_two = max(smallest, 1 << by_bytes.bit_length() >> 1)
    pixels = math.prod((size_px, size_px) if isinstance(size_px, int) else size_px)
    return max(1, min(largest, largest * _USUAL_PX // pixels, by_count, power_of_two))


def choose_memory_format(
    memory_format: str, convolutions: Iterable[nn.Conv2d], device: torch.device, precision: str
) -> str:
    """Return 'contiguous' (NCHW) or 'channels_last' (NHWC), by the convolutions up to the last requested layer.

    channels_last speeds up convolutions over overlapping windows, in fp32 on a CPU and in half precision on a GPU. A
    transformer that cuts an image into patches has no such convolution. The first one, over red, green and blue, gains
    less than storing its output in NCHW costs.

    Example:
        >>> cpu = torch.device("cpu")
        >>> first, second = nn.Conv2d(3, 64, kernel_size=7, stride=2), nn.Conv2d(64, 64, kernel_size=3)
        >>> choose_memory_format("auto", [first, second], cpu, "fp32")
        'channels_last'
        >>> choose_memory_format("auto", [first], cpu, "fp32")
        'contiguous'
    """
    if memory_format != "auto":
        return memory_format
    overlap = any(
        math.prod(convolution.kernel_size) > math.prod(convolution.stride)
        for convolution in convolutions
        if convolution.in_channels > _COLOURS
    )
    gains = device.type == "cpu" or (has_streams(device) and precision != "fp32")
    return "channels_last" if overlap and gains else "contiguous"
