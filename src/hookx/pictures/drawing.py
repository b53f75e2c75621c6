"""Activations -> pages: grids of channels, heat maps over the image, strips of bars, and the overview of a model.

A page is 980 pixels wide, about what a README has, so that nothing on it is shrunk when it is shown; it is as high as
it must be.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from matplotlib.colors import Colormap
from numpy.typing import NDArray

from hookx.pictures.colours import (
    MARK,
    Scaled,
    bar_of,
    colormap_of,
    coloured,
    over_photo,
    resized,
    resized_photo,
    scaled,
)
from hookx.pictures.page import FAINT_INK, PAPER, Page, Pixels, Style, width_of

WIDTH_PX, MARGIN_PX = 980, 20
_INNER_PX = WIDTH_PX - 2 * MARGIN_PX
_PHOTO_PX, _HEADER_GAP_PX, _SCALE_PX = 152, 20, 96

_TITLE, _BODY, _SMALL = Style(17, bold=True), Style(12.5), Style(11, FAINT_INK)
_NUMBER, _RANGE = Style(9.5), Style(9, FAINT_INK)

# Widths of a grid's cells, the widest first: the first that keeps the grid within this height is taken.
_CELLS_PX = (448, 304, 224, 180, 150, 112, 96, 80, 72, 64, 56, 48, 42, 35, 28)
_GRID_HEIGHT_PX = 1200
_GAP_PX, _NUMBER_PX = 6, 13

_BAR, _BAR_BELOW, _BAR_GROUND = (52, 101, 164), (196, 78, 60), (243, 245, 248)
_AXIS_PX, _STRIP_PX, _TICKS_PX = 58, 84, 22
_LARGEST_NAMED, _ROUND_ROW = 5, 20


@dataclass(frozen=True)
class Maps:
    """Maps to draw, with the number that each has among all of its layer; `on_photo`: their places are the image's."""

    values_CHW: NDArray[np.float64]
    numbers: tuple[int, ...]
    on_photo: bool = True


@dataclass(frozen=True)
class Vector:
    """Values without a place, with the number that each has among all of its layer."""

    values: NDArray[np.float64]
    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Caption:
    """What a picture shows, and of what; `unit` is what one of its maps or bars is called."""

    title: str
    lines: tuple[str, ...]
    unit: str = "channel"


@dataclass(frozen=True)
class Cell:
    """One layer in an overview."""

    label: str
    detail: str
    content: Maps | Vector
    as_heat: bool = False


@dataclass(frozen=True)
class Row:
    """One model, and one image, in an overview."""

    title: str
    detail: str
    photo: Pixels | None
    cells: Sequence[Cell]


def channel_grid(
    maps: Maps, caption: Caption, photo: Pixels | None, *, colormap: str = "viridis", as_heat: bool = False
) -> Pixels:
    """Draw every map in a cell of its own, on the scale of its own range, beneath its number.

    Args:
        maps: what to draw, in this order.
        caption: stands beside the input.
        photo: the input as the model saw it, if there is one.
        colormap: one of matplotlib's.
        as_heat: lay the maps over the photograph.

    Example:
        >>> maps = Maps(np.random.rand(64, 56, 56), tuple(range(64)))
        >>> channel_grid(maps, Caption("layer1", ("resnet18", "64 channels of 56 x 56")), None).shape[1]
        980
    """
    colours = colormap_of(colormap)
    scaled_maps = scaled(maps.values_CHW)
    caption = replace(caption, lines=(*caption.lines, *_notes(scaled_maps, caption.unit)))
    laid_over = photo if as_heat and maps.on_photo else None
    page = Page(WIDTH_PX)
    if len(maps.numbers) == 1:
        y = _one_map(page, maps, scaled_maps, caption, photo, laid_over, colours)
    else:
        scale = f"each {caption.unit} from its own least to its greatest value"
        y = _header(page, caption, photo, colours, scale)
        y = _grid(page, y, maps, scaled_maps, laid_over, colours)
    return page.pixels(y + MARGIN_PX)


def bar_strip(vector: Vector, caption: Caption, photo: Pixels | None) -> Pixels:
    """Draw values as bars on one common scale, in as many rows as they need.

    Example:
        >>> bar_strip(Vector(np.arange(1000.0), tuple(range(1000))), Caption("fc", ("resnet18",)), None).shape[1]
        980
    """
    values = vector.values
    low, high = _range_with_zero(values)
    page = Page(WIDTH_PX)
    y = _header(page, replace(caption, lines=(*caption.lines, *_notes_on_vector(vector))), photo)
    width = _INNER_PX - _AXIS_PX
    pitch = min(48, max(_bar_pitch(len(values), width), 1))
    per_row = max(1, width // pitch)
    if len(values) > per_row > _ROUND_ROW:
        per_row -= per_row % _ROUND_ROW  # So that rows begin at numbers that are easy to count from.
    for positions in _in_rows(range(len(values)), per_row):
        x = MARGIN_PX + _AXIS_PX
        some = values[positions[0] : positions[-1] + 1]
        page.paste(x, y, _bars(some, pitch * len(some), _STRIP_PX, low, high, gap_px=1 if pitch > 2 else 0))
        _value_axis(page, x - 6, y, low, high)
        _number_axis(page, x, y + _STRIP_PX + 2, pitch, [vector.numbers[position] for position in positions])
        y += _STRIP_PX + _TICKS_PX
    return page.pixels(y - _TICKS_PX + 16 + MARGIN_PX)


def overview(rows: Sequence[Row], footer: str, *, colormap: str = "viridis") -> Pixels:
    """Draw a row a model and a column a depth; what does not fit beside each other goes on beneath.

    Example:
        >>> maps = Maps(np.random.rand(16, 7, 7), tuple(range(16)))
        >>> rows = [Row("resnet18", "random weights", None, [Cell("layer4", "512 channels of 7 x 7", maps)])]
        >>> overview(rows, "the 16 strongest channels").shape[1]
        980
    """
    colours = colormap_of(colormap)
    with_photos = any(row.photo is not None for row in rows)
    most = max(len(row.cells) for row in rows)
    columns = math.ceil(most / math.ceil(most / _COLUMNS_AT_MOST))
    gap = 16
    cell_px = min(224, (_INNER_PX - gap * (columns - 1 + with_photos)) // (columns + with_photos))
    page = Page(WIDTH_PX)
    y = MARGIN_PX
    for number, row in enumerate(rows):
        y += 14 if number else 0
        y = _row_title(page, y, row)
        if row.photo is not None:
            page.paste(MARGIN_PX, y, resized_photo(row.photo, cell_px, cell_px))
            page.text(MARGIN_PX, y + cell_px + 5, "input", _LABEL)
        left = MARGIN_PX + (cell_px + gap) * with_photos
        for cells in _in_rows(row.cells, columns):
            bottom = y
            for column, cell in enumerate(cells):
                x = left + column * (cell_px + gap)
                page.paste(x, y, _cell(cell, cell_px, row.photo, colours))
                below = page.paragraph(x, y + cell_px + 5, cell_px, cell.label, _LABEL)
                bottom = max(bottom, page.paragraph(x, below, cell_px, cell.detail, _DETAIL))
            y = bottom + 10
    page.paste(MARGIN_PX, y + 8, bar_of(colours, 96, 10))
    y = page.paragraph(MARGIN_PX + 96 + 10, y + 5, _INNER_PX - 106, footer, _SMALL)
    return page.pixels(y + MARGIN_PX - 6)


_COLUMNS_AT_MOST = 6
_LABEL, _DETAIL = Style(11), Style(10, FAINT_INK)


# --- the header ----------------------------------------------------------------------------------------------------


def _header(
    page: Page, caption: Caption, photo: Pixels | None, colours: Colormap | None = None, scale: str = ""
) -> int:
    """Set the input with the caption beside it; return where the page goes on."""
    x, y = MARGIN_PX, MARGIN_PX
    if photo is not None:
        page.paste(x, y, resized_photo(photo, _PHOTO_PX, _PHOTO_PX))
        x += _PHOTO_PX + _HEADER_GAP_PX
    width = WIDTH_PX - MARGIN_PX - x
    y = page.paragraph(x, y - 3, width, caption.title, _TITLE) + 3
    for line in caption.lines:
        y = page.paragraph(x, y, width, line, _BODY)
    if colours is not None:
        page.paste(x, y + 8, bar_of(colours, _SCALE_PX, 10))
        y = page.text(x + _SCALE_PX + 10, y + 4, scale, _SMALL)
    return max(y, MARGIN_PX + (_PHOTO_PX if photo is not None else 0)) + _HEADER_GAP_PX


def _row_title(page: Page, y: int, row: Row) -> int:
    style = Style(14, bold=True)
    beside = MARGIN_PX + width_of(row.title, style) + 10
    if beside + width_of(row.detail, _SMALL) <= WIDTH_PX - MARGIN_PX:
        page.text(beside, y + 2.5, row.detail, _SMALL)
        return page.text(MARGIN_PX, y, row.title, style) + 4
    y = page.paragraph(MARGIN_PX, y, _INNER_PX, row.title, style)
    return page.paragraph(MARGIN_PX, y, _INNER_PX, row.detail, _SMALL) + 4


def _notes(maps: Scaled, unit: str) -> Iterator[str]:
    constant = int(maps.constant.sum())
    if constant and len(maps.lows) > 1:
        yield f"{_counted(constant, unit)} of one value only: drawn in the middle colour"
    elif constant:
        yield f"of one value only, {_short(maps.lows[0])}: drawn in the middle colour"
    if marked := int(maps.marked_CHW.sum()):
        yield f"magenta: {_counted(marked, 'value')} NaN or infinite"


def _notes_on_vector(vector: Vector) -> Iterator[str]:
    finite = np.isfinite(vector.values)
    if len(vector.values) > _LARGEST_NAMED and len(np.unique(vector.values[finite])) > 1:
        order = np.argsort(np.where(finite, -vector.values, np.inf), stable=True)[:_LARGEST_NAMED]
        largest = ", ".join(f"{vector.numbers[n]} ({_short(vector.values[n])})" for n in order if finite[n])
        yield f"greatest: {largest}"
    if not finite.all():
        yield f"magenta: {_counted(int((~finite).sum()), 'value')} NaN or infinite"


# --- grids ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _CellSize:
    """How a map becomes a cell: by what its height and width are multiplied, or divided."""

    enlarge: tuple[int, int]
    shrink: tuple[int, int]
    height_px: int
    width_px: int
    number_px: int  # what the number above it needs

    @property
    def pitch_px(self) -> int:
        return max(self.width_px, self.number_px) + _GAP_PX

    @property
    def columns(self) -> int:
        return max(1, (_INNER_PX + _GAP_PX) // self.pitch_px)


def _cell_size(maps: Maps) -> _CellSize:
    """Choose how large the cells of a grid are: as large as they can be while the grid is not much higher than wide."""
    count = len(maps.numbers)
    sizes = [_within(maps, cell_px) for cell_px in _CELLS_PX]
    for size in sizes:
        rows = math.ceil(count / size.columns)
        if size.columns >= min(count, 4) and rows * (size.height_px + _NUMBER_PX + _GAP_PX) <= _GRID_HEIGHT_PX:
            return size
    return sizes[-1]


def _within(maps: Maps, cell_px: int, highest_px: int | None = None) -> _CellSize:
    """Fit maps into a width, by whole factors only. What is no image need not keep its proportions."""
    _, height, width = maps.values_CHW.shape
    highest_px = cell_px if highest_px is None else highest_px
    down, across = (_factors(height, highest_px), _factors(width, cell_px))
    if maps.on_photo:
        down = across = min(down, across, key=lambda factors: factors[0] / factors[1])
    return _CellSize(
        (down[0], across[0]),
        (down[1], across[1]),
        math.ceil(height / down[1]) * down[0],
        math.ceil(width / across[1]) * across[0],
        math.ceil(width_of(str(max(maps.numbers)), _NUMBER)),
    )


def _factors(length: int, most_px: int) -> tuple[int, int]:
    return max(1, most_px // length), math.ceil(length / most_px)


def _one_map(
    page: Page,
    maps: Maps,
    scaled_maps: Scaled,
    caption: Caption,
    photo: Pixels | None,
    laid_over: Pixels | None,
    colours: Colormap,
) -> int:
    """Draw a single map, beside an input of the same size where its places are the image's."""
    beside = photo is not None and maps.on_photo
    scale = f"from {_short(scaled_maps.lows[0])} to {_short(scaled_maps.highs[0])}"
    scale += ", over the grey of the input" if laid_over is not None else ""
    y = _header(page, caption, None if beside else photo, colours, scale)
    half_px = (_INNER_PX - _HEADER_GAP_PX) // 2
    size = _within(maps, half_px if maps.on_photo else _INNER_PX, half_px)
    cell = coloured(resized(scaled_maps, size.enlarge, size.shrink), colours)
    if laid_over is not None:
        cell = over_photo(cell, laid_over)
    x = MARGIN_PX
    if beside:
        assert photo is not None
        page.paste(x, y, resized_photo(photo, size.width_px, size.height_px))
        x += size.width_px + _HEADER_GAP_PX
    page.paste(x, y, cell[0])
    return y + size.height_px


def _grid(page: Page, y: int, maps: Maps, scaled_maps: Scaled, photo: Pixels | None, colours: Colormap) -> int:
    size = _cell_size(maps)
    cells = coloured(resized(scaled_maps, size.enlarge, size.shrink), colours)
    if photo is not None and maps.on_photo:
        cells = over_photo(cells, photo)
    ranges = [_range(low, high) for low, high in zip(scaled_maps.lows, scaled_maps.highs, strict=True)]
    numbers_px = [width_of(str(number), _NUMBER) + 9 for number in maps.numbers]
    with_ranges = all(
        number_px + width_of(text, _RANGE) <= size.width_px for number_px, text in zip(numbers_px, ranges, strict=True)
    )
    for position, (number, cell) in enumerate(zip(maps.numbers, cells, strict=True)):
        row, column = divmod(position, size.columns)
        x = MARGIN_PX + column * size.pitch_px
        top = y + row * (size.height_px + _NUMBER_PX + _GAP_PX)
        page.text(x, top, str(number), _NUMBER)
        if with_ranges:
            page.text(x + numbers_px[position], top + 0.5, ranges[position], _RANGE)
        page.paste(x, top + _NUMBER_PX, cell)
    rows = math.ceil(len(maps.numbers) / size.columns)
    return y + rows * (size.height_px + _NUMBER_PX + _GAP_PX) - _GAP_PX


# --- bars ----------------------------------------------------------------------------------------------------------


def _range_with_zero(values: NDArray[np.float64]) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    return min(0.0, float(finite.min(initial=0.0))), max(0.0, float(finite.max(initial=0.0)))


def _bar_pitch(count: int, width_px: int) -> int:
    """Choose the width of a bar: one row if it has three pixels then, else the widest that needs no more than 8."""
    if count * 3 <= width_px:
        return width_px // max(count, 1)
    return next((pitch for pitch in (3, 2) if math.ceil(count / (width_px // pitch)) <= 8), 1)


def _bars(
    values: NDArray[np.float64], width_px: int, height_px: int, low: float, high: float, gap_px: int = 0
) -> Pixels:
    """Draw values from left to right; where several share a column of pixels, from their least to their greatest."""
    pixels = np.full((height_px, width_px, 3), _BAR_GROUND, np.uint8)
    span = (high / 2 - low / 2) or 1.0
    edges = np.arange(len(values) + 1) * width_px // len(values)
    first_of_column = np.searchsorted(edges, np.arange(width_px), side="right") - 1

    def level(value: float) -> int:
        return round((high / 2 - value / 2) / span * (height_px - 1))

    zero = level(0.0)
    for x in range(width_px):
        start = int(first_of_column[x])
        if gap_px and x >= edges[start + 1] - gap_px:
            continue
        stop = max(start + 1, int(np.searchsorted(edges, x, side="right")))
        some = values[start : max(stop, (x + 1) * len(values) // width_px)]
        if not np.isfinite(some).all():
            pixels[:, x] = MARK
            continue
        above, below = level(max(0.0, float(some.max()))), level(min(0.0, float(some.min())))
        pixels[above:zero, x] = _BAR
        pixels[zero + 1 : below + 1, x] = _BAR_BELOW
    pixels[zero, (pixels[zero] != MARK).any(-1)] = FAINT_INK
    return pixels


def _value_axis(page: Page, x: int, y: int, low: float, high: float) -> None:
    """Name the greatest value, the least and zero, as far as they are different and have room."""
    zero = y + round((high / 2) / ((high / 2 - low / 2) or 1.0) * (_STRIP_PX - 1))
    page.text(x, min(max(zero, y + 4), y + _STRIP_PX - 5) - 7, "0", _RANGE, align="right")
    for value, at in ((high, y + 4), (low, y + _STRIP_PX - 5)):
        if value and abs(at - zero) > 10:
            page.text(x, at - 7, _short(value), _RANGE, align="right")


def _number_axis(page: Page, x: int, y: int, pitch: int, numbers: Sequence[int]) -> None:
    """Name bars from left to right, as many as have room."""
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


_ROUND_STEPS = [digit * 10**power for power in range(7) for digit in (1, 2, 5)]


# --- the cells of an overview --------------------------------------------------------------------------------------


def _cell(cell: Cell, side_px: int, photo: Pixels | None, colours: Colormap) -> Pixels:
    if isinstance(cell.content, Vector):
        low, high = _range_with_zero(cell.content.values)
        return _bars(cell.content.values, side_px, side_px, low, high)
    maps = scaled(cell.content.values_CHW)
    per_side = math.ceil(math.sqrt(len(maps.lows)))
    gap = 2 if per_side > 1 else 0
    map_px = (side_px - gap * (per_side - 1)) // per_side
    drawn = coloured(_fitted(maps, map_px), colours)
    if cell.as_heat and photo is not None and cell.content.on_photo:
        drawn = over_photo(drawn, photo)
    pixels = np.full((side_px, side_px, 3), PAPER, np.uint8)
    for position, colours_HW3 in enumerate(drawn):
        y, x = ((map_px + gap) * place for place in divmod(position, per_side))
        pixels[y : y + map_px, x : x + map_px] = colours_HW3
    return pixels


def _fitted(maps: Scaled, side_px: int) -> Scaled:
    """Bring maps of any size and shape to one square size."""
    _, height, width = maps.units_CHW.shape
    maps = resized(maps, (1, 1), (max(1, height // side_px), max(1, width // side_px)))
    _, height, width = maps.units_CHW.shape
    rows, columns = (np.arange(side_px) * length // side_px for length in (height, width))
    places = np.ix_(range(len(maps.lows)), rows, columns)
    return Scaled(maps.units_CHW[places], maps.marked_CHW[places], maps.lows, maps.highs)


_Item = TypeVar("_Item")


def _in_rows(items: Sequence[_Item], columns: int) -> Iterator[Sequence[_Item]]:
    return (items[start : start + columns] for start in range(0, len(items), columns))


# --- words ---------------------------------------------------------------------------------------------------------


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _short(value: float) -> str:
    return f"{value:.3g}".replace("-", "\N{MINUS SIGN}")


def _range(low: float, high: float) -> str:
    if math.isnan(low):
        return "no finite value"
    return _short(low) if low == high else f"{low:.2g} … {high:.2g}".replace("-", "\N{MINUS SIGN}")
