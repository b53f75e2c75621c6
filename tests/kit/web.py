"""A web server of a folder that counts requests, answers ranges, and fails as servers and networks do."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from kit.serving import serving

_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass
class Web:
    """What the server does, and what it has been asked.

    Attributes:
        url: the address of the folder, with '/' at its end.
        requests: method and path, with the query, of each request so far.
        bytes_down: what was sent of files.
        answers: the status that a path gets in place of its file, which may have any number of turns: path -> [status].
        busy_for: how many of the next requests are answered by 503.
        reset_for: how many of the next requests have their connection reset instead.
        cut_for: how many of the next GETs get half of what their Content-Length says.
        has_ranges, has_head, has_length: what the server knows.
        moves: paths that lead to others.
        texts: what some paths hold that are not in the folder.
        seconds: how long each answer takes.
    """

    url: str
    requests: list[str] = field(default_factory=list)
    bytes_down: int = 0
    answers: dict[str, int] = field(default_factory=dict)
    busy_for: int = 0
    reset_for: int = 0
    cut_for: int = 0
    has_ranges: bool = True
    has_head: bool = True
    has_length: bool = True
    moves: dict[str, str] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def counts(self) -> Counter[str]:
        """How many requests of each method there were."""
        return Counter(request.partition(" ")[0] for request in self.requests)


@contextmanager
def web(folder: Path) -> Iterator[Web]:
    """Serve a folder until the block is left."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            with lock:
                state.requests.append(f"{self.command} {self.path}")
                is_busy, state.busy_for = state.busy_for > 0, max(0, state.busy_for - 1)
                is_reset, state.reset_for = state.reset_for > 0, max(0, state.reset_for - 1)
                is_cut = self.command == "GET" and state.cut_for > 0
                state.cut_for -= is_cut
            time.sleep(state.seconds)
            if is_reset:
                self.reset()
            elif is_busy:
                self.answer(503)
            else:
                self.send_file(is_cut)

        do_HEAD = do_GET

        def send_file(self, is_cut: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            if self.command == "HEAD" and not state.has_head:
                self.answer(405)
            elif path in state.moves:
                self.answer(302, {"Location": state.moves[path]})
            elif path in state.answers:
                self.answer(state.answers[path])
            elif path not in state.texts and not (folder / path.lstrip("/")).is_file():
                self.answer(404)
            else:
                content = state.texts.get(path) or (folder / path.lstrip("/")).read_bytes()
                headers, status = {"Last-Modified": self.date_time_string(0), "ETag": '"1"'}, 200
                asked = _RANGE.fullmatch(self.headers.get("Range", ""))
                if asked and state.has_ranges:
                    size_bytes, start = len(content), int(asked[1])
                    if start >= size_bytes:
                        self.answer(416, {"Content-Range": f"bytes */{size_bytes}"})
                        return
                    content = content[start : int(asked[2] or size_bytes - 1) + 1]
                    headers["Content-Range"] = f"bytes {start}-{start + len(content) - 1}/{size_bytes}"
                    status = 206
                self.answer(status, headers, content, is_cut)

        def answer(
            self, status: int, headers: dict[str, str] | None = None, content: bytes = b"", is_cut: bool = False
        ) -> None:
            self.send_response_only(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            if state.has_length or status != 200:
                self.send_header("Content-Length", str(len(content)))
            else:
                self.send_header("Connection", "close")
                self.close_connection = True
            self.end_headers()
            if self.command == "HEAD":
                return
            sent = content[: len(content) // 2] if is_cut else content
            with contextlib.suppress(OSError):
                self.wfile.write(sent)
            with lock:
                state.bytes_down += len(sent)
            self.close_connection = self.close_connection or is_cut

        def reset(self) -> None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()

        def finish(self) -> None:
            with contextlib.suppress(OSError, ValueError):
                super().finish()

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, *_: object) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    state = Web(f"http://127.0.0.1:{server.server_port}/")
    with serving(server):
        yield state
