"""What a picture shows: layers as maps or values, which of their channels, and the words about them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hookx.errors import HookxError, UsageError
from hookx.layers.address import Address
from hookx.options import ChannelReduction, LookOptions
from hookx.pictures.attention import Attention
from hookx.pictures.colours import Pixels, find_colormap
from hookx.pictures.drawing import Content
from hookx.pictures.places import Places, Reading, TokenGrid

REDUCTIONS: dict[ChannelReduction, Callable[..., Any]] = {"mean": np.mean, "max": np.max, "norm": np.linalg.norm}
_MAX_MAPS, _MAX_VALUES = 4096, 65_536  # in one picture


@dataclass(frozen=True)
class ShownLayer:
    """One layer of one image, ready to be drawn: all of its maps or values, and the words about them."""

    address: str
    shape: tuple[int, ...]  # as the layer returned it, for one image
    content: Content
    what: str  # follows the number of maps: 'channels of 7 × 7'
    note: str = ""
    unit: str = "channel"


@dataclass(frozen=True)
class ShownImage:
    """One image, and what one model made of it."""

    image: str
    model: str
    weights: str
    photo: Pixels | None  # the input, as the model saw it
    input: str  # the words about the input
    layers: Sequence[ShownLayer]


def show_input(pixels_CHW: Tensor | None, size_px: tuple[int, int]) -> tuple[Pixels | None, str]:
    """Return a model's input as an image, and the words about it; `size_px` is its height and width."""
    what = f"{size_px[0]} × {size_px[1]} pixels as the model saw them"
    if pixels_CHW is None:
        return None, what
    if pixels_CHW.shape[0] != 3:
        what += f", the mean of {pixels_CHW.shape[0]} channels" if pixels_CHW.shape[0] > 1 else ""
        pixels_CHW = pixels_CHW.to(torch.float32).mean(0, keepdim=True).expand(3, -1, -1)
    if pixels_CHW.dtype != torch.uint8:  # From the model's own transform, whose normalisation is not known.
        low, high = pixels_CHW.aminmax()
        pixels_CHW = ((pixels_CHW - low) / max(float(high - low), 1e-12) * 255).round().to(torch.uint8)
        what += ", from their least to their greatest value"
    return pixels_CHW.permute(1, 2, 0).numpy(), what


def show_layer(address: str, activation: Tensor, places: Places) -> ShownLayer:
    """Turn one image's activation into maps or values, as its model lays them out."""
    return show_activation(address, activation, places.read(Address.parse(address), tuple(activation.shape)))


def show_activation(address: str, activation: Tensor, reading: Reading) -> ShownLayer:
    """Turn one image's activation into maps or values, as a reading lays them out."""
    note, shape = reading.note, tuple(activation.shape)
    if activation.is_complex():
        activation, note = activation.abs(), "; ".join(filter(None, [note, "magnitudes of complex values"]))
    values = np.atleast_1d(reading.maps(activation.double()).numpy(force=True))
    content = Content(values, range(len(values)), reading.on_photo)
    if not content.are_maps:
        return ShownLayer(address, shape, content, "values", note, "value")
    size = f"{values.shape[1]} × {values.shape[2]}"
    what, unit = f"channels of {size}", "channel"
    if "row" in reading.roles:
        what, unit = f"maps of {size}" if "channel" in reading.roles else f"matrix of {size}", "map"
    elif "channel" not in reading.roles:
        what, unit = f"map of {size}", "map"
    if "token" in reading.roles and reading.grid is not None:
        count = shape[reading.roles.index("token")]
        others = reading.grid.without_place(count)
        what += " patches"
        if others:
            what += f", without token{'s' * (len(others) > 1)} {format_ranges(others)} of {count} (no patch)"
    return ShownLayer(address, shape, content, what, note, unit)


def show_attention(attention: Attention, grid: TokenGrid | None) -> ShownLayer:
    """Turn one image's attention into one map per head: how the class token, or the mean of all tokens, sees patches.

    `grid` holds the places of the keys; without it, or within windows, a head's map is its matrix of weights.
    """
    weights = attention.weights_HQK.double()
    heads, queries, keys = weights.shape
    if attention.windows > 1 or grid is None:
        within = attention.windows > 1
        why = f"within {attention.windows} windows" if within else "the places of its keys are not known"
        content = Content(weights.numpy(force=True), range(heads), on_photo=False)
        what, unit = f"heads, {queries} queries (downwards) by {keys} keys", "window's head" if within else "head"
        return ShownLayer(attention.path, (heads, queries, keys), content, what, f"not folded: {why}", unit)
    others = grid.without_place(keys) if queries == keys else ()
    if others:
        looks, who = weights[:, others[0]], f"token {others[0]} (no patch)"
    else:
        looks, who = weights.mean(1), "the one query" if queries == 1 else f"all {queries} tokens (their mean)"
    content = Content(Reading(("channel", "token"), grid).maps(looks).numpy(force=True), range(heads))
    what = f"heads, from {who} to {grid.height} × {grid.width} patches"
    return ShownLayer(attention.path, (heads, queries, keys), content, what, unit="head")


class Look:
    """How activations or attention are drawn; made before anything is computed, because it checks the options.

    Raises:
        UsageError: the channels or the colour map are invalid.

    Example:
        >>> look = Look(LookOptions(channels="0-2,7", reduce="mean"))
        >>> look.channels, look.colormap, look.suffix
        ((0, 1, 2, 7), 'inferno', '-mean')
    """

    def __init__(self, options: LookOptions, attention: bool = False) -> None:
        self.options, self.attention = options, attention
        self.channels = _parse_channels(options.channels)  # empty for all
        self.is_selective = bool(options.channels or options.top)
        self.as_heat = attention or bool(options.reduce)  # maps lie over the image
        self.colormap = options.colormap or ("inferno" if self.as_heat else "viridis")
        find_colormap(self.colormap)
        # Ends a picture's name, so that a picture does not replace one of another kind.
        self.suffix = "-attention" * attention + (f"-{options.reduce}" if options.reduce else "")


def _parse_channels(text: str) -> tuple[int, ...]:
    """Return the numbers that ranges such as '0-63,128' name, once each, in their order."""
    numbers: dict[int, None] = {}
    for piece in filter(None, (piece.strip() for piece in text.split(","))):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", piece, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last - first >= _MAX_VALUES:
            raise UsageError(f"invalid --channels '{piece}': expected numbers and ranges, as in 0-63,128")
        numbers.update(dict.fromkeys(range(first, last + 1)))
    return tuple(numbers)


def choose(shown: ShownLayer, look: Look) -> tuple[Content, str]:
    """Return the maps or values to draw, and a sentence that tells which they are.

    Example:
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
    if reduce and content.are_maps:
        with np.errstate(invalid="ignore", over="ignore"):
            content = content.merge(REDUCTIONS[reduce](content.values, axis=0))
        sentence = f"{reduce} of {sentence}"
    max_drawn = _MAX_MAPS if content.are_maps else _MAX_VALUES
    if len(content.numbers) > max_drawn:
        raise HookxError(
            f"{shown.address} has {len(content.numbers):,} {shown.unit}s; a picture shows at most {max_drawn:,}",
            f"choose some: --top 256, or --channels 0-{max_drawn - 1}",
        )
    return content, sentence


def find_strongest(content: Content) -> list[int]:
    """Return the positions of maps or values, the largest norm first; NaN and infinity count as 0."""
    finite = np.where(np.isfinite(content.values), content.values, 0).reshape(len(content.values), -1)
    with np.errstate(over="ignore"):
        norms = np.linalg.norm(finite, axis=1)
    return [int(position) for position in np.argsort(-norms, stable=True)]


def format_ranges(numbers: Sequence[int]) -> str:
    """Write numbers as ranges, at most eight.

    Example:
        >>> format_ranges((0, 1, 2, 3, 7, 9, 10))
        '0-3, 7, 9, 10'
    """
    by_offset = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in run] for _, run in by_offset]
    pieces = [piece for run in runs for piece in ([f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run))]
    return ", ".join(pieces if len(pieces) <= 8 else [*pieces[:7], "…"])
