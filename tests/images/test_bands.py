"""Bands that are neither colour nor alpha are not dropped silently: the image is a failure that says so."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from hookx.images.decoding import decode
from hookx.images.unreadable import UnreadableError
from kit.pictures import SMALL

SIDE_PX = 32
BANDS = np.random.default_rng(3).integers(0, 200, (SIDE_PX, SIDE_PX, 13))
BY_LOADER = "read them with a function of your own, --loader"


def save(file: Path, bands: int, dtype: str, planar: str, photometric: str, extra: list[int] | None) -> Path:
    values = BANDS[..., :bands].astype(dtype)
    arranged = values if planar == "contig" else np.moveaxis(values, -1, 0)
    tifffile.imwrite(file, arranged, photometric=photometric, planarconfig=planar, extrasamples=extra)
    return file


@pytest.mark.parametrize(
    ("bands", "dtype", "planar", "photometric"),
    [
        *itertools.product([4, 5, 7, 13], ["uint8", "uint16", "float32"], ["contig", "separate"], ["rgb"]),
        *itertools.product([2, 4, 13], ["uint8", "uint16"], ["contig", "separate"], ["minisblack"]),
        *itertools.product([5, 6], ["uint8"], ["contig"], ["separated"]),
    ],
)
def test_bands_beyond_the_colours_are_a_failure_that_names_their_number(
    bands: int, dtype: str, planar: str, photometric: str, tmp_path: Path
) -> None:
    colours = {"rgb": 3, "minisblack": 1, "separated": 4}[photometric]
    file = save(tmp_path / "x.tif", bands, dtype, planar, photometric, [0] * (bands - colours))
    with pytest.raises(UnreadableError) as caught:
        decode(str(file), SMALL)
    extra, what = bands - colours, {"rgb": "RGB", "minisblack": "grey", "separated": "CMYK"}[photometric]
    is_or_are = "are" if extra > 1 else "is"
    assert str(caught.value) == f"{bands} bands, and {extra} of them {is_or_are} neither {what} nor alpha: {BY_LOADER}"


@pytest.mark.parametrize("bigtiff", [False, True])
def test_the_bands_of_a_file_that_pillow_does_not_know_are_counted_in_any_tiff(bigtiff: bool, tmp_path: Path) -> None:
    for order in ("<",) if bigtiff else ("<", ">"):  # Pillow reads no BigTIFF whose bytes are in the other order.
        with tifffile.TiffWriter(tmp_path / "x.tif", bigtiff=bigtiff, byteorder=order) as writer:
            writer.write(BANDS.astype("uint16"), photometric="minisblack", planarconfig="contig")
        with pytest.raises(UnreadableError, match="13 bands, and 12 of them are neither grey nor alpha"):
            decode(str(tmp_path / "x.tif"), SMALL)


def test_a_fourth_band_is_no_alpha_unless_the_file_says_so(tmp_path: Path) -> None:
    file = save(tmp_path / "x.tif", 4, "uint8", "contig", "rgb", [2])
    with_alpha = file.read_bytes()
    entry = with_alpha.index(b"\x52\x01\x03\x00\x01\x00\x00\x00\x02")  # ExtraSamples: one, of kind 2
    expected, _ = decode(str(save(tmp_path / "rgb.tif", 3, "uint8", "contig", "rgb", None)), SMALL)
    assert (decode(str(file), SMALL)[0] == expected).all()
    for kind, tag in ((0, 0x152), (2, 0x9999)):  # unspecified; and no such tag at all
        content = bytearray(with_alpha)
        content[entry : entry + 2], content[entry + 8] = tag.to_bytes(2, "little"), kind
        file.write_bytes(content)
        with pytest.raises(UnreadableError, match="4 bands, and 1 of them is neither RGB nor alpha"):
            decode(str(file), SMALL)


def test_alpha_and_ink_are_no_bands_of_their_own(tmp_path: Path) -> None:
    rgba = Image.fromarray(BANDS[..., :4].astype(np.uint8), "RGBA")
    for mode, name in itertools.product(("RGBA", "LA", "CMYK", "RGB", "L", "P", "1"), ("x.tif", "x.png")):
        if mode != "CMYK" or name == "x.tif":
            rgba.convert("RGB").convert(mode).save(tmp_path / name)
            assert decode(str(tmp_path / name), SMALL)[0].shape == (3, 24, 24)


def test_a_fourth_band_of_jpeg_2000_is_no_alpha_unless_the_file_says_so(tmp_path: Path) -> None:
    rgba = Image.fromarray(BANDS[..., :4].astype(np.uint8), "RGBA")
    for mode in ("L", "LA", "RGB", "RGBA"):
        rgba.convert(mode).save(tmp_path / "x.jp2")
        assert decode(str(tmp_path / "x.jp2"), SMALL)[0].shape == (3, 24, 24)
    content = (tmp_path / "x.jp2").read_bytes()
    assert b"cdef" in content
    (tmp_path / "x.jp2").write_bytes(content.replace(b"cdef", b"free"))
    rgba.save(tmp_path / "x.j2k", no_jp2=True)
    rgba.convert("RGB").save(tmp_path / "rgb.j2k", no_jp2=True)
    for name in ("x.jp2", "x.j2k"):
        with pytest.raises(UnreadableError, match="4 bands, and 1 of them is neither RGB nor alpha"):
            decode(str(tmp_path / name), SMALL)
    assert decode(str(tmp_path / "rgb.j2k"), SMALL)[0].shape == (3, 24, 24)
