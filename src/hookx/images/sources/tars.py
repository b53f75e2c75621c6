"""The members of a tar, read from its headers alone, and the bytes of one of them.

The formats are those of v7, ustar, GNU and pax (POSIX.1-2001): https://www.gnu.org/software/tar/manual/html_node/
Standard.html. Python's tarfile takes some ten times as long, because it makes an object of each member.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from typing import NoReturn
from zlib import adler32

from hookx.errors import ImageError
from hookx.images.ranges import Pread
from hookx.images.sources.archive import Members

_BLOCK = 512
_NO_HEADER = bytes(_BLOCK)
_REGULAR = frozenset(b"0\x007")
_LONG_NAME, _LONG_LINK, _PAX, _PAX_OF_ALL = ord("L"), ord("K"), ord("x"), ord("g")
_SPARSE, _PAX_OF_SOLARIS = ord("S"), ord("X")
_NOT_TAKEN = {
    **{ord("1"): "hard links", ord("2"): "symbolic links", _SPARSE: "sparse files"},
    **dict.fromkeys(b"346", "devices and pipes"),
}
_WITHOUT_DATA = frozenset(b"123456")
_FOLDER, _FOLDER_OF_GNU = ord("5"), ord("D")  # the latter in an incremental archive, with the names within as its data
_SPACE = ord(" ")
_MAX_EXTENSION_BYTES = 2**20  # of a long name, or of a member's pax records; anything above is damage
_PAX_RECORD = re.compile(rb"(\d{1,20}) ([^=]+)=")
_SUM, _BLANK_SUM = slice(148, 156), 8 * ord(" ")
_ADLER_PRIME = 65_521


def scan(pread: Pread, size_bytes: int, path: str, members: Members) -> None:
    """List the members of a tar; `ImageError` if it is damaged, or was cut short.

    Links, sparse files, folders and devices are not taken. What follows the end of an archive is read as well, as
    `tar --ignore-zeros` does, because archives may have been joined.
    """
    position, has_ended = 0, False
    add = members.add  # Looked up once, and not for each of a million members.
    long_name: bytes | None = None
    pax: dict[bytes, bytes] = {}
    pax_of_all: dict[bytes, bytes] = {}
    while position < size_bytes:
        header = pread(_BLOCK, position)
        # The lower half of an Adler-32 is one more than the sum of the bytes, modulo 65,521: so zlib adds them up in a
        # twentieth of the time that Python takes.
        try:
            said = int(header[148:154], 8)
            is_whole = ((adler32(header) & 0xFFFF) - 1 - sum(header[_SUM]) + _BLANK_SUM - said) % _ADLER_PRIME == 0
        except ValueError:
            is_whole = False
        if not is_whole or len(header) < _BLOCK:
            if header == _NO_HEADER:
                has_ended, position = True, position + _BLOCK
                continue
            if len(header) < _BLOCK:
                _cut_short(path)
            if not _has_its_sum(header):
                _damaged(path, position)
        has_ended = False
        kind = header[156]
        try:
            if header[135] > _SPACE:  # a twelfth digit, as some programs write from 8 GiB on
                raise ValueError
            stored_bytes = int(header[124:135], 8)
        except ValueError:
            stored_bytes = _read_number(header[124:136], path, position)
        name = header[:100].partition(b"\0")[0]
        if header[345] and header[257:263] == b"ustar\0":
            name = header[345:500].partition(b"\0")[0] + b"/" + name
        data = position + _BLOCK
        if kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_OF_ALL, _PAX_OF_SOLARIS):
            if stored_bytes > _MAX_EXTENSION_BYTES:
                _damaged(path, position)
            content = pread(stored_bytes, data)
            if len(content) < stored_bytes:
                _cut_short(path)
            if kind == _LONG_NAME:
                long_name = content.partition(b"\0")[0]
            elif kind == _PAX_OF_ALL:
                pax_of_all |= _read_records(content, path, position)
            elif kind != _LONG_LINK:
                pax = _read_records(content, path, position)
            position = data + -(-stored_bytes // _BLOCK) * _BLOCK
            continue
        is_sparse = kind == _SPARSE
        if long_name is not None:
            name, long_name = long_name, None
        if pax or pax_of_all:
            records = pax_of_all | pax
            name = records.get(b"path", name)
            stored_bytes = _size_of(records, stored_bytes, path, position)
            is_sparse = is_sparse or any(record.startswith(b"GNU.sparse") for record in records)
            pax = {}
        if kind == _SPARSE and header[482]:  # More blocks say where its data are.
            while (more := pread(_BLOCK, data)) and len(more) == _BLOCK:
                data += _BLOCK
                if not more[504]:
                    break
        if kind == 0 and name.endswith(b"/"):
            kind = _FOLDER  # As the oldest format says it.
        position = data if kind in _WITHOUT_DATA else data + -(-stored_bytes // _BLOCK) * _BLOCK
        if data + (0 if kind in _WITHOUT_DATA else stored_bytes) > size_bytes:
            _cut_short(path, name)
        if kind in _REGULAR and not is_sparse:
            add(name, data, stored_bytes, stored_bytes)
        elif kind not in (_FOLDER, _FOLDER_OF_GNU):
            members.not_taken.add_kind("sparse files" if is_sparse else _NOT_TAKEN.get(kind, "members of other kinds"))
    if not has_ended:
        _cut_short(path)


def _read_number(field: bytes, path: str, position: int) -> int:
    """Read a number that is padded in its own way, or, from 8 GiB on, written to the base of 256."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:])
    text = field.partition(b"\0")[0].strip()
    try:
        return int(text, 8) if text else 0
    except ValueError:
        _damaged(path, position)


def _size_of(records: Mapping[bytes, bytes], stored_bytes: int, path: str, position: int) -> int:
    text = records.get(b"size")
    if text is None:
        return stored_bytes
    if not text.isdigit():
        _damaged(path, position)
    return int(text)


def _read_records(content: bytes, path: str, position: int) -> dict[bytes, bytes]:
    """Read a pax header: lines of a length, a keyword and a value, as in '30 path=photos/chelsea.jpg'."""
    records, start = dict[bytes, bytes](), 0
    while start < len(content) and content[start]:
        match = _PAX_RECORD.match(content, start)
        end = start + int(match[1]) if match else 0
        if match is None or end <= match.end() or content[end - 1 : end] != b"\n":
            _damaged(path, position)
        records[match[2]] = content[match.end() : end - 1]
        start = end
    if b"\0" in records.get(b"path", b""):
        _damaged(path, position)
    return records


def _has_its_sum(header: bytes) -> bool:
    """Return whether a header has its checksum, written in whatever way; some programs took its bytes for signed."""
    try:
        said = int(header[_SUM].strip(b" \0"), 8)
    except ValueError:
        return False
    summed = header[: _SUM.start] + b" " * 8 + header[_SUM.stop :]
    return said in (sum(summed), sum(byte - 256 * (byte > 127) for byte in summed))


def _damaged(path: str, position: int) -> NoReturn:
    if position == 0:
        raise ImageError(
            f"'{path}' is not a tar, or its first bytes are damaged", f"what is it? file {shlex.quote(path)}"
        )
    raise ImageError(f"'{path}' is damaged: there is no valid header at byte {position:,}", "copy or pack it again")


def _cut_short(path: str, name: bytes = b"") -> NoReturn:
    where = f"within '{os.fsdecode(name)}'" if name else "and has no end"
    raise ImageError(
        f"'{path}' was cut short, {where}",
        "copy or pack it again; to accept one that its writer never closed, give it an end:",
        f"  head -c 1024 /dev/zero >> {shlex.quote(path)}",
    )
