"""Images: how they are listed, decoded, and dealt out in batches."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.datasets.folder import pil_loader

from hookx.errors import ImageError
from hookx.images.decoding import decode
from hookx.images.files import Files
from hookx.images.listing import ImageList, list_images
from hookx.images.measuring import measure
from hookx.images.sources.kinds import SUFFIXES
from hookx.keys import Keys, images_sha256
from hookx.plan import Preprocessing, Shard
from hookx.run.lane import Batch
from hookx.run.workers import batches
from kit.pictures import CHELSEA, PHOTOGRAPHS, PLAIN, SMALL, UPRIGHT, copied, four_by_four, no_longer_than, process_ids
from kit.second_route import input_of


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def error_of(*sources: str | Path) -> str:
    with pytest.raises(ImageError) as caught:
        list_images(sources)
    return str(caught.value)


# --- listing -------------------------------------------------------------------------------------------------------


def test_a_folder_is_searched_to_the_bottom_and_sorted_by_key(tmp_path: Path) -> None:
    names = ["b.jpg", "a/z.png", "a.jpg", "a/b/c/d.JPEG", "Z.webp", "a-b.tiff", "ä.jpg", "two words.jpg", "line\n.jpg"]
    touch(tmp_path, *names, "notes.txt", "jpg", ".jpg", "a/b/archive.jpg.zip")
    images = list_images([tmp_path])
    assert list(images.keys) == sorted(names) and len(images) == len(names)
    assert list(images.files) == [str(tmp_path / key) for key in images.keys]


def test_the_order_of_a_list_does_not_depend_on_the_order_of_its_sources(tmp_path: Path) -> None:
    touch(tmp_path, "one/b.jpg", "one/d.jpg", "two/a.jpg", "two/c.jpg", "e.png")
    sources = [tmp_path / "one", tmp_path / "two", tmp_path / "e.png"]
    one, other = list_images(sources), list_images(reversed(sources))
    assert list(one.keys) == list(other.keys) == ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.png"]
    assert list(one.files) == list(other.files)


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_a_suffix_counts_in_any_case(suffix: str, tmp_path: Path) -> None:
    touch(tmp_path, f"a{suffix}", f"b{suffix.upper()}", f"c{suffix.title()}")
    assert len(list_images([tmp_path])) == 3


def test_a_file_that_is_named_has_its_bare_name_for_a_key_and_may_be_called_anything(tmp_path: Path) -> None:
    touch(tmp_path, "a/b/scan.0001")
    images = list_images([str(tmp_path / "a/b/scan.0001")])
    assert (list(images.keys), list(images.files)) == (["scan.0001"], [str(tmp_path / "a/b/scan.0001")])


def test_the_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"12345")
    (tmp_path / "b.jpg").write_bytes(b"")
    (tmp_path / "c.jpg").symlink_to("nowhere")
    assert list(list_images([tmp_path]).sizes_bytes) == [5, 0, -1]


def files_of_many_sizes(folder: Path, count: int) -> list[int]:
    """Fill a folder, in the order of keys, and return how many bytes each file has; some cannot be measured."""
    sizes_bytes = [number * 7 % 50 if number % 10 else -1 for number in range(count)]
    for number, size_bytes in enumerate(sizes_bytes):
        if size_bytes < 0:
            (folder / f"{number:03}.jpg").symlink_to("nowhere")
        else:
            (folder / f"{number:03}.jpg").write_bytes(bytes(size_bytes))
    return sizes_bytes


class Hooked(Files):
    """Files that run something in each measuring process, before it measures its first file."""

    def __init__(self, files: Files, in_child: Callable[[int], None]) -> None:
        super().__init__(files.keys, files.roots, files.root_of)
        self._parent, self._in_child, self._has_run = os.getpid(), in_child, False

    def encoded(self, position: int) -> bytes:
        if os.getpid() != self._parent and not self._has_run:
            self._has_run = True
            self._in_child(position)
        return super().encoded(position)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 100])
def test_processes_measure_a_long_list_together(count: int, tmp_path: Path) -> None:
    before, expected = process_ids(), files_of_many_sizes(tmp_path, count)
    images = list_images([tmp_path])
    assert list(images.sizes_bytes) == list(measure(images.files, max_files_alone=0)) == expected
    assert process_ids() == before


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no process is forked")
def test_what_a_killed_process_did_not_measure_is_measured_all_the_same(tmp_path: Path) -> None:
    def kill_the_first(position: int) -> None:
        if position == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    expected = files_of_many_sizes(tmp_path, 100)
    files = Hooked(list_images([tmp_path]).files, kill_the_first)
    assert list(measure(files, max_files_alone=0)) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no process is forked")
def test_a_ctrl_c_while_files_are_measured_leaves_no_process_behind(tmp_path: Path) -> None:
    def linger(position: int) -> None:
        if position == 0:
            os.kill(os.getppid(), signal.SIGINT)
        time.sleep(3)
        (tmp_path / "lived on").touch()

    files_of_many_sizes(tmp_path, 20)
    files, before = Hooked(list_images([tmp_path]).files, linger), process_ids()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            measure(files, max_files_alone=0)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert process_ids() == before and not (tmp_path / "lived on").exists()


def test_a_process_that_may_have_no_processes_measures_by_itself(tmp_path: Path) -> None:
    expected = files_of_many_sizes(tmp_path, 20)
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)

    def measure_here() -> None:
        sender.send(list(measure(list_images([tmp_path]).files, max_files_alone=0)))

    process = multiprocessing.get_context("fork").Process(target=measure_here, daemon=True)
    process.start()
    process.join()
    assert receiver.poll() and receiver.recv() == expected


@pytest.mark.parametrize("keys_at_once", [1, 2, 3])
def test_a_list_is_the_same_in_whatever_pieces_it_is_packed(keys_at_once: int, tmp_path: Path) -> None:
    touch(tmp_path, *(f"one/{name}.jpg" for name in "aceg"), *(f"two/{name}.jpg" for name in "bdfhi"))
    both_roots = [tmp_path / "one", tmp_path / "two"]
    whole, pieces = list_images(both_roots), list_images(both_roots, packed_at_once=keys_at_once)
    assert list(pieces.keys) == list(whole.keys) == [f"{name}.jpg" for name in "abcdefghi"]
    assert list(pieces.files) == list(whole.files) and all(Path(str(file)).exists() for file in pieces.files)
    for name in "abcdefghi":
        both = [tmp_path / root / f"{name}.jpg" for root in ("one", "two")]
        for file in both:
            file.touch()
        with pytest.raises(ImageError) as caught:
            list_images(both_roots, packed_at_once=keys_at_once)
        assert str(caught.value).startswith(f"two images have the key '{name}.jpg': {both[0]} and {both[1]}")
        both["bdfhi".find(name) < 0].unlink()


def test_two_images_with_one_key_are_an_error_that_names_both(tmp_path: Path) -> None:
    touch(tmp_path, "one/a.jpg", "two/a.jpg")
    message = error_of(tmp_path / "one", tmp_path / "two")
    assert message.startswith(f"two images have the key 'a.jpg': {tmp_path}/one/a.jpg and {tmp_path}/two/a.jpg")
    assert list(list_images([tmp_path]).keys) == ["one/a.jpg", "two/a.jpg"]  # As the message advises.


def test_an_image_that_is_named_twice_is_an_error(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    name = str(tmp_path / "a.jpg")
    assert "two images have the key 'a.jpg'" in error_of(name, name)
    assert "two images have the key 'a.jpg'" in error_of(tmp_path, name)


def test_a_folder_without_an_image_is_an_error_that_names_it(tmp_path: Path) -> None:
    touch(tmp_path, "notes.txt")
    assert error_of(tmp_path) == f"no image found in {tmp_path}\n  1 file not taken: 1 .txt"
    assert error_of() == "no image found in an empty list"


def test_a_source_that_does_not_exist_is_an_error_that_names_it(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    assert error_of(tmp_path, tmp_path / "b.jpg") == f"no such file or folder: '{tmp_path}/b.jpg'"
    assert error_of("") == "no such file or folder: ''"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_cannot_be_listed_is_an_error_and_not_an_empty_folder(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "closed/b.jpg")
    (tmp_path / "closed").chmod(0)
    assert error_of(tmp_path) == f"cannot list the folder '{tmp_path}/closed': Permission denied"


def test_a_folder_called_like_an_image_is_searched(tmp_path: Path) -> None:
    touch(tmp_path, "album.jpg/a.png")
    assert list(list_images([tmp_path]).keys) == ["album.jpg/a.png"]


def test_links_are_followed_and_a_loop_of_them_ends(tmp_path: Path) -> None:
    touch(tmp_path, "a/one.jpg", "b/two.jpg")
    (tmp_path / "a/b").symlink_to("../b")
    (tmp_path / "b/a").symlink_to("../a")
    (tmp_path / "b/up").symlink_to(tmp_path)
    (tmp_path / "link.jpg").symlink_to("a/one.jpg")
    (tmp_path / "itself.jpg").symlink_to("itself.jpg")
    (tmp_path / "itself").symlink_to("itself")
    with no_longer_than(60):
        images = list_images([tmp_path])
    assert list(images.keys) == ["a/b/two.jpg", "a/one.jpg", "b/a/one.jpg", "b/two.jpg", "itself.jpg", "link.jpg"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep names in UTF-8")
def test_a_name_that_is_no_utf_8_is_a_key_like_any_other(tmp_path: Path) -> None:
    name = b"caf\xe9.jpg"
    shutil.copy(os.fsencode(CHELSEA), os.fsencode(tmp_path) + b"/" + name)
    images = list_images([tmp_path])
    assert [os.fsencode(key) for key in images.keys] == [name]
    [batch] = batches(images, [range(1)], SMALL, workers=0)
    assert (batch.keys, batch.failures) == (list(images.keys), [])


# --- standard input ------------------------------------------------------------------------------------------------


@contextmanager
def standard_input(content: bytes, file: Path) -> Iterator[None]:
    file.write_bytes(content)
    before = sys.stdin
    with open(file) as sys.stdin:
        yield
    sys.stdin = before


@pytest.mark.parametrize(("source", "end"), [("-", b"\n"), ("-", b"\r\n"), ("-0", b"\0")])
@pytest.mark.parametrize("last", [True, False])
def test_standard_input_gives_a_path_a_line(
    source: str, end: bytes, last: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = ["b.jpg", "a/two words.png", "./c.jpg", "a/../d.tif", str(tmp_path / "e.jpg"), "/elsewhere/f.jpg"]
    with standard_input(end.join(map(os.fsencode, paths)) + end * last, tmp_path / "list"):
        images = list_images([source])
    assert list(images.keys) == ["a/two words.png", "b.jpg", "c.jpg", "d.tif", "e.jpg", "elsewhere/f.jpg"]
    assert {os.path.abspath(str(file)) for file in images.files} == {os.path.abspath(path) for path in paths}


def test_a_line_break_in_a_name_survives_where_names_end_with_nul(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["line\nbreak.jpg", "return\r", os.fsdecode(b"caf\xe9.jpg")]
    with standard_input("\0".join(names).encode("utf-8", "surrogateescape"), tmp_path / "list"):
        assert list(list_images(["-0"]).keys) == sorted(names)


def test_two_dots_behind_a_link_lead_where_the_link_leads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "deep/folder/in.jpg", "a.jpg")
    (tmp_path / "deep" / "a.jpg").write_bytes(b"the one that is meant")
    (tmp_path / "link").symlink_to("deep/folder")
    monkeypatch.chdir(tmp_path)
    with standard_input(b"link/../a.jpg", tmp_path / "list"):
        images = list_images(["-"])
    assert list(images.keys) == ["deep/a.jpg"]
    assert Path(str(images.files[0])).read_bytes() == b"the one that is meant"


def root_and_key(path: str) -> tuple[str, str]:
    """Return the root and the key that `list_images` should give to a path."""
    whole, here = os.path.abspath(path), f"{os.getcwd()}/"
    return ("", whole.removeprefix(here)) if whole.startswith(here) else ("/", whole.lstrip("/"))


NAMES = ["a", "b.jpg", "a.", "a\x01", "ä", "two words", "..a", ".a", ".", "..", ""]


@given(st.lists(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4).map("/".join), max_size=6), st.booleans())
@example(["a//b"], False)
@example([".//a", "a/b"], False)
@example(["a/"], True)
@example(["./a", "./b.jpg"], True)
def test_a_list_of_paths_gives_the_key_that_each_path_has_alone_in_the_order_of_their_bytes(
    paths: list[str], with_nul: bool
) -> None:
    with TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        expected = sorted((os.fsencode(key), root) for root, key in map(root_and_key, filter(None, paths)))
        keys = [os.fsdecode(key) for key, _ in expected]
        with standard_input(("\0" if with_nul else "\n").join(paths).encode(), Path("list")):
            if not keys or len(set(keys)) < len(keys):
                assert error_of("-0" if with_nul else "-").startswith(("no image found", "two images have the key"))
            else:
                images = list_images(["-0" if with_nul else "-"])
                assert list(images.keys) == keys
                assert list(images.files) == [root + key for key, (_, root) in zip(keys, expected, strict=True)]


def test_a_long_list_is_read_in_blocks_and_no_path_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = many_names(60_000).split(b"\0")[:-1]
    shuffled = random.Random(0).sample(names, len(names))
    with standard_input(b"\n".join(b"./" + name for name in shuffled), tmp_path / "list"):  # as `find .` writes them
        images = list_images(["-"])
    assert list(map(os.fsencode, images.keys)) == names


def test_a_nul_where_lines_are_read_is_an_error_that_names_the_option(tmp_path: Path) -> None:
    with standard_input(b"a.jpg\0b.jpg\0", tmp_path / "list"):
        assert error_of("-") == "the list on standard input contains a NUL\n  if NULs end the paths, write -0"


def test_empty_lines_of_standard_input_name_nothing(tmp_path: Path) -> None:
    with standard_input(b"\n\r\n\n", tmp_path / "list"):
        assert error_of("-") == "no image found in -"


# --- memory --------------------------------------------------------------------------------------------------------


def many_names(count: int) -> bytes:
    """Give paths of 40 bytes each, of files that do not exist."""
    return b"".join(b"photographs/of/a/journey/%011d.jpg\0" % number for number in range(count))


def test_a_key_costs_its_bytes_and_twenty_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with standard_input(many_names(20_000), tmp_path / "list"):
        tracemalloc.start()
        try:
            images = list_images(["-0"])
            bytes_held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert len(images) == 20_000 and len(images.keys[0]) == 40
    assert bytes_held / len(images) < 1.1 * (40 + 20)  # Arrays grow in steps, and some of the last one stays free.


PEAK = """
import resource, sys
from hookx.images.listing import list_images
from hookx.keys import images_sha256
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
images = list_images(["-0"])
digest = images_sha256(images.keys, images.sizes_bytes)
print(len(images), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, digest)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere ru_maxrss is not in KB")
def test_a_million_paths_take_a_bounded_amount_of_memory_each_in_any_order(tmp_path: Path) -> None:
    names = many_names(1_000_000).split(b"\0")[:-1]
    expected = hashlib.sha256(b"".join(name + b"\0-1\n" for name in names)).hexdigest()
    shuffled = random.Random(0).sample(names, len(names))
    for order in (names, shuffled):
        process = subprocess.run(
            [sys.executable, "-c", PEAK], input=b"\0".join(order), stdout=subprocess.PIPE, cwd=tmp_path, check=True
        )
        count, peak_bytes, digest = process.stdout.split()
        assert int(count) == len(names) and digest.decode() == expected
        assert int(peak_bytes) / len(names) < 40 + 125  # What sorting a list of them takes, and a pointer to each.


def test_the_digest_of_a_list_is_that_of_its_keys_and_sizes_a_line_each(tmp_path: Path) -> None:
    touch(tmp_path, "b/ä.jpg", "a.png")
    (tmp_path / "b/c.png").write_bytes(b"12345")
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    images = list_images([tmp_path])
    lines = b"a.png\0000\nb/c.png\0005\nb/\xc3\xa4.jpg\0000\ngone.jpg\000-1\n"
    assert images_sha256(images.keys, images.sizes_bytes) == hashlib.sha256(lines).hexdigest()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_forked_process_that_reads_every_key_does_not_copy_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kilobytes_of_its_own() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private"))

    def read_everything(images: ImageList, reply: Connection) -> None:
        gc.disable()
        images.keys[0], images.files[0], kilobytes_of_its_own()
        before = kilobytes_of_its_own()
        for key, file, size_bytes in zip(images.keys, images.files, images.sizes_bytes, strict=True):
            assert file == key and size_bytes == -1
        reply.send(kilobytes_of_its_own() - before)

    fork = multiprocessing.get_context("fork")
    monkeypatch.chdir(tmp_path)
    with standard_input(many_names(200_000), tmp_path / "list"):
        images = list_images(["-0"])
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=read_everything, args=(images, sender))
    child.start()
    assert receiver.recv() < 1500, "of 12,000 KB"
    child.join()


def test_a_list_can_be_indexed_and_cut_like_any_other(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{name}.jpg" for name in "abcde"))
    images = list_images([tmp_path])
    for lazy in (images.keys, images.files):
        whole = list(lazy)
        assert lazy[1:4] == whole[1:4] and lazy[::-2] == whole[::-2] and lazy[-1] == whole[-1]
        with pytest.raises(IndexError):
            lazy[5]


# --- decoding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("photograph", sorted(PHOTOGRAPHS.rglob("*.jpg")), ids=lambda file: file.stem)
def test_pixels_are_those_of_torchvisions_loader_and_transforms(photograph: Path, interpolation: str) -> None:
    preprocessing = Preprocessing(40, 32, SMALL.mean, SMALL.std, interpolation)
    mode = transforms.InterpolationMode(interpolation)
    steps = [transforms.Resize(40, mode), transforms.CenterCrop(32), transforms.ToTensor()]
    steps += [transforms.Normalize(SMALL.mean, SMALL.std)]
    pixels_CHW = input_of(photograph, preprocessing)
    assert pixels_CHW.dtype == torch.float32 and pixels_CHW.shape == (3, 32, 32)
    assert torch.equal(pixels_CHW, transforms.Compose(steps)(pil_loader(str(photograph))))


@pytest.mark.parametrize(
    ("mode", "suffix"), [("RGBA", ".png"), ("P", ".png"), ("P", ".gif"), ("CMYK", ".tif"), ("RGB", ".bmp")]
)
def test_a_picture_of_any_mode_becomes_the_same_rgb(mode: str, suffix: str, tmp_path: Path) -> None:
    picture, file = four_by_four(), tmp_path / f"picture{suffix}"
    converted = picture.quantize(16) if mode == "P" else picture.convert(mode)
    if mode == "RGBA":
        converted.putalpha(128)  # Transparency is dropped, not blended.
    converted.save(file)
    with Image.open(file) as saved:
        assert saved.mode == mode
    expected = torch.tensor(list(picture.tobytes())).reshape(4, 4, 3).permute(2, 0, 1)
    assert torch.equal(decode(str(file), PLAIN)[0], expected.to(torch.uint8))


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_a_grey_picture_gets_three_equal_channels(mode: str, tmp_path: Path) -> None:
    four_by_four().convert("L").convert(mode).save(tmp_path / "grey.png")
    red, green, blue = decode(str(tmp_path / "grey.png"), PLAIN)[0]
    assert torch.equal(red, green) and torch.equal(green, blue) and red.unique().numel() > 1


# What the camera stored, if it was held so that `orientation` turns the picture upright.
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def save(picture: Image.Image, file: Path, orientation: int) -> str:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(file, exif=exif)
    return str(file)


@pytest.mark.parametrize("orientation", STORED)
def test_a_recorded_rotation_is_ignored_and_counted_or_applied(orientation: int, tmp_path: Path) -> None:
    stored = four_by_four().transpose(STORED[orientation])
    file = save(stored, tmp_path / "turned.png", orientation)
    unmarked = save(stored, tmp_path / "unmarked.png", 1)
    upright = save(four_by_four(), tmp_path / "upright.png", 1)
    for preprocessing, same_as, is_counted in ((PLAIN, unmarked, True), (UPRIGHT, upright, False)):
        pixels_CHW, (rotation_ignored, _) = decode(file, preprocessing)
        assert torch.equal(pixels_CHW, decode(same_as, preprocessing)[0])
        assert rotation_ignored is is_counted


def test_a_rotation_that_pillow_applies_itself_is_not_counted(tmp_path: Path) -> None:
    file = save(four_by_four().transpose(STORED[6]), tmp_path / "turned.tif", 6)
    upright = save(four_by_four(), tmp_path / "upright.tif", 1)
    for preprocessing in (PLAIN, UPRIGHT):
        pixels_CHW, (rotation_ignored, _) = decode(file, preprocessing)
        assert torch.equal(pixels_CHW, decode(upright, preprocessing)[0]) and not rotation_ignored


def test_the_rotations_that_were_ignored_are_counted_by_batch(tmp_path: Path) -> None:
    for number, orientation in enumerate([1, 6, 3, 1, 8]):
        save(four_by_four(), tmp_path / f"{number}.jpg", orientation)
    for preprocessing, counts in ((PLAIN, [2, 1]), (UPRIGHT, [0, 0])):
        some = batches(list_images([tmp_path]), [range(3), range(3, 5)], preprocessing, workers=0)
        assert [batch.rotations_ignored for batch in some] == counts


@given(
    st.binary(max_size=60),
    st.sampled_from([b"", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08"]),
    st.sampled_from([".jpg", ".png"]),
)
@example(b"neither II nor MM", b"", ".png")  # Pillow raises a SyntaxError.
def test_damaged_metadata_does_not_make_an_image_unreadable(exif: bytes, header: bytes, suffix: str) -> None:
    with NamedTemporaryFile(suffix=suffix) as file:
        four_by_four().save(file.name, exif=b"Exif\0\0" + header + exif)
        for preprocessing in (PLAIN, UPRIGHT):
            [batch] = batches(list_images([file.name]), [range(1)], preprocessing, workers=0)
            assert batch.failures == []


# --- images that cannot be read ------------------------------------------------------------------------------------


def spoil(file: Path) -> dict[str, Callable[[], object]]:
    """Give the ways in which a file can fail to be an image."""
    photograph = CHELSEA.read_bytes()
    return {
        "empty": file.touch,
        "text": lambda: file.write_text("not an image"),
        "truncated": lambda: file.write_bytes(photograph[: len(photograph) // 2]),
        "header only": lambda: file.write_bytes(photograph[:30]),
        "folder": file.mkdir,
        "missing": lambda: None,
        "dangling link": lambda: file.symlink_to("nowhere.jpg"),
        "link to itself": lambda: file.symlink_to(file.name),
    }


KINDS = list(spoil(Path()))


def failure_of(file: Path) -> tuple[str, str]:
    keys = Keys.pack([os.fsencode(file.name)])
    size_bytes = file.stat().st_size if file.is_file() else -1
    images = ImageList(keys, Files(keys, [os.fsencode(f"{file.parent}/")], array("i", [0])), array("q", [size_bytes]))
    [batch] = batches(images, [range(1)], SMALL, workers=0)
    assert batch.pixels_NCHW is None and batch.keys == []
    [failure] = batch.failures
    return failure


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_no_image_is_a_failure_with_a_reason_that_is_the_same_everywhere(
    kind: str, tmp_path: Path
) -> None:
    failures = []
    for folder in ("one", "another"):
        (tmp_path / folder).mkdir()
        spoil(tmp_path / folder / "bad.jpg")[kind]()
        failures.append(failure_of(tmp_path / folder / "bad.jpg"))
    assert failures[0] == failures[1]
    key, reason = failures[0]
    assert key == "bad.jpg" and "\n" not in reason and str(tmp_path) not in reason and "bad.jpg" not in reason
    assert len(reason.split()) > 2, "an error's class alone says too little"


# --- batches -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> ImageList:
    """Give a list of images with a few that are unreadable, three of them in a row, which fill a batch."""
    folder = tmp_path_factory.mktemp("mixture")
    for number in range(23):
        four_by_four().rotate(number).save(folder / f"{number:02}.png")
    for number in (0, 7, 9, 10, 11, 22):
        (folder / f"{number:02}.png").write_text("not an image")
    return list_images([folder])


def collected(images: ImageList, positions: list[range], workers: int) -> list[Batch]:
    return copied(batches(images, positions, SMALL, workers=workers))


def same_pixels(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


@given(start=st.integers(0, 22), count=st.integers(1, 23), batch_size=st.integers(1, 24))
def test_every_position_is_one_row_or_one_failure(mixture: ImageList, start: int, count: int, batch_size: int) -> None:
    shard = Shard(0, start, min(start + count, 23))
    some = collected(mixture, list(shard.batches(batch_size)), workers=0)
    assert [batch.positions for batch in some] == list(shard.batches(batch_size))
    for batch in some:
        asked = [mixture.keys[position] for position in batch.positions]
        failed = [key for key, _ in batch.failures]
        assert sorted(batch.keys + failed) == asked
        assert batch.keys == sorted(batch.keys)
        assert (0 if batch.pixels_NCHW is None else len(batch.pixels_NCHW)) == len(batch.keys)


def test_a_row_holds_the_pixels_of_its_own_key(mixture: ImageList) -> None:
    for batch in collected(mixture, [range(5, 9), range(9, 12), range(12, 23)], workers=0):
        for row, key in enumerate(batch.keys):
            assert batch.pixels_NCHW is not None
            pixels_CHW, _ = decode(mixture.files[mixture.keys.index(key)], SMALL)
            assert torch.equal(batch.pixels_NCHW[row], pixels_CHW)


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_batches_in_the_same_order(mixture: ImageList, workers: int) -> None:
    positions = [range(start, min(start + 3, 23)) for start in range(0, 23, 3)]
    pairs = zip(collected(mixture, positions, 0), collected(mixture, positions, workers), strict=True)
    for one, other in pairs:
        assert same_pixels(one.pixels_NCHW, other.pixels_NCHW)
        assert (one.positions, one.keys, one.failures) == (other.positions, other.keys, other.failures)


def test_no_positions_are_no_batches(mixture: ImageList) -> None:
    assert collected(mixture, [], workers=0) == []


# --- decoding processes --------------------------------------------------------------------------------------------


ONE_BY_ONE = [range(position, position + 1) for position in range(23)]


def test_a_decoding_process_that_was_killed_is_replaced_where_the_next_batch_is_asked_for(mixture: ImageList) -> None:
    before = process_ids()
    some = batches(mixture, ONE_BY_ONE, SMALL, workers=2)
    first = next(some)
    with no_longer_than(60):
        os.kill(min(process_ids() - before), signal.SIGKILL)
        time.sleep(0.3)  # The consumer is at work; it hears of it when it comes back.
        assert [batch.positions for batch in [first, *some]] == ONE_BY_ONE
    assert process_ids() == before


def test_a_ctrl_c_does_not_reach_the_decoding_processes(mixture: ImageList) -> None:
    before = process_ids()
    some = batches(mixture, ONE_BY_ONE, SMALL, workers=2)
    first = [next(some), next(some)]  # One of each process: both are at work.
    with no_longer_than(60):
        for process_id in process_ids() - before:
            os.kill(process_id, signal.SIGINT)
        assert [batch.positions for batch in [*first, *some]] == ONE_BY_ONE


def test_each_decoding_process_runs_what_it_is_given_to_run_first(mixture: ImageList, tmp_path: Path) -> None:
    def leave_a_trace() -> None:
        (tmp_path / str(os.getpid())).touch()

    assert len(list(batches(mixture, ONE_BY_ONE, SMALL, workers=2, in_worker=leave_a_trace))) == len(ONE_BY_ONE)
    traces = {int(trace.name) for trace in tmp_path.iterdir()}
    assert len(traces) == 2 and os.getpid() not in traces


def test_the_handler_of_a_callers_child_processes_stays_the_callers(mixture: ImageList) -> None:
    before = signal.getsignal(signal.SIGCHLD)
    some = batches(mixture, ONE_BY_ONE, SMALL, workers=1)
    assert signal.getsignal(signal.SIGCHLD) is before
    assert len(list(some)) == len(ONE_BY_ONE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_for_a_gpu_lie_in_pinned_memory(mixture: ImageList) -> None:
    some = list(batches(mixture, [range(4), range(9, 12)], SMALL, workers=1))
    assert some[0].pixels_NCHW is not None and some[0].pixels_NCHW.is_pinned()
    assert some[1].pixels_NCHW is None


def test_keys_and_files_are_indexed_like_lists_of_them() -> None:
    images = list_images([PHOTOGRAPHS])
    for lazy in (images.keys, images.files):
        listed = list(lazy)
        assert lazy[-1] == listed[-1] and lazy[2:-1:3] == listed[2:-1:3]
        with pytest.raises(IndexError):
            lazy[len(listed)]
