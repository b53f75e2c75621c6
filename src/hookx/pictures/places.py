"""Where in the image the values of an activation lie: learnt from the model by experiment, not guessed.

Two experiments tell. An image twice as wide makes maps twice as wide, so the dimension that follows it is the width,
and the one that stays is the channel. And where a strip of the image is NaN, the tokens that become NaN are those that
saw it: strip by strip, each token of a transformer is given its place, or is shown to have none (a class token).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from hookx.capture.hooks import Taps, tap
from hookx.capture.modules import modules_of
from hookx.capture.probe import example_images, probe
from hookx.capture.runner import ForwardIsDone, Runner
from hookx.capture.tensors import Parts, tensors_given, tensors_in
from hookx.errors import CaptureError, LayerError
from hookx.layers.address import Address
from hookx.layers.tree import Layer, TensorInfo

Role = Literal["channel", "height", "width", "token", "row", "column"]
LAYOUTS: dict[str, tuple[Role, ...]] = {
    "nchw": ("channel", "height", "width"),
    "nhwc": ("height", "width", "channel"),
    "tokens": ("token", "channel"),
}
_PLANES: tuple[Role, ...] = ("channel", "row", "column")


@dataclass(frozen=True)
class TokenGrid:
    """The tokens of a sequence that stand for places of the image: a grid, row by row.

    Example:
        >>> TokenGrid(2, 2, (1, 2, 3, 4)).without_place(count=5)
        (0,)
    """

    height: int
    width: int
    tokens: tuple[int, ...]

    def without_place(self, count: int) -> tuple[int, ...]:
        """Return the tokens of a sequence that stand for no place, such as a class token."""
        placed = set(self.tokens)
        return tuple(token for token in range(count) if token not in placed)


@dataclass(frozen=True)
class Reading:
    """What each dimension of one image's activation means; `note` is what a user should know of how it was read."""

    roles: tuple[Role, ...]
    grid: TokenGrid | None = None
    note: str = ""

    def maps(self, activation: Tensor) -> Tensor:
        """Return an activation as maps (channels, height, width), or as a vector if it has no places.

        Example:
            >>> nhwc = Reading(LAYOUTS["nhwc"])
            >>> nhwc.maps(torch.ones(7, 7, 768)).shape
            torch.Size([768, 7, 7])
            >>> Reading(LAYOUTS["tokens"], TokenGrid(14, 14, tuple(range(1, 197)))).maps(torch.ones(197, 384)).shape
            torch.Size([384, 14, 14])
        """
        roles = list(self.roles)
        if "token" in roles and self.grid is not None:
            activation = activation.movedim(roles.index("token"), -1)[..., list(self.grid.tokens)]
            activation = activation.unflatten(-1, (self.grid.height, self.grid.width))
            roles = [*(role for role in roles if role != "token"), "height", "width"]
        if len(roles) == 1:
            return activation
        has_channels = "channel" in roles
        activation = activation.movedim(roles.index("channel"), 0) if has_channels else activation.unsqueeze(0)
        # A map of one pixel is a value without a place.
        return activation.flatten() if activation.shape[1:] == (1, 1) else activation

    @property
    def on_photo(self) -> bool:
        """Whether the maps cover the image."""
        return {"height", "width"} <= set(self.roles) or ("token" in self.roles and self.grid is not None)


@dataclass
class Places:
    """What two experiments showed of a model; `reading` tells of one activation where it lies.

    Args:
        square: every layer, probed with square images.
        wide: the same with images twice as wide; empty if the model takes square ones only.
        find_grid: the second experiment, for a number of tokens; called when there is an activation of such.
        layout: what the user says: 'nchw', 'nhwc' or 'tokens'; '' to learn it.
    """

    square: Mapping[Address, TensorInfo]
    wide: Mapping[Address, TensorInfo]
    find_grid: Callable[[int, Sequence[int]], TokenGrid | None]
    layout: str = ""
    _grids: dict[int, TokenGrid | None] = field(default_factory=dict)

    def reading(self, address: Address, shape: tuple[int, ...]) -> Reading:
        """Tell what the dimensions of a stored activation mean; `shape` is that of one image.

        Raises:
            LayerError: it has more dimensions than a picture can show.
        """
        reduction = address.reduction
        if reduction is not None and reduction.name in ("cls", "flatten"):
            return Reading(("channel",))
        whole = replace(address, reduction=None)
        found = self.square.get(whole)
        if reduction is not None and found is not None and reduction.shape(found.shape) == shape:
            of_whole = self._reading(whole, found.shape)
            roles = tuple(role for dim, role in enumerate(of_whole.roles, 1) if dim not in reduction.dims)
            return replace(of_whole, roles=roles, grid=of_whole.grid if "token" in roles else None)
        return self._reading(whole if found is not None and found.shape == shape else None, shape)

    def depths(self) -> dict[Address, float]:
        """Return how deep in a forward pass each activation is had; a module returns after those within it."""
        entered = {address.path: depth for depth, address in enumerate(self.square)}
        returned = dict(entered)
        for path, depth in entered.items():
            while "." in path:
                path = path.rpartition(".")[0]
                if path in returned:
                    returned[path] = max(returned[path], depth)
        if "." in returned:
            returned["."] = len(self.square)
        # Of those that return together, the innermost does first.
        return {
            address: entered[address.path] if address.is_input else returned[address.path] + 1 / (2 + len(address.path))
            for address in self.square
        }

    def _reading(self, address: Address | None, shape: tuple[int, ...]) -> Reading:
        match len(shape):
            case 0 | 1:
                return Reading(("channel",))
            case 2:
                return self._reading_of_tokens(address, shape)
            case 3:
                return self._reading_of_maps(address, shape)
        raise LayerError(
            f"'{address}' is {','.join(map(str, ('N', *shape)))}: more dimensions than a picture has",
            "reduce it, as in @mean2, or choose another layer",
        )

    def _reading_of_maps(self, address: Address | None, shape: tuple[int, ...]) -> Reading:
        if self.layout in ("nchw", "nhwc"):
            return Reading(LAYOUTS[self.layout])
        wide = self._wide_shape(address)
        if len(wide) == 3 and wide != shape:
            fitting = [roles for roles in (LAYOUTS["nchw"], LAYOUTS["nhwc"]) if _follows(roles, shape, wide)]
        else:
            # The images are square, so the maps are.
            fitting = [
                roles
                for roles in (LAYOUTS["nchw"], LAYOUTS["nhwc"])
                # Tokens by tokens, as in attention, are as square and no map.
                if _is_square(roles, shape) and not self._is_a_sequence(shape[roles.index("height")])
            ]
        if len(fitting) == 1:
            return Reading(fitting[0])
        if fitting:
            return Reading(fitting[0], note="read as channel, height, width, though it could be otherwise: --layout")
        return Reading(_PLANES, note="the last two dimensions are no places of the image")

    def _reading_of_tokens(self, address: Address | None, shape: tuple[int, ...]) -> Reading:
        for roles in (LAYOUTS["tokens"], LAYOUTS["tokens"][::-1]):
            dim = roles.index("token")
            if dim and not self._is_a_sequence(shape[dim]):
                continue
            grid = self.grid(shape[dim], self._growth(address, shape, dim))
            if grid is not None:
                return Reading(roles, grid)
        return Reading(
            ("row", "column"), note=f"not folded: which of its {shape[0]} rows are places of the image is not known"
        )

    def grid(self, count: int, growth: int = 0) -> TokenGrid | None:
        """Return the places of a sequence of tokens; `growth` is how many more it has for an image twice as wide."""
        if self.layout == "tokens":
            side = math.isqrt(count)
            return TokenGrid(side, side, tuple(range(count - side * side, count)))
        if count not in self._grids:
            self._grids[count] = self.find_grid(count, self._sides) if count > 1 else None
        if self._grids[count] is None and growth and math.isqrt(growth) ** 2 == growth <= count:
            side, others = math.isqrt(growth), count - growth
            return TokenGrid(side, side, tuple(range(others, count)))
        return self._grids[count]

    def _growth(self, address: Address | None, shape: tuple[int, ...], dim: int) -> int:
        wide = self._wide_shape(address)
        return wide[dim] - shape[dim] if len(wide) == 2 and wide[1 - dim] == shape[1 - dim] else 0

    def _wide_shape(self, address: Address | None) -> tuple[int, ...]:
        return self.wide[address].shape if address is not None and address in self.wide else ()

    def _is_a_sequence(self, length: int) -> bool:
        return any(len(info.shape) == 2 and info.shape[0] == length for info in self.square.values())

    @property
    def _sides(self) -> list[int]:
        shapes = [info.shape for info in self.square.values() if len(info.shape) == 3]
        return sorted({side for one in shapes for side, other in (one[:2], one[1:]) if side == other}, reverse=True)


def _follows(roles: tuple[Role, ...], square: tuple[int, ...], wide: tuple[int, ...]) -> bool:
    """Tell whether dimensions of these roles answer to an image that became wider: the width grows, and only it."""
    of = {role: (square[dim], wide[dim]) for dim, role in enumerate(roles)}
    return (
        of["channel"][0] == of["channel"][1] and of["height"][0] == of["width"][0] and of["width"][1] > of["height"][1]
    )


def _is_square(roles: tuple[Role, ...], shape: tuple[int, ...]) -> bool:
    return shape[roles.index("height")] == shape[roles.index("width")]


def places_of(
    runner: Runner,
    side_px: int,
    find_grid: Callable[[int, Sequence[int]], TokenGrid | None],
    layout: str = "",
) -> Places:
    """Probe a model with square images, and with images twice as wide if it takes them.

    Args:
        runner: holds the model, or its skeleton without memory.
        side_px: of its images.
        find_grid: see `Places`.
        layout: see `Places`.
    """
    examples_NCHW = example_images(runner, side_px)
    wide: Iterable[Layer] = ()
    square = probe(runner, examples_NCHW)
    with contextlib.suppress(CaptureError):  # It says so if it takes square images only.
        wide = probe(runner, torch.cat([examples_NCHW, examples_NCHW], 3))
    return Places(_tensors(square), _tensors(wide), find_grid, layout)


def _tensors(layers: Iterable[Layer]) -> dict[Address, TensorInfo]:
    found: dict[Address, TensorInfo] = {}
    for layer in layers:
        found |= layer.addresses() | layer.addresses(of_inputs=True)
    return found


def find_token_grid(runner: Runner, side_px: int, count: int, sides: Sequence[int]) -> TokenGrid | None:
    """Find the place of each of `count` tokens: the one whose strips of the image make it NaN.

    One batch is made, with an image for every row and for every column of the grid, of which that strip is NaN. It
    goes through the model until tokens are seen that are not yet mixed, before the first attention. Where a token sees
    more than its own strips (overlapping patches), the middle of what it sees orders them all the same.

    Args:
        runner: holds a model with real weights, whichever they are.
        side_px: of its images.
        count: the number of tokens, with those that stand for no place.
        sides: the sides of the square maps that the model makes, one of which the grid has.

    Returns:
        The grid, or None if no sequence of so many tokens shows which place each has.
    """
    side = max((side for side in sides if side * side <= count < 2 * side * side), default=0)
    if not sides:
        side = math.isqrt(count)  # It makes no maps at all, as where patches are cut out and multiplied.
    if not 1 < side <= side_px:
        return None
    grid = _experiment(runner, side_px, count, side)
    if grid is not None:
        return grid
    # Behind an attention or a deep stem nothing tells any more but counting: all the places of a map, row by row, and
    # before them what the model says that it puts there.
    for others in (0, getattr(runner.module, "num_prefix_tokens", 0)):
        if sides and count == others + side * side:
            return TokenGrid(side, side, tuple(range(others, count)))
    return None


def _experiment(runner: Runner, side_px: int, count: int, side: int) -> TokenGrid | None:
    pixels_NCHW = example_images(runner, side_px)[:1].repeat(2 * side, 1, 1, 1)
    for number in range(side):
        strip = slice(number * side_px // side, (number + 1) * side_px // side)
        pixels_NCHW[number, :, strip] = float("nan")
        pixels_NCHW[side + number, :, :, strip] = float("nan")
    found: list[TokenGrid] = []

    def look(tensors: Iterable[tuple[Parts, Tensor]]) -> None:
        for _, tensor in tensors:
            if tensor.ndim != 3 or not tensor.is_floating_point() or 2 * side not in tensor.shape[:2]:
                continue
            saw = tensor.isnan().any(2)
            saw = saw if len(saw) == 2 * side else saw.T  # strips, tokens
            if saw.shape[1] < 2:
                continue
            if saw.shape[1] == count and saw.any():
                found.extend(filter(None, [_grid_of(saw.cpu(), side)]))
                raise ForwardIsDone  # What does not tell now is only mixed further.
            if saw.all():
                raise ForwardIsDone  # From here on everything has seen everything.

    taps = Taps(
        lambda _path, _call, args, kwargs: look(tensors_given(args, kwargs)),
        lambda _path, _call, _args, _kwargs, output: look(tensors_in(output)),
    )
    with tap(modules_of(runner.module), taps), contextlib.suppress(ForwardIsDone):
        runner.run(pixels_NCHW)
    return found[0] if found else None


def _grid_of(saw: Tensor, side: int) -> TokenGrid | None:
    """Order tokens by the strips they saw: first all rows of the grid, then all columns. None if they do not tell."""
    rows, columns = saw[:side], saw[side:]
    placed = rows.any(0).nonzero().flatten()
    if len(placed) != side * side or not torch.equal(rows.any(0), columns.any(0)):
        return None
    ranks = []
    for strips in (rows[:, placed].int(), columns[:, placed].int()):
        first, last = strips.argmax(0), side - 1 - strips.flip(0).argmax(0)
        middles, rank = (first + last).unique(return_inverse=True)
        if len(middles) != side:
            return None
        ranks.append(rank)
    place = ranks[0] * side + ranks[1]
    order = place.argsort()
    if not torch.equal(place[order], torch.arange(side * side)):
        return None
    return TokenGrid(side, side, tuple(placed[order].tolist()))
