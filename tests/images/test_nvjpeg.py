"""nvjpeg gets the files that it decodes as libjpeg does, Pillow the others. Without a GPU, libjpeg stands in for it.

What nvjpeg itself makes of a file is tested in test_gpu.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F  # noqa: N812 - its own documentation's name

from hookx.errors import UsageError
from hookx.images import decoding, resizing
from hookx.images.decoding import check_decoding, decode, decode_jpegs, failure_reason
from hookx.images.fit import fit_picture
from hookx.images.listing import list_images
from hookx.plan import Preprocessing
from hookx.run.lane import Batch
from hookx.run.prepare import prepare
from hookx.run.workers import batches
from kit.pictures import copied

CPU = torch.device("cpu")
EXACT = Preprocessing(72, 64, (0.5,) * 3, (0.5,) * 3, "bilinear")
NVJPEG = replace(EXACT, decode="nvjpeg")
ROTATED = 0x0112, 6
POSITIONS = [range(5), range(5, 10), range(10, 12)]


@pytest.fixture
def photograph(photos: Path) -> Image.Image:
    with Image.open(photos / "animals" / "chelsea.jpg") as image:
        return image.convert("RGB").resize((150, 100))


def saved(image: Image.Image, file: Path, *, turned: bool = False, **options: object) -> Path:
    exif = Image.Exif()
    if turned:
        exif[ROTATED[0]] = ROTATED[1]
    image.save(file, exif=exif, **options)  # type: ignore[arg-type]
    return file


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"quality": 5}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_plain_jpeg_is_left_to_nvjpeg_byte_by_byte(
    photograph: Image.Image, tmp_path: Path, mode: str, options: dict[str, object]
) -> None:
    file = saved(photograph.convert(mode), tmp_path / "plain.jpg", turned=True, **options)
    content, (rotation_ignored, _) = decode(str(file), NVJPEG)
    assert content.numpy().tobytes() == file.read_bytes()
    assert rotation_ignored


MAKE: dict[str, Callable[[Image.Image, Path], Path]] = {
    "another format": lambda image, folder: saved(image, folder / "a.png"),
    "cyan, magenta, yellow, black": lambda image, folder: saved(image.convert("CMYK"), folder / "a.jpg"),
    "red, green, blue as they are": lambda image, folder: saved(image, folder / "a.jpg", keep_rgb=True),
}


@pytest.mark.parametrize("what", MAKE)
def test_what_nvjpeg_does_not_decode_alike_is_decoded_exactly(
    photograph: Image.Image, tmp_path: Path, what: str
) -> None:
    file = str(MAKE[what](photograph, tmp_path))
    assert torch.equal(decode(file, NVJPEG)[0], decode(file, EXACT)[0])


def test_a_jpeg_to_be_turned_upright_is_decoded_exactly(photograph: Image.Image, tmp_path: Path) -> None:
    file = str(saved(photograph, tmp_path / "turned.jpg", turned=True))
    pixels_CHW, (rotation_ignored, _) = decode(file, replace(NVJPEG, exif="apply"))
    assert torch.equal(pixels_CHW, decode(file, replace(EXACT, exif="apply"))[0]) and not rotation_ignored


def test_a_jpeg_cut_short_fails_for_the_same_reason(photograph: Image.Image, tmp_path: Path) -> None:
    file = saved(photograph, tmp_path / "short.jpg")
    file.write_bytes(file.read_bytes()[:-500])
    reasons = []
    for preprocessing in (EXACT, NVJPEG):
        with pytest.raises(OSError) as error:
            decode(str(file), preprocessing)
        reasons.append(failure_reason(error.value))
    assert reasons[0] == reasons[1] and "truncated" in reasons[0]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resizing_as_a_gpu_does_moves_a_pixel_by_a_few_levels(photos: Path, interpolation: str) -> None:
    exact = replace(EXACT, resize_px=256, crop_px=224, interpolation=interpolation)
    for file in sorted(map(str, photos.rglob("*.jpg"))):
        content, _ = decode(file, replace(exact, decode="nvjpeg"))
        pixels_NCHW, refused = decode_jpegs([content], exact, CPU)
        assert not refused and pixels_NCHW.dtype == torch.uint8
        deviation = (pixels_NCHW[0].int() - decode(file, exact)[0].int()).abs()
        assert deviation.max() <= 6 and deviation.float().mean() < 0.6, file


def test_one_file_that_nvjpeg_refuses_costs_no_other(photograph: Image.Image, tmp_path: Path) -> None:
    whole = decode(str(saved(photograph, tmp_path / "whole.jpg")), NVJPEG)[0]
    broken = whole.clone()
    broken[2:-2] = 0
    small = decode(str(saved(photograph.resize((90, 80)), tmp_path / "small.jpg")), NVJPEG)[0]
    (alone,), _ = decode_jpegs([whole], EXACT, CPU)
    pixels_NCHW, refused = decode_jpegs([whole, broken, small, whole], EXACT, CPU)
    assert list(refused) == [1] and failure_reason(refused[1]).startswith("nvjpeg: ")
    assert torch.equal(pixels_NCHW[0], alone) and torch.equal(pixels_NCHW[3], alone)


def test_pictures_are_resized_together_to_the_same_pixels(
    photograph: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [(90, 80), (120, 100), (90, 80), (100, 120), (90, 80), (120, 100)]
    files = []
    for number, size in enumerate(sizes):
        picture = photograph.rotate(20 * number).resize(size)
        files.append(decode(str(saved(picture, tmp_path / f"{number}.jpg")), NVJPEG)[0])
    together, _ = decode_jpegs(files, EXACT, CPU)
    for number, file in enumerate(files):
        assert torch.equal(together[number], decode_jpegs([file], EXACT, CPU)[0][0])
    monkeypatch.setattr(resizing, "MAX_PIXELS_AT_ONCE", 1)
    assert torch.equal(decode_jpegs(files, EXACT, CPU)[0], together)


@pytest.mark.parametrize(("resize_px", "crop_px"), [(256, 224), (224, 224), (64, 96), (375, 50)])
@pytest.mark.parametrize("interpolation", ["nearest", "nearest-exact", "bilinear", "bicubic"])
@pytest.mark.parametrize("antialias", [True, False])
def test_pictures_resized_together_equal_what_torchvision_makes_of_each(
    interpolation: str, antialias: bool, resize_px: int, crop_px: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [(256, 300), (31, 500), (444, 97), (375, 500), (64, 64)]
    pictures = [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]
    preprocessing = replace(
        EXACT, resize_px=resize_px, crop_px=crop_px, interpolation=interpolation, antialias=antialias
    )
    together = resizing.fit_pictures(pictures, preprocessing)
    for picture, ours in zip(pictures, together, strict=True):
        mode = InterpolationMode(interpolation)
        assert torch.equal(
            ours, F.center_crop(F.resize(picture, [resize_px], mode, antialias=antialias), [crop_px] * 2)
        )


@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
@pytest.mark.parametrize("size_px", [(224, 224), (256, 128), (40, 300)])
def test_pictures_fitted_together_equal_each_fitted_alone(fit: str, size_px: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [(256, 300), (31, 500), (444, 97), (375, 500)]
    pictures = [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]
    preprocessing = replace(EXACT.sized(size_px, size_px), fit=fit, mean=(0.5, 0.3, 0.1))
    together = resizing.fit_pictures(pictures, preprocessing)
    assert together.shape == (4, 3, *size_px)
    for picture, ours in zip(pictures, together, strict=True):
        assert torch.equal(ours, fit_picture(picture, preprocessing))


@pytest.mark.parametrize("message", ["CUDA out of memory. Tried to allocate 2 MiB", "CUDA error: unspecified failure"])
def test_no_file_is_blamed_for_what_the_device_did(
    photograph: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(decoding, "decode_jpeg", fail)
    with pytest.raises(RuntimeError, match="CUDA"):
        decode_jpegs([decode(str(saved(photograph, tmp_path / "whole.jpg")), NVJPEG)[0]], EXACT, CPU)


@pytest.mark.parametrize(("workers", "images_in_piece"), [(0, 8), (2, 8), (3, 2)])
def test_every_image_is_in_its_place_whoever_decodes_it(
    photograph: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, images_in_piece: int
) -> None:
    monkeypatch.setattr("hookx.run.slots._MIN_IMAGES_IN_PIECE", images_in_piece)
    for number in range(12):
        turned = photograph.rotate(30 * number)
        saved(turned, tmp_path / f"{number:02}.{'png' if number % 3 == 0 else 'jpg'}")
    (tmp_path / "04.jpg").write_bytes(b"not an image")
    broken = bytearray((tmp_path / "07.jpg").read_bytes())
    start = broken.index(b"\xff\xc0") + 2  # The frame's header is whole; what is left of the tables is not.
    broken[start + 17 : -2] = bytes(len(broken) - 2 - start - 17)
    (tmp_path / "07.jpg").write_bytes(broken)
    listed = list_images([tmp_path])

    def decoded(preprocessing: Preprocessing) -> list[Batch]:
        return copied(batches(listed, POSITIONS, preprocessing, workers=workers))

    assert [batch.positions for batch in decoded(EXACT)] == POSITIONS
    exact, nvjpeg = decoded(EXACT), decoded(NVJPEG)
    for a, b in zip(exact, nvjpeg, strict=True):
        assert a.keys == b.keys and [key for key, _ in a.failures] == [key for key, _ in b.failures]
        assert a.pixels_NCHW is not None and b.pixels_NCHW is not None
        assert (a.pixels_NCHW.int() - b.pixels_NCHW.int()).abs().max() <= 4
    assert [key for batch in nvjpeg for key, _ in batch.failures] == ["04.jpg", "07.jpg"]


def test_nvjpeg_is_refused_where_there_is_no_nvidia_gpu(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--decode nvjpeg needs an NVIDIA GPU, but the device is cpu"):
        prepare("resnet18", "avgpool", photos, weights="none", device="cpu", decode="nvjpeg", out=tmp_path)


def test_nvjpeg_is_refused_where_a_gpu_cannot_resize_as_asked() -> None:
    check_decoding(NVJPEG, torch.device("cuda"))
    with pytest.raises(UsageError, match="on the GPU, which cannot do --interpolation lanczos"):
        check_decoding(replace(NVJPEG, interpolation="lanczos"), torch.device("cuda"))
