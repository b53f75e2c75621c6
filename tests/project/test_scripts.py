"""The scripts for developers and continuous integration: from a clone to features/, and what the workflow calls."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import hookx
from kit import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_quickstart_turns_a_clone_into_features(tmp_path: Path) -> None:
    """Reuse the packages of the environment that runs the tests, so that nothing large is downloaded."""
    clone = tmp_path / "clone"
    for name in ("src", "scripts", "images"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    venv.create(clone / ".venv", symlinks=True)
    (packages,) = clone.glob(".venv/lib/*/site-packages")
    (packages / "reused.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([clone / "scripts" / "quickstart"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    features = hookx.open(clone / "features")
    assert features["avgpool"].shape == (8, 512, 1, 1) and features["conv1"].shape == (8, 64, 112, 112)
    installed = subprocess.run([clone / ".venv/bin/python", "-c", "import hookx; print(hookx.__file__)"],
                               capture_output=True, text=True, cwd="/", env=environment)  # fmt: skip
    assert installed.stdout.strip() == str(clone / "src" / "hookx" / "__init__.py")


def test_the_workflow_runs_only_scripts_and_names_groups_that_exist() -> None:
    commands = re.findall(r"- run: (.*)", (ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert len(commands) >= 10
    for command in commands:
        script, *arguments = re.sub(r"^\w+=\S+ ", "", command).split()
        assert script.startswith("scripts/") and os.access(ROOT / script, os.X_OK), command
        if script == "scripts/setup":
            assert set(arguments) <= set(PYPROJECT["dependency-groups"]), command


def test_the_workflow_tests_every_python_from_the_lowest_that_is_allowed() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    (matrix,) = re.findall(r'python-version: (\["3.*\])', workflow)
    lowest = re.search(r"3\.\d+", PYPROJECT["project"]["requires-python"])
    assert lowest and matrix.startswith(f'["{lowest[0]}",')


def test_the_lowest_versions_are_those_of_the_dependencies() -> None:
    printed = subprocess.run([sys.executable, ROOT / "scripts" / "lowest.py"], capture_output=True, text=True).stdout
    lines = printed.splitlines()
    assert all(re.fullmatch(r"[\w.-]+==\d+(\.\d+)*", line) for line in lines) and len(set(lines)) == len(lines)
    for requirement in PYPROJECT["project"]["dependencies"]:
        if ">=" in requirement:
            assert requirement.replace(">=", "==") in lines
