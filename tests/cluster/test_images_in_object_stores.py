"""Images in object stores give the rows of the folder that was copied there, whatever happens on the way."""

from __future__ import annotations

import json
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.between import between
from kit.files import contents
from kit.s3 import Store, client, localbucket, moto, serve
from kit.whole_runs import extract, hookx, variables

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module", params=[moto, localbucket])
def of_any_kind(request: pytest.FixtureRequest) -> Iterator[Store]:
    with serve(request.param) as store:
        yield store


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with serve(moto) as running:
        yield running


def send(store: Store, file: Path, key: str) -> None:
    client(store).put_object(Bucket=store.bucket, Key=key, Body=file.read_bytes())


def send_folder(store: Store, folder: Path, prefix: str) -> None:
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            send(store, file, prefix + file.relative_to(folder).as_posix())


def call(store: Store, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = hookx(*extract(Path("."), out, *options)[:-1])
    return subprocess.run(command, env=variables(store.environment), capture_output=True, text=True, timeout=120)


def shards_of(out: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(out).items() if name.startswith("shard-")}


def test_a_prefix_gives_the_run_of_the_folder(
    of_any_kind: Store, pictures: Path, at_once: Path, tmp_path: Path
) -> None:
    send_folder(of_any_kind, pictures, "photos/")
    client(of_any_kind).put_object(Bucket=of_any_kind.bucket, Key="photos/notes.txt", Body=b"no image")
    client(of_any_kind).put_object(Bucket=of_any_kind.bucket, Key="photos-of-others/a.png", Body=b"of others")
    for number, name in enumerate(("photos/", "photos")):
        out = tmp_path / str(number)
        done = call(of_any_kind, out, "--json", f"s3://{of_any_kind.bucket}/{name}")
        assert done.returncode == 3, done.stderr
        assert contents(out) == contents(at_once)
        assert json.loads(done.stdout)["not_taken"] == {".txt": 1}


def test_workers_that_were_forked_read_the_same(store: Store, pictures: Path, at_once: Path, tmp_path: Path) -> None:
    send_folder(store, pictures, "photos/")
    done = call(store, tmp_path / "out", "--workers", "2", f"s3://{store.bucket}/photos/")
    assert done.returncode == 3, done.stderr
    assert contents(tmp_path / "out") == contents(at_once)


def test_archives_give_the_run_of_the_local_archive(of_any_kind: Store, thumbnails: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar, zipfile.ZipFile(tmp_path / "b.zip", "w") as packed:
        tar.add(thumbnails, ".")
        for file in sorted(thumbnails.rglob("*.png")):
            packed.write(file, file.relative_to(thumbnails), zipfile.ZIP_DEFLATED)
    for name in ("a.tar", "b.zip"):
        send(of_any_kind, tmp_path / name, f"packed/{name}")
        assert call(of_any_kind, tmp_path / f"local-{name}", str(tmp_path / name)).returncode == 0
        done = call(of_any_kind, tmp_path / f"remote-{name}", f"s3://{of_any_kind.bucket}/packed/{name}")
        assert done.returncode == 0, done.stderr
        assert contents(tmp_path / f"remote-{name}") == contents(tmp_path / f"local-{name}")
    (tmp_path / "packed").mkdir()
    for name in ("a.tar", "b.zip"):
        (tmp_path / name).rename(tmp_path / "packed" / name)
    assert call(of_any_kind, tmp_path / "local", str(tmp_path / "packed")).returncode == 0
    done = call(of_any_kind, tmp_path / "remote", f"s3://{of_any_kind.bucket}/packed/")
    assert done.returncode == 0 and "holds 2 archives and no loose images" in done.stderr
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")


def test_a_store_that_is_busy_for_a_while_costs_no_image(
    store: Store, pictures: Path, at_once: Path, tmp_path: Path
) -> None:
    send_folder(store, pictures, "photos/")
    with between(store) as network:
        network.busy_for = 12
        done = call(network.store, tmp_path / "out", "--workers", "2", f"s3://{store.bucket}/photos/")
        assert network.busy_for == 0
    assert done.returncode == 3, done.stderr
    assert contents(tmp_path / "out") == contents(at_once)


def test_a_store_that_stays_busy_stops_the_run_which_goes_on_later(
    store: Store, pictures: Path, at_once: Path, tmp_path: Path
) -> None:
    send_folder(store, pictures, "photos/")
    options = ["--retry-for", "0.5", f"s3://{store.bucket}/photos/"]
    assert call(store, tmp_path / "out", "--dry-run", *options).returncode == 0
    with between(store) as network:
        network.busy_for = 10**6
        done = call(network.store, tmp_path / "out", *options)
        assert done.returncode == 1
        assert "SlowDown" in done.stderr and "then run the same command again" in done.stderr
    done = call(store, tmp_path / "out", *options)
    assert done.returncode == 3, done.stderr
    assert contents(tmp_path / "out") == contents(at_once)


def test_what_is_wrong_with_a_source_is_said_at_once(store: Store, tmp_path: Path) -> None:
    wrong = {
        "s3://no-such-bucket/photos/": "there is no bucket 'no-such-bucket'",
        f"s3://{store.bucket}/nothing/here/": "no image found in",
        f"s3://{store.bucket}/nothing/here": "there is no 's3://",
        f"s3://{store.bucket}/nothing.jpg": "there is no 's3://",
        f"s3://me:secret-of-mine@{store.bucket}/photos/": "credentials do not belong into a URL",
        f"s3://{store.bucket}/photos/?sig=secret-of-mine": "credentials and options do not belong into a URL",
        "ftp://host/photos/": "hookx cannot read 'ftp://'",
    }
    for source, words in wrong.items():
        done = call(store, tmp_path / "out", source)
        assert done.returncode == 1 and words in done.stderr, (source, done.stderr)
        assert "secret-of-mine" not in done.stderr and "Traceback" not in done.stderr
    no_credentials = {**store.environment, "AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    no_credentials |= {"AWS_EC2_METADATA_DISABLED": "true", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null"}
    done = call(Store(store.endpoint, store.bucket, no_credentials), tmp_path / "out", f"s3://{store.bucket}/photos/")
    assert done.returncode == 1 and "there are no credentials" in done.stderr
