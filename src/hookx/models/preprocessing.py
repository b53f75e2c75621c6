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


def imagenet_preprocessing(size_px: int | tuple[int, int] = 224) -> Preprocessing:
    """Return what most image classifiers were trained with, for a model that does not say.

    `size_px` is the height and the width of the model's input, or the side of a square one.

    Example:
        >>> str(imagenet_preprocessing())
        'resize 256 (bilinear), crop 224, mean 0.485,0.456,0.406, std 0.229,0.224,0.225'
    """
    height, width = (size_px, size_px) if isinstance(size_px, int) else size_px
    return IMAGENET.sized((height, width), (round(height * 256 / 224), round(width * 256 / 224)))


def sides_px(size: Any, name: str) -> tuple[int, int]:
    """Return the height and the width of an input.

    Example:
        >>> [sides_px(size, "net") for size in (224, (256, 128), (3, 256, 128), {"height": 256, "width": 128})]
        [(224, 224), (256, 128), (256, 128), (256, 128)]
    """
    if isinstance(size, Mapping):
        size = [size[key] for key in ("height", "width") if key in size] or list(size.values())
    sides = [int(length) for length in (size if isinstance(size, list | tuple | torch.Size) else [size])][-2:]
    if not sides or min(sides) < 1:
        raise ModelError(f"{name} takes images of {' x '.join(map(str, sides)) or 'no'} pixels")
    return sides[0], sides[-1]


def at_size(
    preprocessing: Preprocessing, size_px: tuple[int, int] | None, fit: str | None, name: str = "this model"
) -> Preprocessing:
    """Return a preprocessing for an input of another size, or with images that fit otherwise; None keeps either.

    What is resized before cropping grows with the size, so that the middle of an image is seen as before.

    Raises:
        ModelError: a transform of the model's own cannot be changed.

    Example:
        >>> str(at_size(IMAGENET, (448, 448), None))[:34], str(at_size(IMAGENET, None, "squash"))[:30]
        ('resize 512 (bilinear), crop 448, m', 'squash to 224 x 224 (bilinear)')
    """
    native_px, covered_px = preprocessing.size_px, preprocessing.covered_px
    size_px, fit = size_px or native_px, fit or preprocessing.fit
    if (size_px, fit) == (native_px, preprocessing.fit):
        return preprocessing
    if preprocessing.custom:
        flag = "--size" if size_px != native_px else "--fit"
        raise ModelError(
            f"{name} has its own preprocessing ({preprocessing}), which {flag} cannot change",
            f"leave out {flag}, or replace it with --transform",
        )
    if fit == "crop":
        covered_px = (
            round(size_px[0] * covered_px[0] / native_px[0]),
            round(size_px[1] * covered_px[1] / native_px[1]),
        )
    else:
        covered_px = size_px
    asked = size_text(size_px) if size_px != native_px else preprocessing.size
    return replace(preprocessing.sized(size_px, covered_px), fit=fit, size=asked)


def size_text(size_px: tuple[int, int]) -> str:
    """Return a size as `--size` takes it and a plan records it."""
    return f"{size_px[0]}x{size_px[1]}"


def from_timm_config(config: Mapping[str, Any], name: str) -> Preprocessing | None:
    """Return what timm's data configuration says, or None if it asks for more than resizing and a centre crop."""
    height, width = sides_px(config["input_size"], name)
    if config["crop_mode"] != "center":
        return None
    mean, std = (tuple(map(float, config[key])) for key in ("mean", "std"))
    covered_px = math.floor(height / config["crop_pct"]), math.floor(width / config["crop_pct"])
    return Preprocessing(height, height, mean, std, config["interpolation"]).sized((height, width), covered_px)


def try_transform(transform: Any, source: str, description: str = "", channels: int | None = None) -> Recorded:
    """Try a transform, which must turn an RGB image (PIL) into pixels (3, height, width), float32, on two images.

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
    sizes_px = {(height_px, width_px) for _, height_px, width_px in shapes}
    if len(sizes_px) > 1:
        raise ModelError(
            f"{source} returns images of {' and '.join(f'{h} x {w}' for h, w in sorted(sizes_px))} pixels; "
            "a batch needs a single size"
        )
    (size_px,), made = sizes_px, max(count for count, *_ in shapes)
    # Memory addresses in a `repr` differ between processes.
    description = description or " ".join(re.sub(r" at 0x[0-9a-fA-F]+", "", repr(transform)).split())
    custom = f"{source}: {description}"
    recorded = Preprocessing(1, 1, (0.0,) * made, (1.0,) * made, "bilinear", custom=custom)
    return recorded.sized(size_px, size_px), transform


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
) -> tuple[int, int, int]:
    """Return how many channels a transform returns, and of which height and width."""
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
    expected = "expected a float32 tensor of shape (3, height, width)"
    if not isinstance(pixels, Tensor):
        raise ModelError(f"{source} returned {type(pixels).__name__}; {expected}")
    is_image = pixels.ndim == 3 and pixels.numel() > 0 and (channels is not None or pixels.shape[0] == 3)
    if pixels.dtype != torch.float32 or not is_image:
        what = f"{str(pixels.dtype).removeprefix('torch.')} tensor of shape ({', '.join(map(str, pixels.shape))})"
        raise ModelError(f"{source} returned a {what} for an image of {size}; {expected}")
    if not torch.equal(pixels, again):
        raise ModelError(
            f"{source} is random: it returns different pixels for the same image",
            "remove what only training needs: random crops, flips, colours",
        )
    made, made_height, made_width = pixels.shape
    return made, made_height, made_width
