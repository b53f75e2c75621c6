"""No name of a file becomes a formula in a spreadsheet, and every name comes back unchanged."""

from __future__ import annotations

import csv
import io
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hookx
from hookx.check.verify import verify
from hookx.cli.completion import keys
from hookx.exporting import export
from hookx.plan import LayerSpec
from hookx.store.directory import RunDirectory
from hookx.store.record import ShardRecord
from hookx.store.tables import from_field, line, read_rows, table, to_field
from kit.runs import plan_of, random_rows
from kit.shards import publish

# The beginnings that OWASP names, each also behind what programs take away.
DANGEROUS = [
    "=",
    "+",
    "-",
    "@",
    "\t",
    "\r",
    "\n",
    "\uff1d",
    "\uff0b",
    "\uff0d",
    "\uff20",
    " =",
    '"=',
    "\ufeff=",
    "\u00a0@",
]
FORMULAS = [f"{beginning}cmd|' /C calc'!A{number}.png" for number, beginning in enumerate(DANGEROUS)]
OTHERS = ["'quoted'.png", "''.png", "'=1.png", "plain.png", "a=b.png", 'with "quotes", and commas.png', "caf\udce9.png"]
NAMES = sorted([*FORMULAS, *OTHERS], key=os.fsencode)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_name_that_a_spreadsheet_takes_for_a_formula_begins_with_an_apostrophe(name: str) -> None:
    assert to_field(name) == f"'{name}"


@pytest.mark.parametrize("name", ["plain.png", "a=b.png", "9+1.png", "_-.png", "ä.png", "(=).png"])
def test_any_other_name_is_as_it_was(name: str) -> None:
    assert to_field(name) == name and line([name, 3]) == f"{name},3\n".encode()


@given(st.lists(st.tuples(st.text(), st.text()), max_size=5))
def test_every_text_comes_back_unchanged_and_no_field_begins_a_formula(texts: list[tuple[str, str]]) -> None:
    texts = [(one.replace("\0", ""), other) for one, other in texts]
    texts = [(re.sub("[\ud800-\udfff]", "", one), re.sub("[\0\ud800-\udfff]", "", other)) for one, other in texts]
    content = b"".join(table(("key", "reason"), texts)).decode()
    assert list(read_rows(io.StringIO(content, newline=""))) == [list(row) for row in texts]
    for row in csv.reader(io.StringIO(content, newline="")):
        assert not any(re.match("[=+\\-@\t\r\uff1d\uff0b\uff0d\uff20]", field) for field in row)
    assert all(from_field(to_field(text)) == text for row in texts for text in row)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    plan = plan_of((LayerSpec("fc", (2,), "float32"),), len(NAMES) + 1)
    path = tmp_path / "features"
    with RunDirectory(path, plan) as directory:
        record = ShardRecord(NAMES, [("=failed.png", "=HYPERLINK(0): cut")], sizes_bytes=[1] * (len(NAMES) + 1))
        publish(directory, plan.shards[0], random_rows(plan, len(NAMES)), record)
        directory.publish_index()
    return path


def fields_of(file: Path) -> list[list[str]]:
    with open(file, newline="", encoding="utf-8", errors="surrogateescape") as opened:
        return list(read_rows(opened))


def test_no_table_that_hookx_writes_holds_a_formula_and_all_hold_the_names(run: Path, tmp_path: Path) -> None:
    export(run, "fc", tmp_path / "fc.csv")
    export(run, "fc", tmp_path / "fc.npy")
    tables = [run / "index.csv", tmp_path / "fc.csv", tmp_path / "fc.keys.csv"]
    for file in tables:
        assert [row[0] for row in fields_of(file)] == NAMES, file
    assert fields_of(run / "failures.csv") == [["=failed.png", "=HYPERLINK(0): cut"]]
    for file in [*tables, run / "failures.csv"]:
        with open(file, newline="", encoding="utf-8", errors="surrogateescape") as opened:
            assert not any(field[:1] in DANGEROUS for row in csv.reader(opened) for field in row[:1])
    assert hookx.open(run).keys_of_rows == NAMES
    assert {"=failed.png"} == set(hookx.open(run).failures)


def test_a_shell_is_offered_the_names_themselves(run: Path) -> None:
    assert set(keys(run, "=")) == {name for name in NAMES if name.startswith("=")}


def test_tables_of_an_earlier_version_are_right_and_stay_so_until_they_are_written_again(run: Path) -> None:
    problems = [problem for problem in verify(run).problems if problem.file.endswith(".csv")]
    assert problems == []
    for file in (run / "index.csv", run / "failures.csv"):
        with open(file, newline="", encoding="utf-8", errors="surrogateescape") as opened:
            header, *rows = csv.reader(opened)
        file.write_bytes(
            b"".join(table(header, [[from_field(field) for field in row] for row in rows], as_fields=False))
        )
    assert "'=" not in (run / "failures.csv").read_text()
    assert [problem for problem in verify(run).problems if problem.file.endswith(".csv")] == []
