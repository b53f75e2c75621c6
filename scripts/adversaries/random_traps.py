"""Random numbers, from generators of every kind."""

from __future__ import annotations

import os
import random
import time

import numpy as np
import torch
from deceit import EITHER, RANDOM, SAME, Net, refused, trap
from torch import Tensor
from torch.nn import functional


@trap("random", RANDOM)
class Drops(Net):
    """Dropout stays on in eval mode."""

    def mix(self, y: Tensor) -> Tensor:
        return functional.dropout(y, 0.5, training=True)


@trap("random", RANDOM)
class OwnGenerator(Net):
    """Noise comes from a torch.Generator of its own."""

    def prepare(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def mix(self, y: Tensor) -> Tensor:
        return y + torch.rand(y.shape, generator=self.generator)


@trap("random", RANDOM)
class NumpyNoise(Net):
    """Noise comes from numpy's global generator."""

    def mix(self, y: Tensor) -> Tensor:
        return y + torch.from_numpy(np.random.rand(*y.shape).astype(np.float32))


@trap("random", RANDOM)
class NumpyGenerator(Net):
    """Noise comes from a numpy Generator of its own."""

    def prepare(self) -> None:
        self.generator = np.random.default_rng(0)

    def mix(self, y: Tensor) -> Tensor:
        return y + torch.from_numpy(self.generator.random(y.shape, np.float32))


@trap("random", RANDOM)
class PythonNoise(Net):
    """A number comes from Python's global generator."""

    def mix(self, y: Tensor) -> Tensor:
        return y * random.random()


@trap("random", RANDOM)
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


@trap("random", RANDOM)
class RandomMask(Net):
    """Three quarters of the tokens are masked at random, as in a masked autoencoder."""

    def mix(self, y: Tensor) -> Tensor:
        tokens = y.flatten(2).transpose(1, 2)
        kept = torch.rand(tokens.shape[:2]).argsort(1)[:, :4]
        return tokens.gather(1, kept[..., None].expand(-1, -1, 8))


@trap("random", refused("(?i)random|'out'"), EITHER)
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
