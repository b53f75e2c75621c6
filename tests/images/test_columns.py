"""What tables, sidecars and folders say about images: read whole, in the order of the images, and of the right kind."""

from __future__ import annotations

import io
import json
import random
import tarfile
import tracemalloc
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from hookx.errors import ImageError, UsageError
from hookx.images.columns import Gathered, Values
from hookx.images.listing import Choice, ImageList, list_images
from hookx.images.opening import open_image

Rows = list[dict[str, Any]]


def columns_of(images: ImageList) -> dict[str, list[Any]]:
    return {column.name: list(column) for column in images.columns}


def kinds_of(images: ImageList) -> dict[str, str]:
    return {column.name: column.kind for column in images.columns}


def write_csv(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


def tar_of(archive: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(archive, "w") as packed:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            packed.addfile(member, io.BytesIO(content))
    return archive


def zip_of(archive: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members:
            packed.writestr(name, content)
    return archive


def test_columns_follow_their_images_whatever_the_order_of_the_rows(tmp_path: Path) -> None:
    numbers = list(range(5_000))
    random.Random(0).shuffle(numbers)
    lines = [json.dumps({"path": f"{number:05}.png", "n": number, "half": number / 2}) for number in numbers]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    images = list_images([tmp_path / "t.jsonl"], packed_at_once=100)
    assert columns_of(images) == {"n": list(range(5_000)), "half": [number / 2 for number in range(5_000)]}
    chosen = list_images([tmp_path / "t.jsonl"], choice=Choice(sample=300, seed=3))
    assert columns_of(chosen)["n"] == [int(key[:5]) for key in chosen.keys]


@pytest.mark.parametrize(
    ("texts", "kind", "values"),
    [
        (["1", "-2", ""], "int", [1, -2, None]),
        (["1", "2.50", "1e3"], "float", [1.0, 2.5, 1000.0]),
        (["007", "1", "2"], "text", ["007", "1", "2"]),
        (["9223372036854775807", "0", "-9223372036854775808"], "int", [2**63 - 1, 0, -(2**63)]),
        (["9223372036854775808", "0", "1"], "text", ["9223372036854775808", "0", "1"]),
        (["nan", "1", "2"], "text", ["nan", "1", "2"]),
        (["true", "false", ""], "text", ["true", "false", None]),
        (["", "", ""], "text", [None, None, None]),
    ],
)
def test_a_table_without_types_holds_numbers_if_every_field_is_one(
    texts: list[str], kind: str, values: list[Any], tmp_path: Path
) -> None:
    rows = "".join(f"{name}.png,{text}\n" for name, text in zip("abc", texts, strict=True))
    images = list_images([write_csv(tmp_path / "t.csv", f"path,x\n{rows}")])
    assert (kinds_of(images), columns_of(images)) == ({"x": kind}, {"x": values})


@pytest.mark.parametrize(
    ("given_values", "kind", "values"),
    [
        ([1, None, 3], "int", None),
        ([1, 2.5, None], "float", [1.0, 2.5, None]),
        ([True, None, False], "bool", None),
        (["007", "1", ""], "text", None),
        ([True, 1, "x"], "text", ["true", "1", "x"]),
        ([2**70, 1, 2], "text", [str(2**70), "1", "2"]),
        ([{"a": [1]}, ["é"], None], "text", ['{"a": [1]}', '["é"]', None]),
        (["\ud800", "a", "b"], "text", ["\\ud800", "a", "b"]),
    ],
)
def test_a_table_with_types_keeps_them(
    given_values: list[Any], kind: str, values: list[Any] | None, tmp_path: Path
) -> None:
    rows = [{"path": f"{name}.png", "x": value} for name, value in zip("abc", given_values, strict=True)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    images = list_images([tmp_path / "t.jsonl"])
    assert (kinds_of(images), columns_of(images)) == ({"x": kind}, {"x": given_values if values is None else values})


scalars = st.none() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.booleans() | st.text()


@settings(max_examples=50)
@given(st.lists(st.lists(scalars, min_size=1, max_size=4), min_size=1, max_size=5), st.randoms())
def test_what_is_gathered_comes_back_in_any_order(blocks: list[list[Any]], chance: random.Random) -> None:
    gathered, values, numbers = Gathered(), list[Any](), list[int]()
    for block in blocks:
        first = gathered.add(Values({"x": block}), len(block))
        numbers += range(first, first + len(block))
        values += block
        gathered.add(Values({"another": [0]}), 1)  # Images of which nothing is known here.
    order = [chance.choice([*numbers, -1]) for _ in numbers]
    column = next(column for column in gathered.in_order(order) if column.name == "x")
    by_number = dict(zip(numbers, values, strict=True)) | {-1: None}
    expected = [by_number[number] for number in order]
    if column.kind == "float":
        expected = [None if value is None else float(value) for value in expected]
    if column.kind == "text":
        assert [value is None for value in column] == [value is None for value in expected]
    else:
        assert list(column) == expected


def test_tables_with_other_columns_and_folders_without_any_are_read_side_by_side(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "b.png").touch()
    one = write_csv(tmp_path / "one.csv", "path,x,y\na.png,1,left\n")
    other = write_csv(tmp_path / "two.csv", "path,y,z\nc.png,right,0.5\n")
    images = list_images([one, tmp_path / "photos", other])
    assert list(images.keys) == ["a.png", "b.png", "c.png"]
    assert columns_of(images) == {"x": [1, None, None], "y": ["left", None, "right"], "z": [None, None, 0.5]}


def test_fields_are_those_of_the_header_however_long_a_row_is(tmp_path: Path) -> None:
    images = list_images([write_csv(tmp_path / "t.csv", ',path,x\n0,a.png\n1,b.png,"2,\n3",4\n\n2,c.png,""\n')])
    assert columns_of(images) == {"column 1": [0, 1, 2], "x": [None, "2,\n3", None]}
    with pytest.raises(ImageError, match="has two columns 'x'"):
        list_images([write_csv(tmp_path / "t.csv", "path,x,x\na.png,1,2\n")])


def test_columns_are_chosen_by_name(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "t.csv", "path,id,x,y\na.png,1,2,3\n")
    assert columns_of(list_images([table], columns=("y", "path"))) == {"path": ["a.png"], "y": [3]}
    assert list(columns_of(list_images([table], columns=()))) == []
    assert list(columns_of(list_images([table], key_column="id"))) == ["path", "x", "y"]
    with pytest.raises(UsageError, match="there is no column 'yy'; closest: y"):
        list_images([table], columns=("yy",))
    with pytest.raises(UsageError, match="there is no column 'label'; no source has any"):
        (tmp_path / "a.png").touch()
        list_images([tmp_path / "a.png"], columns=("label",))


def test_the_folder_of_an_image_is_its_label(tmp_path: Path) -> None:
    for name in ("cats/deep/a.png", "dogs/b.png", "c.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).touch()
    images = list_images([tmp_path / "photos"], label="parent")
    assert dict(zip(images.keys, columns_of(images)["label"], strict=True)) == {
        "c.png": None,
        "cats/deep/a.png": "deep",
        "dogs/b.png": "dogs",
    }
    table = write_csv(tmp_path / "t.csv", "path,label\na.png,1\n")
    with pytest.raises(UsageError, match="--label gives a column 'label', and the sources have one"):
        list_images([table], label="parent")
    assert kinds_of(list_images([table], label="parent", columns=())) == {"label": "text"}


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_the_metadata_of_an_imagefolder_belongs_to_the_images_of_its_folder(suffix: str, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for name in ("a.png", "train/b.png", "train/deep/c.png", "test/d.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    rows = [{"file_name": name, "x": number} for number, name in enumerate(("deep/c.png", "./b.png", "gone.png"))]
    table = pd.DataFrame(rows)
    if suffix == "csv":
        table.to_csv(folder / "train" / "metadata.csv", index=False)
    elif suffix == "jsonl":
        table.to_json(folder / "train" / "metadata.jsonl", orient="records", lines=True)
    else:
        table.to_parquet(folder / "train" / "metadata.parquet")
    (folder / "test" / "metadata.csv").write_text("name,x\nd.png,3\n")
    images, plain = list_images([folder]), list_images([folder], columns=())
    assert dict(zip(images.keys, columns_of(images)["x"], strict=True)) == {
        "a.png": None,
        "test/d.png": None,
        "train/b.png": 1,
        "train/deep/c.png": 0,
    }
    assert images.sha256 == plain.sha256 and list(images.files) == list(plain.files)
    assert images.remarks.not_taken == {".csv": 1, "rows of metadata without an image": 1}
    assert plain.remarks.not_taken == ({".csv": 2} if suffix == "csv" else {".csv": 1, f".{suffix}": 1})
    (folder / "test" / "metadata.csv").write_text("file_name,x\nd.png,3\nd.png,4\n")
    with pytest.raises(ImageError, match=r"names 'test/d\.png' twice"):
        list_images([folder])


@pytest.mark.parametrize("pack", [tar_of, zip_of])
def test_members_of_a_sample_say_more_about_its_images(pack: Any, tmp_path: Path) -> None:
    members = [
        ("x/00.jpg", b"image"),
        ("x/00.cls", b"7\n"),
        ("x/00.json", b'{"caption": "caf\xc3\xa9", "cls": 9, "nested": {"a": 1}}'),
        ("x/01.txt", b"two\nlines\n"),
        ("x/01.left.png", b"image"),
        ("x/01.right.png", b"image"),
        ("y/00.png", b"image"),
        ("y/00.json", b"{"),
        ("x/02.txt", b"of no image"),
        ("README.md", b"nothing"),
    ]
    archive = pack(tmp_path / f"a.{'tar' if pack is tar_of else 'zip'}", members)
    images = list_images([archive])
    assert [key.partition("/")[2] for key in images.keys] == ["x/00.jpg", "x/01.left.png", "x/01.right.png", "y/00.png"]
    assert columns_of(images) == {
        "caption": ["café", None, None, None],
        "cls": [7, None, None, None],
        "nested": ['{"a": 1}', None, None, None],
        "txt": [None, "two\nlines", "two\nlines", None],
        "json": [None, None, None, "{"],
    }
    assert images.remarks.not_taken == {".txt": 1, ".md": 1}
    plain = list_images([archive], columns=())
    assert not plain.columns and plain.sha256 == images.sha256
    assert plain.remarks.not_taken == {".txt": 2, ".md": 1, ".json": 2, ".cls": 1}
    assert list(columns_of(list_images([archive], columns=("txt",)))) == ["txt"]


# --- images within a table ------------------------------------------------------------------------------------------


def embedded(thumbnails: Path, *, path: Any = lambda file: file.name) -> Rows:
    files = sorted(thumbnails.rglob("*.png"), key=lambda file: file.name[::-1])
    return [
        {"image": {"bytes": file.read_bytes(), "path": path(file)}, "label": file.parent.name, "n": number}
        for number, file in enumerate(files)
    ]


def write_parquet(file: Path, rows: Rows, **how: Any) -> Path:
    parquet.write_table(pa.Table.from_pylist(rows), file, **how)
    return file


def contents(images: ImageList) -> dict[str, bytes]:
    found = {}
    for key, file, size_bytes in zip(images.keys, images.files, images.sizes_bytes, strict=True):
        with open_image(file, size_bytes) as content:
            found[key] = content.read()
    return found


def test_images_within_a_table_are_those_of_the_folder(thumbnails: Path, tmp_path: Path) -> None:
    rows = embedded(thumbnails, path=lambda file: str(file.relative_to(thumbnails)))
    loose = {f"t.parquet/{key}": content for key, content in contents(list_images([thumbnails])).items()}
    images = list_images([write_parquet(tmp_path / "t.parquet", rows, row_group_size=5)])
    assert contents(images) == loose and list(images.keys) == list(loose)
    assert columns_of(images)["label"] == [key.split("/")[1] for key in images.keys]
    for seed in range(3):  # in any order, as several workers read
        places = random.Random(seed).sample(range(len(images)), len(images))
        for place in places:
            with open_image(images.files[place], images.sizes_bytes[place]) as content:
                assert content.read() == loose[images.keys[place]]


@pytest.mark.parametrize("path", [lambda file: "image.png", lambda file: None])
def test_images_without_paths_of_their_own_are_named_by_their_rows(path: Any, thumbnails: Path, tmp_path: Path) -> None:
    rows = embedded(thumbnails, path=path)
    images = list_images([write_parquet(tmp_path / "t.parquet", rows)])
    assert list(images.keys) == [f"t.parquet/{row:02}" for row in range(24)]
    assert list(contents(images).values()) == [row["image"]["bytes"] for row in rows]
    by_id = list_images([tmp_path / "t.parquet"], key_column="n")
    assert {key: int(key) for key in by_id.keys} == {str(row["n"]): row["n"] for row in rows}
    assert contents(by_id) == {str(row["n"]): row["image"]["bytes"] for row in rows}


def test_bytes_in_a_plain_column_and_rows_without_an_image(thumbnails: Path, tmp_path: Path) -> None:
    file = next(thumbnails.rglob("*.png"))
    images_in_rows = (file.read_bytes(), None, b"")
    rows = [{"jpg": content, "other": b"x", "n": number} for number, content in enumerate(images_in_rows)]
    table = write_parquet(tmp_path / "t.parquet", rows)
    images = list_images([table], path_column="jpg")
    assert list(contents(images)) == ["t.parquet/0"] and columns_of(images) == {"n": [0]}
    assert images.remarks.not_taken == {"rows without an image": 2}


def test_a_table_of_images_that_changed_is_not_read(thumbnails: Path, tmp_path: Path) -> None:
    rows = embedded(thumbnails)
    images = list_images([write_parquet(tmp_path / "t.parquet", rows)])
    write_parquet(tmp_path / "t.parquet", rows[:-1])
    with pytest.raises(Exception, match="its archive changed since it was listed"):
        contents(images)


def test_a_table_of_images_is_listed_and_read_in_memory_that_is_bounded(tmp_path: Path) -> None:
    content = random.Random(0).randbytes(100_000)
    rows = [{"image": {"bytes": content, "path": f"{number}.png"}, "n": number} for number in range(1_000)]
    write_parquet(tmp_path / "t.parquet", rows, row_group_size=1_000, compression="none", use_dictionary=False)
    del rows
    list_images([tmp_path / "t.parquet"])  # Imports what it needs.
    pool = pa.default_memory_pool()
    before = pool.max_memory()
    tracemalloc.start()
    images = list_images([tmp_path / "t.parquet"])
    for place in range(0, 1_000, 100):
        with open_image(images.files[place], images.sizes_bytes[place]) as opened:
            assert opened.read() == content
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6 and pool.max_memory() - before < 60e6  # of 100 MB of images in one row group
