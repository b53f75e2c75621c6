"""One layer of a run as a file for another program: numpy, pandas, DuckDB, MATLAB."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np

from hookx.errors import NotStoredError, StoreError, UsageError, closest
from hookx.exporting.formats import (
    check_csv,
    check_table,
    keys_csv,
    keys_file,
    write_csv,
    write_h5,
    write_npy,
    write_npz,
    write_parquet,
    write_zarr,
)
from hookx.exporting.matlab import check_mat, write_mat
from hookx.exporting.rows import Rows
from hookx.layers.address import Address
from hookx.read.features import Features, open_features
from hookx.store.files import ASIDE

log = logging.getLogger("hookx")


@dataclass(frozen=True)
class _Format:
    write: Callable[[Path, Rows], None]
    check: Callable[[Rows], None] = lambda rows: None  # raises `UsageError` for rows that it cannot hold
    needs: tuple[str, str] = ("", "")  # a package that the basic install lacks, and the extra that brings it
    lacks: tuple[str, ...] = ("bfloat16",)  # types of which float32, which is written instead, has every value
    has_size_of_rows: bool = True
    has_keys_beside: bool = False


_FORMATS = {
    ".npy": _Format(write_npy, has_keys_beside=True),
    ".npz": _Format(write_npz),
    ".parquet": _Format(write_parquet, check_table, needs=("pyarrow", "parquet")),
    ".h5": _Format(write_h5, needs=("h5py", "hdf5")),
    ".mat": _Format(write_mat, check_mat, lacks=("bfloat16", "float16")),
    ".csv": _Format(write_csv, check_csv, has_size_of_rows=False),
    ".zarr": _Format(write_zarr, needs=("zarr", "zarr")),
}


@dataclass(frozen=True)
class Export:
    """What was written. `files` begins with the one that was asked for; of some formats there is one more."""

    layer: str
    shape: tuple[int, ...]  # (rows, *shape of one image)
    dtype: str  # as it was written
    failures: int  # images that could not be read, and so have no row
    files: tuple[str, ...]
    bytes: int  # of those


def export(
    features: str | os.PathLike[str] | Features,
    layer: str,
    to: str | os.PathLike[str],
    *,
    progress: Callable[[int], None] = lambda rows_written: None,
) -> Export:
    """Write one layer of a run to a file whose suffix says the format; what `hookx export` does.

    Some 16 MiB of activations (or one row, if that is larger; for .mat 256 MiB) are in memory at a time. The file is
    whole or absent, also after a kill. The values are the run's own, except that .csv knows one NaN only.

    Args:
        features: the directory that `hookx extract` wrote, or what `hookx.open` made of it.
        layer: an address that the run holds.
        to: a path that does not exist, ending in .npy, .npz, .parquet, .h5, .mat, .csv or .zarr.
        progress: called with the number of rows written since the last call.

    Raises:
        UsageError: a suffix that is none of those, a package that is not installed, or a layer that the format cannot
            hold, such as a map in .csv.
        NotStoredError: the run does not hold the layer.
        StoreError: the run is not finished, or is damaged; the target exists, or cannot be written.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from hookx.run.run import extract
        >>> with TemporaryDirectory() as folder:
        ...     _ = extract("resnet18", "avgpool", "images", weights="none", out=f"{folder}/features")
        ...     written = export(f"{folder}/features", "avgpool", f"{folder}/avgpool.npy")
        ...     np.load(f"{folder}/avgpool.npy", mmap_mode="r").shape
        ...     Path(f"{folder}/avgpool.keys.csv").read_text().splitlines()[:2]
        (8, 512, 1, 1)
        ['key', 'animals/chelsea.jpg']
    """
    to = Path(to)
    format = _format_of(to)
    if not to.parent.is_dir():
        raise StoreError(f"there is no folder '{to.parent}'", f"make it: mkdir -p {shlex.quote(str(to.parent))}")
    _check_is_absent(to)
    if not isinstance(features, Features):
        features = open_features(features)
    rows = _rows(features, layer, format, progress)
    format.check(rows)
    files = [to]
    if format.has_keys_beside:
        files.append(keys_file(to))
        _check_is_absent(keys_file(to), unless_it_holds=keys_csv(rows))
    with _whole_or_absent(to) as aside:
        free_bytes = shutil.disk_usage(aside.parent).free
        if format.has_size_of_rows and rows.nbytes > free_bytes:
            raise StoreError(
                f"the activations need {rows.nbytes:,} bytes and {to.parent} has {free_bytes:,} free",
                "choose another --to, or a layer that was reduced when it was extracted",
            )
        format.write(aside, rows)
    return Export(
        layer=rows.origin["layer"],
        shape=rows.shape,
        dtype=rows.dtype.name,
        failures=len(features.failures),
        files=tuple(map(str, files)),
        bytes=sum(path.stat().st_size for file in files for path in _tree(file) if path.is_file()),
    )


def _format_of(to: Path) -> _Format:
    suffix = to.suffix.lower()
    if suffix not in _FORMATS:
        ask = f"{to} has the suffix '{suffix}'" if suffix else f"{to} has no suffix"
        known = ", ".join(_FORMATS)
        raise UsageError(f"{ask}, which names no format; closest: {closest(suffix, _FORMATS, 1)}", f"known: {known}")
    format = _FORMATS[suffix]
    package, extra = format.needs
    try:
        if package:
            import_module(package)
    except ImportError as error:
        install = f"install it as an extra of hookx: pip install 'hookx-vision[{extra}]'"
        if error.name == package:
            raise UsageError(f"{suffix} files need {package}, which is not installed", install) from None
        raise UsageError(f"{package} cannot be imported: {' '.join(str(error).split())}", install) from None
    return format


def _rows(features: Features, layer: str, format: _Format, progress: Callable[[int], None]) -> Rows:
    plan = features.plan
    dtypes = {spec.address: spec.dtype for spec in plan.layers}
    address = layer if layer in dtypes else str(Address.parse(layer))
    if address not in dtypes:
        raise NotStoredError.of(f"{features.path}/", address, dtypes)
    dtype = dtypes[address]
    if dtype in format.lacks:
        log.info("%s is written as float32, which holds the same values: the format has no %s", dtype, dtype)
        dtype = "float32"
    origin = {"layer": address, "model": plan.model, "weights": plan.weights, "fingerprint": plan.fingerprint}
    return Rows(
        keys=features.keys_of_rows,
        activations=features[address],
        dtype=np.dtype(dtype),
        # Only a path can hold what is no text.
        origin={name: text.encode("utf-8", "backslashreplace").decode() for name, text in origin.items()},
        advance=progress,
    )


def _check_is_absent(file: Path, *, unless_it_holds: Iterable[bytes] | None = None) -> None:
    if not os.path.lexists(file):
        return
    if unless_it_holds is not None and file.is_file():
        with open(file, "rb") as opened:
            if all(opened.read(len(line)) == line for line in unless_it_holds) and not opened.read(1):
                return
    raise StoreError(f"{file} exists already", "remove it, or choose another --to")


@contextlib.contextmanager
def _whole_or_absent(to: Path) -> Iterator[Path]:
    """Yield a path in a folder beside `to`, which this process alone holds; what is made there is then moved out.

    All of it is flushed to the disk first, and `to` is moved last. The folder is gone afterwards, also on an error;
    what a killed process leaves of it, the next one for the same `to` throws away.
    """
    folder = to.with_name(f".{to.name}{ASIDE}")
    try:
        with _held_folder(folder, to):
            yield folder / to.name
            for path in _tree(folder):
                _flush(path)
            _check_is_absent(to)
            for made in sorted(folder.iterdir(), key=lambda made: made.name == to.name):
                made.rename(to.with_name(made.name))
            _flush(to.parent)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else " ".join(str(error).split())
        raise StoreError(f"cannot write {to}: {reason}", "mend that, and run the same command again") from None


@contextlib.contextmanager
def _held_folder(folder: Path, to: Path) -> Iterator[None]:
    """Make a folder and hold it, empty, while the `with` block lasts; the kernel lets go of it with the process."""
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_held = os.path.samestat(os.fstat(descriptor), os.stat(folder))  # and was not removed in between
        except BlockingIOError:
            is_held = False
        if not is_held:
            raise StoreError(f"another hookx process is writing {to}", "wait for it, or choose another --to")
        try:
            for left_over in folder.iterdir():
                shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
            yield
        finally:
            shutil.rmtree(folder)
    finally:
        os.close(descriptor)


def _tree(path: Path) -> Iterator[Path]:
    yield path
    yield from path.rglob("*")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
