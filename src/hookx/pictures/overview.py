"""Many layers -> a page with one row per image and model, and one column per layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.colors import Colormap

from hookx.pictures.bars import Vector, paint_bars, range_with_zero
from hookx.pictures.colours import (
    Scaled,
    colour,
    colour_bar,
    find_colormap,
    lay_over_photo,
    resize,
    resize_photo,
    scale,
)
from hookx.pictures.grids import Maps
from hookx.pictures.page import FAINT_INK, INNER_PX, MARGIN_PX, PAPER, SMALL, WIDTH_PX, Page, Pixels, Style, width_of

_MAX_COLUMNS, _GAP_PX, _MAX_CELL_PX = 6, 16, 224
_TITLE, _LABEL, _DETAIL = Style(14, bold=True), Style(11), Style(10, FAINT_INK)


@dataclass(frozen=True)
class Cell:
    """One layer in an overview."""

    label: str
    detail: str
    content: Maps | Vector
    as_heat: bool = False


@dataclass(frozen=True)
class Row:
    """One model and one image in an overview."""

    title: str
    detail: str
    photo: Pixels | None
    cells: Sequence[Cell]


def draw_overview(rows: Sequence[Row], footer: str, *, colormap: str = "viridis") -> Page:
    """Draw the cells of each row side by side; those that do not fit go on below.

    Example:
        >>> maps = Maps(np.random.rand(16, 7, 7), tuple(range(16)))
        >>> rows = [Row("resnet18", "random weights", None, [Cell("layer4", "512 channels of 7 x 7", maps)])]
        >>> draw_overview(rows, "the 16 strongest channels").pixels().shape[1]
        980
    """
    colours = find_colormap(colormap)
    with_photos = any(row.photo is not None for row in rows)
    longest = max(len(row.cells) for row in rows)
    columns = math.ceil(longest / math.ceil(longest / _MAX_COLUMNS))
    gaps_px = _GAP_PX * (columns - 1 + with_photos)
    cell_px = min(_MAX_CELL_PX, (INNER_PX - gaps_px) // (columns + with_photos))
    left = MARGIN_PX + (cell_px + _GAP_PX) * with_photos
    page, y = Page(), MARGIN_PX
    for number, row in enumerate(rows):
        y = _draw_title(page, y + (14 if number else 0), row)
        if row.photo is not None:
            page.paste(MARGIN_PX, y, resize_photo(row.photo, cell_px, cell_px))
            page.text(MARGIN_PX, y + cell_px + 5, "input", _LABEL)
        for start in range(0, len(row.cells), columns):
            bottom = y
            for column, cell in enumerate(row.cells[start : start + columns]):
                x = left + column * (cell_px + _GAP_PX)
                page.paste(x, y, _paint_cell(cell, cell_px, row.photo, colours))
                below = page.paragraph(x, y + cell_px + 5, cell_px, cell.label, _LABEL)
                bottom = max(bottom, page.paragraph(x, below, cell_px, cell.detail, _DETAIL))
            y = bottom + 10
    page.paste(MARGIN_PX, y + 8, colour_bar(colours, 96, 10))
    y = page.paragraph(MARGIN_PX + 106, y + 5, INNER_PX - 106, footer, SMALL)
    return page.cut(y + MARGIN_PX - 6)


def _draw_title(page: Page, y: int, row: Row) -> int:
    beside = MARGIN_PX + width_of(row.title, _TITLE) + 10
    if beside + width_of(row.detail, SMALL) <= WIDTH_PX - MARGIN_PX:
        page.text(beside, y + 2.5, row.detail, SMALL)
        return page.text(MARGIN_PX, y, row.title, _TITLE) + 4
    y = page.paragraph(MARGIN_PX, y, INNER_PX, row.title, _TITLE)
    return page.paragraph(MARGIN_PX, y, INNER_PX, row.detail, SMALL) + 4


def _paint_cell(cell: Cell, side_px: int, photo: Pixels | None, colours: Colormap) -> Pixels:
    if isinstance(cell.content, Vector):
        return paint_bars(cell.content.values, side_px, side_px, *range_with_zero(cell.content.values))
    maps = scale(cell.content.values_CHW)
    per_side = math.ceil(math.sqrt(len(maps.lows)))
    gap = 2 if per_side > 1 else 0
    map_px = (side_px - gap * (per_side - 1)) // per_side
    painted = colour(_make_square(maps, map_px), colours)
    if cell.as_heat and photo is not None and cell.content.on_photo:
        painted = lay_over_photo(painted, photo)
    pixels = np.full((side_px, side_px, 3), PAPER, np.uint8)
    for position, map_HW3 in enumerate(painted):
        y, x = ((map_px + gap) * place for place in divmod(position, per_side))
        pixels[y : y + map_px, x : x + map_px] = map_HW3
    return pixels


def _make_square(maps: Scaled, side_px: int) -> Scaled:
    """Bring maps of any size and shape to one square size."""
    height, width = maps.units_CHW.shape[1:]
    maps = resize(maps, (1, 1), (max(1, height // side_px), max(1, width // side_px)))
    rows, columns = (np.arange(side_px) * length // side_px for length in maps.units_CHW.shape[1:])
    return maps.take(rows, columns)
