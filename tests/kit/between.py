"""A server between a client and a store of objects that counts what passes, and fails as networks and stores do."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from kit.s3 import Store
from kit.serving import serving


@dataclass
class Between:
    """What passes, and what goes wrong with it.

    Attributes:
        store: the same store, by way of this server.
        requests: method and path of each request so far.
        bytes_down: what the store has sent, without headers.
        busy_for: how many of the next requests are answered by 503.
        lose_answers_of: the store does what such requests ask, and the connection breaks instead of its answer; as in
            'POST uploadId'. Each is lost once.
    """

    store: Store
    requests: list[str] = field(default_factory=list)
    bytes_down: int = 0
    busy_for: int = 0
    lose_answers_of: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def _is_meant(by: str, what: str) -> bool:
    command, word = by.split()
    return what.startswith(command) and word in what


@contextmanager
def between(store: Store) -> Iterator[Between]:
    """Serve a store at another address until the block is left."""
    target = urlsplit(store.endpoint)
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            what = f"{self.command} {self.path}"
            with lock:
                state.requests.append(what)
                is_busy, state.busy_for = state.busy_for > 0, max(0, state.busy_for - 1)
            if is_busy:
                self.answer(
                    503, {}, b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
                )
                return
            assert target.hostname is not None
            connection = http.client.HTTPConnection(target.hostname, target.port, timeout=60)
            connection.request(self.command, self.path, body, dict(self.headers.items()))
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
            with lock:
                state.bytes_down += len(content)
                losing = next((one for one in state.lose_answers_of if _is_meant(one, what)), None)
                if losing is not None and answer.status < 300:
                    state.lose_answers_of.remove(losing)
                    state.lost.append(what)
                    self.close_connection = True
                    return
            self.answer(answer.status, dict(answer.getheaders()), content)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = pass_on

        def answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                    self.send_header(name, value)
            length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    environment = store.environment | {"AWS_ENDPOINT_URL": endpoint}
    state = Between(replace(store, endpoint=endpoint, environment=environment))
    with serving(server):
        yield state
