"""What a run stores of layers that return unusual types, and how it is read back."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hookx
from hookx.check.inspect import Moments
from hookx.errors import CaptureError, HookxError, LayerError, ModelError, UsageError
from hookx.exporting.printing import read_activation, to_json, to_text
from hookx.launch.extract import extract
from kit.nets import images
from kit.runs import same_bits

SMALL: dict[str, Any] = {"weights": "none", "resize": 32, "crop": 32, "workers": 0, "batch_size": 3}

NET = """
import torch
from torch import nn

class Convert(nn.Module):
    def forward(self, y):
        return CONVERT[self.to_type](y)

CONVERT = {
    "float8_e4m3fn": lambda y: y.to(torch.float8_e4m3fn),
    "float8_e5m2": lambda y: y.to(torch.float8_e5m2),
    "float8_e4m3fnuz": lambda y: y.to(torch.float8_e4m3fnuz),
    "uint16": lambda y: (y.nan_to_num().abs() * 9999).to(torch.uint16),
    "uint32": lambda y: (y.nan_to_num().abs() * 9999).to(torch.uint32),
    "uint64": lambda y: (y.nan_to_num().abs() * 9999).to(torch.uint64),
    "bool": lambda y: y > 0,
    "complex64": lambda y: torch.complex(y, -y),
    "complex128": lambda y: torch.complex(y, -y).to(torch.complex128),
    "complex32": lambda y: torch.complex(y, -y).to(torch.complex32),
    "sparse": lambda y: y.to_sparse(),
    "quantized": lambda y: torch.quantize_per_tensor(y, 0.01, 64, torch.quint8),
}

class Net(nn.Module):
    def __init__(self, to_type="bool"):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.convert = nn.Conv2d(3, 4, 8, 8), Convert()
        self.convert.to_type = to_type

    def forward(self, x):
        y = self.conv(x).mean((2, 3))
        self.convert(y)
        return y
"""


@pytest.fixture
def net(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(NET)
    return f"{tmp_path}/net.py:Net"


def returned(to_type: str, conv: Tensor) -> Tensor:
    """Convert what the convolution returned, by an expression of its own."""
    y = conv.mean((2, 3))
    if to_type.startswith("uint"):
        return (y.abs() * 9999).to(getattr(torch, to_type))
    if to_type.startswith("complex"):
        return torch.complex(y, -y).to(getattr(torch, to_type))
    return y > 0 if to_type == "bool" else y.to(getattr(torch, to_type))


@pytest.mark.parametrize("to_type", ["float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64", "bool", "complex64"])
def test_a_type_that_a_file_can_hold_is_stored_as_it_is_and_read_back_by_everything(
    net: str, thumbnails: Path, tmp_path: Path, to_type: str
) -> None:
    out = tmp_path / "out"
    extract(net, "conv,convert", thumbnails, out=out, model_args={"to_type": to_type}, **SMALL)
    features = hookx.open(out)
    expected = returned(to_type, features["conv"][:])
    assert same_bits(features["convert"][:], expected)
    assert same_bits(next(features["convert"].shards())[0], expected)
    assert not hookx.verify(out).problems
    assert not hookx.recompute(out, 3, thumbnails, model=net, model_args={"to_type": to_type}).problems
    in_numpy = (expected.float() if "float8" in to_type else expected).numpy()
    if "float8" in to_type:
        with pytest.warns(UserWarning, match=f"'convert' is {to_type}, which numpy lacks: it becomes float32, exactly"):
            assert np.array_equal(features["convert"].numpy(), in_numpy)
    else:
        assert np.array_equal(features["convert"].numpy(), in_numpy)
    hookx.export(out, "convert", tmp_path / "a.npy")
    assert np.array_equal(np.load(tmp_path / "a.npy"), in_numpy)
    statistics = hookx.inspect(out, statistics=True).layers[1].statistics
    assert statistics and statistics.values == expected.numel() * (1 + expected.is_complex())
    assert expected.is_complex() or statistics.zeros == (in_numpy == 0).sum()
    activation = read_activation(out, "convert", features.keys[0])
    assert b"".join(to_text(activation.values)) and b"".join(to_json(activation))
    assert same_bits(torch.stack([features.dataset("convert")[row][0] for row in range(24)]), expected)


def test_a_quantized_activation_is_stored_as_the_numbers_that_it_stands_for(
    net: str, thumbnails: Path, tmp_path: Path
) -> None:
    extract(net, "conv,convert", thumbnails, out=tmp_path / "out", model_args={"to_type": "quantized"}, **SMALL)
    features = hookx.open(tmp_path / "out")
    codes = torch.quantize_per_tensor(features["conv"][:].mean((2, 3)), 0.01, 64, torch.quint8)
    assert torch.equal(features["convert"][:], codes.dequantize())


@pytest.mark.parametrize(
    ("to_type", "stored"),
    [
        ("float8_e4m3fnuz", "float32"),
        ("float8_e4m3fn", "float32"),
        ("complex128", "complex64"),
        ("complex32", "complex64"),
    ],
)
def test_dtype_converts_what_a_file_cannot_hold(
    net: str, thumbnails: Path, tmp_path: Path, to_type: str, stored: str
) -> None:
    out = tmp_path / "out"
    extract(net, "conv,convert", thumbnails, out=out, model_args={"to_type": to_type}, dtype="fp32", **SMALL)
    features = hookx.open(out)
    expected = returned(to_type, features["conv"][:]).to(getattr(torch, stored))
    assert same_bits(features["convert"][:], expected)
    assert "--dtype float32" in features.plan.command("out/") or stored == "float32"


@pytest.mark.parametrize("to_type", ["float8_e4m3fnuz", "complex128", "complex32"])
def test_a_type_that_no_file_can_hold_is_an_error_by_name_and_left_out_under_a_glob(
    net: str, thumbnails: Path, tmp_path: Path, to_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = {"model_args": {"to_type": to_type}, **SMALL}
    reason = f"'convert' is {to_type}, which safetensors files cannot hold"
    for layers in ("convert", "**,convert", "con*,convert"):
        with pytest.raises(UsageError, match=rf"^{reason}\n  convert it: --dtype fp32$"):
            extract(net, layers, thumbnails, out=tmp_path / "out", **arguments)
    with pytest.raises(LayerError, match=f"^{reason}\n"):
        extract(net, "convert*", thumbnails, out=tmp_path / "out", **arguments)
    with caplog.at_level(logging.INFO, "hookx"):
        extract(net, "**", thumbnails, out=tmp_path / "out", **arguments)
    assert list(hookx.open(tmp_path / "out")) == ["conv"]
    assert f"left out: {reason}; convert it: --dtype fp32" in caplog.messages


def test_a_sparse_layer_is_an_error_by_name_and_left_out_under_a_glob(
    net: str, thumbnails: Path, tmp_path: Path
) -> None:
    arguments = {"model_args": {"to_type": "sparse"}, **SMALL}
    with pytest.raises(LayerError, match=r"'convert' cannot be captured: it is not a dense tensor \(sparse_coo\)"):
        extract(net, "convert", thumbnails, out=tmp_path / "out", **arguments)
    extract(net, "**", thumbnails, out=tmp_path / "out", **arguments)
    assert list(hookx.open(tmp_path / "out")) == ["conv"]


@pytest.mark.parametrize(
    ("to_type", "reduced", "stored"),
    [
        ("float8_e4m3fn", "mean1", torch.float32),
        ("float8_e5m2", "norm1", torch.float32),
        ("float8_e5m2", "max1", torch.float8_e5m2),
        ("float8_e4m3fn", "flatten", torch.float8_e4m3fn),
        ("uint16", "min1", torch.uint16),
        ("uint32", "sum1", torch.int64),
    ],
)
def test_reductions_of_small_types_are_those_of_their_values(
    net: str, thumbnails: Path, tmp_path: Path, to_type: str, reduced: str, stored: torch.dtype
) -> None:
    layers = f"convert,convert@{reduced}"
    extract(net, layers, thumbnails, out=tmp_path / "out", model_args={"to_type": to_type}, **SMALL)
    features = hookx.open(tmp_path / "out")
    values = features["convert"][:].to(torch.float64)
    expected = {
        "mean1": lambda: values.mean(1),
        "norm1": lambda: values.square().sum(1).sqrt(),
        "max1": lambda: values.amax(1),
        "min1": lambda: values.amin(1),
        "sum1": lambda: values.sum(1),
        "flatten": lambda: values,
    }[reduced]()
    found = features[f"convert@{reduced}"][:]
    assert found.dtype == stored and torch.allclose(found.to(torch.float64), expected, rtol=1e-6)


def test_what_torch_cannot_reduce_is_an_error_by_name_and_left_out_under_a_glob(
    net: str, thumbnails: Path, tmp_path: Path
) -> None:
    arguments = {"model_args": {"to_type": "uint64"}, **SMALL}
    with pytest.raises(HookxError, match="'convert@max1' cannot be computed from uint64: torch has no arithmetic"):
        extract(net, "convert@max1", thumbnails, out=tmp_path / "out", **arguments)
    extract(net, "**@max1", thumbnails, out=tmp_path / "out", **arguments)
    assert list(hookx.open(tmp_path / "out")) == ["conv@max1"]


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        ("def to(self, *args, **kwargs): raise RuntimeError('offloaded')", CaptureError, "cannot be moved to cpu"),
        ("def eval(self): raise TypeError('no eval here')", ModelError, "cannot be put into eval mode"),
    ],
)
def test_a_model_that_cannot_be_moved_is_an_error_that_tells_why(
    thumbnails: Path, tmp_path: Path, method: str, error: type[HookxError], message: str
) -> None:
    (tmp_path / "net.py").write_text(f"{NET}\n    {method}\n")
    with pytest.raises(error, match=rf"net\.py:Net {message}.*(offloaded|no eval here)"):
        extract(f"{tmp_path}/net.py:Net", "conv", thumbnails, out=tmp_path / "out", **SMALL)


def test_a_pickled_model_that_cannot_be_moved_is_an_error_that_tells_why(thumbnails: Path, tmp_path: Path) -> None:
    torch.save(Stuck(), tmp_path / "net.pt")
    published = {**SMALL, "weights": "default"}
    with pytest.raises(ModelError, match=r"net\.pt' cannot be moved to the CPU: RuntimeError: it stays"):
        extract(f"{tmp_path}/net.pt", "conv", thumbnails, out=tmp_path / "out", trust_checkpoint=True, **published)


class Stuck(nn.Module):
    """A model that refuses to move, as quantized ones do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.conv(x)
        return features

    def to(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("it stays where it is")


def test_a_summary_tells_the_batch_size_that_ran(net: str, thumbnails: Path, tmp_path: Path) -> None:
    assert extract(net, "conv", thumbnails, out=tmp_path / "out", **SMALL).batch_size == 3
    again = extract(net, "conv", thumbnails, out=tmp_path / "out", **{**SMALL, "batch_size": 5})
    assert (again.shards_computed, again.batch_size) == (0, 3)


def test_statistics_of_small_types_are_those_of_their_values() -> None:
    values = images(2).mul(5)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint64):
        small = (values.abs() if not dtype.is_floating_point else values).to(dtype)
        moments = Moments()
        moments.add(small)
        exact = small.to(torch.float64)
        found = moments.statistics()
        assert (found.values, found.zeros) == (exact.numel(), int((exact == 0).sum()))
        assert found.mean == pytest.approx(float(exact.mean())) and found.maximum == float(exact.max())
