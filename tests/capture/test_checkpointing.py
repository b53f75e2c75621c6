"""`Capture` of layers that backward computes again: activation checkpointing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from hookx import Capture
from kit.nets import images


class Copy(nn.Module):
    """Does what hookx does in between, for checkpoints that remember results by the operation."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * 2).clone()


class Checkpointed(nn.Module):
    """A block that backward computes again, in one of PyTorch's ways."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.how = how
        self.stem = nn.Conv2d(3, 4, 1)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), Copy(), nn.Sigmoid())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = checkpoint(self.block, x, **self.how) if self.how else self.block(x)
        return self.head(x.mean((2, 3)))


def save_copies(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    is_copy = operation is torch.ops.aten.clone.default
    return CheckpointPolicy.MUST_SAVE if is_copy else CheckpointPolicy.PREFER_RECOMPUTE


WAYS: dict[str, dict[str, Any]] = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "selective": {
        "use_reentrant": False,
        "context_fn": lambda: create_selective_checkpoint_contexts(save_copies),
    },
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("detach", [True, False], ids=["detached", "attached"])
def test_what_backward_computes_again_is_not_captured(way: str, detach: bool) -> None:
    net, plain = Checkpointed(**WAYS[way]).train(), Checkpointed().train()
    plain.load_state_dict(net.state_dict())
    pixels = images()
    plain(pixels).sum().backward()
    asked = "stem,block.0,block.1,block.1@norm23,block.2,block.3,block.4,head"
    with Capture(net, asked, keep=None, detach=detach, transform=lambda maps: maps * maps.tanh()) as capture:
        output = net(pixels)
        taken = {address: value.detach().clone() for address, value in capture.items()}
        output.sum().backward()
        assert list(capture) == list(taken) == asked.split(",")
        assert all(torch.equal(capture[address], value) for address, value in taken.items())
        assert len(capture.history("block.0")) == 1
        assert "2 calls" not in capture.summary()
    for (name, weight), expected in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert weight.grad is not None and expected.grad is not None
        assert torch.equal(weight.grad, expected.grad), name


def test_gradients_reach_a_layer_within_a_checkpoint() -> None:
    net, pixels = Checkpointed(use_reentrant=False).eval(), images()
    with Capture(net, "block.1", detach=False) as capture:
        score = net(pixels)[:, 0].sum()
    [gradient] = torch.autograd.grad(score, capture["block.1"])
    maps = net.block[1](net.block[0](net.stem(pixels))).detach().requires_grad_()
    [expected] = torch.autograd.grad(net.head(net.block[2:](maps).mean((2, 3)))[:, 0].sum(), maps)
    assert torch.equal(gradient, expected)


class Nested(nn.Module):
    """A checkpoint within a checkpoint, with random numbers and batch statistics."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Dropout(0.3))
        self.head = nn.Conv2d(4, 2, 1)

    def run(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return function(x) if self.use_reentrant is None else checkpoint(function, x, use_reentrant=self.use_reentrant)

    def inner(self, x: Tensor) -> Tensor:
        return self.run(self.block, self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self.inner, x))


@pytest.mark.parametrize("detach", [True, False], ids=["detached", "attached"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_what_nested_checkpoints_compute_again_is_not_captured(use_reentrant: bool, detach: bool) -> None:
    net = Nested(use_reentrant).train()
    gradients, pixels = [], images()
    for how, layers in ((None, ""), (use_reentrant, "**,block.0/in")):
        other, given = copy.deepcopy(net), pixels.clone().requires_grad_()
        other.use_reentrant = how
        torch.manual_seed(0)
        with Capture(other, layers, keep=None, detach=detach) as capture:
            for _ in range(2):  # gradients accumulate
                output = other(given)
                taken = {address: value.detach().clone() for address, value in capture.items()}
                output.sum().backward()
                assert all(torch.equal(capture[address], value) for address, value in taken.items())
            if layers:
                assert len(taken) == 9 and len(capture.history("block.0")) == 2
        gradients.append([given.grad, *(weight.grad for weight in other.parameters())])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*gradients, strict=True))


def test_an_attached_activation_without_gradient_is_said(caplog: pytest.LogCaptureFixture) -> None:
    pixels = images().requires_grad_()
    with Capture(Nested(True).train(), "block.0,head", detach=False) as capture:
        capture.model(pixels)
        capture.model(pixels)
    assert not capture["block.0"].requires_grad and capture["head"].requires_grad
    [said] = caplog.messages
    assert "'block.0' runs without gradients" in said and "use_reentrant=False keeps them" in said
    caplog.clear()
    with Capture(Nested(False).train(), "block.0", detach=False) as capture:
        capture.model(pixels)
    with Capture(Nested(True).train(), "block.0", detach=False) as capture, torch.no_grad():
        capture.model(pixels)
    assert not caplog.messages


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_two_passes_before_one_backward_are_two_passes(use_reentrant: bool) -> None:
    net, pixels = Nested(use_reentrant).train(), images().requires_grad_()
    with Capture(net, "block.0,head", keep=None, detach=False) as capture:
        loss = net(pixels).sum() + net(pixels * 2).sum()
        expected = [value.detach().clone() for value in capture.history("block.0")]
        loss.backward()
        found = capture.history("block.0")
    assert len(found) == 2 and all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
