"""The columns of a run: beside every row in Python, in index.csv and in every export; they decide no activation."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import polars as pl
import pytest
import scipy.io
import zarr
from pyarrow import parquet
from torch.utils.data import DataLoader

import hookx
from hookx.errors import NotStoredError, ShardError, UsageError
from hookx.read.features import Features
from hookx.store.columns import COLUMNS, StoredColumns, free_names, open_columns, write_columns
from hookx.store.directory import read_plan
from kit.files import contents
from kit.runs import same_bits

SMALL: dict[str, Any] = {"weights": "none", "resize": 32, "crop": 32, "workers": 0, "shard_images": 5}
KINDS = {"n": "int", "weight": "float", "seen": "bool", "caption": "text", "key": "text", "some": "int", "rare": "text"}
UNREADABLE = ("b-text.jpg", "c-empty.png", "f-cut.png", "h-dangling.png")


def value_of(name: str, number: int) -> Any:
    """Return what the table says about the image with this number, when sorted by name."""
    return {
        "n": number - 5,
        "weight": number / 8,
        "seen": number % 2 == 0,
        "caption": f'=number, "{"é" * number}"\n',
        "key": f"k{number}",
        "some": number if number % 3 else None,
        "rare": "here" if number == 4 else None,
    }[name]


def write_table(file: Path, folder: Path, names: list[str] | None = None) -> Path:
    rows = [
        {"path": name.name} | {column: value_of(column, number) for column in names or KINDS}
        for number, name in enumerate(sorted(path for path in folder.iterdir() if path.suffix in (".png", ".jpg")))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    return file


@pytest.fixture(scope="module")
def folder(mixed_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of readable and unreadable images, with a table that says something about each."""
    folder = tmp_path_factory.mktemp("photos") / "mixed"
    shutil.copytree(mixed_folder, folder, symlinks=True)
    write_table(folder / "t.jsonl", folder)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "features"
    hookx.extract("resnet18", "avgpool,conv1", folder / "t.jsonl", out=out, **SMALL)
    return out


def expected(name: str, features: Features) -> list[Any]:
    names = sorted([*features.keys_of_rows, *features.failures])
    return [value_of(name, names.index(key)) for key in features.keys_of_rows]


def as_lists(features: Features) -> dict[str, list[Any]]:
    return {name: features.columns[name].tolist() for name in features.columns}


def test_a_column_has_the_value_of_every_row_whichever_images_failed(run: Path, folder: Path) -> None:
    features = hookx.open(run)
    assert set(features.failures) == set(UNREADABLE) and len(features.keys_of_rows) == 5
    assert dict(features.columns.kinds) == KINDS
    assert as_lists(features) == {name: expected(name, features) for name in KINDS}
    assert features.columns["n"].dtype == np.int64 and features.columns["weight"].dtype == np.float64
    assert features.columns["seen"].dtype == np.bool_ and features.columns["some"].dtype == object
    assert "captio" not in features.columns and features.columns.get("captio") is None
    with pytest.raises(NotStoredError, match="there is no column 'captio'; closest: caption"):
        features.columns["captio"]


def test_columns_are_read_for_any_stretch_of_rows(run: Path) -> None:
    columns = hookx.open(run).columns
    for name in columns:
        whole, some = columns.read(name)
        for start in range(6):
            for stop in range(start, 6):
                values, present = columns.read(name, slice(start, stop))
                is_there = np.ones(stop - start, bool) if present is None else present
                assert is_there.tolist() == (np.ones(5, bool) if some is None else some)[start:stop].tolist()
                assert [value for value, there in zip(values.tolist(), is_there, strict=True) if there] == [
                    value for value, there in zip(whole[start:stop].tolist(), is_there, strict=True) if there
                ]


def test_they_decide_no_activation_and_no_byte_of_a_shard(run: Path, folder: Path, tmp_path: Path) -> None:
    hookx.extract("resnet18", "avgpool,conv1", folder, out=tmp_path / "plain", **SMALL)
    plain, there = contents(tmp_path / "plain"), contents(run)
    assert set(there) - set(plain) == {COLUMNS}
    assert {name for name in plain if plain[name] != there[name]} == {"index.csv"}
    assert (
        not hookx.open(tmp_path / "plain").columns and repr(hookx.open(tmp_path / "plain").columns) == "<0 columns: >"
    )


def test_they_are_added_to_a_finished_run_and_replaced(run: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "features"
    hookx.extract("resnet18", "avgpool,conv1", folder, out=out, **SMALL)
    shards = {name: content for name, content in contents(out).items() if name.startswith("shard")}
    added = hookx.extract("resnet18", "avgpool,conv1", folder / "t.jsonl", out=out, **SMALL)
    assert added.shards_computed == 0 and contents(out) == contents(run)
    hookx.extract("resnet18", "avgpool,conv1", folder, out=out, label="parent", **SMALL)
    assert list(hookx.open(out).columns) == ["label"] and not hookx.verify(out).problems
    hookx.extract("resnet18", "avgpool,conv1", folder, out=out, **SMALL)  # says nothing about columns
    assert list(hookx.open(out).columns) == ["label"]
    assert {name: content for name, content in contents(out).items() if name.startswith("shard")} == shards


def test_parts_and_workers_write_the_same_columns(run: Path, folder: Path, tmp_path: Path) -> None:
    for shard in ("1/2", "0/2"):
        out = tmp_path / "parts"
        hookx.extract("resnet18", "avgpool,conv1", folder / "t.jsonl", out=out, shard=shard, **SMALL)
        partial = hookx.open(out, partial=True)
        assert as_lists(partial)["n"] == [value_of("n", int(key[0], 36) - 10) for key in partial.keys_of_rows]
    assert contents(tmp_path / "parts") == contents(run)


def test_the_index_holds_them_as_text_that_no_spreadsheet_runs(run: Path) -> None:
    features = hookx.open(run)
    with open(run / "index.csv", newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file))
    assert header == ["key", "shard", "row", "n", "weight", "seen", "caption", "columns.key", "some", "rare"]
    by_name = dict(zip(header[3:], zip(*[row[3:] for row in rows], strict=True), strict=True))
    assert by_name["n"] == tuple(map(str, expected("n", features)))
    assert by_name["seen"] == tuple(str(value).lower() for value in expected("seen", features))
    assert by_name["caption"] == tuple(f"'{value}" for value in expected("caption", features))
    assert by_name["some"] == tuple("" if value is None else str(value) for value in expected("some", features))


def test_a_join_keeps_the_values_of_its_rows(run: Path, folder: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for name in ("a.png", "e.png", "i.png"):
        shutil.copy(folder / name, few)
    hookx.extract("resnet18", "conv1", few, out=tmp_path / "few-run", **SMALL)
    both = hookx.join(hookx.open(run), hookx.open(tmp_path / "few-run"))
    assert list(both.keys) == ["a.png", "e.png", "i.png"] and not both.right.columns
    assert both.left.columns["key"].tolist() == ["k0", "k4", "k8"]
    again = hookx.join(both.left, both.left).right
    assert again.columns["rare"].tolist() == [None, "here", None]


def test_a_dataset_pairs_activations_with_targets(run: Path) -> None:
    features = hookx.open(run)
    dataset = features.dataset("avgpool", target="n")
    assert dataset.classes == () and [dataset[row][1] for row in range(5)] == expected("n", features)
    loader = DataLoader(dataset, batch_size=2, sampler=dataset.sampler(seed=1))
    found = {int(target): rows for batch, targets in loader for rows, target in zip(batch, targets, strict=True)}
    assert all(same_bits(found[n], row) for n, row in zip(expected("n", features), features["avgpool"][:], strict=True))
    named = features.dataset(["avgpool", "conv1"], target="key")
    assert named.classes == tuple(sorted(expected("key", features))) and named[0][1] == 0
    assert named[3][0].keys() == {"avgpool", "conv1"}
    with pytest.raises(UsageError, match=r"4 of 5 rows have no rare; the first: 'a\.png'"):
        features.dataset("avgpool", target="rare")


def test_pandas_gets_columns_and_activations_by_key(run: Path) -> None:
    features = hookx.open(run)
    table = features.to_pandas(["avgpool", "conv1"])
    assert list(table) == [*KINDS, "avgpool", "conv1"] and list(table.index) == list(features.keys_of_rows)
    assert np.array_equal(np.stack(table["conv1"]), features["conv1"].numpy())
    for name in KINDS:
        values = [None if pd.isna(value) else value for value in table[name]]
        assert values == expected(name, features)
    assert table["n"].dtype == "int64" and table["some"].dtype == "Int64"
    assert list(features.to_pandas("avgpool")["avgpool"].iloc[0].shape) == [512, 1, 1]


# --- exports ----------------------------------------------------------------------------------------------------------


def no_null(values: list[Any]) -> list[Any]:
    """Return what a format holds that cannot lack a value."""
    if None not in values:
        return values
    return (
        ["" if value is None else value for value in values]
        if "here" in values
        else [float("nan") if value is None else float(value) for value in values]
    )


def by_npz(file: Path) -> Iterator[tuple[str, list[Any]]]:
    with np.load(file, allow_pickle=False) as archive:
        yield from ((name, archive[f"columns/{name}"].tolist()) for name in KINDS)


def by_h5(file: Path) -> Iterator[tuple[str, list[Any]]]:
    with h5py.File(file) as hierarchy:
        for name, kind in KINDS.items():
            data = hierarchy["columns"][name]
            yield name, [text.decode() for text in data[:]] if kind == "text" else data[:].tolist()


def by_mat(file: Path) -> Iterator[tuple[str, list[Any]]]:
    columns = scipy.io.loadmat(file, chars_as_strings=True)["columns"]
    for name, kind in KINDS.items():
        data = columns[name][0, 0].astype(bool) if kind == "bool" else columns[name][0, 0]
        yield (
            name,
            [str(cell.item()) if cell.size else "" for (cell,) in data] if kind == "text" else data[:, 0].tolist(),
        )


def by_zarr(file: Path) -> Iterator[tuple[str, list[Any]]]:
    group: Any = zarr.open_group(file, mode="r")
    yield from ((name, group["columns"][name][:].tolist()) for name in KINDS)


READERS: dict[str, Callable[[Path], Iterator[tuple[str, list[Any]]]]] = {
    ".npz": by_npz,
    ".h5": by_h5,
    ".mat": by_mat,
    ".zarr": by_zarr,
}


@pytest.mark.parametrize("suffix", READERS)
def test_an_export_of_arrays_holds_the_columns(suffix: str, run: Path, tmp_path: Path) -> None:
    features = hookx.open(run)
    hookx.export(features, "avgpool", tmp_path / f"a{suffix}")
    for name, values in READERS[suffix](tmp_path / f"a{suffix}"):
        assert repr(values) == repr(no_null(expected(name, features))), name


def test_an_export_to_parquet_holds_the_columns_and_what_they_lack(run: Path, tmp_path: Path) -> None:
    features = hookx.open(run)
    hookx.export(features, "avgpool", tmp_path / "a.parquet")
    table = parquet.read_table(tmp_path / "a.parquet")
    assert table.column_names == ["key", "activation", "n", "weight", "seen", "caption", "columns.key", "some", "rare"]
    for name, written in zip(KINDS, table.column_names[2:], strict=True):
        assert table[written].to_pylist() == expected(name, features)
    assert pl.read_parquet(tmp_path / "a.parquet")["some"].dtype == pl.Int64


@pytest.mark.parametrize("suffix", [".csv", ".npy"])
def test_an_export_to_csv_and_the_keys_of_an_array_hold_the_columns(suffix: str, run: Path, tmp_path: Path) -> None:
    features = hookx.open(run)
    hookx.export(features, "avgpool", tmp_path / f"a{suffix}")
    table = pd.read_csv(tmp_path / ("a.csv" if suffix == ".csv" else "a.keys.csv"), keep_default_na=False)
    assert list(table)[:8] == ["key", "n", "weight", "seen", "caption", "columns.key", "some", "rare"]
    assert table["n"].tolist() == expected("n", features)
    assert table["rare"].tolist() == ["" if value is None else value for value in expected("rare", features)]


# --- what is wrong with them ------------------------------------------------------------------------------------------


def test_names_that_are_taken_are_told_apart() -> None:
    assert free_names(["key", "columns.key", "row", "x"], ["key", "row"]) == [
        "columns.key",
        "columns.columns.key",
        "columns.row",
        "x",
    ]


def test_verify_finds_every_damaged_byte_of_the_columns(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "features"
    shutil.copytree(run, out)
    file = out / COLUMNS
    content = file.read_bytes()
    for place in range(0, len(content), 7):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert {problem.file for problem in hookx.verify(out).problems} >= {COLUMNS}
    file.write_bytes(content[:-1])
    with pytest.raises(ShardError, match="is damaged"):
        dict(hookx.open(out).columns)
    file.write_bytes(content)
    assert not hookx.verify(out).problems


def test_the_columns_of_another_list_are_refused(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "features"
    shutil.copytree(run, out)
    (out / COLUMNS).unlink()
    write_columns(out / COLUMNS, [], 4)
    with pytest.raises(ShardError, match=r"columns\.safetensors is not that of the 9 images of this run"):
        open_columns(out, read_plan(out))


def test_a_run_goes_on_where_a_column_file_was_removed(run: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "features"
    shutil.copytree(run, out)
    (out / COLUMNS).unlink()
    assert [problem.file for problem in hookx.verify(out).problems] == ["index.csv"]
    hookx.extract("resnet18", "avgpool,conv1", folder / "t.jsonl", out=out, **SMALL)
    assert contents(out) == contents(run)


def test_inspect_and_the_summary_name_the_columns(run: Path, folder: Path) -> None:
    assert hookx.inspect(run).columns == KINDS
    summary = hookx.extract("resnet18", "avgpool,conv1", folder / "t.jsonl", out=run, **SMALL)
    assert summary.columns == KINDS
    assert "kept with the rows: 7 columns, n (int), weight (float)" in " ".join(summary.remarks.sentences())
    assert isinstance(open_columns(run, read_plan(run)), StoredColumns)
