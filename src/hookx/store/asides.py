"""Names for what is still being written: every writer has its own, and tells what the dead left from what is in use.

A name ends in the host, the process and a random number, as in `.index.csv.node7.52d1c09e-4711.88123-0badcafe.aside`.
So two writers never share a file, whether or not the file system can lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ASIDE = ".aside"  # the suffix of what is still being written
_MAX_NAME_BYTES = 255  # of one name, in all common file systems
_MAX_HOST_CHARACTERS = 32
MAX_AGE_SECONDS = 24 * 3600  # after which what another host left is given up
_MARK = re.compile(
    r"\.(?P<mark>(?P<host>[A-Za-z0-9_]+\.[0-9a-f]{8})-(?P<process>\d+)\.(?P<start>\d+)-[0-9a-f]{8})\.aside\Z"
)


def new_mark() -> str:
    """Return what tells this process's names from those of every other, and these from its earlier ones."""
    return f"{_host()}-{os.getpid()}.{_start_of(os.getpid()) or 0}-{secrets.token_hex(4)}"


def aside_of(path: Path, mark: str) -> Path:
    """Return where the writer with this mark writes a file before it is whole."""
    return path.with_name(f"{_beginning(path, mark)}.{mark}{ASIDE}")


def _beginning(path: Path, mark: str) -> str:
    room = _MAX_NAME_BYTES - len(f".{mark}{ASIDE}")
    return os.fsencode(f".{path.name}")[:room].decode(errors="ignore")  # The mark alone tells names apart.


def is_aside(name: str) -> bool:
    return name.startswith(".") and name.endswith(ASIDE)


@dataclass(frozen=True)
class Aside:
    """What somebody writes, or has left behind, beside the files of a directory."""

    path: Path
    mark: str = ""  # '' for a name that this version of hookx does not give
    host: str = ""
    process: int = 0
    start: int = 0  # of the process, in ticks since boot; 0 if it could not tell

    @property
    def shard(self) -> int | None:
        """The number of the shard that it becomes; None if it becomes something else."""
        found = re.match(r"\.shard-(\d+)-of-", self.path.name)
        return int(found[1]) if found else None

    @property
    def is_of_this_host(self) -> bool:
        return self.host == _host()

    @property
    def is_in_use(self) -> bool:
        """Whether a process of this host is still there to finish it."""
        return self.is_of_this_host and _is_running(self.process, self.start)

    def is_of(self, path: Path) -> bool:
        """Whether it becomes this file."""
        return bool(self.mark) and self.path.name == aside_of(path, self.mark).name


def asides_in(folder: Path) -> Iterator[Aside]:
    """Yield what is being written in a folder, or was left there."""
    for name in filter(is_aside, os.listdir(folder)):
        if found := _MARK.search(name):
            mark, host, process, start = found.groups()
            yield Aside(folder / name, mark, host, int(process), int(start))
        else:
            yield Aside(folder / name)


def left_overs_in(folder: Path) -> Iterator[Aside]:
    """Yield what nobody will finish: this host's without their process, and other hosts' that are older than a day.

    Names without a mark are those of earlier versions, which did not write without a lock.
    """
    now = None
    for aside in asides_in(folder):
        with contextlib.suppress(OSError):  # It may be published or removed right now.
            if not aside.mark:
                is_left_over = True
            elif not aside.is_of_this_host:
                now = now or clock_of(folder)
                is_left_over = now - os.lstat(aside.path).st_mtime > MAX_AGE_SECONDS
            else:
                is_left_over = not aside.is_in_use
            if is_left_over:
                yield aside


def remove_left_overs(folder: Path) -> None:
    """Remove the files that nobody will finish; a folder stays, because only an export makes one, and removes it."""
    for aside in left_overs_in(folder):
        with contextlib.suppress(OSError):  # What cannot be removed disturbs nobody.
            if not stat.S_ISDIR(os.lstat(aside.path).st_mode):
                os.unlink(aside.path)


def clock_of(folder: Path) -> float:
    """Return the time by the clock of the file system, which need not be this host's."""
    probe = aside_of(folder / "clock", new_mark())
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        return os.lstat(probe).st_mtime
    finally:
        with contextlib.suppress(OSError):
            os.unlink(probe)


def _host() -> str:
    """Name this host, since it was booted, and its namespace of process ids: one means nothing outside of them.

    Containers often share a host's name and a directory, but not the numbers of their processes.
    """
    name = os.uname().nodename
    facts = [name]
    with contextlib.suppress(OSError):  # Only Linux has these.
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        facts.append(os.readlink("/proc/self/ns/pid"))
    digest = hashlib.sha256(os.fsencode("\n".join(facts))).hexdigest()[:8]
    return f"{re.sub('[^A-Za-z0-9]', '_', name)[:_MAX_HOST_CHARACTERS] or '_'}.{digest}"


def _is_running(process: int, start: int) -> bool:
    """Whether a process is there that began at this tick of the clock: the system uses its number again."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # It is another user's.
    found = _start_of(process)
    return found is None or (found >= 0 if start == 0 else found == start)


def _start_of(process: int) -> int | None:
    """Return when a process began, in ticks since boot; -1 if it has ended, and None if the system does not tell."""
    try:
        # The name, which can hold anything, ends with the last parenthesis. Source: proc_pid_stat(5).
        fields = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()
        return -1 if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None
