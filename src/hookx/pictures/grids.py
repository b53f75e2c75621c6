"""Maps -> a page: a grid of channels, or a single map beside the input."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hookx.pictures.colours import Scaled, colour, find_colormap, lay_over_photo, resize, resize_photo, scale
from hookx.pictures.header import GAP_PX, Caption, count_nouns, draw_header, format_number
from hookx.pictures.page import FAINT_INK, INNER_PX, MARGIN_PX, Page, Pixels, Style, width_of

NUMBER, RANGE = Style(9.5), Style(9, FAINT_INK)

# Widths of a grid's cells. The widest that keeps the grid within this height is taken.
_CELLS_PX = (448, 304, 224, 180, 150, 112, 96, 80, 72, 64, 56, 48, 42, 35, 28)
_GRID_HEIGHT_PX = 1200
_CELL_GAP_PX, _NUMBER_PX = 6, 13


@dataclass(frozen=True)
class Maps:
    """Maps to draw, with the number of each within its layer; `on_photo` tells whether they cover the image."""

    values_CHW: NDArray[np.float64]
    numbers: tuple[int, ...]
    on_photo: bool = True

    def pick(self, positions: Sequence[int]) -> Maps:
        """Return some of the maps, in the order of the positions."""
        numbers = tuple(self.numbers[position] for position in positions)
        return replace(self, values_CHW=self.values_CHW[list(positions)], numbers=numbers)

    def merge(self, values_HW: NDArray[np.float64]) -> Maps:
        """Return a single map that stands for all of them."""
        return replace(self, values_CHW=values_HW[None], numbers=(0,))


def draw_grid(
    maps: Maps, caption: Caption, photo: Pixels | None, *, colormap: str = "viridis", as_heat: bool = False
) -> Page:
    """Draw every map in its own cell, on the scale of its own range, below its number.

    Args:
        maps: what to draw, in this order.
        caption: the text beside the input.
        photo: the input as the model saw it, if there is one.
        colormap: one of matplotlib's.
        as_heat: lay the maps over the photograph.

    Example:
        >>> maps = Maps(np.random.rand(64, 56, 56), tuple(range(64)))
        >>> draw_grid(maps, Caption("layer1", ("resnet18", "64 channels of 56 x 56")), None).pixels().shape[1]
        980
    """
    page, colours, scaled = Page(), find_colormap(colormap), scale(maps.values_CHW)
    caption = replace(caption, lines=(*caption.lines, *_notes(scaled, caption.unit)))
    below = photo if as_heat and maps.on_photo else None

    def paint(size: _CellSize) -> Pixels:
        cells = colour(resize(scaled, size.enlarge, size.shrink), colours)
        return cells if below is None else lay_over_photo(cells, below)

    if len(maps.numbers) > 1:
        legend = f"each {caption.unit} from its own least to its greatest value"
        y = draw_header(page, caption, photo, colours, legend)
        size = _choose_size(maps)
        return page.cut(_place_cells(page, y, size, paint(size), maps.numbers, scaled) + MARGIN_PX)

    legend = f"from {format_number(scaled.lows[0])} to {format_number(scaled.highs[0])}"
    legend += ", over the grey of the input" if below is not None else ""
    beside = photo if maps.on_photo else None  # An input of the same size, where the places match.
    y = draw_header(page, caption, None if maps.on_photo else photo, colours, legend)
    half_px = (INNER_PX - GAP_PX) // 2
    size = _fit(maps, half_px if maps.on_photo else INNER_PX, half_px)
    x = MARGIN_PX
    if beside is not None:
        page.paste(x, y, resize_photo(beside, size.width_px, size.height_px))
        x += size.width_px + GAP_PX
    page.paste(x, y, paint(size)[0])
    return page.cut(y + size.height_px + MARGIN_PX)


def _notes(maps: Scaled, unit: str) -> Iterator[str]:
    constant = int(maps.constant.sum())
    if constant and len(maps.lows) > 1:
        yield f"{count_nouns(constant, unit)} of one value only: drawn in the middle colour"
    elif constant:
        yield f"of one value only, {format_number(maps.lows[0])}: drawn in the middle colour"
    if marked := int(maps.marked_CHW.sum()):
        yield f"magenta: {count_nouns(marked, 'value')} NaN or infinite"


@dataclass(frozen=True)
class _CellSize:
    """How a map becomes a cell: the factors (down, across) by which it is enlarged, or shrunk."""

    enlarge: tuple[int, int]
    shrink: tuple[int, int]
    height_px: int
    width_px: int
    number_px: int  # the room that the number above it needs

    @property
    def pitch_px(self) -> int:
        return max(self.width_px, self.number_px) + _CELL_GAP_PX

    @property
    def row_px(self) -> int:
        return self.height_px + _NUMBER_PX + _CELL_GAP_PX

    @property
    def columns(self) -> int:
        return max(1, (INNER_PX + _CELL_GAP_PX) // self.pitch_px)


def _choose_size(maps: Maps) -> _CellSize:
    """Make the cells as large as they can be while the grid is not much higher than wide."""
    count = len(maps.numbers)
    sizes = [_fit(maps, cell_px, cell_px) for cell_px in _CELLS_PX]
    for size in sizes:
        if size.columns >= min(count, 4) and math.ceil(count / size.columns) * size.row_px <= _GRID_HEIGHT_PX:
            return size
    return sizes[-1]


def _fit(maps: Maps, max_width_px: int, max_height_px: int) -> _CellSize:
    """Fit maps into a cell by whole factors. Only what covers an image has to keep its proportions."""
    _, height, width = maps.values_CHW.shape
    down, across = _factors(height, max_height_px), _factors(width, max_width_px)
    if maps.on_photo:
        down = across = min(down, across, key=lambda factors: factors[0] / factors[1])
    return _CellSize(
        (down[0], across[0]),
        (down[1], across[1]),
        math.ceil(height / down[1]) * down[0],
        math.ceil(width / across[1]) * across[0],
        math.ceil(width_of(str(max(maps.numbers)), NUMBER)),
    )


def _factors(length: int, max_px: int) -> tuple[int, int]:
    return max(1, max_px // length), math.ceil(length / max_px)


def _place_cells(page: Page, y: int, size: _CellSize, cells: Pixels, numbers: Sequence[int], scaled: Scaled) -> int:
    """Place the cells of a grid, each below its number and, if there is room, its range; return where they end."""
    ranges = [_format_range(low, high) for low, high in zip(scaled.lows, scaled.highs, strict=True)]
    numbers_px = [width_of(str(number), NUMBER) + 9 for number in numbers]
    with_ranges = all(
        number_px + width_of(text, RANGE) <= size.width_px for number_px, text in zip(numbers_px, ranges, strict=True)
    )
    for position, (number, cell) in enumerate(zip(numbers, cells, strict=True)):
        row, column = divmod(position, size.columns)
        x, top = MARGIN_PX + column * size.pitch_px, y + row * size.row_px
        page.text(x, top, str(number), NUMBER)
        if with_ranges:
            page.text(x + numbers_px[position], top + 0.5, ranges[position], RANGE)
        page.paste(x, top + _NUMBER_PX, cell)
    return y + math.ceil(len(numbers) / size.columns) * size.row_px - _CELL_GAP_PX


def _format_range(low: float, high: float) -> str:
    if math.isnan(low):
        return "no finite value"
    return format_number(low) if low == high else f"{format_number(low, 2)} … {format_number(high, 2)}"
