"""Models in other floating-point types than float32 are computed in float32, and said to be."""

from __future__ import annotations

import copy
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hookx.models import LoadedModel, ModelOptions, load_model, release_models, skeleton


def small() -> nn.Sequential:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    nn.init.uniform_(dict(net.named_buffers())["1.running_mean"])
    return net.eval()


def mixed() -> nn.Sequential:
    net = small().half()
    net[1].float()
    net[4].double()
    return net


MODELS: dict[str, tuple[Callable[[], nn.Sequential], str]] = {
    "half": (lambda: small().half(), "float16 (8 of 9 tensors)"),
    "bfloat16": (lambda: small().bfloat16(), "bfloat16 (8 of 9 tensors)"),
    "double": (lambda: small().double(), "float64 (8 of 9 tensors)"),
    "mixed": (mixed, "float16 (2 of 9 tensors), float64 (2 of 9 tensors)"),
}


def from_file(net: nn.Module, folder: Path) -> LoadedModel:
    torch.save({"model": net, "epoch": -1}, folder / "net.pt")
    return load_model(str(folder / "net.pt"), options=ModelOptions(trust_checkpoint=True))


def from_code(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    module = types.ModuleType("net_of_a_user")
    vars(module)["net"] = net
    monkeypatch.setitem(sys.modules, "net_of_a_user", module)
    return load_model("python:net_of_a_user:net")


def is_computed_in_float32(model: LoadedModel, net: nn.Module) -> bool:
    pixels_NCHW = torch.rand(2, 3, 8, 8)
    with torch.inference_mode():
        return torch.equal(model.forward(pixels_NCHW), copy.deepcopy(net).float()(pixels_NCHW))


@pytest.mark.parametrize("name", MODELS)
def test_a_pickled_model_of_another_type_is_computed_in_float32_and_it_is_said(name: str, tmp_path: Path) -> None:
    build, said = MODELS[name]
    model = from_file(build(), tmp_path)
    assert is_computed_in_float32(model, build())
    assert f"net.pt: {said} in the model, converted to float32" in model.notes
    bones = skeleton(str(tmp_path / "net.pt"), options=ModelOptions(trust_checkpoint=True))
    assert {parameter.dtype for parameter in bones.module.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_own_code_is_computed_in_float32_and_given_back_as_it_was(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, said = MODELS[name]
    net = build()
    model = from_code(net, monkeypatch)
    assert is_computed_in_float32(model, build())
    assert f"python:net_of_a_user:net: {said} in the model, converted to float32" in model.notes
    release_models()
    before = build().state_dict()
    assert all(tensor.dtype == before[key].dtype for key, tensor in net.state_dict().items())
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())


def test_half_weights_of_a_file_fit_a_half_model_of_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("net_of_a_user")
    vars(module)["make"] = lambda: small().half()
    monkeypatch.setitem(sys.modules, "net_of_a_user", module)
    state = {key: tensor + 1 for key, tensor in small().half().state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    model = load_model("python:net_of_a_user:make", str(tmp_path / "w.pth"))
    assert torch.equal(model.module.state_dict()["4.weight"], state["4.weight"].float())
    assert "weights in w.pth: float16 in the file, float32 in the model" in model.notes


def test_a_model_in_float32_needs_no_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any("float32" in note for note in from_file(small(), tmp_path).notes)
    assert not any("float32" in note for note in from_code(small(), monkeypatch).notes)


class Quantized(nn.Module):
    """Quantized convolution, and around it what stays in floating point."""

    def __init__(self) -> None:
        super().__init__()
        self.quantize = torch.ao.quantization.QuantStub()
        self.conv = nn.Conv2d(3, 4, 3)
        self.dequantize = torch.ao.quantization.DeQuantStub()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dequantize(self.conv(self.quantize(x))).mean((2, 3)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_quantized_model_keeps_its_integers_beside_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    net: Any = Quantized().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net.conv.qconfig = net.quantize.qconfig = net.dequantize.qconfig = torch.ao.quantization.default_qconfig
        torch.ao.quantization.prepare(net, inplace=True)
        net(torch.rand(2, 3, 8, 8))
        torch.ao.quantization.convert(net, inplace=True)
    pixels_NCHW = torch.rand(2, 3, 8, 8)
    expected = net(pixels_NCHW)
    assert "Quantized" in str(net.conv)
    assert torch.equal(from_code(net, monkeypatch).forward(pixels_NCHW), expected)
    net.head.half()
    halves = {name: parameter.float() for name, parameter in net.head.named_parameters()}
    model = from_code(net, monkeypatch)
    output = model.forward(pixels_NCHW)
    net.head.load_state_dict(halves)
    assert torch.equal(output, net(pixels_NCHW))
    assert any("float16 (2 of " in note for note in model.notes)
