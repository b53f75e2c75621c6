"""What a worker and the process that owns the run say to each other: a line of JSON a message, through two pipes."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from typing import Any

from hookx import errors
from hookx.errors import HookxError, UsageError
from hookx.options import ExtractOptions
from hookx.store.location import absolute, location_of

Message = dict[str, Any]
_MAX_LOG_CHARACTERS = 1000  # A line of up to 4,096 bytes is written whole, by whichever process.
_PROGRESS_SECONDS = 0.2


def encode(message: Message) -> bytes:
    return json.dumps(message).encode() + b"\n"


def check_can_be_sent(options: ExtractOptions) -> None:
    """Raise `UsageError` if another process cannot be told an option, because it is a function."""
    if callable(options.loader):
        raise UsageError(
            "a loader that is a function cannot be sent to other processes",
            "name it: loader='file.py:function', or 'python:package.module:function'",
        )


def options_to_json(options: ExtractOptions) -> Message:
    """Return the options of a worker: all but where the images lie, which it gets as a list, and what is called."""
    check_can_be_sent(options)
    values = {name: value for name, value in vars(options).items() if name not in ("images", "progress")}
    layers = [[value] if isinstance(value, str) else list(value) for value in (options.layers, options.exclude)]
    return values | {"out": str(absolute(location_of(options.out))), "layers": layers[0], "exclude": layers[1]}


def options_from_json(values: Message) -> ExtractOptions:
    return ExtractOptions(**values, images=())


def error_to_json(error: HookxError) -> list[str]:
    return [type(error).__name__, str(error)]


def error_from_json(described: list[str]) -> HookxError:
    """Make the error that a worker raised."""
    name, text = described
    kind = getattr(errors, name)
    return kind(text) if kind.__init__ is HookxError.__init__ else errors.StoreError(text)


class Sender:
    """Sends messages from any thread, and the sum of the progress a few times a second."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._lock = descriptor, threading.Lock()
        self._images, self._sent = 0, 0.0

    def send(self, **message: Any) -> None:
        content = memoryview(encode(message))
        with self._lock:
            while content:
                content = content[os.write(self._descriptor, content) :]

    def progress(self, images: int) -> None:
        self._images += images
        if time.monotonic() - self._sent > _PROGRESS_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._images:
            self.send(progress=self._images)
        self._images, self._sent = 0, time.monotonic()


class LogSender(logging.Handler):
    """Sends what is logged to the process that owns the run."""

    def __init__(self, sender: Sender) -> None:
        super().__init__()
        self._sender = sender

    def emit(self, record: logging.LogRecord) -> None:
        self._sender.send(log=[record.levelno, str(record.msg)[:80], record.getMessage()[:_MAX_LOG_CHARACTERS]])
