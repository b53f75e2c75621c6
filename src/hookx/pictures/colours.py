"""Values -> colours: each map on the scale of its own range, what is not finite marked."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.colors import Colormap
from numpy.typing import NDArray
from PIL import Image

from hookx.errors import UsageError, closest
from hookx.pictures.page import Pixels

MARK = (255, 0, 255)  # NaN and infinity. Magenta is in none of the maps that are made for the eye to compare.
_PHOTO_SHARE = 0.35  # of what is seen where a heat map lies on a photograph


def colormap_of(name: str) -> Colormap:
    """Return one of matplotlib's colour maps; `UsageError` with the closest names if there is none."""
    try:
        return matplotlib.colormaps[name]
    except KeyError:
        raise UsageError(
            f"there is no colour map '{name}'; closest: {closest(name, list(matplotlib.colormaps))}",
            "as in viridis, magma, cividis, gray, coolwarm; matplotlib's documentation shows them all",
        ) from None


@dataclass(frozen=True)
class Scaled:
    """Maps whose values lie between 0 and 1; each was scaled by itself.

    `lows` and `highs` are the extremes of each map's finite values, NaN where it has none. A constant map is 0.5.
    """

    units_CHW: NDArray[np.float64]
    marked_CHW: NDArray[np.bool_]  # NaN or infinite
    lows: NDArray[np.float64]
    highs: NDArray[np.float64]

    @property
    def constant(self) -> NDArray[np.bool_]:
        return self.lows == self.highs


def scaled(values_CHW: NDArray[np.float64]) -> Scaled:
    """Bring every map to its own range.

    Example:
        >>> maps = scaled(np.array([[[2.0, 4.0]], [[7.0, 7.0]], [[np.nan, 1.0]]]))
        >>> maps.units_CHW[:, 0].tolist(), maps.constant.tolist(), int(maps.marked_CHW.sum())
        ([[0.0, 1.0], [0.5, 0.5], [0.5, 0.5]], [False, True, True], 1)
    """
    marked = ~np.isfinite(values_CHW)
    empty = marked.all((1, 2))
    lows = np.where(marked, np.inf, values_CHW).min((1, 2), initial=np.inf)
    highs = np.where(marked, -np.inf, values_CHW).max((1, 2), initial=-np.inf)
    lows[empty], highs[empty] = 0.0, 0.0
    # Halved, because the distance between two finite numbers need not be one.
    spans = (highs / 2 - lows / 2)[:, None, None]
    finite = np.where(marked, lows[:, None, None], values_CHW)
    units = np.divide(finite / 2 - lows[:, None, None] / 2, spans, where=spans > 0, out=np.full(finite.shape, 0.5))
    units[marked] = 0.5
    lows[empty], highs[empty] = np.nan, np.nan
    return Scaled(units, marked, lows, highs)


def resized(maps: Scaled, enlarge: tuple[int, int], shrink: tuple[int, int]) -> Scaled:
    """Repeat every pixel `enlarge` times (downwards, across), or take the mean over blocks of `shrink` pixels.

    A block that holds anything not finite is marked; those at the right and lower edge may be smaller.

    Example:
        >>> resized(scaled(np.array([[[0.0, 4.0, 1.0, 1.0]]])), (2, 1), (1, 2)).units_CHW.tolist()
        [[[0.5, 0.25], [0.5, 0.25]]]
    """
    units, marked = maps.units_CHW, maps.marked_CHW
    if shrink != (1, 1):
        height, width = units.shape[1:]
        padding = ((0, 0), (0, -height % shrink[0]), (0, -width % shrink[1]))
        sums = _sums(np.pad(np.where(marked, 0, units), padding), shrink)
        counts = _sums(np.pad((~marked).astype(np.float64), padding), shrink)
        marked = _sums(np.pad(marked.astype(np.float64), padding), shrink) > 0
        units = np.divide(sums, counts, where=counts > 0, out=np.full(sums.shape, 0.5))
    down, across = enlarge
    return Scaled(
        units.repeat(down, 1).repeat(across, 2), marked.repeat(down, 1).repeat(across, 2), maps.lows, maps.highs
    )


def _sums(values_CHW: NDArray[np.float64], block: tuple[int, int]) -> NDArray[np.float64]:
    channels, height, width = values_CHW.shape
    sums: NDArray[np.float64] = values_CHW.reshape(
        channels, height // block[0], block[0], width // block[1], block[1]
    ).sum((2, 4))
    return sums


def coloured(maps: Scaled, colormap: Colormap) -> Pixels:
    """Return maps (C, H, W) as colours (C, H, W, 3)."""
    colours: Pixels = colormap(maps.units_CHW, bytes=True)[..., :3]
    colours[maps.marked_CHW] = MARK
    return colours


def over_photo(colours_CHW3: Pixels, photo: Pixels) -> Pixels:
    """Lay coloured maps over the grey of a photograph, brought to their size; marks stay as they are."""
    height, width = colours_CHW3.shape[1:3]
    grey = np.asarray(resized_photo(photo, width, height, "L"), np.float64)[..., None]
    marked = (colours_CHW3 == MARK).all(-1, keepdims=True)
    blended = np.rint(_PHOTO_SHARE * grey + (1 - _PHOTO_SHARE) * colours_CHW3).astype(np.uint8)
    return np.where(marked, np.array(MARK, np.uint8), blended)


def resized_photo(photo: Pixels, width_px: int, height_px: int, mode: str = "RGB") -> Pixels:
    """Bring a photograph to another size."""
    image = Image.fromarray(photo).convert(mode)
    return np.asarray(image.resize((width_px, height_px), Image.Resampling.LANCZOS))


def bar_of(colormap: Colormap, width_px: int, height_px: int) -> Pixels:
    """Return a strip that shows a colour map from its least to its greatest value."""
    strip: Pixels = colormap(np.linspace(0, 1, width_px), bytes=True)[:, :3]
    return np.broadcast_to(strip, (height_px, width_px, 3))
