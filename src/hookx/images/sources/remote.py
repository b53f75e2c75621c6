"""Images behind URLs: a prefix of an object store or a repository, and a single file."""

from __future__ import annotations

import logging
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from hookx.errors import ImageError
from hookx.images.addresses import check_named, folder_and_name, parse_url, shown_url, without_query
from hookx.images.files import LOOSE, Archive
from hookx.images.remote import AbsentError, size_of, walk
from hookx.images.sources.archive import ArchiveSource
from hookx.images.sources.folder import METADATA, find_metadata
from hookx.images.sources.kinds import (
    archive_kind,
    check_not_compressed,
    is_compressed_tar,
    refuse_others,
)
from hookx.images.sources.source import Found, Look, Source
from hookx.images.sources.tables import TableSource, is_table

log = logging.getLogger("hookx")
_FOUND_AT_ONCE = 10_000


def source_behind(url: str, look: Look) -> Source:
    """Return the source that a URL names: a prefix, an archive, a table, or an image."""
    check_named(url)
    address, plain = parse_url(url), without_query(url)
    is_prefix = not address.key or plain.endswith("/")
    if is_prefix and not address.can_be_listed:
        raise ImageError(
            f"'{shown_url(url)}' cannot be listed: nothing says over HTTP which files a folder holds",
            "name the files, in a table with a column of their URLs, or one per line: hookx extract ... - < list",
        )
    if is_prefix:
        return PrefixSource(url)
    if address.can_be_listed and (_is_of_no_kind(plain, look) or not _is_there(url, look)):
        if any(True for _ in walk(f"{url}/", look.retry_seconds)):
            return PrefixSource(f"{url}/")
        size_of(url, look.retry_seconds)  # which says that there is no such object either
    if is_table(plain):
        return TableSource(url, look.retry_seconds)
    return ArchiveSource(url) if archive_kind(os.fsencode(plain)) else RemoteFileSource(url)


def _is_of_no_kind(url: str, look: Look) -> bool:
    name = os.fsencode(url)
    return not (look.is_image(name) or archive_kind(name) or is_compressed_tar(name) or is_table(url))


def _is_there(url: str, look: Look) -> bool:
    try:
        size_of(url, look.retry_seconds)
    except AbsentError:
        return False
    return True


@dataclass(frozen=True)
class RemoteFileSource:
    """One image; its key is its bare name."""

    url: str

    def find(self, look: Look) -> Iterator[Found]:
        refuse_others(os.fsencode(without_query(self.url)))
        size_of(self.url, look.retry_seconds)  # A file that is named exists.
        folder, name = folder_and_name(self.url)
        root, beginning = look.begin_in(folder)
        is_plain = self.url == folder + name
        paths = None if is_plain else [os.fsencode(self.url)]
        yield Found(root, [beginning + os.fsencode(name)], is_named=True, paths=paths)


@dataclass(frozen=True)
class PrefixSource:
    """The images below a prefix; or those in its archives, if it holds only such, as it is with folders."""

    url: str

    def find(self, look: Look) -> Iterator[Found]:
        root, beginning = look.begin_in(self.url)
        start = len(parse_url(self.url).key)
        archives, metadata = list[str](), list[str]()
        has_images = False
        keys, places = list[bytes](), array("q")
        archive = Archive(self.url, "prefix", 0)
        for whole_key, size_bytes in walk(self.url, look.retry_seconds):
            key = os.fsencode(whole_key[start:])
            if not key or key.endswith(b"/"):
                continue  # What stands for a folder in a store that has none.
            if look.is_image(key) and b"\0" not in key:
                keys.append(beginning + key)
                places.fromlist([LOOSE, 0, size_bytes])
            elif archive_kind(key) or is_compressed_tar(key):
                archives.append(os.fsdecode(key))
            elif key.rpartition(b"/")[2] in METADATA:
                metadata.append(os.fsdecode(key))
            else:
                look.not_taken.add(key)
            if len(keys) == _FOUND_AT_ONCE:
                has_images = True
                yield Found(root, keys, archive, places)
                keys, places = [], array("q")
        has_images = has_images or bool(keys)
        yield Found(root, keys, archive, places)
        for name in metadata:
            table = TableSource(self.url + name, look.retry_seconds)
            yield from find_metadata(table, beginning + os.fsencode(name), look)
        if has_images:
            for name in archives:
                look.not_taken.add(os.fsencode(name))
            return
        for name in archives:
            check_not_compressed(os.fsencode(self.url + name))
        if archives:
            text = f"{len(archives):,} archive{'s' * (len(archives) != 1)} and no loose images"
            log.info("%s holds %s: its images are those in the archives", self.url, text)
        for name in sorted(archives, key=os.fsencode):
            yield from ArchiveSource(self.url + name).find_in(look, root, beginning + os.fsencode(name))
