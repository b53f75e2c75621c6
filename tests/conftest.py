"""Photographs for the tests: the project's own, as they are and as thumbnails that a network runs through at once."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import settings
from PIL import Image

from kit import ROOT, warm

# Idle threads of a forward pass spin by default, and take the cores from the other processes of a test.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

settings.register_profile("any machine", deadline=None)  # A busy one is slow, and not wrong.
settings.load_profile("any machine")


def pytest_configure() -> None:
    warm.begin()


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # Not in a process that this one has started to share the tests.
        warm.end()


@pytest.fixture(scope="session")
def photos() -> Path:
    """Return the folder of the eight photographs."""
    return ROOT / "images"


@pytest.fixture(scope="session")
def thumbnails(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 24 small pictures, lossless, in subfolders: three different crops of every photograph."""
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
    """Return a folder of five pictures between four files that no decoder can read, in the order of their names."""
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
    """Keep the HOOKX_* variables of whoever runs the tests out of them."""
    for name in [name for name in os.environ if name.startswith("HOOKX_")]:
        monkeypatch.delenv(name)
