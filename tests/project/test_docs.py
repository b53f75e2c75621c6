"""What the documents show is what happens: README, docs/, help, configurations, examples and scripts.

`python tests/project/test_docs.py [PAGE...]` writes the real output of every command into the pages, and the reference.

A block of ```console is run line by line, and what it prints is compared. A block of ```python is run, too: as a
doctest if it has prompts. Every page has a folder of its own, with images/ and, but for RUN_WITHOUT_FEATURES, the
finished run features/ of its first lines. A block that cannot be run says so: `<!-- not run: why -->`.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `kit`, when this file is run as a script

import hookx
from hookx.cli.app import app
from kit import warm

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference" / "command-line.md"
PAGES = [ROOT / "README.md", *sorted(file for file in (ROOT / "docs").rglob("*.md") if file != REFERENCE)]
RUN_WITHOUT_FEATURES = {"README.md", "docs/guides/first-run.md"}
MAX_BLOCKS_NOT_RUN = 12
# Flags of sbatch and torchrun, which pages name.
OF_OTHER_PROGRAMS = {"--array", "--cpus-per-task", "--gpus", "--no-python", "--nproc-per-node", "--requeue", "--signal"}
OF_OTHER_PROGRAMS |= {"--time"}
COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
_BLOCK = re.compile(r"(<!-- not run: .+ -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    is_run: bool


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks_of(page: Path) -> list[Block]:
    return [Block(language, text, not marked) for marked, language, text in _BLOCK.findall(page.read_text())]


# --- what the blocks print -----------------------------------------------------------------------------------------


def workplace(folder: Path, features: Path | None = None) -> Path:
    """Fill a folder with what a page's commands need."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("images", "configs", "examples", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    if features is not None:
        shutil.copytree(features, folder / "features", copy_function=os.link)  # Nothing writes into a shard.
    return folder


def search_path(folder: Path) -> str:
    """Return a PATH on which `hookx` and `python` are processes that have imported torch already."""
    folder.mkdir(exist_ok=True)
    (folder / "python").write_text(f'#!/bin/sh\nexec {shlex.join(warm.python("torch"))} "$@"\n')
    (folder / "python").chmod(0o755)
    return os.pathsep.join([str(folder), warm.path()])


def outputs(block: str, folder: Path) -> str:
    """Run the `$ ` lines of a console block and return the block with what they print now."""
    environment = {**os.environ, "PATH": search_path(folder / ".bin"), "COLUMNS": "110"}
    lines = []
    for command in re.findall(r"^\$ (.*)$", block, re.MULTILINE):
        with tempfile.NamedTemporaryFile() as printed:
            subprocess.run(command, shell=True, cwd=folder, env=environment, stdout=printed, stderr=printed)
            lines.append(f"$ {command}\n{Path(printed.name).read_text()}")
    return "".join(lines)


def run_console_blocks(page: Path, folder: Path, features: Path) -> list[tuple[str, str]]:
    """Run a page's commands in order; return each block as the page shows it, and as it is printed now."""
    workplace(folder, None if name_of(page) in RUN_WITHOUT_FEATURES else features)
    shown = [block.text for block in blocks_of(page) if block.language == "console" and block.is_run]
    return [(block, outputs(block, folder)) for block in shown]


def make_features(folder: Path) -> Path:
    with contextlib.chdir(ROOT):
        hookx.extract("resnet18", "conv1,avgpool", "images/", weights="none", out=folder / "features")
    return folder / "features"


def without_measurements(text: str) -> str:
    text = re.sub(r"^(time|made|python|torch|torchvision|safetensors|pillow|CUDA) .*$", r"\1", text, flags=re.MULTILINE)
    text = re.sub(r"^(\w+ .*B) .*%.*$", r"\1", text, flags=re.MULTILINE)  # statistics, rounded by the machine
    return re.sub(r"to write, .* free", "to write, some free", text)


@dataclass(frozen=True)
class Tried:
    """Where a page's commands were run, and each of its console blocks with what it printed."""

    folder: Path
    blocks: list[tuple[str, str]]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_features(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory, finished_run: Path) -> Iterator[Mapping[Path, Future[Tried]]]:
    """Run the commands of all pages, two pages at a time; the longest pages first."""
    place = tmp_path_factory.mktemp("pages")

    def try_page(page: Path) -> Tried:
        folder = place / name_of(page).replace("/", "-")
        return Tried(folder, run_console_blocks(page, folder, finished_run))

    two_at_a_time = ThreadPoolExecutor(2)
    by_length = sorted(PAGES, key=lambda page: -page.read_text().count("\n$ hookx"))
    yield {page: two_at_a_time.submit(try_page, page) for page in by_length}
    two_at_a_time.shutdown(cancel_futures=True)  # Some tests, run alone, need one page only.


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_shows_what_its_commands_print(page: Path, tried: Mapping[Path, Future[Tried]]) -> None:
    for shown, printed in tried[page].result().blocks:
        assert without_measurements(printed) == without_measurements(shown)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(block.language == "python" for block in blocks_of(page))], ids=name_of
)
def test_the_python_of_a_page_runs_and_prints_what_it_shows(
    page: Path, tried: Mapping[Path, Future[Tried]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tried[page].result().folder)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.language != "python" or not block.is_run:
            continue
        if ">>>" not in block.text:
            exec(compile(block.text, str(page), "exec"), names)
            continue
        example = doctest.DocTestParser().get_doctest(block.text, names, name_of(page), str(page), 0)
        report = io.StringIO()
        runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
        assert not runner.run(example, out=report.write, clear_globs=False).failed, report.getvalue()
        names.update(example.globs)


def test_the_figure_is_what_its_command_draws(tried: Mapping[Path, Future[Tried]]) -> None:
    page = ROOT / "docs" / "guides" / "pictures.md"
    [out] = re.findall(r"^\$ hookx visualize .*vgg11.* -o (\S+)", page.read_text(), re.MULTILINE)
    figure, drawn = (
        np.asarray(Image.open(file).convert("RGB")).astype(int)
        for file in (ROOT / "docs" / "figures" / "feature-maps.png", tried[page].result().folder / out / "overview.png")
    )
    assert figure.shape == drawn.shape
    # Another order of the same sums, another version of the letters.
    assert (np.abs(figure - drawn).max(-1) > 8).mean() < 0.01


# --- what is written -----------------------------------------------------------------------------------------------


def test_only_blocks_that_say_so_are_not_run_and_they_are_few() -> None:
    blocks = [(name_of(page), block) for page in PAGES for block in blocks_of(page)]
    for page, block in blocks:
        assert block.language in ("console", "python", "toml", "text") or not block.is_run, (page, block.text)
    assert sum(not block.is_run for _, block in blocks) <= MAX_BLOCKS_NOT_RUN


@cache
def options_of(command: str) -> frozenset[str]:
    """Return the options of a command, long and short, as its help names them."""
    parameters = [p for p in COMMANDS[command].params if p.param_type_name == "option"]
    return frozenset(name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts))


def flags_that_exist() -> set[str]:
    scripts = [file for name in ("scripts", "examples") for file in (ROOT / name).iterdir() if file.is_file()]
    flags = {flag for script in scripts for flag in _FLAG.findall(script.read_text())}
    flags |= {name for parameter in get_command(app).params for name in parameter.opts}
    return flags.union({"--help"}, *map(options_of, COMMANDS))


@pytest.mark.parametrize("page", [*PAGES, REFERENCE, ROOT / "CHANGELOG.md"], ids=name_of)
def test_every_flag_that_a_page_names_exists(page: Path) -> None:
    assert set(_FLAG.findall(page.read_text())) <= flags_that_exist() | OF_OTHER_PROGRAMS


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_toml_block_is_a_configuration_of_extract(page: Path) -> None:
    keys = {name.removeprefix("--") for name in options_of("extract")} | {"images"}
    for block in blocks_of(page):
        if block.language == "toml":
            assert set(tomllib.loads(block.text)) <= keys


def test_the_reference_is_what_its_script_prints() -> None:
    done = subprocess.run([sys.executable, ROOT / "scripts" / "reference", "--check", REFERENCE], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command_stands_in_the_reference(command: str) -> None:
    sections = re.split(r"^## ", REFERENCE.read_text(), flags=re.MULTILINE)
    [section] = [text for text in sections if re.match(rf"`?(hookx )?{command}`?\n", text)]
    for option in options_of(command):
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", section), option


def test_exit_codes_are_documented() -> None:
    text = (ROOT / "docs" / "reference" / "exit-codes.md").read_text()
    assert all(f"| {code} |" in text for code in ("0", "1", "2", "3", "129", "130", "138", "143"))


def test_the_readme_is_short_and_begins_with_a_picture() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 180
    assert "![" in "\n".join(text.splitlines()[:20])
    assert not re.search(r"pip install [^\n]*hookx(?!-vision)", text), "that is another project"


def test_links_of_the_readme_lead_to_files() -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", (ROOT / "README.md").read_text())
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target


def test_every_page_is_in_the_navigation() -> None:
    navigation = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert navigation == {file.relative_to(ROOT / "docs").as_posix() for file in (ROOT / "docs").rglob("*.md")}


# --- help, configurations, examples, scripts -----------------------------------------------------------------------


def examples_in_help(command: str) -> list[str]:
    """Return the examples that a command's help shows, as they can be copied from a narrow terminal."""
    text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "60"}).stdout
    _, _, below = text.partition("\n  Examples:\n")
    return re.findall(r"^    (\S.*)$", below.partition("\n\n")[0], re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_shows_three_examples_or_more_that_run(
    command: str, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run them where images/ and features/ are; without a network, so with random weights where none are named."""
    examples = examples_in_help(command)
    assert len(examples) >= 3 and len(set(examples)) == len(examples)
    monkeypatch.chdir(workplace(tmp_path / "copy", finished_run))
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


EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_documented_and_a_page_runs_it(script: Path) -> None:
    text = script.read_text()
    assert text.startswith('"""') and f"python examples/{script.name}" in text
    assert len(text.splitlines()) <= 60
    commands = "".join(block.text for page in PAGES for block in blocks_of(page) if block.language == "console")
    assert f"$ python examples/{script.name}" in commands


def test_scripts_say_what_they_are_for_and_can_be_run() -> None:
    for script in filter(Path.is_file, (ROOT / "scripts").iterdir()):
        assert os.access(script, os.X_OK), script
        assert script.read_text().splitlines()[1].startswith(("# ", '"""')), script


def test_the_quickstart_goes_from_a_clone_to_features(tmp_path: Path) -> None:
    """The clone's .venv sees what is installed here, and its pip installs nothing: the tests may be offline."""
    clone = tmp_path / "clone"
    for name in ("src", "scripts", "images", "pyproject.toml", "README.md", "LICENSE"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, clone / name)
    venv.create(clone / ".venv", symlinks=True)
    [packages] = (clone / ".venv" / "lib").glob("python*/site-packages")
    (packages / "pip.py").write_text("import sys; print('pip', *sys.argv[1:])")  # in front of the real one
    here = [path for path in sys.path if path.endswith("-packages")]
    (packages / "environment.pth").write_text("\n".join([str(clone / "src"), *here]))
    command = clone / ".venv" / "bin" / "hookx"
    command.write_text(f"#!{clone}/.venv/bin/python\nfrom hookx.cli import main\n\nmain()\n")
    command.chmod(0o755)

    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    script = [clone / "scripts" / "quickstart"]
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^pip .*--editable \.", done.stdout, re.MULTILINE)
    assert done.stdout.endswith("result    features/\n")
    features = hookx.open(clone / "features")
    assert list(features) == ["conv1", "avgpool"] and len(features.keys) == 8


def rewrite(page: Path, folder: Path, features: Path) -> None:
    """Put what a page's commands print now into the page."""
    printed = iter(run_console_blocks(page, folder, features))

    def renewed(match: re.Match[str]) -> str:
        return f"```console\n{next(printed)[1]}```" if match[2] == "console" and not match[1] else match[0]

    page.write_text(_BLOCK.sub(renewed, page.read_text()))


if __name__ == "__main__":
    pages = [Path(name).resolve() for name in sys.argv[1:]] or PAGES
    with tempfile.TemporaryDirectory() as scratch:
        run = make_features(Path(scratch))
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda page: rewrite(page, Path(scratch) / name_of(page).replace("/", "-"), run), pages))
    REFERENCE.write_bytes(
        subprocess.run([sys.executable, ROOT / "scripts" / "reference"], stdout=-1, check=True).stdout
    )
    warm.end()
