"""What a run lists: its images, by looking for them or as its plan has listed them, and its selectors. No torch."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from hookx.errors import UsageError
from hookx.images.addresses import is_url
from hookx.images.listing import Choice, ImageList, list_images
from hookx.images.mapped import map_list, sources_of
from hookx.layers.select import Selector, parse_selectors
from hookx.options import ExtractOptions, list_paths
from hookx.store.directory import names_in
from hookx.store.files import open_file, report_read_errors
from hookx.store.location import Location, location_of
from hookx.store.objects.path import ObjectPath
from hookx.store.reading import as_stream
from hookx.store.scratch import scratch_folder

log = logging.getLogger("hookx")
_COPIED_AT_ONCE = 16 * 2**20
LIST = "images.list"  # beside the plan, if it was written


def list_images_of(options: ExtractOptions) -> ImageList:
    """List the images of a run, if the layers are named in words that can be read at all."""
    selectors_of(options)  # Listing takes long, where there are many.
    if options.limit is not None and options.sample is not None:
        raise UsageError("--limit and --sample exclude each other", "leave one of them out")
    file, sources = location_of(options.out) / LIST, absolute_sources(options)
    # What was mended since has another size, which only a look at the files shows.
    if sources and not options.retry_failures:
        with here(file, options.scratch) as copy:
            if copy and sources_of(copy) == sources:
                log.info("images: as %s lists them", file)
                return map_list(copy)
    return list_images(
        list_paths(options.images),
        root=options.root,
        path_column=options.path_column,
        key_column=options.key_column,
        columns=options.columns,
        label=options.label,
        suffixes=options.suffix,
        choice=Choice(options.limit, options.sample, options.seed),
        retry_seconds=options.retry_for,
        unavailable_is_failure=options.on_io_error == "fail",
    )


@contextlib.contextmanager
def here(file: Location, scratch: str | os.PathLike[str] | None) -> Iterator[Path | None]:
    """Yield a file that can be mapped, for as long as the block lasts: a copy of an object; None if there is none."""
    if not isinstance(file, ObjectPath):
        yield file
        return
    if file.name not in names_in(file.parent, is_output=True):
        yield None
        return
    with scratch_folder(scratch) as folder:
        copy = folder / file.name
        with report_read_errors(file), open_file(file) as opened, open(copy, "xb") as written:
            shutil.copyfileobj(as_stream(opened, _COPIED_AT_ONCE), written, _COPIED_AT_ONCE)
        yield copy


def absolute_sources(options: ExtractOptions) -> list[str]:
    """Return the folders and files that a run lists, wherever it is started, and how, as a list's file keeps them.

    There are none if standard input names images.
    """
    sources = [os.fspath(source) for source in list_paths(options.images)]
    if {"-", "-0"} & set(sources):
        return []
    how = [f"--root {_absolute(options.root)}"] if options.root is not None else []
    how += [f"--path-column {options.path_column}"] if options.path_column is not None else []
    how += [f"--key-column {options.key_column}"] if options.key_column is not None else []
    how += [f"--columns {','.join(options.columns)}"] if options.columns is not None else []
    how += [f"--label {options.label}"] if options.label is not None else []
    how += [f"--suffix {','.join(options.suffix)}"] if options.suffix else []
    choice = str(Choice(options.limit, options.sample, options.seed))
    return [*map(_absolute, sources), *how, *filter(None, [choice])]


def _absolute(name: str | os.PathLike[str]) -> str:
    text = os.fspath(name)
    return text if is_url(os.fsencode(text)) else os.path.abspath(text)


def selectors_of(options: ExtractOptions) -> tuple[list[Selector], list[Selector]]:
    selectors, excluded = parse_selectors(options.layers), parse_selectors(options.exclude)
    if not selectors:
        raise UsageError("no layer is named", "name one: --layers avgpool    list them: hookx list-layers MODEL")
    return selectors, excluded
