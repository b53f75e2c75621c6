"""Models that look suspicious, and are right."""

from __future__ import annotations

import math
from typing import Any

import torch
from deceit import EITHER, SAME, Experts, Net, trap
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


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
    """Maps are stored as bytes; what NaN becomes there is not defined."""

    def mix(self, y: Tensor) -> Tensor:
        return (y.sigmoid() * 255).to(torch.uint8)
