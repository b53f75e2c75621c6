"""The members of a zip, from its central directory, and the bytes of one of them."""

from __future__ import annotations

import io
import os
import stat
import struct
import zipfile
import zlib

from hookx.errors import ImageError
from hookx.images.ranges import Pread, RangedFile
from hookx.images.sources.archive import Members

_STORED, _DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
_ENCRYPTED, _HAS_DESCRIPTOR, _IS_UTF8 = 1 << 0, 1 << 3, 1 << 11
_UNIX = 3
_LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")
_LOCAL_SIGNATURE, _DESCRIPTOR_SIGNATURE = b"PK\3\4", b"PK\7\x08"


class DamagedMemberError(Exception):
    """What a zip holds at a place is not the member that its directory says."""


def scan(pread: Pread, size_bytes: int, path: str, members: Members) -> None:
    """List the members of a zip; `ImageError` if it is damaged, or its images are encrypted."""
    with RangedFile(pread, size_bytes) as raw, io.BufferedReader(raw) as file:
        try:
            directory = zipfile.ZipFile(file).infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
            if raw.error is not None:  # Python's zipfile says that what cannot be read is not a zip.
                raise raw.error from None
            raise ImageError(f"'{path}' is not a whole zip: {error}", "copy or pack it again") from None
    for member in directory:
        if member.is_dir():
            continue
        name = _name_of(member)
        if member.create_system == _UNIX and stat.S_ISLNK(member.external_attr >> 16):
            members.not_taken.add_kind("symbolic links")
            continue
        if members.is_image(name):
            if member.flag_bits & _ENCRYPTED:
                raise ImageError(f"'{path}' is encrypted", "unpack it with its password, and name the folder")
            if member.compress_type not in (_STORED, _DEFLATED):
                raise ImageError(
                    f"'{path}' holds '{os.fsdecode(name)}' compressed by method {member.compress_type}; hookx reads "
                    "stored and deflated members",
                    "unpack it, and name the folder, or pack that again: zip -r",
                )
            if member.header_offset + member.compress_size > size_bytes:
                raise ImageError(f"'{path}' was cut short within '{os.fsdecode(name)}'", "copy or pack it again")
        members.add(name, member.header_offset, member.compress_size, member.file_size)


def _name_of(member: zipfile.ZipInfo) -> bytes:
    """Return a member's name as UTF-8, which many programs write without a flag that says so."""
    if not member.flag_bits & _IS_UTF8:
        try:
            return member.filename.encode("cp437").decode().encode()
        except ValueError:
            pass
    return member.filename.encode("utf-8", "surrogateescape")


def read_member(pread: Pread, offset: int, stored_bytes: int, max_bytes: int) -> bytes:
    """Return the bytes of a member; `DamagedMemberError` if they are not those that were packed, or are too many."""
    header = pread(_LOCAL_HEADER.size, offset)
    if len(header) < _LOCAL_HEADER.size or not header.startswith(_LOCAL_SIGNATURE):
        raise DamagedMemberError("there is no local header where its directory says")
    _, _, flags, method, _, _, checksum, _, _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
    start = offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
    content = _read_exactly(pread, stored_bytes, start)
    if flags & _HAS_DESCRIPTOR:  # Written in one go, so that the checksum follows the data.
        descriptor_of_data = pread(8, start + stored_bytes)
        at = 4 if descriptor_of_data.startswith(_DESCRIPTOR_SIGNATURE) else 0
        checksum = int.from_bytes(descriptor_of_data[at : at + 4], "little")
    if method == _DEFLATED:
        decompressor = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            content = decompressor.decompress(content, max_bytes + 1)  # A small file can unpack to any size.
        except zlib.error as error:
            raise DamagedMemberError(str(error)) from None
    if len(content) > max_bytes:
        raise DamagedMemberError(f"it unpacks to more than {max_bytes:,} bytes")
    if zlib.crc32(content) != checksum:
        raise DamagedMemberError("its bytes do not have the checksum that they were packed with")
    return content


def _read_exactly(pread: Pread, count: int, offset: int) -> bytes:
    parts, read = [], 0
    while read < count and (part := pread(count - read, offset + read)):
        parts.append(part)
        read += len(part)
    return b"".join(parts)
