"""Find the tensors in a module's output or arguments, and reduce them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hookx.layers.address import Reduction

Parts = tuple[str, ...]

_OVER_DIMS = {
    "mean": torch.mean,
    "sum": torch.sum,
    "max": torch.amax,
    "min": torch.amin,
    "norm": torch.linalg.vector_norm,
}


def tensors_in(value: Any, parts: Parts = ()) -> Iterator[tuple[Parts, Tensor]]:
    """Yield the tensors in nested tuples, lists, mappings, named tuples and dataclasses, with their path.

    Example:
        >>> [parts for parts, _ in tensors_in({"out": torch.ones(1), "aux": (torch.ones(1), None)})]
        [('out',), ('aux', '0')]
    """
    if isinstance(value, Tensor):
        # A quantized tensor's integers mean nothing without its scale; dequantizing is exact.
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
    """Return the tensors among a call's arguments; a lone argument with tensors needs no name."""
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
    if reduction.name == "cls":
        return tensor[:, 0]
    if reduction.name == "flatten":
        return tensor.flatten(1)
    return _OVER_DIMS[reduction.name](tensor, dim=reduction.dims)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
