"""Files behind http:// and https://, which can be read and not listed: the only file that imports urllib3."""

from __future__ import annotations

import functools
import http.client
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from urllib3 import PoolManager, ProxyManager, Retry, Timeout, make_headers
from urllib3.exceptions import (
    HTTPError,
    LocationValueError,
    MaxRetryError,
    NameResolutionError,
    ProxyError,
    ResponseError,
    SSLError,
    TimeoutError,
)
from urllib3.response import BaseHTTPResponse

from hookx.store.objects.bucket import (
    ANSWER_SECONDS_AT_ONCE,
    ATTEMPTS_AT_ONCE,
    CONNECT_SECONDS,
    REQUESTS_AT_ONCE,
    Kind,
    ReadableBucket,
    RefusedError,
)

T = TypeVar("T")

_OK, _PARTIAL, _NOT_SATISFIABLE = 200, 206, 416
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_KINDS: dict[int, Kind] = {404: "absent", 410: "absent", **dict.fromkeys(_PASSING, "busy")}
_REFUSING_HEAD = (400, 401, 403, 404, 405, 501)
_MAX_REDIRECTS = 10
_FIRST_PAUSE_SECONDS = 0.2
_BLOCK_BYTES = 2**20
# Compressed on the way, a file would have another length than the file has.
_HEADERS = {"Accept-Encoding": "identity", "User-Agent": "hookx"}
_SAFE = "/%:=&?~#+!$,;'@()*[]"  # What is quoted already stays so.


class HttpServer(ReadableBucket):
    """A server; the keys are paths with their queries."""

    def __init__(self, scheme: str, host: str) -> None:
        self._server = f"{scheme}://{host}"
        self._scheme, self._host = scheme, host

    def walk(self, prefix: str, after: str) -> Iterator[tuple[str, int]]:
        raise RefusedError("failed", "a folder cannot be listed over HTTP")

    def size_bytes(self, key: str) -> int:
        def look(answer: BaseHTTPResponse) -> int | None:
            self._check(answer, *_REFUSING_HEAD)
            return _length(answer) if answer.status == _OK else None

        def measure(answer: BaseHTTPResponse) -> int:
            if answer.status in (_PARTIAL, _NOT_SATISFIABLE) and (size_bytes := _whole_length(answer)) is not None:
                return size_bytes
            self._check(answer, _PARTIAL)
            size_bytes = _length(answer) if answer.status == _OK else None
            return sum(map(len, answer.stream(_BLOCK_BYTES))) if size_bytes is None else size_bytes

        size_bytes = self._ask("HEAD", key, {}, look)
        # Not every server answers HEAD, and not every one says a length; nor does a signature for GET hold for HEAD.
        return self._ask("GET", key, {"Range": "bytes=0-0"}, measure) if size_bytes is None else size_bytes

    def whole(self, key: str, max_bytes: int) -> tuple[bytes, int]:
        def read(answer: BaseHTTPResponse) -> tuple[bytes, int]:
            self._check(answer)
            size_bytes = _length(answer)
            if size_bytes is not None and size_bytes > max_bytes:
                return b"", size_bytes
            data = bytearray()
            for block in answer.stream(_BLOCK_BYTES):
                data += block
                if len(data) > max_bytes:
                    return b"", len(data)
            return bytes(data), len(data)

        return self._ask("GET", key, {}, read)

    def stretch(self, key: str, start: int, stop: int) -> tuple[bytes, int]:
        def read(answer: BaseHTTPResponse) -> tuple[bytes, int]:
            if answer.status == _NOT_SATISFIABLE:
                size_bytes = _whole_length(answer)
                return b"", -1 if size_bytes is None else size_bytes
            self._check(answer, _PARTIAL)
            if answer.status == _OK:
                size_bytes = _length(answer)
                if start or size_bytes is None or size_bytes > stop:
                    raise RefusedError("unranged", "the server sends whole files, and no parts of them")
            else:
                size_bytes = _whole_length(answer)
                if not answer.headers.get("Content-Range", "").lower().startswith(f"bytes {start}-"):
                    raise RefusedError("unranged", "the server sends other parts of files than it is told to")
            data = b"".join(answer.stream(_BLOCK_BYTES))[: stop - start]
            if size_bytes is not None and len(data) < min(stop, size_bytes) - start:
                raise RefusedError("busy", "the server sent too little")
            return data, -1 if size_bytes is None else size_bytes

        return self._ask("GET", key, {"Range": f"bytes={start}-{stop - 1}"}, read)

    def _headers(self) -> Mapping[str, str]:
        return _HEADERS

    def _url(self, key: str) -> str:
        return f"{self._server}/{quote(key, _SAFE, errors='surrogateescape')}"

    def _ask(self, method: str, key: str, headers: Mapping[str, str], read: Callable[[BaseHTTPResponse], T]) -> T:
        """Return what `read` takes of the answer to a request; try a few times where that may help."""
        for attempt in range(ATTEMPTS_AT_ONCE):
            if attempt:
                time.sleep(_FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
            try:
                answer = _pool(self._scheme, self._host).request(
                    method,
                    self._url(key),
                    headers={**self._headers(), **headers},
                    preload_content=False,
                    decode_content=False,
                    retries=_NO_RETRIES,
                    timeout=_TIMEOUT,
                )
                try:
                    return read(answer)
                finally:
                    # A connection on which more would follow is of no use.
                    answer.drain_conn() if method == "HEAD" else answer.close()
                    answer.release_conn()
            except (HTTPError, OSError) as error:
                refused = self._refusal(error)
            except RefusedError as error:
                refused = error
            if refused.kind != "busy":
                raise refused
        raise refused

    def _check(self, answer: BaseHTTPResponse, *others: int) -> None:
        """Raise `RefusedError` for an answer that holds neither the file nor anything else that is expected."""
        if answer.status not in (_OK, *others):
            words = http.client.responses.get(answer.status, "")
            reason = f"the server answers {answer.status} {words}".rstrip()
            raise RefusedError(kind_of(answer.status), reason)

    def _refusal(self, error: HTTPError | OSError) -> RefusedError:
        if isinstance(error, MaxRetryError) and error.reason is not None:
            error = error.reason if isinstance(error.reason, HTTPError | OSError) else error
        if isinstance(error, ResponseError):
            return RefusedError("denied", f"the server sends from one address to another, {_MAX_REDIRECTS} times")
        if isinstance(error, SSLError) and "CERTIFICATE" in str(error):
            return RefusedError("failed", f"{self._server} has no certificate that is trusted here")
        if isinstance(error, LocationValueError | ValueError):
            return RefusedError("failed", f"{self._server} is not the address of a server")
        what = next((text for kind, text in _WORDS.items() if isinstance(error, kind)), "the connection broke")
        if refused := re.search("refused|reset|unreachable|No route", str(error)):
            what = f"connection {refused[0]}" if refused[0] in ("refused", "reset") else "it is not reachable"
        return RefusedError("busy", f"{self._server} does not answer: {what}")


_NO_RETRIES = Retry(
    total=None,
    connect=0,
    read=0,
    status=0,
    other=0,
    redirect=_MAX_REDIRECTS,
    raise_on_status=False,
    respect_retry_after_header=False,
)
_TIMEOUT = Timeout(connect=CONNECT_SECONDS, read=ANSWER_SECONDS_AT_ONCE)
_WORDS: dict[type[Exception], str] = {
    NameResolutionError: "its name is not known",
    TimeoutError: "it took too long",
    ProxyError: "the proxy does not answer",
    SSLError: "no secure connection",
}


def kind_of(status: int) -> Kind:
    """Return what an answer says that is not the file; all else is of the file, as a name that the server refuses."""
    return _KINDS.get(status, "denied")


def _pool(scheme: str, host: str) -> PoolManager:
    """Return the connections to all servers, or to the proxy that the environment names for one."""
    return _connections(None if proxy_bypass(host) else getproxies().get(scheme))


@functools.cache
def _connections(proxy: str | None) -> PoolManager:
    # A table can name a million servers: few stay connected.
    pools, connections = 2 * REQUESTS_AT_ONCE, REQUESTS_AT_ONCE
    if proxy is None:
        return PoolManager(pools, maxsize=connections)
    user = urlsplit(proxy)
    login = f"{unquote(user.username)}:{unquote(user.password or '')}" if user.username else None
    return ProxyManager(proxy, pools, proxy_headers=make_headers(proxy_basic_auth=login), maxsize=connections)


def _length(answer: BaseHTTPResponse) -> int | None:
    text = answer.headers.get("Content-Length", "")
    return int(text) if text.isdecimal() and answer.headers.get("Content-Encoding", "identity") == "identity" else None


def _whole_length(answer: BaseHTTPResponse) -> int | None:
    """Return how long the file is of which a part was sent."""
    text = answer.headers.get("Content-Range", "").rpartition("/")[2]
    return int(text) if text.isdecimal() else None
