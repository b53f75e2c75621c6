"""Servers that store objects and speak S3, each a process of its own: two keep their promises, one does not."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from kit.kept import kept
from kit.runs import wait_for

BUCKET = "features"
_KEY, _SECRET, _REGION = "minioadmin", "minioadmin", "us-east-1"


@dataclass(frozen=True)
class Store:
    """A running server with one empty bucket.

    `environment` is what boto3, obstore and the commands of this host need to reach it, and the rest of the variables.
    """

    endpoint: str
    bucket: str
    environment: dict[str, str]


def moto(folder: Path, port: int) -> list[str]:
    """Return the command of a server that honours conditions, of parts of an object as well."""
    return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]


def localbucket(folder: Path, port: int) -> list[str]:
    """Return the command of another that does, of other authors; it keeps objects as files."""
    return [sys.executable, "-m", "localbucket", str(folder), "--port", str(port)]


def nanio(folder: Path, port: int) -> list[str]:
    """Return the command of a server that accepts `If-None-Match: *` and replaces the object all the same."""
    return [sys.executable, "-m", "nanio", "serve", "--data-dir", str(folder), "--port", str(port)]


@contextmanager
def serve(command: Callable[[Path, int], list[str]]) -> Iterator[Store]:
    """Run one of the servers, with an empty bucket, until the block is left."""
    with tempfile.TemporaryDirectory(prefix="hookx-s3-") as name:
        folder, port = Path(name), _free_port()
        (folder / "data").mkdir()
        endpoint = f"http://127.0.0.1:{port}"
        variables = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        variables |= {"AWS_ACCESS_KEY_ID": _KEY, "AWS_SECRET_ACCESS_KEY": _SECRET, "AWS_REGION": _REGION}
        variables |= {"AWS_DEFAULT_REGION": _REGION, "AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": "true"}
        own = {"NANIO_ACCESS_KEY": _KEY, "NANIO_SECRET_KEY": _SECRET}
        with kept(command(folder / "data", port), folder / "log.txt", variables | own) as server:
            wait_for(lambda: _answers(port) or not server.is_running, 60)
            assert server.is_running, f"{command.__name__} did not start: {(folder / 'log.txt').read_text()[-2000:]}"
            store = Store(endpoint, BUCKET, variables)
            client(store).create_bucket(Bucket=BUCKET)
            yield store


def client(store: Store):  # type: ignore[no-untyped-def]  # boto3 makes its classes as it goes.
    """Return a client of boto3."""
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=store.endpoint,
        aws_access_key_id=_KEY,
        aws_secret_access_key=_SECRET,
        region_name=_REGION,
    )


def _answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
