"""What a zip archive says that it holds, before any of it is unpacked."""

from __future__ import annotations

import zipfile
from pathlib import Path

from hookx.errors import ModelError

# torch.save stores tensors as they are. Compressed afterwards, weights shrink to a half or so; what shrinks far more is
# zeros, and small enough here to do no harm.
_MAX_RATIO = 20
_HARMLESS_BYTES = 64 * 2**20
_BEGINS = b"PK\x03\x04"


def check_archive(path: Path) -> None:
    """Raise `ModelError` if a zip archive would unpack to much more than its own size makes plausible.

    Only its directory is read: the sizes there are those to which a reader unpacks. Any other kind of file passes.
    """
    with open(path, "rb") as file:
        if file.read(len(_BEGINS)) != _BEGINS:
            return
    size_bytes = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, UnicodeDecodeError) as error:
        raise ModelError(
            f"cannot read weights from '{path}': a damaged zip archive ({error})", "copy or download it again"
        ) from None
    packed, unpacked = (sum(sizes) for sizes in zip(*((e.compress_size, e.file_size) for e in entries), strict=True))
    is_stored_wrongly = any(e.compress_type == zipfile.ZIP_STORED and e.compress_size != e.file_size for e in entries)
    if packed > size_bytes or is_stored_wrongly:  # One piece of the file may stand for many entries.
        raise ModelError(
            f"'{path}' has {size_bytes:,} bytes, and its directory claims {packed:,}: it is damaged, or made to harm",
            "get it from its author again",
        )
    if unpacked > max(_HARMLESS_BYTES, _MAX_RATIO * size_bytes):
        raise ModelError(
            f"'{path}' would unpack from {size_bytes:,} bytes to {unpacked:,}, as no checkpoint does",
            "if it is honest, load it with torch and save it again: torch.save stores without compression",
        )
