"""A vector -> a page: bars on one common scale."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hookx.pictures.colours import MARK
from hookx.pictures.grids import NUMBER, RANGE
from hookx.pictures.header import Caption, count_nouns, draw_header, format_number
from hookx.pictures.page import FAINT_INK, INNER_PX, MARGIN_PX, WIDTH_PX, Page, Pixels, width_of

BAR, BAR_BELOW, GROUND = (52, 101, 164), (196, 78, 60), (243, 245, 248)
_AXIS_PX, _STRIP_PX, _TICKS_PX = 58, 84, 22
_MAX_NAMED, _ROUND_ROW = 5, 20
_ROUND_STEPS = [digit * 10**power for power in range(7) for digit in (1, 2, 5)]


@dataclass(frozen=True)
class Vector:
    """Values that cover no part of the image, with the number of each within its layer."""

    values: NDArray[np.float64]
    numbers: tuple[int, ...]

    def pick(self, positions: Sequence[int]) -> Vector:
        """Return some of the values, in the order of the positions."""
        return Vector(self.values[list(positions)], tuple(self.numbers[position] for position in positions))


def draw_bars(vector: Vector, caption: Caption, photo: Pixels | None) -> Page:
    """Draw values as bars on one common scale, in as many rows as they need.

    Example:
        >>> vector = Vector(np.arange(1000.0), tuple(range(1000)))
        >>> draw_bars(vector, Caption("fc", ("resnet18",)), None).pixels().shape[1]
        980
    """
    values = vector.values
    low, high = range_with_zero(values)
    page = Page()
    y = draw_header(page, replace(caption, lines=(*caption.lines, *_notes(vector))), photo)
    x, width = MARGIN_PX + _AXIS_PX, INNER_PX - _AXIS_PX
    pitch = min(48, max(_choose_pitch(len(values), width), 1))
    per_row = max(1, width // pitch)
    if len(values) > per_row > _ROUND_ROW:
        per_row -= per_row % _ROUND_ROW  # Rows that begin at round numbers are easy to count from.
    for start in range(0, len(values), per_row):
        row = values[start : start + per_row]
        page.paste(x, y, paint_bars(row, pitch * len(row), _STRIP_PX, low, high, gap_px=1 if pitch > 2 else 0))
        _draw_value_axis(page, x - 6, y, low, high)
        _draw_number_axis(page, x, y + _STRIP_PX + 2, pitch, vector.numbers[start : start + per_row])
        y += _STRIP_PX + _TICKS_PX
    return page.cut(y - _TICKS_PX + 16 + MARGIN_PX)


def range_with_zero(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the least and the greatest finite value, or 0 where all values lie on one side of it."""
    finite = values[np.isfinite(values)]
    return float(finite.min(initial=0.0)), float(finite.max(initial=0.0))


def paint_bars(
    values: NDArray[np.float64], width_px: int, height_px: int, low: float, high: float, gap_px: int = 0
) -> Pixels:
    """Paint values from left to right; a column of pixels that several share spans their least to their greatest."""
    pixels = np.full((height_px, width_px, 3), GROUND, np.uint8)
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
        shared = values[start : max(start + 1, (x + 1) * len(values) // width_px)]
        if not np.isfinite(shared).all():
            pixels[:, x] = MARK
            continue
        above, below = level(max(0.0, float(shared.max()))), level(min(0.0, float(shared.min())))
        pixels[above:zero, x] = BAR
        pixels[zero + 1 : below + 1, x] = BAR_BELOW
    pixels[zero, (pixels[zero] != MARK).any(-1)] = FAINT_INK
    return pixels


def _notes(vector: Vector) -> Iterator[str]:
    finite = np.isfinite(vector.values)
    if len(vector.values) > _MAX_NAMED and len(np.unique(vector.values[finite])) > 1:
        order = np.argsort(np.where(finite, -vector.values, np.inf), stable=True)[:_MAX_NAMED]
        largest = ", ".join(f"{vector.numbers[n]} ({format_number(vector.values[n])})" for n in order if finite[n])
        yield f"greatest: {largest}"
    if not finite.all():
        yield f"magenta: {count_nouns(int((~finite).sum()), 'value')} NaN or infinite"


def _choose_pitch(count: int, width_px: int) -> int:
    """Choose the width of a bar: 3 or more pixels if one row is enough, else the widest that needs at most 8 rows."""
    if count * 3 <= width_px:
        return width_px // max(count, 1)
    return next((pitch for pitch in (3, 2) if math.ceil(count / (width_px // pitch)) <= 8), 1)


def _draw_value_axis(page: Page, x: int, y: int, low: float, high: float) -> None:
    """Label zero, and the greatest and the least value if they are far enough from it."""
    zero = y + round((high / 2) / ((high / 2 - low / 2) or 1.0) * (_STRIP_PX - 1))
    page.text(x, min(max(zero, y + 4), y + _STRIP_PX - 5) - 7, "0", RANGE, align="right")
    for value, at in ((high, y + 4), (low, y + _STRIP_PX - 5)):
        if value and abs(at - zero) > 10:
            page.text(x, at - 7, format_number(value), RANGE, align="right")


def _draw_number_axis(page: Page, x: int, y: int, pitch: int, numbers: Sequence[int]) -> None:
    """Label as many bars as there is room for, from left to right."""
    free_from = -math.inf
    widest = max(width_of(str(number), NUMBER) for number in numbers)
    step = next(step for step in _ROUND_STEPS if step * pitch >= widest + 8)
    consecutive = numbers[-1] - numbers[0] == len(numbers) - 1
    for position in range(-numbers[0] % step if consecutive else 0, len(numbers), step):
        centre = x + position * pitch + pitch / 2
        half = width_of(str(numbers[position]), NUMBER) / 2
        if centre - half > free_from and centre + half <= WIDTH_PX - 4:
            page.text(centre, y, str(numbers[position]), NUMBER, align="center")
            free_from = centre + half + 4
