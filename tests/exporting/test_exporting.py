"""An export holds what the run holds, as the programs that it is for read it; whole or absent, in bounded memory."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import h5py
import numpy as np
import pandas as pd
import polars as pl
import pytest
import scipy.io
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pyarrow import parquet
from torch import Tensor
from typer.testing import CliRunner

import hookx
from hookx.cli.app import app
from hookx.errors import NotStoredError, StoreError, UsageError
from hookx.exporting import export, select_rows
from hookx.exporting.formats import FORMATS, MAX_VARIABLE_BYTES, check_mat
from hookx.exporting.rows import Rows
from hookx.keys import Keys
from hookx.plan import DTYPES, LayerSpec, Plan, Preprocessing
from hookx.read.activations import RowIndex
from hookx.read.features import Features
from hookx.store.directory import RunDirectory
from hookx.store.record import ShardRecord
from kit import warm
from kit.runs import forked, random_tensor, wait_for
from kit.shards import publish

Array = NDArray[Any]
Read = tuple[list[str], Array]

SUFFIXES = [".npy", ".npz", ".parquet", ".h5", ".mat", ".csv", ".zarr"]
PREPROCESSING = Preprocessing(256, 224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear")
KEYS = ['a"b".jpg', "a, b.jpg", "a/b.jpg", "c\nd.jpg", "c\rd.jpg", "d.jpg", "e", "f", "g", "h\\é.jpg", "🦊.jpg"]
UNREADABLE = {"d.jpg", "e", "f", "g"}  # In shards of three: one alone, and all of a shard.
READABLE = [key for key in KEYS if key not in UNREADABLE]
SHAPES = {"vector": (5,), "pooled": (6, 1, 1), "map": (2, 3, 4), "number": ()}


def write_run(
    path: Path,
    layers: dict[str, Tensor],
    keys: list[str] | None = None,
    rows_per_shard: int = 3,
    shards: int | None = None,
) -> Path:
    """Write a run that holds some tensors, or the first shards of one; some keys are those of failures."""
    keys = keys or [f"{row:06}.jpg" for row in range(len(next(iter(layers.values()))))]
    specs = [LayerSpec(name, tuple(rows.shape[1:]), str(rows.dtype).split(".")[1]) for name, rows in layers.items()]
    plan = Plan(
        "net", "none", tuple(specs), PREPROCESSING, "fp32", "contiguous", len(keys), "0" * 64, rows_per_shard, 1
    )
    start = 0
    with RunDirectory(path, plan) as directory:
        for shard in plan.shards[:shards]:
            listed = keys[shard.start : shard.stop]
            readable = [key for key in listed if key not in UNREADABLE]
            record = ShardRecord(readable, [(key, "OSError: cut") for key in listed if key in UNREADABLE])
            rows = slice(start, start + len(readable))
            publish(directory, shard, {name: tensor[rows] for name, tensor in layers.items()}, record)
            start = rows.stop
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of every type that a shard can hold, in random bits, and of every kind of shape."""
    layers = {
        f"{name}.{dtype}": random_tensor((len(READABLE), *shape), dtype)
        for dtype in DTYPES
        for name, shape in SHAPES.items()
    }
    return write_run(tmp_path_factory.mktemp("run") / "features", layers, KEYS)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_run(tmp_path / "features", {"fc": torch.arange(20.0).reshape(10, 2)})


def promise(run: Path, layer: LayerSpec) -> Features:
    """Open a run as if it held two rows of a layer that no test could write; reading them would fail."""
    features = hookx.open(run)
    rows = RowIndex(run, features.plan, Keys.pack([b"a.jpg", b"b.jpg"]), {}, features.rows.files[:1], np.array([0, 2]))
    return Features(run, replace(features.plan, layers=(layer,)), rows)


def stored(run: Path, layer: str) -> Array:
    """Return what the run holds; bfloat16, which numpy does not have, as float32."""
    return hookx.open(run)[layer].numpy()


def same_bits(one: Array, other: Array) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def same_values(one: Array, other: Array) -> bool:
    """Compare everything but the type, and which of the many NaNs a NaN is."""
    if one.dtype.kind != "f":
        return np.array_equal(one, other)
    numbers = ~np.isnan(one)
    return np.array_equal(one, other, equal_nan=True) and np.array_equal(
        np.signbit(one[numbers]), np.signbit(other[numbers])
    )


# --- the readers ---------------------------------------------------------------------------------------------------


def text(key: str | bytes) -> str:
    return key if isinstance(key, str) else os.fsdecode(key)


def read_csv(path: Path) -> list[list[str]]:
    return list(csv.reader(io.StringIO(path.read_bytes().decode("utf-8", "surrogateescape"), newline="")))


def by_numpy(path: Path) -> Read:
    array = np.load(path, mmap_mode="r")
    assert isinstance(array, np.memmap)
    header, *keys = read_csv(path.with_suffix(".keys.csv"))
    assert header == ["key"]
    return [key for (key,) in keys], np.array(array)


def by_numpy_zipped(path: Path) -> Read:
    with np.load(path, allow_pickle=False) as archive:
        assert sorted(archive) == ["activations", "keys"]
        return archive["keys"].tolist(), archive["activations"]


def shape_in(path: Path) -> list[int]:
    shape: list[int] = json.loads(parquet.read_schema(path).metadata[b"shape"])
    return shape


def by_pandas(path: Path) -> Read:
    table = pd.read_parquet(path)
    assert list(table) == ["key", "activation"]
    return list(map(text, table["key"])), np.stack(table["activation"]).reshape(len(table), *shape_in(path))


def by_polars(path: Path) -> Read:
    table = pl.read_parquet(path)
    assert isinstance(table.schema["activation"], pl.Array)
    return list(map(text, table["key"])), table["activation"].to_numpy().reshape(len(table), *shape_in(path))


def by_duckdb(path: Path) -> Read:
    table = duckdb.sql(f"select key, activation from '{path}'").fetchall()
    return [text(key) for key, _ in table], np.array([row for _, row in table]).reshape(len(table), *shape_in(path))


def by_h5py(path: Path) -> Read:
    with h5py.File(path) as file:
        return list(file["keys"].asstr(errors="surrogateescape")[:]), file["activations"][:]


def by_scipy(path: Path) -> Read:
    variables = scipy.io.loadmat(path)
    keys = [key.tobytes() if key.dtype.kind == "u" else str(key[0]) for key in variables["keys"].ravel()]
    return list(map(text, keys)), variables["activations"]


def by_zarr(path: Path) -> Read:
    group = zarr.open_group(path, mode="r")
    activations = group["activations"]
    assert isinstance(activations, zarr.Array) and isinstance(group["keys"], zarr.Array)
    return [text(key) for key in group["keys"][:].tolist()], np.asarray(activations[:])


def by_csv(path: Path) -> Read:
    header, *lines = read_csv(path)
    assert header == ["key", *map(str, range(len(header) - 1))]
    return [line[0] for line in lines], np.array([line[1:] for line in lines])


EXACT_READERS: list[tuple[str, Callable[[Path], Read]]] = [
    (".npy", by_numpy),
    (".npz", by_numpy_zipped),
    (".parquet", by_pandas),
    (".parquet", by_polars),
    (".h5", by_h5py),
    (".zarr", by_zarr),
]


# --- round trips ---------------------------------------------------------------------------------------------------


def in_pairs(dtypes: Sequence[str], shapes: Sequence[str]) -> list[Any]:
    """Pair every type with a shape, and every shape with float32; all other pairs are marked slow."""
    quick = {(dtype, shapes[number % len(shapes)]) for number, dtype in enumerate(dtypes)}
    quick |= {("float32", shape) for shape in shapes}
    pairs = itertools.product(dtypes, shapes)
    return [pair if pair in quick else pytest.param(*pair, marks=pytest.mark.slow) for pair in pairs]


@pytest.mark.parametrize(("dtype", "shape"), in_pairs(list(DTYPES), list(SHAPES)))
@pytest.mark.parametrize(("suffix", "reader"), EXACT_READERS)
def test_what_is_exported_is_read_back_bit_for_bit_with_its_shape_and_keys(
    run: Path, tmp_path: Path, suffix: str, reader: Callable[[Path], Read], dtype: str, shape: str
) -> None:
    layer = f"{shape}.{dtype}"
    if suffix == ".parquet" and dtype == "complex64":
        with pytest.raises(UsageError, match=f"{layer} is complex, and tables hold real numbers"):
            export(run, layer, tmp_path / "a.parquet")
        return
    written = export(run, layer, tmp_path / f"a{suffix}")
    keys, activations = reader(tmp_path / f"a{suffix}")
    assert keys == READABLE
    assert same_bits(activations, stored(run, layer))
    assert (written.shape, written.dtype, written.failures) == (activations.shape, activations.dtype.name, 4)


@pytest.mark.parametrize(("dtype", "shape"), in_pairs(list(DTYPES), list(SHAPES)))
def test_scipy_reads_what_matlab_would_with_its_shape_and_keys(
    run: Path, tmp_path: Path, dtype: str, shape: str
) -> None:
    layer = f"{shape}.{dtype}"
    export(run, layer, tmp_path / "a.mat")
    keys, activations = by_scipy(tmp_path / "a.mat")
    expected = stored(run, layer)
    if dtype == "float16":  # MATLAB has none.
        expected = expected.astype(np.float32)
    if dtype == "bool":
        assert scipy.io.loadmat(tmp_path / "a.mat", mat_dtype=True)["activations"].dtype == bool
        activations = activations.astype(bool)
    assert keys == READABLE
    assert same_bits(activations, expected[:, None] if shape == "number" else expected)


@pytest.mark.parametrize(
    ("dtype", "shape"), in_pairs(sorted(set(DTYPES) - {"complex64"}), ["vector", "pooled", "number"])
)
def test_vectors_are_read_back_from_csv_value_for_value(run: Path, tmp_path: Path, dtype: str, shape: str) -> None:
    layer = f"{shape}.{dtype}"
    export(run, layer, tmp_path / "a.csv")
    expected = stored(run, layer)
    expected = expected.reshape(len(expected), -1)
    keys, texts = by_csv(tmp_path / "a.csv")
    assert keys == READABLE
    if dtype != "bool":
        assert same_values(texts.astype(expected.dtype), expected)
    table = pd.read_csv(tmp_path / "a.csv", index_col="key")
    assert list(table.index) == READABLE
    with np.errstate(over="ignore"):
        assert same_values(table.to_numpy().astype(expected.dtype), expected)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != "complex64"])
def test_duckdb_reads_lists_and_their_keys(run: Path, tmp_path: Path, dtype: str) -> None:
    layer = f"map.{dtype}"
    export(run, layer, tmp_path / "a.parquet")
    keys, activations = by_duckdb(tmp_path / "a.parquet")
    assert keys == READABLE
    assert same_values(activations, stored(run, layer))


@settings(max_examples=60)
@given(
    st.sampled_from([*EXACT_READERS, (".mat", by_scipy)]),
    st.sampled_from(["float32", "int64", "bool"]),
    st.lists(st.integers(0, 4), max_size=4),
    st.integers(0, 9),
    st.integers(1, 4),
    st.integers(1, 70),
)
def test_no_shape_cut_or_size_of_a_block_changes_what_is_read_back(
    tmp_path_factory: pytest.TempPathFactory,
    format: tuple[str, Callable[[Path], Read]],
    dtype: str,
    shape: list[int],
    rows: int,
    rows_per_shard: int,
    block_bytes: int,
) -> None:
    folder = tmp_path_factory.mktemp("law")
    suffix, reader = format
    values = random_tensor((rows, *shape), dtype)
    keys = [*(f"{row}.jpg" for row in range(rows)), *UNREADABLE]
    write_run(folder / "features", {"layer": values}, keys, rows_per_shard)
    if suffix == ".parquet" and 0 in shape:
        with pytest.raises(UsageError, match="layer has no values to put in a table"):
            export(folder / "features", "layer", folder / "a.parquet")
        return
    advances: list[int] = []
    selected = select_rows(hookx.open(folder / "features"), "layer", FORMATS[suffix], advances.append)
    FORMATS[suffix].write(folder / f"a{suffix}", replace(selected, max_block_bytes=block_bytes, max_block_rows=5))
    if suffix == ".parquet" and not rows:
        assert parquet.read_table(folder / "a.parquet").num_rows == 0
        return
    found_keys, found = reader(folder / f"a{suffix}")
    expected = values.numpy()
    if suffix == ".mat":
        expected = (expected if shape else expected[:, None]).view(np.uint8 if dtype == "bool" else expected.dtype)
    assert found_keys == keys[:rows] and same_bits(found, expected)
    assert sum(advances) == rows


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_names_that_are_not_utf_8_come_back_byte_for_byte(tmp_path: Path, suffix: str) -> None:
    keys = [os.fsdecode(b"\\xe9.jpg"), "\u00e9.jpg", os.fsdecode(b"\xe9, \xff.jpg")]
    run = write_run(tmp_path / "features", {"layer": torch.ones(3, 2)}, keys)
    export(run, "layer", tmp_path / f"a{suffix}")
    readers = {**dict(EXACT_READERS), ".mat": by_scipy, ".csv": by_csv}
    assert readers[suffix](tmp_path / f"a{suffix}")[0] == keys
    if suffix == ".parquet":
        assert by_pandas(tmp_path / "a.parquet")[0] == by_duckdb(tmp_path / "a.parquet")[0] == keys


def test_a_block_of_minus_zeros_is_not_taken_for_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "features", {"layer": -torch.zeros(3, 2)})
    for suffix, reader in EXACT_READERS:
        export(run, "layer", tmp_path / f"{reader.__name__}{suffix}")
        assert np.signbit(reader(tmp_path / f"{reader.__name__}{suffix}")[1]).all()


def test_rows_as_large_as_the_maps_of_a_first_layer_are_lists_too(tmp_path: Path) -> None:
    maps = torch.randn(7, 64, 112, 112)
    run = write_run(tmp_path / "features", {"conv1": maps})
    export(run, "conv1", tmp_path / "a.parquet")
    for reader in (by_pandas, by_polars):
        assert same_bits(reader(tmp_path / "a.parquet")[1], maps.numpy())
    total = duckdb.sql(f"select sum(list_sum(activation::double[])) from '{tmp_path / 'a.parquet'}'").fetchall()
    assert total[0][0] == pytest.approx(float(maps.double().sum()))


@given(st.floats(width=32) | st.floats(width=16))
def test_csv_writes_the_shortest_text_that_is_the_same_number(
    tmp_path_factory: pytest.TempPathFactory, number: float
) -> None:
    folder = tmp_path_factory.mktemp("csv")
    run = write_run(folder / "features", {"layer": torch.tensor([[number, 0.1]])})
    export(run, "layer", folder / "a.csv")
    _, texts = by_csv(folder / "a.csv")
    assert same_values(texts.astype(np.float32), np.array([[number, 0.1]], np.float32))
    assert texts[0, 1] == "0.1"


def test_the_formats_that_can_say_so_say_where_the_rows_come_from(run: Path, tmp_path: Path) -> None:
    plan = hookx.open(run).plan
    expected = {"layer": "vector.int8", "model": "net", "weights": "none", "fingerprint": plan.fingerprint}
    for suffix in (".h5", ".zarr", ".mat", ".parquet"):
        export(run, "vector.int8", tmp_path / f"a{suffix}")
    with h5py.File(tmp_path / "a.h5") as file:
        assert dict(file.attrs) == expected
    assert dict(zarr.open_group(tmp_path / "a.zarr", mode="r").attrs) == expected
    variables = scipy.io.loadmat(tmp_path / "a.mat")
    assert {name: str(variables[name][0]) for name in expected} == expected
    metadata = parquet.read_schema(tmp_path / "a.parquet").metadata
    assert {name: metadata[name.encode()].decode() for name in expected} == expected


# --- whole or absent -----------------------------------------------------------------------------------------------


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_export_killed_half_way_leaves_no_target_and_the_next_one_removes_its_leavings(
    tmp_path: Path, suffix: str
) -> None:
    run = write_run(tmp_path / "features", {"fc": torch.randn(20_000, 2)}, rows_per_shard=20_000)  # two blocks
    target, half_way = tmp_path / f"a{suffix}", tmp_path / "half way"

    def stop_half_way(_rows: int) -> None:
        half_way.touch()
        time.sleep(100)

    def export_half_way() -> None:
        export(run, "fc", target, progress=stop_half_way)

    with forked(export_half_way):
        wait_for(half_way.exists)
    half_way.unlink()
    (aside,) = names_in(tmp_path) - {"features"}
    assert aside.startswith(f".a{suffix}.") and aside.endswith(".aside")
    export(run, "fc", target)
    assert names_in(tmp_path) == {"features", target.name, *(["a.keys.csv"] if suffix == ".npy" else [])}


def test_an_export_killed_between_the_keys_and_the_array_is_finished_by_the_next_one(
    small: Path, tmp_path: Path
) -> None:
    published: list[str] = []

    def die_at_the_second_link(event: str, arguments: tuple[object, ...]) -> None:
        if event == "os.link":
            published.append(str(arguments[1]))
            if len(published) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

    def export_and_die() -> None:
        sys.addaudithook(die_at_the_second_link)
        export(small, "fc", tmp_path / "a.npy")

    with forked(export_and_die):
        wait_for((tmp_path / "a.keys.csv").exists)
        time.sleep(0.1)
    assert {name for name in names_in(tmp_path) if not name.startswith(".a.npy.")} == {"features", "a.keys.csv"}
    export(small, "fc", tmp_path / "a.npy")
    assert by_numpy(tmp_path / "a.npy")[0] == hookx.open(small).keys_of_rows
    assert names_in(tmp_path) == {"features", "a.keys.csv", "a.npy"}


def test_the_command_killed_at_any_moment_leaves_a_whole_file_or_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "features", {"fc": torch.randn(40_000, 256)}, rows_per_shard=20_000)
    target = tmp_path / "fc.npy"
    command = [sys.executable, "-m", "hookx", "export", str(run), "--layer", "fc", "--to", str(target)]
    for delay_seconds in (0.0, 0.004, 0.02):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_for(lambda: any(tmp_path.glob(".fc.npy.*.aside")))
        time.sleep(delay_seconds)
        process.kill()
        process.wait()
        if target.exists():
            assert same_bits(by_numpy(target)[1], stored(run, "fc"))
            target.unlink()
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    assert same_bits(by_numpy(target)[1], stored(run, "fc"))
    assert names_in(tmp_path) == {"features", "fc.npy", "fc.keys.csv"}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_disk_that_takes_no_more_leaves_nothing_and_the_error_says_so(tmp_path: Path, suffix: str) -> None:
    run = write_run(tmp_path / "features", {"fc": torch.randn(10, 8192)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        for _ in range(3):  # HDF5 would not survive a second time.
            with pytest.raises(StoreError, match=rf"cannot write .*/a{suffix}: File too large\n  fix that, then run"):
                export(run, "fc", tmp_path / f"a{suffix}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names_in(tmp_path) == {"features"}
    export(run, "fc", tmp_path / f"a{suffix}")


def test_a_disk_that_is_too_small_is_known_before_anything_is_written(small: Path, tmp_path: Path) -> None:
    features = promise(small, LayerSpec("fc", (2**60,), "uint8"))
    error = rf"the activations need {2**61:,} bytes and .* has [\d,]+ free\n  choose another --to"
    with pytest.raises(StoreError, match=error):
        export(features, "fc", tmp_path / "a.npy")
    assert names_in(tmp_path) == {"features"}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_exists_is_never_overwritten(small: Path, tmp_path: Path, suffix: str) -> None:
    target = tmp_path / f"a{suffix}"
    error = rf"a{suffix} already exists\n  remove it, or choose another name"
    makes: list[Callable[[], None]] = [target.touch, target.mkdir, lambda: target.symlink_to("nowhere")]
    for make in makes:
        make()
        with pytest.raises(StoreError, match=error):
            export(small, "fc", target, progress=lambda _: pytest.fail("something was written"))
        target.rmdir() if target.is_dir() else target.unlink()
    with pytest.raises(StoreError, match=error):  # It is also looked for at the end.
        export(small, "fc", target, progress=lambda _: target.touch())
    assert target.read_bytes() == b"" and names_in(tmp_path) == {"features", target.name}


def test_the_keys_of_another_export_are_not_overwritten_either(small: Path, tmp_path: Path) -> None:
    export(small, "fc", tmp_path / "a.npy")
    (tmp_path / "a.npy").unlink()
    same = (tmp_path / "a.keys.csv").read_text()
    for other in ("key\nsomething else\n", f"{same}one more\n", same[:-1]):
        (tmp_path / "a.keys.csv").write_text(other)
        with pytest.raises(StoreError, match=r"a\.keys\.csv already exists"):
            export(small, "fc", tmp_path / "a.npy")
        assert (tmp_path / "a.keys.csv").read_text() == other and not (tmp_path / "a.npy").exists()


def test_one_process_at_a_time_writes_a_file(small: Path, tmp_path: Path) -> None:
    target, errors = tmp_path / "a.npz", []

    def meanwhile(_rows: int) -> None:
        for _ in range(2):  # The failed attempt did not open the lock.
            with pytest.raises(StoreError, match=f"another hookx process is writing {target}\n  wait for it") as error:
                export(small, "fc", target)
            errors.append(error)

    export(small, "fc", target, progress=meanwhile)
    assert len(errors) == 2 and same_bits(by_numpy_zipped(target)[1], stored(small, "fc"))


def test_an_error_on_the_way_leaves_nothing(small: Path, tmp_path: Path) -> None:
    def fail(_rows: int) -> None:
        raise RuntimeError("half way")

    for suffix in SUFFIXES:
        with pytest.raises(RuntimeError, match="half way"):
            export(small, "fc", tmp_path / f"a{suffix}", progress=fail)
    assert names_in(tmp_path) == {"features"}


def test_folders_that_do_not_exist_or_cannot_be_written_are_errors(small: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"there is no folder '.*/some where'\n  make it: mkdir -p '.*/some where'"):
        export(small, "fc", tmp_path / "some where" / "a.npy")
    with pytest.raises(StoreError, match=r"cannot write /proc/a\.npy: No such file or directory"):
        export(small, "fc", "/proc/a.npy")


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [40_000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_run(tmp_path: Path, rows: int) -> None:
    write_run(tmp_path / "small", {"fc": torch.zeros(10, 512)})
    write_run(tmp_path / "large", {"fc": torch.zeros(rows, 512)}, rows_per_shard=20_000)  # 82 MB or 410 MB
    program = """
import sys
from dataclasses import replace
from pathlib import Path
import hookx
from hookx.exporting import select_rows
from hookx.exporting.formats import FORMATS

def megabytes(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) // 1000

features = hookx.open("large")
for suffix in sys.argv[1:]:
    hookx.export("small", "fc", "small" + suffix)  # It loads what the format needs.
    Path("/proc/self/clear_refs").write_text("5")  # The peak begins anew.
    before = megabytes("VmRSS")
    rows = select_rows(features, "fc", FORMATS[suffix])
    FORMATS[suffix].write(Path("large" + suffix), replace(rows, max_block_bytes=2**21))
    print(suffix, megabytes("VmHWM") - before)
"""
    # A .csv file would take minutes, and scipy writes a .mat file from memory.
    suffixes = [suffix for suffix in SUFFIXES if suffix not in (".csv", ".mat")]
    done = subprocess.run(
        [sys.executable, "-c", program, *suffixes], cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True
    )
    grown_megabytes = dict(line.split() for line in done.stdout.splitlines())
    assert list(grown_megabytes) == suffixes
    # Less than the smaller run; pools of memory that libraries keep take up to 40, now and then.
    assert max(map(int, grown_megabytes.values())) < 60, done.stdout


# --- errors and the command ----------------------------------------------------------------------------------------


def test_a_layer_is_named_as_one_writes_it_and_a_misspelt_one_is_an_error(tmp_path: Path) -> None:
    run = write_run(tmp_path / "features", {"layer1.0.conv1": torch.ones(2, 3), "layer1.0.relu:1": torch.ones(2, 3)})
    assert export(run, "layer1[0].conv1", tmp_path / "a.npy").layer == "layer1.0.conv1"
    with pytest.raises(NotStoredError, match=r"/ does not hold 'layer1\.0\.relu'; closest: layer1\.0\.relu:1"):
        export(run, "layer1.0.relu", tmp_path / "b.npy")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.parqet", "a.parqet has the suffix '.parqet', which names no format; closest: .parquet"),
        ("a", "a has no suffix, which names no format; closest: .npy"),
    ],
)
def test_an_unknown_suffix_is_an_error_with_the_closest_and_all_that_are_known(
    small: Path, name: str, said: str
) -> None:
    with pytest.raises(UsageError) as error:
        export(small, "fc", name)
    assert str(error.value) == f"{said}\n  known: {', '.join(SUFFIXES)}"


def test_a_map_is_no_vector_and_the_error_names_reductions_that_fit(tmp_path: Path) -> None:
    run = write_run(tmp_path / "features", {"conv1": torch.ones(2, 4, 3, 3), "conv1@mean2": torch.ones(2, 4, 3)})
    with pytest.raises(UsageError) as error:
        export(run, "conv1", tmp_path / "a.csv")
    assert str(error.value) == (
        ".csv holds vectors, and conv1 is 4,3,3 for every image\n"
        "  choose another format, as in --to activations.npy\n"
        "  or extract conv1 reduced: @mean23 if the channels are dimension 1, @mean12 if they are dimension 3"
    )
    with pytest.raises(UsageError, match=r"\.csv holds vectors, and conv1@mean2 is 4,3 for every image\n.*npy$"):
        export(run, "conv1@mean2", tmp_path / "a.csv")


def test_what_is_too_large_for_a_mat_file_is_refused_before_anything_is_written(small: Path, tmp_path: Path) -> None:
    features = promise(small, LayerSpec("fc", (2**30,), "uint8"))
    with pytest.raises(
        UsageError, match=r"\.mat holds at most 2 GiB, and fc of 2 images takes 2,147,483,648 bytes\n  choose .h5"
    ):
        export(features, "fc", tmp_path / "a.mat")
    assert names_in(tmp_path) == {"features"}


def test_a_mat_file_is_as_large_as_matlab_can_read_and_its_keys_count_too(small: Path) -> None:
    features = promise(small, LayerSpec("fc", (MAX_VARIABLE_BYTES // 2,), "uint8"))
    rows = Rows(features.keys, features["fc"], np.dtype(np.uint8), {"layer": "fc"}, features.columns)
    check_mat(rows)
    numbers = replace(rows, activations=promise(small, LayerSpec("fc", (), "uint8"))["fc"])
    check_mat(replace(numbers, keys=["k" * 2**26] * 31))
    with pytest.raises(
        UsageError, match=r"\.mat holds at most 2 GiB, and the keys of 32 images take more\n  choose .h5"
    ):
        check_mat(replace(numbers, keys=["k" * 2**26] * 32))


@pytest.mark.parametrize(
    ("suffix", "package", "extra"),
    [
        (".parquet", "pyarrow", "parquet"),
        (".h5", "h5py", "hdf5"),
        (".zarr", "zarr", "zarr"),
        (".mat", "scipy", "matlab"),
    ],
)
def test_without_a_package_the_error_names_the_extra_and_the_basic_formats_need_none(
    small: Path, tmp_path: Path, suffix: str, package: str, extra: str
) -> None:
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['pyarrow', 'h5py', 'zarr', 'scipy', 'pandas']))\n"
        "import hookx; [hookx.export('features', 'fc', f'b.{suffix}') for suffix in ('npy', 'npz', 'csv')]\n"
        f"sys.argv = ['hookx', 'export', 'features', '--layer', 'fc', '--to', 'a{suffix}']\n"
        "from hookx.cli import main; main()"
    )
    done = subprocess.run([*warm.python("torch"), "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: {suffix} files need {package}, which is not installed\n"
        f"  install it as an extra of hookx: pip install 'hookx-vision[{extra}]'\n"
    )
    assert names_in(tmp_path) == {"features", "b.npy", "b.keys.csv", "b.npz", "b.csv"}


def test_a_run_that_is_not_finished_is_refused_unless_it_is_asked_for(tmp_path: Path) -> None:
    run = write_run(tmp_path / "features", {"fc": torch.ones(10, 2)}, shards=2)
    arguments = ["export", str(run), "-l", "fc", "--to", str(tmp_path / "a.npy")]
    error = CliRunner().invoke(app, arguments).exception
    assert isinstance(error, StoreError) and "is not finished: 2 of 4 shards" in str(error)
    assert CliRunner().invoke(app, [*arguments, "--partial"]).exit_code == 0
    assert len(by_numpy(tmp_path / "a.npy")[1]) == 6


def test_the_command_prints_what_it_wrote_as_a_person_a_program_or_a_pipe_reads_it(run: Path, tmp_path: Path) -> None:
    def output(name: str, *options: str) -> str:
        arguments = ["export", str(run), "--layer", "map.bfloat16", "--to", str(tmp_path / name), *options]
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        note = "bfloat16 is written as float32, which holds the same values: the format has no bfloat16\n"
        assert result.stderr == ("" if "--quiet" in options else note)
        return result.stdout

    printed = output("a.npy").splitlines()
    keys_bytes = (tmp_path / "a.keys.csv").stat().st_size
    assert printed == [
        f"map.bfloat16  7,2,3,4  float32  {(tmp_path / 'a.npy').stat().st_size + keys_bytes} bytes",
        "images  7 stored, 4 could not be read, and are not in it",
        f"result  {tmp_path / 'a.npy'}",
        f"result  {tmp_path / 'a.keys.csv'}",
    ]
    assert output("b.npy", "--quiet") == f"{tmp_path / 'b.npy'}\n{tmp_path / 'b.keys.csv'}\n"
    document = json.loads(output("c.zarr", "--json"))
    assert (document["layer"], document["shape"], document["dtype"]) == ("map.bfloat16", [7, 2, 3, 4], "float32")
    assert (document["failures"], document["files"]) == (4, [str(tmp_path / "c.zarr")])
    assert document["bytes"] == sum(file.stat().st_size for file in (tmp_path / "c.zarr").rglob("*") if file.is_file())
