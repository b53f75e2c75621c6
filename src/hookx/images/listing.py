"""List the images in folders, files and lists of paths, each with its key and the size of its file."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import mmap
import multiprocessing
import operator
import os
import stat
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.process import BaseProcess
from typing import TypeVar

from hookx.errors import ImageError
from hookx.images.retries import Retries, is_of_the_file, reason_of
from hookx.keys import Keys, LazySequence, images_sha256
from hookx.options import RETRY_SECONDS
from hookx.signals import begin_child, defer_signals

# Folders are searched for these; a file that is named explicitly may have any suffix.
SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .gif .webp .bmp .dib .tif .tiff .ppm .pgm .pbm .pnm .pfm .tga .ico .icns "
    ".jp2 .j2k .jpx .avif .avifs .qoi .dds .sgi .rgb .pcx .psd .xbm .xpm".split()
)
_SUFFIXES = frozenset(map(os.fsencode, SUFFIXES))
_BLOCK_BYTES = 2**20  # read at once from standard input
_MARK_BYTES = 5
_PACKED_AT_ONCE = 100_000  # keys
_MAX_FILES_ALONE = 20_000  # measured by this process alone; several processes share a longer list
# Processes, because threads would wait for each other's lock between calls this short; 8 of them even on fewer cores,
# because a remote disk answers several requests at a time.
_MEASURING_PROCESSES = 8
_UNMEASURABLE = -1  # in place of a size: the file's own fault
_UNAVAILABLE = -2  # and below: this minus the number of the system's error
_NO_NAME = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL)
_OF_A_LINK = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_THEN_AGAIN = "mend that, then run the same command again"
_ROOTS_OF_STANDARD_INPUT = (b"", b"/")
_Found = TypeVar("_Found")


class Files(LazySequence[str]):
    """The file of each key: the root that it was found in, and the key."""

    def __init__(self, keys: Keys, roots: Sequence[bytes], root_of: array[int] | memoryview[int]) -> None:
        self.keys, self.roots, self.root_of = keys, roots, root_of

    def __len__(self) -> int:
        return len(self.keys)

    def item(self, position: int) -> str:
        return os.fsdecode(self.encoded(position))

    def encoded(self, position: int) -> bytes:
        return self.roots[self.root_of[position]] + self.keys.encoded(position)

    def was_found(self, position: int) -> bool:
        """Return whether the file was found in a folder; what standard input names may never have existed."""
        return self.roots[self.root_of[position]] not in _ROOTS_OF_STANDARD_INPUT


@dataclass(frozen=True, eq=False, repr=False)
class ImageList:
    """The images of a run, sorted by the bytes of their keys: the paths relative to their roots, with '/'.

    A key costs its own bytes and 20 more: its end, its root's number and the file's size. No Python object belongs to a
    single key, so a forked process reads them without copying memory pages.
    """

    keys: Keys
    files: Files
    sizes_bytes: array[int] | memoryview[int]  # -1 where a file has none, by its own fault

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def sha256(self) -> str:
        """The digest of every key and every size, in order."""
        return images_sha256(self.keys, self.sizes_bytes)


def list_images(
    sources: Iterable[str | os.PathLike[str]],
    *,
    retry_seconds: float = RETRY_SECONDS,
    unavailable_is_failure: bool = False,
    packed_at_once: int = _PACKED_AT_ONCE,
) -> ImageList:
    """List the images of folders (searched recursively, links followed), files, and '-' or '-0' (standard input).

    The key of an image is its path relative to the folder that was searched, the bare name of a file that was named, or
    for standard input the path relative to the working directory. No file is opened; those that are not images fail
    when they are decoded.

    Args:
        retry_seconds: how long to try again what the system cannot do now; then it is an error.
        unavailable_is_failure: count a file that the system cannot look at as a failure later, in place of an error.
        packed_at_once: a number of keys that bounds the memory that packing takes.

    Raises:
        ImageError: a source does not exist or cannot be listed, no image is found, or two images have the same key.

    Example:
        >>> images = list_images(["images"])
        >>> len(images), images.keys[0]
        (8, 'animals/chelsea.jpg')
    """
    names = [os.fspath(source) for source in sources]
    # With ten million images memory counts, and nothing that Python can sort takes less than a flat list of bytes. So
    # each key is followed by a mark for its root, which leaves the order as it is: it begins with NUL, and no file name
    # holds one.
    marks: dict[bytes, bytes] = {}
    marked_keys: list[bytes] = []
    for root, keys in (found for name in names for found in _list_source(name, retry_seconds)):
        mark = marks.setdefault(root, len(marks).to_bytes(_MARK_BYTES, "big"))
        marked_keys += [key + mark for key in keys]
    if not marked_keys:
        raise ImageError(f"no image found in {', '.join(names) or 'an empty list'}")
    marked_keys.sort(reverse=True)
    files = _pack(marked_keys, list(marks), packed_at_once)
    sizes_bytes = measure(files, retry_seconds=retry_seconds)
    if not unavailable_is_failure:
        _check_available(files, sizes_bytes)
    return ImageList(files.keys, files, array("q", [max(size, _UNMEASURABLE) for size in sizes_bytes]))


def _check_available(files: Files, sizes_bytes: Sequence[int]) -> None:
    unavailable = [position for position, size in enumerate(sizes_bytes) if size <= _UNAVAILABLE]
    if unavailable:
        reason = os.strerror(_UNAVAILABLE - sizes_bytes[unavailable[0]])
        others = f", and {len(unavailable) - 1:,} other files" if len(unavailable) > 1 else ""
        raise ImageError(f"cannot look at '{files[unavailable[0]]}'{others}: {reason}", _THEN_AGAIN)


def _patiently(what: str, path: str | bytes, look: Callable[[], _Found], retry_seconds: float) -> _Found:
    """Return what `look` finds, and try again for a while what the system cannot do now; `ImageError` after that."""
    retries = Retries(retry_seconds)
    while True:
        try:
            return look()
        except OSError as error:
            if isinstance(error, PermissionError) or not retries.wait():
                name = os.fsdecode(path).removesuffix("/") or "/"
                raise ImageError(f"cannot {what} '{name}': {reason_of(error)}", _THEN_AGAIN) from None


def _pack(marked_keys: list[bytes], roots: list[bytes], at_once: int) -> Files:
    """Pack keys, each followed by its root's mark, from the end of the list, which is emptied on the way."""
    block, ends, root_of = bytearray(), array("q"), array("i")
    last: list[bytes] = []
    while marked_keys:
        marked = [*last, *marked_keys[: -at_once - 1 : -1]]
        del marked_keys[-at_once:]  # Frees their memory once they are packed.
        keys = [key[:-_MARK_BYTES] for key in marked]
        numbers = [int.from_bytes(key[-_MARK_BYTES:], "big") for key in marked]
        for twice in itertools.compress(range(len(keys)), map(operator.eq, keys, keys[1:])):
            one, other = (os.fsdecode(roots[number] + keys[twice]) for number in numbers[twice : twice + 2])
            raise ImageError(
                f"two images have the key '{os.fsdecode(keys[twice])}': {one} and {other}",
                "name the folder that holds both, or run twice",
            )
        new = slice(len(last), None)
        ends.extend(itertools.islice(itertools.accumulate(map(len, keys[new]), initial=len(block)), 1, None))
        root_of.extend(numbers[new])
        block += b"".join(keys[new])
        last = marked[-1:]
    return Files(Keys(bytes(block), ends), roots, root_of)


def _list_source(source: str, retry_seconds: float) -> Iterator[tuple[bytes, list[bytes]]]:
    """Yield a root and some keys at a time; an image's file is its root followed by its key."""
    if source in ("-", "-0"):
        yield from _list_standard_input(b"\0" if source == "-0" else b"\n")
    elif _patiently("look at", source, lambda: _is_folder(source), retry_seconds):
        root = os.fsencode(os.path.join(source, ""))
        yield from ((root, keys) for keys in _list_folder(root, b"", (), retry_seconds))
    else:
        file = os.fsencode(source)
        key = os.path.basename(file)
        yield file.removesuffix(key), [key]


def _is_folder(path: str | bytes) -> bool:
    """Return whether a name is that of a folder; `ImageError` if it does not exist, `OSError` if the system fails."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except OSError as error:
        if os.path.islink(path) and error.errno in _OF_A_LINK:
            return False  # A link to nothing, or to itself.
        if error.errno in _NO_NAME:
            raise ImageError(f"no such file or folder: '{os.fsdecode(path)}'") from None
        raise


def _list_folder(
    folder: bytes, prefix: bytes, above: tuple[tuple[int, int], ...], retry_seconds: float
) -> Iterator[list[bytes]]:
    status = _patiently("list the folder", folder, lambda: os.stat(folder), retry_seconds)
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return  # A link to an enclosing folder, whose images are listed anyway.
    keys = []
    for entry in _patiently("list the folder", folder, lambda: list(os.scandir(folder)), retry_seconds):
        try:
            is_folder = entry.is_dir()
        except OSError:
            is_folder = _patiently("look at", entry.path, functools.partial(_is_folder, entry.path), retry_seconds)
        if is_folder:
            yield from _list_folder(entry.path, prefix + entry.name + b"/", (*above, identity), retry_seconds)
        elif os.path.splitext(entry.name)[1].lower() in _SUFFIXES:
            keys.append(prefix + entry.name)
    yield keys


def _list_standard_input(end: bytes) -> Iterator[tuple[bytes, list[bytes]]]:
    try:
        here = os.path.join(os.getcwdb(), b"")
    except OSError as error:
        raise ImageError(
            f"cannot tell the working directory: {reason_of(error)}", "change to one that exists"
        ) from None
    for block in _read_blocks(end):
        block = end + block + end
        if end == b"\n":
            block = block.replace(b"\r\n", b"\n")
            if b"\0" in block:
                raise ImageError("the list on standard input contains a NUL", "if NULs end the paths, write -0")
        # Normalising every path would take longer than listing it, and few lists need it; but `find .` writes './'
        # before each path.
        is_plain = not any(text in block for text in (b"//", b"/.", b"/" + end, end + end))
        if is_plain:
            block = block.replace(end + b"./", end)
        paths = block[1:-1].split(end)
        if not is_plain or end + b"." in block:
            paths = [_normalise(path) for path in paths if path]
        yield b"", [path.removeprefix(here) for path in paths if path.startswith(here) or not path.startswith(b"/")]
        yield b"/", [path.lstrip(b"/") for path in paths if path.startswith(b"/") and not path.startswith(here)]


def _read_blocks(end: bytes) -> Iterator[bytes]:
    """Read standard input in blocks that are cut at the end of a path, without that end."""
    if sys.stdin is None:
        raise ImageError("cannot read the list: standard input is closed", "pipe the paths in: find images/ | ...")
    rest = b""
    try:
        while more := sys.stdin.buffer.read(_BLOCK_BYTES):
            block, _, rest = (rest + more).rpartition(end)
            yield block
    except OSError as error:
        raise ImageError(f"cannot read the list on standard input: {reason_of(error)}") from None
    yield rest


def _normalise(path: bytes) -> bytes:
    if b".." in path.split(b"/"):  # After a link, '..' is not the folder before it.
        path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    return os.path.abspath(path)


def measure(
    files: Files, *, retry_seconds: float = RETRY_SECONDS, max_files_alone: int = _MAX_FILES_ALONE
) -> array[int]:
    """Return the size of every file in bytes; several processes share a long list, where most of the time goes.

    -1 stands for a file that has none, by its own fault; a number below that for one that the system cannot look at.
    """
    shared = memoryview(mmap.mmap(-1, len(files) * 8)).cast("q")
    # A daemonic process, such as a pool's worker, must not have children.
    if len(files) > max_files_alone and sys.platform == "linux" and not multiprocessing.current_process().daemon:
        _measure_in_processes(files, shared, retry_seconds)
    else:
        _measure_part(files, range(len(files)), shared, retry_seconds)
    return array("q", bytes(shared))


def _measure_in_processes(files: Files, sizes_bytes: memoryview[int], retry_seconds: float) -> None:
    share, fork = -(-len(files) // _MEASURING_PROCESSES), multiprocessing.get_context("fork")
    parts = [range(len(files))[first : first + share] for first in range(0, len(files), share)]
    started: list[BaseProcess] = []
    try:
        with defer_signals(), contextlib.suppress(OSError):  # The system may refuse more processes.
            for part in parts:
                child = fork.Process(
                    target=_measure_in_child, args=(files, part, sizes_bytes, retry_seconds, os.getpid())
                )
                child.start()
                started.append(child)
        for process in started:
            process.join()
        for process, part in itertools.zip_longest(started, parts):
            if process is None or process.exitcode != 0:  # It was refused, or killed.
                _measure_part(files, part, sizes_bytes, retry_seconds)
    finally:
        for process in started:
            process.kill()
            process.join()


def _measure_in_child(
    files: Files, part: range, sizes_bytes: memoryview[int], retry_seconds: float, parent: int
) -> None:
    begin_child(parent)
    _measure_part(files, part, sizes_bytes, retry_seconds)


def _measure_part(files: Files, part: range, sizes_bytes: memoryview[int], retry_seconds: float) -> None:
    retries = Retries(retry_seconds)  # One outage hits many files, and only the first waits for all of the time.
    for position in part:
        file = files.encoded(position)
        while True:
            try:
                sizes_bytes[position] = os.stat(file).st_size
                retries = Retries(retry_seconds)
            except OSError as error:
                if is_of_the_file(error, file, was_seen=files.was_found(position)):
                    sizes_bytes[position] = _UNMEASURABLE  # Reading it will fail, with the reason.
                elif (
                    not isinstance(error, PermissionError) and retries.wait()
                ):  # One outage hits many files: only its first waits for all of the time.
                    continue
                else:
                    sizes_bytes[position] = _UNAVAILABLE - (error.errno or errno.EIO)
            break
