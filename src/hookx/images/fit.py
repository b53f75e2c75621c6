"""How a decoded picture becomes a model's input: resized, and cropped, squashed or padded to its height and width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F  # noqa: N812 - its own documentation's name

from hookx.images.unreadable import UnreadableError
from hookx.plan import Preprocessing

# Pillow refuses to decode a larger image. The limit holds here for the resized image too: a strip of 1 x 100,000 pixels
# is small until its shorter side is resized to 256.
_MAX_PIXELS = 178_956_970
_WHITE = 255
_Picture = TypeVar("_Picture", Image.Image, Tensor)


def resized_px(height_px: int, width_px: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """Return the height and the width to which a picture of some size is resized, before it is cropped or padded.

    Example:
        >>> from dataclasses import replace
        >>> from hookx.plan import IMAGENET
        >>> [resized_px(480, 640, replace(IMAGENET, fit=fit)) for fit in ("crop", "squash", "pad")]
        [(256, 341), (224, 224), (168, 224)]
        >>> resized_px(480, 640, IMAGENET.sized((256, 128), (292, 146)))
        (292, 389)
    """
    if preprocessing.fit == "squash":
        return preprocessing.size_px
    height_px, width_px = max(height_px, 1), max(width_px, 1)
    if preprocessing.fit == "pad":
        size_px = preprocessing.size_px
        ratio = max(height_px / size_px[0], width_px / size_px[1])
        height, width = (max(1, round(side_px / ratio)) for side_px in (height_px, width_px))
        return min(height, size_px[0]), min(width, size_px[1])
    covered_px = preprocessing.covered_px
    if covered_px[0] == covered_px[1]:  # As torchvision's Resize does with one number.
        longer_px = covered_px[0] * max(height_px, width_px) // min(height_px, width_px)
        return (covered_px[0], longer_px) if height_px <= width_px else (longer_px, covered_px[0])
    ratio = min(height_px / covered_px[0], width_px / covered_px[1])  # As timm does for inputs that are not square.
    return round(height_px / ratio), round(width_px / ratio)


def check_resized_px(height_px: int, width_px: int, preprocessing: Preprocessing) -> None:
    """Raise `UnreadableError` for a picture that resizing makes too large."""
    height, width = resized_px(height_px, width_px, preprocessing)
    if height * width > _MAX_PIXELS:
        shape = f"{width_px} x {height_px} pixels become {width} x {height}"
        raise UnreadableError(f"too long for its width: {shape} when resized")


def fit_picture(picture: _Picture, preprocessing: Preprocessing, mean: Sequence[float] = ()) -> _Picture:
    """Apply the first half of the published preprocessing, as in torchvision's ImageClassification; or squash, or pad.

    Args:
        picture: a PIL image, or pixels (..., channels, height, width).
        mean: the means for the picture's channels, if it has only some of the input's.
    """
    _, height_px, width_px = F.get_dimensions(picture)
    covered_px = preprocessing.covered_px
    is_published = preprocessing.fit == "crop" and covered_px[0] == covered_px[1]
    wanted = [covered_px[0]] if is_published else list(resized_px(height_px, width_px, preprocessing))
    interpolation = InterpolationMode(preprocessing.interpolation)
    resized = F.resize(picture, wanted, interpolation, antialias=preprocessing.antialias)
    return crop_or_pad(resized, preprocessing, mean)


def crop_or_pad(resized: _Picture, preprocessing: Preprocessing, mean: Sequence[float] = ()) -> _Picture:
    """Bring a picture that was resized to the height and width of the input; see `fit_picture`."""
    if preprocessing.fit == "crop":
        return F.center_crop(resized, list(preprocessing.size_px))
    return resized if preprocessing.fit == "squash" else _pad(resized, preprocessing, mean or preprocessing.mean)


def _pad(picture: _Picture, preprocessing: Preprocessing, mean: Sequence[float]) -> _Picture:
    """Put a picture in the centre of a canvas of the mean colour: 8 bits a channel, or floats from 0 to 1."""
    height, width = preprocessing.size_px
    _, inner_height, inner_width = F.get_dimensions(picture)
    top, left = (height - inner_height) // 2, (width - inner_width) // 2
    units = [min(max(value, 0.0), 1.0) for value in mean]
    levels = [round(_WHITE * unit) for unit in units]
    if isinstance(picture, Tensor):
        canvas = picture.new_empty((*picture.shape[:-2], height, width))
        canvas[:] = torch.tensor(levels, dtype=picture.dtype, device=picture.device).reshape(-1, 1, 1)
        canvas[..., top : top + inner_height, left : left + inner_width] = picture
        return canvas
    colour = units[0] if picture.mode == "F" else tuple(levels) if len(levels) > 1 else levels[0]
    page = Image.new(picture.mode, (width, height), colour)
    page.paste(picture, (left, top))
    return page
