"""An activation -> a picture. Knows neither models nor files, only values, captions and pixels.

The only package that imports matplotlib.
"""

from hookx.pictures.colours import colormap_of
from hookx.pictures.drawing import Caption, Cell, Maps, Row, Vector, bar_strip, channel_grid, overview
from hookx.pictures.page import Pixels, png

__all__ = [
    "Caption",
    "Cell",
    "Maps",
    "Pixels",
    "Row",
    "Vector",
    "bar_strip",
    "channel_grid",
    "colormap_of",
    "overview",
    "png",
]
