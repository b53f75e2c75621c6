"""A run of `hookx extract` in several processes: small, slow if a test wants it to be, with images that are damaged."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from hookx.store.asides import asides_in
from kit import ROOT

SHARDS = 7  # of the folder of images that tests/cluster makes


def extract(images: Path, out: Path, *options: str) -> list[str]:
    """Return the arguments of hookx that compute a run with the net of `slow_net.py`."""
    command = ["extract", "-m", "python:kit.slow_net:Net", "-w", "none", "-l", "avgpool,conv", "-b", "1", "-j", "0"]
    command += ["--resize", "32", "--crop", "32", "--shard-images", "4", "--self-check", "1"]
    return [*command, "-o", str(out), *options, str(images)]


def hookx(*arguments: str) -> list[str]:
    """Return a command line of this tree's hookx; it needs the variables below."""
    return [sys.executable, "-m", "hookx", *arguments]


def variables(base: dict[str, str] | None = None, **others: str) -> dict[str, str]:
    """Return the environment that finds this tree's hookx and its net, and that tells nobody a part."""
    told = ("SLURM_A", "SLURM_P", "SLURM_S", "OMPI_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    kept = {name: value for name, value in (base or os.environ).items() if not name.startswith(told)}
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return kept | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | others


def is_writing(out: Path, processes: Iterable[int]) -> bool:
    """Whether one of some processes has a shard half written."""
    among = set(processes)
    return out.is_dir() and any(aside.shard is not None and aside.process in among for aside in asides_in(out))


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
