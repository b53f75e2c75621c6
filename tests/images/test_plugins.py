"""HEIC and JPEG XL are read by plug-ins of Pillow if these are installed, and counted as not taken if they are not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import hookx
from hookx.images.decoding import decode, known_formats, model_input
from hookx.images.listing import list_images
from hookx.images.plugins import plugin_suffixes, register_plugins
from hookx.models import load_model
from kit.pictures import CHELSEA
from kit.processes import environment_for

pytest.importorskip("pillow_heif")
pytest.importorskip("pillow_jxl")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    register_plugins()
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.heic", "b.HEIF", "c.jxl"):
        with Image.open(CHELSEA) as picture:
            picture.save(folder / name, {"c.jxl": "JXL"}.get(name, "HEIF"), quality=90)
    return folder


def test_folders_are_searched_for_them(photos: Path) -> None:
    assert plugin_suffixes() == {".heic", ".heif", ".hif", ".jxl"}
    assert list(list_images([photos]).keys) == ["a.heic", "b.HEIF", "c.jxl"]
    formats = known_formats()
    assert {"HEIF", "JXL"} <= set(formats)
    assert formats == sorted(formats, key=lambda name: (Image.OPEN[name][1] is None, name))


@pytest.mark.parametrize("workers", [0, 2])
def test_every_process_decodes_the_same_bits(workers: int, photos: Path, tmp_path: Path) -> None:
    summary = hookx.extract(
        *("resnet18", "conv1@mean23", photos), weights="none", out=tmp_path / "run", workers=workers, batch_size=1
    )
    assert (summary.images, summary.failures) == (3, 0)
    prepared = summary.preprocessing
    with Image.open(CHELSEA) as original:
        original.convert("RGB").save(tmp_path / "original.png")
    expected, _ = decode(str(tmp_path / "original.png"), prepared)
    for name in ("a.heic", "b.HEIF", "c.jxl"):
        pixels_CHW, _ = decode(str(photos / name), prepared)
        assert float((pixels_CHW.float() - expected.float()).abs().mean()) < 4, name
        model = load_model("resnet18", "none").module
        row = model.get_submodule("conv1")(model_input(pixels_CHW[None], prepared)).mean((2, 3))[0]
        stored = hookx.open(tmp_path / "run")["conv1@mean23"]
        assert torch.allclose(stored[list(stored.keys).index(name)], row, atol=1e-4)


def test_without_the_plug_ins_they_are_counted_with_the_way_to_install_them(tmp_path: Path) -> None:
    for name in ("a.heic", "b.heic", "c.jxl"):
        (tmp_path / name).touch()
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "d.png")
    program = (
        "import sys; sys.modules['pillow_heif'] = sys.modules['pillow_jxl'] = None\n"
        "from hookx.images.listing import list_images\n"
        "from hookx.images.decoding import known_formats\n"
        "images = list_images([sys.argv[1]])\n"
        "print(list(images.keys), *images.remarks.sentences(), 'HEIF' in known_formats())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment_for(__file__),
        timeout=60,
    )
    install = "(pip install 'hookx-vision[heif]')"
    assert done.stdout == f"['d.png'] 3 files not taken: 2 .heic {install}, 1 .jxl {install} False\n", done.stderr
