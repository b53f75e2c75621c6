"""Values of more than 8 bits become 8 by one rule for each kind, and what loses levels by it is counted."""

from __future__ import annotations

import dataclasses
import itertools
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

import hookx
from hookx.check.inspect import inspect
from hookx.errors import OtherRunError, UsageError
from hookx.images.decoding import Noticed, decode
from hookx.images.listing import list_images
from hookx.plan import IMAGENET, LayerSpec, Plan, Preprocessing, RangeCounts, RangeUse
from hookx.run.alone import read_alone
from hookx.run.lane import Batch
from hookx.run.reader import Reader
from hookx.run.workers import batches

SIDE_PX = 64
PLAIN = Preprocessing(SIDE_PX, SIDE_PX, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "nearest")
RAMP = np.linspace(0, 1, SIDE_PX**2).reshape(SIDE_PX, SIDE_PX)
random = np.random.default_rng(5)
COLOUR = random.integers(0, 65536, (SIDE_PX, SIDE_PX, 4), np.uint16)
Array = np.ndarray[Any, Any]


def rgb_of(file: Path, grey_range: str = "full") -> tuple[Array, Noticed]:
    """Return an image's pixels, (height, width, channel), and what was noticed."""
    pixels_CHW, noticed = decode(str(file), dataclasses.replace(PLAIN, grey_range=grey_range))
    return pixels_CHW.permute(1, 2, 0).numpy(), noticed


def grey_of(values: Array, folder: Path, grey_range: str = "full") -> tuple[list[int], RangeUse | None]:
    """Return the distinct grey levels that values become."""
    Image.fromarray(values).save(folder / "x.tif")
    rgb, noticed = rgb_of(folder / "x.tif", grey_range)
    assert (rgb == rgb[..., :1]).all()
    return np.unique(rgb).tolist(), noticed.range_use


def png_of(values: Array, colour_type: int) -> bytes:
    """Write a PNG with 16 bits per channel: 2 for RGB, 4 for grey with alpha, 6 for RGB with alpha."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = values.shape[:2]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def divided(values: Array) -> Array:
    return np.rint(values / 257).astype(np.uint8)


# --- one rule for each kind ----------------------------------------------------------------------------------------


def test_twelve_bits_in_files_of_sixteen_are_noticed_and_keep_all_levels_with_a_range(tmp_path: Path) -> None:
    values = (RAMP * 4095).astype(np.uint16)
    levels, use = grey_of(values, tmp_path)
    assert len(levels) == 17 and use == RangeUse("narrow", 0, 4095, 0, 65535)
    for grey_range in ("0,4095", "minmax"):
        assert grey_of(values, tmp_path, grey_range) == (list(range(256)), None)


def test_sixteen_bits_that_use_their_range_are_divided_by_257_and_not_noticed(tmp_path: Path) -> None:
    values = (RAMP * 65535).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    rgb, noticed = rgb_of(tmp_path / "x.png")
    assert (rgb == divided(values)[..., None]).all() and noticed == Noticed()
    assert grey_of((RAMP * 16384).astype(np.uint16), tmp_path)[1] is None
    assert grey_of((RAMP * 16383).astype(np.uint16), tmp_path)[1] is not None


def test_a_file_of_twelve_bits_can_hold_no_more_than_4095(tmp_path: Path) -> None:
    values = (RAMP * 4095).astype(np.uint16)
    pairs = values.reshape(-1, 2).astype(np.uint32)
    packed = pairs[:, 0] << 12 | pairs[:, 1]
    strip = b"".join(struct.pack(">I", number)[1:] for number in packed.tolist())
    tags = [(256, SIDE_PX), (257, SIDE_PX), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, SIDE_PX)]
    tags.append((279, len(strip)))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    (tmp_path / "x.tif").write_bytes(b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + directory)
    rgb, noticed = rgb_of(tmp_path / "x.tif")
    assert (rgb[..., 0] == np.rint(values * (255 / 4095))).all() and noticed == Noticed()


def test_a_float_beyond_one_costs_no_more_levels_than_it_is_beyond(tmp_path: Path) -> None:
    bright = RAMP.astype(np.float32)
    assert grey_of(bright, tmp_path) == (list(range(256)), None)
    bright[0, 0] = 1.5
    levels, use = grey_of(bright, tmp_path)
    assert len(levels) > 170 and use is not None and use[0] == "beyond" and use[2:] == (1.5, 0, 1)
    assert grey_of(bright, tmp_path, "0,1") == (list(range(256)), None)
    assert grey_of(bright, tmp_path, "minmax")[1] is None


def test_two_numbers_clip_what_lies_outside(tmp_path: Path) -> None:
    values = np.resize(np.array([-2000, -1000, 500, 1400, 2000, 9999], np.int32), (SIDE_PX, SIDE_PX))
    Image.fromarray(values).save(tmp_path / "x.tif")
    rgb, noticed = rgb_of(tmp_path / "x.tif", "-1000,2000")
    assert rgb[0, :6, 0].tolist() == [0, 0, 128, 204, 255, 255] and noticed == Noticed()
    assert grey_of(values, tmp_path, "10000,60000") == ([0], RangeUse("narrow", -2000, 9999, 10000, 60000))


def test_unsigned_integers_of_32_bits_are_not_taken_for_negative_ones(tmp_path: Path) -> None:
    values = (RAMP * (2**32 - 1)).astype(np.uint32)
    tifffile.imwrite(tmp_path / "x.tif", values, photometric="minisblack")
    rgb, noticed = rgb_of(tmp_path / "x.tif")
    assert (rgb[..., 0] == np.rint(values * (255 / (2**32 - 1)))).all()
    assert noticed.range_use == RangeUse("beyond", 0, 2**32 - 1, 0, 65535)


@pytest.mark.parametrize(
    ("compression", "planar", "order", "channels", "tile"),
    [
        *itertools.product([None], ["contig", "separate"], "<>", [3, 4], [None, (16, 16)]),
        *itertools.product(["zlib"], ["contig"], "<>", [3, 4], [None, (16, 16)]),
    ],
)
def test_colour_of_sixteen_bits_in_a_tiff_is_divided_as_grey_is(
    compression: str | None, planar: str, order: str, channels: int, tile: tuple[int, int] | None, tmp_path: Path
) -> None:
    values = COLOUR[..., :channels]
    tifffile.imwrite(
        tmp_path / "x.tif",
        values if planar == "contig" else np.moveaxis(values, -1, 0),
        photometric="rgb",
        planarconfig=planar,
        compression=compression,
        byteorder=order,
        extrasamples=[2] if channels == 4 else None,
        tile=tile,
    )
    rgb, noticed = rgb_of(tmp_path / "x.tif")
    assert (rgb == divided(values[..., :3])).all() and noticed == Noticed()


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_colour_and_grey_with_alpha_of_sixteen_bits_in_a_png_are_divided_as_grey_is(
    colour_type: int, channels: int, tmp_path: Path
) -> None:
    values = COLOUR[..., :channels]
    (tmp_path / "x.png").write_bytes(png_of(values, colour_type))
    rgb, noticed = rgb_of(tmp_path / "x.png")
    assert (rgb == divided(values[..., : 1 if channels == 2 else 3])).all() and noticed == Noticed()
    few = values >> 4
    (tmp_path / "x.png").write_bytes(png_of(few, colour_type))
    shown = few[..., : 1 if channels == 2 else 3]
    assert rgb_of(tmp_path / "x.png")[1].range_use == RangeUse("narrow", shown.min(), shown.max(), 0, 65535)
    rgb, noticed = rgb_of(tmp_path / "x.png", "0,4095")
    assert (rgb == np.rint(shown * (255 / 4095))).all() and noticed == Noticed()


def test_ink_of_sixteen_bits_is_divided_by_257_whatever_the_range_of_grey(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "x.tif", COLOUR >> 4, photometric="separated")
    expected = np.asarray(Image.fromarray(divided(COLOUR >> 4), "CMYK").convert("RGB"))
    for grey_range in ("full", "0,4095"):
        rgb, noticed = rgb_of(tmp_path / "x.tif", grey_range)
        assert (rgb == expected).all() and noticed == Noticed()


def test_eight_bits_do_not_depend_on_the_range_of_grey(tmp_path: Path) -> None:
    for mode in ("L", "LA", "RGB", "RGBA", "P"):
        Image.fromarray(COLOUR.astype(np.uint8), "RGBA").convert("RGB").convert(mode).save(tmp_path / "x.png")
        one, other = rgb_of(tmp_path / "x.png"), rgb_of(tmp_path / "x.png", "0,4095")
        assert (one[0] == other[0]).all() and one[1] == other[1] == Noticed()


# --- what is said --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grey_range", ["4095", "5,5", "9,0", "0,1,2", "a,b", "0,inf", "", "half"])
def test_a_range_that_is_none_is_an_error(grey_range: str) -> None:
    with pytest.raises(UsageError, match=r"invalid --grey-range '.*': give full, minmax, or two numbers"):
        hookx.extract("resnet18", "avgpool", "images", grey_range=grey_range)


def test_a_plan_from_before_has_the_fingerprint_that_it_had() -> None:
    layers = (LayerSpec("avgpool", (512, 1, 1), "float32"),)
    plan = Plan("resnet18", "random (seed 0)", layers, IMAGENET, "fp32", "contiguous", 8, "0" * 64, 160, 32)
    assert "grey_range" not in plan.identity["preprocessing"]
    assert plan.fingerprint == "144a59ab553ad14b3f87da96be8e112968c1c90a7bbc1e1e0ae36bf6617ca925"
    other = dataclasses.replace(plan, preprocessing=dataclasses.replace(IMAGENET, grey_range="0,4095"))
    assert Plan.from_json(other.to_json()) == other and Plan.from_json(plan.to_json()) == plan
    assert "--grey-range 0,4095" in other.command("out") and "grey range 0,4095" in str(other.preprocessing)


def deep_images(folder: Path, count: int) -> Path:
    """Write images of 12 bits, the brighter the later, and one of 16."""
    folder.mkdir()
    for number in range(count):
        values = (RAMP * (4095 - count + number)).astype(np.uint16)
        Image.fromarray(values).save(folder / f"{number:03}.png")
    Image.fromarray((RAMP * 65535).astype(np.uint16)).save(folder / "bright.png")
    Image.fromarray((RAMP * 1.5).astype(np.float32)).save(folder / "float.tif")
    return folder


SENTENCES = [
    "12 images use less than a quarter of their range (the first: 000.png, 0 to 4,083 of 65,535): --grey-range 0,4095 "
    "or minmax",
    "1 image holds values outside 0 to 1, so its least is black and its greatest white (float.tif, 0 to 1.5): "
    "--grey-range BLACK,WHITE sets one range for all",
]


@pytest.mark.parametrize("options", [{}, {"workers": 0}, {"batch_size": 3, "workers": 2}, {"devices": "cpu*2"}])
def test_a_run_says_which_images_use_little_of_their_range_and_so_does_one_that_resumes(
    options: dict[str, Any], tmp_path: Path
) -> None:
    images = deep_images(tmp_path / "scan", 12)
    asked: dict[str, Any] = {"weights": "none", "out": tmp_path / "run", "shard_images": 5, **options}
    summary = hookx.extract("resnet18", "avgpool", images, **asked)
    assert summary.ranges.sentences() == SENTENCES and json.loads(json.dumps(summary.ranges)) == summary.ranges
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").glob("shard-*")}
    (tmp_path / "run" / sorted(before)[1]).unlink()
    assert hookx.extract("resnet18", "avgpool", images, **asked).ranges.sentences() == SENTENCES
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").glob("shard-*")} == before
    assert inspect(tmp_path / "run").ranges.sentences() == SENTENCES
    with pytest.raises(OtherRunError, match="preprocessing differ"):
        hookx.extract("resnet18", "avgpool", images, **asked, grey_range="0,4095")


def test_an_image_that_is_read_alone_is_counted_like_any_other(tmp_path: Path) -> None:
    images = list_images([deep_images(tmp_path / "scan", 3)])
    positions = [range(0, 3), range(3, 5)]

    def counted(workers: int) -> list[RangeCounts]:
        some: list[Batch] = list(batches(images, positions, PLAIN, workers=workers))
        return [batch.ranges for batch in some]

    expected = counted(0)
    assert [counts.get("narrow", {}).get("images", 0) for counts in expected] == [3, 0]
    assert expected[0]["narrow"]["first"] == "000.png" and counted(2) == expected
    alone = read_alone(Reader(images, PLAIN), 0, 60)
    assert alone.range_use == RangeUse("narrow", 0, 4092, 0, 65535) and type(alone.range_use) is RangeUse


def test_counts_are_added_in_order_and_later_kinds_are_passed_over() -> None:
    counts, later = RangeCounts(), RangeCounts()
    counts.add_image("b", RangeUse("narrow", 5, 100, 0, 65535))
    later.add_image("c", RangeUse("narrow", 1, 200, 0, 65535))
    counts.add(later)
    counts.add({"new": {"images": 1}})
    assert counts["narrow"] == {
        **{"images": 2, "first": "b", "low": 5, "high": 100, "black": 0, "white": 65535},
        **{"least": 1, "greatest": 200},
    }
    assert len(counts.sentences()) == 1
