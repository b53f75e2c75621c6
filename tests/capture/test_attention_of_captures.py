"""`path@attention` in `Capture`: the attention of your own passes, which go on as they would."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode

import hookx
from hookx.errors import NotCapturedError, UsageError

ROUNDING = 1e-6


class Net(nn.Module):
    """Two attentions, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))
        self.norm = nn.LayerNorm(8)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.one(tokens, tokens, tokens, need_weights=False)[0]
        return self.norm(tokens + self.two(tokens, tokens, tokens, need_weights=False)[0])


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def weights_of(attention: nn.MultiheadAttention, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        weights: Tensor = attention(tokens, tokens, tokens, need_weights=True, average_attn_weights=False)[1]
    return weights


def test_each_pass_gives_its_own_attention(net: Net) -> None:
    with hookx.Capture(net, ["one@attention", "two@attention@mean1"]) as capture, torch.no_grad():
        for seed in range(3):
            tokens = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(seed))
            net(tokens)
            assert torch.allclose(capture["one@attention"], weights_of(net.one, tokens), atol=ROUNDING)
            assert capture["two@attention@mean1"].shape == (2, 5, 5)


@pytest.fixture
def no_fast_path() -> Iterator[None]:
    """Leave out PyTorch's fast path, which rounds differently, and which no pass under observation takes."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.usefixtures("no_fast_path")
def test_a_pass_has_the_bits_that_it_has_without(net: Net) -> None:
    tokens = torch.randn(2, 5, 8)
    with torch.no_grad():
        expected = net(tokens)
        with hookx.Capture(net, ["one@attention", "norm"]) as capture:
            assert torch.equal(net(tokens), expected) and torch.equal(capture["norm"], expected)


def test_gradients_are_what_they_are_without(net: Net) -> None:
    tokens = torch.randn(2, 5, 8)
    net(tokens).sum().backward()
    expected = [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]
    net.zero_grad()
    with hookx.Capture(net, "one@attention") as capture:
        net(tokens).sum().backward()
    assert not capture["one@attention"].requires_grad
    found = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
    assert all(map(torch.equal, found, expected))
    with pytest.raises(UsageError, match="has no gradients with detach=False"):
        hookx.Capture(net, "one@attention", detach=False)


@pytest.mark.parametrize("error", [RuntimeError("as planned"), KeyboardInterrupt()])
def test_a_pass_that_fails_leaves_nothing_behind(net: Net, error: BaseException) -> None:
    def fail(*_: object) -> None:
        raise error

    tokens = torch.randn(1, 5, 8)
    with hookx.Capture(net, "one@attention") as capture, torch.no_grad():
        within = net.one.register_forward_pre_hook(fail)  # behind the capture's own, so that the call has begun
        with pytest.raises(type(error)):
            net(tokens)
        within.remove()
        net(tokens)
        assert torch.allclose(capture["one@attention"], weights_of(net.one, tokens), atol=ROUNDING)
    assert _get_current_function_mode() is None


def test_threads_do_not_mix(net: Net) -> None:
    found: dict[int, bool] = {}
    capture = hookx.Capture(net, "one@attention", keep=64)

    def work(number: int) -> None:
        tokens = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(number))
        with torch.no_grad():
            for _ in range(8):
                net(tokens)
            with capture_paused:
                found[number] = torch.allclose(capture["one@attention"], weights_of(copied, tokens), atol=ROUNDING)

    copied, capture_paused = Net().eval().one, threading.Lock()
    copied.load_state_dict(net.one.state_dict())
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), True)


def test_captures_within_captures_see_the_same(net: Net) -> None:
    tokens = torch.randn(2, 5, 8)
    with hookx.Capture(net, "one@attention") as outer, hookx.Capture(net, "one@attention") as inner, torch.no_grad():
        net(tokens)
        assert torch.equal(outer["one@attention"], inner["one@attention"])


def test_a_layer_without_one_attention_says_why(net: Net) -> None:
    with hookx.Capture(net, ["norm@attention", ".@attention"]) as capture, torch.no_grad():
        net(torch.randn(1, 5, 8))
        with pytest.raises(NotCapturedError, match="no softmax over tokens"):
            capture["norm@attention"]
        with pytest.raises(NotCapturedError, match="it computes 2 attentions"):
            capture[".@attention"]
