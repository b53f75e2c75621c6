"""One layer of a run as a file for another program: numpy, pandas, DuckDB, MATLAB."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hookx.errors import StoreError
from hookx.exporting.formats import Format, find_format, keys_csv, keys_file
from hookx.exporting.rows import Rows
from hookx.layers.address import Address
from hookx.read.activations import NOT_IN_NUMPY
from hookx.read.features import Features, open_features
from hookx.store.files import check_absent, made_whole, report_read_errors

log = logging.getLogger("hookx")


@dataclass(frozen=True)
class Export:
    """What was written. `files` begins with the requested file; some formats write a second one."""

    layer: str
    shape: tuple[int, ...]  # (rows, *shape of one image)
    dtype: str  # as written
    failures: int  # images that could not be read, and so have no row
    files: tuple[str, ...]
    bytes: int  # size of these files


def export(
    features: str | os.PathLike[str] | Features,
    layer: str,
    to: str | os.PathLike[str],
    *,
    progress: Callable[[int], None] = lambda rows_written: None,
) -> Export:
    """Write one layer of a run to a file whose suffix names the format, as `hookx export` does.

    Memory holds about 16 MiB of activations (or one row, if larger) at a time; only .mat, which ends at 2 GiB, needs
    all of them. The file is whole or absent, even after a kill. The values are those of the run, except that .csv has
    only one NaN.

    Args:
        features: the directory that `hookx extract` wrote, or the result of `hookx.open`.
        to: a path that does not exist, ending in .npy, .npz, .parquet, .h5, .mat, .csv or .zarr.
        progress: called with the number of rows written since the last call.

    Raises:
        UsageError: the suffix is unknown, its package is not installed, or the format cannot hold the layer, as .csv
            cannot hold a map.
        NotStoredError: the run does not hold the layer.
        StoreError: the run is unfinished or damaged; the target exists or cannot be written.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from hookx.launch.extract import extract
        >>> with TemporaryDirectory() as folder:
        ...     _ = extract("resnet18", "avgpool", "images", weights="none", out=f"{folder}/features")
        ...     written = export(f"{folder}/features", "avgpool", f"{folder}/avgpool.npy")
        ...     np.load(f"{folder}/avgpool.npy", mmap_mode="r").shape
        ...     Path(f"{folder}/avgpool.keys.csv").read_text().splitlines()[:2]
        (8, 512, 1, 1)
        ['key', 'animals/chelsea.jpg']
    """
    to = Path(to)
    format = find_format(to)
    if not os.path.isdir(to.parent):
        raise StoreError(f"there is no folder '{to.parent}'", f"make it: mkdir -p {shlex.quote(str(to.parent))}")
    check_absent(to)
    if not isinstance(features, Features):
        features = open_features(features)
    rows = select_rows(features, layer, format, progress)
    format.check(rows)
    files = [to]
    if format.has_keys_beside:
        files.append(keys_file(to))
        if not _holds(keys_file(to), keys_csv(rows)):  # A killed export can have left the same keys.
            check_absent(keys_file(to))
    with made_whole(to) as aside:
        try:
            free_bytes = shutil.disk_usage(to.parent).free
        except OSError:  # Not every file system tells.
            free_bytes = sys.maxsize
        if format.is_binary and rows.nbytes > free_bytes:
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
        bytes=sum(path.stat().st_size for file in files for path in (file, *file.rglob("*")) if path.is_file()),
    )


def select_rows(
    features: Features, layer: str, format: Format, progress: Callable[[int], None] = lambda rows_written: None
) -> Rows:
    """Return the rows of one layer in the type that a format writes; `LayerError` if the run does not hold it."""
    address = layer if layer in features else str(Address.parse(layer))
    activations, plan = features[address], features.plan
    dtype = activations.layer.dtype
    if dtype in (*NOT_IN_NUMPY, *format.missing_dtypes):
        log.info("%s is written as float32, which holds the same values: the format has no %s", dtype, dtype)
        dtype = "float32"
    origin = {"layer": address, "model": plan.model, "weights": plan.weights, "fingerprint": plan.fingerprint}
    # Paths need not be UTF-8, and formats hold text.
    origin = {name: text.encode("utf-8", "backslashreplace").decode() for name, text in origin.items()}
    return Rows(features.keys, activations, np.dtype(dtype), origin, features.columns, progress)


def _holds(file: Path, lines: Iterable[bytes]) -> bool:
    if not os.path.isfile(file):
        return False
    with report_read_errors(file), open(file, "rb") as opened:
        return all(opened.read(len(line)) == line for line in lines) and not opened.read(1)
