"""Look at the size of every file of a long list, in several processes."""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import multiprocessing
import os
import sys
from array import array
from multiprocessing.process import BaseProcess

from hookx.images.addresses import is_url
from hookx.images.files import Files
from hookx.images.retries import Retries, is_of_the_file
from hookx.options import RETRY_SECONDS
from hookx.signals import begin_child, defer_signals

_MAX_FILES_ALONE = 20_000  # measured by this process alone; several processes share a longer list
# Processes, because threads would wait for each other's lock between calls this short; 8 of them even on fewer cores,
# because a remote disk answers several requests at a time.
_MEASURING_PROCESSES = 8
UNMEASURABLE = -1  # in place of a size: the file's own fault
ELSEWHERE = -(2**40)  # behind a URL, and measured by whoever asks there
UNAVAILABLE = -2  # and below: this minus the number of the system's error


def measure(
    files: Files, *, retry_seconds: float = RETRY_SECONDS, max_files_alone: int = _MAX_FILES_ALONE
) -> array[int]:
    """Return the size of every file in bytes; several processes share a long list, where most of the time goes.

    -1 stands for a file that has none, by its own fault; a number below that for one that the system cannot look at.
    The archives say how large their members are, which have 0 here. Files behind URLs have `ELSEWHERE`.
    """
    shared = memoryview(mmap.mmap(-1, len(files) * 8)).cast("q")
    # A daemonic process, such as a pool's worker, must not have children.
    if len(files) > max_files_alone and sys.platform == "linux" and not multiprocessing.current_process().daemon:
        _measure_in_processes(files, shared, retry_seconds)
    else:
        _measure_part(files, range(len(files)), shared, retry_seconds)
    return array("q", bytes(shared))


def _measure_in_processes(files: Files, sizes_bytes: memoryview[int], retry_seconds: float) -> None:
    share, fork = -(-len(files) // _MEASURING_PROCESSES), multiprocessing.get_context("fork")
    parts = [range(len(files))[first : first + share] for first in range(0, len(files), share)]
    started: list[BaseProcess] = []
    try:
        with defer_signals(), contextlib.suppress(OSError):  # The system may refuse more processes.
            for part in parts:
                child = fork.Process(
                    target=_measure_in_child, args=(files, part, sizes_bytes, retry_seconds, os.getpid())
                )
                child.start()
                started.append(child)
        for process in started:
            process.join()
        for process, part in itertools.zip_longest(started, parts):
            if process is None or process.exitcode != 0:  # It was refused, or killed.
                _measure_part(files, part, sizes_bytes, retry_seconds)
    finally:
        for process in started:
            process.kill()
            process.join()


def _measure_in_child(
    files: Files, part: range, sizes_bytes: memoryview[int], retry_seconds: float, parent: int
) -> None:
    begin_child(parent)
    _measure_part(files, part, sizes_bytes, retry_seconds)


def _measure_part(files: Files, part: range, sizes_bytes: memoryview[int], retry_seconds: float) -> None:
    retries = Retries(retry_seconds)  # One outage hits many files, and only the first waits for all of the time.
    for position in part:
        if files.is_member(position):
            continue
        file = files.encoded(position)
        if is_url(file):
            sizes_bytes[position] = ELSEWHERE
            continue
        while True:
            try:
                sizes_bytes[position] = os.stat(file).st_size
                retries = Retries(retry_seconds)
            except OSError as error:
                if is_of_the_file(error, file, was_seen=files.was_found(position)):
                    sizes_bytes[position] = UNMEASURABLE  # Reading it will fail, with the reason.
                elif (
                    not isinstance(error, PermissionError) and retries.wait()
                ):  # One outage hits many files: only its first waits for all of the time.
                    continue
                else:
                    sizes_bytes[position] = UNAVAILABLE - (error.errno or errno.EIO)
            break
