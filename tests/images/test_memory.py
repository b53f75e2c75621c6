"""An image takes at most three times its RGB bytes, the strips of which change no bit, and never more than there is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from hookx.images.memory import allowed_bytes
from hookx.images.rgb import to_rgb
from kit.processes import environment_for

SIDE_PX = 700  # two strips

CODE = """
import resource, sys
from hookx.images.decoding import decode
from kit.pictures import SMALL

used_bytes = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
if sys.argv[2] != "0":
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + int(sys.argv[2]), resource.RLIM_INFINITY))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decode(sys.argv[1], SMALL)
except Exception as error:
    print(error, end="")
print(f"\\n{(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024}")
"""


def decode_in_a_process(file: Path, limit_bytes: int = 0) -> tuple[str, int]:
    """Give the reason why a file cannot be decoded, and how many bytes that or decoding took at most."""
    command = [sys.executable, "-c", CODE, str(file), str(limit_bytes)]
    environment = environment_for(__file__)
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100, env=environment)
    reason, taken_bytes = done.stdout.rsplit("\n", 2)[:2]
    return reason, int(taken_bytes)


def as_a_whole(image: Image.Image) -> Image.Image:
    """Convert without strips, for comparison."""
    if not (image.mode in ("I", "F") or image.mode.startswith("I;16")):
        return (image.convert("LA") if image.mode == "La" else image).convert("RGB")
    values = np.asarray(image).astype(np.float64)
    low, high = values.min(), values.max()
    for white in (1, 255) if image.mode == "F" else (65535,):
        if low >= 0 and high <= white:
            low, high = 0, white
            break
    scaled = np.rint((values - low) * (255 / (high - low or 1))).astype(np.uint8)
    return Image.fromarray(np.stack([scaled] * 3, axis=-1))


random = np.random.default_rng(7)
NOISE = Image.fromarray(random.integers(0, 256, (SIDE_PX, SIDE_PX, 4), np.uint8), "RGBA")
DEEP = random.integers(0, 65536, (SIDE_PX, SIDE_PX)).astype(np.uint16)
OF_EACH_MODE = {
    **{mode: NOISE.convert("RGB").convert(mode) for mode in ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")},
    "LAB": Image.merge("LAB", NOISE.split()[:3]),
    "RGBA": NOISE,
    "RGBa": NOISE.convert("RGBa"),
    "LA": NOISE.convert("LA"),
    "La": NOISE.convert("LA").convert("La"),
    "PA": NOISE.convert("PA"),
    "I;16": Image.fromarray(DEEP),
    "I;16B": Image.frombytes("I;16B", (SIDE_PX, SIDE_PX), DEEP.astype(">u2").tobytes()),
    "I": Image.fromarray(DEEP.astype(np.int32) * 9 - 70_000),
    "I of 16 bits": Image.fromarray(DEEP.astype(np.int32)),
    "F": Image.fromarray((DEEP / 65535).astype(np.float32)),
    "F to 255": Image.fromarray((DEEP / 257).astype(np.float32)),
    "F beyond": Image.fromarray((DEEP / 3 - 1000).astype(np.float32)),
    "F uniform": Image.fromarray(np.full((SIDE_PX, SIDE_PX), -3, np.float32)),
}


@pytest.mark.parametrize("mode", OF_EACH_MODE)
def test_strips_change_no_bit(mode: str) -> None:
    image = OF_EACH_MODE[mode]
    assert np.array_equal(np.asarray(to_rgb(image)[0]), np.asarray(as_a_whole(image)))


def test_values_that_are_not_finite_are_found_in_any_strip() -> None:
    values = np.zeros((SIDE_PX, SIDE_PX), np.float32)
    values[-1, -1] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        to_rgb(Image.fromarray(values))


LARGE_PX = 4000
KINDS = {
    "deep.png": lambda: Image.fromarray(np.full((LARGE_PX, LARGE_PX), 300, np.uint16)),
    "deep.tif": lambda: Image.fromarray(np.full((LARGE_PX, LARGE_PX), 300, np.uint16)),
    "integers.tif": lambda: Image.fromarray(np.full((LARGE_PX, LARGE_PX), 70_000, np.int32)),
    "float.tif": lambda: Image.fromarray(np.full((LARGE_PX, LARGE_PX), 0.5, np.float32)),
    "alpha.png": lambda: Image.new("RGBA", (LARGE_PX, LARGE_PX), (9, 8, 7, 6)),
    "print.jpg": lambda: Image.new("CMYK", (LARGE_PX, LARGE_PX), (9, 8, 7, 6)),
}


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units")
@pytest.mark.parametrize("name", KINDS)
def test_a_large_image_takes_at_most_three_times_its_rgb_bytes(name: str, tmp_path: Path) -> None:
    KINDS[name]().save(tmp_path / name)
    reason, taken_bytes = decode_in_a_process(tmp_path / name)
    assert reason == "" and taken_bytes <= 3 * 3 * LARGE_PX**2


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units")
@pytest.mark.parametrize(("channels", "planar"), [(3, "contig"), (3, "separate"), (4, "contig")])
def test_a_large_image_with_16_bits_per_channel_takes_no_more(channels: int, planar: str, tmp_path: Path) -> None:
    shape = (LARGE_PX, LARGE_PX, channels) if planar == "contig" else (channels, LARGE_PX, LARGE_PX)
    values = np.full(shape, 300, np.uint16)
    tifffile.imwrite(
        tmp_path / "x.tif",
        values,
        photometric="rgb",
        planarconfig=planar,
        extrasamples=[2] * (channels - 3),
        rowsperstrip=64,
    )
    reason, taken_bytes = decode_in_a_process(tmp_path / "x.tif")
    assert reason == "" and taken_bytes <= 3 * 3 * LARGE_PX**2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_image_that_would_not_fit_is_a_failure_before_it_is_decoded(tmp_path: Path) -> None:
    Image.new("L", (13_000, 13_000)).save(tmp_path / "large.png", compress_level=1)
    reason, taken_bytes = decode_in_a_process(tmp_path / "large.png", limit_bytes=2**30)
    assert reason == "13000 x 13000 pixels take about 2.0 GB to decode, which is more than there is"
    assert taken_bytes < 50 * 2**20
    assert decode_in_a_process(tmp_path / "large.png")[0] == ""


def test_there_is_no_more_memory_than_the_machine_has() -> None:
    assert 2**28 < allowed_bytes() <= 2**50
