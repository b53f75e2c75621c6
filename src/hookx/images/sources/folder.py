"""A folder, searched recursively, and a file that is named."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from hookx.images.sources.archive import ArchiveSource, is_folder
from hookx.images.sources.kinds import archive_kind, check_not_compressed, is_compressed_tar, refuse_others
from hookx.images.sources.source import Found, Look
from hookx.images.sources.tables import FILE_NAME, TableSource

log = logging.getLogger("hookx")
METADATA = (b"metadata.csv", b"metadata.jsonl", b"metadata.parquet")


@dataclass(frozen=True)
class FileSource:
    """One image; its key is its bare name."""

    path: str

    def find(self, look: Look) -> Iterator[Found]:
        file = os.fsencode(self.path)
        refuse_others(file)
        name = os.path.basename(file)
        root, beginning = look.begin_in(os.fsdecode(file.removesuffix(name)))
        yield Found(root, [beginning + name])


@dataclass(frozen=True)
class FolderSource:
    """The images in a folder and all folders below, links followed; or those in its archives, if it holds only such.

    A folder of archives and no loose image is what WebDataset and img2dataset write. Among photographs, an archive is
    more likely a copy of them, so it is counted as not taken. A `metadata.csv`, `.jsonl` or `.parquet` with a column
    `file_name` says more about the images of its folder, as that of a Hugging Face imagefolder does.
    """

    path: str

    def find(self, look: Look) -> Iterator[Found]:
        root, beginning = look.begin_in(self.path)
        folder, beside = os.fsencode(os.path.join(self.path, "")), _Beside()
        archives, has_images = beside.archives, False
        for keys in _search(folder, beginning, (), look, beside):
            has_images = has_images or bool(keys)
            yield Found(root, keys)
        for path in beside.metadata:
            yield from find_metadata(TableSource(os.fsdecode(path)), beginning + path.removeprefix(folder), look)
        if has_images:
            for path in archives:
                look.not_taken.add(path)
            return
        for path in archives:
            check_not_compressed(path)
        if archives:
            text = f"{len(archives):,} archive{'s' * (len(archives) != 1)} and no loose images"
            log.info("%s holds %s: its images are those in the archives", os.path.join(self.path, ""), text)
        for path in sorted(archives):
            yield from ArchiveSource(os.fsdecode(path)).find_in(look, root, beginning + path.removeprefix(folder))


@dataclass(frozen=True)
class _Beside:
    """Files that a folder holds beside its loose images."""

    archives: list[bytes] = field(default_factory=list)
    metadata: list[bytes] = field(default_factory=list)


def find_metadata(table: TableSource, key: bytes, look: Look) -> Iterator[Found]:
    """Yield what the metadata of a folder say about its images; `key` is the key that the table itself would have."""
    if look.columns == () or not look.patiently("read", table.path, lambda: table.has_column(FILE_NAME)):
        look.not_taken.add(key)
        return
    yield from table.find_values(key[: key.rfind(b"/") + 1], look)


def _search(
    folder: bytes, prefix: bytes, above: tuple[tuple[int, int], ...], look: Look, beside: _Beside
) -> Iterator[list[bytes]]:
    """Yield the keys of a folder's images, and collect what lies beside them."""
    status = look.patiently("list the folder", folder, lambda: os.stat(folder))
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return  # A link to an enclosing folder, whose images are listed anyway.
    keys = []
    for entry in look.patiently("list the folder", folder, lambda: list(os.scandir(folder))):
        try:
            is_below = entry.is_dir()
        except OSError:
            is_below = look.patiently("look at", entry.path, functools.partial(is_folder, entry.path))
        if is_below:
            yield from _search(entry.path, prefix + entry.name + b"/", (*above, identity), look, beside)
        elif entry.name in METADATA:
            beside.metadata.append(entry.path)
        elif look.is_image(entry.name):
            keys.append(prefix + entry.name)
        elif archive_kind(entry.name) or is_compressed_tar(entry.name):
            beside.archives.append(entry.path)
        else:
            look.not_taken.add(entry.name)
    yield keys
