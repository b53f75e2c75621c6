"""A run is computed again with the weights that its plan names, whatever kind they are of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models import get_model, get_model_weights

from hookx.check.recompute import recompute
from hookx.errors import UsageError
from hookx.launch.extract import extract
from hookx.store.directory import read_plan

SMALL: dict[str, Any] = {"resize": 64, "crop": 64, "batch_size": 2, "workers": 0, "device": "cpu"}
NAMES = ["quantized_shufflenet_v2_x0_5", "quantized_resnet18", "squeezenet1_1"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_published_weights_is_computed_again_from_its_plan_alone(
    name: str, mixed_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A cache that holds the weights; torch.hub compares digests only while it downloads.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    published: Any = get_model_weights(name)
    file = tmp_path / "hub" / "checkpoints" / published.DEFAULT.url.rsplit("/", 1)[1]
    file.parent.mkdir(parents=True)
    torch.manual_seed(5)
    arguments = {"quantize": True} if name.startswith("quantized") else {}
    torch.save(get_model(name, weights=None, **arguments).state_dict(), file)
    out = tmp_path / "features"
    extract(name, ".", mixed_folder, out=out, **SMALL)
    assert read_plan(out).weights == str(published.DEFAULT)
    again = recompute(out, 100, mixed_folder)
    assert again.problems == () and again.rows_with_same_bits == 5


def test_a_seed_of_19_digits_is_taken_from_the_plan(mixed_folder: Path, tmp_path: Path) -> None:
    extract("squeezenet1_1", ".", mixed_folder, out=tmp_path / "out", weights="none", seed=2**64 - 1, **SMALL)
    assert read_plan(tmp_path / "out").weights == "random (seed 18446744073709551615)"
    assert recompute(tmp_path / "out", 100, mixed_folder).problems == ()


def test_a_zoo_with_a_prefix_also_asks_for_the_file_of_its_weights(mixed_folder: Path, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="the extra timm is not installed")
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "w.pt")
    extract("timm:resnet10t", "fc", mixed_folder, out=tmp_path / "out", weights=str(tmp_path / "w.pt"), **SMALL)
    with pytest.raises(UsageError, match=r"the weights of this run are a file \(sha256:"):
        recompute(tmp_path / "out", 1, mixed_folder)
    again = recompute(tmp_path / "out", 100, mixed_folder, weights=str(tmp_path / "w.pt"))
    assert again.problems == () and again.rows_with_same_bits == 5
