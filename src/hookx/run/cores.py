"""What a process that computes on the CPU gets: cores, one thread, memory.

Several such processes side by side beat one forward pass on many threads, because none waits for another. And a pass on
one thread adds in one order, so its bits do not depend on the number of cores.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import torch

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # from glibc's malloc.h
_HEAP_BYTES = 512 * 2**20
_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def count_usable_cores(quota: Path = _CGROUP_QUOTA) -> int:
    """Return how many cores this process may use, by its affinity and the quota of its container, if it has one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # No cgroup, or no quota: "max".
        quota_us, period_us = map(int, quota.read_text().split())
        cores = min(cores, max(1, round(quota_us / period_us)))
    return cores


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """Compute on one thread, as every worker does, while the `with` block lasts."""
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
