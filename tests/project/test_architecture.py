"""The shape of the code: its sizes, what only one file may do, and the import rule (import-linter, pyproject.toml)."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import hookx
from hookx import errors

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "hookx"
MAX_ENTRIES = 20
MAX_LINES = 450


def module_of(file: Path) -> str:
    """Return what a file is called below hookx: 'plan', 'capture.hooks'."""
    return ".".join(file.relative_to(SOURCE).with_suffix("").parts)


FILES = sorted(SOURCE.rglob("*.py"))


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


def imports_of(file: Path) -> Iterator[tuple[str, ast.stmt]]:
    """Yield the dotted name of everything that a file imports, including inside functions and for type checkers."""
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            yield from ((name.name, node) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write imports in full"
            yield from ((f"{node.module}.{name.name}", node) for name in node.names)


def imports_for_type_checkers(file: Path) -> set[ast.AST]:
    return {
        child
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }


def files_that_import(package: str, *, at_run_time: bool = False) -> set[str]:
    return {
        module_of(file)
        for file in FILES
        for name, node in imports_of(file)
        if name.split(".")[0] == package and not (at_run_time and node in imports_for_type_checkers(file))
    }


def names_used_by(file: Path) -> set[str]:
    nodes = list(ast.walk(tree_of(file)))
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return attributes | {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def texts_in_code_of(file: Path) -> Iterator[str]:
    """Yield the string constants of a file except docstrings and the help sentences of options."""
    prose = {
        child
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.Expr)
        or (isinstance(node, ast.Call) and ast.unparse(node.func) in ("option", "argument"))
        for child in ([node.value] if isinstance(node, ast.Expr) else ast.walk(node))
    }
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose:
            yield node.value


def test_the_package_has_few_entries_and_no_long_file() -> None:
    entries = [entry.name for entry in SOURCE.iterdir() if entry.name != "__pycache__"]
    assert len(entries) <= MAX_ENTRIES, entries
    lines = {module_of(file): len(file.read_text().splitlines()) for file in FILES}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


@pytest.mark.parametrize("name", hookx.__all__)
def test_every_public_name_has_a_docstring(name: str) -> None:
    assert (getattr(hookx, name).__doc__ or "").strip()


FORBIDDEN = {
    "a lower stage imports a higher one": ("store/files.py", "import hookx.run.run"),
    "the store imports the sources of images": ("store/reading.py", "import hookx.images.files"),
    "a lower stage imports a higher one inside a function": ("keys.py", "def load():\n    import hookx.plan"),
    "peers import each other": ("images/listing.py", "import hookx.models.loading"),
    "the grammar imports torch": ("layers/address.py", "import torch"),
    "a run draws": ("run/run.py", "import matplotlib"),
    "the store talks to a terminal": ("store/directory.py", "import rich"),
    "a reader imports a zoo": ("read/features.py", "import timm"),
}


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "COLUMNS": "200"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def copied_tree(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_import_rule_holds(copied_tree: Path) -> None:
    done = lint_imports(copied_tree)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("file", "forbidden"), FORBIDDEN.values(), ids=FORBIDDEN)
def test_a_forbidden_import_breaks_the_import_rule(copied_tree: Path, file: str, forbidden: str) -> None:
    with (copied_tree / "src" / "hookx" / file).open("a") as source:
        source.write(f"\n{forbidden}\n")
    done = lint_imports(copied_tree)
    assert done.returncode == 1, done.stdout
    assert "1 broken" in done.stdout and f"hookx.{file.removesuffix('.py').replace('/', '.')}" in done.stdout


def test_only_models_name_a_zoo() -> None:
    """import-linter forbids other packages to import a zoo; this forbids them to know its prefix or its name.

    The Hub is a store of images as well, behind hf://.
    """
    naming = {
        (module_of(file), text)
        for file in FILES
        if not module_of(file).startswith(("models.", "store.objects."))
        for text in texts_in_code_of(file)
        if re.search(r"\b(timm|hf):(?!//)|^(timm|transformers|huggingface_hub)$", text)
    }
    assert naming == set()


def test_importing_hookx_imports_only_its_errors() -> None:
    file = SOURCE / "__init__.py"
    at_once = {
        name
        for name, node in imports_of(file)
        if node not in imports_for_type_checkers(file) and name.startswith("hookx")
    }
    assert at_once == {"hookx.errors.HookxError"}


def test_only_capture_hooks_registers_a_hook() -> None:
    registering = {
        module_of(file)
        for file in FILES
        if any(re.match(r"register_(module_)?(full_)?(forward|backward)", name) for name in names_used_by(file))
    }
    assert registering == {"capture.hooks"}


def test_only_images_and_pictures_import_pillow_while_the_program_runs() -> None:
    """Other packages name its types, for annotations only."""
    assert {name.split(".")[0] for name in files_that_import("PIL", at_run_time=True)} == {"images", "pictures"}


def test_the_tree_in_the_docstring_of_errors_is_the_tree_of_its_classes() -> None:
    def lines(cls: type[Exception], depth: int) -> Iterator[tuple[int, str]]:
        yield depth, cls.__name__
        for child in cls.__subclasses__():
            if child.__module__ == errors.__name__:
                yield from lines(child, depth + 1)

    drawn = re.findall(r"^    ([│├└─ ]*)(\w+Error)", errors.__doc__ or "", re.MULTILINE)
    assert sorted((len(branch) // 4, name) for branch, name in drawn) == sorted(lines(errors.HookxError, 0))


def test_only_public_names_of_typer_are_used_and_click_is_not_imported() -> None:
    assert not files_that_import("click")
    for file in FILES:
        assert not any(name.startswith("typer._") for name, _ in imports_of(file))


def test_every_package_that_is_imported_is_declared_or_comes_with_python() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [declared["dependencies"], *declared.get("optional-dependencies", {}).values()]
    names = {re.split(r"[^\w.-]", requirement)[0].lower() for group in groups for requirement in group}
    imported = {name.split(".")[0] for file in FILES for name, _ in imports_of(file)}
    third_party = imported - sys.stdlib_module_names - {"hookx"}
    assert {{"PIL": "pillow", "zlib_ng": "zlib-ng"}.get(name, name) for name in third_party} <= names


def test_no_file_names_a_path_of_the_machine_it_was_written_on() -> None:
    folders = ("src", "tests", "configs", "docs", "examples", "scripts", ".ci", ".github")
    files = [*ROOT.glob("[!.]*.*"), *(file for folder in folders for file in (ROOT / folder).rglob("*"))]
    personal = re.compile(r"(?<![\w./:-])/(home|Users|root|work)/\w")
    for file in files:
        if file.is_file() and file.suffix not in (".jpg", ".png", ".pyc"):
            text = file.read_text()
            assert not personal.search(text) and str(ROOT) not in text, file
