"""Folders, files and lists of paths -> a list of images, each with its key."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import multiprocessing
import operator
import os
import signal
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from hookx.errors import ImageError
from hookx.keys import Keys, LazySequence
from hookx.signals import held_back

# What a folder is searched for. A file that is named outright may be called anything.
SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .gif .webp .bmp .dib .tif .tiff .ppm .pgm .pbm .pnm .pfm .tga .ico .icns "
    ".jp2 .j2k .jpx .avif .avifs .qoi .dds .sgi .rgb .pcx .psd .xbm .xpm".split()
)
_SUFFIXES = frozenset(map(os.fsencode, SUFFIXES))
_BLOCK_BYTES = 2**20  # of standard input, read at once
_MARK_BYTES = 5
_KEYS_AT_ONCE = 100_000  # that are packed
_MEASURED_ALONE = 20_000  # files at most; more are measured by several processes
_MEASURING_PROCESSES = 8  # also on fewer cores: a disk that is far away answers several at a time


class Files(LazySequence[str]):
    """The file of every key: a root, and the key."""

    def __init__(self, keys: Keys, roots: Sequence[bytes], root_of: array[int]) -> None:
        self.keys, self._roots, self._root_of = keys, roots, root_of

    def __len__(self) -> int:
        return len(self.keys)

    def item(self, position: int) -> str:
        return os.fsdecode(self.encoded(position))

    def encoded(self, position: int) -> bytes:
        """Return the bytes of a file's name."""
        return self._roots[self._root_of[position]] + self.keys.encoded(position)


@dataclass(frozen=True, eq=False, repr=False)
class ImageList:
    """Every image of a run, in the order of the bytes of its key: its path relative to its root, with '/'.

    A key costs its own bytes and 20 more: its end, its root's number and the file's size. No object belongs to a single
    key, so a forked process can read all of them without copying a page.
    """

    keys: Keys
    files: Files
    sizes_bytes: array[int]  # -1 where there was no file to measure

    def __len__(self) -> int:
        return len(self.keys)


def list_images(sources: Iterable[str | os.PathLike[str]]) -> ImageList:
    """List the images of folders (searched recursively, links followed), files, and '-' or '-0' (standard input).

    A key is relative to the folder it was found in, the bare name of a file named outright, and for standard input the
    path relative to the working directory. Nothing is opened: what is no image shows when it is decoded.

    Raises:
        ImageError: a source does not exist, there is no image at all, or two images have one key.

    Example:
        >>> images = list_images(["images"])
        >>> len(images), images.keys[0]
        (8, 'animals/chelsea.jpg')
    """
    names = [os.fspath(source) for source in sources]
    # There may be ten million. A flat list of bytes is the least that Python can sort, so behind each key stands a mark
    # of its root; it begins with NUL, which no name holds, and so leaves the order as it is.
    marks: dict[bytes, bytes] = {}
    marked_keys: list[bytes] = []
    for root, keys in (found for name in names for found in _in_source(name)):
        mark = marks.setdefault(root, len(marks).to_bytes(_MARK_BYTES, "big"))
        marked_keys += [key + mark for key in keys]
    if not marked_keys:
        raise ImageError(f"there is no image in {', '.join(names) or 'the empty list'}")
    marked_keys.sort(reverse=True)
    files = _packed(marked_keys, list(marks))
    return ImageList(files.keys, files, _sizes_bytes(files))


def _packed(marked_keys: list[bytes], roots: list[bytes]) -> Files:
    """Pack keys, each with the mark of its root behind it, from the last to the first; the list is empty then."""
    block, ends, root_of = bytearray(), array("q"), array("i")
    last: list[bytes] = []
    while marked_keys:
        marked = [*last, *marked_keys[: -_KEYS_AT_ONCE - 1 : -1]]
        del marked_keys[-_KEYS_AT_ONCE:]  # Their memory is free again as soon as they are packed.
        keys = [key[:-_MARK_BYTES] for key in marked]
        numbers = [int.from_bytes(key[-_MARK_BYTES:], "big") for key in marked]
        for twice in itertools.compress(range(len(keys)), map(operator.eq, keys, keys[1:])):
            one, other = (os.fsdecode(roots[number] + keys[twice]) for number in numbers[twice : twice + 2])
            raise ImageError(
                f"two images have the key '{os.fsdecode(keys[twice])}': {one} and {other}",
                "give the folder that holds both, or run twice",
            )
        new = slice(len(last), None)
        ends.extend(itertools.islice(itertools.accumulate(map(len, keys[new]), initial=len(block)), 1, None))
        root_of.extend(numbers[new])
        block += b"".join(keys[new])
        last = marked[-1:]
    return Files(Keys(bytes(block), ends), roots, root_of)


def _in_source(source: str) -> Iterator[tuple[bytes, list[bytes]]]:
    """Yield the images of a source, some at a time: their root and their keys; the file is the one and the other."""
    if source in ("-", "-0"):
        yield from _on_standard_input(b"\0" if source == "-0" else b"\n")
    elif os.path.isdir(source):
        root = os.fsencode(os.path.join(source, ""))
        for keys in _in_folder(root, b"", ()):
            yield root, keys
    elif os.path.lexists(source):
        file = os.fsencode(source)
        key = os.path.basename(file)
        yield file.removesuffix(key), [key]
    else:
        raise ImageError(f"there is no file or folder '{source}'")


def _in_folder(folder: bytes, prefix: bytes, above: tuple[tuple[int, int], ...]) -> Iterator[list[bytes]]:
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return  # A link to a folder that we are inside of: everything in it has been listed.
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        name = os.fsdecode(folder).removesuffix("/")
        raise ImageError(f"cannot list the folder '{name}': {error.strerror}") from None
    keys = []
    for entry in entries:
        if _is_folder(entry):
            yield from _in_folder(entry.path, prefix + entry.name + b"/", (*above, identity))
        elif os.path.splitext(entry.name)[1].lower() in _SUFFIXES:
            keys.append(prefix + entry.name)
    yield keys


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # A link to itself.


def _on_standard_input(end: bytes) -> Iterator[tuple[bytes, list[bytes]]]:
    here = os.path.join(os.getcwdb(), b"")
    for block in _blocks(sys.stdin.buffer, end):
        block = end + block + end
        if end == b"\n":
            block = block.replace(b"\r\n", b"\n")
            if b"\0" in block:
                raise ImageError("there is a NUL in the list on standard input", "if paths end with it: -0")
        # Looking at every path takes longer than listing it, and few lists hold one that could be written shorter; but
        # `find .` writes './' before each.
        is_plain = not any(text in block for text in (b"//", b"/.", b"/" + end, end + end))
        if is_plain:
            block = block.replace(end + b"./", end)
        paths = block[1:-1].split(end)
        if not is_plain or end + b"." in block:
            paths = [_shortest(path) for path in paths if path]
        yield b"", [path.removeprefix(here) for path in paths if path.startswith(here) or not path.startswith(b"/")]
        yield b"/", [path.lstrip(b"/") for path in paths if path.startswith(b"/") and not path.startswith(here)]


def _blocks(stream: BinaryIO, end: bytes) -> Iterator[bytes]:
    """Read a stream in blocks that are cut where a path ends, without that end."""
    rest = b""
    while more := stream.read(_BLOCK_BYTES):
        block, found, tail = more.rpartition(end)
        if found:
            yield rest + block
            rest = tail
        else:
            rest += tail
    yield rest


def _shortest(path: bytes) -> bytes:
    if b".." in path.split(b"/"):  # Behind a link, '..' is not what its name suggests.
        path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    return os.path.abspath(path)


def _sizes_bytes(files: Files) -> array[int]:
    """Measure every file; processes share a long list, of which most of the time goes there."""
    shared = memoryview(mmap.mmap(-1, len(files) * 8)).cast("q")
    # A daemonic process, such as one of a pool, must not have any of its own.
    if len(files) > _MEASURED_ALONE and sys.platform == "linux" and not multiprocessing.current_process().daemon:
        _measure_side_by_side(files, shared)
    else:
        _measure(files, range(len(files)), shared)
    sizes_bytes = array("q")
    sizes_bytes.frombytes(shared.cast("B"))
    return sizes_bytes


def _measure_side_by_side(files: Files, sizes_bytes: memoryview[int]) -> None:
    share, fork = -(-len(files) // _MEASURING_PROCESSES), multiprocessing.get_context("fork")
    parts = [range(len(files))[first : first + share] for first in range(0, len(files), share)]
    processes = [fork.Process(target=_measure_beside, args=(files, part, sizes_bytes)) for part in parts]
    try:
        with held_back(), contextlib.suppress(OSError):  # There may be no room for so many processes.
            for process in processes:
                process.start()
        for process, part in zip(processes, parts, strict=True):
            if process.pid is not None:
                process.join()
            if process.exitcode != 0:  # It could not be started, or was killed.
                _measure(files, part, sizes_bytes)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def _measure_beside(files: Files, part: range, sizes_bytes: memoryview[int]) -> None:
    # The terminal sends Ctrl-C to every process; the parent ends its own.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _measure(files, part, sizes_bytes)


def _measure(files: Files, part: range, sizes_bytes: memoryview[int]) -> None:
    for position in part:
        try:
            sizes_bytes[position] = os.stat(files.encoded(position)).st_size
        except OSError:
            sizes_bytes[position] = -1  # It will fail when it is read, with the reason.
