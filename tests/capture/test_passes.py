"""`Capture` in other people's code: which calls make a pass, and what stays out of it."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
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
from kit.nets import images


def hooks_on(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def is_fast_path_on() -> bool:
    return torch.backends.mha.get_fastpath_enabled()


@pytest.fixture(autouse=True)
def fast_path_stays_on() -> Iterator[None]:
    yield
    was_on = is_fast_path_on()
    torch.backends.mha.set_fastpath_enabled(True)
    assert was_on


class Features(nn.Module):
    """A convolution, and a block whose ReLU runs twice; `features` is a part of the model as in timm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.block = nets.CalledTwice()
        self.block.conv = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 2)

    def features(self, x: Tensor) -> Tensor:
        return self.block(self.conv(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


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


def test_a_copied_model_loads_where_hookx_is_not_installed() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    with Capture(net, "**"):
        assert b"hookx" not in pickle.dumps(net)


# --- parts, called by themselves -----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 3])
def test_a_part_that_is_called_by_itself_is_held_as_often_as_a_pass(keep: int) -> None:
    net = Features().eval()
    with Capture(net, "conv,block.relu,head", keep=keep) as capture:
        for number in range(10):
            net.features(images() + number)
    assert list(capture) == ["conv", "block.relu:0", "block.relu:1"]
    assert torch.equal(capture["conv"], net.conv(images() + 9))
    assert torch.equal(capture["block.relu:1"], net.features(images() + 9))
    held = capture.history("conv")
    assert len(held) == keep and len(capture.history("block.relu:1")) == keep
    assert all(torch.equal(held[-back], net.conv(images() + (10 - back))) for back in range(1, keep + 1))


def test_memory_of_parts_is_bounded() -> None:
    net = Features().eval()

    def tensors_alive() -> int:
        gc.collect()
        return sum(type(thing) is Tensor and thing.shape[:1] == (7,) for thing in gc.get_objects())

    with torch.no_grad(), Capture(net, "**") as capture:
        pixels = torch.randn(7, 3, 8, 8)
        net.features(pixels)
        before = tensors_alive()
        for _ in range(5):
            net.features(pixels)
            net.block.conv(torch.randn(7, 4, 8, 8))
            net.conv(pixels)
        assert tensors_alive() <= before + 1
        assert len(capture) > 3


def test_a_part_called_after_the_model_replaces_what_that_part_gave() -> None:
    net, pixels = Features().eval(), images()
    with Capture(net, "conv,block.relu,head", keep=2) as capture:
        net(pixels)
        relu = capture["block.relu:1"]
        net.conv(pixels + 1)
        net.conv(pixels + 2)
        assert torch.equal(capture["conv"], net.conv(pixels + 2))
        assert capture["block.relu:1"] is relu and "head" in capture
        net(pixels + 3)
        assert torch.equal(capture["head"], net(pixels + 3))
    assert [len(capture.history(name)) for name in ("conv", "head")] == [2, 2]


# --- a model that calls itself, exceptions -------------------------------------------------------------------------


class CallsItself(nn.Module):
    """A model that runs itself on half the picture, with an encoder layer that PyTorch has a fast path for."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.seen: list[bool] = []
        self.failing: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.encoder(x)
        if x.shape[1] > 1:
            y = y + self(x[:, ::2]).mean(1, keepdim=True)
        elif self.failing is not None:
            raise self.failing
        self.seen.append(is_fast_path_on())
        return y


def test_a_model_that_calls_itself_is_one_pass() -> None:
    net, words = CallsItself().eval(), torch.randn(2, 4, 4)
    with torch.inference_mode(), Capture(net, "encoder,encoder.linear1,.", keep=None) as capture:
        output = net(words)
        assert net.seen == [False] * 3 and is_fast_path_on()
        addresses = [f"{path}:{call}" for path in ("encoder.linear1", "encoder") for call in range(3)]
        assert set(capture) == {*addresses, ".:0", ".:1", ".:2"}
        assert torch.equal(capture[".:0"], output) and capture[".:2"].shape == (2, 1, 4)
        assert torch.equal(net(words), output) and len(capture.history(".:0")) == 2


@pytest.mark.parametrize("failing", [ValueError("no"), KeyboardInterrupt(), GeneratorExit()], ids=repr)
@pytest.mark.parametrize("reads", [True, False])
def test_a_pass_that_fails_leaves_nothing_for_the_next(failing: BaseException, reads: bool) -> None:
    net, words = CallsItself().eval(), torch.randn(2, 4, 4)
    with torch.inference_mode(), Capture(net, "encoder,.", keep=None) as capture:
        output = net(words)
        net.failing = failing
        with pytest.raises(type(failing)):
            net(words)
        if reads:
            assert list(capture) == ["encoder:0", "encoder:1", "encoder:2"]  # What ran until then; no call returned.
            assert is_fast_path_on()
        net.failing = None
        assert torch.equal(net(words), output)
        assert set(capture) == {f"{path}:{call}" for path in ("encoder", ".") for call in range(3)}
        assert len(capture.history("encoder:0")) == 3
        net.failing = failing
        with pytest.raises(type(failing)):
            net(words)
    assert hooks_on(net) == 0 and is_fast_path_on()


def test_an_exception_that_the_model_catches_ends_one_call_and_not_the_pass() -> None:
    class Tries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fails, self.works = nets.Fails(), nets.InPlace()

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                try:
                    self.fails(x)
                except RuntimeError:
                    x = self.works(x)[:, :3]
            return x

    net = Tries().eval()
    with Capture(net, "fails,fails.conv,works,.", keep=None) as capture:
        output = net(images())
    assert list(capture) == ["fails.conv:0", "works:0", "fails.conv:1", "works:1", "."]
    assert torch.equal(capture["."], output) and len(capture.history(".")) == 1


def test_a_call_within_a_call_of_the_same_module_can_fail() -> None:
    class Tries(nn.Module):
        def forward(self, x: Tensor, depth: int = 0) -> Tensor:
            if depth == 2:
                raise ValueError("too deep")
            try:
                return self(x, depth + 1) + 1
            except ValueError:
                return x * 2

    net = nn.Sequential(Tries(), nn.Flatten()).eval()
    with Capture(net, "0,1", keep=None) as capture:
        net(images())
    assert list(capture) == ["0:1", "0:0", "1"] and len(capture.history("1")) == 1
    assert torch.equal(capture["0:1"], images() * 2) and torch.equal(capture["0:0"], images() * 2 + 1)


def test_a_transform_that_fails_ends_the_pass() -> None:
    net, pixels = Features().eval(), images()
    with Capture(net, "block.conv", transform=lambda maps: maps.view(-1, 7)) as capture:
        with pytest.raises(RuntimeError, match="invalid"):
            net(pixels)
        assert is_fast_path_on() and len(capture) == 0
        capture.remove("block.conv")
        capture.add("conv")
        net(pixels)
        assert list(capture) == ["conv"]


def test_what_a_transform_or_a_hook_calls_is_not_captured() -> None:
    net, pixels = Features().eval(), images()
    with Capture(net, "conv", keep=None, transform=lambda maps: net.conv(maps[:, :3])) as capture:
        capture.add("head", hook=lambda *_: net(pixels))
        output = net(pixels)
    assert set(capture) == {"conv", "head"} and len(capture.history("conv")) == 1
    assert torch.equal(capture["head"], output)
    assert torch.equal(capture["conv"], net.conv(net.conv(pixels)[:, :3]))


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
    assert list(capture) == ["conv"] and is_fast_path_on()
    capture.add("head")
    net(pixels)
    assert list(capture) == []  # The hook removed it again.


def test_a_capture_that_is_cleared_in_the_middle_of_a_pass_holds_the_rest_of_it() -> None:
    net, pixels = Features().eval(), images()
    with Capture(net, "conv,block.relu,head") as capture:
        net.block.conv.register_forward_hook(lambda *_: capture.clear())
        net(pixels)
        assert list(capture) == ["block.relu", "head"]


# --- threads -------------------------------------------------------------------------------------------------------


def in_threads(*works: Callable[[], None]) -> None:
    failures: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=[work]) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


class Meets(nn.Module):
    """Waits in the middle of every pass until the other thread is there, too."""

    def __init__(self, barrier: threading.Barrier) -> None:
        super().__init__()
        self.barrier = barrier

    def forward(self, x: Tensor) -> Tensor:
        self.barrier.wait(20)
        assert not is_fast_path_on()
        return x


def test_passes_of_several_threads_do_not_mix() -> None:
    conv = nn.Conv2d(3, 4, 1)
    net = nn.Sequential(conv, Meets(threading.Barrier(2)), nn.ReLU(), Meets(threading.Barrier(2)))
    own: list[bool] = []
    with Capture(net, "0,2", keep=None) as capture, Capture(net, "0") as last:

        def work(start: int) -> Callable[[], None]:
            def run() -> None:
                for number in range(start, start + 5):
                    net(images() + number)
                    expected = nn.functional.conv2d(images() + number, conv.weight, conv.bias)
                    own.append(torch.equal(last["0"], expected))

            return run

        in_threads(work(0), work(100))
        pairs = list(zip(capture.history("0"), capture.history("2"), strict=True))
        assert len(pairs) == 10 and all(torch.equal(conv.relu(), relu) for conv, relu in pairs)
        assert len(last.history("0")) == 1 and list(last) == ["0"]
    assert own == [True] * 10  # Each thread reads its own.


def test_a_pass_that_ends_leaves_the_fast_path_off_for_a_pass_in_another_thread() -> None:
    inside, outside = threading.Event(), threading.Event()

    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            inside.set()
            assert outside.wait(20) and not is_fast_path_on()
            return x

    slow, quick = nn.Sequential(Waits()), nn.Sequential(nn.Identity())

    def run_quick() -> None:
        assert inside.wait(20)
        with Capture(quick, "0"):
            quick(images())
        outside.set()

    with Capture(slow, "0"):
        in_threads(lambda: slow(images()), run_quick)
    assert is_fast_path_on()


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
