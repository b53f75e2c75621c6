"""Both captures, on networks that are each a trap and on torchvision's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models.feature_extraction import create_feature_extractor

from hookx import Capture
from hookx.capture.probe import probe
from hookx.capture.rows import RowCapture, stored_dtype
from hookx.capture.runner import Runner
from hookx.errors import CaptureError, LayerError, NotCapturedError, UsageError
from hookx.layers.select import parse_selectors, select
from kit import nets
from kit.nets import captured_rows, hooks_on, images, targets_of

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
    with RowCapture(Runner.of(net), targets) as capture:
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


def test_a_module_that_calls_itself_is_numbered_in_the_order_of_its_calls() -> None:
    class Recursive(nn.Module):
        def forward(self, x: Tensor, depth: int = 2) -> Tensor:
            return self(x, depth - 1) + 1 if depth else x * 2

    net, pixels = nn.Sequential(Recursive()).eval(), images()
    rows = captured_rows(net, "0", pixels)
    assert list(rows) == ["0:0", "0:1", "0:2"]
    assert torch.equal(rows["0:2"], pixels * 2)
    assert torch.equal(rows["0:1"], pixels * 2 + 1) and torch.equal(rows["0:0"], pixels * 2 + 1 + 1)


# --- a pass --------------------------------------------------------------------------------------------------------


def test_the_forward_pass_ends_after_the_last_layer_asked_for() -> None:
    net = nets.Swallows().eval()
    targets = targets_of(net, "early")
    net.late_calls = 0
    with RowCapture(Runner.of(net), targets) as capture:
        capture.run(images(), {"early": torch.empty(3, 4, 8, 8)})
    assert net.late_calls == 0  # Not even the network's own `except Exception` held it up.


def test_the_transformer_fast_path_is_off_during_a_pass_of_a_run_and_back_on_after_it() -> None:
    seen: list[bool] = []

    def look(*_: object) -> None:
        seen.append(torch.backends.mha.get_fastpath_enabled())

    net = nn.Sequential(nn.Identity(), nn.Conv2d(3, 4, 1)).eval()
    net[0].register_forward_hook(look)
    captured_rows(net, "1", images())
    assert set(seen) == {False}
    assert torch.backends.mha.get_fastpath_enabled()


def test_hooks_come_off_after_an_exception_in_the_forward_pass() -> None:
    net = nets.Fails().eval()
    with pytest.raises(CaptureError, match="this network always fails"):
        probe(Runner.of(net), images())
    assert hooks_on(net) == 0
    good = nets.InPlace().eval()
    targets = targets_of(good, "conv,.")
    with pytest.raises(CaptureError), RowCapture(Runner.of(good), targets) as capture:
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
        ("skip", "'relu' did not run in this batch, though it did in the probe"),
        ("again", "'relu' ran more often in this batch than in the probe"),
    ],
)
def test_a_pass_that_differs_from_the_probe_is_an_error(how: str, message: str) -> None:
    net = nets.ChangesItsMind(100, how).eval()
    targets = targets_of(net, "relu,.")
    net.passes = 0
    rows = {str(target.address): torch.empty(3, 4, 8, 8) for target in targets}
    with pytest.raises(CaptureError, match=message), RowCapture(Runner.of(net), targets) as capture:
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
    targets = targets_of(net, "0", torch.ones(3, 3, 2, 2))
    with RowCapture(Runner.of(net), targets) as capture:
        capture.run(pixels, {"0": torch.empty(2, 3, 2, 2, dtype=torch.float16)})
    # 24 values, one of them infinite before.
    assert capture.take_counts() == {"0": {"non_finite": 1, "overflowed": 23}} and capture.take_counts() == {}


def test_autocast_gives_what_autocast_gives() -> None:
    net, pixels = nets.InPlace().eval(), images()
    runner = Runner.of(net, precision="bf16")
    targets = select(parse_selectors("conv"), probe(runner, pixels), "net").targets
    assert stored_dtype(targets[0]) == "bfloat16"
    rows = torch.empty(3, 4, 8, 8, dtype=torch.bfloat16)
    with RowCapture(runner, targets) as capture:
        capture.run(pixels, {"conv": rows})
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rows, net.conv(pixels))


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
    with pytest.raises(KeyError, match="'relu' was not captured; closest: relu:0, relu:1"):
        capture["relu"]
    assert list(capture) == ["relu:0", "conv", "relu:1"] and "conv" in capture and "fc" not in capture
    assert hooks_on(net) == 0


def test_a_capture_holds_the_last_pass_the_last_few_or_all() -> None:
    net = nets.InPlace().eval()
    with Capture(net, ["conv"]) as last, Capture(net, "conv", keep=2) as few, Capture(net, "conv", keep=None) as every:
        for count in (2, 5, 3, 4):
            net(images(count))
    assert [len(kept) for kept in last.history("conv")] == [4]
    assert [len(kept) for kept in few.history("conv")] == [3, 4]
    assert [len(kept) for kept in every.history("conv")] == [2, 5, 3, 4]
    assert all(len(capture["conv"]) == 4 for capture in (last, few, every))
    with pytest.raises(UsageError, match="keep must be at least 1, or None to hold every pass, got 0"):
        Capture(net, "conv", keep=0)


def test_an_attached_capture_carries_gradients_to_the_input() -> None:
    net, pixels = nets.InPlace(), images().requires_grad_()
    with Capture(net, "conv", detach=False) as capture:
        net(pixels)
    capture["conv"].sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().sum() > 0
    with Capture(net, "conv") as capture:
        net(pixels)
    assert not capture["conv"].requires_grad


def test_an_unknown_layer_is_an_error_with_the_closest_names_and_leaves_no_hook() -> None:
    net = nets.InPlace()
    with pytest.raises(LayerError, match=r"no layer matches .conf.*closest: conv"):
        Capture(net, ["conv", "conf"])
    assert hooks_on(net) == 0


def test_a_module_object_is_captured_under_the_users_own_name() -> None:
    net, pixels = get_model("resnet18", weights=None).eval(), images(2, 64)
    with Capture(net, {"comp": net.layer3[0].downsample[1], "act": "layer1[0].relu"}) as capture:
        net(pixels)
    assert list(capture) == ["act:0", "act:1", "comp"]
    assert torch.equal(capture["comp"], captured_rows(net, "layer3.0.downsample.1", pixels)["layer3.0.downsample.1"])
    with Capture(net, [net.conv1, net.fc]) as capture:
        net(pixels)
    assert list(capture) == ["conv1", "fc"]
    with pytest.raises(LayerError, match="this ReLU is not a module of the model"):
        Capture(net, nn.ReLU())
    with pytest.raises(LayerError, match="'all' names one activation, but 'layer\\*' can match several layers"):
        Capture(net, {"all": "layer*"})


def test_each_layer_can_have_its_own_transform() -> None:
    net, pixels = nets.InPlace().eval(), images()
    capture = Capture(net).add("conv", transform=lambda maps: maps.amax((2, 3))).add("relu").add("relu@mean23")
    net(pixels)
    assert torch.equal(capture["conv"], net.conv(pixels).amax((2, 3)))
    assert torch.equal(capture["relu@mean23"], capture["relu"].mean((2, 3)))
    capture.remove()
    with Capture(net, "conv", transform=lambda maps: "text"), pytest.raises(CaptureError, match="returned a str"):  # type: ignore[arg-type,return-value]
        net(pixels)
    assert hooks_on(net) == 0


def test_what_a_custom_hook_returns_is_kept_and_never_reaches_the_model() -> None:
    net, pixels = nets.InPlace().eval(), images()
    expected = net(pixels)

    def difference(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        assert isinstance(module, nn.Conv2d | nn.ReLU)
        return output.mean(1) - inputs[0].mean(1) if isinstance(module, nn.Conv2d) else None

    with Capture(net, "conv,relu", hook=difference) as capture:
        assert torch.equal(net(pixels), expected)
    assert torch.equal(capture["conv"], net.conv(pixels).mean(1) - pixels.mean(1))
    assert list(capture) == ["conv"]


def test_a_layer_is_removed_by_its_name_and_what_it_gave_stays() -> None:
    net = nets.InPlace().eval()
    capture = Capture(net, "conv,relu")
    net(images(2))
    capture.remove("conv")
    assert len(capture) == 2 and not net.conv._forward_hooks and net.relu._forward_hooks
    net(images(5))
    assert list(capture) == ["relu"]
    with pytest.raises(LayerError, match="'conv' is not being captured; captured: relu"):
        capture.remove("conv")
    capture.clear()
    assert len(capture) == 0
    capture.remove()
    assert hooks_on(net) == 0


def test_inputs_and_outputs_of_a_module_that_is_not_a_vision_model_are_captured() -> None:
    net, words = nn.GRU(3, 4, batch_first=True), torch.randn(2, 5, 3)
    with Capture(net, "./in,.") as capture:
        output, state = net(words)
    assert torch.equal(capture["./in"], words)
    assert torch.equal(capture["./0"], output) and torch.equal(capture["./1"], state)


def test_a_capture_sees_through_the_transformer_fast_path_and_restores_it() -> None:
    net, words = nn.TransformerEncoderLayer(4, 2, batch_first=True).eval(), torch.randn(2, 5, 4)
    with torch.inference_mode(), Capture(net, "self_attn,linear1") as capture:
        net(words)
        with pytest.raises(AssertionError, match="embedding dimension"):
            net(torch.randn(2, 5, 7))
    assert capture.keys() == set()  # The pass that failed is the last one.
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.inference_mode(), Capture(net, "self_attn,linear1") as capture:
        net(words)
    assert set(capture) == {"self_attn/0", "linear1"}


def test_the_summary_says_what_ran_and_what_did_not() -> None:
    net = nets.NeverCalled().eval()
    with Capture(net, "spare,embed") as capture:
        net(images(2))
        lines = capture.summary().splitlines()
    assert lines[0].startswith("NeverCalled: ") and lines[0].endswith("1 passes held")
    assert lines[1].split() == ["spare", "Linear", "12", "has", "not", "run"]
    assert lines[2].endswith("1 call: embed [2, 64, 4] float32 cpu")
    assert "nothing yet" in repr(Capture(net))
