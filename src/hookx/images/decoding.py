"""One image file -> the pixels that a model takes, or the reason why there are none.

The only file that decodes images: with Pillow, and if asked to, JPEGs on an NVIDIA GPU.
"""

from __future__ import annotations

import math
import os
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F  # noqa: N812 - its own documentation's name

from hookx.errors import UsageError
from hookx.plan import Preprocessing

_EXIF_ORIENTATION = 0x0112
_TURN_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# The size at which Pillow refuses to decode. A strip of 1 x 100,000 pixels passes there, and grows beyond all bounds
# when its shorter side is resized to 256.
_MOST_PIXELS = 178_956_970
_LONGEST_REASON = 300  # characters

# What a GPU resizes with, of Pillow's ways.
_RESIZES_TENSORS = ("nearest", "nearest-exact", "bilinear", "bicubic")
_END_OF_JPEG = b"\xff\xd9"


class UnreadableError(Exception):
    """A file is not decoded, for a reason that needs no exception's name."""


def decode(
    file: str,
    preprocessing: Preprocessing,
    listed_bytes: int | None = None,
    transform: Callable[[Image.Image], Tensor] | None = None,
) -> tuple[Tensor, bool]:
    """Read one image file: its first frame, as `_to_rgb` says, resized and cropped; colour profiles are ignored.

    Args:
        file: its name.
        preprocessing: how the picture becomes a model's input.
        listed_bytes: the size that the file had when it was listed; another one now is a failure.
        transform: a model's own, RGB image -> pixels (3, crop_px, crop_px), in place of what `preprocessing` says.

    Returns:
        The pixels, (3, crop_px, crop_px), and whether a rotation recorded by the camera was ignored. They are uint8,
        for `model_input` to scale; a model's own transform returns its input itself. Of a plain JPEG that is to be
        decoded by nvjpeg, the bytes of the file, for `decode_jpegs`: uint8 of one dimension.

    Raises:
        Exception: whatever a decoder raises on foreign bytes; `failure_reason` puts it into words.

    Example:
        >>> from hookx.models import load_model
        >>> preprocessing = load_model("resnet18", "none").preprocessing
        >>> pixels_CHW, _ = decode("images/animals/chelsea.jpg", preprocessing)
        >>> pixels_CHW.shape, pixels_CHW.dtype
        (torch.Size([3, 224, 224]), torch.uint8)
        >>> model_input(pixels_CHW.unsqueeze(0), preprocessing).dtype
        torch.float32
    """
    assert transform or not preprocessing.custom, "a model's own preprocessing comes with its transform"
    # The file is opened here, not by Pillow, which would map it into memory: a file cut short while it is read then
    # kills the process. Pillow warns of odd metadata and of large images; what fails is a failure.
    with _opened(file, listed_bytes) as content, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(content, formats=known_formats()) as image:
            if preprocessing.decode == "nvjpeg" and (encoded := _plain_jpeg(image, content, preprocessing)):
                return torch.frombuffer(encoded, dtype=torch.uint8), _orientation(image) is not None
            if preprocessing.decode == "fast":
                _reduce_while_decoding(image, preprocessing.resize_px)
            image.load()  # Pillow turns a TIFF upright while it loads it, and then forgets the rotation.
            orientation = _orientation(image)
            rgb = _to_rgb(image)
    _check_resized_size(rgb.size, preprocessing.resize_px)
    if orientation is not None and preprocessing.exif == "apply":
        rgb, orientation = rgb.transpose(orientation), None
    pixels_CHW = (transform or _transform(preprocessing))(rgb)
    if pixels_CHW.shape != (3, preprocessing.crop_px, preprocessing.crop_px):
        side = preprocessing.crop_px
        raise UnreadableError(f"preprocessing gave {tuple(pixels_CHW.shape)} instead of (3, {side}, {side})")
    return pixels_CHW, orientation is not None


def decode_jpegs(
    encoded: Sequence[Tensor], preprocessing: Preprocessing, device: torch.device
) -> list[Tensor | UnreadableError]:
    """Decode, resize and crop JPEGs on a device: what `decode` leaves to nvjpeg.

    nvjpeg and the GPU's resizing round otherwise than libjpeg and Pillow, so the pixels differ by a few levels.

    Args:
        encoded: the bytes of each file, as `decode` returns them.
        preprocessing: how a picture becomes a model's input.
        device: where; on a CPU it is done by libjpeg, with the GPU's way to resize.

    Returns:
        For each file its pixels on the device, uint8 (3, crop_px, crop_px), or why there are none.
    """
    try:
        with warnings.catch_warnings():  # torchvision tells everyone to move to TorchCodec.
            warnings.simplefilter("ignore")
            pictures = decode_jpeg(list(encoded), ImageReadMode.RGB, device)
    except RuntimeError as error:
        if len(encoded) > 1:  # It does not say which of them it was.
            return [found for one in encoded for found in decode_jpegs([one], preprocessing, device)]
        return [UnreadableError(f"nvjpeg: {str(error).splitlines()[0][:_LONGEST_REASON]}")]
    return [_resized_and_cropped(picture_CHW, preprocessing) for picture_CHW in pictures]


def check_decoding(preprocessing: Preprocessing, device: torch.device) -> None:
    """Raise `UsageError` if a device cannot decode as asked."""
    if preprocessing.decode != "nvjpeg":
        return
    if device.type != "cuda":
        raise UsageError(f"nvjpeg decodes on an NVIDIA GPU, and the device is {device}", "leave out --decode nvjpeg")
    if preprocessing.interpolation not in _RESIZES_TENSORS:
        raise UsageError(
            f"what nvjpeg decodes is resized on the GPU, and not by '{preprocessing.interpolation}'",
            f"--interpolation {_RESIZES_TENSORS[2]}, or leave out --decode nvjpeg",
        )


def failure_reason(error: Exception) -> str:
    """Say in one line why an image could not be read; the same words on every machine, so no path in them."""
    if isinstance(error, UnreadableError):
        return str(error)
    if isinstance(error, UnidentifiedImageError):
        return "UnidentifiedImageError: not an image that Pillow knows"
    text = (getattr(error, "strerror", None) or " ".join(str(error).split()))[:_LONGEST_REASON]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def _opened(file: str, listed_bytes: int | None) -> Iterator[BinaryIO]:
    # Without O_NONBLOCK, opening a pipe waits for someone to write to it.
    with open(file, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as content:
        status = os.fstat(content.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableError("not a regular file")
        if listed_bytes is not None and status.st_size != listed_bytes:
            before = "unreadable" if listed_bytes < 0 else listed_bytes
            raise UnreadableError(f"changed since it was listed ({before} -> {status.st_size} bytes)")
        if status.st_size == 0:
            raise UnreadableError("the file is empty")
        yield content


def known_formats() -> list[str]:
    """Name Pillow's formats in an order that does not depend on what was opened before; those without a magic last.

    EPS is left out: Pillow runs Ghostscript, a whole programming language, on anything that begins like it. The first
    call imports all that can decode, which processes forked later need not do again.
    """
    Image.init()
    return _in_order(tuple(Image.ID))


@cache
def _in_order(formats: tuple[str, ...]) -> list[str]:
    return sorted((name for name in formats if name != "EPS"), key=lambda name: (Image.OPEN[name][1] is None, name))


def _check_resized_size(size: tuple[int, int], resize_px: int) -> None:
    shorter, longer = sorted(size)
    resized_longer = resize_px * longer // max(shorter, 1)
    if resize_px * resized_longer > _MOST_PIXELS:
        raise UnreadableError(
            f"too long for its width: {size[0]} x {size[1]} pixels become {resize_px} x {resized_longer} when resized"
        )


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """Return what would turn the image upright, or None if it is, or if its metadata cannot be read."""
    try:
        return _TURN_UPRIGHT.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # Damaged metadata raise anything, and the pixels are well.
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return the image as 8-bit RGB, which is what models are trained on.

    Images of 8 bits a channel, or 1, are Pillow's `convert("RGB")`, as in the published preprocessing: grey is
    repeated, an alpha channel or a transparent colour is dropped and not blended, CMYK, YCCK, Lab and HSV are converted
    without their profiles. Pillow itself reads colour of 16 bits a channel as its upper 8.

    Grey of more than 8 bits is scaled, where `convert` would cut everything above 255 to white:

    - 16 bits: divided by 257, so that 65535 becomes 255.
    - 32-bit integers: as 16 bits if all values lie within 0 and 65535; otherwise the image's own minimum becomes 0
      and its maximum 255.
    - floating point: times 255 if all values lie within 0 and 1; as they are if within 0 and 255; otherwise, again,
      minimum to 0 and maximum to 255. A NaN or an infinity is a failure.

    Values are rounded to the nearest integer.
    """
    if image.mode == "La":  # Grey multiplied by its alpha, which Pillow undoes in this step only.
        image = image.convert("LA")
    if not (image.mode in ("I", "F") or image.mode.startswith("I;16")):
        return image.convert("RGB")
    values = np.asarray(image).astype(np.float64)
    low, high = _black_and_white(values, image.mode)
    grey = np.rint((values - low) * (255 / (high - low or 1)))  # An image of one colour has no contrast: black.
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def _black_and_white(values: NDArray[np.float64], mode: str) -> tuple[float, float]:
    """Return which values become 0 and 255."""
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise UnreadableError("the image holds values that are not finite")
    for white in (1.0, 255.0) if mode == "F" else (65535.0,):
        if low >= 0 and high <= white:
            return 0.0, white
    return low, high


@cache
def _transform(preprocessing: Preprocessing) -> Callable[[Image.Image], Tensor]:
    """Return the first half of the published preprocessing, up to where an image becomes numbers."""
    interpolation = InterpolationMode(preprocessing.interpolation)

    def transform(rgb: Image.Image) -> Tensor:
        # What torchvision's ImageClassification, the class of every `weights.transforms()`, does with a picture.
        resized = F.resize(rgb, [preprocessing.resize_px], interpolation, antialias=preprocessing.antialias)
        cropped = F.center_crop(resized, [preprocessing.crop_px, preprocessing.crop_px])
        return torch.from_numpy(np.array(cropped)).permute(2, 0, 1)

    return transform


def model_input(pixels_NCHW: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Scale decoded pixels to what the model takes: the second half of the published preprocessing, bit for bit.

    uint8 becomes float32 in [0, 1], minus the mean, divided by the deviation; a model's own input stays what it is.
    Works where the pixels are: a quarter of the bytes go to a GPU.
    """
    if pixels_NCHW.dtype != torch.uint8:
        return pixels_NCHW
    # Channels are innermost as they were decoded. A whole line of them at a time is fast, where three are slow. Every
    # operand is a tensor on the device: CUDA divides by a Python number as it multiplies by its reciprocal.
    batch, _, height_px, width_px = pixels_NCHW.shape
    lines = pixels_NCHW.permute(0, 2, 3, 1).reshape(batch * height_px, -1).to(torch.float32)
    white, mean, std = (
        torch.tensor(values, dtype=torch.float32, device=pixels_NCHW.device)
        for values in (255.0, preprocessing.mean * width_px, preprocessing.std * width_px)
    )
    lines.div_(white).sub_(mean).div_(std)
    return lines.view(batch, height_px, width_px, 3).permute(0, 3, 1, 2)


def _resized_and_cropped(picture_CHW: Tensor, preprocessing: Preprocessing) -> Tensor:
    interpolation = InterpolationMode(preprocessing.interpolation)
    resized = F.resize(picture_CHW, [preprocessing.resize_px], interpolation, antialias=preprocessing.antialias)
    return F.center_crop(resized, [preprocessing.crop_px, preprocessing.crop_px])


def _plain_jpeg(image: Image.Image, content: BinaryIO, preprocessing: Preprocessing) -> bytearray | None:
    """Return the bytes of a JPEG that nvjpeg decodes to the same picture as libjpeg, but for rounding.

    All others (CMYK, RGB stored as it is, odd subsampling, files cut short) take the exact way, and so does one that is
    to be turned upright.
    """
    if not isinstance(image, JpegImageFile) or image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return None
    components = [(letter, (across, down)) for letter, across, down, _ in image.layer]
    stored_as_rgb = image.info.get("adobe_transform") == 0 or [letter for letter, _ in components] == list(b"RGB")
    subsampling = [factors for _, factors in components]
    usual = subsampling[0] in ((1, 1), (2, 1), (2, 2), (1, 2)) and all(rest == (1, 1) for rest in subsampling[1:])
    if (image.mode == "RGB" and stored_as_rgb) or not usual:
        return None
    if preprocessing.exif == "apply" and _orientation(image) is not None:
        return None
    _check_resized_size(image.size, preprocessing.resize_px)
    content.seek(0)
    encoded = bytearray(content.read())
    return encoded if encoded.rstrip(b"\0").endswith(_END_OF_JPEG) else None


def _reduce_while_decoding(image: Image.Image, resize_px: int) -> None:
    """Have libjpeg decode at 1/2, 1/4 or 1/8 of the size, as far as that is not below what is needed."""
    shorter = min(image.size)
    if shorter > resize_px:
        width, height = (math.ceil(side * resize_px / shorter) for side in image.size)
        image.draft(None, (width, height))  # Does nothing to a format that cannot.
