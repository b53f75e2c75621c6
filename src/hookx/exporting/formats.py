"""The formats of an export, by suffix: who writes them, what they need and what they cannot hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from hookx.errors import UsageError, closest
from hookx.exporting.hdf5 import write_h5
from hookx.exporting.matlab import check_mat, write_mat
from hookx.exporting.numpy import write_npy, write_npz
from hookx.exporting.rows import Rows
from hookx.exporting.tables import check_csv, check_table, write_csv, write_parquet
from hookx.exporting.zarr import write_zarr


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        write: writes rows to a path that does not exist.
        check: raises `UsageError` for rows that the format cannot hold.
        package: what it needs beyond the basic install.
        extra: the extra of hookx that installs the package.
        missing_dtypes: types that it lacks; float32 is written in their place and holds the same values.
        has_keys_beside: it holds one array only, so the keys go to a second file.
        is_binary: a file is at least as large as its activations.
    """

    write: Callable[[Path, Rows], None]
    check: Callable[[Rows], None] = lambda rows: None
    package: str = ""
    extra: str = ""
    missing_dtypes: tuple[str, ...] = ("bfloat16",)
    has_keys_beside: bool = False
    is_binary: bool = True


FORMATS = {
    ".npy": Format(write_npy, has_keys_beside=True),
    ".npz": Format(write_npz),
    ".parquet": Format(write_parquet, check_table, package="pyarrow", extra="parquet"),
    ".h5": Format(write_h5, package="h5py", extra="hdf5"),
    ".mat": Format(write_mat, check_mat, "scipy", "matlab", missing_dtypes=("bfloat16", "float16")),
    ".csv": Format(write_csv, check_csv, is_binary=False),
    ".zarr": Format(write_zarr, package="zarr", extra="zarr"),
}


def find_format(to: Path) -> Format:
    """Return the format that a file's suffix names; `UsageError` for none, or if its package is not installed."""
    suffix = to.suffix.lower()
    if suffix not in FORMATS:
        problem = f"{to} has the suffix '{suffix}'" if suffix else f"{to} has no suffix"
        known = ", ".join(FORMATS)
        raise UsageError(f"{problem}, which names no format; closest: {closest(suffix, FORMATS, 1)}", f"known: {known}")
    format = FORMATS[suffix]
    if format.package:
        install = f"install it as an extra of hookx: pip install 'hookx-vision[{format.extra}]'"
        try:
            import_module(format.package)
        except ImportError as error:
            if error.name == format.package:
                raise UsageError(f"{suffix} files need {format.package}, which is not installed", install) from None
            reason = " ".join(str(error).split())
            raise UsageError(f"{format.package} cannot be imported: {reason}", install) from None
    return format
