"""One run takes the place of another, in one step where the system can: a reader finds the one or the other, whole."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
from pathlib import Path

from hookx.errors import StoreError
from hookx.store.asides import ASIDE, is_aside
from hookx.store.columns import COLUMNS
from hookx.store.directory import PLAN
from hookx.store.files import flush, reason_of
from hookx.store.index import FAILURES, INDEX, SHARDS

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_KNOWN = {PLAN, INDEX, FAILURES, SHARDS, COLUMNS}
_NOT_HERE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
_REPLACED = f".replaced{ASIDE}"  # marks a run that has been replaced, and can be removed


def take_place(new: Path, old: Path) -> None:
    """Give a finished run the name of another, which is removed; files in it that are foreign to it move over.

    After a kill in between, `recover` finishes it.
    """
    try:
        (old / _REPLACED).touch()
        if not _exchange(new, old):
            before = _before(old)
            os.rename(old, before)
            os.rename(new, old)
            flush(old.parent)
            _remove(before, old)
        else:
            flush(old.parent)
            _remove(new, old)
    except OSError as error:
        raise StoreError(
            f"cannot put {new} in the place of {old}: {reason_of(error)}", "both are whole; run the same command again"
        ) from None


def recover(old: Path, new: Path) -> None:
    """Finish what a killed process has begun of `take_place`."""
    before = _before(old)
    if not old.exists() and before.exists():
        os.rename(new if new.exists() else before, old)
    for left in (before, new):
        if (left / _REPLACED).exists() and old.exists():
            _remove(left, old)
    with contextlib.suppress(OSError):
        os.unlink(old / _REPLACED)  # It was marked, and then nothing came of it.


def _before(old: Path) -> Path:
    return old.with_name(f"{old.name}.replaced")


def _remove(run: Path, successor: Path) -> None:
    """Remove a run that was replaced; what is foreign to it moves to the successor, unless that has such a name."""
    for name in sorted(set(os.listdir(run)) - _KNOWN):
        is_shard = name.startswith("shard-") and name.endswith(".safetensors")
        if not is_shard and not is_aside(name) and not os.path.lexists(successor / name):
            os.rename(run / name, successor / name)
    shutil.rmtree(run)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; return whether the system can."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_HERE:
        return False
    raise OSError(number, os.strerror(number))
