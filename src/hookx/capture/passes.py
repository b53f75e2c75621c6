"""Passes of the probe through a model: what every tensor of every call is, in one batch after another."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hookx.capture.arithmetic import PRECISIONS
from hookx.capture.attention import Attentions
from hookx.capture.compare import Batch, Comparison
from hookx.capture.failures import is_broken, is_out_of_memory
from hookx.capture.hooks import Taps, tap
from hookx.capture.runner import Runner
from hookx.capture.state import ModuleState
from hookx.capture.tensors import Parts, Unusable, dtype_name, look_into, look_into_arguments
from hookx.errors import CaptureError, one_line
from hookx.layers.select import TensorInfo

Key = tuple[str, int, bool, Parts]  # path, call, whether it is an input, part
_MAX_DRAWS_CHECKED = 2_000  # tensors of a pass; what a later one adds is drawn on the way as well


class Passes:
    """Takes batches through a model, and compares each tensor with that of the first pass, of one image alone."""

    def __init__(
        self,
        runner: Runner,
        modules: Mapping[str, nn.Module],
        state: ModuleState,
        *,
        compares: bool = True,
        attention: Collection[str] | None = (),
    ) -> None:
        self.runner, self.modules, self.state, self.compares = runner, modules, state, compares
        self.attention = attention
        self.coarsest, self.tf32 = _arithmetic(runner)
        self.comparisons: dict[Key, Comparison] = {}
        self.others: dict[Key, TensorInfo] = {}  # all but the tensors of the first pass
        self.batches: list[Batch] = []
        self.entered: dict[str, int] = {}  # path -> when it was first called
        self.calls: list[tuple[Batch, dict[str, int]]] = []
        self.changed: set[str] = set()  # the names of what passes changed in the model
        self.drawn: set[Key] = set()  # what came after random numbers were drawn

    def begin(self, batch: Batch) -> None:
        """Make the first pass, with one image."""
        generators, has_drawn = self.state.generators(), False

        def look(key: Key, tensor: Tensor) -> None:
            nonlocal has_drawn
            if self.compares and not has_drawn and len(self.comparisons) < _MAX_DRAWS_CHECKED:
                has_drawn = bool(generators.changed())
            if has_drawn:
                self.drawn.add(key)
            alone = tensor.detach().clone() if self.compares else tensor
            self.comparisons[key] = Comparison(key[3], alone, self.coarsest, self.tf32, self.compares)

        self.calls.append((batch, self.run(batch, look)))
        self.batches.append(batch)

    def note_changes(self) -> None:
        """Note what the passes have changed in the model since it was loaded, random numbers apart."""
        self.changed |= set(self.state.changed()) - set(self.state.generators().names())

    def go_on(self, batch: Batch) -> None:
        """Make another pass, and compare what it makes with the first."""
        number, seen = len(self.batches), set()

        def look(key: Key, tensor: Tensor) -> None:
            seen.add(key)
            if comparison := self.comparisons.get(key):
                comparison.see(tensor, batch, number)
            elif not batch.what:
                problem = f"it exists for {batch} but not for {self.batches[0]}"
                info = TensorInfo(key[3], tuple(tensor.shape), dtype_name(tensor.dtype), None, problem=problem)
                self.others.setdefault(key, info)

        self.calls.append((batch, self.run(batch, look)))
        self.batches.append(batch)
        for key in self.comparisons.keys() - seen:
            comparison = self.comparisons[key]
            if batch.what:
                comparison.is_excused = True
                continue
            comparison.problem = comparison.problem or f"it exists for {self.batches[0]} but not for {batch}"

    def go_on_with_one_of(self, *batches: Batch) -> str:
        """Make a pass with the first batch that the model takes; return how it failed on the one before."""
        failed = ""
        for batch in batches[:-1]:
            before = {key: (c.problem, dict(c.moved), c.groups) for key, c in self.comparisons.items()}
            try:
                self.go_on(batch)
                return failed
            except Exception as error:
                if not isinstance(error, CaptureError) and not is_out_of_memory(error):
                    raise
                failed = one_line(error)
                self.state.restore()
                for key, (problem, moved, groups) in before.items():
                    comparison = self.comparisons[key]
                    comparison.problem, comparison.moved, comparison.groups = problem, moved, groups
        self.go_on(batches[-1])
        return failed

    def run(self, batch: Batch, look: Callable[[Key, Tensor], None]) -> dict[str, int]:
        """Run a pass and look at each tensor at the moment it passes; return path -> number of calls."""

        def note(path: str, call: int, is_input: bool, found: Iterable[tuple[Parts, Tensor | Unusable]]) -> None:
            for parts, one in found:
                key = (path, call, is_input, parts)
                if isinstance(one, Unusable):
                    self.others[key] = TensorInfo.of_unusable(parts, one.reason)
                else:
                    look(key, one)

        def on_enter(path: str, call: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.entered.setdefault(path, len(self.entered))
            note(path, call, True, look_into_arguments(args, kwargs))
            attentions.enter(path, call, self.modules[path])

        def on_return(path: str, call: int, _args: Any, _kwargs: Any, output: Any) -> None:
            note(path, call, False, look_into(output))
            note(path, call, False, attentions.leave(path, call))

        attentions = Attentions(self.attention)
        with tap(self.modules, Taps(on_enter, on_return)) as taps, attentions.watch():
            try:
                self.runner.run(batch.pixels_NCHW.clone())  # A model may write to what it is given.
            except Exception as error:
                if is_out_of_memory(error) or is_broken(error):
                    raise
                shape = ", ".join(map(str, batch.pixels_NCHW.shape))
                what = f" {batch.what}" if batch.what else ""
                raise CaptureError(
                    f"the model fails on a batch of images ({shape}){what}: {type(error).__name__}: {error}"
                ) from error
        return taps.calls

    def failed(self) -> set[Key]:
        """Return the tensors in which the row of the followed image moves."""
        return {key for key, comparison in self.comparisons.items() if comparison.has_failed and key not in self.drawn}

    def uneven_calls(self, path: str) -> str:
        """Return how the number of a module's calls changes from pass to pass; '' if it does not."""
        first, count = self.calls[0][0], self.calls[0][1][path]
        for batch, calls in self.calls[1:]:
            if calls[path] != count and not batch.what:
                images = "other images" if len(batch) == len(first) else len(batch)
                return f"called {_times(count)} for {first} and {_times(calls[path])} for {images}"
        return ""


def _times(count: int) -> str:
    return {0: "never", 1: "once", 2: "twice"}.get(count, f"{count} times")


def _arithmetic(runner: Runner) -> tuple[tuple[torch.dtype, ...], bool]:
    """Return the types that a model computes with, and whether float32 is multiplied as TensorFloat-32."""
    autocast = PRECISIONS[runner.precision]
    types: Collection[torch.dtype] = {
        parameter.dtype for parameter in runner.module.parameters() if parameter.is_floating_point()
    }
    return (*types, *([autocast] if autocast else [])), runner.precision == "tf32"
