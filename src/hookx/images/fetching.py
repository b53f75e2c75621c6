"""The bytes of one image behind a URL, and whose fault it is if they do not come."""

from __future__ import annotations

import errno
import os
from typing import Any, NoReturn

from hookx.errors import ImageError, one_line
from hookx.images.addresses import Remote, is_url, parse_url
from hookx.images.files import Fetched, File, Member
from hookx.images.memory import allowed_bytes
from hookx.images.remote import AbsentError, UnreachableError
from hookx.images.retries import UnavailableError
from hookx.images.rows import read_row
from hookx.images.sources import zips
from hookx.images.unreadable import UnreadableError, check_size
from hookx.store.objects.helper import BusyStoreError, NoCredentialsError, NoRangesError, ObjectStoreError, ask

_HEADER_BYTES = 1024  # of a member of a zip, and of what follows it; the few that have more cost a second request


def is_remote(file: File) -> bool:
    return isinstance(file, Remote) or (isinstance(file, Member) and is_url(os.fsencode(file.archive.path)))


def fetch(file: File, listed_bytes: int | None = None) -> str | Member | Fetched:
    """Return an image with its bytes if it lies behind a URL, and any other as it is.

    Raises:
        UnavailableError: the store cannot send it now.
        UnreadableError: it has changed since it was listed, or is damaged.
        OSError: there is no such file, or access to it is denied.
    """
    if not isinstance(file, Remote) and not is_remote(file):
        return file
    assert not isinstance(file, str | Fetched)
    content = _fetch_whole(file.url, listed_bytes) if isinstance(file, Remote) else _fetch_member(file, listed_bytes)
    check_size(len(content), listed_bytes)
    return Fetched(str(file), content)


def _fetch_whole(url: str, listed_bytes: int | None) -> bytes:
    is_listed = listed_bytes is not None and listed_bytes >= 0
    max_bytes = listed_bytes if is_listed else allowed_bytes()
    answer, data = _ask(url, "whole", max_bytes=max_bytes)
    if len(data) < answer["size"]:
        check_size(answer["size"], listed_bytes)
        raise UnreadableError(f"it has {answer['size']:,} bytes, which is more than there is memory for")
    return bytes(data)


def _fetch_member(member: Member, listed_bytes: int | None) -> bytes:
    if member.archive.kind == "parquet":
        return _fetch_row(member)
    start, stop = member.offset, member.offset + member.stored_bytes
    if member.archive.kind == "tar":
        return _fetch_stretch(member, start, stop)
    first = _fetch_stretch(member, start, min(stop + _HEADER_BYTES, member.archive.size_bytes))

    def pread(count: int, offset: int) -> bytes:
        at = offset - start
        if at + count <= len(first) or start + len(first) == member.archive.size_bytes:
            return first[at : at + count]
        return _fetch_stretch(member, offset, min(offset + count, member.archive.size_bytes))

    max_bytes = allowed_bytes() if listed_bytes is None else listed_bytes
    try:
        return zips.read_member(pread, member.offset, member.stored_bytes, max_bytes)
    except zips.DamagedMemberError as error:
        raise UnreadableError(f"damaged in its archive: {error}") from None


def _fetch_row(member: Member) -> bytes:
    try:
        return read_row(member.archive, member.offset)
    except UnreachableError as error:
        raise UnavailableError(OSError(errno.EIO, error.reason)) from None
    except AbsentError as error:
        raise FileNotFoundError(errno.ENOENT, one_line(error)) from None
    except ImageError as error:
        raise UnreadableError(f"damaged in its table: {one_line(error)}") from None


def _fetch_stretch(member: Member, start: int, stop: int) -> bytes:
    if stop <= start:
        return b""
    answer, data = _ask(member.archive.path, "stretch", start=start, stop=stop)
    if answer["size"] not in (-1, member.archive.size_bytes):
        raise UnreadableError(
            f"its archive changed since it was listed ({member.archive.size_bytes} -> {answer['size']} bytes)"
        )
    if len(data) < stop - start:
        raise UnreadableError("its archive changed since it was listed")
    return bytes(data)


def _ask(url: str, what: str, **values: Any) -> tuple[dict[str, Any], memoryview]:
    try:
        address = parse_url(url)
    except ImageError as error:
        raise UnreadableError(str(error).splitlines()[0]) from None
    try:
        return ask(*address, what, **values)
    except NoRangesError as error:
        raise UnreadableError(str(error)) from None
    except (BusyStoreError, NoCredentialsError, ObjectStoreError) as error:
        # Credentials that have expired and a bucket that is gone are not the image's fault either.
        raise UnavailableError(OSError(errno.EIO, str(error))) from None
    except FileNotFoundError as error:
        _say(FileNotFoundError, errno.ENOENT, error)
    except PermissionError as error:
        _say(PermissionError, errno.EACCES, error)


def _say(kind: type[OSError], number: int, error: OSError) -> NoReturn:
    raise kind(number, str(error)) from None
