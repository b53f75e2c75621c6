"""Sources of images: each lists keys, sizes and where the bytes are, which any process can then open."""

from __future__ import annotations

import os

from hookx.images.addresses import is_url
from hookx.images.sources.archive import ArchiveSource, is_folder
from hookx.images.sources.folder import FileSource, FolderSource
from hookx.images.sources.kinds import archive_kind
from hookx.images.sources.remote import source_behind
from hookx.images.sources.source import Found, Look, Source
from hookx.images.sources.standard_input import StandardInput
from hookx.images.sources.tables import TableSource, is_table

__all__ = ["Found", "Look", "Source", "source_of"]


def source_of(name: str, look: Look) -> Source:
    r"""Return the source that a user names: a folder, an archive, a table, an image, a URL, or '-' for standard input.

    Example:
        >>> source_of("images", Look()), source_of("-0", Look())
        (FolderSource(path='images'), StandardInput(end=b'\x00'))
    """
    if name in ("-", "-0"):
        return StandardInput(b"\0" if name == "-0" else b"\n")
    if is_url(os.fsencode(name)):
        return source_behind(name, look)
    if look.patiently("look at", name, lambda: is_folder(name)):
        return FolderSource(name)
    if is_table(name):
        return TableSource(name)
    return ArchiveSource(name) if archive_kind(os.fsencode(name)) else FileSource(name)
