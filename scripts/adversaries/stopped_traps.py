"""Stopped passes: one that ends early leaves what its end would have cleared."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator

import torch
from deceit import SAME, Net, trap
from torch import Tensor, nn


class Blocks(Net):
    """Four blocks, one after the other."""

    def prepare(self) -> None:
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(4))


@trap("stopped", SAME, layers="blocks.1")
class KeepsFirst(Blocks):
    """The value of the first block is kept until the end of the pass."""

    def prepare(self) -> None:
        super().prepare()
        self.first: Tensor | None = None

    def mix(self, y: Tensor) -> Tensor:
        for block in self.blocks:
            value = block(y)
            if self.first is None:
                self.first = value
            y = y + value + self.first[: len(y)]
        self.first = None
        return y


@trap("stopped", SAME, layers="blocks.2")
class Fifo(Blocks):
    """The pyramid puts features into a queue, which the heads take out."""

    def prepare(self) -> None:
        super().prepare()
        self.waiting: collections.deque[Tensor] = collections.deque()
        self.heads = nn.ModuleList(nn.Conv2d(8, 4, 1) for _ in range(4))

    def mix(self, y: Tensor) -> Tensor:
        for block in self.blocks:
            y = block(y)
            if self.waiting:
                y = y + self.waiting[0][: len(y)]
            self.waiting.append(y)
        return torch.cat([head(self.waiting.popleft()) for head in self.heads], 1)


@trap("stopped", SAME, layers="blocks.1")
class Depth(Blocks):
    """The depth is counted up on the way down, and back on the way up."""

    def prepare(self) -> None:
        super().prepare()
        self.depth = 0

    def mix(self, y: Tensor) -> Tensor:
        for block in self.blocks:
            self.depth += 1
            y = block(y) * self.depth
        self.depth -= len(self.blocks)
        return y


@trap("stopped", SAME, layers="blocks.1")
class Scope(Blocks):
    """A context manager without `finally` does not leave its scope when an exception passes."""

    def prepare(self) -> None:
        super().prepare()
        self.scale = 1.0

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        self.scale *= 2
        yield
        self.scale /= 2

    def mix(self, y: Tensor) -> Tensor:
        with self.scope():
            for block in self.blocks:
                y = block(self.scale * y)
        return y


@trap("stopped", SAME, layers="blocks.0")
class ClearsFeatures(Blocks):
    """A dict of features is cleared at the end; what is left in it counts as another level."""

    def prepare(self) -> None:
        super().prepare()
        self.features: dict[str, Tensor] = {}

    def mix(self, y: Tensor) -> Tensor:
        levels = len(self.features)
        for number, block in enumerate(self.blocks):
            y = block(y + levels)
            self.features[f"{number}.{levels}"] = y
        out = torch.stack(list(self.features.values())).mean(0)
        self.features.clear()
        return out


@trap("stopped", SAME, layers="blocks.1")
class RestoresWeights(Blocks):
    """A weight is doubled for the pass and halved at its end."""

    def mix(self, y: Tensor) -> Tensor:
        weight = self.blocks[1].weight
        assert isinstance(weight, Tensor)
        weight.data.mul_(2)
        for block in self.blocks:
            y = block(y)
        weight.data.div_(2)
        return y


_STACK: list[float] = []


@trap("stopped", SAME, layers="blocks.1")
class StackOutside(Blocks):
    """The stack of the Python module is empty again only at the end of the pass."""

    def mix(self, y: Tensor) -> Tensor:
        for block in self.blocks:
            _STACK.append(1.0)
            y = block(y) * len(_STACK)
        for _ in self.blocks:
            _STACK.pop()
        return y


@trap("stopped", SAME, layers="blocks.1")
class CatchesAll(Blocks):
    """It catches every exception of its blocks and goes on."""

    def mix(self, y: Tensor) -> Tensor:
        for block in self.blocks:
            try:
                y = block(y)
            except BaseException:
                y = torch.zeros_like(y)
        return y
