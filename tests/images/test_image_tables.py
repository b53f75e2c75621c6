"""Tables that name images: the paths of a column, relative to the table, and keys of another."""

from __future__ import annotations

import csv
import json
import os
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

import hookx
from hookx.errors import ImageError
from hookx.images.listing import list_images
from hookx.images.mapped import map_list, write_list
from kit.runs import same_bits

SMALL: dict[str, Any] = {"weights": "none", "resize": 32, "crop": 32, "workers": 0}
Rows = Sequence[Mapping[str, Any]]


def write_csv(file: Path, rows: Rows, delimiter: str = ",") -> None:
    with open(file, "w", newline="", encoding="utf-8-sig") as opened:
        writer = csv.DictWriter(opened, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(file: Path, rows: Rows) -> None:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def write_parquet(file: Path, rows: Rows) -> None:
    parquet.write_table(pa.Table.from_pylist(list(map(dict, rows))), file)


WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    ".csv": write_csv,
    ".tsv": lambda file, rows: write_csv(file, rows, "\t"),
    ".jsonl": write_jsonl,
    ".parquet": write_parquet,
}


def rows_of(folder: Path, relative_to: Path, column: str = "path") -> list[dict[str, Any]]:
    """Return a row for each image, in an order that is not that of the keys."""
    files = sorted(folder.rglob("*.png"), key=lambda file: file.name[::-1])
    return [
        {"caption": 'a "nice",\n one', column: os.path.relpath(file, relative_to), "id": number}
        for number, file in enumerate(files)
    ]


def error_of(source: Path, **settings: Any) -> str:
    with pytest.raises(ImageError) as caught:
        list_images([source], **settings)
    return str(caught.value)


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("column", ["path", "file_name", "image", "image_path", "filepath", "filename"])
def test_a_table_lists_the_images_of_its_folder_as_the_folder_does(
    suffix: str, column: str, thumbnails: Path, tmp_path: Path
) -> None:
    (tmp_path / "photos").symlink_to(thumbnails)
    table = tmp_path / "photos" / f"../table{suffix}"
    WRITERS[suffix](tmp_path / f"table{suffix}", rows_of(tmp_path / "photos", tmp_path, column))
    images, loose = list_images([tmp_path / table.name]), list_images([tmp_path], root=tmp_path)
    assert list(images.keys) == list(loose.keys) and images.sha256 == loose.sha256
    assert all(os.path.samefile(str(one), str(other)) for one, other in zip(images.files, loose.files, strict=True))


def test_paths_of_a_table_are_relative_to_it_wherever_they_lead(
    thumbnails: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "a.png").touch()
    (tmp_path / "b.png").touch()
    paths = ["./a.png", "../b.png", str(thumbnails / "sky" / "hubble-0.png")]
    write_jsonl(tmp_path / "tables" / "t.jsonl", [{"path": path} for path in paths])
    monkeypatch.chdir(tmp_path)
    images = list_images(["tables/t.jsonl"])
    absolute = [f"{tmp_path}/b.png", paths[2]]
    assert sorted(images.keys) == sorted(["a.png", *(path.lstrip("/") for path in absolute)])
    assert {str(file) for file in images.files} == {f"{tmp_path}/tables/a.png", *absolute}
    images = list_images(["tables/t.jsonl"], root=tmp_path.parent.parent)
    assert any(key.endswith(f"{tmp_path.name}/tables/a.png") for key in images.keys)


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_column_of_keys_names_the_rows_of_a_run(suffix: str, thumbnails: Path, tmp_path: Path) -> None:
    rows = rows_of(thumbnails, tmp_path, "where")
    for row in rows:
        row["id"] = f"{row['id']:04}" if suffix != ".parquet" else row["id"] + 1000
    WRITERS[suffix](tmp_path / f"t{suffix}", rows)
    options: dict[str, Any] = {"path_column": "where", "key_column": "id"}
    hookx.extract("resnet18", "conv1", tmp_path / f"t{suffix}", out=tmp_path / "a", **options, **SMALL)
    hookx.extract("resnet18", "conv1", thumbnails, out=tmp_path / "b", **SMALL)
    assert not hookx.recompute(tmp_path / "a", 2, tmp_path / f"t{suffix}", **options).problems
    by_id, by_path = hookx.open(tmp_path / "a"), hookx.open(tmp_path / "b")
    assert list(by_id.keys_of_rows) == [str(row["id"]) for row in rows]
    for row in rows:
        path = os.path.relpath(tmp_path / row["where"], thumbnails)
        assert same_bits(by_id["conv1"].of(str(row["id"])), by_path["conv1"].of(path))


def test_a_mapped_list_keeps_the_paths_of_a_table_with_keys(thumbnails: Path, tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv", [{"path": "x y.png", "id": "b"}, {"path": "z.png", "id": "a"}])
    small = thumbnails / "sky"
    images = list_images([tmp_path / "t.csv", small], key_column="id", packed_at_once=2)
    write_list(images, tmp_path / "list")
    mapped = map_list(tmp_path / "list")
    assert list(mapped.files) == list(images.files) and list(mapped.keys) == list(images.keys)
    assert [mapped.files.was_found(position) for position in range(5)] == [False, False, True, True, True]
    assert list(images.files)[:2] == [f"{tmp_path}/z.png", f"{tmp_path}/x y.png"]
    assert list(images.files)[2:] == [f"{small}/hubble-{number}.png" for number in range(3)]


def test_what_a_table_cannot_mean_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"

    def after(text: str, **settings: Any) -> str:
        table.write_text(text)
        return error_of(table, **settings)

    assert after("id,name\n1,a.png\n").endswith("name the one that holds the paths: --path-column id")
    assert "has no column 'name_'; closest: name" in after("id,name\n1,a.png\n", path_column="name_")
    assert "has no column 'ids'; closest: id" in after("id,path\n1,a.png\n", key_column="ids")
    assert "row 2: hookx cannot read 'ftp://'" in after("path\na.png\nftp://example.org/b.png\n")
    assert "row 2: id is not a key: ''" in after("path,id\na.png,1\nb.png,\n", key_column="id")
    assert "two images have the key '1': " in after("path,id\na.png,1\nb.png,1\n", key_column="id")
    assert f"{tmp_path}/a.png and {tmp_path}/b.png" in after("path,id\na.png,1\nb.png,1\n", key_column="id")
    assert "two images have the key 'a.png'" in after("path\na.png\n./a.png\n")
    assert "has no rows" in after("path\n")
    assert "names 'b.tar', which is an archive" in after("path\na.png\nb.tar\n")
    table = tmp_path / "t.jsonl"
    assert "line 2, is not JSON" in after('{"path": "a.png"}\n{"path"\n')
    assert "line 1, is not an object" in after("[1]\n")
    table = tmp_path / "t.parquet"
    assert "is not a Parquet file that can be read" in after("PAR1")
    write_parquet(table, [{"left": b"x", "right": b"y"}])
    assert "holds bytes in the columns left, right" in error_of(table)
    write_parquet(table, [{"image": {"bytes": b"x", "path": "a.png"}, "id": 1}])
    assert "has no column 'ids'; closest: id" in error_of(table, key_column="ids")


def test_rows_without_a_path_are_counted(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,id\na.png,1\n,2\nb.png,3\n")
    images = list_images([tmp_path / "t.csv"])
    assert list(images.keys) == ["a.png", "b.png"] and images.remarks.not_taken == {"rows without a path": 1}


def test_a_parquet_table_is_read_in_bounded_memory(tmp_path: Path) -> None:
    count = 100_000
    columns = {"path": [f"{number:08}.png" for number in range(count)], "caption": ["x" * 2000] * count}
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet", row_group_size=10_000, use_dictionary=False)
    list_images([tmp_path / "t.parquet"])  # Imports what it needs.
    tracemalloc.start()
    images = list_images([tmp_path / "t.parquet"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(images) == count and peak < 400 * count  # The captions are 2,000 bytes each.
