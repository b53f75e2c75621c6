"""Odd images, files that are not images, and images that hang or crash their decoder: one row or one failure each."""

from __future__ import annotations

import csv
import gc
import io
import itertools
import multiprocessing
import multiprocessing.util
import os
import re
import resource
import shutil
import signal
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageFile
from torch import Tensor
from torch.utils.data import get_worker_info
from typer.testing import CliRunner

import hookx
from hookx.check.verify import verify
from hookx.cli.app import app
from hookx.errors import HookxError, ImageError
from hookx.images.decoding import decode
from hookx.images.listing import ImageList, list_images
from hookx.launch.extract import extract
from hookx.run.alone import read_alone
from hookx.run.in_hand import InHand
from hookx.run.lane import Batch
from hookx.run.reader import Reader
from hookx.run.worker import Worker
from hookx.run.workers import batches
from kit.pictures import CHELSEA, PLAIN, SMALL, four_by_four, no_longer_than, process_ids

Outcome = Tensor | str  # the pixels of an image, or the reason why there are none


def cut(count: int, batch_size: int) -> list[range]:
    return [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]


def outcomes_of(some: Iterator[Batch]) -> dict[str, Outcome]:
    """Collect the outcome of every key, and see that no key has two."""
    outcomes: dict[str, Outcome] = {}
    for batch in some:
        rows = [] if batch.pixels_NCHW is None else list(batch.pixels_NCHW.clone())  # The memory is used again.
        pairs: list[tuple[str, Outcome]] = [*zip(batch.keys, rows, strict=True), *batch.failures]
        for key, outcome in pairs:
            assert key not in outcomes
            outcomes[key] = outcome
    return outcomes


def decoded(images: ImageList, *, workers: int, batch_size: int = 4, seconds: float = 60) -> dict[str, Outcome]:
    positions = cut(len(images), batch_size)
    with no_longer_than(60):
        some = batches(images, positions, SMALL, workers=workers, decode_timeout_seconds=seconds)
        outcomes = outcomes_of(some)
    assert sorted(outcomes) == sorted(images.keys), "every listed image is one row or one failure"
    return outcomes


def reasons_of(outcomes: dict[str, Outcome]) -> dict[str, str]:
    return {key: outcome for key, outcome in outcomes.items() if isinstance(outcome, str)}


def same_outcomes(one: dict[str, Outcome], other: dict[str, Outcome]) -> bool:
    rows = [{key: pixels.tolist() for key, pixels in of.items() if isinstance(pixels, Tensor)} for of in (one, other)]
    return rows[0] == rows[1] and reasons_of(one) == reasons_of(other)


def failure_of(file: Path) -> str:
    """Give the reason why a file that is named outright cannot be read."""
    outcome = decoded(list_images([file]), workers=0)[file.name]
    assert isinstance(outcome, str)
    return outcome


def rgb_of(file: Path) -> NDArray[np.uint8]:
    """Give what a picture of 4 x 4 pixels becomes, as height, width, channel, from 0 to 255."""
    pixels_CHW, _ = decode(str(file), PLAIN)
    rgb: NDArray[np.uint8] = pixels_CHW.permute(1, 2, 0).numpy()
    return rgb


def grey_of(file: Path) -> list[int]:
    """Give the grey values of a picture of 4 x 4 pixels, row by row."""
    red, green, blue = np.moveaxis(rgb_of(file), 2, 0)
    assert (red == green).all() and (red == blue).all()
    return [int(value) for value in red.flatten()]


# --- files that are not images -------------------------------------------------------------------------------------


def make_socket(file: Path) -> None:
    here = os.getcwd()
    os.chdir(file.parent)  # The path of a socket is short.
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(file.name)
    os.chdir(here)


NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "not a regular file"),
    "endless device": (lambda file: file.symlink_to("/dev/zero"), "not a regular file"),
    "socket": (make_socket, "OSError: No such device or address"),
    "empty": (Path.touch, "the file is empty"),
    "dangling link": (lambda file: file.symlink_to("nowhere"), "FileNotFoundError: No such file or directory"),
    "looping link": (lambda file: file.symlink_to(file.name), "OSError: Too many levels of symbolic links"),
    "text": (lambda file: file.write_text("text"), "UnidentifiedImageError: not an image that Pillow knows"),
    "a program for Ghostscript": (
        lambda file: file.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"),
        "UnidentifiedImageError: not an image that Pillow knows",
    ),
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_picture_is_a_failure_at_once(kind: str, tmp_path: Path) -> None:
    make, reason = NO_FILES[kind]
    make(tmp_path / "x.jpg")
    with no_longer_than(10):
        assert failure_of(tmp_path / "x.jpg") == reason


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_a_failure(tmp_path: Path) -> None:
    shutil.copy(CHELSEA, tmp_path / "x.jpg")
    (tmp_path / "x.jpg").chmod(0)
    assert failure_of(tmp_path / "x.jpg") == "PermissionError: Permission denied"


def test_a_file_that_changes_after_it_was_listed_is_a_failure(tmp_path: Path) -> None:
    for name in ("changes", "grows", "stays", "becomes a folder"):
        (tmp_path / f"{name}.jpg").write_bytes(CHELSEA.read_bytes())
    (tmp_path / "appears.jpg").symlink_to("target")
    images = list_images([tmp_path])
    size_bytes = CHELSEA.stat().st_size
    four_by_four().save(tmp_path / "changes.jpg")
    with open(tmp_path / "grows.jpg", "ab") as file:
        file.write(b"\0")
    (tmp_path / "becomes a folder.jpg").unlink()
    (tmp_path / "becomes a folder.jpg").mkdir()
    shutil.copy(CHELSEA, tmp_path / "target")
    changed_bytes = (tmp_path / "changes.jpg").stat().st_size
    assert reasons_of(decoded(images, workers=1)) == {
        "appears.jpg": f"changed since it was listed (unreadable -> {size_bytes} bytes)",
        "becomes a folder.jpg": "IsADirectoryError: Is a directory",
        "changes.jpg": f"changed since it was listed ({size_bytes} -> {changed_bytes} bytes)",
        "grows.jpg": f"changed since it was listed ({size_bytes} -> {size_bytes + 1} bytes)",
    }


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".gif", ".tif", ".bmp"])
def test_an_image_that_is_cut_short_anywhere_is_a_failure_or_a_row_and_nothing_else(
    suffix: str, tmp_path: Path
) -> None:
    (tmp_path / "cut").mkdir()
    four_by_four().resize((20, 20)).save(tmp_path / f"whole{suffix}")
    whole = (tmp_path / f"whole{suffix}").read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 60)):
        (tmp_path / "cut" / f"{length:05}{suffix}").write_bytes(whole[:length])
    outcomes = decoded(list_images([tmp_path / "cut"]), workers=0)
    assert len(reasons_of(outcomes)) > 30


def test_a_wrong_extension_does_not_matter(tmp_path: Path) -> None:
    four_by_four().save(tmp_path / "x", "PNG")
    (tmp_path / "x").rename(tmp_path / "x.jpg")
    assert (rgb_of(tmp_path / "x.jpg") == np.asarray(four_by_four())).all()


def test_names_with_line_breaks_commas_and_quotes_are_keys_like_any_other(tmp_path: Path) -> None:
    names = ["line\nbreak.png", 'a, "quoted" name.png', " .png", "tab\t.png"]
    for name in names:
        four_by_four().save(tmp_path / name)
    assert reasons_of(decoded(list_images([tmp_path]), workers=1)) == {}


# --- sizes ---------------------------------------------------------------------------------------------------------


def png_of(width: int, height: int) -> bytes:
    """Give a grey, black PNG file of any size, which is small itself."""
    body = zlib.compress(bytes(min((width + 1) * height, 10**6)))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", body), (b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in chunks:
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return content


@pytest.mark.parametrize(
    ("width", "height", "reason"),
    [
        (60_000, 60_000, r"DecompressionBombError: Image size \(3600000000 pixels\) exceeds limit.*"),
        (2**31 - 1, 2**31 - 1, r".*Error: .*"),
        (2**31, 1, r".*Error: .*"),
        (0, 5, r".*Error: .*"),
        (1, 300_000, r"too long for its width: 1 x 300000 pixels become 32 x 9600000 when resized"),
        (300_000, 1, r"too long for its width: 300000 x 1 pixels become 9600000 x 32 when resized"),
    ],
)
def test_a_picture_of_absurd_size_is_a_failure_and_takes_no_memory(
    width: int, height: int, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "bomb.png").write_bytes(png_of(width, height))
    before_kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert re.fullmatch(reason, failure_of(tmp_path / "bomb.png"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kilobytes < 200_000


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 2000), (2000, 1), (2, 3), (10_000, 9_000)])
def test_a_picture_of_unusual_size_is_a_row(width: int, height: int, tmp_path: Path) -> None:
    Image.new("L", (width, height), 200).save(tmp_path / "x.png")
    pixels_CHW, _ = decode(str(tmp_path / "x.png"), PLAIN)
    assert torch.equal(pixels_CHW, torch.full((3, 4, 4), 200, dtype=torch.uint8))


# --- colours -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *itertools.product(["1", "L", "LA", "P", "RGB", "RGBA"], [".png", ".tif"]),
        *itertools.product(["CMYK", "YCbCr", "LAB"], [".tif"]),
        *itertools.product(["L", "RGB", "CMYK"], [".jpg"]),
        *itertools.product(["RGB", "RGBA"], [".webp"]),
        *itertools.product(["1", "L", "P", "RGB"], [".bmp"]),
        *itertools.product(["L", "RGB"], [".ppm"]),
        *itertools.product(["L", "P"], [".gif"]),
    ],
)
def test_eight_bits_are_bit_for_bit_what_pillow_converts(mode: str, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"x{suffix}"
    picture = Image.merge("LAB", four_by_four().split()) if mode == "LAB" else four_by_four().convert(mode)
    picture.save(file)
    with Image.open(file) as saved:
        assert suffix in (".webp", ".gif", ".ppm", ".bmp", ".jpg") or saved.mode == mode
        assert (rgb_of(file) == np.asarray(saved.convert("RGB"))).all()
    assert len({tuple(pixel) for pixel in rgb_of(file).reshape(16, 3).tolist()}) > 1


def test_transparency_is_dropped_and_not_blended(tmp_path: Path) -> None:
    opaque = four_by_four()
    see_through = opaque.copy()
    see_through.putalpha(0)
    see_through.save(tmp_path / "alpha.png")
    opaque.save(tmp_path / "key.png", transparency=opaque.getpixel((1, 1)))
    palette = opaque.quantize(16)
    palette.save(tmp_path / "palette.png", transparency=bytes(range(16)))
    palette.save(tmp_path / "palette.gif", transparency=3)
    for name in ("alpha.png", "key.png", "palette.png", "palette.gif"):
        assert (rgb_of(tmp_path / name) == np.asarray(opaque)).all(), name


@pytest.mark.parametrize(("mode", "colour"), [("RGBA", (50, 25, 10, 128)), ("LA", (50, 128))])
def test_colours_that_are_stored_multiplied_by_their_alpha_are_divided_by_it(
    mode: str, colour: tuple[int, ...], tmp_path: Path
) -> None:
    Image.new(mode, (4, 4), colour).save(tmp_path / "x.tif")
    content = (tmp_path / "x.tif").read_bytes()
    plain_alpha, associated_alpha = (struct.pack("<HHIH", 338, 3, 1, kind) for kind in (2, 1))  # ExtraSamples
    assert plain_alpha in content
    (tmp_path / "x.tif").write_bytes(content.replace(plain_alpha, associated_alpha))
    expected = [value * 255 // 128 for value in colour[:-1]]
    assert rgb_of(tmp_path / "x.tif")[0, 0].tolist() == (expected if mode == "RGBA" else expected * 3)


def test_ycck_is_read_like_the_cmyk_it_stands_for(tmp_path: Path) -> None:
    Image.new("CMYK", (4, 4), (200, 100, 50, 20)).save(tmp_path / "cmyk.jpg", quality=100)
    content = (tmp_path / "cmyk.jpg").read_bytes()
    marker = content.index(b"Adobe")
    assert content[marker + 11] == 0  # no transformation; 2: the first three channels are YCC
    (tmp_path / "ycck.jpg").write_bytes(content[: marker + 11] + b"\x02" + content[marker + 12 :])
    with Image.open(tmp_path / "ycck.jpg") as saved:
        assert saved.mode == "CMYK" and (rgb_of(tmp_path / "ycck.jpg") == np.asarray(saved.convert("RGB"))).all()
    assert (rgb_of(tmp_path / "ycck.jpg") != rgb_of(tmp_path / "cmyk.jpg")).any()


def test_a_colour_profile_is_ignored(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    four_by_four().save(tmp_path / "with.png", icc_profile=profile)
    with Image.open(tmp_path / "with.png") as saved:
        assert saved.info["icc_profile"] == profile
    assert (rgb_of(tmp_path / "with.png") == np.asarray(four_by_four())).all()


def save_deep(values: NDArray[np.generic], file: Path) -> Path:
    Image.fromarray(values.reshape(4, 4)).save(file)
    return file


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_sixteen_bits_of_grey_are_divided_by_257(suffix: str, tmp_path: Path) -> None:
    values = np.array([0, 1, 128, 129, 255, 256, 257, 300, 1000, 9999, 32767, 32768, 40000, 65406, 65407, 65535])
    file = save_deep(values.astype(np.uint16), tmp_path / f"x{suffix}")
    assert grey_of(file) == [round(value / 257) for value in values.tolist()]


def test_the_byte_order_of_sixteen_bits_does_not_matter(tmp_path: Path) -> None:
    values = np.arange(16, dtype=np.uint16) * 4000
    little = save_deep(values, tmp_path / "little.tif")
    content = little.read_bytes()
    big = tmp_path / "big.tif"
    with Image.open(little) as image:
        image.save(big, "TIFF")
        big_endian = Image.frombytes("I;16B", (4, 4), values.astype(">u2").tobytes())
    big_endian.save(big)
    assert big.read_bytes() != content and grey_of(big) == grey_of(little)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 257, 65535], [0, 1, 255]),  # 16 bits in 32
        ([0, 1, 2], [0, 0, 0]),
        ([0, 65536, 131072], [0, 128, 255]),
        ([-100, 0, 300], [0, 64, 255]),
        ([-(2**31), 0, 2**31 - 1], [0, 128, 255]),
        ([10**9, 10**9, 10**9], [0, 0, 0]),
    ],
)
def test_integers_of_32_bits_are_16_bits_or_scaled_by_their_own_range(
    values: list[int], expected: list[int], tmp_path: Path
) -> None:
    file = save_deep(np.resize(np.array(values, np.int32), 16), tmp_path / "x.tif")
    assert grey_of(file)[:3] == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 1.25, 255.0], [0, 1, 255]),
        ([0.0, 128.0, 256.0], [0, 128, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([-3e38, 0.0, 3e38], [0, 128, 255]),
        ([1e-45, -1e-45, 1e-45], [255, 0, 255]),
        ([-5.0, -5.0, -5.0], [0, 0, 0]),
        ([0.0, 0.0, 0.0], [0, 0, 0]),
    ],
)
def test_floating_point_is_scaled_by_its_range_and_never_cut_to_white(
    values: list[float], expected: list[int], tmp_path: Path
) -> None:
    file = save_deep(np.resize(np.array(values, np.float32), 16), tmp_path / "x.tif")
    assert grey_of(file)[:3] == expected


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_floating_point_image_that_is_not_finite_is_a_failure(value: float, tmp_path: Path) -> None:
    values = np.zeros(16, np.float32)
    values[7] = value
    assert failure_of(save_deep(values, tmp_path / "x.tif")) == "the image holds values that are not finite"


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tif"])
def test_the_first_frame_or_page_stands_for_all(suffix: str, tmp_path: Path) -> None:
    first, others = Image.new("RGB", (4, 4), (250, 0, 0)), [Image.new("RGB", (4, 4), (0, 0, 250))] * 2
    first.save(tmp_path / f"x{suffix}", save_all=True, append_images=others, lossless=True)
    with Image.open(tmp_path / f"x{suffix}") as saved:
        assert getattr(saved, "n_frames", 1) > 1
    assert rgb_of(tmp_path / f"x{suffix}").reshape(16, 3).tolist() == [[250, 0, 0]] * 16


# --- decoders that hang, crash, or leave ---------------------------------------------------------------------------


def spring(fp: IO[bytes], _filename: str | bytes) -> ImageFile.ImageFile:
    """Do to the decoding process what the file says; what "beside" precedes, only to one that decodes others, too."""
    fp.seek(0)
    *when, what, argument = fp.read().decode().removeprefix("TRAP ").split()
    if when and get_worker_info() is None:
        what = "nothing"
    if what == "signal":
        os.kill(os.getpid(), int(argument))
    elif what == "exit":
        os._exit(int(argument))
    elif what == "raise":
        raise SystemExit(int(argument))
    elif what == "linger":  # What the process shares with others is gone before it is.
        multiprocessing.util.Finalize(None, time.sleep, args=[float(argument)], exitpriority=-1000)
        raise SystemExit(3)
    elif what == "later":
        time.sleep(1)
        os.kill(os.getpid(), int(argument))
    elif what == "sleep":
        time.sleep(float(argument))
    elif what == "allocate":
        np.ones(int(argument), np.uint8)
    elif what == "compute":
        re.match(r"(a+)+$", "a" * int(argument) + "b")  # In C, for years.
    raise OSError("the trap let go")


@pytest.fixture(scope="module", autouse=True)
def traps() -> Iterator[None]:
    """Teach Pillow a format whose decoder misbehaves; the decoding processes are forked, and inherit it."""
    Image.init()
    Image.register_open("TRAP", spring, lambda prefix: prefix.startswith(b"TRAP "))
    yield
    del Image.OPEN["TRAP"]
    Image.ID.remove("TRAP")


def folder_of(folder: Path, count: int, trapped: dict[int, str]) -> ImageList:
    """List a folder of pictures, in which some numbers are traps."""
    for number in range(count):
        if number in trapped:
            (folder / f"{number:02}.png").write_text(f"TRAP {trapped[number]}")
        else:
            four_by_four().rotate(number).save(folder / f"{number:02}.png")
    return list_images([folder])


CRASHES = {
    1: f"signal {signal.SIGSEGV:d}",
    8: f"signal {signal.SIGABRT:d}",
    9: f"signal {signal.SIGBUS:d}",
    10: "exit 7",
    17: "raise 3",
}
CRASH_REASONS = {
    "01.png": "the decoder crashed (SIGSEGV)",
    "08.png": "the decoder crashed (SIGABRT)",
    "09.png": "the decoder crashed (SIGBUS)",
    "10.png": "the decoder crashed (exit code 7)",
    "17.png": "the decoder crashed (exit code 3)",
}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_decoder_that_crashes_costs_its_own_image_and_no_other(workers: int, tmp_path: Path) -> None:
    before = process_ids()
    (tmp_path / "calm").mkdir()
    (tmp_path / "trapped").mkdir()
    expected = decoded(folder_of(tmp_path / "calm", 20, {}), workers=0)
    outcomes = decoded(folder_of(tmp_path / "trapped", 20, CRASHES), workers=workers)
    assert reasons_of(outcomes) == CRASH_REASONS
    assert same_outcomes(outcomes, {**expected, **CRASH_REASONS})
    assert process_ids() == before


def test_a_process_that_takes_its_time_to_die_costs_the_image_that_it_died_of(tmp_path: Path) -> None:
    images = folder_of(tmp_path, 4, {2: "linger 2"})
    some = batches(images, cut(4, 1), SMALL, workers=1)
    first = next(some)
    time.sleep(1)  # The second has been handed over by now, in memory that goes with the process.
    outcomes = outcomes_of(itertools.chain([first], some))
    assert reasons_of(outcomes) == {"02.png": "the decoder crashed (exit code 3)"}
    assert sorted(outcomes) == list(images.keys)


def test_a_process_that_had_nothing_left_to_do_did_not_crash_when_another_does(tmp_path: Path) -> None:
    images = folder_of(tmp_path, 3, {0: f"later {signal.SIGSEGV:d}"})
    outcomes = decoded(images, workers=2, batch_size=2)
    assert reasons_of(outcomes) == {"00.png": "the decoder crashed (SIGSEGV)"}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("how", ["sleep 600", "compute 60"])
def test_a_decoder_that_takes_too_long_costs_its_own_image_and_no_other(how: str, workers: int, tmp_path: Path) -> None:
    before = process_ids()
    images = folder_of(tmp_path, 9, {2: how, 3: how, 7: "sleep 0.1"})
    outcomes = decoded(images, workers=workers, seconds=0.6)
    slow = "took longer than 0.6 s to decode"
    assert reasons_of(outcomes) == {"02.png": slow, "03.png": slow, "07.png": "OSError: the trap let go"}
    assert process_ids() == before


def test_no_timeout_waits_as_long_as_it_takes(tmp_path: Path) -> None:
    outcomes = decoded(folder_of(tmp_path, 3, {1: "sleep 1.2"}), workers=1, seconds=0)
    assert reasons_of(outcomes) == {"01.png": "OSError: the trap let go"}


def test_the_time_counts_for_each_image_alone_and_not_for_a_batch(tmp_path: Path) -> None:
    images = folder_of(tmp_path, 6, dict.fromkeys(range(6), "sleep 0.3"))
    outcomes = decoded(images, workers=1, batch_size=6, seconds=1)
    assert set(reasons_of(outcomes).values()) == {"OSError: the trap let go"}


def test_the_time_does_not_count_while_a_process_waits_for_its_consumer(tmp_path: Path) -> None:
    images = folder_of(tmp_path, 6, {})
    some = batches(images, cut(6, 1), SMALL, workers=1, decode_timeout_seconds=0.3)
    for position in range(6):
        assert next(some).keys == [images.keys[position]]
        time.sleep(0.5)
    some.close()


def test_a_batch_of_nothing_but_crashes_is_fine(tmp_path: Path) -> None:
    trapped = dict.fromkeys(range(4), f"signal {signal.SIGSEGV:d}")
    assert len(reasons_of(decoded(folder_of(tmp_path, 5, trapped), workers=1))) == 4


def test_a_run_with_crashes_gives_the_same_outcomes_every_time(tmp_path: Path) -> None:
    images = folder_of(tmp_path, 12, {3: CRASHES[1], 4: "sleep 600", 11: CRASHES[1]})
    runs = [decoded(images, workers=workers, batch_size=size, seconds=0.5) for workers, size in ((1, 3), (2, 5))]
    assert same_outcomes(*runs)


def test_a_process_that_is_killed_from_outside_is_not_blamed_on_its_image(tmp_path: Path) -> None:
    images = folder_of(tmp_path, 4, {2: "beside sleep 600"})
    before = process_ids()
    some = batches(images, cut(4, 1), SMALL, workers=1)
    assert [next(some).keys, next(some).keys] == [["00.png"], ["01.png"]]
    time.sleep(0.3)
    [process_id] = process_ids() - before
    os.kill(process_id, signal.SIGKILL)
    with no_longer_than(20):
        outcomes = outcomes_of(some)
    assert sorted(outcomes) == ["02.png", "03.png"]
    assert reasons_of(outcomes) == {"02.png": "OSError: the trap let go"}
    assert process_ids() == before


CRASHES_BESIDE_OTHERS = [
    *(f"signal {number:d}" for number in (signal.SIGKILL, signal.SIGABRT, signal.SIGTERM, signal.SIGSEGV)),
    "exit 0",
    "exit 3",
    f"allocate {2**60}",
]


@pytest.mark.parametrize("workers", [1, 3])
def test_an_image_that_crashes_only_beside_others_is_read_alone(workers: int, tmp_path: Path) -> None:
    before = process_ids()
    trapped = {2 * number: f"beside {how}" for number, how in enumerate(CRASHES_BESIDE_OTHERS)}
    outcomes = decoded(folder_of(tmp_path, 16, trapped), workers=workers)
    assert reasons_of(outcomes) == {f"{number:02}.png": "OSError: the trap let go" for number in trapped}
    assert process_ids() == before


def test_an_image_that_is_killed_alone_as_well_is_a_failure(tmp_path: Path) -> None:
    outcomes = decoded(folder_of(tmp_path, 4, {1: f"signal {signal.SIGKILL:d}"}), workers=2)
    assert reasons_of(outcomes) == {"01.png": "the decoder crashed (SIGKILL)"}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_machine_without_memory_for_any_image_is_an_error_and_no_failure(workers: int, tmp_path: Path) -> None:
    images = folder_of(tmp_path, 4, {1: f"allocate {2**60}"})
    some = batches(images, cut(4, 2), SMALL, workers=workers, retry_seconds=0.1)
    with no_longer_than(20), pytest.raises(ImageError, match=r"too little memory to decode '.*01.png', with nothing"):
        list(some)
    some = batches(images, cut(4, 2), SMALL, workers=workers, retry_seconds=0.1, unavailable_is_failure=True)
    assert list(reasons_of(outcomes_of(some))) == ["01.png"]


def test_a_large_image_for_which_there_is_too_little_memory_is_a_failure_and_a_small_one_is_not(tmp_path: Path) -> None:
    def take_all_memory(_: Image.Image) -> Tensor:
        raise MemoryError

    for name, side in (("large.png", 4200), ("small.png", 42)):
        Image.new("L", (side, side)).save(tmp_path / name)
    reader = Reader(list_images([tmp_path]), SMALL, take_all_memory, retry_seconds=0.1)
    assert read_alone(reader, 0, 0).reason == "4200 x 4200 pixels take more memory than there is"
    with pytest.raises(ImageError, match=r"too little memory to decode '.*small.png', with nothing else beside it"):
        read_alone(reader, 1, 0)


def test_workers_that_end_before_they_begin_are_an_error_and_not_a_hang(tmp_path: Path) -> None:
    before = process_ids()
    some = batches(folder_of(tmp_path, 4, {}), cut(4, 1), SMALL, workers=2, in_worker=lambda: os._exit(3))
    with no_longer_than(40), pytest.raises(ImageError, match="a worker exited unexpectedly: exit code 3\n  most often"):
        next(some)
    assert process_ids() == before


def test_processes_that_the_system_refuses_are_an_error_that_leaves_none(tmp_path: Path) -> None:
    images, fork = folder_of(tmp_path, 4, {}), multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)

    def decode_with_few_files() -> None:
        most_allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 12, most_allowed))
        try:
            list(batches(images, cut(4, 1), SMALL, workers=8, retry_seconds=0.2))
        except HookxError as error:
            sender.send((str(error), process_ids()))

    process = fork.Process(target=decode_with_few_files)
    process.start()
    with no_longer_than(40):
        message, left = receiver.recv()
    process.join()
    assert message.startswith("cannot start a worker: Too many open files\n") and "ulimit -n" in message and not left


# --- what the system cannot read now -------------------------------------------------------------------------------


def renamed(folder: Path) -> Path:
    return folder.rename(folder.with_name("elsewhere"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_that_goes_away_for_a_while_costs_no_image(workers: int, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    images = folder_of(folder, 12, {})
    expected = decoded(images, workers=0)
    some = batches(images, cut(12, 2), SMALL, workers=workers, retry_seconds=20)
    first = next(some)
    away = renamed(folder)
    threading.Timer(1, away.rename, [folder]).start()
    with no_longer_than(30):
        outcomes = outcomes_of(itertools.chain([first], some))
    assert same_outcomes(outcomes, expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_that_stays_away_stops_the_run_and_is_no_failure_of_its_images(workers: int, tmp_path: Path) -> None:
    folder, before = tmp_path / "images", process_ids()
    folder.mkdir()
    images = folder_of(folder, 12, {})
    some = batches(images, cut(12, 2), SMALL, workers=workers, retry_seconds=0.3)
    next(some)
    renamed(folder)
    expected = r"cannot read '.*png' after 0.3 s of trying: No such file or directory\n.*resume.*\n.*--on-io-error fail"
    with no_longer_than(30), pytest.raises(ImageError, match=expected):
        list(some)
    assert process_ids() == before


def test_what_stays_unreadable_is_a_failure_if_that_is_asked_for(tmp_path: Path) -> None:
    images = folder_of(tmp_path, 3, {})
    (tmp_path / "01.png").unlink()
    some = batches(images, cut(3, 2), SMALL, workers=1, retry_seconds=0.1, unavailable_is_failure=True)
    assert reasons_of(outcomes_of(some)) == {"01.png": "FileNotFoundError: No such file or directory"}


def test_a_lack_of_shared_memory_is_an_error_and_not_a_failure_of_an_image(tmp_path: Path) -> None:
    def little_memory() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # What is shared is a file in memory.

    def large_pixels(_: Image.Image) -> Tensor:
        return torch.zeros(3, SMALL.crop_px, SMALL.crop_px, dtype=torch.float64)

    images = folder_of(tmp_path, 8, {})
    # Usual pixels lie in memory that was allocated before, whatever /dev/shm holds.
    assert sum(len(batch.keys) for batch in batches(images, cut(8, 4), SMALL, workers=1, in_worker=little_memory)) == 8
    some = batches(images, cut(8, 4), SMALL, workers=1, in_worker=little_memory, transform=large_pixels)
    with no_longer_than(20), pytest.raises(ImageError, match=r"no shared memory for a batch: .*\n.*--shm-size"):
        list(some)


def closed(some: Generator[Batch]) -> None:
    some.close()


def given_up(some: Generator[Batch]) -> None:
    del some


@pytest.mark.parametrize("stop", [closed, given_up])
@pytest.mark.parametrize("started", [True, False])
def test_a_consumer_that_stops_early_leaves_no_process_behind(
    stop: Callable[[Generator[Batch]], None], started: bool, tmp_path: Path
) -> None:
    images = folder_of(tmp_path, 12, {3: CRASHES[1], 8: "sleep 600"})
    before = process_ids()
    with no_longer_than(30):  # What hangs is not waited for.
        some = batches(images, cut(12, 2), SMALL, workers=2)
        assert len(process_ids() - before) == 2
        if started:
            assert [next(some).positions for _ in range(3)] == cut(6, 2)
        stop(some)
        del some
        gc.collect()
    assert process_ids() == before


def test_a_consumer_that_raises_leaves_no_process_behind(tmp_path: Path) -> None:
    images = folder_of(tmp_path, 12, {3: CRASHES[1]})
    before = process_ids()
    with no_longer_than(20), pytest.raises(ZeroDivisionError):
        for batch in batches(images, cut(12, 2), SMALL, workers=2):
            _ = 1 // (len(batch.positions) - 2)
    gc.collect()
    assert process_ids() == before


@pytest.mark.parametrize("whose", ["its own", "the caller's"])
def test_a_ctrl_c_while_processes_start_leaves_none_behind_and_no_traceback(
    whose: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    parent = os.getpid()

    class AfterFork:
        """As a terminal does, in the moment in which a process has been forked and has not begun."""

        def interrupt(self) -> None:
            os.kill(os.getpid() if whose == "its own" else parent, signal.SIGINT)
            time.sleep(0.2)

    images, before, after_fork = folder_of(tmp_path, 4, {}), process_ids(), AfterFork()
    multiprocessing.util.register_after_fork(after_fork, AfterFork.interrupt)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if whose == "its own":
            assert len(decoded(images, workers=2)) == 4
        else:
            with pytest.raises(KeyboardInterrupt):
                batches(images, cut(4, 1), SMALL, workers=2)
    finally:
        signal.signal(signal.SIGINT, handler)
        del after_fork
    gc.collect()
    assert process_ids() == before and capfd.readouterr().err == ""


def test_an_exception_while_waiting_ends_the_processes_even_if_it_is_kept(tmp_path: Path) -> None:
    images = folder_of(tmp_path, 4, {1: "sleep 600"})
    before = process_ids()
    with pytest.raises(TimeoutError) as kept, no_longer_than(1):  # As Ctrl-C would.
        list(batches(images, cut(4, 1), SMALL, workers=2, decode_timeout_seconds=0))
    assert process_ids() == before and kept.tb


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_that_hangs_does_not_outlive_a_parent_that_was_killed(tmp_path: Path) -> None:
    images = folder_of(tmp_path, 2, {0: "sleep 600"})
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def decode_and_hang() -> None:
        some = batches(images, cut(2, 1), SMALL, workers=1, decode_timeout_seconds=1)
        sender.send(list(process_ids()))
        next(some)

    parent = multiprocessing.get_context("fork").Process(target=decode_and_hang)
    parent.start()
    [hanging] = receiver.recv()
    parent.kill()
    parent.join()
    with no_longer_than(60):
        while is_running(hanging):
            time.sleep(0.1)


def test_a_process_whose_parent_was_killed_before_it_began_ends_at_once() -> None:
    fork = multiprocessing.get_context("fork")
    worker = Worker(Reader(list_images([CHELSEA]), SMALL), [], None, {}, InHand(1, 60.0), lambda: None)

    def begin_as_the_child_of_another() -> None:
        process = fork.Process(target=worker.start, args=(0,))
        process.start()
        process.join()
        sys.exit(10 + (process.exitcode or 0))

    other = fork.Process(target=begin_as_the_child_of_another)
    other.start()
    other.join()
    assert other.exitcode == 11


def is_running(process_id: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{process_id}/stat").read_text()
    except OSError:
        return False


def test_the_command_counts_a_hang_and_a_crash_as_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pictures").mkdir()
    folder_of(tmp_path / "pictures", 6, {1: "sleep 600", 4: CRASHES[1]})
    monkeypatch.setenv("HOOKX_DECODE_TIMEOUT", "0.5")
    arguments = ["extract", "-m", "resnet18", "-w", "none", "-l", "avgpool", "--resize", "32", "--crop", "32"]
    arguments += ["-j", "1", "-b", "2", "-d", "cpu", "-o", str(tmp_path / "out"), str(tmp_path / "pictures")]
    with no_longer_than(60):
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 3, result.output
    with open(tmp_path / "out" / "failures.csv", newline="") as file:
        failures = list(csv.reader(file))
    assert [row[:2] for row in failures[1:]] == [
        ["01.png", "took longer than 0.5 s to decode"],
        ["04.png", "the decoder crashed (SIGSEGV)"],
    ]
    with open(tmp_path / "out" / "index.csv", newline="") as file:
        assert [row[0] for row in csv.reader(file)][1:] == ["00.png", "02.png", "03.png", "05.png"]


def test_a_crash_in_the_middle_of_a_run_moves_no_row_whoever_had_written_behind_it(tmp_path: Path) -> None:
    # In the second folder the same images cannot be read, but crash nobody.
    outputs = []
    for what, workers in ((f"signal {signal.SIGSEGV:d}", 3), ("nothing 0", 0)):
        pictures = tmp_path / what.split()[0]
        pictures.mkdir()
        folder_of(pictures, 40, dict.fromkeys((2, 9, 26, 39), what))
        # Large enough to go past the page cache, and shards that end within a batch.
        options: dict[str, Any] = {"weights": "none", "device": "cpu", "batch_size": 8, "shard_images": 22}
        options |= {"resize": 64, "crop": 64}
        extract("resnet18", "conv1,fc", pictures, out=tmp_path / f"out{workers}", workers=workers, **options)
        outputs.append(hookx.open(tmp_path / f"out{workers}"))
    crashed, read = outputs
    assert list(crashed.keys) == list(read.keys) and len(read.keys) == 36
    for address in ("conv1", "fc"):
        assert torch.equal(crashed[address][:], read[address][:])
    assert not verify(tmp_path / "out3").problems


# --- any bytes -----------------------------------------------------------------------------------------------------


def encoded(suffix: str) -> bytes:
    buffer = io.BytesIO()
    with Image.open(CHELSEA) as image:
        image.resize((24, 24)).save(buffer, {"jpg": "JPEG"}.get(suffix, suffix.upper()))
    return buffer.getvalue()


WHOLE = {suffix: encoded(suffix) for suffix in ("jpg", "png", "webp")}


@st.composite
def damaged_files(draw: st.DrawFn, suffix: str) -> bytes:
    """Change, cut out, or repeat a few stretches of a whole file; or give any bytes at all."""
    content = bytearray(WHOLE[suffix])
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(content)))
        stop = min(len(content), start + draw(st.integers(0, 20)))
        content[start:stop] = draw(st.one_of(st.binary(max_size=20), st.just(bytes(content[start:stop] * 2))))
    return bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", WHOLE)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.data())
def test_any_bytes_are_one_row_or_one_failure_the_same_every_time(suffix: str, data: st.DataObject) -> None:
    files = data.draw(st.lists(damaged_files(suffix), min_size=1, max_size=30))
    with TemporaryDirectory() as folder:
        for number, content in enumerate(files):
            (Path(folder) / f"{number:02}.{suffix}").write_bytes(content)
        images = list_images([folder])
        assert same_outcomes(decoded(images, workers=2), decoded(images, workers=0))


class OfADevice:
    """Garbage that aborts any process that frees it but the one that made it, as a tensor of a GPU does."""

    def __init__(self, has_been_freed: Path) -> None:
        self.process, self.itself, self.has_been_freed = os.getpid(), self, has_been_freed

    def __del__(self) -> None:
        if os.getpid() != self.process:
            os.abort()
        self.has_been_freed.touch()


@pytest.mark.parametrize("is_referred_to", [False, True])
def test_no_image_is_blamed_for_what_a_worker_inherits(tmp_path: Path, is_referred_to: bool) -> None:
    (tmp_path / "images").mkdir()
    images = folder_of(tmp_path / "images", 6, {})
    of_a_device = OfADevice(tmp_path / "freed")
    holder = [of_a_device] if is_referred_to else []
    del of_a_device

    def collect() -> None:
        holder.clear()
        gc.collect()

    decoded = list(batches(images, cut(6, 2), SMALL, workers=2, in_worker=collect))
    assert [len(batch.keys) for batch in decoded] == [2, 2, 2] and not any(batch.failures for batch in decoded)
    holder.clear()
    gc.collect()
    assert (tmp_path / "freed").exists(), "the process that made it collects it as ever"
