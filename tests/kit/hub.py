"""A local Hugging Face hub: it serves folders as repositories over HTTP as the real one does, or refuses requests."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Serve `folder/owner/name/` as the repository owner/name; one called 'gated' asks for its terms first."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(urlparse(self.path).path)
            if path.startswith("/api/models/"):
                repository, _, _ = path.removeprefix("/api/models/").partition("/revision/")
                files = sorted((folder / repository).glob("*"))
                if repository.endswith("/gated"):
                    return self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
                if not files:
                    return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
                siblings = [{"rfilename": file.name} for file in files]
                info = {"_id": "1", "id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings}
                return self.answer(200, json.dumps(info).encode(), {})
            repository, _, rest = path.removeprefix("/").partition("/resolve/")
            file = folder / repository / rest.partition("/")[2]
            if not file.is_file():
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            content = file.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            self.answer(200, content, {"ETag": etag, "X-Repo-Commit": COMMIT})

        do_HEAD = do_GET

        def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with _serve(Handler, monkeypatch):
        yield


@contextmanager
def broken_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Answer every request with 503; give the paths about repositories that were requested, to count attempts."""
    requested: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if "/api/models/" in self.path or "/resolve/" in self.path:  # The library also asks about itself.
                requested.append(self.path)
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with _serve(Handler, monkeypatch):
        yield requested


@contextmanager
def _serve(handler: type[BaseHTTPRequestHandler], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        with monkeypatch.context() as patch:
            patch.setattr(constants, "ENDPOINT", address)
            template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
            patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            yield
    finally:
        server.shutdown()
        server.server_close()
