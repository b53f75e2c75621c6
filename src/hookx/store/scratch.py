"""A folder of this machine in which shards are built that then go to an object store."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hookx.errors import StoreError
from hookx.store.asides import aside_of, asides_in, new_mark
from hookx.store.files import reason_of

_NAME = "hookx-scratch"


def scratch_parent(asked: str | os.PathLike[str] | None) -> Path:
    """Return where scratch folders lie: as asked, or where this system has its temporary files."""
    return Path(asked) if asked else Path(tempfile.gettempdir())


@contextlib.contextmanager
def scratch_folder(asked: str | os.PathLike[str] | None) -> Iterator[Path]:
    """Make a folder for as long as the block lasts, and remove those that killed processes of this host have left.

    Raises:
        StoreError: none can be made there.
    """
    parent = scratch_parent(asked)
    folder = aside_of(parent / _NAME, new_mark())
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_left_overs(parent)
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise StoreError(
            f"cannot build shards in {parent}: {reason_of(error)}", "choose a folder of this machine: --scratch DIR"
        ) from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_left_overs(parent: Path) -> None:
    for aside in asides_in(parent):
        if aside.is_of(parent / _NAME) and aside.is_of_this_host and not aside.is_in_use:
            shutil.rmtree(aside.path, ignore_errors=True)
