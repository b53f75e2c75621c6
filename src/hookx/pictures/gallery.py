"""What models made of images -> pictures in a directory, each with its caption; knows no model."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hookx.errors import HookxError, StoreError, UsageError
from hookx.pictures import Caption, Cell, Maps, Pixels, Row, Vector, bar_strip, channel_grid, colormap_of, overview, png
from hookx.pictures.attention import Attention
from hookx.pictures.places import LAYOUTS, Reading, TokenGrid
from hookx.store.files import write_whole

REDUCTIONS: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "mean": lambda values_CHW: values_CHW.mean(0),
    "max": lambda values_CHW: values_CHW.max(0),
    "norm": lambda values_CHW: np.sqrt(np.square(values_CHW).sum(0)),
}
_MAPS_AT_MOST, _VALUES_AT_MOST = 4096, 65_536  # of one picture
_MAPS_OF_A_CELL = 16
_ROWS_OF_AN_OVERVIEW = 12
_OURS = b"Software\0hookx"  # as it stands in a PNG file, in front of its pixels
_BYTES_WITH_A_MARK = 65_536
_NAME_BYTES_AT_MOST = 200


@dataclass(frozen=True)
class Look:
    """How activations are drawn.

    Args:
        channels: which channels, as in '0-63,128'; '' for all.
        top: only so many, the strongest first: those with the largest norm.
        reduce: 'mean', 'max' or 'norm' over the channels: one map a layer, as a heat map over the image.
        colormap: one of matplotlib's; '' for viridis, and inferno for heat maps.
        layout: 'nchw', 'nhwc' or 'tokens', for activations of which the model does not tell it.

    Raises:
        UsageError: one of them is malformed.

    Example:
        >>> Look(channels="0-2,7").numbers
        (0, 1, 2, 7)
    """

    channels: str = ""
    top: int | None = None
    reduce: str = ""
    colormap: str = ""
    layout: str = ""

    def __post_init__(self) -> None:
        for what, value, known in (("reduction", self.reduce, REDUCTIONS), ("layout", self.layout, LAYOUTS)):
            if value and value not in known:
                raise UsageError(f"'{value}' is not a {what} of pictures; there is: {', '.join(known)}")
        if self.top is not None and self.top < 1:
            raise UsageError(f"the strongest {self.top} channels are none; --top is 1 or more")
        colormap_of(self.colormap_of(as_heat=True))
        self.numbers  # noqa: B018

    @property
    def numbers(self) -> tuple[int, ...]:
        """The channels asked for, in the order in which they were asked for."""
        numbers: dict[int, None] = {}
        for piece in filter(None, (piece.strip() for piece in self.channels.split(","))):
            match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", piece, re.ASCII)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if first > last or last - first >= _VALUES_AT_MOST:
                raise UsageError(f"'{piece}' is not a range of channels", "as in --channels 0-63,128")
            numbers.update(dict.fromkeys(range(first, last + 1)))
        return tuple(numbers)

    def colormap_of(self, *, as_heat: bool) -> str:
        """Return the name of the colour map for maps, or for heat over the image."""
        return self.colormap or ("inferno" if as_heat else "viridis")


@dataclass(frozen=True)
class Shown:
    """One layer of one image, ready to be drawn: all that it returned, and what is to be said of it."""

    address: str
    shape: tuple[int, ...]  # as the layer returned it, of one image
    content: Maps | Vector
    what: str  # 'channels of 7 × 7': behind their number
    note: str = ""
    unit: str = "channel"


@dataclass(frozen=True)
class Seen:
    """What one model made of one image."""

    image: str
    model: str
    weights: str
    photo: Pixels | None  # the input, as the model saw it
    input: str  # what is to be said of it
    layers: Sequence[Shown]


@dataclass(frozen=True)
class Picture:
    """One file that was drawn, and what it shows; `layer` is '' for an overview."""

    file: str
    image: str
    model: str
    layer: str
    shows: str


def shown_activation(address: str, activation: Tensor, reading: Reading) -> Shown:
    """Bring one image's activation into maps or a vector, by how it is to be read.

    Example:
        >>> import torch
        >>> shown = shown_activation("layer4", torch.ones(512, 7, 7), Reading(LAYOUTS["nchw"]))
        >>> shown.content.values_CHW.shape, shown.what
        ((512, 7, 7), 'channels of 7 × 7')
    """
    note = reading.note
    if activation.is_complex():
        activation, note = activation.abs(), "; ".join(filter(None, [note, "magnitudes of complex values"]))
    values = reading.maps(activation.double()).numpy(force=True)
    shape = tuple(activation.shape)
    if values.ndim < 2:
        return Shown(address, shape, Vector(values.reshape(-1), _all(values.size)), "values", note, unit="value")
    size = f"{values.shape[1]} × {values.shape[2]}"
    what, unit = f"channels of {size}", "channel"
    if "row" in reading.roles:
        what, unit = f"maps of {size}" if "channel" in reading.roles else f"matrix of {size}", "map"
    elif "channel" not in reading.roles:
        what, unit = f"map of {size}", "map"
    if "token" in reading.roles and reading.grid is not None:
        count = shape[reading.roles.index("token")]
        what += " patches" + _without_place(reading.grid, count)
    return Shown(address, shape, Maps(values, _all(len(values)), reading.on_photo), what, note, unit)


def shown_attention(attention: Attention, grid: TokenGrid | None) -> Shown:
    """Fold one attention into a map a head: how the class token, or the mean of all tokens, looks at the patches.

    Args:
        attention: of one image.
        grid: the places of its keys; None if they are not known.
    """
    weights = attention.weights_HQK.double()
    heads, queries, keys = weights.shape
    shape = (heads, queries, keys)
    unit = "head" if attention.windows == 1 else "window's head"
    if grid is None or attention.windows > 1:
        why = f"within {attention.windows} windows" if attention.windows > 1 else "the places of its keys are not known"
        maps = Maps(weights.numpy(force=True), _all(heads), on_photo=False)
        what = f"heads, {queries} queries (downwards) by {keys} keys"
        return Shown(attention.path, shape, maps, what, f"not folded: {why}", unit)
    others = grid.without_place(keys) if queries == keys else ()
    if others:
        looks, who = weights[:, others[0]], f"token {others[0]} (no patch)"
    else:
        looks, who = weights.mean(1), "the one query" if queries == 1 else f"all {queries} tokens (their mean)"
    maps = Maps(Reading(("channel", "token"), grid).maps(looks).numpy(force=True), _all(heads))
    what = f"heads, from {who} to {grid.height} × {grid.width} patches"
    return Shown(attention.path, shape, maps, what, "", unit)


def _without_place(grid: TokenGrid, count: int) -> str:
    others = grid.without_place(count)
    if not others:
        return ""
    tokens = "token" if len(others) == 1 else "tokens"
    return f", without {tokens} {_ranges(others)} of {count} (no patch)"


def _all(count: int) -> tuple[int, ...]:
    return tuple(range(count))


def chosen(shown: Shown, look: Look) -> tuple[Maps | Vector, str]:
    """Return the maps or values that a look asks for, and a sentence on which they are.

    Example:
        >>> import torch
        >>> rising = torch.arange(4.0).reshape(4, 1, 1).expand(4, 2, 2)
        >>> maps, sentence = chosen(shown_activation("conv", rising, Reading(LAYOUTS["nchw"])), Look(top=2))
        >>> maps.numbers, sentence
        ((3, 2), 'the 2 strongest of 4 channels of 2 × 2')
    """
    content, count = shown.content, len(shown.content.numbers)
    if count == 1:
        return content, f"1 {shown.what}" if isinstance(content, Vector) else _singular(shown)
    sentence = f"{count:,} {shown.what}"
    if look.numbers:
        if max(look.numbers) >= count:
            raise UsageError(
                f"'{shown.address}' has {count:,} {shown.unit}s, 0 to {count - 1}, and no {max(look.numbers)}",
                "mend --channels",
            )
        content = _picked(content, look.numbers)
        sentence = f"{len(look.numbers):,} of {sentence}: {_ranges(look.numbers)}"
    if look.top is not None and look.top < len(content.numbers):
        content = _picked(content, _strongest(content)[: look.top])
        sentence = f"the {look.top:,} strongest of {sentence}"
    elif look.top is not None:
        content = _picked(content, _strongest(content))
        sentence = f"{sentence}, the strongest first"
    if look.reduce and isinstance(content, Maps):
        with np.errstate(invalid="ignore", over="ignore"):
            content = replace(content, values_CHW=REDUCTIONS[look.reduce](content.values_CHW)[None], numbers=(0,))
        sentence = f"{look.reduce} of {sentence}"
    at_most = _MAPS_AT_MOST if isinstance(content, Maps) else _VALUES_AT_MOST
    if len(content.numbers) > at_most:
        raise HookxError(
            f"'{shown.address}' has {len(content.numbers):,} {shown.unit}s, and a picture shows up to {at_most:,}",
            f"choose: --top 256, or --channels 0-{at_most - 1}",
        )
    return content, sentence


def _singular(shown: Shown) -> str:
    return f"1 {shown.what}".replace("1 matrix", "matrix").replace("1 map of", "map of")


def _picked(content: Maps | Vector, positions: Sequence[int]) -> Maps | Vector:
    numbers = tuple(content.numbers[position] for position in positions)
    if isinstance(content, Maps):
        return replace(content, values_CHW=content.values_CHW[list(positions)], numbers=numbers)
    return replace(content, values=content.values[list(positions)], numbers=numbers)


def _strongest(content: Maps | Vector) -> list[int]:
    """Return the positions of maps or values, the largest norm first; what is not finite does not count."""
    values = content.values_CHW if isinstance(content, Maps) else content.values
    finite = np.where(np.isfinite(values), values, 0).reshape(len(values), -1)
    with np.errstate(over="ignore"):
        norms = np.linalg.norm(finite, axis=1)
    return [int(position) for position in np.argsort(-norms, stable=True)]


def _ranges(numbers: Sequence[int]) -> str:
    """Write numbers in short.

    Example:
        >>> _ranges((0, 1, 2, 3, 7, 9, 10))
        '0-3, 7, 9, 10'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    pieces = [piece for run in runs for piece in ([f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run))]
    return ", ".join(pieces if len(pieces) <= 8 else [*pieces[:7], "…"])


def drawn(
    seen: Iterable[Seen],
    out: Path,
    look: Look,
    *,
    images: Sequence[str],
    models: Sequence[str],
    attention: bool = False,
) -> Iterator[Picture]:
    """Draw and write every picture, one after the other, and the overview behind those of its rows.

    Args:
        seen: what all models made of the first image, then of the second.
        out: the directory.
        look: which channels, which colours.
        images: the keys of all images that can come; if there are several, each has a folder.
        models: the names of all models; if there are several, each has a folder.
        attention: whether it is attention that was seen.

    Raises:
        StoreError: the directory cannot be written, or holds a file of such a name that hookx has not drawn.
    """
    style = _Style(look, attention)
    image_folders, model_folders = _image_folders(images), itertools.cycle(_model_folders(models))
    rows: list[Row] = []
    pages = 0
    for one in seen:
        folder = out / image_folders[one.image] / next(model_folders)
        cells = []
        for shown in one.layers:
            content, sentence = chosen(shown, look)
            caption = _caption(one, shown, sentence, style)
            file = folder / f"{_file_name(shown.address)}{style.suffix}.png"
            _write(file, style.pixels(content, caption, one.photo), caption)
            cells.append(style.cell(shown, content))
            yield Picture(str(file), one.image, one.model, shown.address, sentence)
        rows.append(Row(one.model, _of_whom(one, with_image=len(images) > 1), one.photo, cells))
        if len(rows) == _ROWS_OF_AN_OVERVIEW:
            pages += 1
            yield _overview(rows, out, style, pages)
            rows = []
    if rows:
        yield _overview(rows, out, style, pages + 1)


@dataclass(frozen=True)
class _Style:
    """What all pictures of one call have in common."""

    look: Look
    attention: bool

    @property
    def as_heat(self) -> bool:
        return self.attention or bool(self.look.reduce)

    @property
    def colormap(self) -> str:
        return self.look.colormap_of(as_heat=self.as_heat)

    @property
    def suffix(self) -> str:
        """What the names of such pictures end with, so that they do not replace those of another kind."""
        return "-attention" * self.attention + (f"-{self.look.reduce}" if self.look.reduce else "")

    def pixels(self, content: Maps | Vector, caption: Caption, photo: Pixels | None) -> Pixels:
        if isinstance(content, Vector):
            return bar_strip(content, caption, photo)
        return channel_grid(content, caption, photo, colormap=self.colormap, as_heat=self.as_heat)

    def cell(self, shown: Shown, content: Maps | Vector) -> Cell:
        if isinstance(content, Maps) and len(content.numbers) > 1:
            if self.attention and content.on_photo:
                content = replace(content, values_CHW=content.values_CHW.mean(0)[None], numbers=(0,))
            elif self.look.channels or self.look.top or self.attention:
                content = _picked(content, range(min(_MAPS_OF_A_CELL, len(content.numbers))))
            else:
                content = _picked(content, _strongest(content)[:_MAPS_OF_A_CELL])
        return Cell(shown.address, " × ".join(map(str, shown.shape)) or "1", content, self.as_heat)

    def footer(self, rows: Sequence[Row]) -> str:
        """Say what a cell of an overview is."""
        own = "from its own least to its greatest value"
        if self.attention and not self.look.reduce:
            return f"each cell: an attention, the mean of its heads, {own}, over the grey of the input"
        if self.look.reduce:
            what = "heads" if self.attention else "channels"
            return f"each cell: the {self.look.reduce} of a layer's {what}, {own}, over the grey of the input"
        contents = [cell.content for row in rows for cell in row.cells]
        if not any(isinstance(content, Maps) and len(content.numbers) > 1 for content in contents):
            return f"each map {own}"
        asked = self.look.channels or self.look.top
        which = "first of the channels asked for" if asked else "strongest channels of a layer"
        return f"each cell: the {which}, {_MAPS_OF_A_CELL} at most, each {own}"


def _caption(one: Seen, shown: Shown, sentence: str, style: _Style) -> Caption:
    returned = ",".join(("N", *map(str, shown.shape)))
    title = f"{shown.address}, attention" if style.attention else shown.address
    lines = [f"{one.model}, weights {one.weights}", f"{returned}: {sentence}", f"{one.image}, {one.input}", shown.note]
    return Caption(title, tuple(filter(None, lines)), shown.unit)


def _of_whom(one: Seen, *, with_image: bool) -> str:
    return f"{one.image}, weights {one.weights}" if with_image else f"weights {one.weights}"


def _overview(rows: Sequence[Row], out: Path, style: _Style, page: int) -> Picture:
    file = out / f"overview{style.suffix}{f'-{page}' if page > 1 else ''}.png"
    footer = style.footer(rows)
    _write(file, overview(rows, footer, colormap=style.colormap), Caption("overview", (footer,)))
    layers = max(len(row.cells) for row in rows)
    shows = f"{len(rows)} row{'s' * (len(rows) > 1)}, {layers} layer{'s' * (layers > 1)}"
    return Picture(str(file), "", "", "", shows)


def _write(file: Path, pixels: Pixels, caption: Caption) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists() and not _is_ours(file):
            raise StoreError(f"{file} is there, and hookx has not drawn it", "choose another --out, or move it away")
    except OSError as error:
        raise StoreError(f"cannot write {file}: {error.strerror}", "choose another --out") from None
    write_whole(file, [png(pixels, "\n".join((caption.title, *caption.lines)))])


def _is_ours(file: Path) -> bool:
    with file.open("rb") as content:
        return _OURS in content.read(_BYTES_WITH_A_MARK)


def _image_folders(images: Sequence[str]) -> dict[str, str]:
    """Return the folder of each image: none for a single one, else its key without suffix, unless two share that."""
    if len(images) == 1:
        return {images[0]: ""}
    bare = [str(PurePosixPath(image).with_suffix("")) for image in images]
    uses = Counter(bare)
    folders = {}
    for image, name in zip(images, bare, strict=True):
        folder = name if uses[name] == 1 else image
        # A key out of somebody's run may not lead out of the directory.
        folders[image] = "/".join(_file_name(part) for part in folder.split("/") if part not in ("", ".", ".."))
    return folders


def _model_folders(models: Sequence[str]) -> list[str]:
    """Return the folder of each model: none for a single one, else its name, numbered where it is there again."""
    uses: Counter[str] = Counter()
    folders = []
    for model in models:
        uses[model] += 1
        folders.append(_file_name(model) + (f"-{uses[model]}" if uses[model] > 1 else ""))
    return folders if len(models) > 1 else [""]


def _file_name(text: str) -> str:
    """Return a name for a file; '.' is the model's own output.

    Example:
        >>> _file_name("layer1.0.relu:1"), _file_name("./out"), _file_name("timm:vit_tiny_patch16_224")
        ('layer1.0.relu:1', 'output,out', 'timm:vit_tiny_patch16_224')
    """
    name = re.sub(r"^\.(?=$|[:/@])", "output", text)
    name = re.sub(r"[\x00-\x1f\x7f\\]", "_", name.replace("/", ",")).lstrip(".") or "_"
    encoded = name.encode("utf-8", "surrogateescape")
    if len(encoded) <= _NAME_BYTES_AT_MOST:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:8]
    return encoded[:_NAME_BYTES_AT_MOST].decode("utf-8", "ignore") + f"-{digest}"
