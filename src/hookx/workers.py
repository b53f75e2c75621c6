"""A process that computes on the CPU by itself: its cores, its one thread, its memory.

Several such processes side by side beat one forward pass on many threads, because nobody waits for anybody. And a pass
on one thread adds in one order, so its bits do not depend on how many cores there are.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import torch

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
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
    for an addition over 25 MB that is most of the time.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return  # Not glibc.
    libc.mallopt(_M_MMAP_THRESHOLD, 2**30)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_M_TOP_PAD, 64 * 2**20)
