"""Small networks, each of them one trap for whoever reads activations with a hook, and the way a run captures them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hookx.capture.probe import probe
from hookx.capture.rows import RowCapture, stored_dtype
from hookx.capture.runner import Runner
from hookx.layers.select import Target, parse_selectors, select


def images(count: int = 3, side: int = 8) -> Tensor:
    """Return the same images of ordinary values at every call."""
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def targets_of(model: nn.Module, layers: str, pixels_NCHW: Tensor | None = None) -> list[Target]:
    """Probe a network and select from it."""
    probed = probe(Runner.of(model), images() if pixels_NCHW is None else pixels_NCHW[:3])
    return select(parse_selectors(layers), probed, "net").targets


def captured_rows(model: nn.Module, layers: str, pixels_NCHW: Tensor) -> dict[str, Tensor]:
    """Capture one batch the way a run does: into preallocated rows."""
    targets = targets_of(model, layers, torch.cat([pixels_NCHW] * 3))
    rows = {
        str(target.address): torch.full(
            (len(pixels_NCHW), *target.shape), 7, dtype=getattr(torch, stored_dtype(target))
        )
        for target in targets
    }
    with RowCapture(Runner.of(model), targets) as capture:
        capture.run(pixels_NCHW, rows)
    return rows


def hooks_on(model: nn.Module) -> int:
    """Count the forward hooks on a model and all its modules."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


class InPlace(nn.Module):
    """The ReLU overwrites what the convolution returned."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(x)) + 1


class CalledTwice(nn.Module):
    """One module runs twice in a pass and gives two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(self.relu(x.clone())))


class Features(nn.Module):
    """A convolution, and a block whose ReLU runs twice; `features` is a part of the model as in timm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.block = CalledTwice()
        self.block.conv = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 2)

    def features(self, x: Tensor) -> Tensor:
        return self.block(self.conv(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class OneStorage(nn.Module):
    """`outer` and `outer.1` return one and the same tensor, and something overwrites it afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(x).zero_()


class SavedTwice(nn.Module):
    """One module is registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.mean((2, 3))))


class Pair(NamedTuple):
    """A named tuple of outputs."""

    left: Tensor
    right: Tensor


class Parts(nn.Module):
    """Outputs are tuples, named tuples, dicts, and dicts of lists that hold more than tensors."""

    class Returns(nn.Module):
        """Wrap a tensor in a structure."""

        def __init__(self, structure: str) -> None:
            super().__init__()
            self.structure = structure

        def forward(self, x: Tensor) -> Any:
            return {
                "tuple": (x, x * 2),
                "named": Pair(x, -x),
                "dict": OrderedDict(out=x, aux={"deep": [x, None, "text"]}),
            }[self.structure]

    def __init__(self) -> None:
        super().__init__()
        self.as_tuple, self.as_named, self.as_dict = (self.Returns(kind) for kind in ("tuple", "named", "dict"))

    def forward(self, x: Tensor) -> Any:
        pooled = x.mean((2, 3))
        return self.as_dict(self.as_named(self.as_tuple(pooled)[1]).right)


class Fails(nn.Module):
    """Every pass fails after the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.conv(x)
        raise RuntimeError("this network always fails")


class BatchSecond(nn.Module):
    """Tokens come first and the batch second, as in nn.Transformer's default layout."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(x.flatten(2).permute(2, 0, 1)).mean(0)


class Windows(nn.Module):
    """`by_image` keeps the windows of one image together, `by_window` interleaves them."""

    def __init__(self) -> None:
        super().__init__()
        self.by_image, self.by_window = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        count = x.shape[0]
        windows = x[:, 0].unfold(1, 2, 2).unfold(2, 2, 2).reshape(count, -1, 4)  # N, windows, 4
        together = self.by_image(windows.reshape(-1, 4))
        self.by_window(windows.transpose(0, 1).reshape(-1, 4))
        return together.reshape(count, -1)


class Constant(nn.Module):
    """`bias` computes a table that does not depend on the image."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.body = nn.Linear(2, 3), nn.Conv2d(3, 3, 1)
        self.register_buffer("table", torch.arange(8.0).reshape(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.bias(self.table).mean()


class NeverCalled(nn.Module):
    """`spare` is registered and left out; nn.MultiheadAttention reads its out_proj's weights directly."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(3, 3)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.embed = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x.flatten(2).transpose(1, 2))
        return self.attention(tokens, tokens, tokens)[0].mean(1)


class MixesBatch(nn.Module):
    """An image's activation depends on the other images: normalisation with the batch's own statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Swallows(nn.Module):
    """A careless `except Exception` around the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.late_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        try:
            x = self.early(x)
        except Exception:
            x = torch.zeros(len(x), 4, 8, 8)
        self.late_calls += 1
        return self.late(x)


class ChangesItsMind(nn.Module):
    """Does something else after `passes` passes."""

    def __init__(self, passes: int, how: str) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 4, 1), nn.ReLU()
        self.passes, self.how = passes, how

    def forward(self, x: Tensor) -> Tensor:
        self.passes -= 1
        if self.passes < 0:
            if self.how == "shape":
                return self.relu(self.conv(x[:, :, :4]))
            if self.how == "skip":
                return self.conv(x)
            if self.how == "again":
                return self.relu(self.relu(self.conv(x)))
        return self.relu(self.conv(x))
