"""Names and types: every tensor of an output has one address and one type, or a reason why not."""

from __future__ import annotations

import collections
import types
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
from deceit import SAME, Net, refused, trap
from torch import Tensor, nn


class Returns(Net):
    """A layer returns a structure that is made of the pooled maps."""

    class Structure(nn.Module):
        """It returns what a function makes of a tensor."""

        def __init__(self, build: Callable[[Tensor], Any]) -> None:
            super().__init__()
            self.build = build

        def forward(self, y: Tensor) -> Any:
            return self.build(y)

    def __init__(self) -> None:
        super().__init__()
        self.add_module("out", self.Structure(self.build))

    def mix(self, y: Tensor) -> Tensor:
        return y.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(self.conv(x))
        self.out(y)
        return y

    @staticmethod
    def build(y: Tensor) -> Any:
        return y


@trap("names", SAME)
class NumberAndText(Returns):
    """A number and a text are two keys with one spelling."""

    @staticmethod
    def build(y: Tensor) -> Any:
        return {0: y, "0": -y}


@trap("names", SAME)
class EmptyName(Returns):
    """A part has an empty name, and inside it another."""

    @staticmethod
    def build(y: Tensor) -> Any:
        return {"": y, "x": {"": -y, "y": 2 * y}}


@trap("names", SAME)
class Punctuation(Returns):
    """Names that hold what an address is made of."""

    @staticmethod
    def build(y: Tensor) -> Any:
        names = [
            "a/b",
            "a:1",
            "a@mean1",
            "a,b",
            " ",
            "a b",
            "*",
            "?",
            "%",
            "%2F",
            "in",
            ".",
            "..",
            "[0]",
            "'",
            "é",
            "層",
        ]
        return {name: (number + 1) * y for number, name in enumerate(names)}


@trap("names", SAME)
class OtherKeys(Returns):
    """Keys that are not strings: tuples, members of an Enum, booleans, None, and a text like one of them."""

    class Level(Enum):
        """Two members."""

        LOW, HIGH = 0, 1

    @staticmethod
    def build(y: Tensor) -> Any:
        keys: list[Any] = [(0, 1), OtherKeys.Level.LOW, OtherKeys.Level.HIGH, "Level.LOW", None, "None", 1.5, "1.5"]
        return {key: (number + 1) * y for number, key in enumerate(keys)}


_HELPER = nn.Linear(2, 2)


class Detections:
    """An ordinary class with attributes, a property that must not be called, and a way back to itself."""

    def __init__(self, y: Tensor) -> None:
        self.boxes, self.scores = y, {"all": [-y, 2 * y]}
        self.owner, self.model = self, _HELPER

    @property
    def expensive(self) -> Tensor:
        raise RuntimeError("a property was read")


@trap("names", SAME)
class Object(Returns):
    """An ordinary object holds the tensors."""

    @staticmethod
    def build(y: Tensor) -> Any:
        return Detections(y)


class Slots:
    """A class without a dict."""

    __slots__ = ("first", "second", "unset")

    def __init__(self, y: Tensor) -> None:
        self.first, self.second = y, -y


@trap("names", SAME)
class ObjectWithSlots(Returns):
    """An object without a dict holds the tensors."""

    @staticmethod
    def build(y: Tensor) -> Any:
        return [Slots(y), types.SimpleNamespace(third=3 * y)]


class Pair(NamedTuple):
    """A named tuple."""

    left: Tensor
    right: Tensor


@dataclass
class Fields:
    """A dataclass."""

    values: Tensor
    pair: Pair


@trap("names", SAME)
class Nested(Returns):
    """Dataclasses, named tuples, deques and user dicts in each other."""

    @staticmethod
    def build(y: Tensor) -> Any:
        fields = Fields(y, Pair(2 * y, 3 * y))
        return collections.UserDict(a=fields, b=collections.deque([4 * y, (5 * y,)]), c=(6 * y).max(1))


@trap("names", refused("'out.*set"))
class InASet(Returns):
    """Tensors in a set have no order and no names."""

    @staticmethod
    def build(y: Tensor) -> Any:
        return {y, -y}


@trap("names", refused("'out.*generator"))
class FromAGenerator(Returns):
    """Tensors that only one reader can have."""

    @staticmethod
    def build(y: Tensor) -> Any:
        return (number * y for number in (1, 2))


@trap("names", refused("(?s)'out/0'.*'out/1'.*'out/2'"))
class NothingUsable(Returns):
    """None of three parts can be stored, and the error names them all."""

    @staticmethod
    def build(y: Tensor) -> Any:
        return torch.ones(3), {y}, y.to_sparse()


@trap("names", SAME, layers="**", stored=("conv",))
class NothingUsableUnderAGlob(NothingUsable):
    """None of three parts can be stored, and a glob leaves the layer out."""


@trap("types", SAME)
class Float8(Returns):
    """Both kinds of float8 that a file can hold."""

    @staticmethod
    def build(y: Tensor) -> Any:
        return y.to(torch.float8_e4m3fn), y.to(torch.float8_e5m2)


@trap("types", SAME)
class Unsigned(Returns):
    """Unsigned integers of 16, 32 and 64 bits."""

    @staticmethod
    def build(y: Tensor) -> Any:
        codes = 1000 * y.nan_to_num().abs()
        return codes.to(torch.uint16), codes.to(torch.uint32), codes.to(torch.uint64)


@trap("types", SAME)
class Complex(Returns):
    """Complex numbers, as from a Fourier transform."""

    @staticmethod
    def build(y: Tensor) -> Any:
        return torch.fft.rfft(y)


@trap("types", SAME)
class Booleans(Returns):
    """Booleans and small integers."""

    @staticmethod
    def build(y: Tensor) -> Any:
        return y > 0, (y > 0).to(torch.int8), (9 * y.nan_to_num()).to(torch.int16)


@trap("types", SAME)
class Doubles(Returns):
    """Double and half precision side by side."""

    @staticmethod
    def build(y: Tensor) -> Any:
        return y.double(), y.half(), y.bfloat16()


@trap("types", refused("'out'.*float8_e4m3fnuz"))
class OtherFloat8(Returns):
    """A kind of float8 that not every reader of the files knows."""

    @staticmethod
    def build(y: Tensor) -> Any:
        return y.to(torch.float8_e4m3fnuz)


@trap("types", SAME, layers="**", stored=("conv",))
class OtherFloat8UnderAGlob(OtherFloat8):
    """One layer that no file can hold is left out."""


@trap("types", SAME, options={"dtype": "fp32"})
class OtherFloat8Converted(OtherFloat8):
    """--dtype stores it as numbers of another type."""


@trap("types", refused("'out'.*complex128"))
class DoubleComplex(Returns):
    """Complex numbers that no file can hold."""

    @staticmethod
    def build(y: Tensor) -> Any:
        return torch.fft.rfft(y.double())


@trap("types", refused("'out'.*sparse"))
class Sparse(Returns):
    """A sparse tensor has no rows."""

    @staticmethod
    def build(y: Tensor) -> Any:
        return y.relu().to_sparse()


@trap("types", SAME, layers="**", stored=("conv",))
class SparseUnderAGlob(Sparse):
    """A sparse layer is left out."""


@trap("types", SAME)
class Quantized(Returns):
    """A quantized tensor stands for numbers."""

    @staticmethod
    def build(y: Tensor) -> Any:
        return torch.quantize_per_tensor(y, 0.01, 64, torch.quint8)


@trap("types", refused("offloaded"), layers="conv", before="", by_hand=False)
class DoesNotMove(Net):
    """Its `.to` fails, as that of an offloaded model does."""

    def to(self, *_args: Any, **_kwargs: Any) -> Any:
        raise RuntimeError("this model is offloaded")
