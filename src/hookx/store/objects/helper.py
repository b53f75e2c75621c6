"""What asks the process that talks to object stores; see `hookx.store.objects.process`.

The first use starts it, so that this process may fork at any time; a forked one starts one of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from typing import Any

from hookx.errors import UsageError, system_failure

# What each scheme needs, and the extra that installs it.
_DRIVERS = {
    "s3": ("boto3", "s3"),
    "gs": ("obstore", "gs"),
    "az": ("obstore", "az"),
    "http": ("urllib3", "http"),
    "https": ("urllib3", "http"),
    "hf": ("huggingface_hub", "hf"),
}
_WAIT_FOR_EXIT_SECONDS = 5


class ObjectStoreError(OSError):
    """An object store refuses something, or is out of reach."""


class BusyStoreError(ObjectStoreError):
    """A store is busy or out of reach: the same request may succeed later."""


class NoRangesError(ObjectStoreError):
    """A server sends a whole file where a part of it was requested."""


class NoCredentialsError(PermissionError):
    """A store does not know who asks, whatever the request is."""


_REFUSED: dict[str, type[OSError]] = {
    "absent": FileNotFoundError,
    "denied": PermissionError,
    "unknown": NoCredentialsError,
    "busy": BusyStoreError,
    "unranged": NoRangesError,
}


def ask(scheme: str, bucket: str, key: str, what: str, **values: Any) -> tuple[dict[str, Any], memoryview]:
    """Return the answer to a request, and the bytes that belong to it.

    Raises:
        UsageError: what talks to such stores is not installed.
        OSError: `FileNotFoundError`, `PermissionError`, or `ObjectStoreError` for anything else.
    """
    package, extra = _DRIVERS[scheme]
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"{scheme}:// needs {package}", f"install it: pip install 'hookx-vision[{extra}]'")
    answer, data = _process().ask({"do": what, "scheme": scheme, "bucket": bucket, "key": key, **values})
    if kind := answer.get("refused"):
        raise _REFUSED.get(kind, ObjectStoreError)(answer["reason"])
    return answer, data


class _Process:
    """The process that talks to object stores on behalf of this one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # -P: the working directory must not shadow what it imports.
        command = [sys.executable, "-P", "-m", "hookx.store.objects.process"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            self._running = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # A terminal's Ctrl-C is not meant for it.
            )
        except OSError as error:
            raise system_failure(error, "cannot start what talks to the object store") or error from None

    def ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], memoryview]:
        """Return its answer, and the bytes that belong to it."""
        sent, received = self._running.stdin, self._running.stdout
        assert sent is not None and received is not None
        with self._lock:
            try:
                sent.write(json.dumps(request).encode() + b"\n")
                sent.flush()
                answer = json.loads(received.readline())
                data = bytearray(answer.get("bytes", 0))
                if received.readinto(data) < len(data):  # type: ignore[attr-defined]
                    raise ValueError
            except (OSError, ValueError):
                self.has_ended = True
                raise BusyStoreError("the process that talks to the object store has ended") from None
            except BaseException:  # Interrupted: the next request must not get the answer to this one.
                self.has_ended = True
                raise
        return answer, memoryview(data)

    has_ended = False

    def end(self) -> None:
        for pipe in (self._running.stdin, self._running.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        try:
            self._running.wait(_WAIT_FOR_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._running.kill()
            self._running.wait()


_running: _Process | None = None
_starting = threading.Lock()
_inherited: list[_Process | None] = []  # Kept: they belong to another process, which ends them.


def _process() -> _Process:
    global _running
    with _starting:
        if _running is not None and _running.has_ended:
            _end()
        _running = _running or _Process()
        return _running


def _begin_anew() -> None:
    """Forget, in a process that was forked, what talks to the stores for its parent."""
    global _running, _starting
    _inherited.append(_running)
    _running, _starting = None, threading.Lock()


def _end() -> None:
    global _running
    if _running is not None:
        _running.end()
    _running = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
atexit.register(_end)
