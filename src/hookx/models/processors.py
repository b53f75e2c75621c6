"""An image processor of transformers -> what a plan records: the processor itself, at its own size or another."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from hookx.errors import ModelError
from hookx.models.preprocessing import Recorded, size_text, try_transform
from hookx.plan import Preprocessing

_INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's numbers
_WHITE = 255


def adapt(processor: Any, size_px: tuple[int, int] | None, fit: str | None) -> Recorded:
    """Return what a plan records of a processor, and its transform.

    A processor can make squares of another size than its own, and whatever it squashes images to. Anything else is
    left to hookx: then its mean, deviation, interpolation and proportions come without a transform.
    """
    name, settings = type(processor).__name__, json.loads(processor.to_json_string())
    own = try_transform(_transform(processor), name, json.dumps(settings, sort_keys=True))
    plain = _as_preprocessing(settings)
    has_own_fit = fit is None or (plain is not None and fit == plain.fit)
    if has_own_fit and size_px in (None, own[0].size_px):
        return own
    if has_own_fit and size_px is not None and (changed := _sizes_for(settings, size_px)):
        try:
            described = json.dumps(settings | changed, sort_keys=True)
            recorded, transform = try_transform(_transform(processor, **changed), name, described)
            if recorded.size_px == size_px:
                return replace(recorded, size=size_text(size_px)), transform
        except ModelError:  # It takes no sizes with a call.
            pass
    return own if plain is None else (plain, None)


def _transform(processor: Any, **changed: Any) -> Callable[[Any], Tensor]:
    return lambda image: processor(images=image, return_tensors="pt", **changed)["pixel_values"][0]


def _sizes_for(settings: Mapping[str, Any], size_px: tuple[int, int]) -> dict[str, dict[str, int]]:
    """Return the sizes that make a processor return images of another size; {} if it has none that would."""
    height, width = size_px
    size, crop = (_sides(settings.get(key)) for key in ("size", "crop_size"))
    if not settings.get("do_center_crop") or not crop:
        if "height" in size:
            return {"size": {"height": height, "width": width}}
        return {"size": {"shortest_edge": height}} if set(size) == {"shortest_edge"} and height == width else {}
    cropped = {"crop_size": {"height": height, "width": width}}
    if "height" in size and "height" in crop:
        scaled = {
            "height": round(height * size["height"] / crop["height"]),
            "width": round(width * size["width"] / crop["width"]),
        }
        return {"size": scaled, **cropped}
    if set(size) == {"shortest_edge"} and height == width and crop.get("height") == crop.get("width"):
        return {"size": {"shortest_edge": round(height * size["shortest_edge"] / crop["height"])}, **cropped}
    return {}


def _as_preprocessing(settings: Mapping[str, Any]) -> Preprocessing | None:
    """Return what hookx does in place of a processor; None if that does more than resize, crop and normalize."""
    size, crop = (_sides(settings.get(key)) for key in ("size", "crop_size"))
    resample = settings.get("resample", 2)
    scales = settings.get("do_rescale") and abs(settings.get("rescale_factor", 0) * _WHITE - 1) < 1e-6
    if not settings.get("do_resize") or not scales or settings.get("do_pad") or resample not in range(6):
        return None
    mean, std = settings.get("image_mean"), settings.get("image_std")
    if not settings.get("do_normalize") or mean is None or std is None:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    plain = Preprocessing(1, 1, tuple(map(float, mean)), tuple(map(float, std)), _INTERPOLATIONS[resample])
    shortest = size.get("shortest_edge")
    if settings.get("do_center_crop") and "height" in crop:
        if shortest is None and size.get("height") != size.get("width"):
            return None
        covered = shortest or size["height"]
        return plain.sized((crop["height"], crop["width"]), (covered, covered))
    if "height" in size:
        return replace(plain.sized((size["height"], size["width"]), (size["height"], size["width"])), fit="squash")
    if shortest is not None and (share := settings.get("crop_pct")):
        covered = shortest if shortest >= _UNCROPPED_PX else int(shortest / share)
        return plain.sized((shortest, shortest), (covered, covered))
    return None


_UNCROPPED_PX = 384  # ConvNeXt's processor squashes to this size and larger ones


def _sides(size: Any) -> dict[str, int]:
    """Return the sides that a processor's size names, without those that are not set."""
    if isinstance(size, int):
        return {"height": size, "width": size}
    return {key: int(side) for key, side in (size or {}).items() if side}
