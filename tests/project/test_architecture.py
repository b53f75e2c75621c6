"""What only one file may do, only that file does; import-linter holds which stage imports which (pyproject.toml)."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "hookx"


def module_of(file: Path) -> str:
    """Return what a file is called below hookx: 'plan', 'capture.hooks'."""
    return ".".join(file.relative_to(SOURCE).with_suffix("").parts)


FILES = sorted(SOURCE.rglob("*.py"))


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


def imports_of(file: Path) -> Iterator[tuple[str, ast.stmt]]:
    """Yield the dotted name of everything that a file imports, also inside functions and for type checkers."""
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            yield from ((name.name, node) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are written in full"
            yield from ((f"{node.module}.{name.name}", node) for name in node.names)


def files_that_import(*packages: str) -> set[str]:
    return {module_of(file) for file in FILES for name, _ in imports_of(file) if name.split(".")[0] in packages}


def names_used_by(file: Path) -> set[str]:
    nodes = list(ast.walk(tree_of(file)))
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return attributes | {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_the_package_itself_imports_nothing_of_it_but_the_errors_before_a_name_is_used() -> None:
    file = SOURCE / "__init__.py"
    typing_only = {
        child
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    at_once = {name for name, node in imports_of(file) if node not in typing_only and name.startswith("hookx")}
    assert at_once == {"hookx.errors.HookxError"}


def test_what_only_one_file_may_do_only_that_file_does() -> None:
    assert files_that_import("PIL") <= {
        "images.decoding",
        "run.workers",
        "models.loaded",
        "models.own_code",
        "models.preprocessing",
        "pictures.colours",
        "pictures.page",
    }
    registering = {
        module_of(file)
        for file in FILES
        if any(re.match(r"register_(module_)?(full_)?(forward|backward)", name) for name in names_used_by(file))
    }
    assert registering == {"capture.hooks", "capture.session"}


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


def test_no_file_of_the_project_names_a_path_of_the_machine_it_was_written_on() -> None:
    files = [
        *(ROOT / name for name in ("README.md", "CHANGELOG.md", "pyproject.toml")),
        *(file for folder in ("src", "tests", "configs", "scripts", ".ci") for file in (ROOT / folder).rglob("*")),
    ]
    someones = re.compile(r"(?<![\w./:-])/(home|Users|root|work)/\w")
    for file in files:
        if file.is_file() and file.suffix != ".pyc":
            text = file.read_text()
            assert not someones.search(text) and str(ROOT) not in text, file
