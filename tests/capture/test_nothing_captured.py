"""What `Capture` says about layers that gave it no tensor."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from hookx import Capture
from hookx.errors import NotCapturedError
from kit.nets import images


class Pair(NamedTuple):
    first: Any
    second: Any


class Returns(nn.Module):
    """A model with a layer that returns whatever a function makes of the image."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.layer.forward = make  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        self.layer(x)
        return x + 1


@dataclasses.dataclass
class Scores:
    best: float


HOLDS_NO_TENSOR: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "None": (lambda _: None, "its layer returned None"),
    "float": (lambda _: 1.5, "its layer returned a float, not a tensor"),
    "str": (lambda _: "cat", "its layer returned a str, not a tensor"),
    "generator": (lambda x: (row for row in x), "it is a generator, which reading would use up: return a list"),
    "set": (lambda x: {x}, "it is a set, which has no order: return a list or a dict"),
    "set of numbers": (lambda _: {1, 2}, "its layer returned a set, which holds no tensor"),
    "dataclass": (lambda _: Scores(1.0), "its layer returned a Scores, which holds no tensor"),
    "named tuple": (lambda _: Pair(1, None), "its layer returned a Pair, which holds no tensor"),
    "dict": (lambda _: {}, "its layer returned a dict, which holds no tensor"),
    "list": (lambda _: [None, [1.0]], "its layer returned a list, which holds no tensor"),
    "array": (lambda x: x.numpy(), "it is a numpy.ndarray, not a tensor, and hookx cannot look into it"),
    "sparse": (lambda x: x.to_sparse(), "it is not a dense tensor (sparse_coo): use .to_dense() in the model"),
}


@pytest.mark.parametrize("kind", HOLDS_NO_TENSOR)
def test_an_output_that_holds_no_tensor_is_said(kind: str) -> None:
    make, reason = HOLDS_NO_TENSOR[kind]
    net = Returns(make).eval()
    capture = Capture(net, "layer,layer@flatten", keep=None)
    net(images())
    for address in ("layer", "layer:0", "layer@flatten", "layer/0"):
        with pytest.raises(NotCapturedError, match=re.escape(f"'{address}' was not captured: {reason}")):
            capture[address]
    with pytest.raises(NotCapturedError, match=re.escape(reason)):
        capture.history("layer")
    assert f"1 call: nothing kept; {reason}" in capture.summary()
    assert list(capture) == []


def test_a_part_that_holds_no_tensor_is_said_beside_one_that_does() -> None:
    net = Returns(lambda x: {"maps": x, "rest": {x}}).eval()
    with Capture(net, "layer") as capture:
        net(images())
    assert list(capture) == ["layer/maps"]
    with pytest.raises(NotCapturedError, match="'layer/rest' was not captured: it is a set"):
        capture["layer/rest"]
    with pytest.raises(NotCapturedError, match="'layer' was not captured; closest: layer/maps"):
        capture["layer"]


def test_a_model_that_returns_a_generator_runs_its_layers_after_the_pass() -> None:
    class Streams(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Iterator[Tensor]:
            for row in x:
                yield self.conv(row[None])

    net, pixels = Streams().eval(), images(2)
    with Capture(net, "conv,.", keep=None) as capture:
        stream = net(pixels)
        with pytest.raises(NotCapturedError, match=r"cannot read 'conv': it has not run in the last pass"):
            capture["conv"]
        with pytest.raises(NotCapturedError, match=r"'.' was not captured: it is a generator"):
            capture["."]
        rows = list(stream)
    assert torch.equal(capture["conv"], rows[-1])
