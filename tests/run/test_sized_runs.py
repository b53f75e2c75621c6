"""Runs at another size, and with inputs that are not square: stored, resumed, recomputed, drawn."""

from __future__ import annotations

import json
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision import models as zoo
from torchvision.transforms import Compose, InterpolationMode, PILToTensor, Resize

import hookx
from hookx.capture.probe import example_images
from hookx.capture.runner import Runner
from hookx.check.recompute import recompute
from hookx.images.decoding import model_input
from hookx.launch.extract import extract
from hookx.models import ModelOptions, load_model
from hookx.pictures.places import find_token_grid, probe_places
from hookx.plan import IMAGENET, Plan
from hookx.read.features import open_features
from kit import warm

NOT_SQUARE = (96, 64)


def plan_of(out: Path) -> Plan:
    return Plan.from_json((out / "plan.json").read_text())


def test_a_run_of_an_input_that_is_not_square_stores_what_the_model_returns(thumbnails: Path, tmp_path: Path) -> None:
    extract(
        "resnet18", "layer1,fc", thumbnails, weights="none", size=NOT_SQUARE, fit="squash",
        out=tmp_path / "out", batch_size=4, workers=1, memory_format="contiguous",
    )  # fmt: skip
    features = open_features(tmp_path / "out")
    assert features["layer1"].shape == (24, 64, 24, 16)
    resize = Compose([Resize(NOT_SQUARE, InterpolationMode.BILINEAR), PILToTensor()])
    pixels = []
    for key in features.keys_of_rows[:4]:
        with Image.open(thumbnails / key) as image:
            pixels.append(resize(image.convert("RGB")))
    torch.manual_seed(0)
    model = zoo.resnet18().eval()
    expected = Runner.of(model, model).run(model_input(torch.stack(pixels), features.plan.preprocessing))
    assert torch.equal(features["fc"][0:4], expected)


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "torchvision": ("resnet18", "layer4,fc", {"size": NOT_SQUARE}),
    "torchvision, squashed": ("resnet18", "fc", {"fit": "squash"}),
    "torchvision, padded": ("resnet18", "fc", {"size": 64, "fit": "pad"}),
    "torchvision, resized further": ("resnet18", "fc", {"size": 64, "resize": 80}),
    "torchvision's vision transformer": ("vit_b_32", "encoder.ln", {"size": 64}),
    "timm's vision transformer": ("timm:vit_tiny_patch16_224", "norm", {"size": NOT_SQUARE}),
    "timm, a transform of its own": ("timm:coat_lite_tiny.in1k", "norm4", {"size": 64}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_plan_resumes_and_recomputes_at_its_size(case: str, thumbnails: Path, tmp_path: Path) -> None:
    if case.startswith("timm"):
        pytest.importorskip("timm", reason="the extra timm is not installed")
    model, layers, options = CASES[case]
    out = tmp_path / "out"
    extract(model, layers, thumbnails, weights="none", out=out, batch_size=4, workers=1, shard_images=12, **options)
    plan = plan_of(out)
    again = recompute(out, 2, thumbnails, seed=0)
    assert again.problems == () and again.rows_with_same_bits == 2
    # The command of the plan finishes a run that lacks a shard, to the same bytes.
    shard = sorted(out.glob("shard-*"))[1]
    before = shard.read_bytes()
    shard.unlink()
    words = [str(thumbnails) if word == "IMAGES" else word for word in shlex.split(plan.command(str(out)))[1:]]
    done = subprocess.run([*warm.python("torch"), "-m", "hookx", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert shard.read_bytes() == before and plan_of(out) == plan


def test_published_weights_at_another_size_are_in_the_command_of_a_plan() -> None:
    plan = Plan(
        "vit_b_16", "ViT_B_16_Weights.IMAGENET1K_V1", (), IMAGENET.sized((384, 384), (439, 439)), "fp32", "contiguous",
        image_count=1, images_sha256="", images_per_shard=1, batch_size=1,
    )  # fmt: skip
    assert "--resize-positions" not in plan.command("out")
    sized = replace(plan, preprocessing=replace(plan.preprocessing, size="384x384"))
    assert "--resize 439 --size 384x384 " in sized.command("out") and "--resize-positions" in sized.command("out")


def test_a_plan_holds_what_was_asked_for_and_nothing_where_nothing_was(thumbnails: Path, tmp_path: Path) -> None:
    extract("resnet18", "fc", thumbnails, weights="none", out=tmp_path / "usual", limit=4)
    usual = json.loads((tmp_path / "usual" / "plan.json").read_text())["preprocessing"]
    assert set(usual) == {"resize_px", "crop_px", "mean", "std", "interpolation", "antialias", "exif"}
    extract("resnet18", "fc", thumbnails, weights="none", out=tmp_path / "own", limit=4, size=224, fit="crop")
    assert plan_of(tmp_path / "own") == plan_of(tmp_path / "usual")
    extract("resnet18", "fc", thumbnails, weights="none", out=tmp_path / "other", limit=4, size=(96, 64), fit="pad")
    other = json.loads((tmp_path / "other" / "plan.json").read_text())["preprocessing"]
    added = {"size": "96x64", "fit": "pad", "crop_width_px": 64, "resize_width_px": 64}
    assert {name: other[name] for name in other.keys() - usual.keys()} == added
    described = "resize within 96 x 64 (bilinear), pad with the mean, mean 0.485,"
    assert str(plan_of(tmp_path / "other").preprocessing).startswith(described)


def test_the_places_of_tokens_of_an_input_that_is_not_square_are_known() -> None:
    pytest.importorskip("timm", reason="the extra timm is not installed")
    loaded = load_model("timm:vit_tiny_patch16_224", "none", ModelOptions(size=(128, 64)))
    runner = Runner.of(loaded.module, loaded.forward)
    places = probe_places(runner, lambda: runner, loaded.preprocessing.size_px)
    grid = places.grid(33)
    assert grid is not None and (grid.height, grid.width, grid.tokens) == (8, 4, tuple(range(1, 33)))
    traced = find_token_grid(runner, (128, 64), 33, [])  # By strips alone, without the maps.
    assert traced == grid
    conv = load_model("resnet18", "none", ModelOptions(size=(128, 64)))
    bare = Runner.of(conv.module, conv.forward)
    maps = probe_places(bare, lambda: bare, (128, 64))
    layer1 = next(address for address in maps.square if str(address) == "layer1")
    assert maps.read(layer1, (64, 32, 16)).roles == ("channel", "height", "width")
    assert example_images(bare, (128, 64)).shape == (3, 3, 128, 64)


def test_pictures_of_an_input_that_is_not_square(photos: Path, thumbnails: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="the extra timm is not installed")
    photo, size = photos / "animals" / "chelsea.jpg", (128, 64)
    gallery = hookx.visualize(
        "timm:vit_tiny_patch16_224", "norm", photo, weights="none", size=size, out=tmp_path / "maps", top=2
    )
    assert "channels of 8 × 4 patches, without token 0 of 33 (no patch)" in gallery.pictures[0].shows
    extract("timm:vit_tiny_patch16_224", "norm", photo, weights="none", size=size, out=tmp_path / "run", workers=1)
    of_run = hookx.visualize_run(tmp_path / "run", ["chelsea.jpg"], "norm", out=tmp_path / "of-run", top=2)
    assert "channels of 8 × 4 patches" in of_run.pictures[0].shows
