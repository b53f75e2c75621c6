"""The conformance sweep over a selection of models, chosen for their traps, and proof that it can fail."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from hookx.capture import rows as capture
from kit import warm

SCRIPT = Path(__file__).parents[2] / "scripts" / "conformance.py"


@pytest.fixture(scope="module", autouse=True)
def where_scripts_find_each_other() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        yield


@pytest.fixture(scope="module")
def conformance() -> Any:
    return import_module("conformance")


@pytest.fixture(autouse=True)
def without_the_fast_path() -> Any:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("resnet18", "classification"),  # in-place ReLUs, each called twice
        ("googlenet", "classification"),  # auxiliary classifiers that eval mode leaves out
        ("densenet121", "classification"),  # concatenations that alias their parts
        ("mobilenet_v3_small", "classification"),  # in-place Hardswish, squeeze and excitation
        ("shufflenet_v2_x0_5", "classification"),  # chunks: views of one tensor
        ("swin_v2_t", "classification"),  # constants, NHWC, weights that are used without their module
        ("vit_b_32", "classification"),  # tuples out of attention
        ("fcn_resnet50", "segmentation"),  # dicts
        ("quantized_shufflenet_v2_x0_5", "quantized"),  # integers with a scale
    ],
)
def test_every_activation_of_a_model_is_what_its_layer_returned(conformance: Any, name: str, kind: str) -> None:
    row = conformance.check(name, kind)
    assert row.wrong == 0 and row.missed == 0
    assert row.compared + row.constant + row.refused >= row.calls > 70
    assert (row.constant > 0) == (name == "swin_v2_t")


@pytest.mark.parametrize("name", ["swin", "dinov2_with_registers"])
def test_every_activation_of_a_transformers_model_is_what_its_layer_returned(conformance: Any, name: str) -> None:
    pytest.importorskip("transformers")
    row = conformance.check(name, "transformers")
    assert row.wrong == 0 and row.missed == 0 and row.compared + row.constant >= row.calls > 30


def test_a_zoo_whose_library_is_not_installed_is_named_with_the_package(
    conformance: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    zoos = conformance.zoos
    monkeypatch.setitem(zoos.ZOOS, "open-clip", replace(zoos.ZOOS["open-clip"], module="no_such_library"))
    monkeypatch.setattr(sys, "argv", ["conformance.py", "--kind", "open-clip"])
    with pytest.raises(SystemExit, match="2"):
        conformance.main()
    assert "these models need open_clip_torch: pip install open_clip_torch" in capsys.readouterr().err


def test_channels_last_is_exact_too(conformance: Any) -> None:
    row = conformance.check("resnet18", channels_last=True)
    assert row.wrong == 0 and row.compared == row.calls


def test_the_usual_hook_is_counted_wrong_where_a_relu_works_in_place(conformance: Any) -> None:
    row = conformance.check("resnet18")
    # bn1, and in each of the 8 blocks bn1 and the sum that the second ReLU takes over from it.
    assert row.usual_hook_wrong == 1 + 2 * 8 == row.usual_hook_differs


def test_a_capture_that_does_not_copy_would_be_found_wrong(conformance: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def keep_a_reference(self: capture.RowCapture, target: Any, tensor: torch.Tensor) -> None:
        self._rows[str(target.address)].set_(tensor.detach())  # type: ignore[call-overload]

    monkeypatch.setattr(capture.RowCapture, "_store", keep_a_reference)
    assert conformance.check("resnet18").wrong > 10


def test_the_script_prints_a_table_with_totals() -> None:
    done = subprocess.run([*warm.python("torch"), SCRIPT, "alexnet"], capture_output=True, text=True, check=True)
    header, row, total, verdict = done.stdout.splitlines()
    assert header.split()[:3] == ["model", "modules", "calls"] and row.split()[0] == "alexnet"
    assert total.startswith("1 models") and verdict.startswith("hookx: 0 wrong and 0 missed of ")
    refused = subprocess.run([*warm.python("torch"), SCRIPT, "alexnut"], capture_output=True, text=True)
    assert refused.returncode == 2 and "no classification model matches alexnut" in refused.stderr
