"""An archive: its members are listed from their headers, and nothing is unpacked to the disk."""

from __future__ import annotations

import errno
import functools
import os
import posixpath
import re
import stat
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hookx.errors import ImageError
from hookx.images.addresses import folder_and_name, is_url, shown_url, without_query
from hookx.images.files import Archive, ArchiveKind
from hookx.images.ranges import Pread
from hookx.images.remote import RemoteFile
from hookx.images.sources.kinds import NotTaken, archive_kind, check_not_compressed, is_image
from hookx.images.sources.sidecars import SAMPLES_AT_ONCE, Sidecars, is_sidecar
from hookx.images.sources.source import NUMBERS_OF_A_MEMBER, Found, Look

_NO_NAME = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL)
_OF_A_LINK = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_MACOS_PREFIX = b"._"
_DIRECTORY_BYTES = 2**20  # that hold the directories of most zips
# A path with './', '//' or '..' is another spelling of a plain one; keys are never absolute; and macOS adds '._a.jpg'.
_IS_UNUSUAL = re.compile(rb"[./]|.*?/[./]", re.DOTALL).match


def is_folder(path: str | bytes) -> bool:
    """Return whether a name is that of a folder; `ImageError` if it does not exist, `OSError` if the system fails."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except OSError as error:
        if os.path.islink(path) and error.errno in _OF_A_LINK:
            return False  # A link to nothing, or to itself.
        if error.errno in _NO_NAME:
            raise ImageError(f"no such file or folder: '{os.fsdecode(path)}'") from None
        raise


class Members:
    """The images of one archive, as they are found: their keys, and where they are."""

    def __init__(self, prefix: bytes, is_image: Callable[[bytes], bool] = is_image) -> None:
        self._prefix, self.is_image = prefix, is_image
        self.keys: list[bytes] = []
        self.places = array("q")
        self.not_taken = NotTaken()
        self.sidecars = Sidecars()

    def add(self, name: bytes, offset: int, stored_bytes: int, size_bytes: int) -> None:
        """Take a member that is an image by its name, and count another."""
        if not self.is_image(name):
            if is_sidecar(name) and not posixpath.basename(name).startswith(_MACOS_PREFIX):
                self.sidecars.add(name, offset, stored_bytes, size_bytes)
            else:
                self.not_taken.add(name)
            return
        if _IS_UNUSUAL(name):
            name = posixpath.normpath(b"/" + name).lstrip(b"/")
            if posixpath.basename(name).startswith(_MACOS_PREFIX):
                self.not_taken.add_kind("._ (metadata of macOS)")
                return
        self.keys.append(self._prefix + name)
        self.places.fromlist([offset, stored_bytes, size_bytes])


@dataclass(frozen=True)
class ArchiveSource:
    """The images of a .tar or a .zip; the key of each is the archive's name, '/', and the member's name."""

    path: str

    def find(self, look: Look) -> Iterator[Found]:
        folder, name = folder_and_name(self.path) if self._is_remote else os.path.split(self.path)
        root, beginning = look.begin_in(folder)
        yield from self.find_in(look, root, beginning + os.fsencode(name))

    def find_in(self, look: Look, root: bytes, key: bytes) -> Iterator[Found]:
        """Find the images of an archive that has a key among others in a folder."""
        prefix = key + b"/"
        members, archive = look.patiently("read the archive", self.path, lambda: self._scan(prefix, look))
        names = [] if look.columns == () else [key.removeprefix(prefix) for key in members.keys]
        matched = members.sidecars.match(names, members.not_taken)
        for label, count in members.not_taken.counts.items():
            look.not_taken.add_kind(label, count)
        if not any(matched):
            yield Found(root, members.keys, archive, members.places)
            return
        start = 0
        with self._reading(look) as read:
            for values in members.sidecars.read(matched, read, look.take):
                stop = start + SAMPLES_AT_ONCE
                places = members.places[NUMBERS_OF_A_MEMBER * start : NUMBERS_OF_A_MEMBER * stop]
                yield Found(root, members.keys[start:stop], archive, places, values=values)
                start = stop

    @property
    def _is_remote(self) -> bool:
        return is_url(os.fsencode(self.path))

    @property
    def _kind(self) -> ArchiveKind:
        kind = archive_kind(os.fsencode(without_query(self.path)))
        assert kind is not None
        return kind

    @contextmanager
    def _reading(self, look: Look) -> Iterator[Callable[[int, int, int], bytes]]:
        """Yield what reads a member: by its offset, the bytes that it takes, and its size."""
        from hookx.images.sources import zips  # It imports this module.

        def read(pread: Pread, offset: int, stored_bytes: int, size_bytes: int) -> bytes:
            if self._kind == "tar":
                return pread(stored_bytes, offset)
            try:
                return zips.read_member(pread, offset, stored_bytes, size_bytes)
            except zips.DamagedMemberError as error:
                what = f"'{shown_url(self.path)}' is damaged at byte {offset:,}: {error}"
                raise ImageError(what, "copy or pack it again") from None

        with self._opened(look) as (pread, _):
            yield lambda *place: look.patiently("read the archive", self.path, lambda: read(pread, *place))

    @contextmanager
    def _opened(self, look: Look) -> Iterator[tuple[Pread, int]]:
        """Yield what reads the archive by offset, and its size."""
        if self._is_remote:
            file = RemoteFile(self.path, look.retry_seconds)
            if self._kind == "zip":
                file.end_first(_DIRECTORY_BYTES)
            yield file.pread, file.size_bytes
            return
        try:
            # Without O_NONBLOCK, opening a named pipe blocks until something writes to it.
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in _NO_NAME:
                raise ImageError(f"no such file or folder: '{self.path}'") from None
            raise
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ImageError(f"'{self.path}' is not a regular file", "write it to the disk, and name that")
            yield functools.partial(os.pread, descriptor), status.st_size
        finally:
            os.close(descriptor)

    def _scan(self, prefix: bytes, look: Look) -> tuple[Members, Archive]:
        from hookx.images.sources import tars, zips  # They import this module.

        path, members = shown_url(self.path), Members(prefix, look.is_image)
        with self._opened(look) as (pread, size_bytes):
            check_not_compressed(os.fsencode(path), pread(8, 0))
            scan = tars.scan if self._kind == "tar" else zips.scan
            scan(pread, size_bytes, path, members)
        return members, Archive(self.path, self._kind, size_bytes)
