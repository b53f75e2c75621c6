"""Passes follow one another as the user's own would: stopped or not, none shows in the next, or in the model."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import hookx
from hookx.capture.state import ModuleState
from hookx.cli.app import app
from hookx.errors import CaptureError, LayerError, UsageError
from kit import traps

Build = Callable[[], nn.Module]
SMALL: dict[str, Any] = {"resize": 16, "crop": 16, "workers": 0}


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Return an importable module `zoo` that holds the models of a user's program."""
    module = ModuleType("zoo")
    monkeypatch.setitem(sys.modules, "zoo", module)
    yield module


def extract(folder: Path, out: Path, layers: str = "conv", **options: Any) -> dict[str, Tensor]:
    hookx.extract("python:zoo:net", layers, folder, out=out, **{**SMALL, **options})
    features = hookx.open(out)
    return {address: features[address].torch() for address in features}


@pytest.mark.parametrize("build", [pytest.param(net, id=what) for what, net in traps.UNFINISHED.items()])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_stopped_pass_is_the_same_pass(
    build: Build, batch_size: int, zoo: Any, thumbnails: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    zoo.net = build()
    full = extract(thumbnails, tmp_path / "full", "blocks.1,.", batch_size=batch_size)["blocks.1"]
    with caplog.at_level(logging.INFO, "hookx"):
        stopped = extract(thumbnails, tmp_path / "stopped", "blocks.1", batch_size=batch_size)["blocks.1"]
    assert torch.equal(stopped, full)
    is_said = any("passes run to their end: stopping after" in record.getMessage() for record in caplog.records)
    assert is_said == (build is traps.KeepsOutOfReach)


@pytest.mark.parametrize(
    "build",
    [pytest.param(net, id=what) for what, net in (traps.HARMLESS | traps.UNFINISHED).items() if what != "bytes"],
)
def test_a_run_leaves_the_model_as_it_was(build: Build, zoo: Any, thumbnails: Path, tmp_path: Path) -> None:
    zoo.net = build().train()
    state = ModuleState.of(zoo.net)
    extract(thumbnails, tmp_path / "out", "*", batch_size=4)
    assert state.changed() == [] and zoo.net.training


def test_a_run_leaves_mode_memory_layout_and_weights_of_a_users_model(
    zoo: Any, thumbnails: Path, tmp_path: Path
) -> None:
    zoo.net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).train()
    zoo.net[0] = nn.Conv2d(3, 8, 3)
    zoo.net[1].eval()
    torch.save({name: value + 1 for name, value in zoo.net.state_dict().items()}, tmp_path / "weights.pt")
    strides = [parameter.stride() for parameter in zoo.net.parameters()]
    values = {name: value.clone() for name, value in zoo.net.state_dict().items()}
    for options in ({"memory_format": "channels_last"}, {"weights": str(tmp_path / "weights.pt")}):
        extract(thumbnails, tmp_path / str(len(options)) / next(iter(options)), "2", **options)
        assert [module.training for module in zoo.net.modules()] == [True, True, False, True]
        assert [parameter.stride() for parameter in zoo.net.parameters()] == strides
        assert all(torch.equal(value, values[name]) for name, value in zoo.net.state_dict().items())


@pytest.mark.parametrize(
    ("layers", "options", "error"),
    [
        ("head", {}, LayerError),  # refused by the probe
        ("nothing", {}, LayerError),  # refused before it
        ("conv", {"device": "cuda:99"}, UsageError),
    ],
)
def test_a_failed_run_leaves_the_model_as_it_was_and_nothing_for_the_next(
    layers: str, options: Any, error: type[Exception], zoo: Any, thumbnails: Path, tmp_path: Path
) -> None:
    zoo.net = traps.Trap(traps.lagging, mean=torch.zeros(4, 1, 1)).train()
    state = ModuleState.of(zoo.net)
    with pytest.raises(error):
        extract(thumbnails, tmp_path / "failed", layers, **options)
    assert state.changed() == [] and zoo.net.training
    zoo.net = traps.Trap(lambda _, y, x: y)
    zoo.net.conv.weight.data.zero_()
    assert len(extract(thumbnails, tmp_path / "next")["conv"].flatten(2).unique(dim=2)[0, 0]) == 1


def test_a_run_that_fails_on_its_way_leaves_the_model_as_it_was(zoo: Any, thumbnails: Path, tmp_path: Path) -> None:
    def fail_on_real_images(self: Any, y: Tensor, x: Tensor) -> Tensor:
        self.kept.append(y)
        if len(x) > 5:
            raise ValueError("too many")
        return y

    zoo.net = traps.Trap(fail_on_real_images, kept=[])
    state = ModuleState.of(zoo.net)
    with pytest.raises(CaptureError, match="too many"):
        extract(thumbnails, tmp_path / "out", ".", batch_size=8)
    assert state.changed() == []


def test_a_factory_that_returns_another_model_after_a_failed_run_is_asked_again(
    zoo: Any, thumbnails: Path, tmp_path: Path
) -> None:
    def build() -> nn.Module:
        return traps.Trap(zoo.head)

    zoo.net, zoo.head = build, lambda _, y, x: y / len(x)
    with pytest.raises(LayerError, match="number of images"):
        extract(thumbnails, tmp_path / "out", "head")
    zoo.head = lambda _, y, x: y * 2
    assert extract(thumbnails, tmp_path / "out", "head")["head"].shape == (24, 4, 4, 4)


def test_listing_layers_and_drawing_them_leave_the_model_as_it_was(zoo: Any, thumbnails: Path, tmp_path: Path) -> None:
    zoo.net = traps.Trap(traps.kept_map, map=None, maps=[]).train()
    zoo.net.input_size = (3, 16, 16)
    state = ModuleState.of(zoo.net)
    result = CliRunner().invoke(app, ["list-layers", "python:zoo:net"])
    assert "head" in result.stdout and state.changed() == [] and zoo.net.training
    file = next(thumbnails.rglob("*.png"))
    hookx.visualize("python:zoo:net", "conv,head", file, out=tmp_path, resize=16, crop=16)
    assert state.changed() == [] and zoo.net.training


def test_what_every_pass_keeps_does_not_grow_with_the_number_of_images(
    zoo: Any, thumbnails: Path, tmp_path: Path
) -> None:
    def head(self: Any, y: Tensor, x: Tensor) -> Tensor:
        self.maps.append(y)
        assert len(self.maps) < 10
        return y

    zoo.net = traps.Trap(head, maps=[])
    assert len(extract(thumbnails, tmp_path / "out", "head", batch_size=1)["head"]) == 24


@pytest.mark.parametrize("batch_size", [1, 4])
def test_workers_put_the_same_things_back(batch_size: int, zoo: Any, thumbnails: Path, tmp_path: Path) -> None:
    zoo.net = traps.KeepsFirst()
    one = extract(thumbnails, tmp_path / "one", "blocks.1", batch_size=batch_size)
    two = extract(thumbnails, tmp_path / "two", "blocks.1", batch_size=batch_size, workers=2)
    assert torch.equal(one["blocks.1"], two["blocks.1"])


def test_a_model_that_fails_on_ordinary_images_is_an_error_that_says_so(
    zoo: Any, thumbnails: Path, tmp_path: Path
) -> None:
    zoo.net = traps.Trap(lambda _, y, x: y @ x)
    with pytest.raises(CaptureError, match=r"the model fails on a batch of images \(1, 3, 16, 16\)"):
        extract(thumbnails, tmp_path / "out")


def test_a_batch_of_one_image_is_all_that_a_tensor_without_a_batch_dimension_depends_on(
    zoo: Any, thumbnails: Path, tmp_path: Path
) -> None:
    zoo.net = traps.Trap(lambda _, y, x: {"pairs": y.flatten(1) @ y.flatten(1).T, "mean": y.mean(0)})
    stored = extract(thumbnails, tmp_path, "head", batch_size=1)
    assert stored["head/pairs"].shape == (24, 1) and stored["head/mean"].shape == (24, 4, 4, 4)
    assert len(stored["head/mean"].unique(dim=0)) == 24
