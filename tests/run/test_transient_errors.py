"""An error of the system while images are listed and read: tried again, then a stop; never a failure of an image."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image

from kit.faults import Fault, Faults
from kit.pictures import four_by_four

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        four_by_four().resize((40, 40)).rotate(number).save(folder / f"{number:02}.jpg")
    # libtiff reads compressed strips by itself, and words the system's errors in its own way.
    Image.effect_noise((400, 400), 50).save(folder / "12.tif", compression="tiff_lzw")
    return folder


def extract(pictures: Path, out: Path, *options: str, faults: Mapping[str, str] = {}) -> tuple[int, str]:
    command = [sys.executable, "-m", "hookx", "extract", "-m", "resnet18", "-w", "none", "-l", "avgpool", "-q"]
    command += ["--resize", "32", "--crop", "32", "-b", "2", "--shard-images", "6", "-d", "cpu", "-o", str(out)]
    ended = subprocess.run(
        [*command, *options, pictures], env=os.environ | faults, capture_output=True, text=True, timeout=100
    )
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended.returncode, ended.stderr


def content_of(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert extract(pictures, out) == (0, "")
    return content_of(out)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_error_that_passes_changes_no_byte(
    workers: str, pictures: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    faults = Faults(
        Fault("open", "ESTALE", 1, 3, "00.jpg"),
        Fault("open", "EMFILE", 1, 2, "01.jpg"),
        Fault("open", "ENOMEM", 1, 1, "02.jpg"),
        Fault("open", "ENOENT", 1, 2, "03.jpg"),
        Fault("open", "EACCES", 1, 2, "04.jpg"),
        Fault("read", "EIO", 1, 2, "05.jpg"),
        Fault("read", "ETIMEDOUT", 2, 2, "06.jpg"),
        Fault("stat", "EIO", 1, 2, "07.jpg"),
        Fault("stat", "ENOENT", 1, 1, "08.jpg"),
        Fault("read", "EIO", 3, 4, "12.tif"),
    )
    code, said = extract(pictures, tmp_path / "out", "-j", workers, faults=faults.environment)
    assert code == 0, said
    assert all(faults.counts), f"each fault has happened: {faults.counts}"
    assert content_of(tmp_path / "out") == undisturbed
    assert "an image could only be read at a later try" in said


@pytest.mark.parametrize(("call", "what", "path"), [("open", "ESTALE", "07.jpg"), ("read", "EIO", "12.tif")])
def test_an_error_that_stays_stops_the_run_which_goes_on_to_the_same_bytes(
    call: str, what: str, path: str, pictures: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    faults = Faults(Fault(call, what, path=path))
    code, said = extract(pictures, tmp_path / "out", "--retry-for", "0.2", faults=faults.environment)
    assert code == 1 and path in said and "after 0.2 s of trying" in said and "to resume" in said, said
    assert not {"failures.csv", "index.csv"} & set(content_of(tmp_path / "out"))
    assert extract(pictures, tmp_path / "out") == (0, "")
    assert content_of(tmp_path / "out") == undisturbed


@pytest.fixture(scope="module", params=["tar", "zip"])
def archive(request: pytest.FixtureRequest, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    archive: Path = tmp_path_factory.mktemp("archive") / f"all.{request.param}"
    if request.param == "tar":
        subprocess.run(["tar", "-cf", archive, "-C", pictures, "."], check=True)
    else:
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
            for file in sorted(pictures.iterdir()):
                packed.write(file, file.name)
    return archive


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_archive_that_cannot_be_read_for_a_while_changes_no_byte(
    workers: str, archive: Path, tmp_path: Path
) -> None:
    assert extract(archive, tmp_path / "undisturbed") == (0, "")
    faults = Faults(
        Fault("open", "ESTALE", 1, 2, archive.name),  # while it is listed
        Fault("open", "EIO", 5, 7, archive.name),
        Fault("open", "ENOENT", 9, 9, archive.name),
        Fault("read", "EIO", 3, 4, archive.name),
        Fault("read", "ETIMEDOUT", 50, 52, archive.name),
    )
    code, said = extract(archive, tmp_path / "out", "-j", workers, faults=faults.environment)
    assert code == 0, said
    assert all(faults.counts), f"each fault has happened: {faults.counts}"
    assert content_of(tmp_path / "out") == content_of(tmp_path / "undisturbed")


def test_an_archive_that_stays_unreadable_stops_the_run_and_is_no_failure_of_its_images(
    archive: Path, tmp_path: Path
) -> None:
    faults = Faults(Fault("open", "ENOENT", 6, path=archive.name))  # It was listed, and then its mount went away.
    code, said = extract(archive, tmp_path / "out", "--retry-for", "0.2", faults=faults.environment)
    assert code == 1 and f"{archive.name}/" in said and "after 0.2 s of trying" in said, said
    assert not {"failures.csv", "index.csv"} & set(content_of(tmp_path / "out"))
    assert extract(archive, tmp_path / "out") == extract(archive, tmp_path / "undisturbed") == (0, "")
    assert content_of(tmp_path / "out") == content_of(tmp_path / "undisturbed")


def test_a_run_of_an_archive_that_is_killed_goes_on_to_the_same_bytes(archive: Path, tmp_path: Path) -> None:
    assert extract(archive, tmp_path / "undisturbed") == (0, "")
    for call in (4, 8):
        faults = Faults(Fault("open", "SIGKILL", call, call, archive.name))
        code, _ = extract(archive, tmp_path / "out", "-j", "0", faults=faults.environment)
        assert code == -9
    assert extract(archive, tmp_path / "out") == (0, "")
    there = content_of(tmp_path / "out")
    assert {name: there[name] for name in there if not name.startswith(".")} == content_of(tmp_path / "undisturbed")
