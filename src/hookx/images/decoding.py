"""Decode an image file to the pixels that a model takes, or report why that is impossible.

Pillow decodes; with `--decode nvjpeg` an NVIDIA GPU decodes plain JPEGs.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from hookx.errors import UsageError
from hookx.images.bands import undeclared_bands, unknown_bands, unread_bands
from hookx.images.deep import find_deep_colour
from hookx.images.files import File
from hookx.images.fit import check_resized_px, fit_picture, resized_px
from hookx.images.loaders import Loader, load_own, resize_bands
from hookx.images.memory import lacks_memory
from hookx.images.opening import Content, open_image
from hookx.images.plugins import register_plugins
from hookx.images.resizing import fit_pictures
from hookx.images.retries import UnavailableError
from hookx.images.rgb import to_rgb
from hookx.images.unreadable import UnreadableError
from hookx.plan import Preprocessing, RangeUse

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

_SWAP_SIDES = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)
_MAX_REASON_LENGTH = 300  # characters

_GPU_INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic")
_NO_MEMORY_OF_NVJPEG = r"out of memory|failed: 5\b"  # its status 5 is NVJPEG_STATUS_ALLOCATOR_FAILURE
_END_OF_JPEG = b"\xff\xd9"
_BLOCK_BYTES = 2**20
_NO_MEMORY_OF_PILLOW = "out of memory error"  # in its words for status -9 of a decoder


class Noticed(NamedTuple):
    """What there is to say about an image beside its pixels.

    Args:
        rotation_ignored: a camera recorded a rotation that was not applied.
        range_use: how it uses the range of its values, if that is worth a word; see `to_rgb`.
    """

    rotation_ignored: bool = False
    range_use: RangeUse | None = None


def decode(
    file: File,
    preprocessing: Preprocessing,
    listed_bytes: int | None = None,
    transform: Callable[[Any], Tensor] | None = None,
    loader: Loader | None = None,
) -> tuple[Tensor, Noticed]:
    """Read the first frame of an image as RGB (see `to_rgb`), resize it and crop it; ignore colour profiles.

    A size other than `listed_bytes` is a failure. `transform`, the model's own, takes the RGB image to a model's input
    (3, height, width) in place of `preprocessing`. `loader`, the user's own, reads the file in place of Pillow; what
    it returns is prepared as any image is, and becomes a model's input of as many channels as there are means.

    Returns:
        The pixels, uint8 (3, height, width) for `model_input` to scale, or what `transform` returned; and what was
        noticed about the image. For a plain JPEG that nvjpeg shall decode, the bytes of the file
        instead of pixels: a uint8 tensor of one dimension, for `decode_jpegs`.

    Raises:
        UnavailableError: the system cannot read the file now, and the file is not to blame.
        MemoryError: this process cannot get the memory.
        Exception: whatever a decoder raises on corrupt files; `failure_reason` puts it into words.

    Example:
        >>> from hookx.models import load_model
        >>> preprocessing = load_model("resnet18", "none").preprocessing
        >>> pixels_CHW, _ = decode("images/animals/chelsea.jpg", preprocessing)
        >>> pixels_CHW.shape, pixels_CHW.dtype
        (torch.Size([3, 224, 224]), torch.uint8)
        >>> model_input(pixels_CHW.unsqueeze(0), preprocessing).dtype
        torch.float32
    """
    assert transform or not preprocessing.custom, "custom preprocessing comes with its transform"
    assert loader or not preprocessing.loader, "images that a loader reads come with it"
    if loader is not None:
        return _decode_own(file, preprocessing, listed_bytes, transform, loader)
    # Pillow would map a file into memory, and one that is truncated meanwhile would kill the process; so it gets one
    # that is open. Pillow's warnings about metadata and large images are noise: what matters is whether it decodes.
    for is_last_try in (False, True):
        with open_image(file, listed_bytes) as content, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                rgb, orientation, range_use = _decode(content, preprocessing)
                break
            except Exception:
                if is_last_try or not content.is_shared:
                    raise
                content.read_through()  # A library reads this file by itself, and what the system told it is lost.
    if isinstance(rgb, Tensor):
        return rgb, Noticed(orientation is not None)
    pixels_CHW, rotation_ignored = _prepare(rgb, orientation, preprocessing, transform)
    return pixels_CHW, Noticed(rotation_ignored, range_use)


def _decode_own(
    file: File,
    preprocessing: Preprocessing,
    listed_bytes: int | None,
    transform: Callable[[Any], Tensor] | None,
    loader: Loader,
) -> tuple[Tensor, Noticed]:
    """Read an image by the user's loader, and make a model's input of it; see `decode`."""
    with open_image(file, listed_bytes) as content, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = load_own(loader, file, content, None if transform else len(preprocessing.mean))
    noticed = Noticed()
    if isinstance(loaded, Tensor):
        check_resized_px(loaded.shape[1], loaded.shape[2], preprocessing)
        resized = transform or partial(resize_bands, resize=partial(_fit_band, preprocessing))
        pixels_CHW = resized(loaded)
        _check_shape(pixels_CHW, preprocessing)
    else:
        try:
            rgb, range_use = to_rgb(loaded, preprocessing.grey_range)
        except ValueError as error:
            raise UnreadableError(str(error)) from None
        pixels_CHW, rotation_ignored = _prepare(rgb, _orientation(loaded), preprocessing, transform)
        noticed = Noticed(rotation_ignored, range_use)
    # A batch may hold bytes beside floats, so all are made a model's input here.
    if transform is None and pixels_CHW.dtype != torch.uint8:
        mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
        return pixels_CHW.sub_(mean).div_(std), noticed
    return model_input(pixels_CHW.unsqueeze(0), preprocessing)[0].contiguous(), noticed


def _prepare(
    rgb: Image.Image,
    orientation: Image.Transpose | None,
    preprocessing: Preprocessing,
    transform: Callable[[Any], Tensor] | None,
) -> tuple[Tensor, bool]:
    """Turn an RGB image upright with --exif apply, resize and crop it; return whether a rotation was ignored."""
    if orientation is not None and preprocessing.exif == "apply":
        rgb, orientation = rgb.transpose(orientation), None
    check_resized_px(rgb.height, rgb.width, preprocessing)
    if transform:
        pixels_CHW = transform(rgb)
    else:
        pixels_CHW = torch.from_numpy(np.array(fit_picture(rgb, preprocessing))).permute(2, 0, 1)
    _check_shape(pixels_CHW, preprocessing)
    return pixels_CHW, orientation is not None


def _fit_band(preprocessing: Preprocessing, band: Image.Image, number: int) -> Image.Image:
    return fit_picture(band, preprocessing, preprocessing.mean[number : number + 1])


def _check_shape(pixels_CHW: Tensor, preprocessing: Preprocessing) -> None:
    shape = len(preprocessing.mean), *preprocessing.size_px
    if pixels_CHW.shape != shape:
        raise UnreadableError(f"preprocessing gave {tuple(pixels_CHW.shape)} instead of {shape}")


def _open(content: Content) -> ImageFile:
    reason = undeclared_bands(content)
    content.seek(0)
    if reason:
        raise UnreadableError(reason)
    try:
        return Image.open(content, formats=known_formats())
    except UnidentifiedImageError:
        if reason := unknown_bands(content):
            raise UnreadableError(reason) from None
        raise


def _decode(
    content: Content, preprocessing: Preprocessing
) -> tuple[Image.Image | Tensor, Image.Transpose | None, RangeUse | None]:
    """Return an image as RGB, or the bytes of a JPEG for nvjpeg; what would turn it upright; how it uses its range."""
    with _open(content) as image:
        if preprocessing.decode == "nvjpeg" and (encoded := _plain_jpeg(image, content, preprocessing)):
            return torch.frombuffer(encoded, dtype=torch.uint8), _orientation(image), None
        if reason := unread_bands(image) or lacks_memory(image):
            raise UnreadableError(reason)
        deep = find_deep_colour(image, known_formats())
        if preprocessing.decode == "fast":
            _reduce_while_decoding(image, preprocessing)
        try:
            image.load()  # Pillow rotates a TIFF while loading it, and then drops the orientation tag.
            if deep is not None:
                deep.load(content)
        except OSError as error:
            if str(error).startswith(_NO_MEMORY_OF_PILLOW):
                raise MemoryError(str(error)) from None
            raise
        orientation = _orientation(image)
        try:
            rgb, range_use = to_rgb(image, preprocessing.grey_range, deep)
            return rgb, orientation, range_use
        except ValueError as error:
            raise UnreadableError(str(error)) from None


def decode_jpegs(
    encoded: Sequence[Tensor], preprocessing: Preprocessing, device: torch.device
) -> tuple[Tensor, dict[int, UnreadableError]]:
    """Decode, resize and crop on a device the JPEGs that `decode` leaves to nvjpeg; on a CPU libjpeg decodes.

    nvjpeg and resizing on a GPU round differently from libjpeg and Pillow: pixels differ by a few levels. Return the
    pixels of all files on the device, uint8 (files, 3, height, width), and by number those files that cannot be
    decoded, whose pixels mean nothing.
    """
    shape = len(encoded), *preprocessing.size_px, 3
    try:
        pictures = decode_jpeg(list(encoded), ImageReadMode.RGB, device)
    except RuntimeError as error:
        if not re.search("jpeg", str(error), re.IGNORECASE) or re.search(_NO_MEMORY_OF_NVJPEG, str(error)):
            raise  # The device's fault, and no file's.
        if len(encoded) == 1:
            reason = f"nvjpeg: {str(error).splitlines()[0][:_MAX_REASON_LENGTH]}"
            return torch.empty(shape, dtype=torch.uint8, device=device).permute(0, 3, 1, 2), {
                0: UnreadableError(reason)
            }
        # The error does not say which file failed.
        alone = [decode_jpegs([one], preprocessing, device) for one in encoded]
        failed = {number: errors[0] for number, (_, errors) in enumerate(alone) if errors}
        return torch.cat([pixels_NCHW for pixels_NCHW, _ in alone]), failed
    return fit_pictures(pictures, preprocessing), {}


def check_decoding(preprocessing: Preprocessing, device: torch.device) -> None:
    """Raise `UsageError` if a device cannot decode as `preprocessing` says."""
    if preprocessing.decode != "nvjpeg":
        return
    if device.type != "cuda":
        raise UsageError(
            f"--decode nvjpeg needs an NVIDIA GPU, but the device is {device}", "leave out --decode nvjpeg"
        )
    if preprocessing.interpolation not in _GPU_INTERPOLATIONS:
        raise UsageError(
            f"--decode nvjpeg resizes on the GPU, which cannot do --interpolation {preprocessing.interpolation}",
            f"choose {', '.join(_GPU_INTERPOLATIONS)}, or leave out --decode nvjpeg",
        )


def size_from_header(file: File) -> tuple[int, int]:
    """Return an image's width and height in pixels; 0 and 0 if its header cannot be read."""
    with suppress(Exception), open_image(file) as content:
        return Image.open(content, "r", known_formats()).size
    return 0, 0


def failure_reason(error: Exception) -> str:
    """Return in one line why an image could not be read; without paths, so that all machines store the same bytes."""
    if isinstance(error, UnavailableError):
        error = error.cause
    if isinstance(error, UnreadableError):
        return str(error)
    if isinstance(error, UnidentifiedImageError):
        return "UnidentifiedImageError: not an image that Pillow knows"
    text = (getattr(error, "strerror", None) or " ".join(str(error).split()))[:_MAX_REASON_LENGTH]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def known_formats() -> list[str]:
    """Return Pillow's formats in an order independent of what was opened before; those without a signature come last.

    EPS is left out, because Pillow would run Ghostscript, an interpreter, on any file that begins like one. The first
    call imports every decoder, those of plug-ins that are installed included, so that processes forked later need not.
    """
    Image.init()
    register_plugins()
    return sorted((name for name in Image.ID if name != "EPS"), key=lambda name: (Image.OPEN[name][1] is None, name))


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """Return what turns the image upright; None if it already is, or if its metadata is unreadable."""
    try:
        return _TURN_UPRIGHT.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # Corrupt EXIF can raise anything; the pixels are still usable.
        return None


def model_input(pixels_NCHW: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Scale decoded pixels to a model's input: the second half of the published preprocessing, bit for bit.

    uint8 becomes float32 in [0, 1], minus `mean`, divided by `std`, on the same device; the output of a model's own
    transform is returned as it is.
    """
    if pixels_NCHW.dtype != torch.uint8:
        return pixels_NCHW
    # Channels are innermost in memory, and broadcasting along whole lines is faster than along three values. Every
    # operand is a tensor: CUDA divides by a Python number as it multiplies by its reciprocal, which rounds differently.
    batch, channels, height_px, width_px = pixels_NCHW.shape
    lines = pixels_NCHW.permute(0, 2, 3, 1).reshape(batch * height_px, -1).to(torch.float32)
    white, mean, std = (
        _line(values, width_px, pixels_NCHW.device) for values in ((255.0,), preprocessing.mean, preprocessing.std)
    )
    lines.div_(white).sub_(mean).div_(std)
    return lines.view(batch, height_px, width_px, channels).permute(0, 3, 1, 2)


def _line(values: Sequence[float], width_px: int, device: torch.device) -> Tensor:
    """Return float32 values for the channels of each pixel of a line; one for all of them has no dimension.

    They are filled in on the device. To copy them there from a list would wait for all that a GPU still computes.
    """
    filled = [torch.full((), value, dtype=torch.float32, device=device) for value in values]
    return torch.stack(filled).repeat(width_px) if len(filled) > 1 else filled[0]


def _plain_jpeg(image: Image.Image, content: BinaryIO, preprocessing: Preprocessing) -> bytearray | None:
    """Return the bytes of a JPEG if nvjpeg decodes it to the same image as libjpeg, up to rounding.

    Pillow decodes the others: CMYK, RGB without a colour transform, unusual subsampling, truncated files, and images
    that have to be turned upright.
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
    check_resized_px(image.height, image.width, preprocessing)
    content.seek(0)
    encoded = bytearray(content.read())
    return encoded if encoded.rstrip(b"\0").endswith(_END_OF_JPEG) else None


def _reduce_while_decoding(image: Image.Image, preprocessing: Preprocessing) -> None:
    """Let libjpeg decode at 1/2, 1/4 or 1/8 of the size, as long as that is large enough for resizing."""
    is_turned = preprocessing.exif == "apply" and _orientation(image) in _SWAP_SIDES
    height_px, width_px = image.size if is_turned else image.size[::-1]
    wanted_px = resized_px(height_px, width_px, preprocessing)
    # As large in the direction that shrinks less; rounded up, because the size of a draft is.
    share = max(wanted_px[0] / height_px, wanted_px[1] / width_px)
    if preprocessing.fit == "crop" and not preprocessing.resize_width_px:
        share = preprocessing.resize_px / min(image.size)  # `resized_px` rounds the longer side down.
    if share < 1:
        image.draft(None, (math.ceil(image.width * share), math.ceil(image.height * share)))  # Only JPEGs have one.
