"""What the documents show is what happens: README commands and examples, configurations, scripts.

`python tests/test_docs.py` writes the real output of every command into README.md.
"""

from __future__ import annotations

import contextlib
import doctest
import json
import os
import re
import shutil
import subprocess
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

import hookx
from hookx.cli.app import app
from kit import warm

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
COMMANDS = list(get_command(app).commands)  # type: ignore[attr-defined]
_BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)


def outputs(block: str, folder: Path) -> str:
    """Run the `$ ` lines of a console block and return the block with what they print now."""
    environment = {**os.environ, "PATH": warm.path(), "COLUMNS": "110"}
    lines = []
    for command in re.findall(r"^\$ (.*)$", block, re.MULTILINE):
        with tempfile.NamedTemporaryFile() as printed:
            subprocess.run(command, shell=True, cwd=folder, env=environment, stdout=printed, stderr=printed)
            lines.append(f"$ {command}\n{Path(printed.name).read_text()}")
    return "".join(lines)


def without_measurements(text: str) -> str:
    text = re.sub(r"^(time|made|python|torch|torchvision|safetensors|pillow|CUDA) .*$", r"\1", text, flags=re.MULTILINE)
    text = re.sub(r"^(\w+ .*B) .*%.*$", r"\1", text, flags=re.MULTILINE)  # statistics, rounded by the machine
    return re.sub(r"to write, .* free", "to write, some free", text)


def workplace(folder: Path) -> Path:
    (folder / "images").symlink_to(ROOT / "images")
    return folder


@dataclass(frozen=True)
class Tried:
    """Where the commands of the README were run, and each block of them, with what it shows and what it printed."""

    folder: Path
    blocks: list[tuple[str, str]]


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Tried:
    folder = workplace(tmp_path_factory.mktemp("readme"))
    first, *others = _BLOCK.findall(README.read_text())
    printed = [outputs(first, folder)]  # It makes features/, which the others read.
    with ThreadPoolExecutor(2) as two_at_a_time:
        printed += two_at_a_time.map(lambda block: outputs(block, folder), others)
    return Tried(folder, list(zip([first, *others], printed, strict=True)))


def test_the_readme_shows_what_its_commands_print(tried: Tried) -> None:
    for shown, printed in tried.blocks:
        assert without_measurements(printed) == without_measurements(shown)


def test_the_figure_in_the_readme_is_what_its_command_draws(tried: Tried) -> None:
    [out] = re.findall(r"^\$ hookx visualize .*vgg11.* -o (\S+)", README.read_text(), re.MULTILINE)
    figure, drawn = (
        np.asarray(Image.open(file).convert("RGB")).astype(int)
        for file in (ROOT / "figures" / "feature-maps.png", tried.folder / out / "overview.png")
    )
    assert figure.shape == drawn.shape
    # Another order of the same sums, another version of the letters.
    assert (np.abs(figure - drawn).max(-1) > 8).mean() < 0.01


def test_the_examples_of_the_readme_print_what_it_shows(tried: Tried, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tried.folder)
    examples = "".join(re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL))
    test = doctest.DocTestParser().get_doctest(examples, {}, "README", str(README), 0)
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test)
    assert result.attempted > 10 and result.failed == 0


def test_the_readme_says_what_the_command_line_says() -> None:
    text = README.read_text()
    assert all(f"| {code} |" in text for code in ("0", "1", "2", "3", "130, 143"))
    helps = [
        CliRunner().invoke(app, arguments).stdout for arguments in (["--help"], *([c, "--help"] for c in COMMANDS))
    ]
    for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", re.sub(r"```bash.*?```", "", text, flags=re.DOTALL)):
        assert any(option in help_text for help_text in helps), option


def examples_in_help(command: str) -> list[str]:
    """Return the examples that a command's help shows, as they can be copied from a narrow terminal."""
    text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "60"}).stdout
    _, _, below = text.partition("\n  Examples:\n")
    return re.findall(r"^    (\S.*)$", below.partition("\n\n")[0], re.MULTILINE)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = workplace(tmp_path_factory.mktemp("examples"))
    with contextlib.chdir(folder):
        hookx.extract("resnet18", "conv1,avgpool", "images/", weights="none")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_shows_three_examples_or_more_that_run(
    command: str, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run them where images/ and features/ are; without a network, so with random weights where none are named."""
    examples = examples_in_help(command)
    assert len(examples) >= 3 and len(set(examples)) == len(examples)
    folder = tmp_path / "copy"
    shutil.copytree(finished_run, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", warm.path())
    monkeypatch.setenv("HOOKX_WEIGHTS", "none")
    for example in examples:
        assert f"hookx {command} " in f"{example} "
        assert len(example) <= 90
        printed = tmp_path / "printed"
        with printed.open("w") as both:
            done = subprocess.run(["bash", "-o", "pipefail", "-c", example], stdout=both, stderr=both, timeout=200)
        assert done.returncode == 0, (example, printed.read_text())


CONFIGURATIONS = sorted((ROOT / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_a_configuration_is_a_complete_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    arguments = ["extract", "--config", str(path), "--weights", "none", "--dry-run", "--json", "--out", "nowhere"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    document = json.loads(result.stdout)
    asked = tomllib.loads(path.read_text())
    assert document["model"] == asked["model"] and document["images"] == 8 and document["layers"]


def test_scripts_say_what_they_are_for_and_can_be_run() -> None:
    for script in filter(Path.is_file, (ROOT / "scripts").iterdir()):
        assert os.access(script, os.X_OK), script
        assert script.read_text().splitlines()[1].startswith(("# ", '"""')), script


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        place = workplace(Path(scratch))
        README.write_text(_BLOCK.sub(lambda match: f"```console\n{outputs(match[1], place)}```", README.read_text()))
    warm.end()
