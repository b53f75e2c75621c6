"""Reductions, the part of an address behind '@': what is computed of an activation before it is stored.

reduction = step ["@" step]...
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from hookx.errors import AddressError, closest

OVER_DIMS = ("mean", "max", "min", "sum", "norm")
# Steps that say by themselves which tokens of N,tokens,channels they take, once it is proved which stand for places.
OF_PLACES = ("cls", "patches", "patchmean", "cls+patchmean", "grid")
_PLAIN = (*OF_PLACES, "flatten", "l2")
_NUMBERED = {
    "gem": r"(\d?)(\d?)",
    "pool": r"(\d+)",
    "channels": r"(\d+)(?:-(\d+))?",
    "tokens": r"(\d+)(-)?(\d+)?",
    "project": r"(\d+)",
}
_EXAMPLES = {"pool": "@pool7", "channels": "@channels0-63", "tokens": "@tokens1-", "project": "@project512"}
_KNOWN = (*OVER_DIMS, *_PLAIN, *_NUMBERED)
_WITHOUT_END = -1
_GEM_DIMS = (2, 3)


@dataclass(frozen=True)
class Patches:
    """Which tokens of an image's sequence stand for places of the image, as a probe has proved it.

    Args:
        height, width: the size of the grid of places.
        tokens: one for each place, row by row.
        count: how many tokens the whole sequence has.
    """

    height: int
    width: int
    tokens: tuple[int, ...]
    count: int

    @property
    def others(self) -> tuple[int, ...]:
        """The tokens that stand for no place, such as a class token and registers."""
        placed = set(self.tokens)
        return tuple(token for token in range(self.count) if token not in placed)


@dataclass(frozen=True)
class Step:
    """One computation on the activation of an image; dimension 0 is the batch.

    Example:
        >>> Step.parse("mean32"), Step.parse("channels0-63")
        (Step(name='mean', numbers=(2, 3)), Step(name='channels', numbers=(0, 63)))
    """

    name: str
    numbers: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Step:
        if text in _PLAIN:
            return cls(text)
        match = re.fullmatch(r"([a-z]+)([\d-]*)", text)
        name, rest = match.groups() if match else (text, "")
        if name in OVER_DIMS and "-" not in rest:
            return cls(name, _parse_dims(rest, text))
        if name in _NUMBERED:
            if found := re.fullmatch(_NUMBERED[name], rest):
                return _numbered(name, found.groups(), text)
            raise AddressError(f"'@{text}' is not a reduction: write {_EXAMPLES.get(name, f'@{name}')}")
        if name in _PLAIN:
            raise AddressError(f"'@{text}' is not a reduction: {name} takes no dimensions; write @{name}")
        raise AddressError(
            f"'@{text}' is not a reduction; closest: {closest(name, [f'@{known}' for known in _KNOWN])}",
            "over dimensions: @mean23 @max23 @min1 @sum12 @norm23    of maps: @gem @pool7",
            "of tokens: @cls @patches @patchmean @cls+patchmean @grid @tokens5-",
            "of any: @flatten @l2 @channels0-63 @project512",
        )

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimensions that it reduces."""
        return (self.numbers or _GEM_DIMS) if self.name == "gem" else self.numbers

    def __str__(self) -> str:
        if self.name == "channels":
            first, last = self.numbers
            return f"channels{first}" + (f"-{last}" if last != first else "")
        if self.name == "tokens":
            first, last = self.numbers
            return f"tokens{first}" + ("-" if last == _WITHOUT_END else f"-{last}" if last != first else "")
        return self.name + "".join(map(str, self.numbers))

    def shape(self, shape: tuple[int, ...], patches: Patches | None) -> tuple[int, ...]:
        """Return one image's shape after the step; raise `ValueError` with the reason if it does not fit."""
        match self.name:
            case "flatten":
                if not shape:
                    raise ValueError("a scalar cannot be flattened.")
                return (math.prod(shape),)
            case "cls" | "patches" | "patchmean" | "cls+patchmean" | "grid":
                return self._shape_of_places(shape, patches)
            case "l2":
                if len(shape) not in (1, 2):
                    raise ValueError("l2 takes a vector, or the vectors of N,tokens,channels.")
                return shape
            case "gem":
                if not self.numbers:
                    self._check_map(shape)
                return _without(self.dims, shape)
            case "pool":
                self._check_map(shape)
                if self.numbers[0] > min(shape[1:]):
                    raise ValueError(f"a map of {shape[1]} x {shape[2]} has no {self.numbers[0]} x {self.numbers[0]}.")
                return (shape[0], self.numbers[0], self.numbers[0])
            case "channels":
                dim = self.channel_dim(shape)
                return (*shape[:dim], self._length_of_slice(shape[dim], "channels"), *shape[dim + 1 :])
            case "tokens":
                if len(shape) != 2:
                    raise ValueError("tokens takes an output N,tokens,channels.")
                return (self._length_of_slice(shape[0], "tokens"), shape[1])
            case "project":
                if self.numbers[0] > math.prod(shape):
                    raise ValueError(f"it has {math.prod(shape):,} numbers, and project makes fewer of many.")
                return (self.numbers[0],)
        if not self.dims:
            raise ValueError(f"{self.name} over which dimensions?")
        return _without(self.dims, shape)

    def channel_dim(self, shape: tuple[int, ...]) -> int:
        """Return the place of the channels in an image's shape: last in tokens, first in maps."""
        if len(shape) == 3:
            self._check_map(shape)
            return 0
        if len(shape) not in (1, 2):
            raise ValueError(f"{self.name} takes N,channels, N,tokens,channels, or N,channels,height,width.")
        return len(shape) - 1

    def bounds(self, length: int) -> tuple[int, int]:
        """Return the first index of a slice, and the one behind its last."""
        first, last = self.numbers
        return first, length if last == _WITHOUT_END else last + 1

    def _length_of_slice(self, length: int, what: str) -> int:
        start, stop = self.bounds(length)
        if not start < stop <= length:
            raise ValueError(f"it has {length} {what}, 0 to {length - 1}.")
        return stop - start

    def _shape_of_places(self, shape: tuple[int, ...], patches: Patches | None) -> tuple[int, ...]:
        if self.name == "grid" and len(shape) == 3 and patches is not None:  # N,height,width,channels
            return (shape[2], patches.height, patches.width)
        if len(shape) != 2:
            raise ValueError(f"{self.name} takes tokens, N,tokens,channels.")
        if self.name == "cls":
            if patches is not None and 0 not in patches.others:
                others = f"; those that are none: {_ranges(patches.others)}" if patches.others else "; all of them are"
                raise ValueError(f"token 0 stands for a place of the image{others}.")
            return shape[1:]
        if patches is None:
            raise ValueError(
                f"which of its {shape[0]} tokens stand for places of the image could not be proved: without attention "
                "they do not each follow one patch."
            )
        if self.name == "cls+patchmean":
            if 0 not in patches.others:
                raise ValueError("token 0 stands for a place of the image: there is no class token.")
            return (2 * shape[1],)
        if self.name == "grid":
            return (shape[1], patches.height, patches.width)
        return (len(patches.tokens), shape[1]) if self.name == "patches" else shape[1:]

    def _check_map(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 3:
            raise ValueError(f"{self.name} takes maps, N,channels,height,width.")
        if shape[0] == shape[1] != shape[2]:
            raise ValueError(f"{self.name} takes N,channels,height,width, and this looks like N,height,width,channels.")


def _numbered(name: str, groups: Sequence[str | None], text: str) -> Step:
    if name == "gem":
        dims = _parse_dims("".join(filter(None, groups)), text)
        return Step(name, () if dims == _GEM_DIMS else dims)
    first = int(groups[0] or 0)
    if name in ("pool", "project"):
        if first < 1:
            raise AddressError(f"'@{text}' makes nothing: write {_EXAMPLES[name]}")
        return Step(name, (first,))
    if name == "tokens":
        last = int(groups[2]) if groups[2] else _WITHOUT_END if groups[1] else first
    else:
        last = int(groups[1]) if groups[1] else first
    if last != _WITHOUT_END and last < first:
        raise AddressError(f"'@{text}' ends before it begins: write @{name}{last}-{first}")
    return Step(name, (first, last))


def _parse_dims(digits: str, text: str) -> tuple[int, ...]:
    dims = [int(digit) for digit in digits]
    if 0 in dims:
        raise AddressError(f"'@{text}' cannot reduce dimension 0, the batch; count from 1")
    if len(set(dims)) != len(dims):
        raise AddressError(f"'@{text}' names a dimension twice")
    return tuple(sorted(dims))


def _without(dims: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    if dims[-1] > len(shape):
        raise ValueError(f"dimension {dims[-1]} does not exist.")
    return tuple(length for dim, length in enumerate(shape, 1) if dim not in dims)


def _ranges(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:4])) + (", ..." if len(numbers) > 4 else "")


@dataclass(frozen=True)
class Reduction:
    """Steps that are computed one after the other, on the device, before an activation is stored.

    Example:
        >>> Reduction.parse("mean23").shape((512, 7, 7)), Reduction.parse("flatten@project64@l2").shape((512, 7, 7))
        ((512,), (64,))
        >>> str(Reduction.parse("mean32"))
        'mean23'
    """

    steps: tuple[Step, ...]

    @classmethod
    def parse(cls, text: str) -> Reduction:
        return cls(tuple(Step.parse(one) for one in text.split("@")))

    def __str__(self) -> str:
        return "@".join(map(str, self.steps))

    @property
    def needs_places(self) -> bool:
        """Whether it is to be proved which tokens stand for places of the image."""
        return self.steps[0].name in OF_PLACES

    def shapes(self, shape: tuple[int, ...], patches: Patches | None = None) -> list[tuple[int, ...]]:
        """Return one image's shape before each step, and after the last; see `shape`."""
        shapes = [shape]
        for step in self.steps:
            shapes.append(step.shape(shapes[-1], patches))
            if step.name == "patches" and patches is not None:
                count = len(patches.tokens)
                patches = Patches(patches.height, patches.width, tuple(range(count)), count)
            else:
                patches = None
        return shapes

    def shape(self, shape: tuple[int, ...], patches: Patches | None = None) -> tuple[int, ...]:
        """Return one image's shape after the reduction; raise `ValueError` with the reason if it does not fit."""
        return self.shapes(shape, patches)[-1]

    def spellings_for(self, shape: tuple[int, ...]) -> str:
        """Suggest reductions that fit the shape of one image's activation."""
        name = self.steps[0].name if self.steps[0].name in OVER_DIMS else "mean"
        if len(shape) == 3 and self.steps[0].name not in OVER_DIMS and shape[0] == shape[1] != shape[2]:
            return "@grid, which puts the channels first: @grid@pool7; @gem12 and @mean12 name the dimensions"
        if len(shape) == 3:
            return f"@{name}23 if the channels are dimension 1, @{name}12 if they are dimension 3"
        if len(shape) == 2 and self.needs_places:
            return "@tokens1- from the second token on, @tokens1-@mean1 their mean, @tokens0 the first, @mean1 over all"
        if len(shape) == 2:
            of_patches = "@patchmean over the patches, " if name == "mean" else ""
            return f"{of_patches}@{name}1 over all tokens, @cls for the class token"
        if len(shape) <= 1:
            return "no reduction at all"
        return f"@{name} followed by the digits of the dimensions"
