"""Resize and crop many decoded pictures on a device, in few operations: the device waits for each that is started."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import functional as F  # noqa: N812 - its own documentation's name

from hookx.plan import Preprocessing

MAX_PIXELS_AT_ONCE = 16 * 2**20  # in float32
_WITH_CORNERS = ("bilinear", "bicubic")  # the modes that can be told how to align them, and to smooth


def resize_and_crop_all(pictures_CHW: Sequence[Tensor], preprocessing: Preprocessing) -> Tensor:
    """Return what torchvision's `resize` and `center_crop` make of each picture, bit for bit, as one batch.

    Those take some ten operations for each picture, most of which convert it to float32 and back. Here pictures of any
    sizes are converted together, and only the resizing itself is done for each.

    Args:
        pictures_CHW: uint8, on one device.

    Returns:
        uint8 (pictures, channels, crop_px, crop_px), with the channels innermost in memory, as Pillow decodes them.

    Example:
        >>> from hookx.plan import IMAGENET
        >>> sizes = (300, 400), (640, 480)
        >>> pictures = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]
        >>> resize_and_crop_all(pictures, IMAGENET).shape
        torch.Size([2, 3, 224, 224])
    """
    batches = [_resize_and_crop(some, preprocessing) for some in _split(pictures_CHW)]
    return batches[0] if len(batches) == 1 else torch.cat(batches)


def _split(pictures_CHW: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """Cut a list of pictures so that the floats of a part fit in a moderate memory."""
    start = pixels = 0
    for number, picture_CHW in enumerate(pictures_CHW):
        size = picture_CHW.shape[1] * picture_CHW.shape[2]
        if number > start and pixels + size > MAX_PIXELS_AT_ONCE:
            yield pictures_CHW[start:number]
            start, pixels = number, 0
        pixels += size
    yield pictures_CHW[start:]


def _resize_and_crop(pictures_CHW: Sequence[Tensor], preprocessing: Preprocessing) -> Tensor:
    mode, crop_px = preprocessing.interpolation, preprocessing.crop_px
    has_corners = mode in _WITH_CORNERS
    values = torch.cat([picture_CHW.flatten() for picture_CHW in pictures_CHW]).to(torch.float32)
    cropped = []
    for picture_CHW, floats in zip(pictures_CHW, values.split([one.numel() for one in pictures_CHW]), strict=True):
        height_px, width_px = _resized_size(picture_CHW, preprocessing.resize_px)
        resized_NCHW = interpolate(
            floats.view(1, *picture_CHW.shape),
            size=(height_px, width_px),
            mode=mode,
            align_corners=False if has_corners else None,
            antialias=has_corners and preprocessing.antialias,
        )
        if min(height_px, width_px) < crop_px:
            cropped.append(F.center_crop(resized_NCHW, [crop_px, crop_px]))  # with a border
        else:
            top, left = round((height_px - crop_px) / 2), round((width_px - crop_px) / 2)
            cropped.append(resized_NCHW[:, :, top : top + crop_px, left : left + crop_px])
    levels = torch.cat(cropped).clamp_(0, 255).round_()  # Bicubic weights overshoot.
    return levels.to(torch.uint8).contiguous(memory_format=torch.channels_last)


def _resized_size(picture_CHW: Tensor, resize_px: int) -> tuple[int, int]:
    """Return the height and width of a picture whose shorter side is resized, rounded as torchvision rounds."""
    _, height_px, width_px = picture_CHW.shape
    longer_px = resize_px * max(height_px, width_px) // min(height_px, width_px)
    return (resize_px, longer_px) if height_px <= width_px else (longer_px, resize_px)
