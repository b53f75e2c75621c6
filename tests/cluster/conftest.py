"""Leave the tests of clusters out, unless a run asks for them by `-m cluster`: they need Slurm, Ray and minutes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from kit.whole_runs import extract, hookx, variables


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return None if config.getoption("markexpr") == "cluster" else True


@pytest.fixture(scope="session")
def pictures(thumbnails: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 24 small images and two files that cannot be read: seven shards."""
    folder = tmp_path_factory.mktemp("cluster") / "pictures"
    shutil.copytree(thumbnails, folder)
    (folder / "b-text.jpg").write_text("this is no picture")
    (folder / "z-empty.png").touch()
    return folder


@pytest.fixture(scope="session")
def at_once(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run that one process has computed."""
    out = tmp_path_factory.mktemp("at-once") / "features"
    command = hookx(*extract(pictures, out, "-q"))
    done = subprocess.run(command, env=variables(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 3, done.stderr
    return out
