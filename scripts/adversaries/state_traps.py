"""State: what ran before reaches a row."""

from __future__ import annotations

import collections
import functools
import itertools
import math
import types
from typing import Any, ClassVar

import numpy as np
import torch
from deceit import EITHER, SAME, Net, mean_of, refused, trap
from torch import Tensor, nn
from torch.nn import functional


class MeanNet(Net):
    """It has a buffer for the mean of the batches before."""

    def prepare(self) -> None:
        self.register_buffer("mean", torch.zeros(8, 1, 1))
        self.mean: Tensor


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


@trap("state", refused("(?i)outside|_SEEN"), outside=True)
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
    """A module is made in the first pass, with weights that are the same each time."""

    def prepare(self) -> None:
        self.head: nn.Module | None = None

    def mix(self, y: Tensor) -> Any:
        if self.head is None:
            head = nn.utils.skip_init(nn.Conv2d, y.shape[1], 4, 1)
            nn.init.constant_(head.weight, 0.25)
            nn.init.zeros_(head.bias)
            self.head = head
        return self.head(y)


@trap("state", EITHER, EITHER)
class LazyHeadDrawn(Net):
    """A module is made in the first pass, with random weights that are overwritten at once."""

    def prepare(self) -> None:
        self.head: nn.Module | None = None

    def mix(self, y: Tensor) -> Any:
        if self.head is None:
            self.head = nn.Conv2d(y.shape[1], 4, 1, bias=False)
            nn.init.constant_(self.head.weight, 0.25)
        return self.head(y)


@trap("state", refused("head"))
class LazyHeadOfData(Net):
    """A module is made in the first pass from that batch, as a whitening is."""

    def prepare(self) -> None:
        self.head: nn.Module | None = None

    def mix(self, y: Tensor) -> Any:
        if self.head is None:
            self.head = nn.utils.skip_init(nn.Conv2d, 8, 8, 1, bias=False)
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
