"""Fit many decoded pictures to a model's input on a device, in few operations: each takes time to be started."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from hookx.images.fit import crop_or_pad, resized_px
from hookx.plan import Preprocessing

MAX_PIXELS_AT_ONCE = 16 * 2**20  # in float32
_WITH_CORNERS = ("bilinear", "bicubic")  # the modes that can be told how to align them, and to smooth


def fit_pictures(pictures_CHW: Sequence[Tensor], preprocessing: Preprocessing) -> Tensor:
    """Return what `fit_picture` makes of each picture, bit for bit, as one batch.

    That takes some ten operations for each picture, most of which convert it to float32 and back. Here pictures of any
    sizes are converted together, and only the resizing itself is done for each.

    Args:
        pictures_CHW: uint8, on one device.

    Returns:
        uint8 (pictures, channels, height, width) of the input, with the channels innermost in memory, as Pillow decodes
        them.

    Example:
        >>> from hookx.plan import IMAGENET
        >>> sizes = (300, 400), (640, 480)
        >>> pictures = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]
        >>> fit_pictures(pictures, IMAGENET).shape
        torch.Size([2, 3, 224, 224])
    """
    batches = [_fit(some, preprocessing) for some in _split(pictures_CHW)]
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


def _fit(pictures_CHW: Sequence[Tensor], preprocessing: Preprocessing) -> Tensor:
    mode, (height_px, width_px) = preprocessing.interpolation, preprocessing.size_px
    has_corners = mode in _WITH_CORNERS
    values = torch.cat([picture_CHW.flatten() for picture_CHW in pictures_CHW]).to(torch.float32)
    fitted = []
    for picture_CHW, floats in zip(pictures_CHW, values.split([one.numel() for one in pictures_CHW]), strict=True):
        resized = resized_px(picture_CHW.shape[1], picture_CHW.shape[2], preprocessing)
        resized_NCHW = interpolate(
            floats.view(1, *picture_CHW.shape),
            size=resized,
            mode=mode,
            align_corners=False if has_corners else None,
            antialias=has_corners and preprocessing.antialias,
        )
        if preprocessing.fit == "crop" and resized[0] >= height_px and resized[1] >= width_px:
            top, left = round((resized[0] - height_px) / 2), round((resized[1] - width_px) / 2)
            fitted.append(resized_NCHW[:, :, top : top + height_px, left : left + width_px])
        else:
            fitted.append(crop_or_pad(resized_NCHW, preprocessing))  # with a border
    levels = torch.cat(fitted).clamp_(0, 255).round_()  # Bicubic weights overshoot.
    return levels.to(torch.uint8).contiguous(memory_format=torch.channels_last)
