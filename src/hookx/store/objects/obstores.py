"""Buckets of Google and containers of Azure: the only file that imports obstore."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    GenericError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import AzureStore, GCSStore

from hookx.store.objects.bucket import (
    ANSWER_SECONDS,
    ANSWER_SECONDS_AT_ONCE,
    ATTEMPTS,
    ATTEMPTS_AT_ONCE,
    CONNECT_SECONDS,
    MIN_PART_BYTES,
    PARTS_AT_ONCE,
    PATIENCE_SECONDS,
    Bucket,
    Kind,
    RefusedError,
    part_bytes,
)

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

_PATIENTLY: RetryConfig = {
    "max_retries": 1000,
    "retry_timeout": timedelta(seconds=PATIENCE_SECONDS),
    "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=5), "base": 2},
}
_AT_ONCE: RetryConfig = {"max_retries": ATTEMPTS_AT_ONCE - 1}
_NOTHING = ".hookx"  # an object that need not exist
_STATUS = re.compile(r"status code: (\d+ [A-Za-z ]+)")
_PASSING = ("408", "429", "500", "502", "503", "504")


class ObstoreBucket(Bucket):
    """A bucket, with the credentials that obstore finds: in variables, in files, and from the machine."""

    def __init__(self, scheme: str, name: str, *, is_patient: bool = True) -> None:
        self._scheme, self._name, self._is_patient = scheme, name, is_patient
        self._store: ObjectStore | None = None

    @contextlib.contextmanager
    def _asking(self) -> Iterator[ObjectStore]:
        """Yield the store; `RefusedError` for what goes wrong in the block."""
        try:
            self._store = self._store or (self._first_met() if self._is_patient else self._open(_AT_ONCE))
            yield self._store
        except (BaseError, OSError, ValueError) as error:
            raise self._refusal(error) from None

    def _first_met(self) -> ObjectStore:
        """Return the store, once it has answered: if only to say that it is busy, which is waited for."""
        try:
            obstore.head(self._open({"max_retries": ATTEMPTS - 1}), _NOTHING)
        except (BaseError, OSError) as error:
            if not isinstance(error, FileNotFoundError) and not _STATUS.search(str(error)):
                raise
        return self._open(_PATIENTLY)

    def _open(self, again: RetryConfig) -> ObjectStore:
        wait: ClientConfig = {
            "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
            "timeout": timedelta(seconds=ANSWER_SECONDS if self._is_patient else ANSWER_SECONDS_AT_ONCE),
        }
        if self._scheme == "gs":
            return GCSStore(self._name, client_options=wait, retry_config=again)
        if os.environ.get("AZURE_STORAGE_USE_EMULATOR", "").lower() in ("1", "true"):
            wait["allow_http"] = True
        return AzureStore(self._name, client_options=wait, retry_config=again)

    def names(self, prefix: str) -> dict[str, tuple[int, float]]:
        with self._asking() as store:
            listed = obstore.list_with_delimiter(store, f"{prefix}/")["objects"]
        return {one["path"].rpartition("/")[2]: (one["size"], one["last_modified"].timestamp()) for one in listed}

    def walk(self, prefix: str, after: str) -> Iterator[tuple[str, int]]:
        # It lists by whole names of folders, and `prefix` ends with one.
        with self._asking() as store:
            for some in obstore.list(store, prefix.rstrip("/") or None, offset=after or None, chunk_size=1000):
                yield from ((one["path"], one["size"]) for one in some)

    def size_bytes(self, key: str) -> int:
        with self._asking() as store:
            return obstore.head(store, key)["size"]

    def whole(self, key: str, max_bytes: int) -> tuple[bytes, int]:
        with self._asking() as store:
            answer = obstore.get(store, key)
            size_bytes = answer.meta["size"]
            return (bytes(answer.bytes()) if size_bytes <= max_bytes else b""), size_bytes

    def stretch(self, key: str, start: int, stop: int) -> tuple[bytes, int]:
        with self._asking() as store:
            try:
                answer = obstore.get(store, key, options={"range": (start, stop)})
            except BaseError as error:
                if "status code: 416" in str(error):  # The object ends before.
                    return b"", -1
                raise
            return bytes(answer.bytes()), answer.meta["size"]

    def read(self, key: str, ranges: Sequence[tuple[int, int]]) -> bytes:
        starts, stops = zip(*ranges, strict=True)
        with self._asking() as store:
            return b"".join(map(bytes, obstore.get_ranges(store, key, starts=starts, ends=stops)))

    def put(self, key: str, file: Path, *, replace: bool) -> bool:
        size_bytes = file.stat().st_size
        with self._asking() as store:
            try:
                if size_bytes <= MIN_PART_BYTES:
                    obstore.put(store, key, file, mode="overwrite" if replace else "create", use_multipart=False)
                    return True
            except AlreadyExistsError:
                return False
            # obstore makes no upload in parts conditional: between two at the same time the last wins.
            if not replace and self._is_there(store, key):
                return False
            obstore.put(store, key, file, chunk_size=part_bytes(size_bytes), max_concurrency=PARTS_AT_ONCE)
        return True

    def _is_there(self, store: ObjectStore, key: str) -> bool:
        try:
            obstore.head(store, key)
        except FileNotFoundError:
            return False
        return True

    def remove(self, key: str) -> None:
        with self._asking() as store, contextlib.suppress(FileNotFoundError):
            obstore.delete(store, key)

    def abandon_uploads(self, prefix: str, older_than_seconds: float) -> int:
        return 0  # These stores give them up by themselves, Azure after a week.

    def _refusal(self, error: Exception) -> RefusedError:
        said, _, details = str(error).partition("\n\nDebug source")
        status = _STATUS.search(said)
        code, message = (re.search(f"<{name}>([^<]*)</{name}>", said) for name in ("Code", "Message"))
        if code and code[1] in ("NoSuchBucket", "ContainerNotFound", "ContainerBeingDeleted"):
            return RefusedError("failed", f"there is no bucket '{self._name}'")
        causes = re.findall(r'(?:message|error): "([^"]*)"', details)
        if status:
            answer = ": ".join(filter(None, (code and code[1], message and message[1])))
            reason = f"the store answers {status[1].strip()}" + (f" ({answer})" if answer else "")
        elif address := re.search(r"\b(https?://[^/\s]+)", said):
            reason = f"{address[1]} does not answer" + (f": {causes[-1]}" if causes else "")
        else:
            reason = (said.splitlines() or [type(error).__name__])[0]
        return RefusedError(_kind(error, status[1][:3] if status else ""), reason)


def _kind(error: Exception, status: str) -> Kind:
    if isinstance(error, FileNotFoundError):
        return "absent"
    if isinstance(error, UnauthenticatedError) or status == "401":
        return "unknown"
    if isinstance(error, PermissionDeniedError) or status == "403":
        return "denied"
    # What no status tells did not come from the store: no connection, or a broken one; or no credentials.
    is_passing = status in _PASSING if status else isinstance(error, GenericError)
    return "busy" if is_passing else "failed"
