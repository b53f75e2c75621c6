"""Files that a list or a table names."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

from hookx.errors import ImageError
from hookx.images.addresses import is_url, shown_url, without_query
from hookx.images.columns import Values
from hookx.images.sources.source import Found, Look


def find_named(
    paths: list[bytes], here: bytes, root_of_here: bytes, look: Look, named_by: str, values: Values | None = None
) -> Iterator[Found]:
    """Yield files by normalised paths, with keys relative to `here`, to `--root` if it is given, or else to '/'.

    The key of a URL that does not begin with `here` is all of it but its query, which may be a signature.

    Args:
        here: the folder that relative paths begin in, with '/' at its end.
        root_of_here: how errors and the system are told that folder.
        values: what is known of each file.
    """
    are_urls = list(map(is_url, paths))
    if any(are_urls):
        urls = list(itertools.compress(paths, are_urls))
        yield from _find_urls(urls, here, look, named_by, values and values.where(are_urls))
        are_paths = [not one for one in are_urls]
        paths, values = list(itertools.compress(paths, are_paths)), values and values.where(are_paths)
        if not paths:
            return
    if look.root:
        root = os.path.join(os.path.abspath(os.fsencode(look.root)), b"")
        whole = [path if path.startswith(b"/") else here + path for path in paths]
        stray = next((path for path in whole if not path.startswith(root)), None)
        if stray is not None:
            raise ImageError(
                f"'{os.fsdecode(stray)}', named by {named_by}, is not within --root '{look.root}'",
                "name a folder above all of them",
            )
        yield Found(root, [path.removeprefix(root) for path in whole], is_named=True, values=values)
        return
    is_inside = [path.startswith(here) or not path.startswith(b"/") for path in paths]
    if all(is_inside):
        yield Found(root_of_here, [path.removeprefix(here) for path in paths], is_named=True, values=values)
        return
    inside = [path.removeprefix(here) for path in itertools.compress(paths, is_inside)]
    yield Found(root_of_here, inside, is_named=True, values=values and values.where(is_inside))
    is_outside = [not one for one in is_inside]
    outside = [path.lstrip(b"/") for path in itertools.compress(paths, is_outside)]
    yield Found(b"/", outside, is_named=True, values=values and values.where(is_outside))


def _find_urls(urls: list[bytes], here: bytes, look: Look, named_by: str, values: Values | None) -> Iterator[Found]:
    """Yield files behind URLs; those with a query apart, because the key does not contain it."""
    root = os.path.join(os.fsencode(look.root), b"") if look.root else here if is_url(here) else b""
    stray = next((url for url in urls if look.root and not url.startswith(root)), None)
    if stray is not None:
        raise ImageError(
            f"'{shown_url(os.fsdecode(stray))}', named by {named_by}, is not within --root '{look.root}'",
            "give the columns of a table keys of their own: --key-column, or leave out --root",
        )
    plain = [os.fsencode(without_query(os.fsdecode(url))) for url in urls]
    for is_inside in (True, False):
        for has_query in (False, True):
            chosen = [
                url.startswith(root) is is_inside and (url != without) is has_query
                for url, without in zip(urls, plain, strict=True)
            ]
            if not any(chosen):
                continue
            begin = root if is_inside else b""
            yield Found(
                begin,
                [url.removeprefix(begin) for url in itertools.compress(plain, chosen)],
                is_named=True,
                paths=list(itertools.compress(urls, chosen)) if has_query else None,
                values=values and values.where(chosen),
            )


def normalise(path: bytes) -> bytes:
    """Return the absolute path of a file, in one spelling."""
    if b".." in path.split(b"/"):  # After a link, '..' is not the folder before it.
        path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    return os.path.abspath(path)


def to_key(value: Any, table: str, number: int, column: str) -> bytes:
    """Return a value of a column as a key."""
    text = "" if value is None else str(value)
    if not text or "\0" in text or not isinstance(value, str | int):
        raise ImageError(f"'{table}', row {number:,}: {column} is not a key: {shown(value)}")
    return os.fsencode(text)


def shown(value: object, max_length: int = 80) -> str:
    return repr(value)[:max_length]
