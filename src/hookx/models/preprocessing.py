"""How any source prepares images -> what a plan records, and the callable that does it if a plan cannot say it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms._presets import ImageClassification
from torchvision.transforms.functional import to_pil_image

from hookx.errors import ModelError, one_line
from hookx.plan import IMAGENET, Preprocessing

Recorded = tuple[Preprocessing, Callable[[Any], Tensor] | None]
"""What a plan records about a transform, and the transform itself if a plan cannot express it."""

# One landscape, one portrait: a transform that keeps proportions returns two shapes.
_EXAMPLE_SIZES_PX = ((320, 240), (200, 333))


def imagenet_preprocessing(side_px: int = 224) -> Preprocessing:
    """Return what most image classifiers were trained with, for a model that does not say.

    Example:
        >>> str(imagenet_preprocessing())
        'resize 256 (bilinear), crop 224, mean 0.485,0.456,0.406, std 0.229,0.224,0.225'
    """
    return replace(IMAGENET, resize_px=round(side_px * 256 / 224), crop_px=side_px)


def square_side_px(size: Any, name: str) -> int:
    """Return the side of a square input, given as 224, (224, 224), (3, 224, 224) or {'height': 224, 'width': 224}."""
    if isinstance(size, Mapping):
        size = [size[key] for key in ("height", "width") if key in size] or list(size.values())
    sides = [int(length) for length in (size if isinstance(size, list | tuple | torch.Size) else [size])][-2:]
    if len(set(sides)) != 1 or sides[0] < 1:
        raise ModelError(f"{name} takes images of {' x '.join(map(str, sides))} pixels; hookx makes square ones")
    return sides[0]


def from_timm_config(config: Mapping[str, Any], name: str) -> Preprocessing | None:
    """Return what timm's data configuration says, or None if it asks for more than resizing and a centre crop."""
    side_px = square_side_px(config["input_size"], name)
    if config["crop_mode"] != "center":
        return None
    return Preprocessing(
        resize_px=math.floor(side_px / config["crop_pct"]),
        crop_px=side_px,
        mean=tuple(map(float, config["mean"])),
        std=tuple(map(float, config["std"])),
        interpolation=config["interpolation"],
    )


def try_transform(transform: Any, source: str, description: str = "", channels: int | None = None) -> Recorded:
    """Try a transform, which must turn an RGB image (PIL) into pixels (3, side, side), float32, on two images.

    With a loader of the user's own it gets what that returns, and may return any number of channels: it is tried on
    an image, and if that fails on bands (channels, height, width), floats from 0 to 1.

    `source` is its origin, for messages and for the plan. `description` tells what it does, in the same words in every
    process; its `repr` if empty.

    Raises:
        ModelError: it fails, returns something else, or returns different pixels at every call.
    """
    if isinstance(transform, ImageClassification) and len(transform.crop_size) == len(transform.resize_size) == 1:
        return from_preset(transform), None
    shapes = {_shape_of(transform, width, height, source, channels) for width, height in _EXAMPLE_SIZES_PX}
    sides_px = {side_px for _, side_px in shapes}
    if len(sides_px) > 1:
        raise ModelError(
            f"{source} returns images of {' and '.join(f'{side} x {side}' for side in sorted(sides_px))} pixels; "
            "a batch needs a single size"
        )
    (side_px,), made = sides_px, max(count for count, _ in shapes)
    # Memory addresses in a `repr` differ between processes.
    description = description or " ".join(re.sub(r" at 0x[0-9a-fA-F]+", "", repr(transform)).split())
    custom = f"{source}: {description}"
    return Preprocessing(side_px, side_px, (0.0,) * made, (1.0,) * made, "bilinear", custom=custom), transform


def from_preset(preset: Any, crop_px: int | None = None) -> Preprocessing:
    """Return what a preset of torchvision does; one that does not crop resizes to `crop_px`."""
    return Preprocessing(
        resize_px=preset.resize_size[0],
        crop_px=crop_px or preset.crop_size[0],
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=preset.interpolation.value,
        antialias=bool(preset.antialias),
    )


def _shape_of(
    transform: Callable[[Any], Any], width: int, height: int, source: str, channels: int | None
) -> tuple[int, int]:
    """Return how many channels a transform returns, and of which side."""
    noise = torch.randint(256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    example = to_pil_image(noise)
    size = f"{width} x {height} pixels"
    try:
        try:
            pixels, again = transform(example.copy()), transform(example.copy())
        except Exception:
            if channels is None:
                raise
            bands = torch.rand((channels, height, width), generator=torch.Generator().manual_seed(0))
            pixels, again = transform(bands.clone()), transform(bands.clone())
    except Exception as error:  # The user's code can raise anything.
        problem = f"{type(error).__name__}: {one_line(error)}"
        raise ModelError(f"{source} fails on an RGB image of {size}: {problem}") from error
    expected = "expected a float32 tensor of shape (3, side, side)"
    if not isinstance(pixels, Tensor):
        raise ModelError(f"{source} returned {type(pixels).__name__}; {expected}")
    is_square = pixels.ndim == 3 and pixels.shape[1] == pixels.shape[2]
    if pixels.dtype != torch.float32 or not is_square or (channels is None and pixels.shape[0] != 3):
        what = f"{str(pixels.dtype).removeprefix('torch.')} tensor of shape ({', '.join(map(str, pixels.shape))})"
        raise ModelError(f"{source} returned a {what} for an image of {size}; {expected}")
    if not torch.equal(pixels, again):
        raise ModelError(
            f"{source} is random: it returns different pixels for the same image",
            "remove what only training needs: random crops, flips, colours",
        )
    return int(pixels.shape[0]), int(pixels.shape[1])
