"""A process that computes on the CPU by itself: its cores, its one thread, its memory.

Several such processes side by side beat one forward pass on many threads, because nobody waits for anybody. And a pass
on one thread adds in one order, so its bits do not depend on how many cores there are.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import torch

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_HEAP_BYTES = 512 * 2**20
_CGROUP_LIMIT = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Return how many cores this process may use: of its affinity, and of its container's quota if it has one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # No cgroup, or no quota: "max".
        quota_us, period_us = map(int, _CGROUP_LIMIT.read_text().split())
        cores = min(cores, max(1, round(quota_us / period_us)))
    return cores


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """Compute on one thread while the `with` block lasts, as every worker does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def keep_freed_memory() -> None:
    """Have this process reuse the memory of freed tensors, where glibc would give each of more than 32 MiB back.

    A forward pass allocates the same tensors again and again. Fresh pages from the system are zeroed, one fault each:
    for an addition over 25 MB that is most of the time. The heap that will hold them grows at once, by addresses and
    not by memory, and the system is asked for pages of 2 MiB there: 512 times fewer faults, and fewer misses of the
    tables that find a page.
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
        # It begins in what the parent had freed: pages that would be copied, small as they are.
        libc.madvise(*pages, mmap.MADV_DONTNEED)
        libc.madvise(*pages, mmap.MADV_HUGEPAGE)  # A system without such pages refuses.
        libc.free(heap)  # It stays on the heap, which gives nothing back any more.
