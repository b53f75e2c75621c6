"""Maps, values and overviews -> pages."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.colors import Colormap
from numpy.typing import NDArray

from hookx.pictures.colours import MARK, Pixels, Scaled, colour, colour_bar, find_colormap, resize, resize_photo, scale
from hookx.pictures.page import (
    FAINT_INK,
    GAP_PX,
    INNER_PX,
    MARGIN_PX,
    PAPER,
    SMALL,
    WIDTH_PX,
    Caption,
    Page,
    Style,
    count_nouns,
    draw_header,
    format_number,
    width_of,
)

_NUMBER, _RANGE = Style(9.5), Style(9, FAINT_INK)


@dataclass(frozen=True)
class Content:
    """What is drawn of a layer: maps (C, H, W) or values (C,), with the number of each within the layer."""

    values: NDArray[np.float64]
    numbers: Sequence[int]
    on_photo: bool = True  # whether maps cover the image

    @property
    def are_maps(self) -> bool:
        return self.values.ndim == 3

    def pick(self, positions: Sequence[int]) -> Content:
        """Return some of the maps or values, in the order of the positions."""
        numbers = tuple(self.numbers[position] for position in positions)
        return replace(self, values=self.values[list(positions)], numbers=numbers)

    def merge(self, values_HW: NDArray[np.float64]) -> Content:
        """Return a single map that stands for all of them."""
        return replace(self, values=values_HW[None], numbers=(0,))


# --- maps -----------------------------------------------------------------------------------------------------------

# Widths of a grid's cells. The widest that keeps the grid within this height is taken.
_CELLS_PX = (448, 304, 224, 180, 150, 112, 96, 80, 72, 64, 56, 48, 42, 35, 28)
_GRID_HEIGHT_PX = 1200
_CELL_GAP_PX, _NUMBER_PX = 6, 13


def draw_grid(
    maps: Content, caption: Caption, photo: Pixels | None, *, colormap: str = "viridis", as_heat: bool = False
) -> Page:
    """Draw every map in its own cell, on the scale of its own range, below its number; a single one beside the input.

    With `as_heat`, the maps lie over the photograph, if they cover it.

    Example:
        >>> maps = Content(np.random.rand(64, 56, 56), range(64))
        >>> draw_grid(maps, Caption("layer1", ("resnet18", "64 channels of 56 x 56")), None).pixels().shape[1]
        980
    """
    page, colours, scaled = Page(), find_colormap(colormap), scale(maps.values)
    caption = replace(caption, lines=(*caption.lines, *_describe_maps(scaled, caption.unit)))
    below = photo if as_heat and maps.on_photo else None
    if len(maps.numbers) > 1:
        y = draw_header(page, caption, photo, colours, f"each {caption.unit} from its own least to its greatest value")
        sizes = [_CellSize(maps, cell_px, cell_px) for cell_px in _CELLS_PX]
        low_enough = (size for size in sizes if size.columns >= min(size.count, 4) and size.grid_px <= _GRID_HEIGHT_PX)
        size = next(low_enough, sizes[-1])
        cells = colour(resize(scaled, size.enlarge, size.shrink), colours, below)
        _place_cells(page, y, size, cells, maps.numbers, scaled)
        return page.cut(y + size.grid_px - _CELL_GAP_PX + MARGIN_PX)

    legend = f"from {format_number(scaled.lows[0])} to {format_number(scaled.highs[0])}"
    legend += ", over the grey of the input" if below is not None else ""
    y = draw_header(page, caption, None if maps.on_photo else photo, colours, legend)
    half_px = (INNER_PX - GAP_PX) // 2
    size = _CellSize(maps, half_px if maps.on_photo else INNER_PX, half_px)
    x = MARGIN_PX
    if maps.on_photo and photo is not None:  # The input has the same size, because the places match.
        page.paste(x, y, resize_photo(photo, size.width_px, size.height_px))
        x += size.width_px + GAP_PX
    page.paste(x, y, colour(resize(scaled, size.enlarge, size.shrink), colours, below)[0])
    return page.cut(y + size.height_px + MARGIN_PX)


def _describe_maps(maps: Scaled, unit: str) -> Iterator[str]:
    constant = int(maps.constant.sum())
    if constant and len(maps.lows) > 1:
        yield f"{count_nouns(constant, unit)} of one value only: drawn in the middle colour"
    elif constant:
        yield f"of one value only, {format_number(maps.lows[0])}: drawn in the middle colour"
    if marked := int(maps.marked_CHW.sum()):
        yield f"magenta: {count_nouns(marked, 'value')} NaN or infinite"


class _CellSize:
    """How maps become cells: the whole factors (down, across) by which they are enlarged, or shrunk, and the layout."""

    def __init__(self, maps: Content, max_width_px: int, max_height_px: int) -> None:
        _, height, width = maps.values.shape
        bounds = (height, max_height_px), (width, max_width_px)
        down, across = ((max(1, max_px // length), math.ceil(length / max_px)) for length, max_px in bounds)
        if maps.on_photo:  # Only what covers an image has to keep its proportions.
            down = across = min(down, across, key=lambda factors: factors[0] / factors[1])
        self.enlarge, self.shrink = zip(down, across, strict=True)
        self.height_px, self.width_px = math.ceil(height / down[1]) * down[0], math.ceil(width / across[1]) * across[0]
        self.count = len(maps.numbers)
        self.pitch_px = max(self.width_px, math.ceil(width_of(str(max(maps.numbers)), _NUMBER))) + _CELL_GAP_PX
        self.row_px = self.height_px + _NUMBER_PX + _CELL_GAP_PX
        self.columns = max(1, (INNER_PX + _CELL_GAP_PX) // self.pitch_px)
        self.grid_px = math.ceil(self.count / self.columns) * self.row_px


def _place_cells(page: Page, y: int, size: _CellSize, cells: Pixels, numbers: Sequence[int], scaled: Scaled) -> None:
    """Place the cells of a grid, each below its number and, if there is room, its range."""
    ranges = [_format_range(low, high) for low, high in zip(scaled.lows, scaled.highs, strict=True)]
    numbers_px = [width_of(str(number), _NUMBER) + 9 for number in numbers]
    with_ranges = all(
        number_px + width_of(text, _RANGE) <= size.width_px for number_px, text in zip(numbers_px, ranges, strict=True)
    )
    for position, (number, cell) in enumerate(zip(numbers, cells, strict=True)):
        row, column = divmod(position, size.columns)
        x, top = MARGIN_PX + column * size.pitch_px, y + row * size.row_px
        page.text(x, top, str(number), _NUMBER)
        if with_ranges:
            page.text(x + numbers_px[position], top + 0.5, ranges[position], _RANGE)
        page.paste(x, top + _NUMBER_PX, cell)


def _format_range(low: float, high: float) -> str:
    if math.isnan(low):
        return "no finite value"
    return format_number(low) if low == high else f"{format_number(low, 2)} … {format_number(high, 2)}"


# --- values ---------------------------------------------------------------------------------------------------------

BAR, BAR_BELOW, _GROUND = (52, 101, 164), (196, 78, 60), (243, 245, 248)
_AXIS_PX, _STRIP_PX, _TICKS_PX = 58, 84, 22
_MAX_NAMED, _ROUND_ROW = 5, 20
_ROUND_STEPS = [digit * 10**power for power in range(7) for digit in (1, 2, 5)]


def draw_bars(vector: Content, caption: Caption, photo: Pixels | None) -> Page:
    """Draw values as bars on one common scale, in as many rows as they need."""
    values, page = vector.values, Page()
    low, high = _range_with_zero(values)
    y = draw_header(page, replace(caption, lines=(*caption.lines, *_describe_values(vector))), photo)
    x, width = MARGIN_PX + _AXIS_PX, INNER_PX - _AXIS_PX
    if len(values) * 3 <= width:  # One row is enough.
        pitch = min(48, width // max(1, len(values)))
    else:  # the widest that needs at most 8 rows
        pitch = next((pitch for pitch in (3, 2) if math.ceil(len(values) / (width // pitch)) <= 8), 1)
    per_row = width // pitch
    if len(values) > per_row > _ROUND_ROW:
        per_row -= per_row % _ROUND_ROW  # Rows that begin at round numbers are easy to count from.
    for start in range(0, len(values), per_row):
        row = values[start : start + per_row]
        page.paste(x, y, _paint_bars(row, pitch * len(row), _STRIP_PX, low, high, gap_px=int(pitch > 2)))
        _draw_value_axis(page, x - 6, y, low, high)
        _draw_number_axis(page, x, y + _STRIP_PX + 2, pitch, vector.numbers[start : start + per_row])
        y += _STRIP_PX + _TICKS_PX
    return page.cut(y - _TICKS_PX + 16 + MARGIN_PX)


def _range_with_zero(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the least and the greatest finite value, or 0 where all values lie on one side of it."""
    finite = values[np.isfinite(values)]
    return float(finite.min(initial=0.0)), float(finite.max(initial=0.0))


def _level(value: float, low: float, high: float, height_px: int) -> int:
    """Return the row of pixels at which a value lies."""
    # Halved, because the difference of two finite numbers can overflow.
    return round((high / 2 - value / 2) / ((high / 2 - low / 2) or 1.0) * (height_px - 1))


def _paint_bars(
    values: NDArray[np.float64], width_px: int, height_px: int, low: float, high: float, gap_px: int = 0
) -> Pixels:
    """Paint values from left to right; a column of pixels that several share spans their least to their greatest."""
    pixels = np.full((height_px, width_px, 3), _GROUND, np.uint8)
    edges = np.arange(len(values) + 1) * width_px // len(values)
    first_of_column = np.searchsorted(edges, np.arange(width_px), side="right") - 1
    zero = _level(0.0, low, high, height_px)
    for x, start in enumerate(first_of_column.tolist()):
        if gap_px and x >= edges[start + 1] - gap_px:
            continue
        shared = values[start : max(start + 1, (x + 1) * len(values) // width_px)]
        if not np.isfinite(shared).all():
            pixels[:, x] = MARK
            continue
        above = _level(max(0.0, float(shared.max())), low, high, height_px)
        below = _level(min(0.0, float(shared.min())), low, high, height_px)
        pixels[above:zero, x] = BAR
        pixels[zero + 1 : below + 1, x] = BAR_BELOW
    pixels[zero, (pixels[zero] != MARK).any(-1)] = FAINT_INK
    return pixels


def _describe_values(vector: Content) -> Iterator[str]:
    finite = np.isfinite(vector.values)
    if len(vector.values) > _MAX_NAMED and len(np.unique(vector.values[finite])) > 1:
        order = np.argsort(np.where(finite, -vector.values, np.inf), stable=True)[:_MAX_NAMED]
        largest = ", ".join(f"{vector.numbers[n]} ({format_number(vector.values[n])})" for n in order if finite[n])
        yield f"greatest: {largest}"
    if not finite.all():
        yield f"magenta: {count_nouns(int((~finite).sum()), 'value')} NaN or infinite"


def _draw_value_axis(page: Page, x: int, y: int, low: float, high: float) -> None:
    """Label zero, and the greatest and the least value if they are far enough from it."""
    zero = y + _level(0.0, low, high, _STRIP_PX)
    page.text(x, min(max(zero, y + 4), y + _STRIP_PX - 5) - 7, "0", _RANGE, align="right")
    for value, at in ((high, y + 4), (low, y + _STRIP_PX - 5)):
        if value and abs(at - zero) > 10:
            page.text(x, at - 7, format_number(value), _RANGE, align="right")


def _draw_number_axis(page: Page, x: int, y: int, pitch: int, numbers: Sequence[int]) -> None:
    """Label as many bars as there is room for, from left to right."""
    free_from = -math.inf
    widest = max(width_of(str(number), _NUMBER) for number in numbers)
    step = next(step for step in _ROUND_STEPS if step * pitch >= widest + 8)
    consecutive = numbers[-1] - numbers[0] == len(numbers) - 1
    for position in range(-numbers[0] % step if consecutive else 0, len(numbers), step):
        centre = x + position * pitch + pitch / 2
        half = width_of(str(numbers[position]), _NUMBER) / 2
        if centre - half > free_from and centre + half <= WIDTH_PX - 4:
            page.text(centre, y, str(numbers[position]), _NUMBER, align="center")
            free_from = centre + half + 4


# --- overviews ------------------------------------------------------------------------------------------------------

_MAX_COLUMNS, _COLUMN_GAP_PX, _MAX_CELL_PX = 6, 16, 224
_TITLE, _LABEL, _DETAIL = Style(14, bold=True), Style(11), Style(10, FAINT_INK)


@dataclass(frozen=True)
class Cell:
    """One layer in an overview."""

    label: str
    detail: str
    content: Content


@dataclass(frozen=True)
class Row:
    """One model and one image in an overview."""

    title: str
    detail: str
    photo: Pixels | None
    cells: Sequence[Cell]


def draw_overview(rows: Sequence[Row], footer: str, *, colormap: str = "viridis", as_heat: bool = False) -> Page:
    """Draw the cells of each row side by side; those that do not fit go on below; `as_heat` as in `draw_grid`."""
    colours = find_colormap(colormap)
    with_photos = any(row.photo is not None for row in rows)
    longest = max(len(row.cells) for row in rows)
    columns = math.ceil(longest / math.ceil(longest / _MAX_COLUMNS))
    gaps_px = _COLUMN_GAP_PX * (columns - 1 + with_photos)
    cell_px = min(_MAX_CELL_PX, (INNER_PX - gaps_px) // (columns + with_photos))
    left = MARGIN_PX + (cell_px + _COLUMN_GAP_PX) * with_photos
    page, y = Page(), MARGIN_PX
    for number, row in enumerate(rows):
        y = _draw_title(page, y + (14 if number else 0), row)
        if row.photo is not None:
            page.paste(MARGIN_PX, y, resize_photo(row.photo, cell_px, cell_px))
            page.text(MARGIN_PX, y + cell_px + 5, "input", _LABEL)
        for start in range(0, len(row.cells), columns):
            bottom = y
            for column, cell in enumerate(row.cells[start : start + columns]):
                x = left + column * (cell_px + _COLUMN_GAP_PX)
                page.paste(x, y, _paint_cell(cell.content, cell_px, row.photo if as_heat else None, colours))
                below = page.paragraph(x, y + cell_px + 5, cell_px, cell.label, _LABEL)
                bottom = max(bottom, page.paragraph(x, below, cell_px, cell.detail, _DETAIL))
            y = bottom + 10
    bar = colour_bar(colours)
    page.paste(MARGIN_PX, y + 8, bar)
    legend_px = bar.shape[1] + 10
    y = page.paragraph(MARGIN_PX + legend_px, y + 5, INNER_PX - legend_px, footer, SMALL)
    return page.cut(y + MARGIN_PX - 6)


def _draw_title(page: Page, y: int, row: Row) -> int:
    beside = MARGIN_PX + width_of(row.title, _TITLE) + 10
    if beside + width_of(row.detail, SMALL) <= WIDTH_PX - MARGIN_PX:
        page.text(beside, y + 2.5, row.detail, SMALL)
        return page.text(MARGIN_PX, y, row.title, _TITLE) + 4
    y = page.paragraph(MARGIN_PX, y, INNER_PX, row.title, _TITLE)
    return page.paragraph(MARGIN_PX, y, INNER_PX, row.detail, SMALL) + 4


def _paint_cell(content: Content, side_px: int, photo: Pixels | None, colours: Colormap) -> Pixels:
    if not content.are_maps:
        return _paint_bars(content.values, side_px, side_px, *_range_with_zero(content.values))
    maps = scale(content.values)
    per_side = math.ceil(math.sqrt(len(maps.lows)))
    gap = 2 if per_side > 1 else 0
    map_px = (side_px - gap * (per_side - 1)) // per_side
    # Maps of any size and shape are brought to one square size.
    maps = resize(maps, (1, 1), tuple(max(1, length // map_px) for length in maps.units_CHW.shape[1:]))
    maps = maps.take(*(np.arange(map_px) * length // map_px for length in maps.units_CHW.shape[1:]))
    pixels = np.full((side_px, side_px, 3), PAPER, np.uint8)
    for position, map_HW3 in enumerate(colour(maps, colours, photo if content.on_photo else None)):
        y, x = ((map_px + gap) * place for place in divmod(position, per_side))
        pixels[y : y + map_px, x : x + map_px] = map_HW3
    return pixels
