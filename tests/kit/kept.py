"""A command held together with every process that it starts, so that all of them can be stopped, killed and ended.

This file is also the program that does so. It is the parent of whatever the command leaves behind, daemons included,
and kills them all when it is told to end, or when the tests are killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


class Kept:
    """A running command and what it has started.

    Args:
        command: The program and its arguments.
        log: A file to which standard output and standard error are appended.
        environment: All of its variables; those of this process by default.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.log = log
        with log.open("ab") as output:
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )

    @property
    def processes(self) -> list[int]:
        """Return the ids of all processes of the command that run now."""
        return descendants_of(self._keeper.pid)

    @property
    def is_running(self) -> bool:
        """Whether the command, or something that it has started, runs."""
        return self._keeper.poll() is None

    def send(self, number: signal.Signals) -> None:
        """Send a signal to all processes, those included that are started meanwhile."""
        reached: set[int] = set()
        while new := set(self.processes) - reached:
            for process in new:
                send_signal(process, number)
            reached |= new

    def freeze(self) -> None:
        self.send(signal.SIGSTOP)

    def thaw(self) -> None:
        self.send(signal.SIGCONT)

    def kill(self) -> None:
        """Kill all processes, as a loss of power does, and wait until none is left."""
        self.freeze()  # Nothing must be started, and nothing notices that something else is gone.
        while self.is_running:
            self.send(signal.SIGKILL)
            time.sleep(0.01)

    def end(self) -> None:
        """Kill what is left; the second time does nothing."""
        self._keeper.terminate()
        self._keeper.wait()


@contextmanager
def kept(command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> Iterator[Kept]:
    """Run a command, and kill it and everything that it has started when the block is left."""
    running = Kept(command, log, environment)
    try:
        yield running
    finally:
        running.end()


def descendants_of(process: int) -> list[int]:
    """Return the ids of a process's children, of their children, and so on; zombies do not count."""
    found: list[int] = []
    for child in _children_of(process):
        if not _is_zombie(child):
            found.append(child)
        found += descendants_of(child)
    return found


def send_signal(process: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # It has ended.
        os.kill(process, number)


def _children_of(process: int) -> list[int]:
    children: list[int] = []
    with contextlib.suppress(OSError):  # It has ended.
        for task in os.listdir(f"/proc/{process}/task"):
            children += map(int, Path(f"/proc/{process}/task/{task}/children").read_text().split())
    return children


def _is_zombie(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _keep(tests: int, command: list[str]) -> None:
    """Run a command, wait for it and for what it leaves behind, and exit as the command did."""

    def end(_number: int, _frame: object) -> None:
        while left := descendants_of(os.getpid()):
            for process in left:
                send_signal(process, signal.SIGSTOP)
            for process in left:
                send_signal(process, signal.SIGKILL)
            time.sleep(0.01)
        while True:  # Not every system's first process reaps what it inherits.
            try:
                os.wait()
            except ChildProcessError:
                os._exit(0)

    library = ctypes.CDLL(None)
    library.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, end)
    library.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != tests:
        return  # They ended before they could be heard of.
    main, code = os.posix_spawnp(command[0], command, os.environ), 0
    while True:
        try:
            process, status = os.wait()
        except ChildProcessError:
            break
        if process == main:
            code = os.waitstatus_to_exitcode(status)
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    _keep(int(sys.argv[1]), sys.argv[2:])
