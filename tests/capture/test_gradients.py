"""`Capture(detach=False)`: gradients at a layer, while the model does what it always does."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torchvision.models import VisionTransformer, get_model

from hookx import Capture
from kit import nets
from kit.nets import images


def expected_gradient(net: nn.Module, path: str, pixels: Tensor, call: int = 0, part: int | None = None) -> Tensor:
    """Put a leaf in place of what a layer returns, and differentiate with respect to it."""
    leaves: list[Tensor] = []

    def replace(_module: nn.Module, _args: Any, output: Any) -> Any:
        tensor = output if part is None else output[part]
        leaves.append(tensor.detach().clone().requires_grad_())
        if len(leaves) != call + 1:
            return None
        flowing = leaves[-1].clone()  # In-place operations may follow.
        return flowing if part is None else tuple(flowing if i == part else item for i, item in enumerate(output))

    hook = net.get_submodule(path).register_forward_hook(replace)
    score = net(pixels)[:, 0].sum()
    hook.remove()
    [gradient] = torch.autograd.grad(score, leaves[call])
    return gradient


def small_vit() -> nn.Module:
    vit = VisionTransformer(image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16)
    nn.init.normal_(vit.heads[-1].weight)  # torchvision sets it to zero, and every gradient with it
    return vit


class UnbindAttention(nn.Module):
    """Layers get and return views of one tensor, as queries and keys do in timm."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(3, 12, 4, 4)
        self.q_norm, self.k_norm, self.flatten = nn.Identity(), nn.LayerNorm(4), nn.Flatten(2)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.flatten(self.qkv(x)).mT
        q, k, v = maps.reshape(*maps.shape[:2], 3, 4).unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)
        return self.head(((q @ k.mT).softmax(-1) @ v).mean(1) + maps[..., :4].mean(1))


def resnet18() -> nn.Module:
    return get_model("resnet18", weights=None)


LAYERS: list[tuple[Callable[[], nn.Module], str]] = [
    (resnet18, "conv1"),
    (resnet18, "bn1"),
    (resnet18, "relu"),
    (resnet18, "layer1.0.bn2"),
    (resnet18, "layer1.0.relu:0"),
    (resnet18, "layer1.0.relu:1"),
    (resnet18, "layer2.0"),
    (resnet18, "layer4"),
    (resnet18, "avgpool"),
    (resnet18, "."),
    (small_vit, "conv_proj"),
    (small_vit, "encoder.layers.encoder_layer_0.ln_1"),
    (small_vit, "encoder.layers.encoder_layer_1"),
    (small_vit, "encoder.layers.encoder_layer_1.self_attention/0"),
    (small_vit, "encoder.layers.encoder_layer_1.mlp.1"),
    (small_vit, "encoder.ln"),
    (UnbindAttention, "qkv"),
    (UnbindAttention, "flatten"),
    (UnbindAttention, "q_norm"),
    (UnbindAttention, "k_norm"),
]


@pytest.mark.parametrize(("build", "address"), LAYERS, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_gradient_at_a_layer_is_that_of_what_it_returned(
    build: Callable[[], nn.Module], address: str, training: bool
) -> None:
    torch.manual_seed(0)
    net, pixels = build().train(training), images(2, 32 if build is resnet18 else 16)
    path, _, part = address.partition("/")
    path, _, call = path.partition(":")
    expected = expected_gradient(net, path if path != "." else "", pixels, int(call or 0), int(part) if part else None)
    output = net(pixels)
    with Capture(net, address) as detached:
        net(pixels)
    with Capture(net, [address, "**"], detach=False) as capture:  # in company of captures at every other layer
        score = net(pixels)[:, 0].sum()
    assert torch.equal(score, output[:, 0].sum())
    assert torch.equal(capture[address], detached[address])
    [gradient] = torch.autograd.grad(score, capture[address])
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)
    assert gradient.abs().sum() > 0


def test_grad_cam_through_an_inplace_relu() -> None:
    net, pixels = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten()), images()
    with Capture(net, "0,1", detach=False) as capture:
        y = net(pixels)
    assert torch.equal(capture["1"], net[1](net[0](pixels))) and (capture["1"] < 0).any()
    [gradient] = torch.autograd.grad(y[:, 0].sum(), capture["1"], retain_graph=True)
    expected = torch.zeros_like(gradient)
    expected[:, 0, 0, 0] = (capture["1"][:, 0, 0, 0] > 0).float()
    assert torch.equal(gradient, expected)
    capture["0"].retain_grad()
    y[:, 0].sum().backward()
    assert capture["0"].grad is not None and capture["0"].grad.abs().sum() > 0


def test_gradients_of_weights_are_the_same_with_every_layer_captured() -> None:
    for build in (resnet18, small_vit, UnbindAttention):
        net, pixels = build().train(), images(2, 32 if build is resnet18 else 16)
        expected = torch.autograd.grad(net(pixels).square().sum(), list(net.parameters()))
        with Capture(net, "**", detach=False) as outputs, Capture(net, "**/in", detach=False) as inputs:
            found = torch.autograd.grad(net(pixels).square().sum(), list(net.parameters()))
        assert outputs and inputs
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


# --- inputs, parts, reductions -------------------------------------------------------------------------------------


def test_the_gradient_at_the_input_of_a_layer() -> None:
    head = nn.Linear(256, 2)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Flatten(), head)
    for pixels in (images(), images().requires_grad_()):
        with Capture(net, "0,0/in,1/in,3/in", detach=False) as capture:
            score = net(pixels)[:, 0].sum()
        expected = head.weight[0].expand(3, -1)
        [flat, maps, returned] = torch.autograd.grad(
            score, [capture["3/in"], capture["1/in"], capture["0"]], retain_graph=True
        )
        assert torch.equal(flat, expected)
        assert torch.equal(maps, expected.view(3, 4, 8, 8) * (capture["0"] > 0)) and torch.equal(returned, maps)
        assert torch.equal(capture["0/in"], pixels) and torch.equal(capture["1/in"], capture["0"])
        if pixels.requires_grad:  # A leaf goes on as an alias.
            [at_input, at_pixels] = torch.autograd.grad(score, [capture["0/in"], pixels])
            assert torch.equal(at_input, at_pixels) and at_input.abs().sum() > 0


@dataclasses.dataclass(frozen=True)
class Result:
    """A frozen dataclass of outputs."""

    maps: Tensor
    name: str = "maps"


class Output:
    """An object with tensors in its attributes."""

    def __init__(self, **parts: Any) -> None:
        self.__dict__.update(parts)


class Answer(dict[str, Any]):
    """A mapping that offers its items as attributes, too, as outputs of transformers do."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(parts)
        self.__dict__.update(parts)


class ReturnsViews(nn.Module):
    """Gives views and a parameter, which autograd lets nobody change, in a structure."""

    def __init__(self, pack: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.pack = pack
        self.weight = nn.Parameter(torch.tensor([2.0, 3.0]))

    def forward(self, x: Tensor) -> Any:
        left, right = x.mean((2, 3)).repeat(1, 2)[:, :4].chunk(2, 1)
        return self.pack(left, right, self.weight)


class Sums(nn.Module):
    """Adds up what is in a structure, each with a weight of its own."""

    def __init__(self, pack: Callable[[Tensor, Tensor, Tensor], Any], unpack: Callable[[Any], list[Tensor]]) -> None:
        super().__init__()
        self.parts, self.unpack = ReturnsViews(pack), unpack

    def forward(self, x: Tensor) -> Tensor:
        left, right, weight = self.unpack(self.parts(x))
        return (left * 2 + right * 3 * weight).relu_()


STRUCTURES: dict[str, tuple[Callable[..., Any], Callable[[Any], list[Tensor]], str]] = {
    "tuple": (lambda a, b, c: (a, b, c), list, "/0 /1 /2"),
    "list": (lambda a, b, c: [a, [b, c]], lambda x: [x[0], *x[1]], "/0 /1/0 /1/1"),
    "named tuple": (lambda a, b, c: (nets.Pair(a, b), c), lambda x: [*x[0], x[1]], "/0/left /0/right /1"),
    "dict": (lambda a, b, c: {"a": a, "b": {"c": b}, "d": c}, lambda x: [x["a"], x["b"]["c"], x["d"]], "/a /b/c /d"),
    "object": (lambda a, b, c: Output(a=a, b=(b, c)), lambda x: [x.a, *x.b], "/a /b/0 /b/1"),
    "attributes": (lambda a, b, c: Answer(a=a, b=b, c=c), lambda x: [x.a, x["b"], x.c], "/a /b /c"),
    "deque": (lambda a, b, c: (deque([a, b]), c), lambda x: [*x[0], x[1]], "/0/0 /0/1 /1"),
    "dataclass": (lambda a, b, c: (Result(a), b, c), lambda x: [x[0].maps, *x[1:]], "/0/maps /1 /2"),
}


@pytest.mark.parametrize("kind", STRUCTURES)
def test_every_part_of_a_structure_has_its_gradient(kind: str) -> None:
    pack, unpack, parts = STRUCTURES[kind]
    addresses = [f"parts{part}" for part in parts.split()]
    net, pixels = Sums(pack, unpack), images().abs().requires_grad_()
    expected = net(pixels)
    with Capture(net, "parts", detach=False) as capture:
        output = net(pixels)
    assert list(capture) == addresses and torch.equal(output, expected)
    left, right, weight = torch.autograd.grad(output.sum(), [capture[address] for address in addresses])
    assert torch.equal(left, torch.full((3, 2), 2.0))
    assert torch.equal(right, torch.tensor([6.0, 9.0]).expand(3, 2))
    assert torch.equal(weight, (capture[addresses[1]] * 3).sum(0))


def test_a_reduction_hangs_on_the_activation_that_is_on_the_path() -> None:
    net, pixels = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)).eval(), images()
    with Capture(net, "1,1@mean23", detach=False, transform=None) as capture:
        capture.add({"squares": "1"}, transform=lambda maps: maps.square())
        score = net(pixels)[:, 0].sum()
    [gradient] = torch.autograd.grad(capture["1@mean23"].sum(), capture["1"], retain_graph=True)
    assert torch.allclose(gradient, torch.full_like(gradient, 1 / 36))
    [gradient] = torch.autograd.grad(capture["squares"].sum(), capture["1"], retain_graph=True)
    assert torch.equal(gradient, 2 * capture["1"])
    with pytest.raises(RuntimeError, match="to not have been used in the graph"):
        torch.autograd.grad(score, capture["1@mean23"], retain_graph=True)
    capture["1@mean23"].sum().backward()
    assert net[0].weight.grad is not None


def test_what_a_hook_chooses_of_the_output_is_on_the_path() -> None:
    net, pixels = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)), images()
    with Capture(net, "0", detach=False, hook=lambda _module, _args, output: output) as capture:
        score = net(pixels).sum()
    [gradient] = torch.autograd.grad(score, capture["0"])
    assert torch.equal(gradient, (capture["0"] > 0).float())


def test_gradients_can_be_differentiated_again() -> None:
    stem, head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid()), nn.Sequential(nn.Conv2d(4, 2, 1), nn.Softplus())
    net, pixels = nn.Sequential(*stem, *head), images()
    with Capture(net, "1", detach=False) as capture:
        y = net(pixels)
    [gradient] = torch.autograd.grad(y.square().sum(), capture["1"], create_graph=True)
    found = torch.autograd.grad(gradient.square().sum(), [capture["1"], *net.parameters()])
    maps = stem(pixels)
    [gradient] = torch.autograd.grad(head(maps).square().sum(), maps, create_graph=True)
    expected = torch.autograd.grad(gradient.square().sum(), [maps, *net.parameters()])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


# --- in place ------------------------------------------------------------------------------------------------------


class Aliases(nn.Module):
    """Layers that return their input, or a view of it, and in-place operations on either."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv, self.layer = nn.Conv2d(3, 4, 1), nn.Flatten(2) if "view" in how else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y = self.layer(x)
        if "input" in self.how:
            x.mul_(3)
            x.relu_()
        if "output" in self.how:
            self.relu(y)  # What it returns is not used.
        return x.flatten(2) * 5 + y.flatten(2)


@pytest.mark.parametrize("how", ["input", "output", "view input", "view output", "view"])
def test_memory_that_a_model_shares_between_tensors_stays_shared(how: str) -> None:
    net, pixels = Aliases(how), images()
    expected = net(pixels)
    maps = net.conv(pixels).detach()
    with Capture(net, "conv,layer,relu", detach=False) as capture:
        output = net(pixels)
    assert torch.equal(output, expected)
    assert torch.equal(capture["conv"], maps) and torch.equal(capture["layer"].flatten(2), maps.flatten(2))


@pytest.mark.parametrize("how", ["input", "output"])
def test_gradients_follow_in_place_operations_on_shared_memory(how: str) -> None:
    net, pixels = Aliases(how), images()
    expected = torch.autograd.grad(net(pixels).sum(), [net.conv.weight])
    with Capture(net, "conv,layer,relu", detach=False) as capture:
        output = net(pixels)
    found = torch.autograd.grad(output.sum(), [net.conv.weight], retain_graph=True)
    assert torch.equal(found[0], expected[0])
    [gradient] = torch.autograd.grad(output.sum(), capture["layer"])
    positive = (capture["layer"] > 0).float()
    assert torch.equal(gradient, positive * (18 if how == "input" else 6))


def test_what_autograd_refuses_without_a_capture_it_refuses_with_one() -> None:
    for layer in (nn.Sigmoid(), nn.Sequential(nn.Sigmoid(), nn.Flatten())):
        net = nn.Sequential(nn.Conv2d(3, 4, 1), layer, nn.ReLU(inplace=True))
        for captured in ("0", "1", "2"):
            with Capture(net, captured, detach=False):
                output = net(images())
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                output.sum().backward()


def test_changing_an_activation_in_place_does_not_reach_the_model() -> None:
    net, pixels = nets.InPlace(), images()
    expected = net(pixels)

    def zero() -> None:
        capture["conv"].detach().zero_()

    with Capture(net, "conv,relu", detach=False) as capture:
        net.relu.register_forward_hook(lambda *_: zero())
        assert torch.equal(net(pixels), expected)


# --- without gradients ---------------------------------------------------------------------------------------------


def test_without_gradients_an_attached_capture_is_a_copy() -> None:
    net, pixels = nets.InPlace(), images()
    expected = net.conv(pixels)
    with Capture(net, "**,conv/in", detach=False) as capture:
        with torch.no_grad():
            net(pixels)
        assert torch.equal(capture["conv"], expected) and not capture["conv"].requires_grad
        with torch.inference_mode():
            net(pixels)
        assert torch.equal(capture["conv"], expected)
        net.requires_grad_(False)
        net(pixels)
        assert torch.equal(capture["conv"], expected) and not capture["conv"].requires_grad
        net(pixels.clone().requires_grad_())
        assert capture["conv"].requires_grad


def test_an_attached_capture_works_under_autocast_and_torch_func() -> None:
    net, pixels = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1)), images()
    with Capture(net, "0,1", detach=False) as capture, torch.autocast("cpu", torch.bfloat16):
        score = net(pixels).float().sum()
    assert capture["0"].dtype == torch.bfloat16
    assert torch.autograd.grad(score, capture["0"])[0].abs().sum() > 0

    weights = {name: weight.detach() for name, weight in net.named_parameters()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(net, weights, pixels).square().sum()

    expected = torch.func.grad(loss)(weights)
    with Capture(net, "0,0/in,1@mean23", detach=False):
        found = torch.func.grad(loss)(weights)
    assert all(torch.equal(found[name], expected[name]) for name in weights)


def test_forward_gradients_pass_through_an_attached_capture() -> None:
    conv, pixels = nn.Conv2d(3, 4, 1), images()
    net = nn.Sequential(conv, nn.Flatten(2), nn.ReLU(inplace=True))
    with Capture(net, "**,0/in", detach=False), forward_ad.dual_level():
        output = forward_ad.unpack_dual(net(forward_ad.make_dual(pixels, pixels)))
    maps = nn.functional.conv2d(pixels, conv.weight).flatten(2)
    assert output.tangent is not None and torch.allclose(output.tangent, maps * (output.primal > 0), atol=1e-6)


def test_a_graph_is_freed_with_the_pass_that_made_it() -> None:
    net, pixels = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Flatten()), images()
    gc.disable()
    try:
        with Capture(net, "**", detach=False, transform=lambda maps: maps.exp()) as capture:
            net(pixels)
            held = [weakref.ref(value) for value in capture.values()]
            net(pixels)
            assert len(held) == 3 and all(reference() is None for reference in held)
    finally:
        gc.enable()
