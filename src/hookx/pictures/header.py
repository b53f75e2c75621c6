"""The head of a page: the input, the caption beside it, and the scale of colours."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.colors import Colormap

from hookx.pictures.colours import colour_bar, resize_photo
from hookx.pictures.page import MARGIN_PX, SMALL, WIDTH_PX, Page, Pixels, Style

GAP_PX = 20
_PHOTO_PX, _COLOUR_BAR_PX = 152, 96
_TITLE, _BODY = Style(17, bold=True), Style(12.5)


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
        page.paste(x, y + 8, colour_bar(colours, _COLOUR_BAR_PX, 10))
        y = page.text(x + _COLOUR_BAR_PX + 10, y + 4, legend, SMALL)
    return max(y, MARGIN_PX + (_PHOTO_PX if photo is not None else 0)) + GAP_PX


def count_nouns(count: int, noun: str) -> str:
    """Write a count with its noun.

    Example:
        >>> count_nouns(1, "channel"), count_nouns(1024, "value")
        ('1 channel', '1,024 values')
    """
    return f"{count:,} {noun}{'s' * (count != 1)}"


def format_number(value: float, digits: int = 3) -> str:
    r"""Write a number with few digits.

    Example:
        >>> format_number(0.012345), format_number(-1) == "\N{MINUS SIGN}1"
        ('0.0123', True)
    """
    return f"{value:.{digits}g}".replace("-", "\N{MINUS SIGN}")
