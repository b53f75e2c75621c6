"""Small networks that a probe can take for what they are not: rows that depend on more than their image, or less."""

from __future__ import annotations

import itertools
import os
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

LAST_SEEN: list[Tensor] = []
CALLS = 0


class Trap(nn.Module):
    """A convolution `conv`, and `head`, which a function computes from its output and the images."""

    class Head(nn.Module):
        """Calls the function with itself, so that it can keep things."""

        def __init__(self, function: Callable[..., Any], **attributes: Any) -> None:
            super().__init__()
            self.function = function
            for name, value in attributes.items():
                if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                    self.register_buffer(name, value)
                else:
                    setattr(self, name, value)

        def forward(self, y: Tensor, x: Tensor) -> Any:
            return self.function(self, y, x)

    def __init__(self, function: Callable[..., Any], **attributes: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 4, 4)
        self.head = self.Head(function, **attributes)
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.head(self.conv(x), x)


def trap(function: Callable[..., Any], **attributes: Any) -> Callable[[], Trap]:
    return lambda: Trap(function, **attributes)


# --- rows that depend on their companions --------------------------------------------------------------------------


def batch_top_k(_: Any, y: Tensor, x: Tensor) -> Tensor:
    codes = y.flatten(1).relu()
    values, places = codes.flatten().topk(5 * len(x))
    return torch.zeros_like(codes.flatten()).scatter(0, places, values).view_as(codes)


def quantised_by_batch(_: Any, y: Tensor, x: Tensor) -> Tensor:
    scale = y.nan_to_num().abs().max() / 127
    return torch.clamp((y / scale).round(), -128, 127) * scale


def with_capacity(_: Any, y: Tensor, x: Tensor) -> Tensor:
    """Let each of two experts take the first of its tokens, and leave out the others."""
    tokens = y.flatten(2).transpose(1, 2).reshape(-1, 4).nan_to_num()
    capacity = len(tokens) // 3
    out = tokens.clone()
    for expert in (True, False):
        mine = ((tokens[:, 0] > 0) == expert).nonzero().flatten()[:capacity]
        out[mine] = tokens[mine] * (2 if expert else 3)
    return out.view(len(x), -1, 4)


def without_repeats(_: Any, y: Tensor, x: Tensor) -> Tensor:
    _, inverse = torch.unique(y.nan_to_num().flatten(1), dim=0, return_inverse=True)
    return torch.stack([y.nan_to_num().flatten(1)[row] / (inverse == inverse[row]).sum() for row in range(len(x))])


def of_all(_: Any, y: Tensor, x: Tensor) -> Tensor:
    tokens = y.nan_to_num().mean((2, 3))
    weights = (tokens @ tokens.T).softmax(1)
    return tokens + 1e-3 * weights @ tokens


DEPENDENT_ON_OTHERS: dict[str, Callable[[], nn.Module]] = {
    "the largest codes of the batch": trap(batch_top_k),
    "a mask by the mean of the batch": trap(lambda _, y, x: torch.where(y > y.mean(), y, 0)),
    "a scale by the brightest pixel": trap(lambda _, y, x: y / 255 if x.max() > 2.5 else y),
    "a scale by the darkest pixel": trap(lambda _, y, x: y + 1 if x.min() < 0 else y),
    "statistics behind nan_to_num": trap(
        lambda _, y, x: functional.batch_norm(y.nan_to_num(), None, None, training=True)
    ),
    "statistics beside NaN of its own": trap(lambda _, y, x: torch.cat([y - y.nan_to_num().mean(0), torch.log(y)], 1)),
    "a quantisation scale of the batch": trap(quantised_by_batch),
    "ranks among the images": trap(lambda _, y, x: y.mean((2, 3)).nan_to_num().argsort(0)),
    "booleans against the median": trap(lambda _, y, x: y.nan_to_num() > y.nan_to_num().median()),
    "experts of a capacity": trap(with_capacity),
    "repeats that are merged": trap(without_repeats),
    "faint attention to the batch": trap(of_all),
    "sums over the images before": trap(lambda _, y, x: y.nan_to_num().cumsum(0)),
    "the opposite image": trap(lambda _, y, x: y + 0.01 * y.nan_to_num().flip(0)),
    "a byte of the batch's checksum": trap(lambda _, y, x: (y.nan_to_num().sum() * 1000).long() % 256 + y.long() * 0),
    "zeros beside anything that is not finite": trap(lambda _, y, x: y if x.isfinite().all() else torch.zeros_like(y)),
    "padding to the widest": trap(lambda _, y, x: y.clamp(max=float(y.nan_to_num().flatten(1).amax(1).median()))),
}
DEPENDENT_ON_PLACE: dict[str, Callable[[], nn.Module]] = {
    "a table by place": trap(lambda _, y, x: y + torch.arange(len(x)).view(-1, 1, 1, 1)),
    "all but the first": trap(lambda _, y, x: torch.cat([y[:1], y[1:] * 1.01])),
    "noise of a fixed seed": trap(lambda _, y, x: y + torch.randn(y.shape, generator=torch.Generator().manual_seed(0))),
}
DEPENDENT_ON_NUMBER: dict[str, Callable[[], nn.Module]] = {
    "a share of the batch": trap(lambda _, y, x: y / len(x)),
    "odd batches": trap(lambda _, y, x: y + len(x) % 2),
    "integers": trap(lambda _, y, x: y.mean((2, 3)).long() + len(x)),
}
RANDOM: dict[str, Callable[[], nn.Module]] = {
    "dropout": trap(lambda _, y, x: functional.dropout(y, 0.5, training=True)),
    "a generator of its own": trap(
        lambda self, y, x: y + torch.randn(y.shape[1:], generator=self.generator), generator=torch.Generator()
    ),
    "numpy's numbers": trap(lambda _, y, x: y * float(np.random.rand())),
    "a generator of numpy's": trap(lambda self, y, x: y * self.numbers.random(), numbers=np.random.default_rng(0)),
    "Python's numbers": trap(lambda _, y, x: y * random.random()),
    "a Python generator of its own": trap(lambda self, y, x: y * self.numbers.random(), numbers=random.Random(0)),
    "the system's numbers": trap(lambda _, y, x: y * int.from_bytes(os.urandom(2), "big")),
}


# --- rows that depend on what ran before ---------------------------------------------------------------------------


def lagging(self: Any, y: Tensor, x: Tensor) -> Tensor:
    out = y - self.mean
    self.mean.mul_(0.9).add_(0.1 * y.mean((0, 2, 3)).view(-1, 1, 1))
    return out


def set_by_first_batch(self: Any, y: Tensor, x: Tensor) -> Tensor:
    if not self.ready:
        self.scale.data = 1 / y.std((0, 2, 3)).view(-1, 1, 1)
        self.ready.fill_(True)
    return y * self.scale


def queue(self: Any, y: Tensor, x: Tensor) -> Tensor:
    self.kept.append(y.mean((0, 2, 3)))
    return y + torch.stack(list(self.kept)).mean(0).view(-1, 1, 1)


def counter(self: Any, y: Tensor, x: Tensor) -> Tensor:
    self.count += 1
    return y * self.count


def through_data(self: Any, y: Tensor, x: Tensor) -> Tensor:
    self.gain.data.mul_(1.1)
    return y * self.gain


def nested(self: Any, y: Tensor, x: Tensor) -> Tensor:
    before = self.memory["maps"][-1] if self.memory["maps"] else torch.zeros(4)
    self.memory["maps"].append(y.detach().mean((0, 2, 3)))
    return y + before.view(-1, 1, 1)


def in_numpy(self: Any, y: Tensor, x: Tensor) -> Tensor:
    self.sums += y.nan_to_num().mean((0, 2, 3)).numpy()
    return y + torch.from_numpy(self.sums.copy()).view(-1, 1, 1)


def registered_anew(self: Any, y: Tensor, x: Tensor) -> Tensor:
    out = y - self.mean
    self.register_buffer("mean", y.mean((0, 2, 3)).view(-1, 1, 1))
    return out


class Slots:
    """An object without a dictionary."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0


def in_slots(self: Any, y: Tensor, x: Tensor) -> Tensor:
    self.holder.value += float(y.nan_to_num().mean())
    return y + self.holder.value


def in_a_list_of_modules(self: Any, y: Tensor, x: Tensor) -> Tensor:
    (norm,) = self.hidden
    out = norm.eval()(y)
    norm.train()(y)
    return out


class OfItsClass(Trap):
    """Keeps a value in its class."""

    offset: Any = 0.0

    def __init__(self) -> None:
        super().__init__(lambda _, y, x: y)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x) + OfItsClass.offset
        OfItsClass.offset = OfItsClass.offset + 1.0
        return y


class OfItsFile(Trap):
    """Keeps its last output in a global of its file."""

    def __init__(self) -> None:
        super().__init__(lambda _, y, x: y)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        LAST_SEEN.append(y.mean((0, 2, 3)).view(-1, 1, 1))
        return y + LAST_SEEN[0]


class OfItsCounter(Trap):
    """Counts its calls in a global of its file."""

    def __init__(self) -> None:
        super().__init__(lambda _, y, x: y)

    def forward(self, x: Tensor) -> Tensor:
        global CALLS
        CALLS += 1
        return super().forward(x) * CALLS


class OfItsArgument(Trap):
    """Keeps a value in a default argument."""

    def __init__(self) -> None:
        super().__init__(lambda _, y, x: y)

    def forward(self, x: Tensor, kept: list[Tensor] = []) -> Tensor:  # noqa: B006
        kept.append(super().forward(x))
        return kept[-1] + kept[0].mean()


def closing_over() -> nn.Module:
    kept: list[Tensor] = []

    def head(_: Any, y: Tensor, x: Tensor) -> Tensor:
        kept.append(y.mean((0, 2, 3)).view(-1, 1, 1))
        return y + kept[0]

    return Trap(head)


def out_of_reach() -> nn.Module:
    """Keep a number where no search finds it."""
    numbers = itertools.count()
    return Trap(lambda _, y, x: y + next(numbers))


REMEMBERING: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a mean that lags": (trap(lagging, mean=torch.zeros(4, 1, 1)), "buffer 'head.mean'"),
    "a scale set by the first batch": (
        lambda: Trap(set_by_first_batch, scale=nn.Parameter(torch.ones(4, 1, 1)), ready=torch.tensor(False)),
        "buffer 'head.ready'",
    ),
    "a queue": (lambda: Trap(queue, kept=deque(maxlen=3)), "attribute 'head.kept'"),
    "a counter": (trap(counter, count=0), "attribute 'head.count'"),
    "a parameter changed through .data": (
        lambda: Trap(through_data, gain=nn.Parameter(torch.ones(1))),
        "parameter 'head.gain'",
    ),
    "a list in a dict": (lambda: Trap(nested, memory={"maps": []}), "attribute 'head.memory'"),
    "an array of numpy's": (lambda: Trap(in_numpy, sums=np.zeros(4, np.float32)), "attribute 'head.sums'"),
    "a buffer registered anew": (trap(registered_anew, mean=torch.zeros(4, 1, 1)), "buffer 'head.mean'"),
    "an object with slots": (lambda: Trap(in_slots, holder=Slots()), "attribute 'head.holder'"),
    "a module in a list": (
        lambda: Trap(in_a_list_of_modules, hidden=[nn.BatchNorm2d(4)]),
        r"buffer 'head.hidden\.?.*running_",
    ),
    "its class": (OfItsClass, "class attribute 'OfItsClass.offset'"),
    "its file": (OfItsFile, "global 'traps.LAST_SEEN'"),
    "a counter in its file": (OfItsCounter, "global 'traps.CALLS'"),
    "a default argument": (OfItsArgument, "a default argument of OfItsArgument.forward"),
    "a closed-over list": (closing_over, "variable 'kept'"),
    "what no search finds": (out_of_reach, "something outside the model's buffers and attributes"),
}


# --- what is right, though it looks wrong --------------------------------------------------------------------------


def counted(self: Any, y: Tensor, x: Tensor) -> Tensor:
    self.count += 1
    return y


def kept_map(self: Any, y: Tensor, x: Tensor) -> Tensor:
    self.map = y.softmax(1)
    self.maps.append(self.map)
    return y * self.map


def observed(self: Any, y: Tensor, x: Tensor) -> Tensor:
    assert torch.isfinite(y).all(), "observers take finite values"
    self.low.copy_(torch.minimum(self.low, y.min()))
    return y * 2


def cached(self: Any, y: Tensor, x: Tensor) -> Tensor:
    if self.table is None:
        self.table = torch.arange(y.shape[-1]).to(y)
    return y + self.table


def cached_by_size(self: Any, y: Tensor, x: Tensor) -> Tensor:
    return y + self.tables.setdefault(len(x), torch.ones(len(x), 1, 1, 1))


def finite(_: Any, y: Tensor, x: Tensor) -> Tensor:
    assert torch.isfinite(x).all(), "bad pixels"
    return y


def in_range(_: Any, y: Tensor, x: Tensor) -> Tensor:
    if x.abs().max() > 10:
        raise ValueError("pixels are not normalised")
    return y


class Bytes(nn.Module):
    """Looks pixels up as bytes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(256, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.table(((x + 3) * 40).long())


class Recurrent(nn.Module):
    """Returns states with the batch in dimension 1, and takes rows of pixels with the batch there, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(3, 5, num_layers=2)

    def forward(self, x: Tensor) -> Any:
        return self.lstm(x.permute(2, 0, 3, 1).flatten(1, 2))  # heights, images x widths, colours


HARMLESS: dict[str, Callable[[], nn.Module]] = {
    "a counter that nothing reads": trap(counted, count=0),
    "a kept map": lambda: Trap(kept_map, map=None, maps=[]),
    "an observer": trap(observed, low=torch.zeros(())),
    "a cached table": lambda: Trap(cached, table=None),
    "tables by batch size": lambda: Trap(cached_by_size, tables={}),
    "an assertion of finite pixels": trap(finite),
    "an assertion of a range": trap(in_range),
    "NaN of its own": trap(lambda _, y, x: torch.log(y)),
    "infinities of its own": trap(lambda _, y, x: y / y.relu()),
    "integers": trap(lambda _, y, x: y.flatten(1).argsort(1)),
    "signs": trap(lambda _, y, x: y.sign()),
    "two halves in turn": trap(lambda _, y, x: torch.cat([y, -y])),
    "swallowed NaN before windows": trap(lambda _, y, x: torch.where(y > 0, y, 0.0).flatten(2).mT.flatten(0, 1)),
    "tokens in turn": trap(lambda _, y, x: y.flatten(2).permute(2, 0, 1).flatten(0, 1)),
    "groups of windows": trap(lambda _, y, x: y.unflatten(2, (2, -1)).permute(2, 0, 3, 4, 1).flatten(0, 2)),
    "an expert for all tokens": trap(lambda _, y, x: (y.flatten(2).mT.reshape(-1, 4) @ torch.ones(4, 4)).tanh()),
    "a fixed mask": trap(lambda _, y, x: y[:, torch.tensor([True, False, True, True])]),
    "a mask of as many tokens each": trap(
        lambda _, y, x: y.flatten(1)[y.flatten(1) >= y.flatten(1).sort(1).values[:, -3:-2]]
    ),
    "bytes": Bytes,
    "states with the batch in dimension 1": Recurrent,
}


# --- passes that are not over when they are stopped ----------------------------------------------------------------


class Unfinished(nn.Module):
    """Blocks that keep something until the end of the pass."""

    def __init__(self, kept: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 4, 4)
        self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))
        self.kept = kept


class KeepsFirst(Unfinished):
    """Keeps the value of the first block."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        for block in self.blocks:
            value = block(x)
            if self.kept is None:
                self.kept = value
            x = x + value + self.kept
        self.kept = None
        return x


class Pyramid(Unfinished):
    """Puts maps into a queue, and takes them out again at the end."""

    def __init__(self) -> None:
        super().__init__(deque())

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        for block in self.blocks:
            self.kept.append(block(x))
            x = x + self.kept[0]
        while self.kept:
            x = x + self.kept.popleft()
        return x


class TurnsOn(Unfinished):
    """Switches a block to another mode for the length of the pass."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.blocks[0](x) * (2 if self.blocks[0].training else 1)
        self.blocks[0].train()
        x = self.blocks[1](x)
        self.blocks[0].eval()
        return x


class KeepsOutOfReach(Unfinished):
    """Keeps a number of the pass where no search finds it, and takes it back at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = memoryview(bytearray(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x) + self.numbers[0]
        self.numbers[0] = 1
        x = self.blocks[0](x)
        x = self.blocks[1](x)
        self.numbers[0] = 0
        return x


UNFINISHED = {"the first value": KeepsFirst, "a queue": Pyramid, "a mode": TurnsOn, "out of reach": KeepsOutOfReach}
