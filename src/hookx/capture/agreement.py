"""When two computations of one image agree: what rounding may change in a row, and what it may not.

A sum that is added in another order rounds differently, and a batch of another size is added in another order. So
floating-point rows are compared within what rounding does to them, which is measured for each layer: the caller
computes the same image in two batches and passes what `rounding_between` returns. The rule of `disagreement`:

- Integers and booleans are equal. NaN is where NaN was, and so are both infinities.
- An element of another type moves by no more than `ROUNDING_FACTOR` times the measured rounding, or by the rounding of
  a float32 if that is more, both as a share of the row's largest magnitude; and by one unit in its own last place.
- A row of at most `MAX_LEVELS` different values is step-like: signs, masks, quantised values. Rounding moves such an
  element either not at all or by a whole step, so one element in `ELEMENTS_PER_STEP` may move to the next value.

What a step decides further on, or amplifies, moves more: the nearest entry of a codebook, the normalised noise of a
black image. `is_unsteady` recognises it, at the price of more passes: the row moves as much when the image, alone,
changes in its last place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDING_FACTOR = 8
ELEMENTS_PER_STEP = 10_000
MAX_LEVELS = 256

# 16 units in the last place of a float32: sums in another order, with nothing behind them that amplifies it.
_MIN_ROUNDING = 16 * torch.finfo(torch.float32).eps
# How far a row may move at most, whatever is measured, by the coarsest arithmetic: the number of images can matter too,
# and that shows between two batches of copies of one image.
_MAX_MOVE, _MAX_MOVE_OF_TF32, _MAX_MOVE_OF_HALVES = 1e-4, 1e-2, 6e-2

_EPS = {torch.float8_e5m2fnuz: 0.25}  # With its 2 bits of mantissa; torch 2.14 says 0.125.


@dataclass(frozen=True)
class Disagreement:
    """How far two computations of one row are apart.

    Example:
        >>> print(disagreement(torch.tensor([4.0, 1.0]), torch.tensor([4.0, 1.5]), rounding=1e-7))
        1 of 2 values move by up to 1.2e-01 of the largest
    """

    by: float  # the largest difference as a share of the row's largest magnitude; infinite if only one is finite
    elements: int  # how many differ by more than rounding
    of: int

    def __str__(self) -> str:
        return f"{self.elements:,} of {self.of:,} values move by up to {self.by:.1e} of the largest"


def rounding_between(row: Tensor, again: Tensor) -> float:
    """Return the largest difference as a share of the largest magnitude; infinite where only one is finite.

    NaN and infinities in the same places do not count, nor does a row without elements. The rows may be of any type, on
    any device.

    Example:
        >>> rounding_between(torch.tensor([4.0, float("nan")]), torch.tensor([5.0, float("nan")]))
        0.2
    """
    if _have_same_values(row, again):
        return 0.0
    if row.shape != again.shape:
        return float("inf")
    one, other = _comparable(row), _comparable(again)
    return float(_moves(one, other).max()) if one.numel() else 0.0


def max_rounding(*dtypes: torch.dtype, tf32: bool = False) -> float:
    """Return the largest rounding to believe where these types, and perhaps TensorFloat-32, are computed with."""
    move = _MAX_MOVE_OF_TF32 if tf32 else _MAX_MOVE
    if any(dtype.is_floating_point and torch.finfo(dtype).bits < 32 for dtype in dtypes):
        move = _MAX_MOVE_OF_HALVES
    return move / ROUNDING_FACTOR


def disagreement(row: Tensor, again: Tensor, rounding: float) -> Disagreement | None:
    """Return how far two computations of one image are apart, or None if they agree within rounding.

    The rows may be of any type, on any device.

    Args:
        row: the activation of one image, as it is stored.
        again: the same image's activation from another batch.
        rounding: what `rounding_between` found between two batches that differ in nothing but rounding.
    """
    if _have_same_values(row, again):
        return None
    if row.shape != again.shape or row.dtype != again.dtype:
        return Disagreement(float("inf"), row.numel(), row.numel())
    if _are_close(row, again, max(ROUNDING_FACTOR * rounding, _MIN_ROUNDING)):
        return None
    one, other = _comparable(row), _comparable(again)
    moves = _moves(one, other)
    has_moved = moves > _allowed(one, other, row.dtype, rounding)
    count = int(has_moved.sum())
    if not count or _is_step(one, other, has_moved, count):
        return None
    return Disagreement(float(moves.max()), count, one.numel())


def is_unsteady(row: Tensor, again: Tensor, alone: Tensor, nudged: Sequence[Tensor]) -> bool:
    """Return whether a row moves no more than the image's own last bits can move it.

    The image is alone in the batches of the last two arguments, so that no dependence on others can hide in them. Both
    the largest difference and the mean square of all differences count: a few elements on the edge of a step may take
    it, while a dependence that moves all of them a little, or as few of them much further, is none of rounding.

    Args:
        row: the activation of one image, as it is stored.
        again: the same image's activation from another batch.
        alone: its activation from a batch of one.
        nudged: its activations from batches of one, each time with pixels that differ in their last place.
    """
    return is_within(sizes_of_moves(row, again), [sizes_of_moves(alone, other) for other in nudged])


def sizes_of_moves(row: Tensor, again: Tensor) -> tuple[float, float]:
    """Return the largest difference and the root mean square of all, as shares of the row's largest magnitude."""
    # A finite row moves by at most twice its largest magnitude; an element that overflows must not excuse all others.
    moves = _moves(_comparable(row), _comparable(again)).clamp(max=2)
    return (float(moves.max()), float(moves.square().mean().sqrt())) if moves.numel() else (0.0, 0.0)


def is_within(sizes: tuple[float, float], noise: Sequence[tuple[float, float]]) -> bool:
    """Return whether neither of a move's `sizes_of_moves` is larger than rounding can make those of noise."""
    return all(
        size <= ROUNDING_FACTOR * max(of_noise) for size, of_noise in zip(sizes, zip(*noise, strict=True), strict=True)
    )


def _are_close(row: Tensor, again: Tensor, share: float) -> bool:
    """Return whether two rows are obviously close: a few passes over memory, in their own type."""
    if row.dtype not in (torch.float32, torch.float64):
        return False
    move = float(torch.dist(row, again, p=float("inf")))
    return math.isfinite(move) and move <= share * float(torch.linalg.vector_norm(row, float("inf")))


def _have_same_values(row: Tensor, again: Tensor) -> bool:
    """Return whether two rows hold the same bits, which is quick to see."""
    if row.shape != again.shape or row.dtype != again.dtype:
        return False
    one, other = (tensor.detach().cpu().contiguous().flatten() for tensor in (row, again))
    return not one.numel() or torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def _comparable(row: Tensor) -> Tensor:
    """Return a row's values, which may be of any type, as a vector that can be subtracted: float64 or int64."""
    values = row.detach().cpu()
    values = (torch.view_as_real(values.resolve_conj()) if values.is_complex() else values).flatten()
    return values.to(torch.float64 if values.is_floating_point() else torch.int64)


def _scale(one: Tensor, other: Tensor) -> float:
    return max(float(values.to(torch.float64).nan_to_num(0, 0, 0).abs().max()) for values in (one, other))


def _moves(one: Tensor, other: Tensor) -> Tensor:
    """Return the difference of each element as a share of the largest magnitude."""
    is_same = (one == other) | (one.isnan() & other.isnan())
    differences = (one.to(torch.float64) - other.to(torch.float64)).abs()
    differences = torch.where(differences.isfinite(), differences, torch.inf)
    # Two large integers can be different and yet be the same float64.
    differences = differences.clamp(min=torch.finfo(torch.float64).tiny).masked_fill(is_same, 0.0)
    return differences / (_scale(one, other) or 1.0)


def _allowed(one: Tensor, other: Tensor, dtype: torch.dtype, rounding: float) -> Tensor:
    """Return how far rounding may move each element, as a share of the largest magnitude."""
    if not one.is_floating_point():
        return torch.zeros_like(one, dtype=torch.float64)
    info = torch.finfo(dtype)
    eps = _EPS.get(dtype, info.eps)
    # What lies between two numbers of the type is rounded to either of them.
    last_places = (torch.maximum(one.abs(), other.abs()) * eps).clamp(min=info.tiny * eps)
    share = last_places / (_scale(one, other) or 1.0)
    share = share.nan_to_num(0, 0, 0)  # beside infinity
    return share + max(ROUNDING_FACTOR * rounding, _MIN_ROUNDING)


def _is_step(one: Tensor, other: Tensor, has_moved: Tensor, count: int) -> bool:
    """Return whether a row is step-like, and moves by no more than its few steps."""
    if not one.is_floating_point() or count > one.numel() // ELEMENTS_PER_STEP:
        return False
    levels = torch.cat([one, other]).unique()
    if len(levels) > MAX_LEVELS or not bool(levels.isfinite().all()):
        return False
    before, after = one[has_moved], other[has_moved]
    steps = (torch.searchsorted(levels, before) - torch.searchsorted(levels, after)).abs()
    if bool((levels == 0).any()):
        steps -= (before * after < 0).to(steps.dtype)  # From -1 to 1 is one step, even if a sign can be 0.
    return bool((steps <= 1).all())
