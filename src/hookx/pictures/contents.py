"""What a model made of an image: its layers as maps or vectors, and what captions say about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hookx.layers.address import Address
from hookx.pictures.attention import Attention
from hookx.pictures.bars import Vector
from hookx.pictures.grids import Maps
from hookx.pictures.page import Pixels
from hookx.pictures.places import Places, Reading, TokenGrid


@dataclass(frozen=True)
class ShownLayer:
    """One layer of one image, ready to be drawn: all of its maps or values, and the words about them."""

    address: str
    shape: tuple[int, ...]  # as the layer returned it, for one image
    content: Maps | Vector
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


def show_layer(address: str, activation: Tensor, places: Places) -> ShownLayer:
    """Turn one image's activation into maps or a vector, as its model lays them out."""
    return show_activation(address, activation, places.read(Address.parse(address), tuple(activation.shape)))


def show_activation(address: str, activation: Tensor, reading: Reading) -> ShownLayer:
    """Turn one image's activation into maps or a vector.

    Example:
        >>> import torch
        >>> from hookx.pictures.places import LAYOUTS
        >>> shown = show_activation("layer4", torch.ones(512, 7, 7), Reading(LAYOUTS["nchw"]))
        >>> shown.content.values_CHW.shape, shown.what
        ((512, 7, 7), 'channels of 7 × 7')
    """
    note = reading.note
    if activation.is_complex():
        activation, note = activation.abs(), "; ".join(filter(None, [note, "magnitudes of complex values"]))
    values = reading.maps(activation.double()).numpy(force=True)
    shape = tuple(activation.shape)
    if values.ndim < 2:
        return ShownLayer(address, shape, Vector(values.reshape(-1), _number(values.size)), "values", note, "value")
    size = f"{values.shape[1]} × {values.shape[2]}"
    what, unit = f"channels of {size}", "channel"
    if "row" in reading.roles:
        what, unit = f"maps of {size}" if "channel" in reading.roles else f"matrix of {size}", "map"
    elif "channel" not in reading.roles:
        what, unit = f"map of {size}", "map"
    if "token" in reading.roles and reading.grid is not None:
        what += " patches" + _name_left_out(reading.grid, shape[reading.roles.index("token")])
    return ShownLayer(address, shape, Maps(values, _number(len(values)), reading.on_photo), what, note, unit)


def show_attention(attention: Attention, grid: TokenGrid | None) -> ShownLayer:
    """Turn one image's attention into one map per head: how the class token, or the mean of all tokens, sees patches.

    Args:
        attention: the weights of all heads.
        grid: the places of its keys; None if they are not known.
    """
    weights = attention.weights_HQK.double()
    heads, queries, keys = weights.shape
    unit = "head" if attention.windows == 1 else "window's head"
    if grid is None or attention.windows > 1:
        why = f"within {attention.windows} windows" if attention.windows > 1 else "the places of its keys are not known"
        note, what = f"not folded: {why}", f"heads, {queries} queries (downwards) by {keys} keys"
        maps = Maps(weights.numpy(force=True), _number(heads), on_photo=False)
        return ShownLayer(attention.path, (heads, queries, keys), maps, what, note, unit)
    others = grid.without_place(keys) if queries == keys else ()
    if others:
        looks, who = weights[:, others[0]], f"token {others[0]} (no patch)"
    else:
        looks, who = weights.mean(1), "the one query" if queries == 1 else f"all {queries} tokens (their mean)"
    maps = Maps(Reading(("channel", "token"), grid).maps(looks).numpy(force=True), _number(heads))
    what = f"heads, from {who} to {grid.height} × {grid.width} patches"
    return ShownLayer(attention.path, (heads, queries, keys), maps, what, "", unit)


def format_ranges(numbers: Sequence[int]) -> str:
    """Write numbers as ranges, at most eight.

    Example:
        >>> format_ranges((0, 1, 2, 3, 7, 9, 10))
        '0-3, 7, 9, 10'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    pieces = [piece for run in runs for piece in ([f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run))]
    return ", ".join(pieces if len(pieces) <= 8 else [*pieces[:7], "…"])


def _name_left_out(grid: TokenGrid, count: int) -> str:
    others = grid.without_place(count)
    return f", without token{'s' * (len(others) > 1)} {format_ranges(others)} of {count} (no patch)" if others else ""


def _number(count: int) -> tuple[int, ...]:
    return tuple(range(count))
