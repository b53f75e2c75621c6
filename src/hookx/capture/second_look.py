"""Compute images of a run again, in other company, and find the rows that move by more than rounding moves them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hookx.capture.agreement import Disagreement, disagreement, is_unsteady, max_rounding, rounding_between
from hookx.capture.arithmetic import PRECISIONS
from hookx.capture.rows import RowCapture
from hookx.layers.select import Target
from hookx.plan import LayerSpec

_NUDGES = 8  # passes with pixels that differ in their last place
_EPS_OF_TF32 = 2**-10

Rows = Mapping[str, Tensor]  # address -> (images, *shape), or of one image (*shape)


@dataclass(frozen=True)
class Moved:
    """An activation of an image that is another one in other company."""

    address: str
    by: Disagreement
    rounding: float  # the measured one

    def __str__(self) -> str:
        return f"{self.by} (rounding: {self.rounding:.0e})"


class SecondLook:
    """Computes images again through the capture of a run, and compares the rows.

    The rounding of each layer is the probe's, measured on two copies of an image. Batches of other sizes can round
    worse, and a layer can amplify rounding for some images. So before a row counts as moved, the rounding is measured
    on the image itself: in batches of its copies that are as large as the two that are compared, and alone, with pixels
    that differ in their last place. No other image is in these batches, so no dependence on others can hide in what
    they measure. They cost passes only where a row moves.
    """

    def __init__(self, capture: RowCapture, targets: Sequence[Target], layers: Sequence[LayerSpec]) -> None:
        self._capture, self._layers = capture, layers
        # Measured by the probe, and by this process where that was too little.
        self._rounding = {str(target.address): target.tensor.rounding for target in targets}
        runner = capture.runner
        self.device = runner.device
        dtypes = {getattr(torch, target.tensor.dtype) for target in targets}
        dtypes |= {parameter.dtype for parameter in runner.module.parameters()}
        floats = [dtype for dtype in (*dtypes, PRECISIONS[runner.precision]) if dtype and dtype.is_floating_point]
        is_tf32 = runner.precision == "tf32"
        self._max_rounding = max_rounding(*floats, tf32=is_tf32)
        single = _EPS_OF_TF32 if is_tf32 else torch.finfo(torch.float32).eps
        self._eps = max([single, *(torch.finfo(dtype).eps for dtype in floats)])

    def compute(self, pixels_NCHW: Tensor) -> dict[str, Tensor]:
        """Run a batch and return its rows, as they would be stored; a copy of the pixels goes into the model.

        Raises:
            CaptureError: the model fails on a batch of this size, or behaves in another way than in the probe.
        """
        rows = {
            layer.address: torch.empty((len(pixels_NCHW), *layer.shape), dtype=getattr(torch, layer.dtype))
            for layer in self._layers
        }
        self._capture.run(pixels_NCHW.clone(), rows, counted=False)
        self._capture.wait()
        return rows

    def find_moved(self, stored: Rows, again: Rows, image_CHW: Tensor, images_together: tuple[int, int]) -> list[Moved]:
        """Return the activations of one image that are others in another batch.

        Args:
            stored: the rows of the image.
            again: its rows from the other batch.
            image_CHW: its pixels.
            images_together: how many images the batch had that the stored rows come from, and the other one.
        """
        moved = self._compare(stored, again, self._rounding)
        if moved:
            sizes = {1, *images_together}
            copies = {size: self.compute(image_CHW.expand(size, *image_CHW.shape)) for size in sizes}
            alone = copies[1]
            for address in moved:
                pairs = itertools.combinations([rows[address][0] for rows in copies.values()], 2)
                measured = max((rounding_between(*pair) for pair in pairs), default=0.0)
                # The number of images can matter too, so do not believe everything that depends on it.
                self._rounding[address] = max(self._rounding[address], min(measured, self._max_rounding))
            moved = self._compare(stored, again, moved)
        if moved:
            nudged = [self.compute(other_CHW[None]) for other_CHW in _nudge(image_CHW, 2 * self._eps)]
            # What moves without a nudge does so for another reason: random numbers, or what earlier passes left.
            repeated = self.compute(image_CHW[None])
            for address in list(moved):
                row, row_again = alone[address][0], repeated[address][0]
                is_steady = disagreement(row, row_again, self._rounding[address]) is None
                others = [rows[address][0] for rows in nudged]
                if is_steady and is_unsteady(stored[address], again[address], row, others):
                    del moved[address]
        return [Moved(address, by, self._rounding[address]) for address, by in moved.items()]

    def _compare(self, stored: Rows, again: Rows, addresses: Iterable[str]) -> dict[str, Disagreement]:
        found = {a: disagreement(stored[a], again[a], self._rounding[a]) for a in addresses}
        return {address: by for address, by in found.items() if by is not None}


def _nudge(image_CHW: Tensor, eps: float) -> Iterator[Tensor]:
    """Yield an image with pixels that are a little larger or smaller: all of them at once, then each for itself."""
    generator = torch.Generator().manual_seed(0)
    magnitudes = image_CHW.abs().clamp(min=1)
    for number in range(_NUDGES):
        if number < 2:
            signs = torch.full_like(image_CHW, (1, -1)[number])
        else:
            signs = torch.randint(0, 2, image_CHW.shape, generator=generator).to(image_CHW) * 2 - 1
        yield image_CHW + eps * signs * magnitudes
