"""The checker of the project's English finds each banned construction, where it is, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "prose.py"

BANNED = [
    "Of several types none was chosen.",
    "Read the plan. Of its layers, take the first.",
    "seed: of the random weights",
    "Read the files, of which some are damaged.",
    "It has the size as of a folder.",
    "what is no image",
    "'a.txt' is no file of this run",
    "The notes are no errors.",
    "the shard images are 0; it is 1 or more",
    "a number that is 3 at most",
    "One at the most.",
    "Copy now: that is what makes it safe.",
    "It waits in vain.",
    "It waits for ever.",
    "There are so many rows.",
    "a file that there cannot be",
    "nobody's bytes",
    "a model of one's own",
    "The end is told as a status.",
    "the last layer asked for",
    "weights that cannot be had",
    "A module can be without a name.",
    "This file system knows no links.",
    "random weights, said aloud",
    "It vanishes without a word.",
    "It rounds otherwise than Pillow.",
    "It can be named once only.",
    "Write a line an image.",
    "It is gone afterwards, also on an error.",
    "The pixels are well.",
    "A worker has died.",
    "The children died.",
    "with the command that began it",
    "A mistake of the user is one line.",
    "what there is to say of a model",
    "Tables are held against the shards.",
    "It imports nothing but for what completes a name.",
    "a run as it lies on the disk",
    "It is the one and the other.",
    "the entry that stands beside it",
    "the folder whence it came",
]
CLEAN = [
    "The weights of the model are a file of 40 MB.",
    "There is no image in this folder; it is no longer needed.",
    "Is there no GPU?",
    "The pass ends after the last layer that you asked for.",
    "It wrote 12 files, of which 3 are damaged.",
    "There are two or more calls.",
    "--top must be at least 1, got 0",
    "at most 4 processes: one per core",
    "A layer that the user requested is no larger than the last.",
    "Return the name of the file, the number of its rows, and which of them failed.",
    "As of version 2, a plan records the layout.",
    "So much memory that it swaps.",
    "These values are well-defined; the model knows nothing else.",
    "Even if a worker crashes, its images are computed.",
    "The letter A stands for an axis.",
    "Every forever-running process has an owner.",
]


@pytest.fixture(scope="module")
def prose() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        return import_module("prose")


@pytest.mark.parametrize("text", BANNED)
def test_a_banned_construction_is_found_in_a_comment_a_docstring_a_message_and_markdown(prose: Any, text: str) -> None:
    for file, source in [
        ("a.py", f"# {text}\n"),
        ("a.py", f'"""{text}"""\n'),
        ("src/a.py", f"print({text!r})\n"),
        ("a.md", f"{text}\n"),
    ]:
        assert [line for line, _, _ in prose.find_banned(Path(file), source)] == [1], (file, source)


@pytest.mark.parametrize("text", CLEAN)
def test_ordinary_english_is_not_found(prose: Any, text: str) -> None:
    for file, source in [("a.py", f"# {text}\n"), ("src/a.py", f'"""Name.\n\n{text}"""\n'), ("a.md", f"{text}\n")]:
        assert prose.find_banned(Path(file), source) == []


def test_every_pattern_has_an_example_in_this_file(prose: Any) -> None:
    unproved = [p for p in prose.BANNED if not any(prose.compile_pattern(p).search(text) for text in BANNED)]
    assert not unproved


def test_a_construction_is_found_on_its_line_across_line_breaks_and_inside_an_f_string(prose: Any) -> None:
    source = '''"""First line.

    A file that is
    no image.
    """

    # One line.
    # It waits in
    # vain.
    ROWS_AT_MOST = 3  # of one shard
    raise ValueError(f"'{name}' is {what}, and '{other}' is no {kind}")
    '''.replace("\n    ", "\n")
    found = prose.find_banned(Path("src/a.py"), source)
    assert [(line, words) for line, words, _ in found] == [
        (3, "is no"),
        (8, "in vain"),
        (10, "ROWS_AT_MOST"),
        (11, "is no"),
    ]


def test_only_docstrings_may_not_begin_with_tell_or_say(prose: Any) -> None:
    source = '"""Names."""\n\ndef f():\n    """Tell whether it is one."""\n    # Say nothing.\n'
    assert [line for line, _, _ in prose.find_banned(Path("a.py"), source)] == [4]


def test_code_in_markdown_and_in_examples_and_strings_of_tests_are_not_prose(prose: Any) -> None:
    markdown = "Write `what is no image` as:\n\n```text\nOf these, one is no image.\n```\n\nIt fails in vain.\n"
    assert [line for line, _, _ in prose.find_banned(Path("a.md"), markdown)] == [7]
    python = '"""Return it.\n\n>>> "what is no image"\n"""\n\nraised = "what is no image"\n'
    assert prose.find_banned(Path("tests/a.py"), python) == []


def test_the_script_prints_each_place_and_exits_with_1(tmp_path: Path) -> None:
    (tmp_path / "bad.md").write_text("Title\n\nIt waits in vain.\n")
    (tmp_path / "good.md").write_text("It times out.\n")
    done = subprocess.run([sys.executable, SCRIPT, *sorted(tmp_path.iterdir())], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == f"{tmp_path / 'bad.md'}:3: 'in vain': say what failed\n"
    assert "docs/contributing/style.md" in done.stderr
    assert subprocess.run([sys.executable, SCRIPT, tmp_path / "good.md"]).returncode == 0
