"""Batches: the other images, the place among them, or their number reach a row."""

from __future__ import annotations

from typing import Any

import torch
from deceit import EITHER, LAYER, Experts, Net, mean_of, refused, trap
from torch import Tensor, nn
from torch.nn import functional


@trap("companions", LAYER)
class BatchTopK(Net):
    """A sparse autoencoder keeps the largest codes of the whole batch."""

    def prepare(self) -> None:
        self.encode = nn.Linear(8, 64)

    def mix(self, y: Tensor) -> Tensor:
        codes = self.encode(y.mean((2, 3))).relu()
        values, places = codes.flatten().topk(4 * len(codes))
        return torch.zeros_like(codes.flatten()).scatter(0, places, values).view_as(codes)


@trap("companions", LAYER)
class MaskByMean(Net):
    """What lies below the mean of the batch becomes 0, NaN with it."""

    def mix(self, y: Tensor) -> Tensor:
        return torch.where(y > y.mean(), y, 0.0)


@trap("companions", LAYER)
class CleansFirst(Net):
    """NaN becomes 0 before the batch's own statistics."""

    def prepare(self) -> None:
        self.norm = nn.BatchNorm2d(8, track_running_stats=False)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.norm(self.conv(torch.nan_to_num(x))))


@trap("companions", LAYER, before="")
class BytesOrNot(Net):
    """The brightest pixel of the batch decides whether these are bytes."""

    def forward(self, x: Tensor) -> Any:
        return self.out(self.conv(x / 255 if x.max() > 2.0 else x))


@trap("companions", LAYER)
class NaNOfItsOwn(Net):
    """The logarithm of negative numbers is NaN for ordinary images."""

    def prepare(self) -> None:
        self.norm = nn.BatchNorm2d(8, track_running_stats=False)

    def mix(self, y: Tensor) -> Tensor:
        y = self.norm(y)
        return torch.cat([y, torch.log(y)], 1)


@trap("companions", LAYER)
class NaNMean(Net):
    """The mean of the batch leaves NaN out."""

    def mix(self, y: Tensor) -> Tensor:
        return y - torch.nanmean(y, 0)


@trap("companions", LAYER)
class OnlyFinite(Net):
    """Statistics are taken of the images that are finite."""

    def mix(self, y: Tensor) -> Tensor:
        finite = y[torch.isfinite(y).all(3).all(2).all(1)]
        return (y - mean_of(finite)) if len(finite) else y


@trap("companions", LAYER)
class Ranks(Net):
    """Integers: the place of each value among those of the batch."""

    def mix(self, y: Tensor) -> Tensor:
        return y.argsort(0)


@trap("companions", LAYER)
class AboveTheOthers(Net):
    """Booleans: which values are larger than the mean of the batch."""

    def mix(self, y: Tensor) -> Tensor:
        return y > y.mean(0)


@trap("companions", LAYER)
class Winners(Net):
    """Booleans: which image of the batch has the largest value of a channel."""

    def mix(self, y: Tensor) -> Tensor:
        pooled = y.mean((2, 3))
        return functional.one_hot(pooled.argmax(0), len(pooled)).T.bool()


@trap("companions", LAYER)
class Median(Net):
    """The median of the batch is subtracted; a few NaN or large values do not move it much."""

    def mix(self, y: Tensor) -> Tensor:
        return y - y.nan_to_num().median(0).values


@trap("companions", LAYER)
class Sorted(Net):
    """The values are sorted over the batch."""

    def mix(self, y: Tensor) -> Tensor:
        return y.sort(0).values


@trap("companions", LAYER)
class Cumulative(Net):
    """Each row is the sum of those before it."""

    def mix(self, y: Tensor) -> Tensor:
        return y.cumsum(0)


@trap("companions", LAYER)
class SoftmaxOverBatch(Net):
    """The softmax runs over the wrong dimension."""

    def mix(self, y: Tensor) -> Tensor:
        return y.mean((2, 3)).softmax(0)


@trap("companions", LAYER)
class Shifted(Net):
    """Each row is that of its neighbour, and no value is changed."""

    def mix(self, y: Tensor) -> Tensor:
        return y.roll(1, 0)


@trap("companions", LAYER)
class Reversed(Net):
    """The rows come in the opposite order, which a middle image does not show."""

    def mix(self, y: Tensor) -> Tensor:
        return y.flip(0)


@trap("companions", LAYER)
class Mixup(Net):
    """A tenth of the neighbour is mixed into each row."""

    def mix(self, y: Tensor) -> Tensor:
        return 0.9 * y + 0.1 * y.roll(1, 0)


@trap("companions", LAYER)
class Pairs(Net):
    """Images are averaged in pairs; an odd one stays alone."""

    def mix(self, y: Tensor) -> Tensor:
        pairs = [pair.mean(0, keepdim=True).expand_as(pair) for pair in y.split(2)]
        return torch.cat(pairs)


@trap("companions", LAYER)
class Scaled(Net):
    """The largest value of the batch becomes 1."""

    def mix(self, y: Tensor) -> Tensor:
        return y / y.abs().max()


@trap("companions", LAYER)
class ScaledIfFinite(Net):
    """The largest finite value of the batch becomes 1."""

    def mix(self, y: Tensor) -> Tensor:
        return y / y.nan_to_num(0, 0, 0).abs().max()


@trap("companions", LAYER)
class QuantizedTogether(Net):
    """Eight bits with one scale for the batch."""

    def mix(self, y: Tensor) -> Tensor:
        scale = y.nan_to_num().abs().max() / 127
        return (y / scale).round() * scale


@trap("companions", LAYER)
class QuantizedToIntegers(Net):
    """The integers of eight bits with one scale for the batch."""

    def mix(self, y: Tensor) -> Tensor:
        y = y.nan_to_num()
        return (y * 127 / y.abs().max()).round().to(torch.int8)


@trap("companions", LAYER)
class DynamicallyQuantized(Net):
    """torch's dynamically quantized Linear has one scale for the batch, and fails on NaN."""

    def prepare(self) -> None:
        linear = nn.Sequential(nn.Linear(8, 16))
        self.linear = torch.ao.quantization.quantize_dynamic(linear, {nn.Linear}, torch.qint8)

    def mix(self, y: Tensor) -> Any:
        return self.linear(y.mean((2, 3)))


@trap("companions", LAYER)
class Sparsifies(Net):
    """The largest tenth of all values of the batch stays."""

    def mix(self, y: Tensor) -> Tensor:
        threshold = y.nan_to_num().flatten().kthvalue(int(0.9 * y.numel())).values
        return torch.where(y >= threshold, y, 0.0)


@trap("companions", LAYER)
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


@trap("companions", LAYER)
class FaintCentre(Net):
    """A hundredth of the mean of the batch is subtracted, which is little and not rounding."""

    def mix(self, y: Tensor) -> Tensor:
        return y - 0.01 * y.mean(0)


@trap("companions", LAYER)
class FaintMask(Net):
    """A faint dependence that NaN and large values cannot reach: only companions between -1 and 1 count."""

    def mix(self, y: Tensor) -> Tensor:
        counts = (y.abs() < 1).to(y.dtype)
        return y + 0.05 * (counts * y.nan_to_num()).mean(0)


@trap("companions", LAYER)
class Whitened(Net):
    """Each image is divided by the spread of the batch, plus its own."""

    def mix(self, y: Tensor) -> Tensor:
        spread = y.nan_to_num().std((0, 2, 3), keepdim=True)
        return y / (1 + spread)


@trap("companions", LAYER)
class TrainedNorm(Net):
    """Batch statistics are used in eval mode, and running ones are updated and never used."""

    def prepare(self) -> None:
        self.norm = nn.BatchNorm2d(8)

    def mix(self, y: Tensor) -> Tensor:
        return functional.batch_norm(y, self.norm.running_mean, self.norm.running_var, training=True)


@trap("companions", LAYER)
class Ghost(Net):
    """Statistics of groups of two images, as ghost batch normalisation takes them."""

    def mix(self, y: Tensor) -> Tensor:
        return torch.cat([part - part.mean((0, 2, 3), keepdim=True) for part in y.split(2)])


@trap("companions", LAYER)
class ExpertsWithCapacity(Experts):
    """An expert takes its share of the batch's tokens, first come, first served."""

    def capacity(self, tokens: Tensor) -> int:
        return len(tokens) * 16 // 4


@trap("companions", LAYER)
class ExpertsWithFixedCapacity(Experts):
    """An expert takes 20 tokens, more than one image has."""

    def capacity(self, tokens: Tensor) -> int:
        return 20


@trap("place", LAYER)
class Numbered(Net):
    """The number of the row is added."""

    def mix(self, y: Tensor) -> Tensor:
        return y + 0.1 * torch.arange(len(y)).view(-1, 1, 1, 1)


@trap("place", LAYER)
class EveryOther(Net):
    """Every second row is negated, as by interleaved flips."""

    def mix(self, y: Tensor) -> Tensor:
        y = y.clone()
        y[1::2] *= -1
        return y


@trap("place", LAYER)
class TheFourth(Net):
    """Only the fourth row of a batch is different."""

    def mix(self, y: Tensor) -> Tensor:
        y = y.clone()
        y[3:4] += 1
        return y


@trap("place", LAYER)
class AnchoredToFirst(Net):
    """The first image is subtracted from the others; it has no row of zeros itself."""

    def mix(self, y: Tensor) -> Tensor:
        return torch.cat([y[:1], y[1:] - y[:1]])


@trap("number", LAYER)
class Shared(Net):
    """A row is divided by the number of images."""

    def mix(self, y: Tensor) -> Tensor:
        return y / len(y)


@trap("number", LAYER)
class ManyOrFew(Net):
    """More than three images take another way."""

    def mix(self, y: Tensor) -> Tensor:
        return y.relu() if len(y) > 3 else y


@trap("number", LAYER)
class EvenOrOdd(Net):
    """An even number of images takes another way."""

    def mix(self, y: Tensor) -> Tensor:
        return y.relu() if len(y) % 2 == 0 else y


@trap("number", EITHER, EITHER, by_hand=False)
class Squeezed(Net):
    """One image alone loses the dimension of the batch."""

    def mix(self, y: Tensor) -> Tensor:
        return y.mean((2, 3)).squeeze()
