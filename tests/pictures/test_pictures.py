"""A picture is a law about pixels: where a value stands, what colour it has, and that no text lies on another."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from io import BytesIO

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import avg_pool2d, max_pool2d

from hookx.errors import UsageError
from hookx.pictures.colours import Pixels, find_colormap, resize, scale
from hookx.pictures.drawing import BAR, BAR_BELOW, Cell, Content, Row, draw_bars, draw_grid, draw_overview
from hookx.pictures.page import Caption, Page, Style, count_nouns, format_number, png, width_of, wrap

GREY = np.full((64, 64, 3), 100, np.uint8)
CAPTION = Caption("layer", ("model, weights", "N,4,2,2: 4 channels of 2 × 2"))
MAGENTA = (255, 0, 255)


@pytest.fixture(autouse=True)
def without_warnings() -> Iterator[None]:
    """Nothing divides by zero, overflows, or is not to be found."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def content_of(values: object, on_photo: bool = True) -> Content:
    array = np.asarray(values, np.float64)
    return Content(array, range(len(array)), on_photo)


def colour(unit: float, colormap: str = "viridis") -> tuple[int, ...]:
    return tuple(map(int, find_colormap(colormap)(unit, bytes=True)[:3]))


def box_of(pixels: Pixels, wanted: tuple[int, ...]) -> tuple[slice, slice]:
    """Return the rectangle that holds all pixels of a colour, which have to fill it."""
    found = (pixels == wanted).all(-1)
    rows, columns = np.flatnonzero(found.any(1)), np.flatnonzero(found.any(0))
    assert len(rows), f"no pixel is {wanted}"
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    assert found[box].all()
    return box


def grid_of(values: object) -> Pixels:
    """Draw a grid, and cut off its header: the input and the caption with its scale of colours."""
    return draw_grid(content_of(values), CAPTION, GREY).pixels()[185:]


# --- grids ---------------------------------------------------------------------------------------------------------


def test_every_value_of_a_map_is_a_square_of_its_colour_where_it_stands_in_the_map() -> None:
    values = [[[10, 11, 12], [13, 14, 15]], [[0, 0, 0], [0, 0, 0]]]
    pixels = grid_of(values)
    boxes = [[box_of(pixels, colour((value - 10) / 5)) for value in row] for row in values[0]]
    sides = {box.stop - box.start for row in boxes for place in row for box in place}
    assert len(sides) == 1 and sides.pop() > 40
    for row in boxes:
        for left, right in itertools.pairwise(row):
            assert left[0] == right[0] and left[1].stop == right[1].start
    for upper, lower in itertools.pairwise(boxes):
        assert [place[1] for place in upper] == [place[1] for place in lower] and upper[0][0].stop == lower[0][0].start


def test_each_channel_has_a_scale_of_its_own() -> None:
    values = np.random.default_rng(0).normal(size=(3, 5, 5))
    same = grid_of(values)
    stretched = values * np.array([1e-30, 7.0, 1e200])[:, None, None] + np.array([0, -3.0, 0])[:, None, None]
    other = grid_of(stretched)
    assert (same == other).all(-1).mean() > 0.99  # All but the ranges in words.
    for page in (same, other):
        assert (page == colour(1.0)).all(-1).sum() == (page == colour(0.0)).all(-1).sum() > 0


def test_what_is_constant_is_the_middle_colour_and_what_is_not_finite_is_marked() -> None:
    values = np.zeros((4, 2, 2))
    values[0, 0, 1], values[0, 1] = np.nan, 2
    values[1] = np.inf
    values[2] = 1e308 * np.array([[-1, 1], [0, 0]])
    pixels = grid_of(values)
    marked = (pixels == MAGENTA).all(-1).sum()
    side = box_of(pixels[:, :240], MAGENTA)[0]
    assert marked == 5 * (side.stop - side.start) ** 2
    middle = (pixels == colour(0.5)).all(-1).sum()
    assert middle == (4 + 2) * (side.stop - side.start) ** 2


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 7), st.integers(1, 7), st.booleans())
def test_a_map_that_is_larger_than_its_cell_is_drawn_by_the_means_of_its_blocks(
    height: int, width: int, down: int, across: int, with_nan: bool
) -> None:
    values = np.random.default_rng(0).normal(size=(2, height, width))
    if with_nan:
        values[1, -1, 0] = np.nan
    maps = scale(values)
    found = resize(maps, (1, 1), (down, across))
    block = (down, across)
    units, marked = torch.from_numpy(maps.units_CHW), torch.from_numpy(maps.marked_CHW.astype(np.float64))
    means = avg_pool2d(units, block, ceil_mode=True, count_include_pad=False).numpy()
    marks = max_pool2d(marked, block, ceil_mode=True).numpy() > 0
    assert np.array_equal(found.marked_CHW, marks)
    assert np.allclose(found.units_CHW[~marks], means[~marks])


def test_a_map_that_is_larger_than_the_page_is_shrunk_to_a_cell() -> None:
    values = np.zeros((16, 1000, 1000))
    values[0, :500] = 1
    pixels = grid_of(values)
    upper = box_of(pixels, colour(1.0))
    assert upper[1].stop - upper[1].start == 2 * (upper[0].stop - upper[0].start) == 200


def test_the_input_stands_beside_the_caption() -> None:
    photo = np.full((8, 8, 3), (250, 10, 20), np.uint8)
    box = box_of(draw_grid(content_of(np.ones((3, 2, 2))), CAPTION, photo).pixels(), (250, 10, 20))
    assert box[0].stop - box[0].start == box[1].stop - box[1].start >= 100


# --- heat ----------------------------------------------------------------------------------------------------------


def test_a_bright_corner_of_a_map_lies_on_that_corner_of_the_image() -> None:
    heat = np.zeros((1, 4, 4))
    heat[0, 0, 3] = 1
    photo = GREY.copy()
    photo[:16, 48:] = 200
    pixels = draw_grid(content_of(heat), CAPTION, photo, colormap="inferno", as_heat=True).pixels()[-480:-20]
    for beside in (pixels[:, :480], pixels[:, 480:]):  # the image, and the heat on it
        image, corner = (np.argwhere((beside[..., 0] > least) & (beside[..., 0] < 250)) for least in (20, 150))
        top, left = image.min(0)
        bottom, right = image.max(0) + 1
        assert bottom - top == right - left == 460
        assert corner.min(0).tolist() == pytest.approx([top, left + 345], abs=3)
        assert corner.max(0).tolist() == pytest.approx([top + 114, right - 1], abs=3)


def test_heat_is_the_colour_of_its_value_over_the_grey_of_the_image() -> None:
    heat = np.zeros((1, 4, 4))
    heat[0, 0, 3] = 1
    pixels = draw_grid(content_of(heat), CAPTION, GREY, colormap="inferno", as_heat=True).pixels()[-480:-20]
    mixed = tuple(round(0.35 * 100 + 0.65 * int(level)) for level in colour(1.0, "inferno"))
    box = box_of(pixels, mixed)
    assert box[0].stop - box[0].start == box[1].stop - box[1].start == 115


def test_what_has_no_place_in_the_image_is_never_laid_over_it() -> None:
    matrix = content_of(np.random.default_rng(0).normal(size=(1, 49, 96)), on_photo=False)
    assert np.array_equal(
        draw_grid(matrix, CAPTION, GREY, as_heat=True).pixels()[200:], draw_grid(matrix, CAPTION, GREY).pixels()[200:]
    )


# --- bars ----------------------------------------------------------------------------------------------------------


def test_a_bar_is_as_high_as_its_value_and_hangs_down_if_that_is_negative() -> None:
    pixels = draw_bars(content_of([1.0, 4.0, -2.0, np.nan]), CAPTION, None).pixels()
    up, down, marked = ((pixels == wanted).all(-1) for wanted in (BAR, BAR_BELOW, MAGENTA))
    heights = [np.count_nonzero(column) for column in up.T if column.any()]
    assert heights[0] == pytest.approx(heights[-1] / 4, abs=1)
    assert down.sum(0).max() == pytest.approx(heights[-1] / 2, abs=1)
    assert np.flatnonzero(down.any(1))[0] > np.flatnonzero(up.any(1))[-1]
    assert np.flatnonzero(marked.any(0))[0] > np.flatnonzero(down.any(0))[-1]


def test_the_bars_of_a_long_vector_are_all_there() -> None:
    for count in (1000, 2048, 5000):
        pixels = draw_bars(content_of(np.ones(count)), CAPTION, None).pixels()
        columns = (pixels == BAR).all(-1)[1:] & ~(pixels == BAR).all(-1)[:-1]
        pitch = {1000: 3, 2048: 3, 5000: 1}[count]
        assert columns.sum() == count * (pitch - 1 if pitch > 2 else pitch)


# --- overviews -----------------------------------------------------------------------------------------------------


def test_a_row_is_a_model_and_a_column_a_depth_also_where_rows_have_different_lengths() -> None:
    # Each cell holds one map, with a colour for each place in the figure.
    def cell(row: int, column: int) -> Cell:
        values = np.zeros((1, 2, 2))
        values[0, 0, 0] = (1 + row * 3 + column) / 8
        values[0, 1, 1] = 1
        return Cell("layer", "1 × 2 × 2", content_of(values))

    rows = [Row("one", "", GREY, [cell(0, n) for n in range(3)]), Row("two", "", GREY, [cell(1, n) for n in range(2)])]
    pixels = draw_overview(rows, "footer").pixels()[:-60]
    places = {
        (row, column): box_of(pixels, colour((1 + row * 3 + column) / 8))
        for row, column in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    }
    assert [places[0, column][0] for column in range(3)] == [places[0, 0][0]] * 3
    assert all(places[0, column][1] == places[1, column][1] for column in range(2))
    assert places[0, 0][1].stop < places[0, 1][1].start and places[0, 0][0].stop < places[1, 0][0].start


def test_what_does_not_fit_beside_each_other_goes_on_beneath() -> None:
    cells = [Cell(f"layer{n}", "", content_of(np.zeros((1, 2, 2)))) for n in range(34)]
    pixels = draw_overview([Row("resnet34", "", GREY, cells)], "footer").pixels()
    columns = (pixels == colour(0.5)).all(-1)
    lines = np.count_nonzero(np.diff(columns.any(1).astype(int)) == 1)
    assert lines == 6 and pixels.shape[1] == 980


# --- every page ----------------------------------------------------------------------------------------------------


def text_boxes(page: Page) -> NDArray[np.float64]:
    """Return left, top, right, bottom of every text."""
    boxes = []
    for text in page.texts:
        width = width_of(text.text, text.style)
        left = text.x - {"left": 0, "center": width / 2, "right": width}[text.align]
        size = text.style.size_px
        boxes.append((left, text.baseline - 0.74 * size, left + width, text.baseline + 0.2 * size))
    return np.array(boxes)


def pasted_boxes(page: Page) -> NDArray[np.float64]:
    return np.array([(x, y, x + p.shape[1], y + p.shape[0]) for x, y, p in page.pastes], np.float64)


def overlap(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return for every pair whether it shares more than a pixel at the edge."""
    low, high = np.maximum(one[:, None, :2], other[None, :, :2]), np.minimum(one[:, None, 2:], other[None, :, 2:])
    return np.asarray((high - low > 1).all(-1))


def check_page(page: Page) -> None:
    """No text lies on another or on pixels, nothing sticks out of the page, and the page is not absurdly high."""
    texts, pasted = text_boxes(page), pasted_boxes(page)
    height, width = page.height_px, page.width_px
    assert width == 980 and 0 < height < 9000
    for boxes in (texts, pasted):
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
    among_texts = overlap(texts, texts)
    np.fill_diagonal(among_texts, False)
    assert not among_texts.any()
    assert not overlap(texts, pasted).any()
    among_pasted = overlap(pasted, pasted)
    np.fill_diagonal(among_pasted, False)
    assert not among_pasted.any()


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=80) | st.sampled_from(
    ["encoder.layers.encoder_layer_11.self_attention" * 4, "a" * 300, "$x^2$ \\frac", "\x00\n\t", ""]
)


@settings(max_examples=25)
@given(
    st.sampled_from([1, 2, 3, 4, 5, 12, 17, 64, 100, 513, 2048]),
    st.integers(1, 40),
    st.sampled_from([1.0, 0.3, 4.0]),
    st.booleans(),
    st.booleans(),
    NAMES,
    st.sampled_from([1.0, 1e-5, 1e30]),
)
@example(2048, 7, 1.0, True, True, "layer4", 1.0)
def test_no_text_of_a_grid_lies_on_another_whatever_its_channels_sizes_and_names(
    count: int, width: int, proportions: float, on_photo: bool, with_photo: bool, name: str, scale: float
) -> None:
    shape = (count, max(1, round(width * proportions)), width)
    values = np.random.default_rng(count).normal(size=shape) * scale
    caption = Caption(name, (name, "N,1: 1 channel"))
    check_page(draw_grid(content_of(values, on_photo), caption, GREY if with_photo else None, as_heat=with_photo))


@settings(max_examples=15)
@given(st.integers(1, 3000), st.booleans(), NAMES, st.sampled_from([0.0, 1.0, -1e30, 1e-5]))
def test_no_text_of_a_strip_of_bars_lies_on_another(count: int, in_order: bool, name: str, scale: float) -> None:
    generator = np.random.default_rng(count)
    numbers = range(count) if in_order else generator.permutation(count * 10)[:count]
    vector = Content(generator.normal(size=count) * scale, tuple(map(int, numbers)))
    check_page(draw_bars(vector, Caption(name, (name,)), GREY))


@settings(max_examples=15)
@given(st.lists(st.integers(1, 14), min_size=1, max_size=4), NAMES, st.integers(1, 16), st.booleans())
def test_no_text_of_an_overview_lies_on_another(lengths: list[int], name: str, maps: int, with_photo: bool) -> None:
    values = np.random.default_rng(maps).normal(size=(maps, 3, 3))
    cells = [Cell(name, "1 × 3 × 3", content_of(values)), Cell("fc", "9", content_of(values.ravel()))]
    rows = [Row(name, name, GREY if with_photo else None, [cells[n % 2] for n in range(length)]) for length in lengths]
    check_page(draw_overview(rows, name))


@given(NAMES, st.integers(20, 400), st.integers(1, 4))
def test_a_wrapped_text_keeps_its_width_and_its_number_of_lines(text: str, width_px: int, max_lines: int) -> None:
    style = Style(11)
    lines = wrap(text, width_px, style, max_lines)
    assert 1 <= len(lines) <= max_lines
    assert all(width_of(line, style) <= width_px or len(line) == 1 for line in lines)


def test_numbers_in_words_have_few_digits_a_minus_sign_and_a_plural() -> None:
    assert (format_number(0.012345), format_number(-1), format_number(1.26, 2)) == ("0.0123", "\N{MINUS SIGN}1", "1.3")
    assert (count_nouns(1, "channel"), count_nouns(1024, "value")) == ("1 channel", "1,024 values")


def test_what_a_user_has_configured_for_figures_of_their_own_does_not_reach_these() -> None:
    maps = content_of(np.arange(12.0).reshape(3, 2, 2))
    before = draw_grid(maps, CAPTION, GREY).pixels()
    with matplotlib.rc_context(
        {"font.size": 40, "text.color": "red", "figure.facecolor": "green", "text.hinting": "none"}
    ):
        assert np.array_equal(draw_grid(maps, CAPTION, GREY).pixels(), before)


def test_a_picture_file_carries_its_pixels_and_its_caption() -> None:
    pixels = draw_grid(content_of(np.arange(12.0).reshape(3, 2, 2)), CAPTION, GREY).pixels()
    with Image.open(BytesIO(png(pixels, "layer\nN,3,2,2: 3 channels of 2 × 2"))) as image:
        assert np.array_equal(np.asarray(image), pixels)
        assert image.info["Description"] == "layer; N,3,2,2: 3 channels of 2 × 2"


def test_a_colour_map_that_there_is_not_is_an_error_with_the_closest_names() -> None:
    with pytest.raises(UsageError, match="invalid --colormap 'viridus'; closest: viridis"):
        find_colormap("viridus")
