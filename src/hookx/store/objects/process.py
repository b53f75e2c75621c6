"""The program that talks to object stores, in a process of its own: what talks to them has threads, and hookx forks.

    python -m hookx.store.objects.process

It reads requests on standard input, a line of JSON each, and answers on standard output: a line of JSON, and behind it
the bytes of the request. It ends with whoever started it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from hookx.signals import STOPPING
from hookx.store.objects.bucket import REQUESTS_AT_ONCE, Bucket, ReadableBucket, RefusedError, without_secrets

Answer = dict[str, Any]
_LISTED_AT_ONCE = 10_000
_MAX_BUCKETS = 1_000  # that are open at a time


class Requests:
    """The requests; every one names a scheme, a bucket and a key."""

    def __init__(self) -> None:
        self._buckets: dict[tuple[str, str, bool], Any] = {}
        self._walks: dict[tuple[ReadableBucket, str], tuple[str, Iterator[tuple[str, int]]]] = {}
        self._threads = ThreadPoolExecutor(REQUESTS_AT_ONCE)
        self._opening = threading.Lock()

    def answer(self, do: str, scheme: str, bucket: str, key: str, **values: Any) -> tuple[Answer, bytes]:
        opened = self._bucket(scheme, bucket, is_patient=do not in _OF_IMAGES)
        answer: tuple[Answer, bytes] = getattr(self, f"_{do}")(opened, key, **values)
        return answer

    def _bucket(self, scheme: str, bucket: str, *, is_patient: bool = False) -> Any:
        with self._opening:
            if len(self._buckets) > _MAX_BUCKETS:
                self._buckets.clear()
            asked = scheme, bucket, is_patient
            if asked not in self._buckets:
                self._buckets[asked] = _open(*asked)
            return self._buckets[asked]

    # --- of images: whoever asks tries again ---

    def _walk(self, bucket: ReadableBucket, key: str, after: str) -> tuple[Answer, bytes]:
        """List the next objects of a prefix; a listing that failed goes on behind the last one that came."""
        last, found = self._walks.pop((bucket, key), ("", None))
        if found is None or not after or last != after:
            found = bucket.walk(key, after)
        some = list(itertools.islice(found, _LISTED_AT_ONCE))
        if some:
            self._walks[bucket, key] = some[-1][0], found
        return {"objects": some}, b""

    def _sizes(self, _bucket: ReadableBucket, _key: str, others: Sequence[Sequence[str]]) -> tuple[Answer, bytes]:
        """Return for each scheme, bucket and key the size of the object, or how the store refuses to say it."""

        def size(other: Sequence[str]) -> int | tuple[str, str]:
            try:
                scheme, bucket, key = other
                return int(self._bucket(scheme, bucket).size_bytes(key))
            except RefusedError as refused:
                return refused.kind, str(refused)
            except Exception as error:  # of a library, and of one object: the others have their sizes
                return "failed", without_secrets(f"{type(error).__name__}: {error}")

        return {"sizes": list(self._threads.map(size, others))}, b""

    def _whole(self, bucket: ReadableBucket, key: str, max_bytes: int) -> tuple[Answer, bytes]:
        data, size_bytes = bucket.whole(key, max_bytes)
        return {"bytes": len(data), "size": size_bytes}, data

    def _stretch(self, bucket: ReadableBucket, key: str, start: int, stop: int) -> tuple[Answer, bytes]:
        data, size_bytes = bucket.stretch(key, start, stop)
        return {"bytes": len(data), "size": size_bytes}, data

    # --- of runs ---

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


_OF_IMAGES = ("walk", "sizes", "whole", "stretch")


def _open(scheme: str, bucket: str, is_patient: bool) -> ReadableBucket:
    if scheme == "s3":
        from hookx.store.objects.s3 import S3Bucket

        return S3Bucket(bucket, is_patient=is_patient)
    if scheme in ("http", "https"):
        from hookx.store.objects.http import HttpServer

        return HttpServer(scheme, bucket)
    if scheme == "hf":
        from hookx.store.objects.hub import HubRepository

        return HubRepository(bucket)
    from hookx.store.objects.obstores import ObstoreBucket

    return ObstoreBucket(scheme, bucket, is_patient=is_patient)


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
