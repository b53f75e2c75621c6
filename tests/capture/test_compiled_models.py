"""`Capture` of compiled models, and programs made of captured ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.distributed
from torch import Tensor, nn

from hookx import Capture
from hookx.errors import CaptureError, LayerError, NotCapturedError
from kit.nets import Features, hooks_on, images

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


def own_features() -> nn.Module:
    """Return a net of a class of its own, for which torch.compile holds no code."""

    class Own(Features):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(self.conv(x)).mean((2, 3)))

    return Own()


def wrap(net: nn.Module) -> Any:
    return torch.compile(net, backend="aot_eager")


def compile_in_place(net: nn.Module) -> Any:
    net.compile(backend="aot_eager")
    return net


def compile_a_part(net: nn.Module) -> Any:
    net.get_submodule("block").compile(backend="aot_eager")
    return net


def compile_a_function(net: nn.Module) -> Any:
    return torch.compile(lambda pixels: net(pixels) * 1, backend="aot_eager")


@pytest.mark.parametrize("detach", [True, False], ids=["detached", "attached"])
@pytest.mark.parametrize("how", [wrap, compile_in_place, compile_a_part, compile_a_function])
def test_a_model_compiled_after_the_capture_gives_the_tensors_of_each_pass(
    how: Callable[[nn.Module], Any], detach: bool
) -> None:
    torch.compiler.reset()
    net, pixels, asked = own_features().eval(), images(), "conv,block.relu,head,conv/in,head@mean1,."
    expected = []
    with Capture(net, asked) as capture:
        for shift in range(3):
            net(pixels + shift)
            expected.append(dict(capture))
    with Capture(net, asked, keep=None, detach=detach) as capture:
        compiled = how(net)
        for shift in range(3):
            output = compiled(pixels + shift)
            assert list(capture) == list(expected[shift])
            assert all(torch.equal(capture[address], value) for address, value in expected[shift].items())
    assert len(capture.history("conv")) == 3
    if not detach:
        [gradient] = torch.autograd.grad(output.sum(), capture["conv"])
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_of_several_parts_with_the_same_code_is_captured_alone(backend: str) -> None:
    torch.compiler.reset()
    pixels = images(2, 32)
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4).eval()
    asked = ["blocks.2.attn", "blocks.1.mlp.fc1", "blocks.1.attn@attention"]
    with torch.no_grad(), Capture(net, asked) as capture:
        net(pixels)
        expected = dict(capture)
    with torch.no_grad(), Capture(net, asked, keep=None) as capture:
        compiled: Any = torch.compile(net, backend=backend)
        for _ in range(3):
            compiled(pixels)
        assert set(capture) == set(asked)
        assert all(torch.allclose(capture[address], value, atol=1e-5) for address, value in expected.items())
        assert len(capture.history("blocks.2.attn")) == 3
    with torch.no_grad(), Capture(net, "blocks.0.attn", keep=None) as capture:
        compiled(pixels)  # It was compiled with hooks on other parts.
    assert list(capture) == ["blocks.0.attn"]


def test_code_that_was_compiled_before_the_capture_is_named_and_never_call_the_model() -> None:
    torch.compiler.reset()
    net, pixels = own_features().eval(), images()
    compiled: Any = torch.compile(net, backend="eager")
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):  # as in a process without a capture so far
        compiled(pixels)
    with Capture(net, "conv") as capture:
        compiled(pixels)
        with pytest.raises(NotCapturedError, match=r"compiled before the capture was made") as caught:
            capture["conv"]
        assert "_orig_mod" in str(caught.value) and "torch.compiler.reset()" in str(caught.value)
        compiled._orig_mod(pixels)
        assert torch.equal(capture["conv"], net.conv(pixels))  # type: ignore[operator]
        capture.clear()
        torch.compiler.reset()
        compiled(pixels)
        assert list(capture) == ["conv"]


@pytest.mark.parametrize("layer", ["conv", "block.*", "_orig_mod.conv"])
def test_a_layer_of_a_compiled_model_is_refused_with_the_model_that_can_be_captured(layer: str) -> None:
    net = own_features().eval()
    with pytest.raises(LayerError, match=r"cannot capture '_orig_mod\.\S+': torch.compile runs '.'") as caught:
        Capture(torch.compile(net, backend="eager"), layer)  # type: ignore[arg-type]
    assert "capture and call model._orig_mod: hookx.Capture(model._orig_mod, '" in str(caught.value)
    assert hooks_on(net) == 0


def test_a_layer_of_a_compiled_part_is_refused_and_the_part_itself_is_captured() -> None:
    torch.compiler.reset()
    net, pixels = own_features().eval(), images()
    expected = net.block(net.conv(pixels))  # type: ignore[operator]
    net.block = torch.compile(net.block, backend="eager")  # type: ignore[assignment,arg-type]
    with pytest.raises(LayerError, match=r"hookx.Capture\(model.block._orig_mod, 'conv'\)"):
        Capture(net, "block.conv")
    with pytest.raises(LayerError, match=r"no layer matches 'block.convolution'"):
        Capture(net, "block.convolution")
    with Capture(net, "block") as capture:
        net(pixels)
    assert torch.equal(capture["block"], expected)


def test_a_graph_without_breaks_says_that_a_capture_breaks_it() -> None:
    torch.compiler.reset()
    net, pixels = own_features().eval(), images()
    compiled: Any = torch.compile(net, backend="eager", fullgraph=True)
    with Capture(net, "conv"), pytest.raises(RuntimeError, match=r"compile without fullgraph=True, or after capture"):
        compiled(pixels)
    torch.compiler.reset()
    assert torch.equal(compiled(pixels), net(pixels))


# --- programs made of a captured model -----------------------------------------------------------------------------


def by_export(net: nn.Module, pixels: Tensor) -> Any:
    return torch.export.export(net, (pixels,)).module()


def by_strict_export(net: nn.Module, pixels: Tensor) -> Any:
    return torch.export.export(net, (pixels,), strict=True).module()


def by_trace(net: nn.Module, pixels: Tensor) -> Any:
    return torch.jit.trace(net, pixels)


def by_fx(net: nn.Module, _pixels: Tensor) -> Any:
    return torch.fx.symbolic_trace(net)


@pytest.mark.parametrize("made", [by_export, by_strict_export, by_trace, by_fx])
def test_a_program_made_of_a_captured_model_computes_what_the_model_does(made: Callable[..., Any]) -> None:
    net, pixels = own_features().eval(), images()
    with Capture(net, "conv,block.relu", detach=False) as capture:
        program = made(net, pixels)
        capture.clear()
        output = program(pixels)
        assert "." not in capture and torch.equal(output, net(pixels))
        assert torch.equal(capture["conv"], net.conv(pixels))  # type: ignore[operator]


def test_scripting_a_captured_model_says_why_it_cannot_be() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    with Capture(net, "0") as capture:
        with pytest.raises(CaptureError, match=r"TorchScript compiles the hooks of a module(.|\n)*capture.remove\(\)"):
            torch.jit.script(net)
        capture.remove()
        torch.jit.script(net)
