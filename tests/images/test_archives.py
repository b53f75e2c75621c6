"""Archives: what is listed and read is what other programs packed, and what cannot be read is said."""

from __future__ import annotations

import io
import multiprocessing
import os
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hookx
from hookx.errors import ImageError
from hookx.images.files import Member
from hookx.images.listing import ImageList, list_images
from hookx.images.mapped import map_list, write_list
from hookx.images.opening import open_image
from hookx.images.unreadable import UnreadableError
from kit.runs import same_bits

LONG = "a-very-long-folder-name/" * 12 + "ü" * 40 + ".png"
Pack = Callable[[Path, Path], object]


def gnu_tar(*options: str) -> Pack:
    """Return what packs a folder by GNU tar."""
    return lambda folder, archive: subprocess.run(
        ["tar", *options, "-cf", archive, "-C", folder, "."], check=True, stderr=subprocess.PIPE
    )


def python_tar(format: int) -> Pack:
    def pack(folder: Path, archive: Path) -> None:
        with tarfile.open(archive, "w", format=format) as tar:
            for file in sorted(folder.rglob("*"), reverse=True):
                tar.add(file, file.relative_to(folder), recursive=False)

    return pack


def by_webdataset(folder: Path, archive: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(archive)) as writer:
        for file in sorted(folder.rglob("*.*g")):
            name = str(file.relative_to(folder).with_suffix(""))
            writer.write({"__key__": name, file.suffix[1:]: file.read_bytes(), "cls": b"3", "json": b"{}"})


def zip_program(*options: str) -> Pack:
    return lambda folder, archive: subprocess.run(["zip", "-qr", *options, archive, "."], cwd=folder, check=True)


def python_zip(compression: int) -> Pack:
    def pack(folder: Path, archive: Path) -> None:
        with zipfile.ZipFile(archive, "w", compression) as packed:
            for file in sorted(folder.rglob("*.*g")):
                packed.write(file, file.relative_to(folder))

    return pack


def streamed_zip(folder: Path, archive: Path) -> None:
    """Pack to a pipe, which leaves sizes and checksums behind the data, and with the headers of zip64."""
    with open(archive, "wb") as file, zipfile.ZipFile(Pipe(file), "w", zipfile.ZIP_DEFLATED) as packed:
        for image in sorted(folder.rglob("*.*g")):
            with packed.open(str(image.relative_to(folder)), "w", force_zip64=True) as member:
                member.write(image.read_bytes())


class Pipe(io.RawIOBase):
    """A file that can only be written, from its beginning to its end."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, content: bytes) -> int:  # type: ignore[override]
        return self._file.write(content)


TARS: dict[str, Pack] = {
    "GNU tar, gnu": gnu_tar("--format=gnu"),
    "GNU tar, oldgnu": gnu_tar("--format=oldgnu"),
    "GNU tar, pax": gnu_tar("--format=pax"),
    "GNU tar, incremental": lambda folder, archive: gnu_tar("--listed-incremental", f"{archive}.list")(folder, archive),
    "GNU tar, sparse": gnu_tar("--sparse"),
    "Python, gnu": python_tar(tarfile.GNU_FORMAT),
    "Python, pax": python_tar(tarfile.PAX_FORMAT),
    "webdataset": by_webdataset,
}
SHORT_NAMES: dict[str, Pack] = {
    "GNU tar, ustar": gnu_tar("--format=ustar"),
    "GNU tar, v7": gnu_tar("--format=v7"),
    "Python, ustar": python_tar(tarfile.USTAR_FORMAT),
}
ZIPS: dict[str, Pack] = {
    "zip": zip_program(),
    "zip, stored": zip_program("-0"),
    "zip, to a pipe": zip_program("-fd"),
    "Python, stored": python_zip(zipfile.ZIP_STORED),
    "Python, deflated": python_zip(zipfile.ZIP_DEFLATED),
    "Python, to a pipe": streamed_zip,
}
FORMATS = [(name, pack, "tar") for name, pack in (TARS | SHORT_NAMES).items()]
FORMATS += [(name, pack, "zip") for name, pack in ZIPS.items()]


@pytest.fixture
def folder(thumbnails: Path, tmp_path: Path) -> Path:
    """Return a folder of 24 images and a text."""
    shutil.copytree(thumbnails, tmp_path / "photos")
    (tmp_path / "photos" / "notes.txt").write_text("not an image")
    return tmp_path / "photos"


def contents(images: ImageList) -> list[bytes]:
    found = []
    for file, size_bytes in zip(images.files, images.sizes_bytes, strict=True):
        with open_image(file, size_bytes) as content:
            found.append(content.read())
    return found


def error_of(*sources: Path | str) -> str:
    with pytest.raises(ImageError) as caught:
        list_images(sources)
    return str(caught.value)


@pytest.mark.parametrize(("name", "pack", "suffix"), FORMATS, ids=[f"{name}.{kind}" for name, _, kind in FORMATS])
def test_an_archive_of_a_folder_holds_the_images_of_the_folder(
    name: str, pack: Pack, suffix: str, folder: Path, tmp_path: Path
) -> None:
    if name not in SHORT_NAMES and name != "Python, stored":
        (folder / LONG).parent.mkdir(parents=True)
        shutil.copy(folder / "sky" / "hubble-0.png", folder / LONG)
    archive = tmp_path / f"00000.{suffix}"
    pack(folder, archive)
    loose, packed = list_images([folder]), list_images([archive])
    assert list(packed.keys) == [f"{archive.name}/{key}" for key in loose.keys]
    assert list(packed.sizes_bytes) == list(loose.sizes_bytes) and contents(packed) == contents(loose)
    without_text = (suffix == "zip" and name.startswith("Python")) or name == "webdataset"
    assert packed.remarks.not_taken == ({} if without_text else {".txt": 1})


def test_a_run_of_an_archive_stores_the_activations_of_its_folder(folder: Path, tmp_path: Path) -> None:
    gnu_tar()(folder, tmp_path / "a.tar")
    zip_program()(folder, tmp_path / "a.zip")
    options: dict[str, Any] = {"weights": "none", "resize": 32, "crop": 32, "shard_images": 10, "workers": 2}
    runs = []
    for source in (folder, tmp_path / "a.tar", tmp_path / "a.zip"):
        hookx.extract("resnet18", "conv1,avgpool", source, out=tmp_path / f"{source.name}-run", **options)
        runs.append(hookx.open(tmp_path / f"{source.name}-run"))
    loose = runs[0]
    for packed, name in zip(runs[1:], ("a.tar", "a.zip"), strict=True):
        assert list(packed.keys_of_rows) == [f"{name}/{key}" for key in loose.keys_of_rows]
        for address in ("conv1", "avgpool"):
            assert same_bits(packed[address][:], loose[address][:])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["photos", "a.tar", "a.zip", "photos-run", "a.tar-run", "a.zip-run"]
    )


def test_sparse_files_links_and_folders_are_counted_and_what_follows_them_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "all"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"a" * 700)
    os.link(folder / "a.png", folder / "b.png")
    (folder / "c.png").symlink_to("a.png")
    with open(folder / "d.png", "wb") as file:  # With more holes than one header describes.
        for number in range(40):
            file.seek(number * 2**20)
            file.write(b"x" * 4096)
    os.mkfifo(folder / "e.png")
    (folder / "f.png").write_bytes(b"f" * 513)
    for form in ("gnu", "pax"):
        archive = tmp_path / f"{form}.tar"
        subprocess.run(
            ["tar", f"--format={form}", "--sparse", "--sort=name", "-cf", archive, "-C", folder, "."], check=True
        )
        images = list_images([archive])
        assert list(images.keys) == [f"{form}.tar/a.png", f"{form}.tar/f.png"]
        assert contents(images) == [b"a" * 700, b"f" * 513]
        expected = {"hard links": 1, "symbolic links": 1, "sparse files": 1, "devices and pipes": 1}
        assert images.remarks.not_taken == expected


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_more_than_8_gib_are_passed_by(form: Any, tmp_path: Path) -> None:
    archive = tmp_path / "large.tar"
    with open(archive, "wb") as file:
        large = tarfile.TarInfo("video.bin")
        large.size = 9 * 2**30 + 1
        file.write(large.tobuf(form))
        file.seek(9 * 2**30 + 512, os.SEEK_CUR)
        small = tarfile.TarInfo("ü.png")
        small.size = 4
        file.write(small.tobuf(form) + b"1234".ljust(512, b"\0") + bytes(1024))
    images = list_images([archive])
    assert list(images.keys) == ["large.tar/ü.png"] and contents(images) == [b"1234"]
    assert images.remarks.not_taken == {".bin": 1}
    if form == tarfile.GNU_FORMAT:  # Some programs write a twelfth digit.
        with open(archive, "r+b") as file:
            header = bytearray(file.read(512))
            header[124:136], header[148:156] = b"%012o" % large.size, b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
            file.seek(0)
            file.write(header)
        assert contents(list_images([archive])) == [b"1234"]


def small_tar(archive: Path, *names: str) -> Path:
    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 600
            tar.addfile(info, io.BytesIO(b"z" * 600))
    return archive


def test_a_tar_that_was_cut_short_anywhere_is_an_error(tmp_path: Path) -> None:
    archive = small_tar(tmp_path / "a.tar", "a.png", "ü" * 120 + ".png", "b.png")
    whole = archive.read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512  # behind the last block that is not empty
    for count in [*range(0, end, 128), end - 1, end]:
        archive.write_bytes(whole[:count])
        message = error_of(archive)
        assert "was cut short" in message, count
    subprocess.run(message.splitlines()[-1], shell=True, check=True)  # As the message advises.
    assert len(list_images([archive])) == 3


def test_a_damaged_header_is_an_error_that_says_where(tmp_path: Path) -> None:
    archive = small_tar(tmp_path / "a.tar", "a.png", "b.png")
    whole = bytearray(archive.read_bytes())
    for at in (3, 60, 124, 150, 156, 400):
        for start in (0, 1536):
            damaged = whole.copy()
            damaged[start + at] ^= 0x11
            archive.write_bytes(damaged)
            message = error_of(archive)
            assert ("is not a tar" if start == 0 else "no valid header at byte 1,536") in message


def test_the_checksum_may_take_bytes_for_signed_numbers(tmp_path: Path) -> None:
    archive = tmp_path / "a.tar"
    header = bytearray(tarfile.TarInfo("ü.png").tobuf(tarfile.GNU_FORMAT))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(byte - 256 * (byte > 127) for byte in header)
    archive.write_bytes(bytes(header) + bytes(1024))
    assert list(list_images([archive]).keys) == ["a.tar/ü.png"]


def test_archives_that_were_joined_are_read_to_the_end(tmp_path: Path) -> None:
    one, other = small_tar(tmp_path / "one.tar", "a.png"), small_tar(tmp_path / "other.tar", "b.png")
    (tmp_path / "both.tar").write_bytes(one.read_bytes() + other.read_bytes())
    assert list(list_images([tmp_path / "both.tar"]).keys) == ["both.tar/a.png", "both.tar/b.png"]


@pytest.mark.parametrize(
    ("option", "name"), [("-z", "a.tar.gz"), ("-z", "a.tgz"), ("-j", "a.tar.bz2"), ("-J", "a.TXZ"), ("-z", "a.tar")]
)
def test_a_compressed_tar_is_refused_with_the_command_that_unpacks_it(
    option: str, name: str, folder: Path, tmp_path: Path
) -> None:
    if shutil.which({"-z": "gzip", "-j": "bzip2", "-J": "xz"}[option]) is None:
        pytest.skip("the program is not here")
    archive = tmp_path / "my tars" / name
    archive.parent.mkdir()
    gnu_tar(option)(folder, archive)
    message = error_of(archive)
    assert "is compressed" in message and error_of(archive.parent) == message
    command = message.partition("and name that: ")[2]
    subprocess.run(command, shell=True, check=True)
    [unpacked] = [file for file in archive.parent.iterdir() if file != archive]
    assert len(list_images([unpacked])) == 24


def test_a_zip_that_cannot_be_read_is_an_error(folder: Path, tmp_path: Path) -> None:
    zip_program("-P", "secret")(folder, tmp_path / "encrypted.zip")
    assert "is encrypted" in error_of(tmp_path / "encrypted.zip")
    python_zip(zipfile.ZIP_LZMA)(folder, tmp_path / "lzma.zip")
    assert "by method 14; hookx reads stored and deflated" in error_of(tmp_path / "lzma.zip")
    zip_program()(folder, tmp_path / "a.zip")
    whole = (tmp_path / "a.zip").read_bytes()
    for count in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "a.zip").write_bytes(whole[:count])
        assert "is not a whole zip" in error_of(tmp_path / "a.zip")


def test_a_member_of_a_zip_that_is_damaged_is_a_failure_of_that_image(folder: Path, tmp_path: Path) -> None:
    archive = tmp_path / "a.zip"
    python_zip(zipfile.ZIP_STORED)(folder, archive)
    images = list_images([archive])
    with open(archive, "r+b") as whole:
        whole.seek(images.files.offsets[3] + 300)
        whole.write(b"damaged")
    for position, file in enumerate(images.files):
        if position == 3:
            with pytest.raises(UnreadableError, match="damaged in its archive"), open_image(file):
                pass
        else:
            with open_image(file, images.sizes_bytes[position]) as content:
                assert content.read(4) == b"\x89PNG"


def test_an_archive_that_has_changed_since_it_was_listed_is_not_read(tmp_path: Path) -> None:
    archive = small_tar(tmp_path / "a.tar", "a.png", "b.png")
    images = list_images([archive])
    small_tar(archive, *(f"{number}.png" for number in range(20)))
    with pytest.raises(UnreadableError, match="its archive changed since it was listed"), open_image(images.files[0]):
        pass


def test_two_members_of_one_name_are_an_error_like_two_files_of_one_key(tmp_path: Path) -> None:
    message = error_of(small_tar(tmp_path / "a.tar", "x/a.png", "./x//a.png"))
    assert message.startswith(f"two images have the key 'a.tar/x/a.png': {tmp_path}/a.tar/x/a.png and ")


def test_names_in_an_archive_never_lead_out_of_it(tmp_path: Path) -> None:
    archive = small_tar(tmp_path / "a.tar", "/etc/a.png", "../../b.png", "x/../c.png", "._d.png", "__MACOSX/._e.png")
    images = list_images([archive])
    assert list(images.keys) == ["a.tar/b.png", "a.tar/c.png", "a.tar/etc/a.png"]
    assert images.remarks.not_taken == {"._ (metadata of macOS)": 2}


def test_a_folder_of_archives_is_read_and_one_of_photographs_leaves_them(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "hookx")
    shards = tmp_path / "shards"
    (shards / "deep").mkdir(parents=True)
    small_tar(shards / "00001.tar", "a.png", "a.json")
    small_tar(shards / "deep" / "00000.tar", "a.png")
    (shards / "00001_stats.json").touch()
    images = list_images([shards])
    assert list(images.keys) == ["00001.tar/a.png", "deep/00000.tar/a.png"]
    assert images.remarks.not_taken == {".json": 1}
    assert "shards/ holds 2 archives and no loose images" in caplog.text
    small_tar(folder / "backup.tar", "a.png")
    images = list_images([folder])
    assert len(images) == 24 and images.remarks.not_taken == {".txt": 1, ".tar": 1}
    assert images.remarks.sentences() == ["2 files not taken: 1 .tar (name it to read it), 1 .txt"]


def test_folders_and_archives_are_listed_together(folder: Path, tmp_path: Path) -> None:
    archive = small_tar(tmp_path / "m.tar", "a.png", "b.png")
    images = list_images([archive, folder], packed_at_once=5)
    assert list(images.keys) == sorted([*list_images([folder]).keys, "m.tar/a.png", "m.tar/b.png"])
    assert [isinstance(file, Member) for file in images.files] == [key.startswith("m.tar") for key in images.keys]
    assert contents(images)[images.keys.index("m.tar/b.png")] == b"z" * 600
    assert list(images.sizes_bytes) == [len(content) for content in contents(images)]


def read_by_another_process(images: ImageList, sending: multiprocessing.connection.Connection) -> None:
    sending.send(contents(images))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_any_process_opens_a_member(method: str, folder: Path, tmp_path: Path) -> None:
    zip_program()(folder, tmp_path / "a.zip")
    images = list_images([folder, tmp_path / "a.zip"])
    context: Any = multiprocessing.get_context(method)
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=read_by_another_process, args=(images, sending))
    process.start()
    assert receiving.recv() == contents(images)
    process.join()


def test_a_mapped_list_says_where_members_are_in_16_bytes_each(folder: Path, tmp_path: Path) -> None:
    zip_program()(folder, tmp_path / "a.zip")
    gnu_tar()(folder, tmp_path / "a.tar")
    images = list_images([folder, tmp_path / "a.zip", tmp_path / "a.tar"])
    write_list(images, tmp_path / "list")
    mapped = map_list(tmp_path / "list")
    assert list(mapped.files) == list(images.files) and contents(mapped) == contents(images)
    assert mapped.remarks == images.remarks and mapped.remarks.not_taken == {".txt": 3}
    header = (tmp_path / "list").read_bytes().index(b"\n") + 1
    keys_bytes = sum(len(os.fsencode(key)) for key in images.keys)
    assert (tmp_path / "list").stat().st_size == header + len(images) * 36 + keys_bytes
