"""Files and folders that are whole or absent: written aside, flushed to the disk, then published under their names.

Nothing here rests on a lock. Every writer has names of its own aside, and publishes by a hard link, which the system
makes for the first and refuses to all others.
"""

from __future__ import annotations

import contextlib
import errno
import filecmp
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from hookx.errors import THEN_RESUME, StoreError, UnreadableError
from hookx.store.asides import aside_of, asides_in, left_overs_in, new_mark
from hookx.store.location import Location
from hookx.store.objects.path import ObjectFile, ObjectPath
from hookx.store.reading import LocalFile, Readable

# How file systems say that they have no hard links. If it meant something else, renaming will say so too.
_NO_LINKS = {errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
_NO_LINKS |= {errno.EINVAL, errno.ENOTTY}
# How they say that a folder cannot be flushed, which is not asked of all: SMB and FUSE often refuse.
_NO_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.ENOSYS, errno.ENOTTY}
_NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EISDIR}
_MAX_INTERRUPTIONS = 100
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a link to nothing",
}


def write_whole(path: Location, chunks: Iterable[bytes | memoryview], *, replace: bool = True) -> bool:
    """Write a file so that it is whole or absent; return whether it has the name now.

    With `replace` it takes the place of any file of that name. Otherwise the first process that publishes wins.
    """
    with _aside(path) as (file, publish):
        file.writelines(chunks)
        return publish(replace)


@contextlib.contextmanager
def whole_file(path: Location) -> Iterator[BinaryIO]:
    """Yield a file that takes the place of any of this name when the block ends, unless it ends with an error."""
    with _aside(path) as (file, publish):
        yield file
        publish(True)


@contextlib.contextmanager
def _aside(path: Location) -> Iterator[tuple[BinaryIO, Callable[[bool], bool]]]:
    """Yield a file that is written aside, and what publishes it: `replace` -> whether it has the name now."""
    if isinstance(path, ObjectPath):
        with report_write_errors(path, resumable=True), tempfile.NamedTemporaryFile(prefix="hookx-") as temporary:

            def send(replace: bool) -> bool:
                temporary.flush()
                return path.put(Path(temporary.name), replace=replace)

            yield cast(BinaryIO, temporary), send
        return
    aside = aside_of(path, new_mark())
    _remove_left_overs_of(path)
    with report_write_errors(path, resumable=True), removed_at_the_end(aside):
        with open(aside, "xb") as file:  # x: never through a link that someone put there.

            def publish(replace: bool) -> bool:
                file.flush()
                return put_in_place(file.fileno(), aside, path, replace=replace)

            yield file, publish


@contextlib.contextmanager
def made_whole(path: Path) -> Iterator[Path]:
    """Yield where to make a file or a folder, by any library, so that it is whole or absent.

    The path lies in a folder aside, which this call alone uses. What else is made in that folder goes with it, and
    `path` itself comes last. What a killed process leaves there, the next process that makes `path` removes. Raises
    `StoreError` if `path` exists, another process of this host is making it, or it cannot be written.
    """
    check_absent(path)
    with report_write_errors(path):
        _remove_left_overs_of(path)
        # Say early who would be too late; where nobody can see it, the second to publish is refused.
        with contextlib.suppress(OSError):
            if any(aside.is_of(path) and aside.is_in_use for aside in asides_in(path.parent)):
                raise StoreError(f"another hookx process is writing {path}", "wait for it, or choose another name")
        folder = aside_of(path, new_mark())
        folder.mkdir()
        try:
            yield folder / path.name
            for made in (folder, *folder.rglob("*")):
                flush(made)
            _publish_all(sorted(folder.iterdir(), key=lambda made: made.name == path.name), path)
            flush(path.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_left_overs_of(path: Path) -> None:
    """Remove what killed processes have left where they made this file or folder."""
    with contextlib.suppress(OSError):  # A folder may be written to, and not listed.
        for left_over in left_overs_in(path.parent):
            if left_over.is_of(path):
                shutil.rmtree(left_over.path, ignore_errors=True)
                left_over.path.unlink(missing_ok=True)


def _publish_all(all_made: Sequence[Path], path: Path) -> None:
    """Give files their names beside `path`, which is the last of them; on an error, take back what was published."""
    check_absent(path)
    published: list[tuple[Path, Path]] = []
    try:
        for made in all_made:
            published.append((made, path.with_name(made.name)))
            _publish_made(*published[-1], is_beside=made.name != path.name)
    except BaseException:
        for made, name in published:
            with contextlib.suppress(OSError):
                if _is_same(made, name):
                    os.unlink(name)
        raise


def _publish_made(made: Path, path: Path, *, is_beside: bool) -> None:
    """Give a file or folder its name, or raise `StoreError` if another has it."""
    try:
        if made.is_dir():
            check_absent(path)
            os.rename(made, path)  # which never replaces a folder that holds anything
        else:
            _link(made, path, lambda: _is_same(made, path))
    except OSError:
        with contextlib.suppress(OSError):
            if is_beside and filecmp.cmp(made, path, shallow=False):
                return  # Left by a process that was killed before it published `path` itself.
        check_absent(path)
        raise


def check_absent(path: Path) -> None:
    """Raise `StoreError` if anything has this name, even a broken link."""
    with report_write_errors(path):
        if is_there(path):
            raise StoreError(f"{path} already exists", "remove it, or choose another name")


def is_there(path: Location) -> bool:
    """Whether anything has this name, even a broken link; `OSError` if the system does not tell."""
    if isinstance(path, ObjectPath):
        return path.exists()
    try:
        patiently(os.lstat, path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


@contextlib.contextmanager
def removed_at_the_end(aside: Path) -> Iterator[None]:
    """Remove what is aside when the block ends, whatever happens to the disk."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # What stays, a later run removes.
            os.unlink(aside)


def put_in_place(descriptor: int, aside: Path, path: Location, *, replace: bool) -> bool:
    """Flush an open file that was written aside to the disk, and give it its name; return whether it has it now.

    With `replace` it takes the place of any file of that name, which is there until then. Otherwise the first wins,
    and this file is dropped: two writers of one shard write the same bytes.
    """
    if isinstance(path, ObjectPath):  # It is safe there once the store has answered; what is here may go.
        check_same(descriptor, aside)
        is_ours = path.put(aside, replace=replace)
        with contextlib.suppress(OSError):
            os.unlink(aside)
        return is_ours
    os.fsync(descriptor)
    check_same(descriptor, aside)

    def is_published() -> bool:
        return _is_same(descriptor, path)

    is_ours = True
    if replace:
        _rename(aside, path, is_published)
    else:
        try:
            _link(aside, path, is_published)
        except FileExistsError:
            if path.is_symlink():  # hookx publishes none, so someone put it there.
                _rename(aside, path, is_published)
            else:
                check_is_file(path)
                is_ours = False
    with contextlib.suppress(OSError):
        os.unlink(aside)  # A later run does, if this cannot.
    flush(path.parent)  # A name is only durable once its directory is.
    return is_ours


def _link(aside: Path, path: Path, is_published: Callable[[], bool]) -> None:
    """Give a file its name unless there is one, as far as the file system can; `FileExistsError` if there is."""
    try:
        patiently(os.link, aside, path)
    except FileExistsError:
        if not is_published():
            raise
    except OSError as error:
        if is_published():  # whatever was answered
            return
        if error.errno not in _NO_LINKS:
            raise
        if is_there(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        _rename(aside, path, is_published)  # The last wins, and is as whole as the first.


def _rename(aside: Path, path: Path, is_published: Callable[[], bool]) -> None:
    try:
        patiently(os.replace, aside, path)
    except OSError:
        if not is_published():
            raise


def check_same(descriptor: int, aside: Path) -> None:
    """Raise `StoreError` if an open file no longer has the name under which it was made."""
    mine = os.fstat(descriptor)
    try:
        found = patiently(os.lstat, aside)
    except FileNotFoundError:
        raise vanished(aside) from None
    # Some network file systems give a file another number whenever they are asked.
    if not os.path.samestat(mine, found) and (mine.st_size, mine.st_mtime_ns) != (found.st_size, found.st_mtime_ns):
        raise vanished(aside, "was replaced by another file")


def vanished(file: Path, how: str = "was removed") -> StoreError:
    """Return the error for a file that something outside of hookx has changed while it was written."""
    return StoreError(
        f"{file} {how} while hookx was writing it",
        f"keep what did that away from {file.parent}/, such as a program that clears scratch space",
        THEN_RESUME,
    )


def _is_same(made: int | Path, path: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.stat(made), os.stat(path))
    return False


def flush(path: Path) -> None:
    """Flush a file or a directory to the disk; a directory as far as its file system can."""
    is_folder = stat.S_ISDIR(patiently(os.stat, path).st_mode)
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            with contextlib.suppress(OSError):  # It was only read.
                os.close(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in _NO_FLUSH | _NO_ACCESS:
            raise


def patiently(call: Callable[..., Any], *arguments: Any) -> Any:
    """Repeat a call of the system that a signal interrupts, as network file systems let it; Python does so for most."""
    for _ in range(_MAX_INTERRUPTIONS):
        with contextlib.suppress(InterruptedError):
            return call(*arguments)
    return call(*arguments)


@contextlib.contextmanager
def report_write_errors(path: Location, *, resumable: bool = False) -> Iterator[None]:
    """Turn an `OSError` into a `StoreError` that names the file, the reason and what to do."""
    try:
        yield
    except OSError as error:
        resumes = ": it resumes" if resumable else ""
        raise StoreError(
            f"cannot write {path}: {reason_of(error)}", f"fix that, then run the same command again{resumes}"
        ) from None


def reason_of(error: BaseException) -> str:
    """Return why the system refused something, in a line."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def open_file(path: Location, size_bytes: int | None = None) -> Iterator[Readable]:
    """Open a file of a run to read it; `UnreadableError` if it is none, `OSError` if the system refuses.

    Args:
        size_bytes: its size, if it is known: so an object store need not say it again.
    """
    if isinstance(path, ObjectPath):
        yield ObjectFile(path, size_bytes)
        return
    check_is_file(path)
    with open(path, "rb", buffering=0) as opened:
        yield LocalFile(opened.fileno())


def remove(path: Location) -> None:
    """Remove a file, if there is one."""
    if isinstance(path, ObjectPath):
        path.remove()
    else:
        path.unlink(missing_ok=True)


def check_is_file(path: Location) -> None:
    """Raise `UnreadableError` for a folder, a pipe or a device of this name, which hookx neither reads nor removes."""
    if isinstance(path, ObjectPath):
        return
    try:
        mode = patiently(os.stat, path).st_mode
    except FileNotFoundError:
        if not is_there(path):
            return
        kind = "a link to nothing"
    else:
        if stat.S_ISREG(mode):
            return
        kind = _KINDS.get(stat.S_IFMT(mode), "a device")
    raise UnreadableError(path, f"it is {kind}", "move it away: hookx has a file of that name")


def sizes_in(path: Location) -> dict[str, int]:
    """Return the size in bytes of every file in a folder, by name; `UnreadableError` if it cannot be listed."""
    with report_read_errors(path):
        if isinstance(path, ObjectPath):
            return {name: listed.size_bytes for name, listed in path.names().items()}
        sizes_bytes = {}
        with os.scandir(path) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # It was removed just now.
                    sizes_bytes[entry.name] = entry.stat().st_size
        return sizes_bytes


@contextlib.contextmanager
def report_read_errors(path: Location) -> Iterator[None]:
    """Turn what keeps a file from being read into an `UnreadableError`: it says nothing about what the file holds."""
    try:
        yield
    except (OSError, MemoryError) as error:
        raise UnreadableError(path, reason_of(error)) from None
