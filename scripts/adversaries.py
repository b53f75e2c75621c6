"""Small models, each written to deceive whoever stores activations image by image, and what must become of each.

`scripts/conformance.py --kind adversaries` runs them. A stored row must be what the model returns for that image alone,
or the run must end with an error that names the layer and the reason. The traps know nothing of hookx.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import math
import os
import random
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Outcome:
    """What must become of a run: rows that are right ('same'), a refusal, or 'either'; `reason` is a regex."""

    kind: str
    reason: str = ""

    def __str__(self) -> str:
        return self.kind


SAME, EITHER = Outcome("same"), Outcome("either")


def refused(reason: str) -> Outcome:
    return Outcome("refused", reason)


@dataclass(frozen=True)
class Trap:
    """A model, the layers to take, and what must happen in the default batch size and one image at a time."""

    name: str
    make: Callable[[], nn.Module]
    kind: str
    batched: Outcome
    alone: Outcome
    why: str
    layers: str = "out"
    before: str = "conv"  # a layer in front of the trouble, which must be stored though `layers` is refused
    stored: tuple[str, ...] = ()  # paths of the modules that must be stored; by default those of `layers`
    options: dict[str, Any] = field(default_factory=dict)
    by_hand: bool = True  # Plain passes over batches are wrong where the trap is refused, and right elsewhere.
    outside: bool = False  # Its state lies outside the model, so another import is needed for a fresh one.


TRAPS: dict[str, Trap] = {}
# A row that depends on other images does not depend on them where there are none.
_ONLY_IN_BATCHES = ("companions", "place", "number")
_LAYER, _RANDOM, _OUTSIDE = refused("'out'"), refused("(?i)random"), refused("(?i)outside")


def trap(
    kind: str, batched: Outcome, alone: Outcome | None = None, **settings: Any
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register a model; its docstring says why it is a trap."""
    if alone is None:
        alone = SAME if kind in _ONLY_IN_BATCHES else batched

    def register(model: type[nn.Module]) -> type[nn.Module]:
        why = (model.__doc__ or "").strip()
        TRAPS[model.__name__] = Trap(model.__name__, model, kind, batched, alone, why, **settings)
        return model

    return register


class Net(nn.Module):
    """A convolution, whatever a trap does with what it returns, and a layer that returns the result."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 8, 8)
        self.out = nn.Identity()
        self.prepare()

    def prepare(self) -> None:
        """Make what `mix` needs."""

    def mix(self, y: Tensor) -> Any:
        """Return what `out` is given for maps (N, 8, 4, 4)."""
        return y

    def forward(self, x: Tensor) -> Any:
        return self.out(self.mix(self.conv(x)))


class MeanNet(Net):
    """It has a buffer for the mean of the batches before."""

    def prepare(self) -> None:
        self.register_buffer("mean", torch.zeros(8, 1, 1))
        self.mean: Tensor


def mean_of(y: Tensor) -> Tensor:
    return y.mean((0, 2, 3)).view(8, 1, 1)


# --- state: what ran before reaches a row ---------------------------------------------------------------------------


@trap("state", refused("mean"))
class Lagging(MeanNet):
    """A buffer follows the mean in place, and is subtracted before it is updated."""

    def mix(self, y: Tensor) -> Tensor:
        out = y - self.mean
        self.mean.mul_(0.9).add_(0.1 * mean_of(y))
        return out


@trap("state", refused("mean"))
class LaggingByName(MeanNet):
    """A buffer is replaced by a new tensor in every pass."""

    def mix(self, y: Tensor) -> Tensor:
        out = y - self.mean
        self.mean = 0.9 * self.mean + 0.1 * mean_of(y)
        return out


@trap("state", refused("mean"))
class LaggingByData(MeanNet):
    """The `.data` of a buffer is replaced, which no version counter sees."""

    def mix(self, y: Tensor) -> Tensor:
        out = y - self.mean
        self.mean.data = 0.9 * self.mean.data + 0.1 * mean_of(y)
        return out


@trap("state", refused("mean"))
class LaggingInData(MeanNet):
    """The `.data` of a buffer is changed in place, which no version counter sees."""

    def mix(self, y: Tensor) -> Tensor:
        out = y - self.mean
        self.mean.data.mul_(0.9).add_(0.1 * mean_of(y))
        return out


@trap("state", refused("gain"))
class Learns(Net):
    """A parameter is trained on while it is used, as in test-time adaptation."""

    def prepare(self) -> None:
        self.gain = nn.Parameter(torch.ones(8, 1, 1))

    def mix(self, y: Tensor) -> Tensor:
        out = y * self.gain
        self.gain.data.sub_(0.5 * mean_of(y.abs()))
        return out


@trap("state", refused("mean"))
class HiddenBuffer(Net):
    """A buffer that no state dict holds follows the mean, inside a submodule."""

    class Centre(nn.Module):
        """It subtracts what it has seen."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(8, 1, 1), persistent=False)
            self.mean: Tensor

        def forward(self, y: Tensor) -> Tensor:
            out = y - self.mean
            self.mean += 0.5 * (mean_of(y) - self.mean)
            return out

    def prepare(self) -> None:
        self.centre = self.Centre()

    def mix(self, y: Tensor) -> Any:
        return self.centre(y)


@trap("state", refused("running_mean|running_var|'norm|tracked"))
class NormalisesAsItGoes(Net):
    """Running statistics are updated in eval mode, and used."""

    def prepare(self) -> None:
        self.norm = nn.BatchNorm2d(8)

    def mix(self, y: Tensor) -> Tensor:
        norm = self.norm
        assert norm.running_mean is not None and norm.running_var is not None
        out = functional.batch_norm(y, norm.running_mean, norm.running_var)
        functional.batch_norm(y, norm.running_mean, norm.running_var, training=True, momentum=0.3)
        return out


@trap("state", refused(r"scale|ready"))
class ActNorm(Net):
    """The first batch gives the scale, which a buffer says."""

    def prepare(self) -> None:
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.register_buffer("ready", torch.tensor(False))
        self.ready: Tensor

    def mix(self, y: Tensor) -> Tensor:
        if not self.ready:
            self.scale.data = 1 / y.std((0, 2, 3)).view(8, 1, 1)
            self.ready.fill_(True)
        return y * self.scale


@trap("state", refused(r"scale|ready"))
class ActNormByAttribute(Net):
    """The first batch gives the scale, which a Python attribute says."""

    def prepare(self) -> None:
        self.scale, self.ready = torch.ones(8, 1, 1), False

    def mix(self, y: Tensor) -> Tensor:
        if not self.ready:
            self.scale, self.ready = 1 / y.std((0, 2, 3)).view(8, 1, 1), True
        return y * self.scale


@trap("state", SAME)
class ActNormThatIsReady(Net):
    """The scale was taken from data in the factory, so no pass changes it."""

    def prepare(self) -> None:
        self.scale, self.ready = torch.ones(8, 1, 1), False
        with torch.no_grad():
            self.forward(torch.rand(4, 3, 32, 32))

    def mix(self, y: Tensor) -> Tensor:
        if not self.ready:
            self.scale, self.ready = 1 / y.std((0, 2, 3)).view(8, 1, 1), True
        return y * self.scale


@trap("state", refused("queue|pointer"))
class Queue(Net):
    """A queue of earlier features, as in MoCo, is what a feature is compared with."""

    def prepare(self) -> None:
        self.register_buffer("queue", torch.eye(8))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))
        self.queue: Tensor
        self.pointer: Tensor

    def mix(self, y: Tensor) -> Tensor:
        features = functional.normalize(y.mean((2, 3)), dim=1)
        out = features @ self.queue.T
        for feature in features:
            self.queue[int(self.pointer) % 8] = feature
            self.pointer += 1
        return out


@trap("state", refused("recent"))
class Recent(Net):
    """A deque holds the last features, which are averaged into a row."""

    def prepare(self) -> None:
        self.recent: collections.deque[Tensor] = collections.deque(maxlen=3)

    def mix(self, y: Tensor) -> Tensor:
        out = y + sum(self.recent, torch.zeros(()))
        self.recent.append(mean_of(y))
        return out


@trap("state", refused("seen"))
class Grows(Net):
    """A list of features grows without end, and its mean is subtracted."""

    def prepare(self) -> None:
        self.seen: list[Tensor] = []

    def mix(self, y: Tensor) -> Tensor:
        self.seen.append(mean_of(y))
        return y - torch.stack(self.seen).mean(0)


@trap("state", refused("level"))
class Level(Net):
    """A Python number follows the largest value."""

    def prepare(self) -> None:
        self.level = 1.0

    def mix(self, y: Tensor) -> Tensor:
        out = y / self.level
        self.level = 0.5 * self.level + 0.5 * float(y.abs().max())
        return out


@trap("state", refused("passes"))
class CountsInto(Net):
    """The number of the pass is added."""

    def prepare(self) -> None:
        self.passes = 0

    def mix(self, y: Tensor) -> Tensor:
        self.passes += 1
        return y + self.passes


@trap("state", SAME)
class Counts(Net):
    """The number of the pass is counted, and nothing depends on it."""

    def prepare(self) -> None:
        self.passes = 0
        self.register_buffer("images", torch.zeros((), dtype=torch.long))
        self.images: Tensor

    def mix(self, y: Tensor) -> Tensor:
        self.passes += 1
        self.images += len(y)
        return y


@trap("state", SAME)
class KeepsMaps(Net):
    """The last maps are kept for a picture, and nothing depends on them."""

    def prepare(self) -> None:
        self.maps: Tensor | None = None
        self.history: list[Tensor] = []

    def mix(self, y: Tensor) -> Tensor:
        self.maps = y.softmax(1)
        self.history = [*self.history[-2:], self.maps]
        return y


@trap("state", SAME)
class WatchesShapes(Net):
    """A set and a dict note the shapes that were seen."""

    def prepare(self) -> None:
        self.shapes: set[torch.Size] = set()
        self.count: collections.Counter[int] = collections.Counter()

    def mix(self, y: Tensor) -> Tensor:
        self.shapes.add(y.shape)
        self.count[len(y)] += 1
        return y


@trap("state", SAME)
class PositionCache(Net):
    """A table of positions is computed for a size when it is first seen."""

    def prepare(self) -> None:
        self.tables: dict[tuple[int, int], Tensor] = {}

    def mix(self, y: Tensor) -> Tensor:
        size = (y.shape[2], y.shape[3])
        if size not in self.tables:
            self.tables[size] = torch.linspace(0, 1, size[0] * size[1]).view(size)
        return y + self.tables[size]


@trap("state", SAME)
class MaskCache(Net):
    """A mask grows to the largest batch that was seen; its rows are alike."""

    def prepare(self) -> None:
        self.register_buffer("mask", torch.ones(0, 1, 1, 1), persistent=False)
        self.mask: Tensor

    def mix(self, y: Tensor) -> Tensor:
        if len(self.mask) < len(y):
            self.mask = torch.full((len(y), 1, 1, 1), 0.5)
        return y * self.mask[: len(y)]


@trap("state", SAME)
class RemembersAnswers(Net):
    """A memory by content returns for an image what it returned before."""

    def prepare(self) -> None:
        self.answers: dict[bytes, Tensor] = {}

    def mix(self, y: Tensor) -> Tensor:
        rows = []
        for image in y:
            key = image.numpy().tobytes()
            rows.append(self.answers.setdefault(key, image.tanh()))
        return torch.stack(rows)


@trap("state", SAME)
class CachedMethod(Net):
    """functools caches a table by its size."""

    @staticmethod
    @functools.lru_cache
    def table(side: int) -> Tensor:
        return torch.arange(float(side * side)).view(side, side)

    def mix(self, y: Tensor) -> Tensor:
        return y + self.table(y.shape[-1])


@trap("state", refused("template"))
class Template(Net):
    """The first batch of a size is kept by that size, and subtracted from the later ones."""

    def prepare(self) -> None:
        self.templates: dict[int, Tensor] = {}

    def mix(self, y: Tensor) -> Tensor:
        return y - self.templates.setdefault(y.shape[-1], mean_of(y))


@trap("state", refused("previous"))
class Difference(Net):
    """What the batch before returned is subtracted, as between the frames of a video."""

    def prepare(self) -> None:
        self.previous: Tensor | None = None

    def mix(self, y: Tensor) -> Tensor:
        out = y if self.previous is None else y - self.previous
        self.previous = mean_of(y)
        return out


@trap("state", refused("hint"))
class Hint(Net):
    """An attribute exists only while a hint from the pass before waits for the next."""

    hint: Tensor

    def mix(self, y: Tensor) -> Tensor:
        if hasattr(self, "hint"):
            y = y + self.hint
            del self.hint
        else:
            self.hint = 10 * mean_of(y)
        return y


@trap("state", refused("warm"))
class WarmsUp(Net):
    """Only the first pass is different."""

    def prepare(self) -> None:
        self.is_warm = False

    def mix(self, y: Tensor) -> Tensor:
        out = y.relu() if self.is_warm else y
        self.is_warm = True
        return out


@trap("state", refused("tracker"))
class Tracker(Net):
    """An ordinary object inside an object holds the mean."""

    def prepare(self) -> None:
        self.tracker = types.SimpleNamespace(inner=types.SimpleNamespace(mean=torch.zeros(8, 1, 1)))

    def mix(self, y: Tensor) -> Tensor:
        inner = self.tracker.inner
        out = y - inner.mean
        inner.mean = mean_of(y)
        return out


@trap("state", refused("mean|outside"))
class InNumpy(Net):
    """A numpy array follows the mean."""

    def prepare(self) -> None:
        self.mean = np.zeros((8, 1, 1), np.float32)

    def mix(self, y: Tensor) -> Tensor:
        out = y - torch.from_numpy(self.mean.copy())
        self.mean += 0.5 * mean_of(y).numpy()
        return out


@trap("state", refused("clock|outside"))
class Clock(Net):
    """An iterator counts the passes, and cannot be looked at without counting."""

    def prepare(self) -> None:
        self.clock = itertools.count()

    def mix(self, y: Tensor) -> Tensor:
        return y * (1 + next(self.clock))


@trap("state", refused("level|outside"), outside=True)
class OfTheClass(Net):
    """The class, not the object, holds the level."""

    level: ClassVar[float] = 1.0

    def mix(self, y: Tensor) -> Tensor:
        out = y / type(self).level
        type(self).level = float(y.abs().max())
        return out


_SEEN = {"level": 1.0}


@trap("state", _OUTSIDE, outside=True)
class InTheModule(Net):
    """A dict of the Python module holds the level."""

    def mix(self, y: Tensor) -> Tensor:
        out = y / _SEEN["level"]
        _SEEN["level"] = float(y.abs().max())
        return out


@trap("state", refused("(?i)outside|follow"))
class InAClosure(Net):
    """A function holds the level in a variable around it."""

    def prepare(self) -> None:
        level = 1.0

        def follow(y: Tensor) -> Tensor:
            nonlocal level
            out = y / level
            level = float(y.abs().max())
            return out

        self.follow = follow

    def mix(self, y: Tensor) -> Tensor:
        return self.follow(y)


@trap("state", SAME)
class LazyHead(Net):
    """A module is made in the first pass, with random weights that are overwritten at once."""

    def prepare(self) -> None:
        self.head: nn.Module | None = None

    def mix(self, y: Tensor) -> Any:
        if self.head is None:
            head = nn.Conv2d(y.shape[1], 4, 1)
            nn.init.constant_(head.weight, 0.25)
            nn.init.zeros_(head.bias)  # type: ignore[arg-type]
            self.head = head
        return self.head(y)


@trap("state", refused("head"))
class LazyHeadOfData(Net):
    """A module is made in the first pass from that batch, as a whitening is."""

    def prepare(self) -> None:
        self.head: nn.Module | None = None

    def mix(self, y: Tensor) -> Any:
        if self.head is None:
            self.head = nn.Conv2d(8, 8, 1, bias=False)
            self.head.weight.data = torch.diag(1 / y.std((0, 2, 3))).view(8, 8, 1, 1)
        return self.head(y)


@trap("state", refused(r"\bu\b"), before="conv")
class PowerIteration(Net):
    """The norm of a weight is estimated a step further in each pass, as by spectral normalisation."""

    def prepare(self) -> None:
        self.register_buffer("u", torch.ones(8) / math.sqrt(8))
        self.u: Tensor

    def mix(self, y: Tensor) -> Tensor:
        weight = self.conv.weight.flatten(1)
        v = functional.normalize(weight.T @ self.u, dim=0)
        self.u.copy_(functional.normalize(weight @ v, dim=0))
        return y / (self.u @ weight @ v)


@trap("state", refused("training"), before="", by_hand=False)
class StaysInTraining(Net):
    """Its batch normalisation refuses to leave training mode."""

    class Norm(nn.BatchNorm2d):
        """It ignores eval()."""

        def train(self, mode: bool = True) -> Any:
            return super().train(True)

    def prepare(self) -> None:
        self.norm = self.Norm(8)

    def mix(self, y: Tensor) -> Any:
        return self.norm(y)


# --- stopped: a pass that ends early leaves what its end would have cleared -----------------------------------------


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


# --- companions: other images of the batch reach a row ---------------------------------------------------------------


@trap("companions", _LAYER)
class BatchTopK(Net):
    """A sparse autoencoder keeps the largest codes of the whole batch."""

    def prepare(self) -> None:
        self.encode = nn.Linear(8, 64)

    def mix(self, y: Tensor) -> Tensor:
        codes = self.encode(y.mean((2, 3))).relu()
        values, places = codes.flatten().topk(4 * len(codes))
        return torch.zeros_like(codes.flatten()).scatter(0, places, values).view_as(codes)


@trap("companions", _LAYER)
class MaskByMean(Net):
    """What lies below the mean of the batch becomes 0, NaN with it."""

    def mix(self, y: Tensor) -> Tensor:
        return torch.where(y > y.mean(), y, 0.0)


@trap("companions", _LAYER)
class CleansFirst(Net):
    """NaN becomes 0 before the batch's own statistics."""

    def prepare(self) -> None:
        self.norm = nn.BatchNorm2d(8, track_running_stats=False)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.norm(self.conv(torch.nan_to_num(x))))


@trap("companions", _LAYER, before="")
class BytesOrNot(Net):
    """The brightest pixel of the batch decides whether these are bytes."""

    def forward(self, x: Tensor) -> Any:
        return self.out(self.conv(x / 255 if x.max() > 2.0 else x))


@trap("companions", _LAYER)
class NaNOfItsOwn(Net):
    """The logarithm of negative numbers is NaN for ordinary images."""

    def prepare(self) -> None:
        self.norm = nn.BatchNorm2d(8, track_running_stats=False)

    def mix(self, y: Tensor) -> Tensor:
        y = self.norm(y)
        return torch.cat([y, torch.log(y)], 1)


@trap("companions", _LAYER)
class NaNMean(Net):
    """The mean of the batch leaves NaN out."""

    def mix(self, y: Tensor) -> Tensor:
        return y - torch.nanmean(y, 0)


@trap("companions", _LAYER)
class OnlyFinite(Net):
    """Statistics are taken of the images that are finite."""

    def mix(self, y: Tensor) -> Tensor:
        finite = y[torch.isfinite(y).all(3).all(2).all(1)]
        return (y - mean_of(finite)) if len(finite) else y


@trap("companions", _LAYER)
class Ranks(Net):
    """Integers: the place of each value among those of the batch."""

    def mix(self, y: Tensor) -> Tensor:
        return y.argsort(0)


@trap("companions", _LAYER)
class AboveTheOthers(Net):
    """Booleans: which values are larger than the mean of the batch."""

    def mix(self, y: Tensor) -> Tensor:
        return y > y.mean(0)


@trap("companions", _LAYER)
class Winners(Net):
    """Booleans: which image of the batch has the largest value of a channel."""

    def mix(self, y: Tensor) -> Tensor:
        pooled = y.mean((2, 3))
        return functional.one_hot(pooled.argmax(0), len(pooled)).T.bool()


@trap("companions", _LAYER)
class Median(Net):
    """The median of the batch is subtracted; a few NaN or large values do not move it much."""

    def mix(self, y: Tensor) -> Tensor:
        return y - y.nan_to_num().median(0).values


@trap("companions", _LAYER)
class Sorted(Net):
    """The values are sorted over the batch."""

    def mix(self, y: Tensor) -> Tensor:
        return y.sort(0).values


@trap("companions", _LAYER)
class Cumulative(Net):
    """Each row is the sum of those before it."""

    def mix(self, y: Tensor) -> Tensor:
        return y.cumsum(0)


@trap("companions", _LAYER)
class SoftmaxOverBatch(Net):
    """The softmax runs over the wrong dimension."""

    def mix(self, y: Tensor) -> Tensor:
        return y.mean((2, 3)).softmax(0)


@trap("companions", _LAYER)
class Shifted(Net):
    """Each row is that of its neighbour, and no value is changed."""

    def mix(self, y: Tensor) -> Tensor:
        return y.roll(1, 0)


@trap("companions", _LAYER)
class Reversed(Net):
    """The rows come in the opposite order, which a middle image does not show."""

    def mix(self, y: Tensor) -> Tensor:
        return y.flip(0)


@trap("companions", _LAYER)
class Mixup(Net):
    """A tenth of the neighbour is mixed into each row."""

    def mix(self, y: Tensor) -> Tensor:
        return 0.9 * y + 0.1 * y.roll(1, 0)


@trap("companions", _LAYER)
class Pairs(Net):
    """Images are averaged in pairs; an odd one stays alone."""

    def mix(self, y: Tensor) -> Tensor:
        pairs = [pair.mean(0, keepdim=True).expand_as(pair) for pair in y.split(2)]
        return torch.cat(pairs)


@trap("companions", _LAYER)
class Scaled(Net):
    """The largest value of the batch becomes 1."""

    def mix(self, y: Tensor) -> Tensor:
        return y / y.abs().max()


@trap("companions", _LAYER)
class ScaledIfFinite(Net):
    """The largest finite value of the batch becomes 1."""

    def mix(self, y: Tensor) -> Tensor:
        return y / y.nan_to_num(0, 0, 0).abs().max()


@trap("companions", _LAYER)
class QuantizedTogether(Net):
    """Eight bits with one scale for the batch."""

    def mix(self, y: Tensor) -> Tensor:
        scale = y.nan_to_num().abs().max() / 127
        return (y / scale).round() * scale


@trap("companions", _LAYER)
class QuantizedToIntegers(Net):
    """The integers of eight bits with one scale for the batch."""

    def mix(self, y: Tensor) -> Tensor:
        y = y.nan_to_num()
        return (y * 127 / y.abs().max()).round().to(torch.int8)


@trap("companions", _LAYER)
class DynamicallyQuantized(Net):
    """torch's dynamically quantized Linear has one scale for the batch, and fails on NaN."""

    def prepare(self) -> None:
        linear = nn.Sequential(nn.Linear(8, 16))
        self.linear = torch.ao.quantization.quantize_dynamic(linear, {nn.Linear}, torch.qint8)

    def mix(self, y: Tensor) -> Any:
        return self.linear(y.mean((2, 3)))


@trap("companions", _LAYER)
class Sparsifies(Net):
    """The largest tenth of all values of the batch stays."""

    def mix(self, y: Tensor) -> Tensor:
        threshold = y.nan_to_num().flatten().kthvalue(int(0.9 * y.numel())).values
        return torch.where(y >= threshold, y, 0.0)


@trap("companions", _LAYER)
class Attends(Net):
    """Attention across the images of a batch."""

    def mix(self, y: Tensor) -> Tensor:
        tokens = y.mean((2, 3))
        return (5 * tokens @ tokens.T).softmax(1) @ tokens


@trap("companions", refused("'out'"))
class Similarities(Net):
    """Every image against every image, as in a contrastive loss."""

    def mix(self, y: Tensor) -> Tensor:
        features = functional.normalize(y.mean((2, 3)), dim=1)
        return features @ features.T


@trap("companions", _LAYER)
class FaintCentre(Net):
    """A hundredth of the mean of the batch is subtracted, which is little and not rounding."""

    def mix(self, y: Tensor) -> Tensor:
        return y - 0.01 * y.mean(0)


@trap("companions", _LAYER)
class FaintMask(Net):
    """A faint dependence that NaN and large values cannot reach: only companions between -1 and 1 count."""

    def mix(self, y: Tensor) -> Tensor:
        counts = (y.abs() < 1).to(y.dtype)
        return y + 0.05 * (counts * y.nan_to_num()).mean(0)


@trap("companions", _LAYER)
class Whitened(Net):
    """Each image is divided by the spread of the batch, plus its own."""

    def mix(self, y: Tensor) -> Tensor:
        spread = y.nan_to_num().std((0, 2, 3), keepdim=True)
        return y / (1 + spread)


@trap("companions", _LAYER)
class TrainedNorm(Net):
    """Batch statistics are used in eval mode, and running ones are updated and never used."""

    def prepare(self) -> None:
        self.norm = nn.BatchNorm2d(8)

    def mix(self, y: Tensor) -> Tensor:
        return functional.batch_norm(y, self.norm.running_mean, self.norm.running_var, training=True)


@trap("companions", _LAYER)
class Ghost(Net):
    """Statistics of groups of two images, as ghost batch normalisation takes them."""

    def mix(self, y: Tensor) -> Tensor:
        return torch.cat([part - part.mean((0, 2, 3), keepdim=True) for part in y.split(2)])


class Experts(Net):
    """Tokens are sent to one of four experts."""

    def prepare(self) -> None:
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def route(self, tokens: Tensor, capacity: int) -> Tensor:
        chosen, out = self.gate(tokens).argmax(1), torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            places = (chosen == number).nonzero()[:capacity, 0]
            out[places] = expert(tokens[places])
        return out

    def mix(self, y: Tensor) -> Tensor:
        tokens = y.flatten(2).transpose(1, 2)
        return self.route(tokens.reshape(-1, 8), self.capacity(tokens)).view_as(tokens)

    def capacity(self, tokens: Tensor) -> int:
        return len(tokens) * 16


@trap("companions", _LAYER)
class ExpertsWithCapacity(Experts):
    """An expert takes its share of the batch's tokens, first come, first served."""

    def capacity(self, tokens: Tensor) -> int:
        return len(tokens) * 16 // 4


@trap("companions", _LAYER)
class ExpertsWithFixedCapacity(Experts):
    """An expert takes 20 tokens, more than one image has."""

    def capacity(self, tokens: Tensor) -> int:
        return 20


# --- place and number: where in a batch an image lies, and how many there are ----------------------------------------


@trap("place", _LAYER)
class Numbered(Net):
    """The number of the row is added."""

    def mix(self, y: Tensor) -> Tensor:
        return y + 0.1 * torch.arange(len(y)).view(-1, 1, 1, 1)


@trap("place", _LAYER)
class EveryOther(Net):
    """Every second row is negated, as by interleaved flips."""

    def mix(self, y: Tensor) -> Tensor:
        y = y.clone()
        y[1::2] *= -1
        return y


@trap("place", _LAYER)
class TheFourth(Net):
    """Only the fourth row of a batch is different."""

    def mix(self, y: Tensor) -> Tensor:
        y = y.clone()
        y[3:4] += 1
        return y


@trap("place", _LAYER)
class AnchoredToFirst(Net):
    """The first image is subtracted from the others; it has no row of zeros itself."""

    def mix(self, y: Tensor) -> Tensor:
        return torch.cat([y[:1], y[1:] - y[:1]])


@trap("number", _LAYER)
class Shared(Net):
    """A row is divided by the number of images."""

    def mix(self, y: Tensor) -> Tensor:
        return y / len(y)


@trap("number", _LAYER)
class ManyOrFew(Net):
    """More than three images take another way."""

    def mix(self, y: Tensor) -> Tensor:
        return y.relu() if len(y) > 3 else y


@trap("number", _LAYER)
class EvenOrOdd(Net):
    """An even number of images takes another way."""

    def mix(self, y: Tensor) -> Tensor:
        return y.relu() if len(y) % 2 == 0 else y


@trap("number", EITHER, EITHER, by_hand=False)
class Squeezed(Net):
    """One image alone loses the dimension of the batch."""

    def mix(self, y: Tensor) -> Tensor:
        return y.mean((2, 3)).squeeze()


# --- random: generators of every kind --------------------------------------------------------------------------------


@trap("random", _RANDOM)
class Drops(Net):
    """Dropout stays on in eval mode."""

    def mix(self, y: Tensor) -> Tensor:
        return functional.dropout(y, 0.5, training=True)


@trap("random", _RANDOM)
class OwnGenerator(Net):
    """Noise comes from a torch.Generator of its own."""

    def prepare(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def mix(self, y: Tensor) -> Tensor:
        return y + torch.rand(y.shape, generator=self.generator)


@trap("random", _RANDOM)
class NumpyNoise(Net):
    """Noise comes from numpy's global generator."""

    def mix(self, y: Tensor) -> Tensor:
        return y + torch.from_numpy(np.random.rand(*y.shape).astype(np.float32))


@trap("random", _RANDOM)
class NumpyGenerator(Net):
    """Noise comes from a numpy Generator of its own."""

    def prepare(self) -> None:
        self.generator = np.random.default_rng(0)

    def mix(self, y: Tensor) -> Tensor:
        return y + torch.from_numpy(self.generator.random(y.shape, np.float32))


@trap("random", _RANDOM)
class PythonNoise(Net):
    """A number comes from Python's global generator."""

    def mix(self, y: Tensor) -> Tensor:
        return y * random.random()


@trap("random", _RANDOM)
class PythonGenerator(Net):
    """A number comes from a random.Random of its own."""

    def prepare(self) -> None:
        self.generator = random.Random(0)

    def mix(self, y: Tensor) -> Tensor:
        return y * self.generator.uniform(0.5, 2)


@trap("random", refused("(?i)random|outside|reproduc"))
class SystemNoise(Net):
    """A number comes from the operating system."""

    def mix(self, y: Tensor) -> Tensor:
        return y * (1 + os.urandom(1)[0])


@trap("random", refused("(?i)random|outside|reproduc"))
class WallClock(Net):
    """A number comes from the clock."""

    def mix(self, y: Tensor) -> Tensor:
        return y * (1 + time.perf_counter_ns() % 1_000_003)


@trap("random", _RANDOM)
class RandomMask(Net):
    """Three quarters of the tokens are masked at random, as in a masked autoencoder."""

    def mix(self, y: Tensor) -> Tensor:
        tokens = y.flatten(2).transpose(1, 2)
        kept = torch.rand(tokens.shape[:2]).argsort(1)[:, :4]
        return tokens.gather(1, kept[..., None].expand(-1, -1, 8))


@trap("random", _RANDOM)
class Shuffles(Net):
    """The batch is shuffled, as by MoCo's shuffled normalisation."""

    def mix(self, y: Tensor) -> Tensor:
        return y[torch.randperm(len(y))]


@trap("random", SAME)
class FixedNoise(Net):
    """The noise is the same in every pass and for every image, and torch's generator is put back."""

    def mix(self, y: Tensor) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return y + torch.randn(1, *y.shape[1:])


@trap("random", SAME)
class FreshGenerator(Net):
    """A generator with a fixed seed is made in every pass; every image gets the same noise."""

    def mix(self, y: Tensor) -> Tensor:
        return y + torch.randn((1, *y.shape[1:]), generator=torch.Generator().manual_seed(0))


@trap("random", refused("(?i)'out'|random"), EITHER)
class SeededNoise(Net):
    """The noise is the same in every pass, and another for each place in the batch."""

    def mix(self, y: Tensor) -> Tensor:
        return y + torch.randn(y.shape, generator=torch.Generator().manual_seed(0))


# --- right: what looks suspicious and is not -------------------------------------------------------------------------


@trap("right", SAME)
class AssertsFinite(Net):
    """NaN is refused by the model itself."""

    def forward(self, x: Tensor) -> Any:
        assert torch.isfinite(x).all(), "bad pixels"
        return self.out(self.conv(x))


@trap("right", SAME)
class AssertsRange(Net):
    """Pixels outside the range of normalised ones are refused by the model itself."""

    def forward(self, x: Tensor) -> Any:
        if not bool((x.abs() < 4).all()):
            raise ValueError("pixels must be normalised")
        return self.out(self.conv(x))


@trap("right", SAME)
class AssertsInside(Net):
    """NaN is refused behind the first layer."""

    def mix(self, y: Tensor) -> Tensor:
        if bool(y.isnan().any()):
            raise FloatingPointError("NaN in the maps")
        return y.relu()


@trap("right", SAME)
class EmbedsBytes(Net):
    """Pixels become bytes, and bytes indices; NaN has none."""

    def prepare(self) -> None:
        self.embed = nn.Embedding(256, 4)

    def forward(self, x: Tensor) -> Any:
        codes = ((x + 3) * 40).long()
        if int(codes.min()) < 0 or int(codes.max()) > 255:
            raise IndexError("index out of range in self")
        return self.out(self.embed(codes[:, 0]).mean((1, 2)))


@trap("right", SAME)
class Observes(Net):
    """An observer collects a histogram, fails on NaN, and changes nothing."""

    def prepare(self) -> None:
        self.register_buffer("histogram", torch.zeros(16))
        self.histogram: Tensor

    def mix(self, y: Tensor) -> Tensor:
        self.histogram += torch.histc(y, 16)
        return y


@trap("right", SAME)
class ObservesByTorch(Net):
    """torch's observer keeps the extremes."""

    def prepare(self) -> None:
        self.observer = torch.ao.quantization.MinMaxObserver()

    def mix(self, y: Tensor) -> Any:
        return self.observer(y)


@trap("right", SAME, layers="conv")
class HeadPerImage(Net):
    """The head is called once for each image; the layer in front of it is one like any other."""

    def prepare(self) -> None:
        self.head = nn.Conv2d(8, 4, 1)

    def mix(self, y: Tensor) -> Tensor:
        return torch.cat([self.head(image[None]) for image in y])


@trap("right", SAME)
class AfterHeadPerImage(Net):
    """The head is called once for each image, and what it returned is put together again."""

    def prepare(self) -> None:
        self.head = nn.Conv2d(8, 4, 1)

    def mix(self, y: Tensor) -> Tensor:
        return torch.cat([self.head(image[None]) for image in y])


@trap("right", SAME, by_hand=False)
class Windows(Net):
    """Windows of an image lie one after the other in the batch, behind a `where` that swallows NaN."""

    def mix(self, y: Tensor) -> Tensor:
        y = torch.where(y > 0, y, 0.0)
        windows = y.unfold(2, 2, 2).unfold(3, 2, 2)
        return windows.permute(0, 2, 3, 1, 4, 5).reshape(-1, 8, 2, 2)


@trap("right", EITHER, EITHER, by_hand=False)
class WindowsInterleaved(Net):
    """The first windows of all images come first."""

    def mix(self, y: Tensor) -> Tensor:
        windows = y.unfold(2, 2, 2).unfold(3, 2, 2)
        return windows.permute(2, 3, 0, 1, 4, 5).reshape(-1, 8, 2, 2)


@trap("right", SAME, by_hand=False)
class SequenceFirst(Net):
    """Tokens come first, and the batch second."""

    def mix(self, y: Tensor) -> Tensor:
        return y.flatten(2).permute(2, 0, 1)


@trap("right", SAME, by_hand=False, layers="lstm")
class States(Net):
    """An LSTM returns its states with the batch second."""

    def prepare(self) -> None:
        self.lstm = nn.LSTM(8, 6, num_layers=2, batch_first=True)

    def mix(self, y: Tensor) -> Tensor:
        out, _ = self.lstm(y.flatten(2).transpose(1, 2))
        return out[:, -1]


@trap("right", SAME)
class Masks(Net):
    """Booleans that belong to one image each."""

    def mix(self, y: Tensor) -> Tensor:
        return y.mean(1) > y.mean((1, 2, 3)).view(-1, 1, 1)


@trap("right", SAME)
class Labels(Net):
    """Integers that belong to one image each."""

    def mix(self, y: Tensor) -> Tensor:
        return y.flatten(2).argmax(2)


@trap("right", SAME)
class ExpertsWithRoom(Experts):
    """Experts that take every token are called on as many rows as come."""


@trap("right", SAME)
class TopKAlone(Net):
    """Each image keeps its own largest codes."""

    def mix(self, y: Tensor) -> Tensor:
        codes = y.flatten(1)
        values, places = codes.topk(4, dim=1)
        return torch.zeros_like(codes).scatter(1, places, values)


@trap("right", SAME)
class QuantizedAlone(Net):
    """Eight bits with one scale for each image."""

    def mix(self, y: Tensor) -> Tensor:
        scale = y.abs().amax((1, 2, 3), keepdim=True) / 127
        return (y / scale).round() * scale


@trap("right", SAME)
class Signs(Net):
    """Only the sign of a value is returned."""

    def mix(self, y: Tensor) -> Tensor:
        return y.sign()


@trap("right", SAME)
class OwnNaN(Net):
    """The logarithm of negative numbers is NaN, for each image by itself."""

    def mix(self, y: Tensor) -> Tensor:
        return torch.log(y)


@trap("right", SAME)
class OwnInfinity(Net):
    """Masked scores are infinite, as in front of a softmax."""

    def mix(self, y: Tensor) -> Tensor:
        return y.masked_fill(y < 0, -math.inf)


@trap("right", SAME)
class NormalisedAlone(Net):
    """Instance normalisation takes statistics of one image."""

    def prepare(self) -> None:
        self.norm = nn.InstanceNorm2d(8)

    def mix(self, y: Tensor) -> Any:
        return self.norm(y)


@trap("right", SAME)
class Branches(Net):
    """Each image takes the way that it decides itself, in a loop."""

    def mix(self, y: Tensor) -> Tensor:
        return torch.stack([image.relu() if float(image.mean()) > 0 else -image for image in y])


@trap("right", SAME)
class Recomputes(Net):
    """Activation checkpointing runs a part of the model."""

    def mix(self, y: Tensor) -> Any:
        return checkpoint(torch.tanh, y, use_reentrant=False)


@trap("right", SAME, layers="norm")
class Overwrites(Net):
    """What a layer returned is overwritten by the next."""

    def prepare(self) -> None:
        self.norm, self.relu = nn.BatchNorm2d(8), nn.ReLU(inplace=True)

    def mix(self, y: Tensor) -> Tensor:
        out: Tensor = self.relu(self.norm(y))
        return out.mul_(2)


@trap("right", SAME)
class AsBytes(Net):
    """Maps are stored as bytes; what NaN becomes there is anybody's guess."""

    def mix(self, y: Tensor) -> Tensor:
        return (y.sigmoid() * 255).to(torch.uint8)


# --- names: every tensor of an output has one address that selects it again ------------------------------------------


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
    """Keys that are no text: tuples, members of an Enum, booleans, None, and a text like one of them."""

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


# --- types ------------------------------------------------------------------------------------------------------------


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
