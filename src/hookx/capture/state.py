"""What a forward pass may change in a model: remembered, named and put back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hookx.capture.entries import Entry, Generator, Values, global_generators
from hookx.capture.search import Search

_LIGHT_BYTES = 2**20


class ModuleState:
    """A model's state: parameters, buffers, Python attributes and generators, and how to put them back.

    It reaches what the modules hold, in containers and objects of any depth, the data attributes of their classes, the
    variables that their methods close over, and the globals of the files that define them. It does not reach into
    compiled code. On the meta device it leaves out the values of tensors.

    Example:
        >>> norm, pixels_NCHW = nn.BatchNorm2d(3), torch.rand(2, 3, 8, 8)
        >>> state = ModuleState.of(norm)
        >>> _ = norm(pixels_NCHW)
        >>> state.changed()
        ["buffer 'running_mean'", "buffer 'running_var'", "buffer 'num_batches_tracked'"]
        >>> state.restore()
        >>> state.changed(), norm.running_mean
        ([], tensor([0., 0., 0.]))
    """

    def __init__(self, inside: Iterable[Entry] = (), outside: Iterable[Entry] = ()) -> None:
        self._inside, self._outside = list(inside), list(outside)
        self._entries = [*self._inside, *self._outside]

    @classmethod
    def of(cls, module: nn.Module, forward: Callable[..., Any] | None = None) -> ModuleState:
        """Remember the state of a model, and of the function that takes a batch through it."""
        search = Search()
        search.add_module(module, "")
        search.add(forward, "the function that runs the model")
        return cls(search.inside, [*search.outside, *global_generators()])

    def changed(self) -> list[str]:
        """Return the names of what is not as it was."""
        return list(dict.fromkeys(name for entry in self._entries for name in entry.changed()))

    def names(self) -> list[str]:
        """Return the names of all that is remembered."""
        return list(dict.fromkeys(name for entry in self._entries for name in entry.names()))

    def restore(self, names: Iterable[str] | None = None) -> None:
        """Put back what these names stand for; by default everything."""
        wanted = None if names is None else set(names)
        with torch.inference_mode():  # A model's tensors may be inference tensors, which only change here.
            for entry in self._entries:
                entry.restore(wanted)

    def generators(self) -> ModuleState:
        """Return the state of the generators of random numbers alone."""
        return ModuleState(entry for entry in self._entries if isinstance(entry, Generator))

    def inside(self) -> ModuleState:
        """Return the state of the model alone: its modules, what they hold, and their classes."""
        return ModuleState(self._inside)

    def narrow(self, names: Iterable[str]) -> ModuleState:
        """Return the state of these names alone."""
        wanted = set(names)
        return ModuleState(entry for entry in self._entries if not wanted.isdisjoint(entry.names()))

    def lighten(self, names: Iterable[str]) -> ModuleState:
        """Return the state without the values of large tensors, except those of these names."""
        wanted = set(names)
        return ModuleState(
            entry
            for entry in self._entries
            if not isinstance(entry, Values) or entry.nbytes <= _LIGHT_BYTES or not wanted.isdisjoint(entry.names())
        )


@dataclass(frozen=True)
class Settled:
    """How the passes of a run follow one another; see `hookx.capture.settle`."""

    stops: bool = True  # a pass, after the last target
    changing: tuple[str, ...] = ()  # the names of what every pass changes
    before_pass: ModuleState = field(default_factory=ModuleState)  # of these names
    before_run: ModuleState = field(default_factory=ModuleState)

    def begin_pass(self) -> None:
        """Put back what the pass before has changed, where this one will change it again."""
        if self.changing:
            self.before_pass.restore(self.changing)

    def end(self) -> None:
        """Put back everything."""
        self.before_run.restore()
