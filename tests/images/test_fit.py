"""How images of other proportions become a model's input: cropped, squashed or padded, square or not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize
from torchvision.transforms.functional import pil_to_tensor

from hookx.images import decoding
from hookx.images.decoding import decode, decode_jpegs, failure_reason
from hookx.images.fit import fit_picture, resized_px
from hookx.images.unreadable import UnreadableError
from hookx.plan import IMAGENET, Preprocessing

timm_transforms = pytest.importorskip("timm.data.transforms", reason="the extra timm is not installed")

SIZES = [(64, 64), (96, 48), (50, 110)]
SIDES = st.integers(1, 200)


def noise(height: int, width: int) -> Image.Image:
    generator = np.random.default_rng(0)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8))


def fitted(size_px: tuple[int, int], fit: str, interpolation: str = "bicubic") -> Preprocessing:
    return replace(IMAGENET.sized(size_px, size_px), fit=fit, interpolation=interpolation)


def pixels_of(file: Path, preprocessing: Preprocessing) -> Tensor:
    return decode(str(file), preprocessing)[0]


@pytest.fixture
def pictures(photos: Path, tmp_path: Path) -> list[Path]:
    """Return a wide photograph, a tall one and a square one."""
    files = []
    with Image.open(photos / "animals" / "chelsea.jpg") as image:
        for name, size in (("wide", (300, 120)), ("tall", (90, 260)), ("square", (150, 150))):
            files.append(tmp_path / f"{name}.png")
            image.convert("RGB").resize(size).save(files[-1])
    return files


# --- squash --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size_px", SIZES)
def test_squash_is_torchvisions_resize_to_the_size_bit_for_bit(
    size_px: tuple[int, int], interpolation: str, pictures: list[Path]
) -> None:
    resize = Compose([Resize(size_px, InterpolationMode(interpolation)), PILToTensor()])
    for file in pictures:
        with Image.open(file) as image:
            preprocessing = fitted(size_px, "squash", interpolation).sized(size_px, (120, 120))
            assert torch.equal(pixels_of(file, preprocessing), resize(image))


# --- pad -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, SIDES, SIDES)
def test_the_inside_of_a_padded_image_is_the_plain_resize_and_its_borders_are_the_mean(
    height: int, width: int, to_height: int, to_width: int
) -> None:
    image, preprocessing = noise(height, width), fitted((to_height, to_width), "pad")
    padded = pil_to_tensor(fit_picture(image, preprocessing))
    assert padded.shape == (3, to_height, to_width)
    inner_height, inner_width = resized_px(height, width, preprocessing)
    # The whole image is there: it touches two borders, and keeps its proportions up to a pixel.
    assert inner_height == to_height or inner_width == to_width
    scale = min(to_height / height, to_width / width)
    assert abs(inner_height - max(1, height * scale)) <= 0.5 and abs(inner_width - max(1, width * scale)) <= 0.5
    top, left = (to_height - inner_height) // 2, (to_width - inner_width) // 2
    inside = (slice(None), slice(top, top + inner_height), slice(left, left + inner_width))
    plain = Resize((inner_height, inner_width), InterpolationMode.BICUBIC)(image)
    assert torch.equal(padded[inside], pil_to_tensor(plain))
    borders = torch.ones_like(padded, dtype=torch.bool)
    borders[inside] = False
    colour = torch.tensor([round(255 * mean) for mean in IMAGENET.mean], dtype=torch.uint8).reshape(3, 1, 1)
    assert torch.equal(padded[borders], colour.expand_as(padded)[borders])


@pytest.mark.parametrize("size_px", SIZES)
def test_pad_is_timms_border_without_a_crop(size_px: tuple[int, int], pictures: list[Path]) -> None:
    fill = [round(255 * mean) for mean in IMAGENET.mean]
    resize = timm_transforms.ResizeKeepRatio(size_px, interpolation="bicubic", longest=1.0)
    border = Compose([resize, timm_transforms.CenterCropOrPad(size_px, fill=fill), PILToTensor()])
    for file in pictures:
        with Image.open(file) as image:
            assert torch.equal(pixels_of(file, fitted(size_px, "pad")), border(image))


def test_a_band_is_padded_with_its_own_mean(tmp_path: Path) -> None:
    preprocessing = replace(fitted((8, 16), "pad"), mean=(0.1, 0.9), std=(1.0, 1.0), loader="bands")
    np.save(tmp_path / "bands.npy", np.full((2, 8, 8), 0.5, np.float32))
    pixels_CHW, _ = decode(str(tmp_path / "bands.npy"), preprocessing, loader=np.load)
    assert pixels_CHW.shape == (2, 8, 16)
    assert torch.equal(pixels_CHW[:, :, :4], torch.zeros(2, 8, 4))  # The mean, minus the mean.
    assert torch.allclose(pixels_CHW[:, 4, 8], torch.tensor([0.4, -0.4]))


# --- crop ----------------------------------------------------------------------------------------------------------


def test_a_square_crop_is_torchvisions_as_ever(pictures: list[Path]) -> None:
    published = Compose([Resize(72, InterpolationMode.BICUBIC), CenterCrop(64), PILToTensor()])
    for file in pictures:
        with Image.open(file) as image:
            expected = published(image)
        assert torch.equal(
            pixels_of(file, replace(IMAGENET, interpolation="bicubic").sized((64, 64), (72, 72))), expected
        )


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, SIDES, SIDES)
def test_a_crop_that_is_not_square_is_timms(height: int, width: int, to_height: int, to_width: int) -> None:
    covered_px = (round(to_height * 1.25), round(to_width * 1.25))
    preprocessing = replace(IMAGENET, interpolation="bicubic").sized((to_height, to_width), covered_px)
    if covered_px[0] == covered_px[1] or np.prod(resized_px(height, width, preprocessing)) > 10**6:
        return
    image = noise(height, width)
    resize = timm_transforms.ResizeKeepRatio(covered_px, interpolation="bicubic")
    expected = Compose([resize, CenterCrop((to_height, to_width))])(image)
    assert torch.equal(pil_to_tensor(fit_picture(image, preprocessing)), pil_to_tensor(expected))


# --- everything that decodes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
@pytest.mark.parametrize("size_px", SIZES)
def test_jpegs_for_nvjpeg_fit_as_those_that_pillow_decodes(
    size_px: tuple[int, int], fit: str, pictures: list[Path], tmp_path: Path
) -> None:
    """Without a GPU, libjpeg stands in for nvjpeg; tensors round a little differently from Pillow."""
    preprocessing = fitted(size_px, fit, "bilinear")
    for file in pictures:
        with Image.open(file) as image:
            image.save(tmp_path / "a.jpg", quality=95)
        encoded = pixels_of(tmp_path / "a.jpg", replace(preprocessing, decode="nvjpeg"))
        assert encoded.ndim == 1
        decoded_NCHW, refused = decode_jpegs([encoded, encoded], preprocessing, torch.device("cpu"))
        assert decoded_NCHW.shape == (2, 3, *size_px) and not refused
        by_pillow = pixels_of(tmp_path / "a.jpg", preprocessing)
        assert (decoded_NCHW[1].int() - by_pillow.int()).abs().max() <= 2


@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
@pytest.mark.parametrize("size_px", [(300, 300), (400, 200), (200, 420)])
def test_fast_decoding_keeps_enough_pixels_for_the_size(
    size_px: tuple[int, int], fit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, int]] = []
    noise(900, 1400).save(tmp_path / "a.jpg")
    preprocessing = replace(fitted(size_px, fit), decode="fast")

    def note_size(picture: Image.Image, prepared: Preprocessing) -> Image.Image:
        sizes.append(picture.size)
        return fit_picture(picture, prepared)

    monkeypatch.setattr(decoding, "fit_picture", note_size)
    assert pixels_of(tmp_path / "a.jpg", preprocessing).shape == (3, *size_px)
    height, width = resized_px(900, 1400, preprocessing)
    assert 1400 > sizes[0][0] >= width and 900 > sizes[0][1] >= height


def test_a_rotation_that_is_applied_turns_the_image_before_it_is_fitted(pictures: list[Path], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(pictures[0]) as image:
        image.save(tmp_path / "turned.png", exif=exif)
        upright = image.transpose(Image.Transpose.ROTATE_270)
    preprocessing = replace(fitted((96, 48), "squash"), exif="apply")
    expected = pil_to_tensor(Resize((96, 48), InterpolationMode.BICUBIC)(upright))
    assert torch.equal(pixels_of(tmp_path / "turned.png", preprocessing), expected)


def test_a_strip_that_no_crop_can_take_can_be_squashed_and_padded(tmp_path: Path) -> None:
    Image.new("RGB", (60_000, 1), (9, 9, 9)).save(tmp_path / "strip.png")
    with pytest.raises(UnreadableError) as caught:
        pixels_of(tmp_path / "strip.png", IMAGENET)
    assert failure_reason(caught.value).startswith("too long for its width: 60000 x 1 pixels become 15360000 x 256")
    for fit in ("squash", "pad"):
        assert pixels_of(tmp_path / "strip.png", fitted((32, 64), fit)).shape == (3, 32, 64)
