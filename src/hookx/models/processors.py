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
_BILINEAR = 2
_WHITE = 255
_SQUASHED_PX = 384  # ConvNeXt's processor crops below this size, and squashes from it on.
_KNOWN = (
    *("do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_convert_rgb", "do_reduce_labels"),
    *("image_mean", "image_std", "resample", "rescale_factor", "size", "crop_size", "crop_pct"),
    *("image_processor_type", "feature_extractor_type", "processor_class"),
)


def adapt(processor: Any, size_px: tuple[int, int] | None, fit: str | None) -> Recorded:
    """Return what a plan records of a processor, and its transform.

    A processor can make squares of another size than its own, and whatever it squashes images to. Anything else is
    left to hookx: then its mean, deviation, interpolation and proportions come without a transform.

    Raises:
        ModelError: it cannot be tried, or images are to fit otherwise, and it does more than hookx would.
    """
    name, settings = type(processor).__name__, json.loads(processor.to_json_string())
    own = try_transform(_transform(processor), name, json.dumps(settings, sort_keys=True))
    plain, own_fit = _as_preprocessing(settings)
    has_own_fit = fit in (None, own_fit)
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
    if plain is not None:
        return plain, None
    if has_own_fit:
        return own  # Its size stays, and the caller refuses it if --size requests another.
    raise ModelError(
        f"{name} does more than resize, crop and normalize images, so --fit {fit} cannot change how they fit",
        "leave out --fit, or replace it with --transform",
    )


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


def _as_preprocessing(settings: Mapping[str, Any]) -> tuple[Preprocessing | None, str]:
    """Return what hookx does in place of a processor, and how that fits images; '' if in no way that hookx knows.

    None for a processor that does more than resize, crop and normalize.
    """
    size, crop = (_sides(settings.get(key)) for key in ("size", "crop_size"))
    resample, share = settings.get("resample", _BILINEAR), settings.get("crop_pct")
    scales = settings.get("do_rescale") and abs(settings.get("rescale_factor", 0) * _WHITE - 1) < 1e-6
    more = [key for key, value in settings.items() if value not in (None, False) and key not in _KNOWN]
    if more or not settings.get("do_resize") or not scales or resample not in range(len(_INTERPOLATIONS)):
        return None, ""
    mean, std = settings.get("image_mean"), settings.get("image_std")
    if not settings.get("do_normalize") or mean is None or std is None:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    plain = Preprocessing(1, 1, tuple(map(float, mean)), tuple(map(float, std)), _INTERPOLATIONS[resample])
    shortest = size.get("shortest_edge")
    if settings.get("do_center_crop") and "height" in crop and not share:
        cropped_px = crop["height"], crop["width"]
        if shortest is not None:
            return plain.sized(cropped_px, (shortest, shortest)), "crop"
        covered_px = size.get("height", crop["height"]), size.get("width", crop["width"])
        return plain.sized(cropped_px, covered_px), ""  # It squashes, and then crops.
    if settings.get("do_center_crop"):
        return None, ""
    if "height" in size:
        size_px = size["height"], size["width"]
        return replace(plain.sized(size_px, size_px), fit="squash"), "squash"
    if shortest is not None and share and shortest < _SQUASHED_PX:
        covered = int(shortest / share)
        return plain.sized((shortest, shortest), (covered, covered)), "crop"
    if shortest is not None and share:
        return replace(plain.sized((shortest, shortest), (shortest, shortest)), fit="squash"), "squash"
    return None, ""


def _sides(size: Any) -> dict[str, int]:
    """Return the sides that a processor's size names, without those that are not set."""
    if isinstance(size, int):
        return {"height": size, "width": size}
    return {key: int(side) for key, side in (size or {}).items() if side}
