"""Which layers of a model compute by algorithms whose bits can differ from run to run."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from torch import Tensor

from hookx.capture.arithmetic import NOT_DETERMINISTIC
from hookx.capture.hooks import Taps, tap
from hookx.capture.runner import Runner, modules_of
from hookx.capture.state import ModuleState


def find_nondeterministic(runner: Runner, pixels_NCHW: Tensor) -> dict[str, str]:
    """Run a pass; return path -> operation of the layers that run one without a deterministic algorithm.

    PyTorch keeps the list, and warns: pytorch.org/docs/stable/generated/torch.use_deterministic_algorithms.html. The
    path is that of the innermost module that was running.

    Example:
        >>> class Ragged(torch.nn.Module):
        ...     def forward(self, x):
        ...         return torch.zeros(4).put_(torch.tensor([1, 1]), x.flatten()[:2])
        >>> net = torch.nn.Sequential(torch.nn.ReLU(), Ragged())
        >>> find_nondeterministic(Runner.of(net), torch.ones(1, 3, 8, 8))
        {'1': 'put_'}
    """
    running: list[str] = []
    found: dict[str, str] = {}

    def on_enter(path: str, *_: Any) -> None:
        running.append(path)

    def on_return(*_: Any) -> None:
        running.pop()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        text = str(message)
        if match := re.match(rf"(\S+) .*{NOT_DETERMINISTIC}|(.*{NOT_DETERMINISTIC})", text.splitlines()[0]):
            found.setdefault(running[-1] if running else ".", match[1] or match[2])

    mode, state = torch.get_deterministic_debug_mode(), ModuleState.of(runner.module, runner.forward)
    with tap(modules_of(runner.module), Taps(on_enter, on_return)), warnings.catch_warnings():
        warnings.filterwarnings("always", f".*{NOT_DETERMINISTIC}")
        warnings.showwarning = show
        torch.set_deterministic_debug_mode("warn")
        try:
            runner.run(pixels_NCHW, warn=True)
        finally:
            torch.set_deterministic_debug_mode(mode)
            state.restore()
    return found
