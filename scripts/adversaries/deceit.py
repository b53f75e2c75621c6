"""What every trap is made of: a small model, written to deceive, and what must become of it.

`scripts/conformance.py --kind adversaries` runs the traps. A stored row must be what the model returns for that image
alone, or the run must end with an error that names the layer and the reason. The traps know nothing of hookx.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Outcome:
    """What must become of a run: rows that are right ('same'), a refusal, or 'either'; `reason` is a regex."""

    kind: str
    reason: str = ""

    def __str__(self) -> str:
        return self.kind


SAME, EITHER = Outcome("same"), Outcome("either")


def refused(reason: str) -> Outcome:
    return Outcome("refused", reason)


@dataclass(frozen=True)
class Trap:
    """A model, the layers to take, and what must happen in the default batch size and one image at a time."""

    name: str
    make: Callable[[], nn.Module]
    kind: str
    batched: Outcome
    alone: Outcome
    why: str
    file: str
    layers: str = "out"
    before: str = "conv"  # a layer in front of the trouble, which must be stored though `layers` is refused
    stored: tuple[str, ...] = ()  # paths of the modules that must be stored; by default those of `layers`
    options: dict[str, Any] = field(default_factory=dict)
    by_hand: bool = True  # Plain passes over batches are wrong where the trap is refused, and right elsewhere.
    outside: bool = False  # Its state lies outside the model, so another import is needed for a fresh one.


TRAPS: dict[str, Trap] = {}
# A row that depends on other images does not depend on them where there are none.
_ONLY_IN_BATCHES = ("companions", "place", "number")
LAYER, RANDOM, OUTSIDE = refused("'out'"), refused("(?i)random"), refused("(?i)outside")


def trap(
    kind: str, batched: Outcome, alone: Outcome | None = None, **settings: Any
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register a model; its docstring says why it is a trap."""
    if alone is None:
        alone = SAME if kind in _ONLY_IN_BATCHES else batched

    def register(model: type[nn.Module]) -> type[nn.Module]:
        why = (model.__doc__ or "").strip()
        file = sys.modules[model.__module__].__file__ or ""
        TRAPS[model.__name__] = Trap(model.__name__, model, kind, batched, alone, why, file, **settings)
        return model

    return register


class Net(nn.Module):
    """A convolution, whatever a trap does with what it returns, and a layer that returns the result."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 8, 8)
        self.out = nn.Identity()
        self.prepare()

    def prepare(self) -> None:
        """Make what `mix` needs."""

    def mix(self, y: Tensor) -> Any:
        """Return what `out` is given for maps (N, 8, 4, 4)."""
        return y

    def forward(self, x: Tensor) -> Any:
        return self.out(self.mix(self.conv(x)))


def mean_of(y: Tensor) -> Tensor:
    return y.mean((0, 2, 3)).view(8, 1, 1)


class Experts(Net):
    """Tokens are sent to one of four experts."""

    def prepare(self) -> None:
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def route(self, tokens: Tensor, capacity: int) -> Tensor:
        chosen, out = self.gate(tokens).argmax(1), torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            places = (chosen == number).nonzero()[:capacity, 0]
            out[places] = expert(tokens[places])
        return out

    def mix(self, y: Tensor) -> Tensor:
        tokens = y.flatten(2).transpose(1, 2)
        return self.route(tokens.reshape(-1, 8), self.capacity(tokens)).view_as(tokens)

    def capacity(self, tokens: Tensor) -> int:
        return len(tokens) * 16
