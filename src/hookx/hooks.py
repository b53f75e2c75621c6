"""What passes through a module: hooks, the tensors in what they see, and what may be done to those.

The only file that registers a hook.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hookx.layers import Reduction, TensorInfo

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def module_classes(model: nn.Module) -> dict[str, str]:
    """Return path -> class name of every module, in the order they are registered; the model itself is '.'.

    Example:
        >>> module_classes(nn.Sequential(nn.ReLU()))
        {'.': 'Sequential', '0': 'ReLU'}
    """
    return {path: type(module).__name__ for path, module in modules_of(model).items()}


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    # A module that is registered twice keeps both names.
    return {path or ".": module for path, module in model.named_modules(remove_duplicate=False)}


# --- what passes through a module ----------------------------------------------------------------------------------

Parts = tuple[str, ...]


def tensors_in(value: Any, parts: Parts = ()) -> Iterator[tuple[Parts, Tensor]]:
    """Find the tensors in a layer's output: nested tuples, lists, mappings, named tuples and dataclasses.

    Example:
        >>> [parts for parts, _ in tensors_in({"out": torch.ones(1), "aux": (torch.ones(1), None)})]
        [('out',), ('aux', '0')]
    """
    if isinstance(value, Tensor):
        # The integers of a quantized tensor mean nothing without its scale; dequantizing is exact.
        yield parts, value.dequantize() if value.is_quantized else value
        return
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = zip(value._fields, value, strict=True)
    elif isinstance(value, tuple | list):
        items = enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    for name, item in items:
        yield from tensors_in(item, (*parts, str(name)))


def tensors_given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Parts, Tensor]]:
    """Find the tensors among a call's arguments; a single argument needs no name."""
    arguments: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    with_tensors = {name: value for name, value in arguments.items() if any(True for _ in tensors_in(value))}
    return list(tensors_in(next(iter(with_tensors.values())) if len(with_tensors) == 1 else with_tensors))


def reduce(tensor: Tensor, reduction: Reduction | None) -> Tensor:
    """Apply an address's reduction to an activation whose dimension 0 is the batch.

    Example:
        >>> reduce(torch.ones(8, 512, 7, 7), Reduction.parse("mean23")).shape
        torch.Size([8, 512])
    """
    if reduction is None:
        return tensor
    match reduction.name:
        case "mean":
            return tensor.mean(reduction.dims)
        case "sum":
            return tensor.sum(reduction.dims)
        case "max":
            return tensor.amax(reduction.dims)
        case "min":
            return tensor.amin(reduction.dims)
        case "norm":
            return torch.linalg.vector_norm(tensor, dim=reduction.dims)
        case "cls":
            return tensor[:, 0]
        case "flatten":
            return tensor.flatten(1)
    raise AssertionError(reduction)


def batch_first(tensor: Tensor, info: TensorInfo) -> Tensor:
    """Return a view of a layer's tensor with one row an image."""
    if info.rows_per_image > 1:
        return tensor.unflatten(0, (-1, info.rows_per_image))
    assert info.batch_dim is not None
    return tensor.movedim(info.batch_dim, 0)


def shares_memory(one: Tensor, other: Tensor) -> bool:
    """Say whether writing to one tensor can change the other.

    Example:
        >>> maps = torch.ones(2, 3)
        >>> shares_memory(maps, maps[0]), shares_memory(maps, maps + 1)
        (True, False)
    """
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- hooks ---------------------------------------------------------------------------------------------------------


class Taps:
    """Hooks on some modules of a model.

    `on_enter(path, call, args, kwargs)` runs when a module is called, `on_return(..., output)` when it returns.
    """

    def __init__(
        self,
        on_enter: Callable[[str, int, tuple[Any, ...], dict[str, Any]], None],
        on_return: Callable[[str, int, tuple[Any, ...], dict[str, Any], Any], None],
    ) -> None:
        self.on_enter, self.on_return = on_enter, on_return
        self.calls: dict[str, int] = {}
        self._open_calls: dict[str, list[int]] = {}
        self._hooks: dict[str, list[Any]] = {}

    def attach(self, path: str, module: nn.Module) -> None:
        """Put the hooks on a module, unless they are on it."""
        if path not in self._hooks:
            self.calls[path], self._open_calls[path] = 0, []
            self._hooks[path] = [
                module.register_forward_pre_hook(self._enter(path), with_kwargs=True),
                module.register_forward_hook(self._return(path), with_kwargs=True),
            ]

    def detach(self, path: str) -> None:
        """Take the hooks off a module."""
        for hook in self._hooks.pop(path, ()):
            hook.remove()

    def detach_all(self) -> None:
        for path in list(self._hooks):
            self.detach(path)

    def begin_pass(self) -> None:
        """Number the calls of every module from 0 again."""
        self.calls = dict.fromkeys(self.calls, 0)
        self._open_calls = {path: [] for path in self._open_calls}

    # What a hook returns replaces the layer's input or output, so these return None, whatever the callbacks do.

    def _enter(self, path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = self.calls[path]
            self.calls[path] += 1
            self._open_calls[path].append(call)
            self.on_enter(path, call, args, kwargs)

        return hook

    def _return(self, path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._open_calls[path]:  # Empty only if the hooks came on while the module was running.
                self.on_return(path, self._open_calls[path].pop(), args, kwargs, output)

        return hook


@contextlib.contextmanager
def tapped_while(modules: Mapping[str, nn.Module], taps: Taps) -> Iterator[None]:
    try:
        for path, module in modules.items():
            taps.attach(path, module)
        yield
    finally:
        taps.detach_all()


@contextlib.contextmanager
def _every_submodule_is_called() -> Iterator[None]:
    """Switch off PyTorch's transformer fast path, which computes a whole encoder layer without calling its parts."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def inference(device: torch.device, precision: str) -> Iterator[None]:
    autocast = PRECISIONS[precision]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(_every_submodule_is_called())
        if autocast is not None:
            stack.enter_context(torch.autocast(device.type, autocast))
        yield


class ForwardIsDone(BaseException):
    """Ends a forward pass early. Not an `Exception`, so that no `except Exception` of a model swallows it."""


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
