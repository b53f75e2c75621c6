"""Buckets of S3 and of everything that speaks it, through Amazon's own library: the only file that imports boto3.

Not through obstore, as the other stores are: it sends an object in parts, or on the condition that there is none yet,
and never both (0.12). A shard can be longer than one request may be.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import boto3
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ResponseStreamingError,
)

from hookx.store.objects.bucket import (
    ANSWER_SECONDS,
    ANSWER_SECONDS_AT_ONCE,
    ATTEMPTS,
    ATTEMPTS_AT_ONCE,
    CONNECT_SECONDS,
    MIN_PART_BYTES,
    PARTS_AT_ONCE,
    PATIENCE_SECONDS,
    REQUESTS_AT_ONCE,
    Bucket,
    Kind,
    RefusedError,
    part_bytes,
)

T = TypeVar("T")

_TAKEN = ("PreconditionFailed", "412")
_CONFLICT = ("ConditionalRequestConflict", "409")
_CONFLICTS = 5  # attempts where somebody completes the same object at the same moment
_ABSENT = ("NoSuchKey", "404", "NotFound")
_DENIED = ("AccessDenied", "403")
_UNKNOWN = (
    "SignatureDoesNotMatch",
    "InvalidAccessKeyId",
    "ExpiredToken",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "401",
)
_PASSING = (429, 500, 502, 503, 504)
_BUSY = ("SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "TooManyRequests")
_MAX_WAIT_SECONDS = 5.0  # between attempts
_NEAR_BYTES = 2**20  # Ranges that lie this close are fetched as one.


class S3Bucket(Bucket):
    """A bucket, with the keys, profiles, roles, region and address that Amazon's own tools take."""

    def __init__(self, name: str, *, is_patient: bool = True) -> None:
        self._name, self._is_patient = name, is_patient
        self._client = _client(is_patient=is_patient)
        self._has_answered = False
        self._threads = ThreadPoolExecutor(PARTS_AT_ONCE)

    def _call(self, call: Callable[..., T], **values: Any) -> T:
        """Call the store, again and again for a while if it is busy or away; for seconds only until it answers once."""
        began = time.monotonic()
        while True:
            try:
                answer = call(Bucket=self._name, **values)
            except (BotoCoreError, ClientError) as error:
                self._has_answered |= isinstance(error, ClientError)  # It is there, if only to say that it is busy.
                patience = PATIENCE_SECONDS if self._has_answered and self._is_patient else 0
                if not _is_passing(error) or time.monotonic() - began > patience:
                    raise
                time.sleep(random.uniform(0, _MAX_WAIT_SECONDS))
            else:
                self._has_answered = True
                return answer

    @contextlib.contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except (BotoCoreError, ClientError) as error:
            raise self._refusal(error) from None

    def names(self, prefix: str) -> dict[str, tuple[int, float]]:
        with self._in_words():
            listed = self._pages("list_objects_v2", "Contents", Prefix=f"{prefix}/", Delimiter="/")
        return {one["Key"].rpartition("/")[2]: (one["Size"], one["LastModified"].timestamp()) for one in listed}

    def _pages(self, operation: str, field: str, **values: Any) -> list[dict[str, Any]]:
        def list_all(**where: Any) -> list[dict[str, Any]]:
            pages = self._client.get_paginator(operation).paginate(**where)
            return [one for page in pages for one in page.get(field, ())]

        return self._call(list_all, **values)

    def walk(self, prefix: str, after: str) -> Iterator[tuple[str, int]]:
        with self._in_words():
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._name, Prefix=prefix, StartAfter=after
            )
            for page in pages:
                yield from ((one["Key"], one["Size"]) for one in page.get("Contents", ()))

    def size_bytes(self, key: str) -> int:
        with self._in_words():
            return int(self._call(self._client.head_object, Key=key)["ContentLength"])

    def whole(self, key: str, max_bytes: int) -> tuple[bytes, int]:
        def get(**values: Any) -> tuple[bytes, int]:
            answer = self._client.get_object(**values)
            with contextlib.closing(answer["Body"]) as body:
                size_bytes = int(answer["ContentLength"])
                return (bytes(body.read()) if size_bytes <= max_bytes else b""), size_bytes

        with self._in_words():
            return self._call(get, Key=key)

    def stretch(self, key: str, start: int, stop: int) -> tuple[bytes, int]:
        def get(**values: Any) -> tuple[bytes, int]:
            answer = self._client.get_object(**values)
            size_bytes = answer.get("ContentRange", "").rpartition("/")[2]
            return bytes(answer["Body"].read()), int(size_bytes) if size_bytes.isdecimal() else -1

        try:
            with self._in_words():
                return self._call(get, Key=key, Range=f"bytes={start}-{stop - 1}")
        except RefusedError as refused:
            if "InvalidRange" in str(refused):
                return b"", -1
            raise

    def read(self, key: str, ranges: Sequence[tuple[int, int]]) -> bytes:
        def get(**values: Any) -> bytes:
            return bytes(self._client.get_object(**values)["Body"].read())

        def read_one(one: tuple[int, int]) -> bytes:
            return self._call(get, Key=key, Range=f"bytes={one[0]}-{one[1] - 1}")

        together = _together(ranges)
        with self._in_words():
            found = dict(zip(together, self._threads.map(read_one, together), strict=True))
        starts = [start for start, _ in together]
        pieces = []
        for start, stop in ranges:
            first = together[bisect.bisect_right(starts, start) - 1]
            pieces.append(found[first][start - first[0] : stop - first[0]])
        return b"".join(pieces)

    def put(self, key: str, file: Path, *, replace: bool) -> bool:
        size_bytes, condition = file.stat().st_size, {} if replace else {"IfNoneMatch": "*"}
        is_large = size_bytes > MIN_PART_BYTES
        with self._in_words():
            if is_large and not replace and self._is_there(key):
                return False
            for attempt in range(_CONFLICTS):
                try:
                    if is_large:
                        self._send_in_parts(key, file, size_bytes, condition)
                    else:
                        self._call(self._client.put_object, Key=key, Body=file.read_bytes(), **condition)
                    return True
                except ClientError as error:
                    if _code(error) in _TAKEN:
                        return False
                    # Asked again after an answer that was lost, a store does not know what it has completed.
                    if _code(error) == "NoSuchUpload" and self._is_there(key, size_bytes):
                        return True
                    if _code(error) not in _CONFLICT or attempt == _CONFLICTS - 1:
                        raise
        raise AssertionError("unreachable")

    def _send_in_parts(self, key: str, file: Path, size_bytes: int, condition: dict[str, str]) -> None:
        upload = {"Key": key, "UploadId": self._call(self._client.create_multipart_upload, Key=key)["UploadId"]}
        step = part_bytes(size_bytes)

        def send(number: int) -> dict[str, Any]:
            with file.open("rb") as opened:
                opened.seek((number - 1) * step)
                data = opened.read(step)
            sent = self._call(self._client.upload_part, **upload, PartNumber=number, Body=data)
            return {"PartNumber": number, "ETag": sent["ETag"]}

        try:
            parts = list(self._threads.map(send, range(1, -(-size_bytes // step) + 1)))
            complete = self._client.complete_multipart_upload
            self._call(complete, **upload, MultipartUpload={"Parts": parts}, **condition)
        except BaseException:
            with contextlib.suppress(BotoCoreError, ClientError):  # `hookx finish` does so later.
                self._client.abort_multipart_upload(Bucket=self._name, **upload)
            raise

    def _is_there(self, key: str, size_bytes: int | None = None) -> bool:
        try:
            found = self._call(self._client.head_object, Key=key)["ContentLength"]
        except ClientError as error:
            if _code(error) in _ABSENT:
                return False
            raise
        return size_bytes in (None, found)

    def remove(self, key: str) -> None:
        with self._in_words():
            self._call(self._client.delete_object, Key=key)

    def abandon_uploads(self, prefix: str, older_than_seconds: float) -> int:
        before = datetime.now(UTC) - timedelta(seconds=older_than_seconds)
        with self._in_words():
            all_begun = self._pages("list_multipart_uploads", "Uploads", Prefix=f"{prefix}/")
            # Not every store heeds the prefix.
            of_run = [upload for upload in all_begun if upload["Key"].startswith(f"{prefix}/")]
            old = [upload for upload in of_run if upload["Initiated"] < before]
            for upload in old:
                abort = self._client.abort_multipart_upload
                self._call(abort, Key=upload["Key"], UploadId=upload["UploadId"])
        return len(old)

    def _refusal(self, error: BotoCoreError | ClientError) -> RefusedError:
        if isinstance(error, NoCredentialsError):
            return RefusedError(
                "unknown", "there are no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or aws configure"
            )
        passes: Kind = "busy" if _is_passing(error) else "failed"
        if not isinstance(error, ClientError):
            return RefusedError(passes, str(error))
        code, said = _code(error), error.response.get("Error", {}).get("Message", "")
        if code == "NoSuchBucket":
            return RefusedError("failed", f"there is no bucket '{self._name}'")
        reason = f"the store answers {code}" + (f" ({said})" if said else "")
        if code in ("PermanentRedirect", "301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"):
            reason += "; the bucket may lie in another region: set AWS_REGION"
        kinds: dict[Kind, Sequence[str]] = {"absent": _ABSENT, "denied": _DENIED, "unknown": _UNKNOWN}
        return RefusedError(next((kind for kind, codes in kinds.items() if code in codes), passes), reason)


def _client(*, is_patient: bool) -> Any:
    unsigned = os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true")
    config = Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=ANSWER_SECONDS if is_patient else ANSWER_SECONDS_AT_ONCE,
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS if is_patient else ATTEMPTS_AT_ONCE},
        max_pool_connections=max(PARTS_AT_ONCE, REQUESTS_AT_ONCE),
        # Not every store that speaks S3 takes checksums that it does not ask for.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        **({"signature_version": UNSIGNED} if unsigned else {}),
    )
    try:
        return boto3.session.Session().client("s3", config=config)
    except (BotoCoreError, ValueError) as error:  # a profile that does not exist, an address that is none
        raise RefusedError("unknown", str(error)) from None


def _is_passing(error: BotoCoreError | ClientError) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, ClientError):
        return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") in _PASSING or _code(error) in _BUSY
    return isinstance(error, HTTPClientError | IncompleteReadError | ResponseStreamingError)


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _together(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ranges that cover others, which lie near one another."""
    covering: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if covering and start - covering[-1][1] < _NEAR_BYTES:
            covering[-1] = (covering[-1][0], max(stop, covering[-1][1]))
        else:
            covering.append((start, stop))
    return covering
