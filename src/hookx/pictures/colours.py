"""Values -> colours: each map on the scale of its own range; NaN and infinity are marked."""

from __future__ import annotations

from dataclasses import dataclass, replace

import matplotlib
import numpy as np
from matplotlib.colors import Colormap
from numpy.typing import NDArray
from PIL import Image

from hookx.errors import UsageError, closest

Pixels = NDArray[np.uint8]  # height, width, 3

MARK = (255, 0, 255)  # NaN and infinity: magenta, which no perceptually uniform colour map contains.
_PHOTO_SHARE = 0.35  # the photograph's share of the colour where a heat map lies over it


def find_colormap(name: str) -> Colormap:
    """Return one of matplotlib's colour maps; `UsageError` with the closest names if there is none."""
    try:
        return matplotlib.colormaps[name]
    except KeyError:
        raise UsageError(
            f"invalid --colormap '{name}'; closest: {closest(name, list(matplotlib.colormaps))}",
            "any of matplotlib's, such as viridis, magma, cividis, gray or coolwarm",
        ) from None


@dataclass(frozen=True)
class Scaled:
    """Maps whose values lie between 0 and 1, each scaled by itself; a constant map is 0.5.

    `lows` and `highs` are the extremes of each map's finite values, NaN where it has none.
    """

    units_CHW: NDArray[np.float64]
    marked_CHW: NDArray[np.bool_]  # NaN or infinite
    lows: NDArray[np.float64]
    highs: NDArray[np.float64]

    @property
    def constant(self) -> NDArray[np.bool_]:
        return self.lows == self.highs

    def take(self, rows: NDArray[np.int_], columns: NDArray[np.int_]) -> Scaled:
        """Return the values at some rows and columns of every map."""
        units, marked = self.units_CHW[:, rows[:, None], columns], self.marked_CHW[:, rows[:, None], columns]
        return replace(self, units_CHW=units, marked_CHW=marked)


def scale(values_CHW: NDArray[np.float64]) -> Scaled:
    """Scale every map to its own range.

    Example:
        >>> maps = scale(np.array([[[2.0, 4.0]], [[7.0, 7.0]], [[np.nan, 1.0]]]))
        >>> maps.units_CHW[:, 0].tolist(), maps.constant.tolist(), int(maps.marked_CHW.sum())
        ([[0.0, 1.0], [0.5, 0.5], [0.5, 0.5]], [False, True, True], 1)
    """
    marked = ~np.isfinite(values_CHW)
    lows = np.where(marked, np.inf, values_CHW).min((1, 2), initial=np.inf)
    highs = np.where(marked, -np.inf, values_CHW).max((1, 2), initial=-np.inf)
    lows, highs = (np.where(marked.all((1, 2)), np.nan, extremes) for extremes in (lows, highs))
    # Halved, because the difference of two finite numbers can overflow.
    spans, above_low = (highs / 2 - lows / 2)[:, None, None], values_CHW / 2 - lows[:, None, None] / 2
    units = np.divide(above_low, spans, where=~marked & (spans > 0), out=np.full(values_CHW.shape, 0.5))
    return Scaled(units, marked, lows, highs)


def resize(maps: Scaled, enlarge: tuple[int, int], shrink: tuple[int, int]) -> Scaled:
    """Repeat every value `enlarge` times (down, across), or take the mean over blocks of `shrink` values.

    A block that holds NaN or infinity is marked; blocks at the right and lower edge can be smaller.
    """
    if shrink != (1, 1):
        marked = maps.marked_CHW
        sums, counts = _sum_blocks(np.where(marked, 0, maps.units_CHW), shrink), _sum_blocks(~marked, shrink)
        units = np.divide(sums, counts, where=counts > 0, out=np.full(sums.shape, 0.5))
        maps = replace(maps, units_CHW=units, marked_CHW=_sum_blocks(marked, shrink) > 0)
    rows, columns = (np.arange(n).repeat(times) for n, times in zip(maps.units_CHW.shape[1:], enlarge, strict=True))
    return maps.take(rows, columns)


def _sum_blocks(values_CHW: NDArray[np.float64] | NDArray[np.bool_], block: tuple[int, int]) -> NDArray[np.float64]:
    channels, height, width = values_CHW.shape
    padded = np.pad(values_CHW.astype(np.float64), ((0, 0), (0, -height % block[0]), (0, -width % block[1])))
    blocks = padded.reshape(channels, -(-height // block[0]), block[0], -(-width // block[1]), block[1])
    sums: NDArray[np.float64] = blocks.sum((2, 4))
    return sums


def colour(maps: Scaled, colormap: Colormap, photo: Pixels | None = None) -> Pixels:
    """Return maps (C, H, W) as colours (C, H, W, 3); with a photograph, they lie over its grey, resized to fit."""
    colours: Pixels = colormap(maps.units_CHW, bytes=True)[..., :3]
    if photo is not None:
        height, width = maps.units_CHW.shape[1:]
        grey = np.asarray(resize_photo(photo, width, height, "L"), np.float64)[..., None]
        colours = np.rint(_PHOTO_SHARE * grey + (1 - _PHOTO_SHARE) * colours).astype(np.uint8)
    colours[maps.marked_CHW] = MARK
    return colours


def resize_photo(photo: Pixels, width_px: int, height_px: int, mode: str = "RGB") -> Pixels:
    image = Image.fromarray(photo).convert(mode)
    return np.asarray(image.resize((width_px, height_px), Image.Resampling.LANCZOS))


def colour_bar(colormap: Colormap) -> Pixels:
    """Return a strip that shows a colour map from its lowest to its highest value."""
    strip: Pixels = colormap(np.linspace(0, 1, 96), bytes=True)[:, :3]
    return np.broadcast_to(strip, (10, 96, 3))
