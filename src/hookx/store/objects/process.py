"""The program that talks to object stores, in a process of its own: what talks to them has threads, and hookx forks.

    python -m hookx.store.objects.process

It reads requests on standard input, a line of JSON each, and answers on standard output: a line of JSON, and behind it
the bytes of the request. It ends with whoever started it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from hookx.signals import STOPPING
from hookx.store.objects.bucket import Bucket, RefusedError, without_secrets

Answer = dict[str, Any]


class Requests:
    """The requests; every one names a scheme, a bucket and a key."""

    def __init__(self) -> None:
        self._buckets: dict[tuple[str, str], Bucket] = {}

    def answer(self, do: str, scheme: str, bucket: str, key: str, **values: Any) -> tuple[Answer, bytes]:
        if (scheme, bucket) not in self._buckets:
            self._buckets[scheme, bucket] = _open(scheme, bucket)
        answer: tuple[Answer, bytes] = getattr(self, f"_{do}")(self._buckets[scheme, bucket], key, **values)
        return answer

    def _names(self, bucket: Bucket, key: str) -> tuple[Answer, bytes]:
        return {"names": bucket.names(key)}, b""

    def _size(self, bucket: Bucket, key: str) -> tuple[Answer, bytes]:
        return {"size": bucket.size_bytes(key)}, b""

    def _read(self, bucket: Bucket, key: str, ranges: list[tuple[int, int]]) -> tuple[Answer, bytes]:
        data = bucket.read(key, [(start, stop) for start, stop in ranges])
        return {"bytes": len(data)}, data

    def _put(self, bucket: Bucket, key: str, file: str, replace: bool) -> tuple[Answer, bytes]:
        return {"is_ours": bucket.put(key, Path(file), replace=replace)}, b""

    def _remove(self, bucket: Bucket, key: str) -> tuple[Answer, bytes]:
        bucket.remove(key)
        return {}, b""

    def _probe(self, bucket: Bucket, key: str) -> tuple[Answer, bytes]:
        """Find out whether the store can be written to, and refuses to create what is there."""
        name, nothing = f"{key}/.probe-{secrets.token_hex(8)}.aside", Path(os.devnull)
        bucket.put(name, nothing, replace=False)
        is_kept = not bucket.put(name, nothing, replace=False)
        with contextlib.suppress(RefusedError):  # Not everybody may remove what he has written.
            bucket.remove(name)
        return {"is_kept": is_kept}, b""

    def _abandon(self, bucket: Bucket, key: str, older_than: float) -> tuple[Answer, bytes]:
        return {"uploads": bucket.abandon_uploads(key, older_than)}, b""


def _open(scheme: str, bucket: str) -> Bucket:
    if scheme == "s3":
        from hookx.store.objects.s3 import S3Bucket

        return S3Bucket(bucket)
    from hookx.store.objects.obstores import ObstoreBucket

    return ObstoreBucket(scheme, bucket)


def serve(requests: Iterator[bytes], answer: Callable[[Answer, bytes], None]) -> None:
    """Answer requests, one after the other."""
    known = Requests()
    for line in requests:
        try:
            answer(*known.answer(**json.loads(line)))
        except RefusedError as refused:
            answer({"refused": refused.kind, "reason": str(refused)}, b"")
        except Exception as error:  # of a file that is to be sent, or of a library: whoever asked says it
            answer({"refused": "failed", "reason": without_secrets(f"{type(error).__name__}: {error}")}, b"")


def main() -> None:
    """Serve the process that started this one, until it closes the pipe or ends, in the middle of a request as well."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)  # They are meant for that process, which may have work to finish.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(sys.stdin.buffer, lines), daemon=True).start()

    def answer(head: Answer, data: bytes) -> None:
        out.write(json.dumps(head).encode() + b"\n")
        out.write(data)
        out.flush()

    serve(iter(lines.get, b""), answer)


def _receive(source: BinaryIO, lines: queue.SimpleQueue[bytes]) -> None:
    for line in source:
        lines.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()
