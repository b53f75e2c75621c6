"""What a run lists: its images, by looking for them or as its plan has listed them, and its selectors. No torch."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from hookx.errors import UsageError
from hookx.images.listing import Choice, ImageList, list_images
from hookx.images.mapped import map_list, sources_of
from hookx.layers.select import Selector, parse_selectors
from hookx.options import ExtractOptions, list_paths

log = logging.getLogger("hookx")
LIST = "images.list"  # beside the plan, if it was written


def list_images_of(options: ExtractOptions) -> ImageList:
    """List the images of a run, if the layers are named in words that can be read at all."""
    selectors_of(options)  # Listing takes long, where there are many.
    if options.limit is not None and options.sample is not None:
        raise UsageError("--limit and --sample exclude each other", "leave one of them out")
    file, sources = Path(options.out) / LIST, absolute_sources(options)
    # What was mended since has another size, which only a look at the files shows.
    if sources and not options.retry_failures and sources_of(file) == sources:
        log.info("images: as %s lists them", file)
        return map_list(file)
    return list_images(
        list_paths(options.images),
        root=options.root,
        path_column=options.path_column,
        key_column=options.key_column,
        choice=Choice(options.limit, options.sample, options.seed),
        retry_seconds=options.retry_for,
        unavailable_is_failure=options.on_io_error == "fail",
    )


def absolute_sources(options: ExtractOptions) -> list[str]:
    """Return the folders and files that a run lists, wherever it is started, and how, as a list's file keeps them.

    There are none if standard input names images.
    """
    sources = [os.fspath(source) for source in list_paths(options.images)]
    if {"-", "-0"} & set(sources):
        return []
    how = [f"--root {os.path.abspath(options.root)}"] if options.root is not None else []
    how += [f"--path-column {options.path_column}"] if options.path_column is not None else []
    how += [f"--key-column {options.key_column}"] if options.key_column is not None else []
    choice = str(Choice(options.limit, options.sample, options.seed))
    return [*map(os.path.abspath, sources), *how, *filter(None, [choice])]


def selectors_of(options: ExtractOptions) -> tuple[list[Selector], list[Selector]]:
    selectors, excluded = parse_selectors(options.layers), parse_selectors(options.exclude)
    if not selectors:
        raise UsageError("no layer is named", "name one: --layers avgpool    list them: hookx list-layers MODEL")
    return selectors, excluded
