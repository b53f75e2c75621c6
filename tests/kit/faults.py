"""System calls that fail at a chosen place, in any process: a library for LD_PRELOAD, built when it is first needed."""

from __future__ import annotations

import errno
import functools
import os
import struct
import subprocess
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_SOURCE = Path(__file__).with_name("faults.c")
MAX_RULES = 64


@functools.cache
def _library() -> Path:
    """Build the library into a folder that the processes of one test session share."""
    folder = Path(tempfile.gettempdir()) / f"hookx-faults-{os.getuid()}-{_SOURCE.stat().st_mtime_ns}"
    folder.mkdir(exist_ok=True)
    library = folder / "faults.so"
    if not library.exists():
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".so", delete=False) as aside:
            subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-w", "-o", aside.name, _SOURCE, "-ldl"], check=True)
        os.replace(aside.name, library)
    return library


@dataclass(frozen=True)
class Fault:
    """One rule: calls number `first` to `last` (None: all that follow) on files whose path holds `path` go wrong.

    Args:
        call: a function of faults.c, such as "open", "read", "stat", "mmap", "fork" or "flock".
        what: the name of an errno ("EIO") or of a signal that kills the process ("SIGKILL"); "lie" for a flock or
            fsync that reports success and does nothing; "done EIO" for a link or rename that succeeds and reports a
            failure; "" only to count.
        path: a part of the path, or with "$" behind it its end.
    """

    call: str
    what: str
    first: int = 1
    last: int | None = None
    path: str = ""

    def __str__(self) -> str:
        import signal

        if self.what.startswith("SIG"):
            what = str(-getattr(signal, self.what))
        else:
            done, _, name = self.what.rpartition(" ")
            what = name if name == "lie" else f"{done}{getattr(errno, name) if name else 0}"
        return f"{self.call}|{what}|{self.first}-{self.last or 0}|{self.path}"


class Faults:
    """Faults for the processes that are started with its `environment`; they count calls together.

    Example:
        >>> import sys
        >>> faults = Faults(Fault("open", "EIO", path="/proc/version"))
        >>> command = [sys.executable, "-c", "open('/proc/version')"]
        >>> ended = subprocess.run(command, env=os.environ | faults.environment, capture_output=True, text=True)
        >>> ended.stderr.splitlines()[-1], faults.counts
        ("OSError: [Errno 5] Input/output error: '/proc/version'", [1])
    """

    def __init__(self, *rules: Fault) -> None:
        assert len(rules) <= MAX_RULES
        self.rules = rules
        self._file = tempfile.NamedTemporaryFile(prefix="hookx-faults-")  # noqa: SIM115 - it lasts as long as this
        self._file.write(bytes(8 * MAX_RULES))
        self._file.flush()
        weakref.finalize(self, self._file.close)

    @property
    def environment(self) -> Mapping[str, str]:
        """The variables that a process needs to run with these faults."""
        return {
            "LD_PRELOAD": str(_library()),
            "FAULTS": ";".join(map(str, self.rules)),
            "FAULTS_COUNTS": self._file.name,
        }

    @property
    def counts(self) -> list[int]:
        """How many calls fitted each rule, whether or not they failed."""
        self._file.seek(0)
        return list(struct.unpack_from(f"{len(self.rules)}Q", self._file.read(8 * MAX_RULES)))
