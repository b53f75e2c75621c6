"""A worker on this host, started by whoever owns a run, or by an actor of an engine on its behalf. No torch."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from hookx.errors import HookxError, system_failure
from hookx.launch.messages import Message, encode
from hookx.run.children import how_it_ended

_WAIT_FOR_EXIT_SECONDS = 30


class LocalWorker:
    """A worker on this host: a process that ends with this one."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        # -P: the working directory must not shadow what the worker imports.
        command = [sys.executable, "-P", "-m", "hookx.launch.worker", str(os.getpid())]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables}
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0
            )
        except OSError as error:
            raise system_failure(error, "cannot start a worker") or HookxError(
                f"cannot start a worker: {error}"
            ) from None
        assert self._process.stdout is not None
        self._lines = os.fdopen(self._process.stdout.fileno(), "rb", closefd=False)

    def send(self, message: Message) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # It has ended, as `receive` will say.
            self._process.stdin.write(encode(message))

    def receive(self) -> Message | None:
        """Return its next message; None once it has ended."""
        with contextlib.suppress(ValueError):  # A line that was cut by its end.
            if line := self._lines.readline():
                return dict[str, Any](json.loads(line))
        return None

    def finish(self) -> None:
        """Let it end by itself."""
        if self._process.stdin is not None:
            self._process.stdin.close()

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> str:
        """Wait until it has ended; return how, in words."""
        try:
            exit_code = self._process.wait(timeout=_WAIT_FOR_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            exit_code = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        return how_it_ended(exit_code)
