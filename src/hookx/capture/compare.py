"""Compare one tensor in several passes: its batch dimension, which of its rows are an image's, how far it rounds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hookx.capture.agreement import (
    ROUNDING_FACTOR,
    Disagreement,
    disagreement,
    is_within,
    max_rounding,
    rounding_between,
    sizes_of_moves,
)
from hookx.capture.tensors import Parts, dtype_name
from hookx.layers.select import TensorInfo

# The types that every device compares and subtracts.
_QUICK = {
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.bfloat16, torch.float16, torch.float32, torch.float64),
}


@dataclass(frozen=True)
class Batch:
    """Images to take through the model, among them the one that the probe follows."""

    pixels_NCHW: Tensor
    places: tuple[int, ...]  # where the followed image is
    what: str = ""  # what is unusual about the other images
    calibrates: bool = False  # all its images are the followed one, so its rows differ by rounding alone

    def __len__(self) -> int:
        return len(self.pixels_NCHW)

    def __str__(self) -> str:
        return "1 image" if len(self) == 1 else f"{len(self)} images"


@dataclass
class Comparison:
    """One tensor in every pass, compared with what the first pass made of the followed image alone."""

    parts: Parts
    alone: Tensor
    coarsest: tuple[torch.dtype, ...] = ()  # the types that the model computes with, besides the tensor's own
    tf32: bool = False
    compares: bool = True  # or else looks at shapes alone
    batch_dim: int | None = None
    rows: int = 1  # along the batch dimension, for one image
    groups: list[int] = field(default_factory=lambda: [1])  # in how many groups these rows can lie
    rounding: float = 0.0
    problem: str = ""
    is_whole: bool = False  # a batch never has another image, so the whole tensor belongs to this one
    moved: dict[int, Disagreement] = field(default_factory=dict)  # number of the pass -> how far the row moved
    sizes: tuple[float, float] = (0.0, 0.0)  # of the largest moves: see `sizes_of_moves`
    is_excused: bool = False  # unusual pixels gave it a shape that proves nothing
    _has_seen_more: bool = False

    @property
    def has_failed(self) -> bool:
        return bool(self.moved) and not self.problem

    def see(self, tensor: Tensor, batch: Batch, number: int) -> None:
        """Compare the tensor that a pass made of a batch."""
        if self.problem:
            return
        if tensor.dtype != self.alone.dtype:
            types = f"{dtype_name(self.alone.dtype)} in one pass and {dtype_name(tensor.dtype)} in another"
            self.problem = f"it is {types}"
        elif len(batch) > 1 and not self._has_seen_more:
            self._find_batch_dim(tensor.shape, batch)
            self._has_seen_more = True
        elif list(tensor.shape) != (expected := self._expected_shape(len(batch))):
            if batch.what:  # Unusual pixels can have other shapes; those of ordinary ones count.
                self.is_excused = True
                return
            text = ",".join(map(str, tensor.shape)) or "scalar"
            self.problem = f"it is {text} for {batch}, not {','.join(map(str, expected))}: its shape depends on them"
        if self.problem or not self.compares:
            return
        if batch.calibrates:
            self._calibrate(tensor, batch)
        elif (moved := self.compare(tensor, batch)) is not None:
            self.moved[number] = moved
            self.sizes = self._sizes(tensor, batch)

    def compare(self, tensor: Tensor, batch: Batch) -> Disagreement | None:
        """Return how far the followed image's row moves in a batch; None if it stays.

        Several ways to group the rows of an image can be possible; those remain with which it stays.
        """
        if not self.fits(tensor, batch):
            return Disagreement(float("inf"), self.alone.numel(), self.alone.numel())
        if fitting := [groups for groups in self.groups if self._agrees_at_first_sight(tensor, batch, groups)]:
            self.groups = fitting
            return None
        # The usual two: the rows of an image one after the other, or those of all images in turn.
        found = {groups: self._compare(tensor, batch, groups) for groups in {self.groups[0], self.groups[-1]}}
        if fitting := [groups for groups, moved in found.items() if moved is None]:
            self.groups = fitting
            return None
        return min((moved for moved in found.values() if moved is not None), key=lambda moved: moved.by)

    def fits(self, tensor: Tensor, batch: Batch) -> bool:
        """Return whether a tensor has the type and shape that a batch should give it."""
        return list(tensor.shape) == self._expected_shape(len(batch)) and tensor.dtype == self.alone.dtype

    def row(self, tensor: Tensor, count: int, place: int) -> Tensor:
        """Return one image's part of a tensor for `count` images."""
        return self._split(tensor, count, self.groups[0], place)[1]

    def accept(self, rounding: float) -> bool:
        """Return whether what moved is explained by as much rounding; if so, take that as the tensor's rounding."""
        rounding = min(rounding, self.limit)
        if any(moved.by > ROUNDING_FACTOR * rounding for moved in self.moved.values()):
            return False
        self.rounding = max(self.rounding, rounding)
        self.moved.clear()
        return True

    def accept_noise(self, noise: list[tuple[float, float]]) -> bool:
        """Return whether what moved is explained by as much noise, which the image's own last bits make of it."""
        if not is_within(self.sizes, noise):
            return False
        self.rounding = max(self.rounding, min(self.sizes[0], self.limit) / ROUNDING_FACTOR)
        self.moved.clear()
        return True

    def rounding_of(self, tensor: Tensor, batch: Batch) -> float:
        """Return how far the rows of a batch of copies are from the image alone."""
        return max(rounding_between(*self._split(tensor, len(batch), self.groups[0], place)) for place in batch.places)

    def info(self, reason: str = "") -> TensorInfo:
        """Return what is known of the tensor; `reason` is why its rows move."""
        problem = self.problem or (reason if self.moved else "")
        shape, dim, rows = list(self.alone.shape), self.batch_dim, self.rows
        if self.is_whole and not problem:
            dim, rows = (0, shape[0]) if shape and shape[0] else (None, 1)
            problem = "it has no batch dimension" if dim is None else ""
        elif not problem and len(self.groups) > 1 and self.compares:
            problem = f"the {rows} rows of an image cannot be told from those of other images"
        if dim is not None and rows == 1:
            del shape[dim]
        dtype = dtype_name(self.alone.dtype)
        return TensorInfo(self.parts, tuple(shape), dtype, dim, rows, problem, self.groups[0], self.rounding)

    @property
    def limit(self) -> float:
        return max_rounding(self.alone.dtype, *self.coarsest, tf32=self.tf32)

    def make_whole(self) -> None:
        """Take the whole tensor as one image's, whatever a larger batch has shown."""
        self.problem, self.batch_dim, self.rows, self.groups, self.is_whole = "", None, 1, [1], True

    def _sizes(self, tensor: Tensor, batch: Batch) -> tuple[float, float]:
        """Return the sizes of the largest moves, of this pass and those before."""
        rows = [self._split(tensor, len(batch), self.groups[0], place) for place in batch.places]
        found = [self.sizes, *(sizes_of_moves(alone, row) for alone, row in rows)]
        return max(largest for largest, _ in found), max(mean for _, mean in found)

    def _find_batch_dim(self, of_batch: torch.Size, batch: Batch) -> None:
        alone = self.alone.shape
        grown = [dim for dim, (one, more) in enumerate(zip(alone, of_batch, strict=False)) if one != more]
        if len(of_batch) != len(alone):
            self.problem = f"it has {len(alone)} dimensions for 1 image and {len(of_batch)} for {len(batch)}"
        elif len(grown) > 1:
            self.problem = "more than one dimension changes with the number of images"
        elif grown:
            (dim,) = grown
            if of_batch[dim] != len(batch) * alone[dim]:
                lengths = f"{alone[dim]} for 1 image and {of_batch[dim]} for {len(batch)}"
                self.problem = f"dimension {dim} is {lengths}, so images have different numbers of rows"
                return
            self.batch_dim, self.rows = dim, alone[dim]
            self.groups = _divisors(self.rows)

    def _expected_shape(self, count: int) -> list[int]:
        shape = list(self.alone.shape)
        if self.batch_dim is not None:
            shape[self.batch_dim] *= count
        return shape

    def _calibrate(self, tensor: Tensor, batch: Batch) -> None:
        """Measure the rounding between the image alone and beside copies of itself."""
        self.rounding = self.limit / ROUNDING_FACTOR
        moved = self.compare(tensor, batch)
        self.rounding = 0.0
        if moved is not None:
            self.moved[1] = moved
            self.sizes = self._sizes(tensor, batch)
        else:
            rounding = self.rounding_of(tensor, batch)
            self.rounding = rounding if rounding <= self.limit else 0.0  # More is a step, see `disagreement`.

    def _agrees_at_first_sight(self, tensor: Tensor, batch: Batch, groups: int) -> bool:
        return all(
            _agree_at_first_sight(*self._split(tensor, len(batch), groups, place), self.rounding)
            for place in batch.places
        )

    def _compare(self, tensor: Tensor, batch: Batch, groups: int) -> Disagreement | None:
        for place in batch.places:
            moved = disagreement(*self._split(tensor, len(batch), groups, place), self.rounding)
            if moved is not None:
                return moved
        return None

    def _split(self, tensor: Tensor, count: int, groups: int, place: int) -> tuple[Tensor, Tensor]:
        """Return the image alone, and its part of a batch, in the same shape."""
        dim = self.batch_dim
        if dim is None:
            return self.alone, tensor
        rows_in_group = self.rows // groups
        alone = self.alone.unflatten(dim, (groups, rows_in_group))
        return alone, tensor.unflatten(dim, (groups, count, rows_in_group)).select(dim + 1, place)


def split_by_image(tensor: Tensor, info: TensorInfo, count: int) -> Tensor:
    """Return a layer's tensor for `count` images with the images first: (count, *info.shape).

    Example:
        >>> columns = torch.arange(6)  # of an image 0 and an image 1, in turn
        >>> split_by_image(columns, TensorInfo((), (3,), "int64", 0, rows_per_image=3, groups_per_image=3), 2)
        tensor([[0, 2, 4],
                [1, 3, 5]])
    """
    dim = info.batch_dim
    assert dim is not None
    if info.rows_per_image == 1:
        return tensor.movedim(dim, 0)
    groups = info.groups_per_image
    by_image = tensor.unflatten(dim, (groups, count, info.rows_per_image // groups)).movedim(dim + 1, 0)
    return by_image.flatten(dim + 1, dim + 2)


def _agree_at_first_sight(alone: Tensor, row: Tensor, rounding: float) -> bool:
    """Return whether two rows agree by a test that is stricter than `disagreement`, and quick on every device."""
    if alone.dtype not in _QUICK:
        return False
    if torch.equal(alone, row):
        return True
    if not alone.is_floating_point() or not alone.numel():
        return False
    tolerance = max(ROUNDING_FACTOR * rounding, 8 * torch.finfo(torch.float32).eps)
    moved, scale = (alone - row).abs().max(), alone.abs().max()
    if not bool(moved.isfinite()):
        is_same = (alone == row) | ((alone != alone) & (row != row))
        moved = (alone - row).abs().masked_fill(is_same, 0).max()
        scale = alone.abs().nan_to_num(0, 0, 0).max()
    return bool(moved <= tolerance * scale)  # False for NaN.


def _divisors(number: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})
