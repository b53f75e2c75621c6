"""Find the tensors in a module's output or arguments, bring their batch dimension to the front, and reduce them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hookx.layers.address import Reduction
from hookx.layers.tree import TensorInfo

Parts = tuple[str, ...]


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
    """Return a view of a layer's tensor with one row per image."""
    if info.rows_per_image > 1:
        return tensor.unflatten(0, (-1, info.rows_per_image))
    assert info.batch_dim is not None
    return tensor.movedim(info.batch_dim, 0)


def shares_memory(one: Tensor, other: Tensor) -> bool:
    """Return whether writing to one tensor can change the other.

    Example:
        >>> maps = torch.ones(2, 3)
        >>> shares_memory(maps, maps[0]), shares_memory(maps, maps + 1)
        (True, False)
    """
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
