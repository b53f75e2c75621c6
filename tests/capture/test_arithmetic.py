"""What a pass computes in, and what the process computes in after it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hookx
from hookx.capture.arithmetic import PRECISIONS, arithmetic
from hookx.capture.determinism import find_nondeterministic
from hookx.capture.runner import Runner
from hookx.capture.session import Capture
from hookx.errors import UsageError
from hookx.run.defaults import check_precision, choose_device

CPU = torch.device("cpu")
BACKENDS: Any = torch.backends
HAS_NEWER_SWITCHES = hasattr(BACKENDS.cudnn, "conv")  # since PyTorch 2.9


def switches() -> list[Any]:
    """Return what PyTorch reports as the precision of products, by all its names; an error where it refuses to say."""
    reads: list[Callable[[], Any]] = [
        lambda: BACKENDS.cudnn.allow_tf32,
        lambda: BACKENDS.cuda.matmul.allow_tf32,
        torch.get_float32_matmul_precision,
    ]
    if HAS_NEWER_SWITCHES:
        reads += [
            lambda: BACKENDS.fp32_precision,
            lambda: BACKENDS.cuda.matmul.fp32_precision,
            lambda: BACKENDS.cudnn.conv.fp32_precision,
            lambda: BACKENDS.cudnn.rnn.fp32_precision,
            lambda: BACKENDS.mkldnn.matmul.fp32_precision,
        ]
    values = []
    for read in reads:
        try:
            values.append(read())
        except RuntimeError:
            values.append("older and newer switches disagree")
    return values


def set_newer(kind: str, value: str) -> None:
    if not HAS_NEWER_SWITCHES:
        pytest.skip("this PyTorch has the older switches only")
    owner = BACKENDS
    for name in kind.split("."):
        owner = getattr(owner, name)
    owner.fp32_precision = value


@pytest.fixture(autouse=True)
def _settings_of_the_process() -> Iterator[None]:
    yield
    BACKENDS.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("highest")
    if HAS_NEWER_SWITCHES:
        BACKENDS.mkldnn.matmul.fp32_precision = "none"
    assert not torch.are_deterministic_algorithms_enabled()


SETTINGS: dict[str, Callable[[], Any]] = {
    "as PyTorch begins": lambda: None,
    "TF32 everywhere": lambda: torch.set_float32_matmul_precision("high"),
    "bfloat16 in products": lambda: torch.set_float32_matmul_precision("medium"),
    "no TF32": lambda: setattr(BACKENDS.cudnn, "allow_tf32", False),
    "a newer switch, on": lambda: set_newer("cuda.matmul", "tf32"),
    "a newer switch, off": lambda: set_newer("cudnn.conv", "ieee"),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_pass_leaves_the_settings_of_the_process_as_they_were(setting: str, precision: str) -> None:
    SETTINGS[setting]()
    before = switches()
    with arithmetic(precision, CPU):
        inside = switches()
    assert switches() == before
    allowed = precision == "tf32"
    assert inside[:3] == [allowed, allowed, "high" if allowed else "highest"]
    if HAS_NEWER_SWITCHES:
        assert set(inside[4:]) == {"tf32" if allowed else "ieee"}
    with pytest.raises(ZeroDivisionError), arithmetic(precision, CPU):
        _ = 1 // 0
    assert switches() == before


def test_the_settings_hold_inside_the_model_and_nowhere_else() -> None:
    seen: list[Any] = []

    class Looks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.get_float32_matmul_precision())
            return x

    torch.set_float32_matmul_precision("high")
    Runner.of(Looks()).run(torch.ones(1, 3, 2, 2))
    with Capture(net := Looks(), "."):
        net(torch.ones(1, 3, 2, 2))
    assert seen == ["highest", "high"], "a Capture leaves the user's setting alone"


def test_deterministic_algorithms_are_asked_for_on_an_accelerator_alone() -> None:
    with arithmetic("fp32", CPU):
        assert not torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    with arithmetic("fp32", torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            torch.zeros(4).put_(torch.tensor([1, 1]), torch.ones(2))  # PyTorch would warn; a run does not.
    assert torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = benchmark


def test_the_layer_without_a_deterministic_algorithm_is_named_with_its_operation() -> None:
    class Scatters(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            return x.flatten().clone().put_(torch.tensor([0, 0]), x.flatten()[:2]).view_as(x)

    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(Scatters(), nn.ReLU()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert find_nondeterministic(Runner.of(net), torch.ones(1, 3, 4, 4)) == {"1.0": "put_"}
    assert find_nondeterministic(Runner.of(net), torch.ones(1, 3, 4, 4)) == {"1.0": "put_"}
    assert find_nondeterministic(Runner.of(net[0]), torch.ones(1, 3, 4, 4)) == {}
    assert not torch.are_deterministic_algorithms_enabled()


def test_tf32_without_a_gpu_is_refused_before_anything_is_computed(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--precision tf32 needs an NVIDIA GPU, but the device is cpu"):
        hookx.extract("resnet18", "avgpool", photos, weights="none", out=tmp_path, device="cpu", precision="tf32")
    check_precision("fp32", CPU)


def test_a_device_that_is_absent_is_refused_with_those_that_are_here() -> None:
    with pytest.raises(UsageError, match=r"invalid --device 'xpu:7': this machine has cpu"):
        choose_device("xpu:7")
