"""The probe and the captures, on networks of which each is a trap, and on torchvision's own."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models.feature_extraction import create_feature_extractor

import nets
from hookx import Capture
from hookx.capture import RowCapture, stored_dtype
from hookx.errors import CaptureError, LayerError, NotCapturedError
from hookx.hooks import module_classes
from hookx.layers import Layer, Target, parse_selectors, select
from hookx.models import list_models, skeleton
from hookx.probe import example_images, probe

CPU = torch.device("cpu")


def images(count: int = 3, side: int = 8) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def targets_of(model: nn.Module, layers: str, pixels_NCHW: Tensor | None = None) -> list[Target]:
    probed = probe(model, images() if pixels_NCHW is None else pixels_NCHW[:3])
    return select(parse_selectors(layers), probed, "net").targets


def captured_rows(model: nn.Module, layers: str, pixels_NCHW: Tensor) -> dict[str, Tensor]:
    """Capture one batch the way a run does: into preallocated rows."""
    targets = targets_of(model, layers, torch.cat([pixels_NCHW] * 3))
    count = len(pixels_NCHW)
    rows = {
        str(target.address): torch.full((count, *target.shape), 7, dtype=getattr(torch, stored_dtype(target)))
        for target in targets
    }
    with RowCapture(model, targets, device=CPU, precision="fp32") as capture:
        capture.run(pixels_NCHW, rows)
    return rows


def by_path(layers: Sequence[Layer]) -> dict[str, Layer]:
    return {layer.path: layer for layer in layers}


def hooks_on(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# --- exactness -----------------------------------------------------------------------------------------------------


def test_inplace_relu_does_not_reach_a_captured_activation() -> None:
    net, pixels = nets.InPlace().eval(), images()
    assert torch.equal(captured_rows(net, "conv", pixels)["conv"], net.conv(pixels))
    with Capture(net, "conv") as capture:
        net(pixels)
    assert torch.equal(capture["conv"], net.conv(pixels))


def test_bn1_of_resnet18_is_what_batch_norm_returned() -> None:
    net, pixels = get_model("resnet18", weights=None).eval(), images(2, 64)
    with torch.inference_mode():
        truncated = nn.Sequential(net.conv1, net.bn1)
        expected = truncated(pixels)
    assert (expected < 0).any()
    assert torch.equal(captured_rows(net, "bn1", pixels)["bn1"], expected)


def test_both_calls_of_a_relu_that_runs_twice_are_captured() -> None:
    net, pixels = get_model("resnet18", weights=None).eval(), images(2, 64)
    rows = captured_rows(net, "layer1.0.relu", pixels)
    assert list(rows) == ["layer1.0.relu:0", "layer1.0.relu:1"]
    with torch.inference_mode():
        block = net.layer1[0]
        x = net.maxpool(net.relu(net.bn1(net.conv1(pixels))))
        first = torch.relu(block.bn1(block.conv1(x)))
        second = torch.relu(block.bn2(block.conv2(first)) + x)
    assert torch.equal(rows["layer1.0.relu:0"], first)
    assert torch.equal(rows["layer1.0.relu:1"], second)


def test_two_addresses_of_one_storage_are_both_captured() -> None:
    net, pixels = nets.OneStorage().eval(), images()
    expected = net.outer(pixels)
    rows = captured_rows(net, "outer,outer.1", pixels)
    assert torch.equal(rows["outer"], expected) and torch.equal(rows["outer.1"], expected)
    resnet, pixels = get_model("resnet18", weights=None).eval(), images(2, 64)
    rows = captured_rows(resnet, "layer1,layer1.1", pixels)
    assert rows["layer1"].abs().sum() > 0 and torch.equal(rows["layer1"], rows["layer1.1"])


def test_a_channels_last_output_is_stored_in_the_order_of_its_shape() -> None:
    net = nets.InPlace().eval().to(memory_format=torch.channels_last)
    pixels = images().contiguous(memory_format=torch.channels_last)
    expected = net.conv(pixels)
    assert not expected.is_contiguous()
    stored = captured_rows(net, "conv", pixels)["conv"]
    assert stored.is_contiguous() and torch.equal(stored, expected)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_batch_of_any_size_fills_its_rows_and_no_others(count: int) -> None:
    net, pixels = nets.InPlace().eval(), images(count)
    targets = targets_of(net, "conv")
    buffer = torch.full((8, 4, 8, 8), 7.0)
    with RowCapture(net, targets, device=CPU, precision="fp32") as capture:
        capture.run(pixels, {"conv": buffer[2 : 2 + count]})
    assert torch.equal(buffer[2 : 2 + count], net.conv(pixels))
    assert (buffer[:2] == 7).all() and (buffer[2 + count :] == 7).all()


def test_inputs_are_taken_before_an_inplace_module_rewrites_them() -> None:
    net, pixels = nets.InPlace().eval(), images()
    rows = captured_rows(net, "relu/in,relu", pixels)
    assert torch.equal(rows["relu/in"], net.conv(pixels))
    assert torch.equal(rows["relu"], net.conv(pixels).relu())


def test_tuples_named_tuples_and_dicts_become_their_tensor_parts() -> None:
    net, pixels = nets.Parts().eval(), images()
    rows = captured_rows(net, "as_*", pixels)
    pooled = pixels.mean((2, 3))
    expected = {
        "as_tuple/0": pooled,
        "as_tuple/1": 2 * pooled,
        "as_named/left": 2 * pooled,
        "as_named/right": -2 * pooled,
        "as_dict/out": -2 * pooled,
        "as_dict/aux/deep/0": -2 * pooled,
    }
    assert rows.keys() == expected.keys()
    assert all(torch.equal(rows[address], expected[address]) for address in rows)


def test_a_batch_dimension_that_is_not_the_first_is_moved_to_the_front() -> None:
    net, pixels = nets.BatchSecond().eval(), images(3)
    [target] = targets_of(net, "tokens")
    assert target.tensor.shape_text == "64,N,5" and target.shape == (64, 5)
    expected = net.tokens(pixels.flatten(2).permute(2, 0, 1)).movedim(1, 0)
    assert torch.equal(captured_rows(net, "tokens", pixels)["tokens"], expected)


def test_rows_that_lie_together_are_split_by_image_and_interleaved_rows_are_refused() -> None:
    net, pixels = nets.Windows().eval(), images(3)
    assert captured_rows(net, "by_image", pixels)["by_image"].shape == (3, 16, 4)
    one_by_one = torch.cat([captured_rows(net, "by_image", pixels[i : i + 1])["by_image"] for i in range(3)])
    assert torch.allclose(captured_rows(net, "by_image", pixels)["by_image"], one_by_one)
    with pytest.raises(LayerError, match=r"'by_window' \(16N,4\) cannot be split by image: the 16 rows"):
        targets_of(net, "by_window")


def test_a_layer_that_mixes_the_images_of_a_batch_is_refused() -> None:
    with pytest.raises(LayerError, match="depend on the other images of its batch"):
        targets_of(nets.MixesBatch().eval(), "norm")


def test_constants_are_left_out_of_globs_and_refused_by_name() -> None:
    net = nets.Constant().eval()
    selection = select(parse_selectors("*"), probe(net, images()), "net")
    assert [str(target.address) for target in selection.targets] == ["body"]
    assert "constant" in selection.left_out["bias"]
    with pytest.raises(LayerError, match=r"'bias' is constant \(4,3\): it does not depend on the image"):
        targets_of(net, "bias")


def test_a_layer_that_is_never_called_is_named_with_the_reason() -> None:
    net = nets.NeverCalled().eval()
    layers = by_path(probe(net, images()))
    assert not layers["spare"].calls and not layers["attention.out_proj"].calls
    with pytest.raises(LayerError, match=r"never called in a forward pass\n  \(nn.MultiheadAttention uses its weights"):
        targets_of(net, "attention.out_proj")


def test_a_module_with_two_names_answers_to_both_and_globs_take_it_once() -> None:
    net, pixels = nets.SavedTwice().eval(), images()
    layers = by_path(probe(net, pixels))
    assert layers["second"].same_as == "first" and len(layers["first"].calls) == 2
    assert list(captured_rows(net, "*", pixels)) == ["first:0", "first:1"]
    rows = captured_rows(net, "second:1", pixels)
    assert torch.equal(rows["second:1"], net(pixels))


def test_layers_come_in_the_order_of_execution() -> None:
    assert [layer.path for layer in probe(nets.NeverCalled().eval(), images())] == [
        *(".", "spare", "embed", "attention", "attention.out_proj")
    ]


def test_the_transformer_fast_path_hides_nothing() -> None:
    encoder = nn.TransformerEncoderLayer(4, 2, batch_first=True).eval()
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(2), nn.Linear(64, 4), encoder)
    before = torch.backends.mha.get_fastpath_enabled()
    assert by_path(probe(net, images()))["3.linear1"].calls
    assert torch.backends.mha.get_fastpath_enabled() is before


# --- a pass --------------------------------------------------------------------------------------------------------


def test_the_forward_pass_ends_after_the_last_layer_asked_for() -> None:
    net = nets.Swallows().eval()
    targets = targets_of(net, "early")
    net.late_calls = 0
    with RowCapture(net, targets, device=CPU, precision="fp32") as capture:
        capture.run(images(), {"early": torch.empty(3, 4, 8, 8)})
    assert net.late_calls == 0  # Not even the network's own `except Exception` held it up.


def test_hooks_come_off_after_an_exception_in_the_forward_pass() -> None:
    net = nets.Fails().eval()
    with pytest.raises(CaptureError, match="this network always fails"):
        probe(net, images())
    assert hooks_on(net) == 0
    good = nets.InPlace().eval()
    targets = targets_of(good, "conv,.")
    with pytest.raises(RuntimeError), RowCapture(good, targets, device=CPU, precision="fp32") as capture:
        assert hooks_on(good) > 0
        capture.run(images(3, 8)[:, :1], {})
    assert hooks_on(good) == 0
    with pytest.raises(RuntimeError), Capture(net, "conv"):
        net(images())
    assert hooks_on(net) == 0


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("shape", r"'relu' is float32 \[3, 4, 4, 8\] in this batch; the probe saw float32 \[3, 4, 8, 8\]"),
        ("skip", "'relu' did not run in this batch, though the probe saw it"),
        ("again", "'relu' ran more often in this batch than in the probe"),
    ],
)
def test_a_pass_that_differs_from_the_probe_is_an_error(how: str, message: str) -> None:
    net = nets.ChangesItsMind(2, how).eval()
    targets = targets_of(net, "relu,.")
    rows = {str(target.address): torch.empty(3, 4, 8, 8) for target in targets}
    with pytest.raises(CaptureError, match=message), RowCapture(net, targets, device=CPU, precision="fp32") as capture:
        capture.run(images(), rows)


def test_a_capture_leaves_the_output_of_the_model_as_it_was() -> None:
    net, pixels = nets.InPlace().eval(), images()
    expected = net(pixels)
    with Capture(net, "**"):
        assert torch.equal(net(pixels), expected)


def test_values_that_overflow_the_stored_type_are_counted() -> None:
    net = nn.Sequential(nn.Identity())
    pixels = torch.full((2, 3, 2, 2), 1e6)
    pixels[0, 0, 0, 0] = float("inf")
    targets = targets_of(net, "0", images())
    targets = targets_of(net, "0", torch.ones(3, 3, 2, 2))
    with RowCapture(net, targets, device=CPU, precision="fp32") as capture:
        capture.run(pixels, {"0": torch.empty(2, 3, 2, 2, dtype=torch.float16)})
    assert capture.overflows == {"0": 23}  # 24 values, of which one was infinite before.


def test_autocast_gives_what_autocast_gives() -> None:
    net, pixels = nets.InPlace().eval(), images()
    targets = select(parse_selectors("conv"), probe(net, pixels, precision="bf16"), "net").targets
    assert stored_dtype(targets[0]) == "bfloat16"
    rows = torch.empty(3, 4, 8, 8, dtype=torch.bfloat16)
    with RowCapture(net, targets, device=CPU, precision="bf16") as capture:
        capture.run(pixels, {"conv": rows})
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rows, net.conv(pixels))


# --- the probe on every architecture -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, kind in list_models().items() if kind == "classification"])
def test_every_classification_model_is_probed_without_memory(name: str) -> None:
    bare = skeleton(name)
    assert all(parameter.is_meta for parameter in bare.module.parameters())
    layers = by_path(probe(bare.module, example_images(bare.module, bare.preprocessing.crop_px)))
    assert layers.keys() == module_classes(bare.module).keys()
    assert layers["."].calls[0].outputs[0].shape_text == "N,1000"


def test_a_skeleton_shows_the_calls_and_shapes_of_the_real_model() -> None:
    bare, real = skeleton("shufflenet_v2_x0_5").module, get_model("shufflenet_v2_x0_5", weights=None).eval()
    assert probe(bare, example_images(bare, 224)) == probe(real, example_images(real, 224))


def test_the_capture_agrees_with_torchvisions_feature_extractor() -> None:
    net, pixels = get_model("resnet18", weights=None).eval(), images(2, 64)
    rows = captured_rows(net, "bn1,layer1,layer3.0.downsample.1,avgpool,fc", pixels)
    for address, stored in rows.items():
        with torch.inference_mode():  # one node at a time: the extractor returns tensors that are overwritten later
            alone = create_feature_extractor(net, [address])(pixels)[address]
        assert torch.equal(stored, alone), address


# --- the public capture --------------------------------------------------------------------------------------------


def test_reading_what_was_not_captured_is_a_key_error_that_says_what_there_is() -> None:
    net = nets.CalledTwice().eval()
    capture = Capture(net, "relu,conv")
    with pytest.raises(NotCapturedError, match="nothing has been captured yet"):
        capture["relu"]
    net(images())
    capture.remove()
    with pytest.raises(KeyError, match="there is relu:0, relu:1"):
        capture["relu"]
    assert list(capture) == ["relu:0", "conv", "relu:1"] and "conv" in capture and "fc" not in capture
    assert hooks_on(net) == 0


def test_a_capture_holds_the_last_pass_only() -> None:
    net = nets.InPlace().eval()
    with Capture(net, ["conv"]) as capture:
        net(images(2))
        net(images(5))
    assert len(capture["conv"]) == 5 and len(capture) == 1


def test_an_attached_capture_carries_gradients_to_the_input() -> None:
    net, pixels = nets.InPlace(), images().requires_grad_()
    with Capture(net, "conv", detach=False) as capture:
        net(pixels)
    capture["conv"].sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().sum() > 0
    with Capture(net, "conv") as capture:
        net(pixels)
    assert not capture["conv"].requires_grad


def test_an_unknown_layer_is_an_error_with_the_closest_names() -> None:
    with pytest.raises(LayerError, match=r"no layer matches .conf.*closest: conv"):
        Capture(nets.InPlace(), "conf")
