"""Which channels of a layer a picture shows, and in which colours."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hookx.errors import HookxError, UsageError
from hookx.options import ChannelReduction, LookOptions
from hookx.pictures.bars import Vector
from hookx.pictures.colours import find_colormap
from hookx.pictures.contents import ShownLayer, format_ranges
from hookx.pictures.grids import Maps

REDUCTIONS: dict[ChannelReduction, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "mean": lambda values_CHW: values_CHW.mean(0),
    "max": lambda values_CHW: values_CHW.max(0),
    "norm": lambda values_CHW: np.sqrt(np.square(values_CHW).sum(0)),
}
_MAX_MAPS, _MAX_VALUES = 4096, 65_536  # in one picture


@dataclass(frozen=True)
class Look:
    """How activations or attention are drawn; made before anything is computed, because it checks the options.

    Raises:
        UsageError: the channels or the colour map are invalid.

    Example:
        >>> look = Look(LookOptions(channels="0-2,7", reduce="mean"))
        >>> look.channels, look.colormap, look.suffix
        ((0, 1, 2, 7), 'inferno', '-mean')
    """

    options: LookOptions
    attention: bool = False

    def __post_init__(self) -> None:
        find_colormap(self.colormap)
        self.channels  # noqa: B018

    @property
    def channels(self) -> tuple[int, ...]:
        """The numbers of the channels, in their order; empty for all."""
        numbers: dict[int, None] = {}
        for piece in filter(None, (piece.strip() for piece in self.options.channels.split(","))):
            match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", piece, re.ASCII)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if first > last or last - first >= _MAX_VALUES:
                raise UsageError(f"invalid --channels '{piece}': expected numbers and ranges, as in 0-63,128")
            numbers.update(dict.fromkeys(range(first, last + 1)))
        return tuple(numbers)

    @property
    def is_selective(self) -> bool:
        """Whether the user chose which channels come first."""
        return bool(self.options.channels or self.options.top)

    @property
    def as_heat(self) -> bool:
        """Whether maps lie over the image."""
        return self.attention or bool(self.options.reduce)

    @property
    def colormap(self) -> str:
        return self.options.colormap or ("inferno" if self.as_heat else "viridis")

    @property
    def suffix(self) -> str:
        """The end of a picture's name, so that a picture does not replace one of another kind."""
        return "-attention" * self.attention + (f"-{self.options.reduce}" if self.options.reduce else "")


def choose(shown: ShownLayer, look: Look) -> tuple[Maps | Vector, str]:
    """Return the maps or values to draw, and a sentence that tells which they are.

    Example:
        >>> import torch
        >>> from hookx.pictures.contents import show_activation
        >>> from hookx.pictures.places import LAYOUTS, Reading
        >>> rising = torch.arange(4.0).reshape(4, 1, 1).expand(4, 2, 2)
        >>> maps, sentence = choose(show_activation("conv", rising, Reading(LAYOUTS["nchw"])), Look(LookOptions(top=2)))
        >>> maps.numbers, sentence
        ((3, 2), 'the 2 strongest of 4 channels of 2 × 2')
    """
    content, count = shown.content, len(shown.content.numbers)
    channels, top, reduce = look.channels, look.options.top, look.options.reduce
    if count == 1:
        return content, re.sub(r"^1 (?=matrix|map of)", "", f"1 {shown.what}")
    sentence = f"{count:,} {shown.what}"
    if channels:
        if max(channels) >= count:
            raise UsageError(f"--channels {max(channels)}: {shown.address} has {count:,} {shown.unit}s (0-{count - 1})")
        content = content.pick(channels)
        sentence = f"{len(channels):,} of {sentence}: {format_ranges(channels)}"
    if top is not None:
        are_all = top >= len(content.numbers)
        content = content.pick(find_strongest(content)[:top])
        sentence = f"{sentence}, the strongest first" if are_all else f"the {top:,} strongest of {sentence}"
    if reduce and isinstance(content, Maps):
        with np.errstate(invalid="ignore", over="ignore"):
            content = content.merge(REDUCTIONS[reduce](content.values_CHW))
        sentence = f"{reduce} of {sentence}"
    max_drawn = _MAX_MAPS if isinstance(content, Maps) else _MAX_VALUES
    if len(content.numbers) > max_drawn:
        raise HookxError(
            f"{shown.address} has {len(content.numbers):,} {shown.unit}s; a picture shows at most {max_drawn:,}",
            f"choose some: --top 256, or --channels 0-{max_drawn - 1}",
        )
    return content, sentence


def find_strongest(content: Maps | Vector) -> list[int]:
    """Return the positions of maps or values, the largest norm first; NaN and infinity count as 0."""
    values = content.values_CHW if isinstance(content, Maps) else content.values
    finite = np.where(np.isfinite(values), values, 0).reshape(len(values), -1)
    with np.errstate(over="ignore"):
        norms = np.linalg.norm(finite, axis=1)
    return [int(position) for position in np.argsort(-norms, stable=True)]
