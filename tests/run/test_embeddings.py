"""The embeddings that people make of tokens, stored by a run: each equals its recipe on the model's own output."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from typer.testing import CliRunner

import hookx
from hookx.cli.app import app
from hookx.errors import LayerError

timm = pytest.importorskip("timm")
VIT, WITHOUT_CLS, MIXER = "timm:vit_small_patch16_dinov3", "timm:vit_relpos_small_patch16_224", "timm:mixer_s32_224"
SMALL: dict[str, Any] = {"weights": "none", "device": "cpu", "resize": 64, "crop": 64, "memory_format": "contiguous"}
OF_224: dict[str, Any] = {"weights": "none", "device": "cpu"}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "features"


def tokens_of(features: hookx.Features) -> Tensor:
    return features["norm"].torch()


RECIPES: dict[str, Callable[[Tensor], Tensor]] = {
    "norm@cls": lambda tokens: tokens[:, 0],
    "norm@patches": lambda tokens: tokens[:, 5:],
    "norm@tokens5-": lambda tokens: tokens[:, 5:],
    "norm@patchmean": lambda tokens: tokens[:, 5:].mean(1),
    "norm@patchmean@l2": lambda tokens: normalize(tokens[:, 5:].mean(1)),
    "norm@cls+patchmean": lambda tokens: torch.cat([tokens[:, 0], tokens[:, 5:].mean(1)], 1),
    "norm@grid": lambda tokens: tokens[:, 5:].unflatten(1, (4, 4)).permute(0, 3, 1, 2),
    "norm@grid@pool2@channels0-63": lambda tokens: nn.functional.avg_pool2d(
        tokens[:, 5:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)[:, :64], 2
    ),
}


def test_every_embedding_equals_its_recipe(photos: Path, out: Path) -> None:
    hookx.extract(VIT, ["norm", *RECIPES], photos, out=out, **SMALL)
    features = hookx.open(out)
    tokens = tokens_of(features)
    for address, recipe in RECIPES.items():
        stored = features[address].torch()
        assert stored.shape == recipe(tokens).shape and torch.allclose(stored, recipe(tokens), atol=1e-6), address
    assert torch.equal(features["norm@patches"].torch(), tokens[:, 5:])


def test_a_glob_takes_the_embedding_of_every_block(photos: Path, out: Path) -> None:
    hookx.extract(VIT, "blocks.*@patchmean@l2", photos, out=out, **SMALL)
    features = hookx.open(out)
    assert list(features) == [f"blocks.{number}@patchmean@l2" for number in range(12)]
    assert all(torch.allclose(features[a].torch().norm(dim=1), torch.ones(len(features.keys))) for a in features)


def test_the_same_command_goes_on_with_the_same_plan(photos: Path, out: Path) -> None:
    layers = ["norm@cls+patchmean", "blocks.3@grid@project64"]
    first = hookx.extract(VIT, layers, photos, out=out, shard_images=2, **SMALL)
    bytes_before = {file.name: file.read_bytes() for file in out.glob("shard-*")}
    next(out.glob("shard-00001-*")).unlink()
    hookx.extract(VIT, layers, photos, out=out, shard_images=2, **SMALL)
    assert {file.name: file.read_bytes() for file in out.glob("shard-*")} == bytes_before
    assert first.plan.fingerprint == hookx.open(out).plan.fingerprint


def test_the_run_says_which_tokens_are_patches(photos: Path, out: Path) -> None:
    command = ["extract", "-m", VIT, "-w", "none", "--resize", "64", "--crop", "64", "-l", "norm@patchmean"]
    result = CliRunner().invoke(app, [*command, "-o", str(out), str(photos)])
    assert result.exit_code == 0
    assert "16 of 21 tokens are 4 x 4 patches (proved on the model); others: 0, 1, 2, 3, 4" in result.stderr


def test_token_0_of_a_model_without_a_class_token_is_refused(photos: Path, out: Path) -> None:
    with pytest.raises(LayerError, match="'norm@cls' does not fit: token 0 stands for a place of the image; all"):
        hookx.extract(WITHOUT_CLS, "norm@cls", photos, out=out, **OF_224)
    with pytest.raises(LayerError, match="there is no class token"):
        hookx.extract(WITHOUT_CLS, "norm@cls+patchmean", photos, out=out, **OF_224)
    assert not out.exists()


def test_what_is_not_proved_names_the_spelling_with_numbers(photos: Path, out: Path) -> None:
    with pytest.raises(LayerError, match=r"could not be proved.*\n.*@tokens1- from the second token on"):
        hookx.extract(MIXER, "blocks.3@patchmean", photos, out=out, **OF_224)


def test_a_capture_of_ones_own_passes_has_no_proof_and_takes_numbers() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=64).eval()
    with pytest.raises(LayerError, match=r"is proved by a run, not here\n.*norm@tokens1-"):
        hookx.Capture(model, "norm@patchmean")
    with hookx.Capture(model, ["norm@tokens1-@mean1@l2", "norm"]) as capture, torch.inference_mode():
        model(torch.rand(2, 3, 64, 64))
    assert torch.allclose(capture["norm@tokens1-@mean1@l2"], normalize(capture["norm"][:, 1:].mean(1)), atol=1e-6)
