"""The images of a picture: their files by key, and how a model's input is shown."""

from __future__ import annotations

import torch
from torch import Tensor

from hookx.images.listing import list_images
from hookx.options import Paths, list_paths
from hookx.pictures.page import Pixels


def list_files(images: Paths) -> dict[str, str]:
    """Return the file of each image key."""
    listed = list_images(list_paths(images))
    return dict(zip(listed.keys, listed.files, strict=True))


def show_input(pixels_CHW: Tensor | None, side_px: int) -> tuple[Pixels | None, str]:
    """Return a model's input as an image, and the words about it."""
    what = f"{side_px} × {side_px} pixels as the model saw them"
    if pixels_CHW is None:
        return None, what
    if pixels_CHW.dtype != torch.uint8:  # From the model's own transform, whose normalisation is not known.
        low, high = pixels_CHW.aminmax()
        pixels_CHW = ((pixels_CHW - low) / max(float(high - low), 1e-12) * 255).round().to(torch.uint8)
        what += ", from their least to their greatest value"
    photo: Pixels = pixels_CHW.permute(1, 2, 0).numpy()
    return photo, what
