"""Images in a dataset of the Hugging Face Hub, or in a container of Azure's, by the names of their own tools."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kit.files import contents
from kit.web import web
from kit.whole_runs import extract, hookx, variables

pytestmark = pytest.mark.cluster
TOKEN = "hf_dG9rZW4tb2YtdGhlLXRlc3Rz"


def call(out: Path, environment: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    command = hookx(*extract(Path("."), out, *options)[:-1])
    return subprocess.run(
        command, env=variables({**os.environ, **environment}), capture_output=True, text=True, timeout=120
    )


def publish(pictures: Path, served: Path, prefix: str, revision: str = "main") -> None:
    """Lay out a dataset as the Hub serves it: its files, and what its API says about a folder of them."""
    files = served / "datasets/owner/name/resolve" / revision
    shutil.copytree(pictures, files / prefix)
    listing = served / "api/datasets/owner/name/tree" / revision / prefix
    listing.parent.mkdir(parents=True, exist_ok=True)
    found = sorted(file for file in (files / prefix).rglob("*") if file.is_file())
    entries = [
        {"type": "file", "oid": "0" * 40, "size": file.stat().st_size, "path": file.relative_to(files).as_posix()}
        for file in found
    ]
    listing.write_text(json.dumps([{"type": "directory", "oid": "1" * 40, "size": 0, "path": prefix}, *entries]))


def test_a_folder_of_a_dataset_gives_the_run_of_the_folder(pictures: Path, at_once: Path, tmp_path: Path) -> None:
    publish(pictures, tmp_path / "served", "train")
    publish(pictures, tmp_path / "served", "train", "refs%2Fpr%2F1")
    with web(tmp_path / "served") as hub:
        environment = {"HF_ENDPOINT": hub.url.rstrip("/"), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_TELEMETRY": "1"}
        hub.busy_for = 3
        done = call(tmp_path / "out", environment, "--workers", "2", "hf://datasets/owner/name/train/")
        assert done.returncode == 3, done.stderr
        assert contents(tmp_path / "out") == contents(at_once)
        assert TOKEN not in done.stderr and any("/resolve/main/train/" in request for request in hub.requests)
        done = call(tmp_path / "of-main", environment, "hf://datasets/owner/name@main/train")
        assert done.returncode == 3 and contents(tmp_path / "of-main") == contents(at_once), done.stderr
        wrong = call(tmp_path / "wrong", environment, "--retry-for", "0", "hf://datasets/owner/other/train/")
        assert wrong.returncode == 1 and "owner/other" in wrong.stderr and "Traceback" not in wrong.stderr
        one = call(tmp_path / "one", environment, "hf://datasets/owner/name/train/sky/hubble-0.png")
        assert one.returncode == 0, one.stderr


BLOB = (
    "<Blob><Name>{}</Name><Properties><Last-Modified>Thu, 01 Jan 1970 00:00:00 GMT</Last-Modified>"
    "<Content-Length>{}</Content-Length><Content-Type>image/png</Content-Type><Etag>1</Etag></Properties></Blob>"
)


def test_a_container_of_azure_gives_the_run_of_the_folder(pictures: Path, at_once: Path, tmp_path: Path) -> None:
    """It answers as Azure's own emulator does."""
    shutil.copytree(pictures, tmp_path / "devstoreaccount1/photos/some/of them")
    files = [file for file in sorted(pictures.rglob("*")) if file.is_file()]
    names = [(f"some/of them/{file.relative_to(pictures).as_posix()}", file.stat().st_size) for file in files]
    blobs = "".join(BLOB.format(*one) for one in names)
    listing = f"<EnumerationResults><Blobs>{blobs}</Blobs><NextMarker/></EnumerationResults>"
    with web(tmp_path) as store:
        environment = {"AZURE_STORAGE_USE_EMULATOR": "true", "AZURITE_BLOB_STORAGE_URL": store.url.rstrip("/")}
        store.texts = {"/devstoreaccount1/photos": listing.encode()}
        store.busy_for = 5
        done = call(tmp_path / "out", environment, "--workers", "2", "az://photos/some/of them/")
        assert done.returncode == 3, done.stderr
        assert contents(tmp_path / "out") == contents(at_once)
        denied = call(tmp_path / "denied", environment, "az://other/nothing.png")
        assert denied.returncode == 1 and "the store answers 404 Not Found" in denied.stderr


def test_a_store_that_is_not_s3_and_busy_from_the_start_is_waited_for(tmp_path: Path) -> None:
    with web(tmp_path) as store:
        environment = {"AZURE_STORAGE_USE_EMULATOR": "true", "AZURITE_BLOB_STORAGE_URL": store.url.rstrip("/")}
        store.texts = {"/devstoreaccount1/photos/run/plan.json": b"{}"}
        store.busy_for = 12
        program = "from hookx.store.objects.path import ObjectPath as Place\n"
        program += "print(Place.parse('az://photos/run/plan.json').size_bytes())"
        command = [sys.executable, "-c", program]
        done = subprocess.run(
            command, env=variables({**os.environ, **environment}), capture_output=True, text=True, timeout=120
        )
        assert store.busy_for == 0 and done.stdout == "2\n", done.stderr
