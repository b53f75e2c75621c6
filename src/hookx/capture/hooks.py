"""PyTorch's forward hooks, on watched modules and on a whole model.

No other file of hookx registers a hook. What a hook returns would replace a layer's input or output, so the hooks here
return None whatever the callbacks do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

# Until all that imports these from here names hookx.capture.tensors.
from hookx.capture.tensors import Parts as Parts
from hookx.capture.tensors import dtype_name as dtype_name
from hookx.capture.tensors import reduce as reduce
from hookx.capture.tensors import tensors_given as tensors_given
from hookx.capture.tensors import tensors_in as tensors_in


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
def tap(modules: Mapping[str, nn.Module], taps: Taps) -> Iterator[None]:
    """Hook some modules for the length of the `with` block."""
    try:
        taps.attach(modules)
        yield
    finally:
        taps.detach()


def watch_passes(model: nn.Module, begin: Callable[[], None], end: Callable[[], None]) -> list[RemovableHandle]:
    """Run `begin` before every call of a model, ahead of its other hooks, and `end` after it, even if it fails."""
    return [
        model.register_forward_pre_hook(lambda *_: begin(), prepend=True),
        model.register_forward_hook(lambda *_: end(), always_call=True),
    ]
