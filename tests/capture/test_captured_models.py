"""`Capture` beside whatever else is done to a model: checkpoints, copies, other hooks, compilers, an end."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torchvision.models import get_model

from hookx import Capture
from hookx.errors import CaptureError, LayerError, NotCapturedError
from kit import nets
from kit.nets import Features, hooks_on, images

# --- recomputation -------------------------------------------------------------------------------------------------


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


# --- copies of the model -------------------------------------------------------------------------------------------


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_torch_save])
def test_a_copy_of_a_captured_model_is_not_captured(copied: Callable[[nn.Module], nn.Module]) -> None:
    net, pixels = Features().eval(), images()
    with Capture(net, "**", keep=None) as capture:
        net(pixels)
        before, alive = {**capture}, weakref.ref(capture)
        other = copied(net)
        assert torch.equal(other(pixels + 1), net(pixels + 1))
        assert len(capture.history("conv")) == 2
        assert torch.equal(capture.history("conv")[0], before["conv"])
    del capture
    gc.collect()
    assert alive() is None and hooks_on(net) == 0
    other(pixels)


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle])
def test_the_copy_of_a_model_that_holds_its_capture_has_one_of_its_own(
    copied: Callable[[nn.Module], nn.Module],
) -> None:
    net, pixels = Features().eval(), images()
    net.capture = Capture(net, "conv")  # type: ignore[assignment]
    net(pixels)
    other = copied(net)
    other(pixels + 1)
    mine, theirs = net.capture, other.capture
    assert isinstance(mine, Capture) and isinstance(theirs, Capture)
    assert theirs.model is other and list(theirs) == [] and list(mine) == ["conv"]
    theirs.add("head")
    assert torch.equal(other(pixels + 1), theirs["head"]) and list(mine) == ["conv"]
    alive = weakref.ref(mine)
    del net, mine
    gc.collect()
    assert alive() is None


def test_a_copied_model_loads_where_hookx_is_not_installed() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    with Capture(net, "**"):
        assert b"hookx" not in pickle.dumps(net)


# --- other hooks ---------------------------------------------------------------------------------------------------


def test_a_capture_stands_in_the_order_of_hooks_where_it_was_made() -> None:
    net, pixels = Features().eval(), images()
    raw = net.conv(pixels)
    net.conv.register_forward_pre_hook(lambda _module, args: (args[0] * 2,))
    net.conv.register_forward_hook(lambda _module, _args, output: output + 1)
    given, returned = pixels * 2, net.conv(pixels)
    assert not torch.equal(returned, raw)
    with Capture(net, "conv,conv/in,block/in") as capture:
        net.conv.register_forward_pre_hook(lambda _module, args: (args[0] * 0,))
        net.conv.register_forward_hook(lambda _module, _args, output: output.mul_(3), always_call=True)
        net.conv.register_forward_hook(lambda _module, _args, output: output - 7, prepend=True)
        net(pixels)
    assert torch.equal(capture["conv/in"], given)  # what the hooks before made of it, and none after
    expected = nn.functional.conv2d(pixels * 0, net.conv.weight, net.conv.bias, padding=1) - 7 + 1
    assert torch.equal(capture["conv"], expected)
    assert torch.equal(capture["block/in"], expected * 3)


def test_hooks_that_always_run_do_so_once_and_what_they_return_after_a_failure_is_not_kept() -> None:
    net, ran = nets.Fails().eval(), []

    def give(*_: Any) -> Tensor:
        ran.append(1)
        return torch.ones(1)

    net.register_forward_hook(give, always_call=True)
    with Capture(net, "conv,.") as capture:
        net.register_forward_hook(give, always_call=True)
        with pytest.raises(RuntimeError, match="always fails"):
            net(images())
    assert ran == [1, 1] and list(capture) == ["conv"]


def test_two_captures_of_one_model_do_not_know_each_other() -> None:
    net, pixels = Features().eval(), images()
    with Capture(net, "conv", keep=2) as first:
        net(pixels)
        with Capture(net, "**") as second:
            net(pixels + 1)
            first.clear()
            net(pixels + 2)
        net(pixels + 3)
    assert len(first.history("conv")) == 2 and len(second) > 5
    assert torch.equal(first["conv"], net.conv(pixels + 3)) and torch.equal(second["conv"], net.conv(pixels + 2))


# --- the end of a capture ------------------------------------------------------------------------------------------


def test_a_dropped_capture_takes_its_hooks_and_tensors_along() -> None:
    net, pixels = Features().eval(), images()
    gc.disable()  # It must not wait for a collection.
    try:
        capture = Capture(net, "**", detach=False)
        net(pixels)
        alive, held = weakref.ref(capture), weakref.ref(capture["conv"])
        del capture
        assert alive() is None and held() is None and hooks_on(net) == 0
        net(pixels)
    finally:
        gc.enable()


def test_a_capture_that_is_removed_in_the_middle_of_a_pass_keeps_what_it_has() -> None:
    net, pixels = Features().eval(), images()
    capture = Capture(net, "conv,head")
    net.block.register_forward_hook(lambda *_: capture.remove())
    net(pixels)
    assert list(capture) == ["conv"] and torch.backends.mha.get_fastpath_enabled()
    capture.add("head")
    net(pixels)
    assert list(capture) == []  # The hook removed it again.


def test_a_capture_that_is_cleared_in_the_middle_of_a_pass_holds_the_rest_of_it() -> None:
    net, pixels = Features().eval(), images()
    with Capture(net, "conv,block.relu,head") as capture:
        net.block.conv.register_forward_hook(lambda *_: capture.clear())
        net(pixels)
        assert list(capture) == ["block.relu", "head"]


# --- compiled models -----------------------------------------------------------------------------------------------


def test_layers_within_compiled_code_are_refused_by_name() -> None:
    net = Features().eval()
    compiled: Any = torch.compile(net, backend="eager")
    with pytest.raises(LayerError, match=r"cannot capture '_orig_mod.conv': torch.compile runs '.' as one program"):
        Capture(compiled, "_orig_mod.conv")
    with pytest.raises(LayerError, match=r"cannot capture 'block.conv': TorchScript runs 'block' as one program"):
        net.block = torch.jit.trace(net.block, torch.randn(1, 4, 8, 8))
        Capture(net, "conv,block.conv")
    with pytest.raises(LayerError, match=r"cannot capture 'conv': torch.compile runs 'conv' as one program"):
        net.conv.compile(backend="eager")
        Capture(net, "conv")
    assert hooks_on(net) == 0


def test_the_output_of_a_compiled_model_and_of_a_scripted_part_is_captured() -> None:
    net, pixels = Features().eval(), images()
    compiled: Any = torch.compile(net, backend="eager")
    with Capture(compiled, ".") as capture:
        output = compiled(pixels)
    assert torch.equal(capture["."], output)
    net.block = torch.jit.trace(net.block, torch.randn(1, 4, 8, 8))
    with Capture(net, "conv,block") as capture:
        net(pixels)
    assert torch.equal(capture["block"], net.block(net.conv(pixels)))


def test_compiled_code_runs_as_if_nothing_was_captured() -> None:
    net, pixels = Features().eval(), images()
    with Capture(net, "conv,block.relu", detach=False) as capture:
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        assert torch.equal(compiled(pixels), net(pixels))
        net(pixels)
    assert list(capture) == ["conv", "block.relu:0", "block.relu:1"]


def test_replicas_of_data_parallel_are_refused() -> None:
    net = Features().eval()
    with Capture(net, "conv"):
        replica = net._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        with pytest.raises(CaptureError, match=r"under nn\.DataParallel"):
            replica(images())


def test_a_model_of_data_parallel_without_devices_is_captured() -> None:
    net = nn.DataParallel(nets.InPlace()).eval()
    with Capture(net, "module.conv") as capture:
        net(images())
    with pytest.raises(NotCapturedError):
        capture["module.relu"]
    assert torch.equal(capture["module.conv"], net.module.conv(images()))


def test_a_capture_of_every_module_leaves_resnet18_as_it_is() -> None:
    net, pixels = get_model("resnet18", weights=None).train(), images(2, 64)
    other = copy.deepcopy(net)
    expected = other(pixels)
    expected.square().sum().backward()
    with Capture(net, "**,*/in", detach=False):
        output = net(pixels)
        output.square().sum().backward()
    assert torch.equal(output, expected)
    for (name, mine), theirs in zip(net.named_parameters(), other.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert torch.equal(mine.grad, theirs.grad), name
    for (name, mine), theirs in zip(net.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(mine, theirs), name
