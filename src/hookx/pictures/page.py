"""A page: pixels at exact places, text that is measured before it is set, its header, and the PNG file."""

from __future__ import annotations

import bisect
import functools
import io
import re
import warnings
from dataclasses import dataclass
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hookx.pictures.colours import Pixels, colour_bar, resize_photo

# About the width of a README, so that nothing on a page is shrunk when it is shown.
WIDTH_PX, MARGIN_PX = 980, 20
INNER_PX = WIDTH_PX - 2 * MARGIN_PX
GAP_PX = 20
_PHOTO_PX = 152

# Opaque, so that a page looks the same on any background.
PAPER, INK, FAINT_INK = (255, 255, 255), (31, 35, 40), (89, 99, 110)
_LINE_HEIGHT = 1.36  # relative to the size of the letters

# A power of two, so that no width in pixels is rounded on its way through inches.
_DOTS_PER_INCH = 64
_POINTS_PER_PX = 72 / _DOTS_PER_INCH


@dataclass(frozen=True)
class Style:
    """How a text is set; sizes in pixels."""

    size_px: float = 12
    ink: tuple[int, int, int] = INK
    bold: bool = False


SMALL = Style(11, FAINT_INK)
_TITLE, _BODY = Style(17, bold=True), Style(12.5)


@dataclass(frozen=True)
class Text:
    """One line of text; `align` tells which part of it is at x: 'left', 'center' or 'right'."""

    x: float
    baseline: float
    text: str
    style: Style
    align: str


class Page:
    """A sheet on which pixels and lines of text are placed; x and y in pixels from the top left.

    Example:
        >>> page = Page(40)
        >>> page.paste(10, 5, np.zeros((4, 6, 3), np.uint8))
        >>> pixels = page.cut(20).pixels()
        >>> pixels.shape, pixels[5, 10].tolist(), pixels[4, 10].tolist()
        ((20, 40, 3), [0, 0, 0], [255, 255, 255])
    """

    def __init__(self, width_px: int = WIDTH_PX) -> None:
        self.width_px, self.height_px = width_px, 0
        self.pastes: list[tuple[int, int, Pixels]] = []
        self.texts: list[Text] = []

    def paste(self, x: int, y: int, pixels: Pixels) -> None:
        """Put pixels on the page, unchanged."""
        self.pastes.append((x, y, pixels))

    def text(self, x: float, y: float, text: str, style: Style = Style(), align: str = "left") -> int:
        """Set one line whose top is at y; return where the next one begins."""
        self.texts.append(Text(x, y + style.size_px, legible(text), style, align))
        return round(y + round(style.size_px * _LINE_HEIGHT))

    def paragraph(self, x: float, y: float, width_px: float, text: str, style: Style = Style()) -> int:
        """Set a text in at most three lines; return where the next one begins. A longer text loses its middle."""
        for line in wrap(text, width_px, style, max_lines=3):
            y = self.text(x, y, line, style)
        return round(y)

    def cut(self, height_px: int) -> Page:
        """Give the page its height, and return it."""
        self.height_px = height_px
        return self

    def pixels(self) -> Pixels:
        """Render the page."""
        sheet = np.full((self.height_px, self.width_px, 3), PAPER, np.uint8)
        for x, y, pixels in self.pastes:
            sheet[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
        if not self.texts:
            return sheet
        # The user's own matplotlib settings must not reach these pages.
        with matplotlib.style.context("default"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about letters that the font lacks
            size_inches = (self.width_px / _DOTS_PER_INCH, self.height_px / _DOTS_PER_INCH)
            figure = Figure(size_inches, dpi=_DOTS_PER_INCH)
            figure.patch.set_visible(False)
            canvas = FigureCanvasAgg(figure)
            for text in self.texts:
                figure.text(
                    text.x / self.width_px,
                    1 - text.baseline / self.height_px,
                    text.text,
                    fontproperties=_font(text.style),
                    color=[level / 255 for level in text.style.ink],
                    horizontalalignment=text.align,
                    verticalalignment="baseline",
                    parse_math=False,
                )
            canvas.draw()
            letters = np.asarray(canvas.buffer_rgba())
        # matplotlib draws only the letters, so it cannot resample what was pasted.
        inked = letters[..., 3] > 0
        share = letters[inked, 3:] / 255
        sheet[inked] = np.rint(share * letters[inked, :3] + (1 - share) * sheet[inked])
        return sheet


def png(pixels: Pixels, description: str) -> bytes:
    """Return pixels as a PNG file that carries a description."""
    about = PngInfo()
    about.add_itxt("Description", legible(description.replace("\n", "; ")))
    about.add_text("Software", "hookx")
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True, pnginfo=about)
    return file.getvalue()


def legible(text: str) -> str:
    """Replace what no font can show: control characters, and bytes of a file name that are not UTF-8."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


@functools.lru_cache(maxsize=16_384)
def width_of(text: str, style: Style) -> float:
    """Return the width of a line in pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(_ruler().get_text_width_height_descent(legible(text), _font(style), ismath=False)[0])


@functools.lru_cache(maxsize=1)
def _ruler() -> Any:
    return FigureCanvasAgg(Figure(figsize=(1, 1), dpi=_DOTS_PER_INCH)).get_renderer()


@functools.lru_cache(maxsize=64)
def _font(style: Style) -> FontProperties:
    # matplotlib ships this font, so it is the same everywhere.
    return FontProperties("DejaVu Sans", weight="bold" if style.bold else "normal", size=style.size_px * _POINTS_PER_PX)


def wrap(text: str, width_px: float, style: Style, max_lines: int) -> list[str]:
    """Break a text into lines: at spaces, else after a dot, slash, comma, dash or underscore, else anywhere.

    Example:
        >>> wrap("encoder.layers.encoder_layer_0.self_attention", 110, Style(11), max_lines=3)
        ['encoder.layers.', 'encoder_layer_0.', 'self_attention']
        >>> wrap("encoder.layers.encoder_layer_0.self_attention", 110, Style(11), max_lines=2)
        ['encoder.layer…elf_', 'attention']
    """
    lines = _break_lines(text, width_px, style)
    if len(lines) <= max_lines:
        return lines

    def without_middle(kept: int) -> list[str]:
        return _break_lines(f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}", width_px, style)

    # Drop the middle: names of layers differ at their ends, and sentences begin with what matters.
    kept = bisect.bisect_right(range(len(text)), max_lines, key=lambda kept: len(without_middle(kept))) - 1
    while kept > 0 and len(without_middle(kept)) > max_lines:
        kept -= 1  # Line breaks depend on the words: a shorter text can need one line more.
    return without_middle(max(kept, 0))


def _break_lines(text: str, width_px: float, style: Style) -> list[str]:
    lines, line = [], ""
    for piece in re.findall(r"[^\s./_,-]*[\s./_,-]|[^\s./_,-]+", text):
        if line and width_of((line + piece).rstrip(), style) > width_px:
            lines.append(line.rstrip())
            line = ""
        while len(piece) > 1 and width_of(piece.rstrip(), style) > width_px:
            fitting = next(end for end in range(1, len(piece)) if width_of(piece[: end + 1], style) > width_px)
            lines.append(piece[:fitting])
            piece = piece[fitting:]
        line += piece
    return [*lines, line.rstrip()] if line.strip() or not lines else lines


@dataclass(frozen=True)
class Caption:
    """What a picture shows; `unit` is what one of its maps or bars is called."""

    title: str
    lines: tuple[str, ...]
    unit: str = "channel"


def draw_header(
    page: Page, caption: Caption, photo: Pixels | None, colours: Colormap | None = None, legend: str = ""
) -> int:
    """Draw the head of a page; return the y at which the page goes on."""
    x, y = MARGIN_PX, MARGIN_PX
    if photo is not None:
        page.paste(x, y, resize_photo(photo, _PHOTO_PX, _PHOTO_PX))
        x += _PHOTO_PX + GAP_PX
    width = WIDTH_PX - MARGIN_PX - x
    y = page.paragraph(x, y - 3, width, caption.title, _TITLE) + 3
    for line in caption.lines:
        y = page.paragraph(x, y, width, line, _BODY)
    if colours is not None:
        bar = colour_bar(colours)
        page.paste(x, y + 8, bar)
        y = page.text(x + bar.shape[1] + 10, y + 4, legend, SMALL)
    return max(y, MARGIN_PX + (_PHOTO_PX if photo is not None else 0)) + GAP_PX


def count_nouns(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def format_number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}g}".replace("-", "\N{MINUS SIGN}")
