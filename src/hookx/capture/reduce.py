"""Reductions of activations: what an address says behind '@', computed where the activation is."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize

from hookx.capture.tensors import computable
from hookx.layers.address import Address
from hookx.layers.reductions import OVER_DIMS, Patches, Reduction, Step

_GEM_POWER, _GEM_LEAST = 3, 1e-6  # Radenović et al., Fine-tuning CNN image retrieval with no human annotation, 2018
_OVER_DIMS = {
    "mean": torch.mean,
    "sum": torch.sum,
    "max": torch.amax,
    "min": torch.amin,
    "norm": torch.linalg.vector_norm,
}


class Reducer:
    """Computes reductions, and keeps what a random projection needs on its device.

    Example:
        >>> Reducer().reduce(torch.ones(2, 512, 7, 7), Address.parse("layer4@mean23@l2")).shape
        torch.Size([2, 512])
    """

    def __init__(self) -> None:
        self._projections: dict[tuple[str, torch.device, bool], tuple[Tensor, Tensor]] = {}

    def reduce(self, tensor: Tensor, address: Address, patches: Patches | None = None) -> Tensor:
        """Apply an address's reduction to an activation whose dimension 0 is the batch.

        A type that torch cannot compute with is reduced in a wider one. A maximum, a minimum, and whatever only selects
        values keep the type.

        Args:
            patches: which tokens stand for places of the image, for reductions that need to know.

        Raises:
            RuntimeError: torch cannot compute the reduction from the tensor's type.
        """
        steps = () if address.reduction is None else address.reduction.steps
        for number, step in enumerate(steps):
            before = replace(address, reduction=Reduction(steps[:number]) if number else None)
            tensor = self._step(tensor, step, str(before), patches)
            patches = _kept(patches, step)
        return tensor

    def _step(self, tensor: Tensor, step: Step, address: str, patches: Patches | None) -> Tensor:
        match step.name:
            case "cls":
                return tensor[:, 0]
            case "flatten":
                return tensor.flatten(1)
            case "tokens":
                start, stop = step.bounds(tensor.shape[1])
                return tensor[:, start:stop]
            case "channels":
                dim = 1 + step.channel_dim(tuple(tensor.shape[1:]))
                start, stop = step.bounds(tensor.shape[dim])
                return tensor.narrow(dim, start, stop - start)
            case "patches" | "patchmean" | "cls+patchmean" | "grid":
                assert patches is not None
                return _of_places(tensor, step.name, patches)
        if tensor.dtype == torch.uint64:  # The meta device accepts it; no other does.
            raise RuntimeError("torch has no arithmetic for uint64")
        values = computable(tensor)
        if step.name in OVER_DIMS:
            reduced = _OVER_DIMS[step.name](values, dim=step.dims)
            return reduced.to(tensor.dtype) if step.name in ("max", "min") else reduced
        # Powers and long sums of half precision overflow.
        floats = values if values.dtype == torch.float64 else values.to(torch.float32)
        reduced = self._of_floats(floats, step, address)
        return reduced.to(values.dtype) if values.is_floating_point() else reduced

    def _of_floats(self, values: Tensor, step: Step, address: str) -> Tensor:
        match step.name:
            case "l2":
                return normalize(values, dim=-1)  # A vector of zeros stays one.
            case "gem":
                return values.clamp(min=_GEM_LEAST).pow(_GEM_POWER).mean(step.dims).pow(1 / _GEM_POWER)
            case "pool":
                return adaptive_avg_pool2d(values, step.numbers[0])
            case "project":
                return self._project(values, step.numbers[0], address)
        raise AssertionError(step)

    def _project(self, values: Tensor, count: int, address: str) -> Tensor:
        # Pixel by pixel, if that is how the values lie in memory: to bring them in order costs more than to project.
        is_last = values.ndim == 4 and values.is_contiguous(memory_format=torch.channels_last)
        key = f"{address}@project{count}", values.device, is_last
        if key not in self._projections:
            order, signs = projection(key[0], values[0].numel())
            if is_last:
                channels, height, width = values.shape[1:]
                order = np.moveaxis(
                    np.arange(height * width * channels).reshape(height, width, channels), 2, 0
                ).ravel()[order]
            self._projections[key] = (
                torch.from_numpy(order).to(values.device),
                torch.from_numpy(signs).to(values.device),
            )
        order_on_device, signs_on_device = self._projections[key]
        flat = (values.permute(0, 2, 3, 1) if is_last else values).flatten(1)
        signed = flat.index_select(1, order_on_device).mul_(signs_on_device)
        # Groups of two sizes that differ by one share all values.
        size, larger = divmod(flat.shape[1], count)
        first, rest = signed.split([larger * (size + 1), (count - larger) * size], 1)
        groups = [
            piece.unflatten(1, (number, -1)).sum(2)
            for piece, number in ((first, larger), (rest, count - larger))
            if number
        ]
        return torch.cat(groups, 1)


def reduce(tensor: Tensor, address: Address, patches: Patches | None = None) -> Tensor:
    """Apply an address's reduction once; see `Reducer.reduce`."""
    return Reducer().reduce(tensor, address, patches)


def projection(name: str, count: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return an order of `count` numbers, and a sign for each: a random projection to groups of numbers in that order.

    It is the sparse random projection of Li, Hastie and Church (Very sparse random projections, 2006) at its sparsest,
    with one entry of 1 or -1 for each number, and groups of equal size: a count sketch (Charikar et al., 2002). Squared
    distances are right on average, with a standard deviation of at most sqrt(2 / groups) of their value.

    The name alone decides. It is made of integers, so that it has the same bits on every machine.

    Example:
        >>> order, signs = projection("layer1@project2", 4)
        >>> sorted(order.tolist()), set(signs.tolist()) <= {-1.0, 1.0}
        ([0, 1, 2, 3], True)
    """
    seed = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "little")
    random = _mix(np.arange(count, dtype=np.uint64) + np.uint64(seed))
    signs = np.where(random & np.uint64(1), np.float32(1), np.float32(-1))
    return np.argsort(random >> np.uint64(1), kind="stable"), signs


def _mix(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix the bits of numbers: SplitMix64 (Steele, Lea and Flood, Fast splittable pseudorandom number generators)."""
    with np.errstate(over="ignore"):
        numbers = numbers * np.uint64(0x9E3779B97F4A7C15)
        numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def _of_places(tensor: Tensor, name: str, patches: Patches) -> Tensor:
    """Take the tokens that stand for places of the image, row by row."""
    if tensor.ndim == 4:  # N,height,width,channels
        return tensor.movedim(3, 1)
    placed = _tokens(tensor, patches.tokens)
    if name == "grid":
        return placed.unflatten(1, (patches.height, patches.width)).movedim(3, 1)
    if name == "patches":
        return placed
    mean = computable(placed).mean(1)
    return torch.cat([tensor[:, 0].to(mean.dtype), mean], 1) if name == "cls+patchmean" else mean


def _tokens(tensor: Tensor, tokens: tuple[int, ...]) -> Tensor:
    first, last = tokens[0], tokens[-1]
    if tokens == tuple(range(first, last + 1)):
        return tensor[:, first : last + 1]
    return tensor[:, list(tokens)]


def _kept(patches: Patches | None, step: Step) -> Patches | None:
    """Return the places of tokens behind a step; only the patches have any."""
    if patches is None or step.name != "patches":
        return None
    count = len(patches.tokens)
    return replace(patches, tokens=tuple(range(count)), count=count)
