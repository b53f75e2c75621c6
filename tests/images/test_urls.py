"""Images behind https:// are those of the folder that the server serves, whatever servers and networks do meanwhile."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

import hookx
from hookx.errors import HookxError, ImageError
from hookx.images.decoding import failure_reason
from hookx.images.fetching import fetch
from hookx.images.files import Fetched
from hookx.images.listing import ImageList, list_images
from hookx.images.retries import UnavailableError
from kit.files import contents
from kit.web import Web, web
from kit.whole_runs import extract, variables
from kit.whole_runs import hookx as command

SECRET = "c2VjcmV0LW9mLW1pbmU"


@pytest.fixture
def folder(tmp_path: Path, thumbnails: Path) -> Path:
    """Return a folder with the thumbnails in a folder, in a .tar, in a .zip, and in tables."""
    served = tmp_path / "served"
    served.mkdir()
    files = sorted(thumbnails.rglob("*.png"))
    names = [file.relative_to(thumbnails).as_posix() for file in files]
    for file, name in zip(files, names, strict=True):
        (served / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (served / "photos" / name).write_bytes(file.read_bytes())
    with tarfile.open(served / "a.tar", "w") as tar, zipfile.ZipFile(served / "b.zip", "w") as packed:
        for file, name in zip(files, names, strict=True):
            tar.add(file, name)
            packed.write(file, name, zipfile.ZIP_DEFLATED)
    (served / "t.csv").write_text("file_name,label\n" + "".join(f"photos/{name},{name[0]}\n" for name in names))
    rows = {"image": [{"bytes": file.read_bytes(), "path": name} for file, name in zip(files, names, strict=True)]}
    pyarrow.parquet.write_table(pa.table(rows), served / "within.parquet", row_group_size=10)
    pyarrow.parquet.write_table(pa.table({"path": [f"photos/{name}" for name in names]}), served / "t.parquet")
    return served


@pytest.fixture
def server(folder: Path) -> Iterator[Web]:
    with web(folder) as running:
        yield running


def fetched(images: ImageList) -> list[bytes]:
    """Return the bytes of each image, as they are decoded."""
    return [content_of(images, position) for position in range(len(images))]


def content_of(images: ImageList, position: int) -> bytes:
    file = fetch(images.files[position], images.sizes_bytes[position])
    assert isinstance(file, Fetched)
    return file.content


def reason_of(images: ImageList, position: int = 0) -> str:
    """Return why an image cannot be read."""
    with pytest.raises(Exception) as raised:
        fetch(images.files[position], images.sizes_bytes[position])
    assert not isinstance(raised.value, UnavailableError)
    return failure_reason(raised.value)


@pytest.mark.parametrize("name", ["a.tar", "b.zip", "t.csv", "t.parquet", "within.parquet", "photos/sky/hubble-0.png"])
def test_a_source_behind_a_url_is_the_same_list_as_on_the_disk(
    server: Web, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, remote = list_images([folder / name]), list_images([server.url + name])
    assert list(remote.keys) == list(local.keys) and remote.sha256 == local.sha256
    assert [column.name for column in remote.columns] == [column.name for column in local.columns]
    monkeypatch.chdir(folder)
    by_name = {Path(file).read_bytes() for file in map(str, (folder / "photos").rglob("*.png"))}
    assert set(fetched(remote)) <= by_name and len(set(fetched(remote))) == len(remote)


def test_forked_workers_compute_the_run_of_the_folder(server: Web, folder: Path, tmp_path: Path) -> None:
    for name in ("a.tar", "within.parquet"):
        for out, source in ((tmp_path / f"l-{name}", str(folder / name)), (tmp_path / f"r-{name}", server.url + name)):
            done = subprocess.run(
                command(*extract(Path("."), out, "--workers", "2")[:-1], source), env=variables(), capture_output=True
            )
            assert done.returncode == 0, done.stderr
        assert contents(tmp_path / f"r-{name}") == contents(tmp_path / f"l-{name}")


def test_an_archive_of_small_members_is_listed_in_few_requests_and_read_by_ranges(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "small.tar", "w") as tar:
        for number in range(10_000):
            member = tarfile.TarInfo(f"{number:05}.png")
            member.size = 2_000
            tar.addfile(member, io.BytesIO(number.to_bytes(4, "big") * 500))
    size_bytes = (tmp_path / "small.tar").stat().st_size
    with web(tmp_path) as server:
        images = list_images([f"{server.url}small.tar"])
        assert len(images) == 10_000 and len(server.requests) <= 2 + size_bytes / (8 * 2**20)
        server.requests.clear()
        server.bytes_down = 0
        assert content_of(images, 4321) == (4321).to_bytes(4, "big") * 500
        assert server.counts == {"GET": 1} and server.bytes_down == 2_000


def test_large_members_of_an_archive_are_skipped(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "large.tar", "w") as tar:
        for number in range(12):
            member = tarfile.TarInfo(f"{number:05}.png")
            member.size = 3 * 2**20
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    with web(tmp_path) as server:
        assert len(list_images([f"{server.url}large.tar"])) == 12
        assert server.bytes_down < 4 * 2**20 and len(server.requests) <= 14


def test_the_directory_of_a_zip_takes_a_handful_of_requests(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as packed:
        for number in range(10_000):
            packed.writestr(f"{number:05}.png", os.urandom(100))
    with web(tmp_path) as server:
        assert len(list_images([f"{server.url}many.zip"])) == 10_000
        assert len(server.requests) <= 4


def test_a_table_may_name_urls_among_paths_and_the_key_of_each_is_all_of_it(
    server: Web, folder: Path, tmp_path: Path
) -> None:
    photo = sorted((folder / "photos").rglob("*.png"))[0]
    (tmp_path / "here.png").write_bytes(photo.read_bytes())
    url = f"{server.url}photos/{photo.relative_to(folder / 'photos').as_posix()}"
    (tmp_path / "t.csv").write_text(
        f"url,label\nhere.png,1\n{url},2\n{url.replace('photos/', 'photos/./')}?sig={SECRET},3\n"
    )
    images = list_images([tmp_path / "t.csv"])
    assert sorted(images.keys) == sorted(["here.png", url, url.replace("photos/", "photos/./")])
    assert set(images.sizes_bytes) == {photo.stat().st_size}
    assert SECRET not in repr([str(file) for file in images.files]) + repr(list(images.files))
    (tmp_path / "k.csv").write_text(f"id,url\nb,here.png\na,{url}?sig={SECRET}\n")
    images = list_images([tmp_path / "k.csv"], key_column="id")
    assert list(images.keys) == ["a", "b"] and content_of(images, 0) == photo.read_bytes()
    assert any(SECRET in request for request in server.requests)


def test_a_list_on_standard_input_may_name_urls(server: Web, folder: Path, tmp_path: Path) -> None:
    photo = sorted((folder / "photos").rglob("*.png"))[0]
    (tmp_path / "here.png").write_bytes(photo.read_bytes())
    url = f"{server.url}photos/{photo.relative_to(folder / 'photos').as_posix()}"
    program = "from hookx.images.listing import list_images; print(*list_images(['-']).keys)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=f"./here.png\n{url}\n",
        text=True,
        capture_output=True,
        cwd=tmp_path,
        env=variables(),
    )
    assert done.stdout.split() == ["here.png", url], done.stderr


def test_root_may_be_a_url(server: Web, folder: Path, tmp_path: Path) -> None:
    names = sorted(file.relative_to(folder).as_posix() for file in (folder / "photos").rglob("*.png"))
    (tmp_path / "t.csv").write_text("url\n" + "".join(f"{server.url}{name}\n" for name in names))
    assert list(list_images([tmp_path / "t.csv"], root=server.url).keys) == names
    assert list_images([f"{server.url}{names[0]}"], root=server.url.rstrip("/")).keys[0] == names[0]
    with pytest.raises(ImageError, match="is not within --root"):
        list_images([tmp_path / "t.csv"], root=f"{server.url}photos/sky")
    with pytest.raises(ImageError, match="is not within --root"):
        list_images([f"{server.url}{names[0]}"], root=tmp_path)
    with pytest.raises(ImageError, match="is not within --root"):
        list_images([folder / "photos"], root=server.url)


def test_what_a_server_does_not_know_is_found_out_otherwise(server: Web, folder: Path) -> None:
    expected = list_images([folder / "t.csv"])
    for name in ("has_head", "has_length", "has_ranges"):
        setattr(server, name, False)
        images = list_images([f"{server.url}t.csv"])
        assert images.sha256 == expected.sha256, name
        assert len(fetched(images)) == 24
    with pytest.raises(ImageError, match=r"a.tar' in parts: .*\n  download it, and name the file"):
        list_images([f"{server.url}a.tar"])


def test_redirects_are_followed(server: Web, folder: Path) -> None:
    server.moves = {"/moved.png": "/photos/sky/hubble-0.png", "/moved.tar": "/a.tar", "/round.png": "/round.png"}
    (image,) = fetched(list_images([f"{server.url}moved.png"]))
    assert image == (folder / "photos/sky/hubble-0.png").read_bytes()
    assert len(list_images([f"{server.url}moved.tar"])) == 24
    with pytest.raises(ImageError, match="from one address to another"):
        list_images([f"{server.url}round.png"])


def test_the_fault_of_a_file_is_a_failure_of_that_image(server: Web, tmp_path: Path) -> None:
    names = ["absent.png", "forbidden.png", "gone.png", "bad.png", "photos/sky/hubble-0.png"]
    server.answers = {"/forbidden.png": 403, "/gone.png": 410, "/bad.png": 400}
    (tmp_path / "t.csv").write_text("url\n" + "".join(f"{server.url}{name}\n" for name in names))
    images = list_images([tmp_path / "t.csv"])
    reasons = {key.removeprefix(server.url): position for position, key in enumerate(images.keys)}
    assert reason_of(images, reasons["absent.png"]) == "FileNotFoundError: the server answers 404 Not Found"
    assert reason_of(images, reasons["forbidden.png"]) == "PermissionError: the server answers 403 Forbidden"
    assert reason_of(images, reasons["gone.png"]) == "FileNotFoundError: the server answers 410 Gone"
    assert reason_of(images, reasons["bad.png"]) == "PermissionError: the server answers 400 Bad Request"
    assert content_of(images, reasons["photos/sky/hubble-0.png"])


def test_what_changed_since_it_was_listed_is_a_failure(server: Web, folder: Path) -> None:
    alone, within = list_images([f"{server.url}t.csv"]), list_images([f"{server.url}a.tar"])
    in_table = list_images([f"{server.url}within.parquet"])
    (folder / "photos" / alone.keys[0].removeprefix("photos/")).write_bytes(b"other")
    assert "changed since it was listed" in reason_of(alone)
    with (folder / "a.tar").open("ab") as archive:
        archive.write(bytes(512))
    assert "its archive changed since it was listed" in reason_of(within)
    rows = {"image": [{"bytes": b"x", "path": "a.png"}] * 24}
    pyarrow.parquet.write_table(pa.table(rows), folder / "within.parquet")
    assert "it changed since it was listed" in reason_of(in_table)


@pytest.mark.parametrize("trouble", ["busy_for", "reset_for", "cut_for"])
@pytest.mark.parametrize("name", ["t.csv", "a.tar", "b.zip", "within.parquet"])
def test_trouble_that_passes_costs_no_image(server: Web, folder: Path, tmp_path: Path, trouble: str, name: str) -> None:
    local = list_images([folder / name])
    setattr(server, trouble, 8)
    images = list_images([server.url + name])
    assert images.sha256 == local.sha256
    setattr(server, trouble, 2)  # Within one request, which is tried three times.
    assert len(set(fetched(images))) == 24


def test_a_run_through_trouble_is_the_run_without(server: Web, folder: Path, tmp_path: Path) -> None:
    source = f"{server.url}t.csv"
    for number in range(2):
        server.busy_for = 25 * number
        arguments = extract(Path("."), tmp_path / str(number), "--workers", "2")[:-1]
        done = subprocess.run(command(*arguments, source), env=variables(), capture_output=True, text=True)
        assert done.returncode == 0 and server.busy_for == 0, done.stderr
    assert contents(tmp_path / "1") == contents(tmp_path / "0")


def test_a_server_that_stays_away_stops_the_run_which_goes_on_later(server: Web, tmp_path: Path) -> None:
    options = [*extract(Path("."), tmp_path / "out", "--retry-for", "1", "--limit", "3")[1:-1], f"{server.url}a.tar"]

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        arguments = command(*words, *options)
        return subprocess.run(arguments, env=variables(), capture_output=True, text=True, timeout=120)

    planned = run("plan", "--with-list")
    assert planned.returncode == 0, planned.stderr
    server.busy_for = 10**6
    stopped = run("extract")
    assert stopped.returncode == 1 and "the server answers 503" in stopped.stderr, stopped.stderr
    failed = run("extract", "--on-io-error", "fail")
    assert failed.returncode in (1, 3), failed.stderr
    assert "503" in (tmp_path / "out" / "failures.csv").read_text()
    server.busy_for = 0
    done = run("extract", "--retry-failures")
    assert done.returncode == 0 and len(hookx.open(tmp_path / "out")["avgpool"]) == 3, done.stderr


def test_what_cannot_be_a_source_is_refused_with_what_to_do(server: Web) -> None:
    for source, words in {
        f"{server.url}photos/": "in a table with a column of their URLs",
        server.url: "cannot be listed",
        f"{server.url}absent.png": "answers 404",
        f"{server.url}absent.tar": "answers 404",
        "ftp://host/a.jpg": "hookx cannot read 'ftp://'",
        f"https://me:{SECRET}@host/a.jpg": "credentials do not belong into a URL",
        "hf://datasets": "names no repository",
        "http://127.0.0.1:9/a.jpg?sig=" + SECRET: "does not answer: connection refused",
    }.items():
        with pytest.raises(HookxError) as raised:
            list_images([source], retry_seconds=0)
        assert words in str(raised.value) and SECRET not in str(raised.value), source


def test_a_slow_server_is_not_an_image_that_takes_long_to_decode(server: Web, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"url\n{server.url}photos/sky/hubble-0.png\n")
    server.seconds = 3
    arguments = extract(Path("."), tmp_path / "out", "--decode-timeout", "2")[:-1]
    done = subprocess.run(command(*arguments, str(tmp_path / "t.csv")), env=variables(), capture_output=True)
    assert done.returncode == 0, done.stderr


def test_verify_and_visualize_take_urls(server: Web, folder: Path, tmp_path: Path) -> None:
    for name in ("chelsea", "hubble"):
        Image.new("RGB", (64, 64), (name == "hubble" and "red") or "blue").save(folder / f"{name}.png")
    (folder / "two.csv").write_text("path\nchelsea.png\nhubble.png\n")
    source, out = f"{server.url}two.csv", tmp_path / "out"
    hookx.extract("resnet18", "avgpool", source, weights="none", out=out)
    again = hookx.recompute(out, 2, source)
    assert again.problems == () and len(again.rows) == 2
    gallery = hookx.visualize("resnet18", "conv1", f"{server.url}hubble.png", weights="none", out=tmp_path / "drawn")
    assert gallery.pictures
    assert np.isfinite(hookx.open(out)["avgpool"].numpy()).all()


def test_a_signature_is_written_nowhere(server: Web, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"url\n{server.url}photos/sky/hubble-0.png?sig={SECRET}\n")
    for source in (str(tmp_path / "t.csv"), f"{server.url}a.tar?sig={SECRET}"):
        out = tmp_path / "out"
        arguments = [*extract(Path("."), out, "--limit", "2")[1:-1], source]
        for words, code in ((["extract", *arguments, "--json"], 0), (["plan", *arguments, "--with-list"], 2)):
            done = subprocess.run(command(*words), env=variables(), capture_output=True, text=True)
            assert done.returncode == code, done.stderr
            assert SECRET not in done.stdout + done.stderr
        assert "which may be a signature" in done.stderr
        assert not any(SECRET.encode() in file.read_bytes() for file in out.rglob("*") if file.is_file())
        shutil.rmtree(out)
    assert any(SECRET in request for request in server.requests)


def test_visualize_on_the_command_line_takes_a_url(server: Web, tmp_path: Path) -> None:
    words = ["visualize", "-m", "resnet18", "-w", "none", "-l", "conv1", "-o", str(tmp_path / "drawn")]
    done = subprocess.run(
        command(*words, f"{server.url}photos/sky/hubble-0.png"), env=variables(), capture_output=True, text=True
    )
    assert done.returncode == 0 and "conv1.png" in done.stdout, done.stderr
