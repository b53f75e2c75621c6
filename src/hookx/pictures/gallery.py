"""Pictures in a directory: one file per layer, with its caption, and the overview."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from hookx.errors import StoreError
from hookx.pictures.contents import Look, ShownImage, ShownLayer, choose, find_strongest
from hookx.pictures.drawing import Cell, Content, Row, draw_bars, draw_grid, draw_overview
from hookx.pictures.page import Caption, Page, count_nouns, png
from hookx.store.files import write_whole

_MAX_MAPS_IN_CELL, _MAX_ROWS = 16, 12  # in an overview
_MARK = b"Software\0hookx"  # as a PNG file holds it, before the pixels
_BYTES_WITH_MARK = 65_536
_MAX_NAME_BYTES = 200


@dataclass(frozen=True)
class Picture:
    """One file that was drawn, and what it shows; `layer` is '' for an overview."""

    file: str
    image: str
    model: str
    layer: str
    shows: str


@dataclass(frozen=True)
class Gallery:
    """The pictures that were drawn, in order, and the images that could not be read, each with the reason."""

    out: str
    pictures: tuple[Picture, ...]
    failures: dict[str, str]


def draw(
    shown: Iterable[ShownImage],
    look: Look,
    *,
    images: Sequence[str],
    models: Sequence[str],
    progress: Callable[[int], None] = lambda pictures_done: None,
    failures: dict[str, str] | None = None,
) -> Gallery:
    """Draw and write one picture per layer, and an overview with one row per image and model.

    Args:
        shown: the first image by every model, then the second.
        look: which channels, which colours, and the directory.
        images: the keys of all images that can come; several have a folder each, as several models have.
        failures: the images that cannot be read; `shown` may still fill it.

    Raises:
        StoreError: the directory cannot be written, or a file to replace was not drawn by hookx.
    """
    out = Path(look.options.out)
    image_folders, model_folders = name_image_folders(images), itertools.cycle(_name_model_folders(models))
    pictures: list[Picture] = []
    rows: list[Row] = []
    overviews = itertools.count(1)

    def save(page: Page, caption: Caption, picture: Picture) -> None:
        _write(Path(picture.file), page, caption)
        pictures.append(picture)
        progress(1)

    def save_overview() -> None:
        number = next(overviews)
        file = out / f"overview{look.suffix}{f'-{number}' if number > 1 else ''}.png"
        footer, layers = _describe_cells(rows, look), max(len(row.cells) for row in rows)
        shows = f"{count_nouns(len(rows), 'row')}, {count_nouns(layers, 'layer')}"
        page = draw_overview(rows, footer, colormap=look.colormap, as_heat=look.as_heat)
        save(page, Caption("overview", (footer,)), Picture(str(file), "", "", "", shows))
        rows.clear()

    for one in shown:
        folder = out / image_folders[one.image] / next(model_folders)
        cells = []
        for layer in one.layers:
            content, sentence = choose(layer, look)
            caption = _caption(one, layer, sentence, look)
            if content.are_maps:
                page = draw_grid(content, caption, one.photo, colormap=look.colormap, as_heat=look.as_heat)
            else:
                page = draw_bars(content, caption, one.photo)
            file = folder / f"{name_file(layer.address)}{look.suffix}.png"
            save(page, caption, Picture(str(file), one.image, one.model, layer.address, sentence))
            shape = " × ".join(map(str, layer.shape)) or "1"
            cells.append(Cell(layer.address, shape, _choose_for_cell(content, look)))
        detail = f"{one.image}, weights {one.weights}" if len(images) > 1 else f"weights {one.weights}"
        rows.append(Row(one.model, detail, one.photo, cells))
        if len(rows) == _MAX_ROWS:
            save_overview()
    if rows:
        save_overview()
    return Gallery(str(out), tuple(pictures), failures or {})


def _caption(one: ShownImage, layer: ShownLayer, sentence: str, look: Look) -> Caption:
    returned = ",".join(("N", *map(str, layer.shape)))
    title = f"{layer.address}, attention" if look.attention else layer.address
    lines = [f"{one.model}, weights {one.weights}", f"{returned}: {sentence}", f"{one.image}, {one.input}", layer.note]
    return Caption(title, tuple(filter(None, lines)), layer.unit)


def _choose_for_cell(content: Content, look: Look) -> Content:
    if not content.are_maps or len(content.numbers) == 1:
        return content
    if look.attention and content.on_photo:
        return content.merge(content.values.mean(0))
    in_order = look.is_selective or look.attention
    order = range(len(content.numbers)) if in_order else find_strongest(content)
    return content.pick(order[:_MAX_MAPS_IN_CELL])


def _describe_cells(rows: Sequence[Row], look: Look) -> str:
    own = "from its own least to its greatest value"
    if look.attention and not look.options.reduce:
        return f"each cell: an attention, the mean of its heads, {own}, over the grey of the input"
    if look.options.reduce:
        what = "heads" if look.attention else "channels"
        return f"each cell: the {look.options.reduce} of a layer's {what}, {own}, over the grey of the input"
    contents = [cell.content for row in rows for cell in row.cells]
    if not any(content.are_maps and len(content.numbers) > 1 for content in contents):
        return f"each map {own}"
    which = "first of the requested channels" if look.is_selective else "strongest channels of a layer"
    return f"each cell: the {which}, {_MAX_MAPS_IN_CELL} at most, each {own}"


def _write(file: Path, page: Page, caption: Caption) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            with file.open("rb") as old:
                if _MARK not in old.read(_BYTES_WITH_MARK):
                    reason = f"{file} exists and was not drawn by hookx"
                    raise StoreError(reason, "choose another --out, or move the file away")
    except OSError as error:
        raise StoreError(f"cannot write {file}: {error.strerror}", "choose another --out") from None
    write_whole(file, [png(page.pixels(), "\n".join((caption.title, *caption.lines)))])


def name_image_folders(images: Sequence[str]) -> dict[str, str]:
    """Name the folder of each image: '' for a single one, else its key, without suffix unless two would share it."""
    if len(images) == 1:
        return {images[0]: ""}
    bare = [str(PurePosixPath(image).with_suffix("")) for image in images]
    uses = Counter(bare)
    folders = {}
    for image, name in zip(images, bare, strict=True):
        folder = name if uses[name] == 1 else image
        # A stored key must not lead out of the directory.
        folders[image] = "/".join(name_file(part) for part in folder.split("/") if part not in ("", ".", ".."))
    return folders


def _name_model_folders(models: Sequence[str]) -> list[str]:
    """Name the folder of each model: '' for a single one, else its name, with a number from its second use on."""
    if len(models) == 1:
        return [""]
    earlier = [models[:position].count(model) for position, model in enumerate(models)]
    return [name_file(model) + (f"-{uses + 1}" if uses else "") for model, uses in zip(models, earlier, strict=True)]


def name_file(text: str) -> str:
    """Turn an address or a model's name into a file name; '.', the model's own output, becomes 'output'."""
    name = re.sub(r"^\.(?=$|[:/@])", "output", text)
    name = re.sub(r"[\x00-\x1f\x7f\\]", "_", name.replace("/", ",")).lstrip(".") or "_"
    encoded = name.encode("utf-8", "surrogateescape")
    if len(encoded) <= _MAX_NAME_BYTES:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:8]
    return encoded[:_MAX_NAME_BYTES].decode("utf-8", "ignore") + f"-{digest}"
