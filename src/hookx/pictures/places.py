"""Where in the image the values of an activation lie: learnt from the model by two experiments.

An image twice as wide makes maps twice as wide: the dimension that grows is the width, and the one that stays is the
channel. And where a strip of the image is NaN, the tokens that become NaN are those that saw it: strip by strip, each
token of a transformer gets its place, or turns out to have none (a class token).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from hookx.capture.hooks import Taps, tap
from hookx.capture.probe import example_images, probe
from hookx.capture.runner import ForwardIsDone, Runner, modules_of
from hookx.capture.state import ModuleState
from hookx.capture.tensors import Parts, tensors_given, tensors_in
from hookx.errors import CaptureError, LayerError
from hookx.layers.address import Address
from hookx.layers.select import Layer, TensorInfo

log = logging.getLogger("hookx")
Role = Literal["channel", "height", "width", "token", "row", "column"]
LAYOUTS: dict[str, tuple[Role, ...]] = {
    "nchw": ("channel", "height", "width"),
    "nhwc": ("height", "width", "channel"),
    "tokens": ("token", "channel"),
}
_MAPS = (LAYOUTS["nchw"], LAYOUTS["nhwc"])


@dataclass(frozen=True)
class TokenGrid:
    """The tokens of a sequence that stand for places of the image: a grid, row by row."""

    height: int
    width: int
    tokens: tuple[int, ...]

    @classmethod
    def last(cls, height: int, width: int, count: int) -> TokenGrid:
        """Return a grid of the last tokens of a sequence."""
        return cls(height, width, tuple(range(count - height * width, count)))

    def without_place(self, count: int) -> tuple[int, ...]:
        """Return the tokens of a sequence that stand for no place, such as a class token."""
        placed = set(self.tokens)
        return tuple(token for token in range(count) if token not in placed)


@dataclass(frozen=True)
class Reading:
    """What each dimension of one image's activation means; `note` is what a user should know about that."""

    roles: tuple[Role, ...]
    grid: TokenGrid | None = None
    note: str = ""

    def maps(self, activation: Tensor) -> Tensor:
        """Return an activation as maps (channels, height, width), or as a vector if it has no places.

        Example:
            >>> nhwc = Reading(LAYOUTS["nhwc"])
            >>> nhwc.maps(torch.ones(7, 7, 768)).shape
            torch.Size([768, 7, 7])
            >>> Reading(LAYOUTS["tokens"], TokenGrid.last(14, 14, 197)).maps(torch.ones(197, 384)).shape
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
    """What the experiments showed about a model: every layer, probed with images of its size and with wide ones.

    `size_px` is the height and the width of the former, which `square` tells about. `find_grid` runs the second
    experiment, for a number of tokens; `layout` is one of `LAYOUTS` if the user has set it.
    """

    square: Mapping[Address, TensorInfo] = field(default_factory=dict)
    wide: Mapping[Address, TensorInfo] = field(default_factory=dict)  # empty if the model takes images of one size
    find_grid: Callable[[int], TokenGrid | None] = lambda _count: None
    layout: str = ""
    size_px: tuple[int, int] = (1, 1)
    _noted: set[Address] = field(default_factory=set)

    def read(self, address: Address, shape: tuple[int, ...]) -> Reading:
        """Return what the dimensions of one image's activation mean; log its note once.

        Raises:
            LayerError: it has more dimensions than a picture can show.
        """
        if len(shape) > 3:
            raise LayerError(
                f"{address} has {len(shape)} dimensions per image ({','.join(map(str, ('N', *shape)))}); "
                "a picture shows at most 3",
                "reduce it, as in @mean2, or choose another layer",
            )
        reading = self._read(address, shape)
        if reading.note and address not in self._noted:
            log.info("%s: %s", address, reading.note)
            self._noted.add(address)
        return reading

    def sort(self, addresses: Iterable[str]) -> list[str]:
        """Order addresses as a forward pass computes them: a module returns after the modules within it."""
        entered = {address.path: depth for depth, address in enumerate(self.square)}
        returned: dict[str, int] = {}
        for depth, address in enumerate(self.square):
            names = address.path.split(".")
            returned |= {".".join(names[:end]): depth for end in range(1, len(names) + 1)}
        returned["."] = len(self.square)

        def depth_of(text: str) -> float:
            address = replace(Address.parse(text), reduction=None)
            if address not in self.square:
                return 0
            # Modules that return together do so from the innermost outwards.
            path = address.path
            return entered[path] if address.is_input else returned[path] + 1 / (2 + len(path))

        return sorted(addresses, key=depth_of)

    def grid(self, count: int, growth: int = 0) -> TokenGrid | None:
        """Return the places of a sequence of tokens; `growth` is how many more it has for an image twice as wide."""
        if self.layout == "tokens":
            return TokenGrid.last(*_largest_grid(count, self.size_px), count)
        grid = self.find_grid(count)
        height, width = _largest_grid(max(growth, 0), self.size_px)
        if grid is None and growth and height * width == growth <= count:
            return TokenGrid.last(height, width, count)
        return grid

    def _read(self, address: Address, shape: tuple[int, ...]) -> Reading:
        steps = () if address.reduction is None else address.reduction.steps
        whole = replace(address, reduction=None)
        probed = self.square[whole].shape if whole in self.square else None
        is_over_dims = len(steps) == 1 and bool(steps[0].dims) and probed is not None and len(probed) <= 3
        if is_over_dims and probed is not None and steps[0].shape(probed, None) == shape:
            of_whole = self._read(whole, probed)
            roles = tuple(role for dim, role in enumerate(of_whole.roles, 1) if dim not in steps[0].dims)
            return replace(of_whole, roles=roles, grid=of_whole.grid if "token" in roles else None)
        if len(shape) == 3 and any(step.name in ("grid", "pool") for step in steps):
            return Reading(LAYOUTS["nchw"])
        if len(shape) < 2:
            return Reading(("channel",))
        wide = self.wide[whole].shape if probed == shape and whole in self.wide else ()
        return self._read_tokens(shape, wide) if len(shape) == 2 else self._read_maps(shape, wide)

    def _read_maps(self, shape: tuple[int, ...], wide: tuple[int, ...]) -> Reading:
        if self.layout in ("nchw", "nhwc"):
            return Reading(LAYOUTS[self.layout])
        if len(wide) == 3 and wide != shape:
            fitting = [roles for roles in _MAPS if _follows_width(roles, shape, wide, self.size_px)]
        else:
            # Square images make square maps. Tokens by tokens, as in attention, are square as well, but not a map.
            alike = [
                roles
                for roles in _MAPS
                if _has_proportions(shape[roles.index("height")], shape[roles.index("width")], self.size_px)
            ]
            fitting = [roles for roles in alike if not self._is_sequence(shape[roles.index("height")])]
        if len(fitting) == 1:
            return Reading(fitting[0])
        if fitting:
            return Reading(fitting[0], note="read as channel, height, width, though it could be otherwise: --layout")
        return Reading(("channel", "row", "column"), note="the last two dimensions are not places in the image")

    def _read_tokens(self, shape: tuple[int, ...], wide: tuple[int, ...]) -> Reading:
        for roles in (LAYOUTS["tokens"], LAYOUTS["tokens"][::-1]):
            dim = roles.index("token")
            if dim and not self._is_sequence(shape[dim]):
                continue
            growth = wide[dim] - shape[dim] if len(wide) == 2 and wide[1 - dim] == shape[1 - dim] else 0
            grid = self.grid(shape[dim], growth)
            if grid is not None:
                return Reading(roles, grid)
        note = f"not folded: which of its {shape[0]} rows are places of the image is not known"
        return Reading(("row", "column"), note=note)

    def _is_sequence(self, length: int) -> bool:
        return any(len(info.shape) == 2 and info.shape[0] == length for info in self.square.values())


def _follows_width(
    roles: tuple[Role, ...], square: tuple[int, ...], wide: tuple[int, ...], size_px: tuple[int, int]
) -> bool:
    """Return whether, read this way, the width of a map grows with that of the image, and nothing else does."""
    channel, height, width = (roles.index(role) for role in LAYOUTS["nchw"])
    grows = square[height] == wide[height] and square[width] < wide[width]
    if size_px[0] == size_px[1]:  # Maps may also grow in height, where a model resizes its input.
        grows = wide[width] > wide[height]
    return square[channel] == wide[channel] and _has_proportions(square[height], square[width], size_px) and grows


def _has_proportions(height: int, width: int, size_px: tuple[int, int]) -> bool:
    """Return whether a map has the proportions of the image, up to what strides round off."""
    if size_px[0] == size_px[1]:
        return height == width
    shares = (height / size_px[0], width / size_px[1])
    return max(shares) * min(size_px) - min(shares) * min(size_px) < 1


def _largest_grid(count: int, size_px: tuple[int, int]) -> tuple[int, int]:
    """Return the height and the width of the largest grid of up to `count` places in the proportions of an image."""
    divisor = math.gcd(*size_px)
    height, width = size_px[0] // divisor, size_px[1] // divisor
    scale = math.isqrt(count // (height * width))
    return height * scale, width * scale


def probe_places(
    runner: Runner, load: Callable[[], Runner], size_px: int | tuple[int, int], layout: str = "", channels: int = 3
) -> Places:
    """Probe a model, or its skeleton, with images of its size, and with images twice as wide if it takes them.

    `load` returns the model with any real weights; it is called when the places of tokens are first needed.
    """
    size_px = (size_px, size_px) if isinstance(size_px, int) else size_px
    examples_NCHW = example_images(runner, size_px, (0.5,) * channels, (0.5,) * channels)
    square = _tensors_by_address(probe(runner, examples_NCHW, shapes_only=True))
    wide: dict[Address, TensorInfo] = {}
    with contextlib.suppress(CaptureError):  # The model takes images of one size only.
        wide = _tensors_by_address(probe(runner, torch.cat([examples_NCHW, examples_NCHW], 3), shapes_only=True))
    shapes = [info.shape for info in square.values() if len(info.shape) == 3]
    grids = {(one, other) for shape in shapes for one, other in (shape[:2], shape[1:])}
    grids = {grid for grid in grids if _has_proportions(*grid, size_px)}

    @functools.cache
    def find_grid(count: int) -> TokenGrid | None:
        return find_token_grid(load(), size_px, count, grids, channels) if count > 1 else None

    return Places(square, wide, find_grid, layout, size_px)


def _tensors_by_address(layers: Iterable[Layer]) -> dict[Address, TensorInfo]:
    tensors: dict[Address, TensorInfo] = {}
    for layer in layers:
        tensors |= layer.addresses() | layer.addresses(of_inputs=True)
    return tensors


def find_token_grid(
    runner: Runner, size_px: tuple[int, int], count: int, grids: Collection[tuple[int, int]], channels: int = 3
) -> TokenGrid | None:
    """Find the place of each of `count` tokens: the one whose strips of the image make it NaN.

    The batch has an image for every row and for every column of the grid, in which that strip is NaN. It goes through
    the model until tokens appear that are not mixed yet, before the first attention. Where a token sees more than its
    own strips (overlapping patches), the middle of what it sees still gives the order.

    The grid has the height and the width of one of `grids`, the maps that the model makes in the proportions of the
    image. None if no sequence of this length shows the place of each token.
    """
    fitting = [(height, width) for height, width in grids if height * width <= count < 2 * height * width]
    height, width = max(fitting, key=math.prod, default=(0, 0))
    if not grids:
        # The model makes no maps, as where patches are cut out and multiplied.
        height, width = _largest_grid(count, size_px)
    if height * width < 2 or height > size_px[0] or width > size_px[1]:
        return None
    grid = _trace_strips(runner, size_px, count, (height, width), channels)
    if grid is not None:
        return grid
    # After an attention or a deep stem only counting is left: the places of a map, row by row, behind as many tokens
    # as the model says that it puts before them.
    for others in (0, getattr(runner.module, "num_prefix_tokens", 0)):
        if grids and count == others + height * width:
            return TokenGrid.last(height, width, count)
    return None


def _trace_strips(
    runner: Runner, size_px: tuple[int, int], count: int, grid: tuple[int, int], channels: int
) -> TokenGrid | None:
    strips = sum(grid)  # The rows of the grid, then its columns.
    pixels_NCHW = example_images(runner, size_px, (0.5,) * channels, (0.5,) * channels)[:1].repeat(strips, 1, 1, 1)
    for number in range(grid[0]):
        pixels_NCHW[number, :, _strip(number, grid[0], size_px[0])] = float("nan")
    for number in range(grid[1]):
        pixels_NCHW[grid[0] + number, :, :, _strip(number, grid[1], size_px[1])] = float("nan")
    found: list[Tensor] = []

    def look(tensors: Iterable[tuple[Parts, Tensor]]) -> None:
        for _, tensor in tensors:
            if tensor.ndim != 3 or not tensor.is_floating_point() or strips not in tensor.shape[:2]:
                continue
            saw = tensor.isnan().any(2)
            saw = saw if len(saw) == strips else saw.T  # strips, tokens
            if saw.shape[1] < 2:
                continue
            if saw.shape[1] == count and saw.any():
                found.append(saw)
                raise ForwardIsDone  # Later layers only mix the tokens further.
            if saw.all():
                raise ForwardIsDone  # From here on every token has seen everything.

    taps = Taps(
        lambda _path, _call, args, kwargs: look(tensors_given(args, kwargs)),
        lambda _path, _call, _args, _kwargs, output: look(tensors_in(output)),
    )
    state = ModuleState.of(runner.module, runner.forward)
    try:
        with tap(modules_of(runner.module), taps), contextlib.suppress(ForwardIsDone):
            runner.run(pixels_NCHW)
    finally:
        state.restore()
    return _order_tokens(found[0].cpu(), *grid) if found else None


def _strip(number: int, count: int, side_px: int) -> slice:
    return slice(number * side_px // count, (number + 1) * side_px // count)


def _order_tokens(saw: Tensor, height: int, width: int) -> TokenGrid | None:
    """Order tokens by the strips that they saw: `height` rows, then `width` columns. None if that is ambiguous."""
    rows, columns = saw[:height], saw[height:]
    placed = rows.any(0).nonzero().flatten()
    if len(placed) != height * width or not torch.equal(rows.any(0), columns.any(0)):
        return None
    ranks = []
    for strips in (rows[:, placed].int(), columns[:, placed].int()):
        first, last = strips.argmax(0), len(strips) - 1 - strips.flip(0).argmax(0)
        middles, rank = (first + last).unique(return_inverse=True)
        if len(middles) != len(strips):
            return None
        ranks.append(rank)
    place = ranks[0] * width + ranks[1]
    order = place.argsort()
    if not torch.equal(place[order], torch.arange(height * width)):
        return None
    return TokenGrid(height, width, tuple(placed[order].tolist()))
