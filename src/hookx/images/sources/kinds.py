"""What the name of a file says it is: an image, an archive, or what hookx does not read, with the way to read it."""

from __future__ import annotations

import functools
import os
import shlex
from collections.abc import Callable, Iterable, Sequence

from hookx.errors import ImageError
from hookx.images.files import ArchiveKind
from hookx.images.plugins import EXTRA_SUFFIXES, INSTALL, plugin_suffixes

# Folders and archives are searched for these; a file that is named explicitly may have any suffix.
SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .gif .webp .bmp .dib .tif .tiff .ppm .pgm .pbm .pnm .pfm .tga .ico .icns "
    ".jp2 .j2k .jpx .avif .avifs .qoi .dds .sgi .rgb .pcx .psd .xbm .xpm".split()
)
ENCODED_SUFFIXES = frozenset(map(os.fsencode, SUFFIXES))
_ARCHIVES: dict[bytes, ArchiveKind] = {b".tar": "tar", b".zip": "zip"}
_UNPACKERS = {
    "gzip": (b"\x1f\x8b", (b".tar.gz", b".tgz", b".taz")),
    "bzip2": (b"BZh", (b".tar.bz2", b".tbz2", b".tbz")),
    "xz": (b"\xfd7zXZ\0", (b".tar.xz", b".txz")),
    "zstd": (b"\x28\xb5\x2f\xfd", (b".tar.zst", b".tzst")),
    "lz4": (b"\x04\x22\x4d\x18", (b".tar.lz4",)),
}
_TAR_SUFFIXES = tuple(suffix for _, suffixes in _UNPACKERS.values() for suffix in suffixes)
_VIDEOS = ".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .wmv .flv .mts .m2ts .3gp".split()
TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
_MAX_LABELS = 1000  # Names that end in a number each would make a label each.
_OTHERS = "others"

# A suffix -> what such a file is, and the command that makes images of it; {} is its name, {stem} that without suffix.
_FRAMES = ("a video", "take its frames: mkdir frames && ffmpeg -i {} frames/%06d.png, and name frames/")
_PATHS = "to read the paths that it holds, one per line: hookx extract ... - < {}"
_UNPACKED = ("an archive that hookx does not read", "unpack it, and name the folder: 7z x {}")
_REFUSED = {
    **dict.fromkeys(_VIDEOS, _FRAMES),
    ".pdf": ("a PDF", "take its pages: mkdir pages && pdftoppm -png {} pages/page, and name pages/"),
    ".txt": ("a list", _PATHS),
    ".lst": ("a list", _PATHS),
    ".list": ("a list", _PATHS),
    ".json": ("a table", "write a line for each image, and name that: jq -c '.[]' {} > images.jsonl"),
    **dict.fromkeys(
        (".csv", ".tsv", ".jsonl", ".parquet"), ("a table", "name it as an argument: hookx extract ... {}")
    ),
    ".7z": _UNPACKED,
    ".rar": _UNPACKED,
}
_SIGNS = frozenset(suffix[-3:].encode() for suffix in (*_REFUSED, ".tar", ".zip", *map(os.fsdecode, _TAR_SUFFIXES)))
# What can be done about files that are not taken, by suffix.
_HINTS = {
    **dict.fromkeys(EXTRA_SUFFIXES, INSTALL),
    ".tar": "name it to read it",
    ".zip": "name it to read it",
    **dict.fromkeys(
        (
            *(".dcm", ".dicom", ".nii", ".nii.gz", ".nrrd", ".mha", ".mhd", ".npy", ".npz", ".h5", ".hdf5", ".mat"),
            *(".czi", ".nd2", ".lif", ".svs", ".ndpi", ".fits", ".fit", ".exr", ".hdr", ".nc"),
            *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".rw2", ".orf"),
        ),
        "--loader",
    ),
    **dict.fromkeys(_VIDEOS, "take its frames with ffmpeg"),
}


def archive_kind(name: bytes) -> ArchiveKind | None:
    """Return what kind of archive a file is by its name; None if it is not an archive that hookx reads."""
    return _ARCHIVES.get(name[-4:].lower())


def is_compressed_tar(name: bytes) -> bool:
    return name.lower().endswith(_TAR_SUFFIXES)


def check_not_compressed(path: bytes, beginning: bytes = b"") -> None:
    """Raise `ImageError` if a tar is compressed, by its name or its first bytes: no member can be read by itself."""
    for program, (magic, suffixes) in _UNPACKERS.items():
        if beginning.startswith(magic) or path.lower().endswith(suffixes):
            name = os.fsdecode(path)
            stem = next((name[: -len(suffix)] for suffix in suffixes if path.lower().endswith(suffix)), f"{name}-plain")
            raise ImageError(
                f"'{name}' is compressed, so that its images cannot be read one by one",
                f"unpack it to a tar, and name that: {program} -dc {shlex.quote(name)} > {shlex.quote(stem + '.tar')}",
            )


def refuse_others(path: bytes) -> None:
    """Raise `ImageError` for a file that is named as an image and cannot be one by its suffix: a video, a list."""
    check_not_compressed(path)
    name = os.fsdecode(path)
    if refused := _REFUSED.get(os.path.splitext(name)[1].lower()):
        what, way = refused
        raise ImageError(f"'{name}' is {what}, and not an image", way.replace("{}", shlex.quote(name)))


def refuse_listed(paths: Iterable[bytes]) -> None:
    """Raise `ImageError` if a list of paths names an archive, or what `refuse_others` refuses."""
    # The last three bytes of a long list's paths are few different ones, so looking at the paths is for the rare case.
    paths = list(paths)
    if {tail.lower() for tail in {path[-3:] for path in paths}}.isdisjoint(_SIGNS):
        return
    for path in paths:
        if archive_kind(path):
            name = os.fsdecode(path)
            raise ImageError(
                f"the list on standard input names '{name}', which is an archive, and not an image",
                f"name archives as arguments: hookx extract ... {shlex.quote(name)}",
            )
        refuse_others(path)


@functools.cache
def _taken() -> frozenset[bytes]:
    return ENCODED_SUFFIXES | frozenset(map(os.fsencode, plugin_suffixes()))


def image_test(suffixes: Sequence[str] = ()) -> Callable[[bytes], bool]:
    """Return what says whether a name is that of an image: by the usual suffixes, or these; '*': all but archives.

    Example:
        >>> is_scan = image_test([".dcm", ".nii.gz"])
        >>> [is_scan(name) for name in (b"a.DCM", b"b/c.nii.gz", b"d.gz", b"e.png")], image_test("*")(b"e")
        ([True, True, False, False], True)
    """
    if not suffixes:
        return is_image
    if "*" in suffixes:
        return lambda name: archive_kind(name) is None
    endings = tuple(map(os.fsencode, suffixes))
    return lambda name: name.lower().endswith(endings)


def is_image(name: bytes) -> bool:
    """Return whether a file or member counts as an image by its suffix.

    Example:
        >>> [is_image(name) for name in (b"a.JPG", b"b/c.d.png", b"b.png/c", b".png", b"a.txt")]
        [True, True, False, False, False]
    """
    dot = name.rfind(b".")
    if dot < 0 or name[dot:].lower() not in _taken():
        return False
    # A name that begins with its only dot has no suffix. `os.path.splitext` takes ten times as long for all others.
    return name[dot - 1 : dot] not in (b"", b"/", b".") or bool(os.path.splitext(name)[1])


class NotTaken:
    """Counts by suffix what a folder or an archive holds and is not taken.

    Example:
        >>> not_taken = NotTaken()
        >>> for name in (b"a.MP4", b"b.mp4", b"notes.txt", b"Makefile"):
        ...     not_taken.add(name)
        >>> not_taken.counts, describe_not_taken(not_taken.counts)[:37]
        ({'.mp4': 2, '.txt': 1, 'without suffix': 1}, '4 files not taken: 2 .mp4 (take its f')
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def add(self, name: bytes) -> None:
        dot = name.rfind(b".")
        suffix = b"" if dot <= name.rfind(b"/") + 1 else name[dot:].lower()
        if suffix == b".gz" and name.lower().endswith(b".nii.gz"):
            suffix = b".nii.gz"
        if is_compressed_tar(name):
            suffix = next(suffix for suffix in _TAR_SUFFIXES if name.lower().endswith(suffix))
        self.add_kind(os.fsdecode(suffix) or "without suffix")

    def add_kind(self, label: str, count: int = 1) -> None:
        if label not in self.counts and len(self.counts) >= _MAX_LABELS:
            label = _OTHERS
        self.counts[label] = self.counts.get(label, 0) + count


def describe_not_taken(counts: dict[str, int], shown: int = 6) -> str:
    """Write how many files were not taken, the most frequent suffixes first."""
    by_count = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count:,} {label}" + (f" ({_HINTS[label]})" if label in _HINTS else "") for label, count in by_count]
    if len(parts) > shown:
        parts[shown:] = [f"{sum(count for _, count in by_count[shown:]):,} others"]
    total = sum(counts.values())
    return f"{total:,} file{'s' * (total != 1)} not taken: {', '.join(parts)}"
