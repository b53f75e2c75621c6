"""A run that grows: images and layers are added to it in place.

The longer run is computed beside the shorter one, whose rows it copies, and takes its place when it is whole. Until
then readers find the shorter one; the same command goes on after a kill at any moment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from hookx.errors import OtherRunError, UsageError
from hookx.images.listing import ImageList
from hookx.options import ExtractOptions
from hookx.plan import Plan
from hookx.run.growth import Growth
from hookx.run.listed import list_images_of
from hookx.run.reuse import check_alike
from hookx.run.summary import Summary
from hookx.store.columns import open_columns
from hookx.store.directory import RunDirectory, begun_plan
from hookx.store.location import location_of
from hookx.store.swap import recover, take_place

if TYPE_CHECKING:
    from hookx.launch.extract import Begun

Begin = Callable[[ExtractOptions, ImageList], AbstractContextManager["Begun"]]


class Appending:
    """A longer run beside the one whose place it is to take."""

    def __init__(self, longer: Begun, out: Path, beside: Path) -> None:
        self._longer, self._out, self._beside = longer, out, beside
        self.plan = longer.plan

    @property
    def image_count(self) -> int:
        return self._longer.image_count

    @property
    def images_done(self) -> int:
        return self._longer.images_done

    def run(self, progress: Callable[[int], None]) -> Summary:
        summary = self._longer.run(progress)
        take_place(self._beside, self._out)
        return dataclasses.replace(summary, out=str(self._out))


@contextlib.contextmanager
def appending(options: ExtractOptions, begin: Begin) -> Iterator[Begun]:
    """Begin to add to the run in `options.out`; it is a plain run if there is none, or nothing to add to it."""
    out = place_of(options)
    plain, beside = dataclasses.replace(options, append=False), _beside(out)
    recover(out, beside)
    images = list_images_of(plain)
    with contextlib.ExitStack() as stack:
        try:
            begun = stack.enter_context(begin(plain, images))
        except OtherRunError:
            pass
        else:
            yield begun
            return
    there = begun_plan(out)
    assert there is not None
    with RunDirectory(out, there), contextlib.ExitStack() as stack:  # Locked: nobody else adds to it now.
        is_new = not beside.exists()
        try:
            begun = stack.enter_context(begin(beside_run(options), images))
        except OtherRunError:
            raise OtherRunError(
                f"{beside}/ holds what was begun of adding something else",
                f"run that command again, or remove it: rm -r {beside}",
            ) from None
        try:
            _check_nothing_lost(out, there, begun.plan, images, options)
        except BaseException:
            if is_new:
                shutil.rmtree(beside, ignore_errors=True)
            raise
        yield Appending(begun, out, beside)


def beside_run(options: ExtractOptions) -> ExtractOptions:
    """Return the options of the longer run that takes the place of the one in `options.out`."""
    out = place_of(options)
    return dataclasses.replace(options, append=False, out=str(_beside(out)), reuse=(str(out), *options.reuse))


def _beside(out: Path) -> Path:
    return out.with_name(f"{out.name}.append")


def place_of(options: ExtractOptions) -> Path:
    """Return where the run is that is to grow; `UsageError` if these options cannot let it."""
    out = location_of(options.out)
    if not isinstance(out, Path):
        raise UsageError(
            "--append works in a folder: an object store cannot replace a run in one step",
            f"copy its rows into another run: --reuse {out}/ with another --out",
        )
    if options.shard is not None or options.launcher is not None:
        raise UsageError(
            "--append is for one command that computes the whole run",
            f"leave out --shard and --launcher, or copy its rows into another run: --reuse {out}/ with another --out",
        )
    return out


def _check_nothing_lost(out: Path, there: Plan, plan: Plan, images: ImageList, options: ExtractOptions) -> None:
    """Raise `UsageError` if the longer run would lack what the shorter one has."""
    check_alike(out, there, plan)
    asked = {layer.address for layer in plan.layers}
    if lost := [layer.address for layer in there.layers if layer.address not in asked]:
        raise UsageError(
            f"--append would lose layers of {out}/: {', '.join(lost)}",
            f"name them as well: --layers {','.join([*(layer.address for layer in there.layers), '...'])}",
        )
    columns, named = open_columns(out, there), {column.name for column in images.columns}
    if columns is not None and options.columns is None and (missing := [*columns.kinds.keys() - named]):
        raise UsageError(
            f"--append would lose columns of {out}/: {', '.join(sorted(missing))}",
            "name the table that they came from, or say which to keep: --columns NAMES",
        )
    growth = Growth.between(out, there, images)
    if growth.gone.count or growth.changed.count:
        growth.new.count = 0
        raise UsageError(
            f"--append only adds images, and of those in {out}/ {' and '.join(growth.sentences())}",
            "name all of them, as they were, or make another run with --reuse",
        )
