"""`Capture` beside whatever else is done to a model: copies, other hooks, an end."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import timm.utils
import torch
import torch.distributed
from torch import Tensor, nn
from torchvision.models import get_model

from hookx import Capture
from kit import nets
from kit.nets import Features, hooks_on, images

# --- copies of the model -------------------------------------------------------------------------------------------


def by_averaging(model: nn.Module) -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(model, use_buffers=True)


def by_timm(model: nn.Module) -> nn.Module:
    return timm.utils.ModelEmaV2(model).module


def by_timm_3(model: nn.Module) -> nn.Module:
    return timm.utils.ModelEmaV3(model).module


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, by_averaging, by_timm, by_timm_3, by_pickle, by_torch_save])
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


def test_a_shallow_copy_is_another_model_with_the_same_parts() -> None:
    net, pixels = Features().eval(), images()
    with Capture(net, ".,conv", keep=None) as capture:
        net(pixels)
        other = copy.copy(net)
        other(pixels + 1)
        copy.copy(net.conv)(pixels + 2)
        assert len(capture.history(".")) == 1
        assert torch.equal(capture["conv"], net.conv(pixels + 1)) and torch.equal(capture["."], net(pixels))
    assert hooks_on(other) == 0


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
