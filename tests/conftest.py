"""Fixtures for all tests: the project's photographs, full size and as thumbnails that a network processes quickly."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import settings
from PIL import Image

from kit import ROOT, warm

# By default, idle OpenMP threads spin and take the cores from the other processes of a test.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_RANKS = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}

settings.register_profile("any machine", deadline=None)  # A busy machine is slow, not wrong.
settings.load_profile("any machine")


pytest_plugins = ["kit.whole_runs"]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave tests/cluster out, unless a run asks for it by `-m cluster`: it needs Slurm, Ray and minutes."""
    is_of_cluster = collection_path == ROOT / "tests" / "cluster"
    return True if is_of_cluster and config.getoption("markexpr") != "cluster" else None


def pytest_configure() -> None:
    warm.begin()


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # Only in the main process, not in the workers of pytest-xdist.
        warm.end()


@pytest.fixture(scope="session")
def photos() -> Path:
    """Return the folder of eight photographs."""
    return ROOT / "images"


@pytest.fixture(scope="session")
def thumbnails(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 24 small PNG files in subfolders: three crops of each photograph."""
    folder = tmp_path_factory.mktemp("thumbnails")
    for file in sorted(photos.rglob("*.jpg")):
        (folder / file.parent.name).mkdir(exist_ok=True)
        with Image.open(file) as image:
            for number in range(3):
                left = 60 * number
                crop = image.crop((left, 20, left + 250, 270)).resize((48, 48))
                crop.save(folder / file.parent.name / f"{file.stem}-{number}.png")
    return folder


@pytest.fixture(scope="session")
def mixed_folder(thumbnails: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of five readable and four unreadable images, which alternate when sorted by name."""
    folder = tmp_path_factory.mktemp("mixed")
    pictures = sorted(thumbnails.rglob("*.png"))
    for name, picture in zip(("a", "d", "e", "g", "i"), pictures, strict=False):
        shutil.copy(picture, folder / f"{name}.png")
    (folder / "b-text.jpg").write_text("this is no picture")
    (folder / "c-empty.png").touch()
    (folder / "f-cut.png").write_bytes(pictures[0].read_bytes()[:900])
    (folder / "h-dangling.png").symlink_to("nowhere.png")
    return folder


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove variables that change what the tests rely on: hookx's own, and those that say what part a process is."""
    for name in [name for name in os.environ if name.startswith(("HOOKX_", "SLURM_", "OMPI_")) or name in _RANKS]:
        monkeypatch.delenv(name)
