"""The shape of the code: imports point one way, and what only one file may do, only that file does."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "hookx"

# A module may import those of the lines above it. Peers do not know each other.
ORDER = [
    {"errors", "versions", "signals"},
    {"layers"},
    {"plan"},
    {"hooks", "decoding", "workers"},
    {"choices", "models", "images", "probe", "capture", "store"},
    {"batches", "activations", "ready", "writing", "places", "attention"},
    {"datasets", "filling"},
    {"features"},
    {"extraction", "pictures", "exporting", "printing", "completion"},
    {"verification", "inspection", "gallery"},
    {"recomputation", "visualization"},
    {"report"},
    {"cli"},
    {"__main__"},
]


def module_of(file: Path) -> str:
    """Return the module of hookx that a file is, or belongs to: models.py and models/zoo.py are both models."""
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


FILES = sorted(SOURCE.rglob("*.py"))
MODULES = sorted({module_of(file) for file in FILES})


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


def modules_imported_by(file: Path) -> set[str]:
    names = {name.split(".")[1] for name, _ in imports_of(file) if name.startswith("hookx.")}
    assert names <= set(MODULES), f"{file.name} imports {names - set(MODULES)} from hookx itself, not from its module"
    return names - {module_of(file)}


def rank_of(module: str) -> int:
    return next(rank for rank, modules in enumerate(ORDER) if module in modules)


def files_that_import(*packages: str) -> set[str]:
    return {module_of(file) for file in FILES for name, _ in imports_of(file) if name.split(".")[0] in packages}


def names_used_by(file: Path) -> set[str]:
    nodes = list(ast.walk(tree_of(file)))
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return attributes | {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_every_module_has_a_place_in_the_order() -> None:
    assert set(MODULES) - {"__init__"} <= set.union(*ORDER)


@pytest.mark.parametrize("file", [file for file in FILES if file.name != "__init__.py"], ids=module_of)
def test_imports_point_one_way_and_peers_do_not_import_each_other(file: Path) -> None:
    module = module_of(file)
    for imported in modules_imported_by(file):
        assert rank_of(imported) < rank_of(module), f"{module} imports {imported}"


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
    assert files_that_import("rich", "tqdm") == {"report"}
    assert files_that_import("PIL") <= {"decoding", "batches", "models", "pictures"}  # batches: a type only
    assert "PIL" in {name.split(".")[0] for name, _ in imports_of(SOURCE / "decoding.py")}
    assert files_that_import("typer") == {"cli"}
    assert files_that_import("matplotlib") == {"pictures"}
    registering = {
        module_of(file)
        for file in FILES
        if any(re.match(r"register_(module_)?(full_)?(forward|backward)", name) for name in names_used_by(file))
    }
    assert registering and registering <= {"hooks", "capture"}


def test_the_language_the_plan_and_the_command_line_do_not_import_torch() -> None:
    without_torch = {"errors", "versions", "layers", "plan", "completion", "cli", "report", "__init__", "__main__"}
    assert not without_torch & files_that_import("torch", "torchvision", "numpy", "safetensors")


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
