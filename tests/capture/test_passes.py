"""`Capture` in other people's code: which calls make a pass, and what stays out of it."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from hookx import Capture
from kit import nets
from kit.nets import Features, hooks_on, images


def is_fast_path_on() -> bool:
    return torch.backends.mha.get_fastpath_enabled()


@pytest.fixture(autouse=True)
def fast_path_stays_on() -> Iterator[None]:
    yield
    was_on = is_fast_path_on()
    torch.backends.mha.set_fastpath_enabled(True)
    assert was_on


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


@pytest.mark.parametrize("detach", [True, False])
def test_a_transform_that_works_in_place_reaches_neither_the_model_nor_its_neighbours(detach: bool) -> None:
    net, pixels = Features().eval(), images()
    expected, maps = net(pixels), net.conv(pixels)
    with Capture(net, "conv", detach=detach) as capture:
        capture.add({"zeros": "conv"}, transform=lambda maps: maps.mul_(0)).add({"again": "conv"})
        assert torch.equal(net(pixels), expected)
    assert torch.equal(capture["conv"], maps) and torch.equal(capture["again"], maps)
    assert not capture["zeros"].any()


def test_what_a_transform_or_a_hook_calls_is_not_captured() -> None:
    net, pixels = Features().eval(), images()
    with Capture(net, "conv", keep=None, transform=lambda maps: net.conv(maps[:, :3])) as capture:
        capture.add("head", hook=lambda *_: net(pixels))
        output = net(pixels)
    assert set(capture) == {"conv", "head"} and len(capture.history("conv")) == 1
    assert torch.equal(capture["head"], output)
    assert torch.equal(capture["conv"], net.conv(net.conv(pixels)[:, :3]))


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
