"""The formats of an export, by suffix: how each is written, what it needs and what it cannot hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Any
from zipfile import ZipFile

import numpy as np
from numpy.lib.format import dtype_to_descr, write_array_header_1_0
from numpy.typing import NDArray

from hookx.errors import UsageError, closest
from hookx.exporting.rows import Rows
from hookx.keys import key_bytes
from hookx.layers.address import Address
from hookx.layers.reductions import Reduction
from hookx.store.columns import free_names
from hookx.store.tables import line, to_field, value_field

MAX_VARIABLE_BYTES = 2**31 - 1  # MATLAB's own limit for files of level 5.
_CELL_BYTES = 64  # What a MATLAB cell takes beside its text, padding included.
_MAX_MATLAB_NAME = 63  # characters
_COLUMN_LAYOUT_BYTES = 2**12
_MAX_LAYOUT_BYTES = 2**16  # More than the HDF5 layout of two datasets takes.


def keys_file(path: Path) -> Path:
    """Return where the keys of a `.npy` file are."""
    return path.with_suffix(".keys.csv")


def keys_csv(rows: Rows) -> Iterator[bytes]:
    """Yield the lines of the file of keys, which holds the columns as well."""
    yield line(["key", *map(to_field, free_names(rows.columns, ["key"]))])
    for span in rows.spans():
        for key, values in zip(rows.keys[span], rows.values(span), strict=True):
            yield line([to_field(key), *map(value_field, values)])


def check_mat(rows: Rows) -> None:
    """Raise `UsageError` for more than the format can hold."""
    if rows.nbytes > MAX_VARIABLE_BYTES:
        raise UsageError(
            f".mat holds at most 2 GiB, and {rows.origin['layer']} of {len(rows):,} images takes {rows.nbytes:,} bytes",
            "choose .h5, which MATLAB reads with h5read, or a layer that was reduced when it was extracted",
        )
    if sum(len(key_bytes(key)) + _CELL_BYTES for key in rows.keys) > MAX_VARIABLE_BYTES:
        raise UsageError(f".mat holds at most 2 GiB, and the keys of {len(rows):,} images take more", "choose .h5")


def _check_csv(rows: Rows) -> None:
    _check_table(rows)
    shape = rows.shape[1:]
    if sum(length != 1 for length in shape) > 1:
        layer = Address.parse(rows.origin["layer"])
        steps = ["choose another format, as in --to activations.npy"]
        if layer.reduction is None:
            steps.append(f"or extract {layer} reduced: {Reduction.parse('mean').spellings_for(shape)}")
        shown = ",".join(map(str, shape))
        raise UsageError(f".csv holds vectors, and {layer} is {shown} for every image", *steps)


def _check_table(rows: Rows) -> None:
    if rows.dtype.kind == "c":
        raise UsageError(f"{rows.origin['layer']} is complex, and tables hold real numbers", "choose .npy or .h5")
    if not rows.values_per_row:
        raise UsageError(f"{rows.origin['layer']} has no values to put in a table", "choose .npy or .h5")


def _write_npy(path: Path, rows: Rows) -> None:
    """Write the activations as one array, and the keys to a CSV file beside it."""
    with open(keys_file(path), "xb") as file:
        file.writelines(keys_csv(rows))
    with open(path, "xb") as file:
        _write_array(file, rows.shape, rows.dtype, (block for _, block in rows.blocks()))


def _write_npz(path: Path, rows: Rows) -> None:
    """Write the arrays `activations`, `keys` and `columns/NAME`; texts in a fixed length, which load without pickle."""
    text = np.dtype(f"<U{max(map(len, rows.keys), default=1)}")
    with ZipFile(path, "x") as archive:
        with archive.open("activations.npy", "w", force_zip64=True) as file:
            _write_array(file, rows.shape, rows.dtype, (block for _, block in rows.blocks()))
        with archive.open("keys.npy", "w", force_zip64=True) as file:
            _write_array(file, (len(rows),), text, (np.array(list(rows.keys[span]), text) for span in rows.spans()))
        for name, member in _members(rows):
            values = rows.numbers_or_texts(name)
            values = values.astype(str) if values.dtype == object else values
            with archive.open(f"{member}.npy", "w", force_zip64=True) as file:
                _write_array(file, values.shape, values.dtype, [np.ascontiguousarray(values)])


def _write_array(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any], blocks: Iterable[NDArray[Any]]) -> None:
    header = {"descr": dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    write_array_header_1_0(file, header)
    for block in blocks:
        file.write(block.data)


def _write_csv(path: Path, rows: Rows) -> None:
    """Write one line per image; each number is the shortest text that reads back as the same number."""
    with open(path, "xb") as file:
        numbers = list(map(str, range(rows.values_per_row)))
        file.write(line(["key", *map(to_field, free_names(rows.columns, ["key", *numbers])), *numbers]))
        for span, block in rows.blocks():
            images = zip(rows.keys[span], rows.values(span), block.reshape(len(block), -1), strict=True)
            for key, values, row in images:
                beginning = line([to_field(key), *map(value_field, values)]).removesuffix(b"\n")
                file.write(beginning + b"," + ",".join(map(str, row)).encode() + b"\n")


def _write_parquet(path: Path, rows: Rows) -> None:
    """Write the columns `key`, `activation` and those of the run, one row group per block.

    The metadata holds the shape and the origin.

    Nothing is compressed, because activations hardly shrink. The statistics of the keys let a reader skip row groups.
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    number = pa.field("element", pa.from_numpy_dtype(rows.dtype), nullable=False)
    key, activation = pa.string() if rows.keys_are_text else pa.binary(), pa.list_(number, rows.values_per_row)
    columns = [pa.field("key", key, nullable=False), pa.field("activation", activation, nullable=False)]
    types = {"int": pa.int64(), "float": pa.float64(), "bool": pa.bool_(), "text": pa.string()}
    names = free_names(rows.columns, ["key", "activation"])
    kinds = [types[kind] for kind in rows.columns.kinds.values()]
    columns += [pa.field(name, kind) for name, kind in zip(names, kinds, strict=True)]
    schema = pa.schema(columns, metadata={**rows.origin, "shape": str(list(rows.shape[1:]))})
    with ParquetWriter(path, schema, compression="none", use_dictionary=False, write_statistics=["key"]) as file:
        for span, block in rows.blocks():
            numbers = pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), type=activation)
            values = list(zip(*rows.values(span), strict=True)) if rows.columns else []
            others = [pa.array(list(map(_as_utf8, some)), kind) for some, kind in zip(values, kinds, strict=True)]
            file.write_batch(pa.record_batch([pa.array(rows.texts(span), key), numbers, *others], schema=schema))


def _write_h5(path: Path, rows: Rows) -> None:
    """Write the datasets `activations`, `keys` and `columns/NAME`, each in one piece; attributes hold the origin.

    HDF5 only lays out the file; hookx writes the data. After a failed write, as on a full disk, HDF5 2.0 can crash
    the process with a segmentation fault when it writes its next file.
    """
    import h5py

    longest = max(1, max((len(key_bytes(key)) for key in rows.keys), default=1))
    text = h5py.string_dtype(length=longest)
    columns = {member: _as_numbers_or_bytes(rows.numbers_or_texts(name)) for name, member in _members(rows)}
    layout_bytes = _MAX_LAYOUT_BYTES + len(columns) * _COLUMN_LAYOUT_BYTES
    with open(path, "xb") as file:  # A disk too small for the layout or the data fails here, outside HDF5.
        file.write(bytes(layout_bytes))
        file.truncate(
            layout_bytes + rows.nbytes + len(rows) * longest + sum(values.nbytes for values in columns.values())
        )
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    with h5py.File(path, "w") as hierarchy:
        hierarchy.attrs.update(rows.origin)
        activations = hierarchy.create_dataset("activations", rows.shape, rows.dtype, dcpl=layout).id.get_offset()
        keys = hierarchy.create_dataset("keys", len(rows), text, dcpl=layout).id.get_offset()
        places = {}
        for name, values in columns.items():
            kind = h5py.string_dtype(length=values.dtype.itemsize) if values.dtype.kind == "S" else values.dtype
            places[name] = hierarchy.create_dataset(name, len(rows), kind, dcpl=layout).id.get_offset()
    with open(path, "r+b") as file:
        if rows.nbytes:
            file.seek(activations)
        for _, block in rows.blocks():
            file.write(block.data)
        for span in rows.spans():
            file.seek(keys + span.start * longest)
            file.write(np.array(list(map(key_bytes, rows.keys[span])), f"S{longest}").data)
        for name, values in columns.items():
            if len(rows):
                file.seek(places[name])
                file.write(values.tobytes())


def _write_mat(path: Path, rows: Rows) -> None:
    """Write `activations` in their shape here, `keys` as a cell array, and a text for each fact of the origin.

    The columns are fields of a struct `columns`, under their names as far as MATLAB can spell them.

    scipy writes a variable from memory and copies it once, so this takes twice the size of the activations.
    """
    from scipy.io import savemat

    activations = np.empty(rows.shape, rows.dtype, order="F")
    for span, block in rows.blocks():
        activations[span] = block
    if activations.ndim == 1:
        activations = activations[:, None]  # MATLAB has no fewer than two dimensions.
    keys = np.empty((len(rows), 1), dtype=object)
    for span in rows.spans():
        for row, key in enumerate(rows.texts(span), span.start):
            keys[row, 0] = np.frombuffer(key, np.uint8)[None] if isinstance(key, bytes) else key
    contents = {"activations": activations, "keys": keys, **rows.origin}
    if rows.columns:
        fields = free_names([_matlab_name(name) for name in rows.columns], [])
        arrays = (rows.numbers_or_texts(name)[:, None] for name in rows.columns)
        contents["columns"] = {_matlab_name(field): array for field, array in zip(fields, arrays, strict=True)}
    with open(path, "xb") as file:
        savemat(file, contents, long_field_names=True)


def _write_zarr(path: Path, rows: Rows) -> None:
    """Write the arrays `activations`, in chunks of one block, `keys` and `columns/NAME`; attributes hold the origin."""
    import zarr
    from zarr.dtype import VariableLengthBytes

    chunks = tuple(max(1, length) for length in (rows.rows_per_block, *rows.shape[1:]))
    group = zarr.create_group(path, zarr_format=3, attributes=dict(rows.origin))
    activations = group.create_array("activations", shape=rows.shape, dtype=rows.dtype, chunks=chunks, compressors=None)
    kind = str if rows.keys_are_text else VariableLengthBytes()
    keys = group.create_array("keys", shape=(len(rows),), dtype=kind, chunks=chunks[:1])
    for span, block in rows.blocks():
        activations[span] = block
        keys[span] = np.array(rows.texts(span), dtype=object)
    for name, member in _members(rows):
        values = rows.numbers_or_texts(name)
        kind = str if values.dtype == object else values.dtype
        if kind is str:
            values = np.array(list(map(_as_utf8, values)), dtype=object)
        group.create_array(member, shape=values.shape, dtype=kind, chunks=chunks[:1])[:] = values


def _members(rows: Rows) -> Iterator[tuple[str, str]]:
    """Yield each column's name, and what it is called in formats where names are paths."""
    names = [name.replace("/", "_") for name in map(_as_utf8, rows.columns)]
    plain = free_names([name if name.strip(".") else f"x{name}" for name in names], [])
    return zip(rows.columns, [f"columns/{name}" for name in plain], strict=True)


def _as_utf8(value: Any) -> Any:
    """Return a text that every format can hold; a file name in it need not be UTF-8."""
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") if type(value) is str else value


def _as_numbers_or_bytes(values: NDArray[Any]) -> NDArray[Any]:
    if values.dtype != object:
        return np.ascontiguousarray(values)
    return np.array(list(map(key_bytes, values)) or [b""], dtype=bytes)[: len(values)]


def _matlab_name(name: str) -> str:
    name = re.sub(r"[^A-Za-z0-9_]", "_", name)
    return (name if name[:1].isalpha() else f"x_{name}")[:_MAX_MATLAB_NAME]


@dataclass(frozen=True)
class Format:
    """One format: `write` takes a path that does not exist; `check` raises `UsageError` for rows that do not fit."""

    write: Callable[[Path, Rows], None]
    check: Callable[[Rows], None] = lambda rows: None
    package: str = ""  # beyond the basic install
    extra: str = ""  # the extra of hookx that installs the package
    missing_dtypes: tuple[str, ...] = ()  # Written as float32, which holds the same values, as is what numpy lacks.
    has_keys_beside: bool = False  # It holds one array only, so the keys go to a second file.
    is_binary: bool = True  # A file is at least as large as its activations.


FORMATS = {
    ".npy": Format(_write_npy, has_keys_beside=True),
    ".npz": Format(_write_npz),
    ".parquet": Format(_write_parquet, _check_table, package="pyarrow", extra="parquet"),
    ".h5": Format(_write_h5, package="h5py", extra="hdf5"),
    ".mat": Format(_write_mat, check_mat, "scipy", "matlab", missing_dtypes=("float16",)),
    ".csv": Format(_write_csv, _check_csv, is_binary=False),
    ".zarr": Format(_write_zarr, package="zarr", extra="zarr"),
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
        try:
            import_module(format.package)
        except ImportError as error:
            problem = f"{format.package} cannot be imported: {' '.join(str(error).split())}"
            if error.name == format.package:
                problem = f"{suffix} files need {format.package}, which is not installed"
            install = f"install it as an extra of hookx: pip install 'hookx-vision[{format.extra}]'"
            raise UsageError(problem, install) from None
    return format
