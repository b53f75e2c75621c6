"""What a loader of the user's own makes of a file, and how its bands are prepared as any image's are."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hookx.images.files import File
from hookx.images.opening import Content
from hookx.images.unreadable import UnreadableError

Loader = Callable[[Any], Any]
"""Takes a path, or an open binary file for a member of an archive; returns a PIL image, or bands (C, H, W)."""

_MAX_REASON_LENGTH = 300  # characters
_EXPECTED = "expected a PIL image, or an array (channels, height, width) of uint8, or of floats from 0 to 1"


class WrongResultError(UnreadableError):
    """A loader returned something else than an image: its code is to blame, rather than the file."""


def load_own(loader: Loader, file: File, content: Content, channels: int | None) -> Image.Image | Tensor:
    """Let a loader read a file that is open; return a PIL image, or a tensor (C, H, W) of uint8 or float32.

    A loader gets the path of a loose file, and otherwise `content`. It reads a path by itself, so what the system could
    not read is found by reading the file once more if it fails.

    Args:
        channels: how many there must be; None for any number.

    Raises:
        WrongResultError: it returned something else.
        OSError: the system cannot read the file.
        Exception: whatever the loader raises.
    """
    is_loose = isinstance(file, str)
    try:
        result = loader(file if is_loose else content)
        if isinstance(result, Image.Image):
            result.load()
    except Exception as error:
        if not is_loose:
            raise
        content.read_through()
        if isinstance(error, OSError) and error.errno is not None:
            raise
        # All machines store the same reason, so it names no path.
        text = " ".join(str(error).split())
        for path in (os.path.realpath(str(file)), os.path.abspath(str(file)), str(file)):
            text = text.replace(path, "the file")
        name = type(error).__name__
        raise UnreadableError(f"{name}: {text}"[:_MAX_REASON_LENGTH] if text else name) from error
    if isinstance(result, Image.Image):
        if channels not in (None, 3):
            raise WrongResultError(
                f"the loader returned an image, which has 3 channels as RGB; the model takes {channels}"
            )
        return result
    return _check_bands(result, channels)


def _check_bands(result: Any, channels: int | None) -> Tensor:
    """Return bands as a tensor of uint8 or float32 in this process's memory."""
    if isinstance(result, np.ndarray):
        if result.dtype.kind not in "fu" or result.dtype.names is not None:
            raise WrongResultError(f"the loader returned an array of {result.dtype}; {_EXPECTED}")
        if result.dtype.kind == "u" and result.dtype.itemsize > 1:
            raise WrongResultError(f"the loader returned an array of {result.dtype.newbyteorder('=')}; {_EXPECTED}")
        native = np.array(result, np.uint8 if result.dtype.kind == "u" else np.float32, order="C")
        bands = torch.from_numpy(native)
    elif isinstance(result, Tensor):
        bands = result.detach().cpu()
        if bands.dtype != torch.uint8 and not bands.dtype.is_floating_point:
            kind = str(bands.dtype).removeprefix("torch.")
            raise WrongResultError(f"the loader returned a tensor of {kind}; {_EXPECTED}")
        bands = bands.contiguous() if bands.dtype == torch.uint8 else bands.to(torch.float32).contiguous()
    else:
        what = "None" if result is None else f"{type(result).__name__}"
        raise WrongResultError(f"the loader returned {what}; {_EXPECTED}")
    shape = f"({', '.join(map(str, bands.shape))})"
    if bands.ndim != 3 or not bands.numel():
        hint = ": add the channel, as in array[None]" if bands.ndim == 2 else ""
        raise WrongResultError(f"the loader returned the shape {shape}; {_EXPECTED}{hint}")
    if channels is not None and bands.shape[0] != channels:
        is_last = bands.shape[2] == channels
        hint = "; move the channels to the front: np.moveaxis(array, -1, 0)" if is_last else ""
        count = f"{bands.shape[0]} channel{'s' * (bands.shape[0] != 1)}"
        raise WrongResultError(f"the loader returned {count}, {shape}; the model takes {channels}{hint}")
    if bands.dtype == torch.float32:
        low, high = (float(value) for value in bands.aminmax())
        if not (low >= 0 and high <= 1):  # also NaN
            values = "values that are not finite" if not np.isfinite([low, high]).all() else f"{low:g} to {high:g}"
            raise WrongResultError(f"the loader returned floats of {values}; {_EXPECTED}")
    return bands


def resize_bands(bands_CHW: Tensor, resize: Callable[[Image.Image, int], Image.Image]) -> Tensor:
    """Resize bands by Pillow, one by one, as it resizes the channels of an image; floats stay between 0 and 1.

    `resize` takes a band and its number.
    """
    resized = [np.array(resize(Image.fromarray(band), number)) for number, band in enumerate(bands_CHW.numpy())]
    return torch.from_numpy(np.stack(resized)).clamp_(0, 1 if bands_CHW.dtype == torch.float32 else 255)
