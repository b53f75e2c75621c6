"""Tables on a terminal: a name is never broken, whatever the terminal's width."""

from __future__ import annotations

import re
import sys

import pytest

from hookx.cli.reports import print_rows

NAME = "encoder.layers.encoder_layer_0.self_attention.out_proj"
HEADER = ("layer", "class", "output", "parameters", "calls")
ROW = (NAME, "NonDynamicallyQuantizableLinear", "out/int=0:(197,768) out/int=1:(197,197)", "590,592", "never called")


def printed_on_a_terminal(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, header: tuple[str, ...] = HEADER
) -> str:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    print_rows([ROW], header=header, right_aligned=(3,))
    return re.sub(r"\x1b\[\d+m", "", capsys.readouterr().out)


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 100, 120, 160, 200])
@pytest.mark.parametrize("header", [HEADER, ()])
def test_a_table_breaks_no_name(
    columns: int, header: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = printed_on_a_terminal(columns, capsys, monkeypatch, header)
    assert NAME in text and "…" not in text
    for cell in ROW:
        for word in cell.split():
            named = HEADER[ROW.index(cell)] in text.partition("not shown")[2]
            assert word in text or named, (word, text)


@pytest.mark.parametrize("columns", [80, 100, 120, 160])
def test_a_table_with_a_header_is_no_wider_than_the_terminal(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = printed_on_a_terminal(columns, capsys, monkeypatch).partition("  not shown")[0]
    assert max(map(len, table.splitlines())) <= columns


def test_what_a_tight_table_leaves_of_the_width_is_used(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for columns in range(105, 165):
        table = printed_on_a_terminal(columns, capsys, monkeypatch).partition("  not shown")[0]
        lines = [line for line in table.splitlines() if "out/int" in line]
        # Two words that fit in a line stand in one.
        assert len(lines) <= 1 or columns - max(map(len, lines)) < len("out/int=0:(197,768)") + 1, columns


def test_columns_that_do_not_fit_are_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not shown in 80 columns: class, output, parameters, calls" in printed_on_a_terminal(80, capsys, monkeypatch)
    assert "not shown" not in printed_on_a_terminal(200, capsys, monkeypatch)
