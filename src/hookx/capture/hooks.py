"""PyTorch's forward hooks, on watched modules and on a whole model.

No other file of hookx registers a hook. What a hook returns would replace a layer's input or output, so the hooks of
`Taps` return None whatever the callbacks do, and those of `Watch` what their callbacks return on purpose.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from hookx.errors import CaptureError


class Taps:
    """Hooks on some modules of a model, which number the calls of each module within a pass.

    `on_enter(path, call, args, kwargs)` runs when a module is called, `on_return(path, call, args, kwargs, output)`
    when it returns.
    """

    def __init__(
        self,
        on_enter: Callable[[str, int, tuple[Any, ...], dict[str, Any]], None],
        on_return: Callable[[str, int, tuple[Any, ...], dict[str, Any], Any], None],
    ) -> None:
        self.on_enter, self.on_return = on_enter, on_return
        self.calls: dict[str, int] = {}
        self._open_calls: dict[str, list[int]] = {}
        self._hooks: dict[str, list[RemovableHandle]] = {}

    def attach(self, modules: Mapping[str, nn.Module]) -> None:
        """Hook the modules that are not hooked yet."""
        for path, module in modules.items():
            if path not in self._hooks:
                self.calls[path], self._open_calls[path] = 0, []
                self._hooks[path] = self._register(path, module)

    def detach(self, *paths: str) -> None:
        """Unhook modules; all of them if no path is given."""
        for path in paths or list(self._hooks):
            for hook in self._hooks.pop(path, ()):
                hook.remove()

    def begin_pass(self) -> None:
        """Number the calls of every module from 0 again."""
        self.calls = dict.fromkeys(self.calls, 0)
        self._open_calls = {path: [] for path in self._open_calls}

    def _register(self, path: str, module: nn.Module) -> list[RemovableHandle]:
        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = self.calls[path]
            self.calls[path] += 1
            self._open_calls[path].append(call)
            self.on_enter(path, call, args, kwargs)

        def leave(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._open_calls[path]:  # Empty only if the module was already running when it was hooked.
                self.on_return(path, self._open_calls[path].pop(), args, kwargs, output)

        before = module.register_forward_pre_hook(enter, with_kwargs=True)
        return [before, module.register_forward_hook(leave, with_kwargs=True)]


@contextlib.contextmanager
def tap(modules: Mapping[str, nn.Module], taps: Taps) -> Iterator[Taps]:
    """Hook some modules for the length of the `with` block."""
    try:
        taps.attach(modules)
        yield taps
    finally:
        taps.detach()


OnEnter = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any], FrameType], tuple[Any, Any] | None]
OnReturn = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any], FrameType, Any], Any]


class Watch:
    """Hooks that tell an object of the calls of some modules, for as long as that object exists.

    Both callbacks are bound methods of the object, which is held weakly. `on_enter(path, module, args, kwargs, frame)`
    runs when a module is called, `on_return(path, module, args, kwargs, frame, output)` when it returns or fails.
    `frame` is the running call into which PyTorch puts the hook: the same for both, unless the call failed. What they
    return other than None replaces the arguments or the output.

    The hooks are silent where a layer runs without being part of a forward pass: while autograd runs backward
    (activation checkpointing computes layers again), while torch.export looks at a model, and in a copy of the module.
    Code that torch.compile makes later is interrupted for them, and looks from then on whether modules have hooks; code
    that it has made before the first capture of a process does not call them.
    """

    def __init__(self, on_enter: OnEnter, on_return: OnReturn) -> None:
        self._on_enter: weakref.ref[OnEnter] = weakref.WeakMethod(on_enter)
        self._on_return: weakref.ref[OnReturn] = weakref.WeakMethod(on_return)
        self._hooks: dict[str, list[RemovableHandle]] = {}
        weakref.finalize(on_enter.__self__, _unhook, self._hooks).atexit = False  # type: ignore[attr-defined]

    def set(self, modules: Mapping[str, nn.Module]) -> None:
        """Hook these modules, where they are not hooked yet, and unhook all others."""
        _unhook(self._hooks, keep=modules)
        if modules:
            # torch.compile shares code between modules of a class. By default it does not look whether they have hooks,
            # and would run the code of one that has none.
            torch._dynamo.config.skip_nnmodule_hook_guards = False
        for path, module in modules.items():
            if path not in self._hooks:
                enter, leave = _Hook(path, module, self._on_enter), _Hook(path, module, self._on_return)
                self._hooks[path] = [
                    module.register_forward_pre_hook(enter, with_kwargs=True),
                    module.register_forward_hook(leave, with_kwargs=True, always_call=True),
                ]


class _Hook:
    """One hook of `Watch` on one module; a copy of either does nothing, so that copies of a model are not watched."""

    def __init__(self, path: str, module: nn.Module, callback: weakref.ref[Callable[..., Any]]) -> None:
        self._path, self._module, self._callback = path, weakref.ref(module), callback

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        if torch.compiler.is_compiling() and _is_exporting():
            return None
        # At this call torch.compile leaves its graph: it compiles what is around, and runs the hook.
        return _call_uncompiled(self.run, module, args, kwargs, *output)

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        callback = self._callback()
        if callback is None or torch._C._current_graph_task_id() != -1:
            return None
        if not output and module.__dict__.get("_is_replica"):
            raise CaptureError(
                f"cannot capture '{self._path}' under nn.DataParallel, which runs copies of the model side by side",
                "capture and call the model within it, or use DistributedDataParallel",
            )
        if self._module() is not module:
            return None  # `copy.copy` makes a module with the same hooks.
        return callback(self._path, module, args, kwargs, _frame_of_the_call(), *output)

    @property
    def __name__(self) -> str:
        raise _NotScriptableError(
            "cannot script a captured model: TorchScript compiles the hooks of a module, and these are Python",
            "call capture.remove() before torch.jit.script, or use torch.jit.trace",
        )

    def __reduce__(self) -> Any:
        # A method that takes anything and returns None, and can be loaded where hookx is not installed.
        return getattr, (contextlib.nullcontext(), "__exit__")


class _NotScriptableError(CaptureError, AttributeError):
    """For whoever asks a hook for its name; an `AttributeError`, so that the hook has none."""


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


_WHY = "hookx captures a layer here: compile without fullgraph=True, or after capture.remove()"
# torch 2.6 takes no reason.
_reason = {"reason": _WHY} if "reason" in inspect.signature(torch.compiler.disable).parameters else {}
_call_uncompiled = torch.compiler.disable(_call, **_reason)
# Where a hook runs outside compiled code, torch.compile would compile it, anew for each layer.
torch._dynamo.decorators.skip_code(_Hook.__call__.__code__)  # type: ignore[attr-defined]


def _is_exporting() -> bool:
    # torch 2.6 does not tell; torch.export needs one graph there, and says that a hook interrupts it.
    return hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()


def _frame_of_the_call() -> FrameType:
    """Return the frame of nn.Module in which the hooks of the current call run."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename != _FILE_OF_MODULES and frame.f_back is not None:
        frame = frame.f_back
    return frame


_FILE_OF_MODULES = nn.Module.__call__.__code__.co_filename


def _unhook(hooks: dict[str, list[RemovableHandle]], keep: Iterable[str] = ()) -> None:
    for path in hooks.keys() - set(keep):
        for hook in hooks.pop(path):
            hook.remove()
