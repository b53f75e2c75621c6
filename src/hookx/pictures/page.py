"""A page of a picture: pixels that stand where they were put, text that is measured before it is set, and the PNG."""

from __future__ import annotations

import bisect
import functools
import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

Pixels = NDArray[np.uint8]  # height, width, 3

# Opaque, so that a page's own colours do not depend on what it lies on.
PAPER, INK, FAINT_INK, LINE = (255, 255, 255), (31, 35, 40), (89, 99, 110), (209, 217, 224)
LINE_HEIGHT = 1.36  # of the size of the letters

# A power of two, so that no width in pixels is rounded on its way through inches.
_DOTS_PER_INCH = 64
_POINTS_PER_PX = 72 / _DOTS_PER_INCH


@dataclass(frozen=True)
class Style:
    """How a text is set; sizes in pixels."""

    size_px: float = 12
    ink: tuple[int, int, int] = INK
    bold: bool = False

    @property
    def line_px(self) -> int:
        return round(self.size_px * LINE_HEIGHT)


@dataclass(frozen=True)
class _Text:
    x: float
    baseline: float
    text: str
    style: Style
    align: str


class Page:
    """A sheet as wide as it says, on which pixels and lines of text are placed; x and y in pixels from the top left.

    Example:
        >>> page = Page(40)
        >>> page.paste(10, 5, np.zeros((4, 6, 3), np.uint8))
        >>> pixels = page.pixels(20)
        >>> pixels.shape, pixels[5, 10].tolist(), pixels[4, 10].tolist()
        ((20, 40, 3), [0, 0, 0], [255, 255, 255])
    """

    def __init__(self, width_px: int) -> None:
        self.width_px = width_px
        self._pastes: list[tuple[int, int, Pixels]] = []
        self._texts: list[_Text] = []

    def paste(self, x: int, y: int, pixels: Pixels) -> None:
        """Put pixels on the page, as they are."""
        self._pastes.append((x, y, pixels))

    def frame(self, x: int, y: int, width_px: int, height_px: int) -> None:
        """Draw a line around the outside of a rectangle."""
        edge = np.full((height_px + 2, width_px + 2, 3), LINE, np.uint8)
        edge[1:-1, 1:-1] = PAPER
        self._pastes.insert(0, (x - 1, y - 1, edge))

    def text(self, x: float, y: float, text: str, style: Style = Style(), align: str = "left") -> int:
        """Set one line whose top is at y; return where the next one begins. `align` says what of it is at x."""
        self._texts.append(_Text(x, y + style.size_px, legible(text), style, align))
        return round(y + style.line_px)

    def paragraph(
        self, x: float, y: float, width_px: float, text: str, style: Style = Style(), *, most_lines: int = 3
    ) -> int:
        """Set a text in lines of a width; return where the next one begins. What is too long loses its middle."""
        for line in wrapped(text, width_px, style, most_lines):
            y = self.text(x, y, line, style)
        return round(y)

    def pixels(self, height_px: int) -> Pixels:
        """Return the page, cut off at a height."""
        sheet = np.full((height_px, self.width_px, 3), PAPER, np.uint8)
        for x, y, pixels in self._pastes:
            sheet[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
        if not self._texts:
            return sheet
        # Whatever a user has configured for figures of their own does not reach these.
        with matplotlib.style.context("default"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of letters that the font lacks
            figure = Figure(figsize=(self.width_px / _DOTS_PER_INCH, height_px / _DOTS_PER_INCH), dpi=_DOTS_PER_INCH)
            figure.patch.set_visible(False)
            canvas = FigureCanvasAgg(figure)
            for text in self._texts:
                figure.text(
                    text.x / self.width_px,
                    1 - text.baseline / height_px,
                    text.text,
                    fontproperties=_font(text.style.size_px, text.style.bold),
                    color=[level / 255 for level in text.style.ink],
                    horizontalalignment=text.align,
                    verticalalignment="baseline",
                    parse_math=False,
                )
            canvas.draw()
            letters = np.asarray(canvas.buffer_rgba())
        # matplotlib draws the letters only; what was pasted is not touched by any resampling of its.
        inked = letters[..., 3] > 0
        share = letters[inked, 3:] / 255
        sheet[inked] = np.rint(share * letters[inked, :3] + (1 - share) * sheet[inked])
        return sheet


def legible(text: str) -> str:
    """Replace what no font shows: control characters, bytes of a file name that are no UTF-8."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def width_of(text: str, style: Style) -> float:
    """Return the width of a line in pixels."""
    return _width_px(legible(text), style.size_px, style.bold)


def wrapped(text: str, width_px: float, style: Style, most_lines: int) -> list[str]:
    """Cut a text into lines no wider than a width: at spaces, else behind a dot, slash or underscore, else anywhere.

    Example:
        >>> wrapped("encoder.layers.encoder_layer_0.self_attention", 110, Style(11), most_lines=3)
        ['encoder.layers.', 'encoder_layer_0.', 'self_attention']
        >>> wrapped("encoder.layers.encoder_layer_0.self_attention", 110, Style(11), most_lines=2)
        ['encoder.layer…elf_', 'attention']
    """
    lines = _lines(text, width_px, style)
    if len(lines) <= most_lines:
        return lines

    def without_middle(kept: int) -> list[str]:
        return _lines(f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}", width_px, style)

    # The middle is what can be spared: names of layers differ at their ends, sentences begin with what matters.
    kept = bisect.bisect_right(range(len(text)), most_lines, key=lambda kept: len(without_middle(kept))) - 1
    while kept > 0 and len(without_middle(kept)) > most_lines:
        kept -= 1  # Where lines break depends on the words: one letter less can take a line more.
    return without_middle(max(kept, 0))


def png(pixels: Pixels, description: str) -> bytes:
    """Return a page as a PNG file that carries its caption as text."""
    about = PngInfo()
    about.add_itxt("Description", legible(description.replace("\n", "; ")))
    about.add_text("Software", "hookx")
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True, pnginfo=about)
    return file.getvalue()


def _lines(text: str, width_px: float, style: Style) -> list[str]:
    lines, line = [], ""
    for piece in re.findall(r"[^\s./_,-]*[\s./_,-]|[^\s./_,-]+", text):
        if line and width_of((line + piece).rstrip(), style) > width_px:
            lines.append(line.rstrip())
            line = ""
        while len(piece) > 1 and width_of(piece.rstrip(), style) > width_px:
            fitting = bisect.bisect_right(range(1, len(piece)), width_px, key=_width_up_to(piece, style)) or 1
            lines.append(piece[:fitting])
            piece = piece[fitting:]
        line += piece
    return [*lines, line.rstrip()] if line.strip() or not lines else lines


def _width_up_to(piece: str, style: Style) -> Callable[[int], float]:
    return lambda length: width_of(piece[:length], style)


@functools.lru_cache(maxsize=64)
def _font(size_px: float, bold: bool) -> FontProperties:
    # It comes with matplotlib, so it is the same everywhere.
    return FontProperties("DejaVu Sans", weight="bold" if bold else "normal", size=size_px * _POINTS_PER_PX)


@functools.lru_cache(maxsize=1)
def _ruler() -> Any:
    return FigureCanvasAgg(Figure(figsize=(1, 1), dpi=_DOTS_PER_INCH)).get_renderer()


@functools.lru_cache(maxsize=16_384)
def _width_px(text: str, size_px: float, bold: bool) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(_ruler().get_text_width_height_descent(text, _font(size_px, bold), ismath=False)[0])
