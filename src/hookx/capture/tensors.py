"""The tensors in what a module returns or is given: each by the path that names it, or the reason why it is not taken.

An output may be any Python object. Tuples, lists, mappings, named tuples, dataclasses and other objects are searched.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import enum
import functools
import io
import logging
import re
import sys
import types
from collections import Counter
from collections.abc import (
    ItemsView,
    Iterator,
    KeysView,
    Mapping,
    MappingView,
    MutableMapping,
    MutableSequence,
    Sequence,
    ValuesView,
)
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor, nn

Parts = tuple[str, ...]  # the path to a tensor within a module's output or arguments

# Bound what an output can cost: its structure may never end, and a list in a list in a list grows exponentially.
_MAX_DEPTH, _MAX_OBJECTS = 50, 10_000

# torch stores these types and hardly computes with them; the type on the right holds the same values.
_COMPUTABLE = {
    **{
        getattr(torch, name): torch.float32
        for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
        if hasattr(torch, name)  # Not every torch from 2.6 has all of them.
    },
    torch.uint16: torch.int32,
    torch.uint32: torch.int64,
    torch.complex32: torch.complex64,
}
_PACKED_DTYPES = re.compile(r"u?int[1-7]|bits\w+|float4\w+")  # torch cannot even copy most of these

# What is not searched. A module's parameters are not activations; the rest leads into the whole program, or nowhere.
_LEAVES = (
    *(type(None), bool, int, float, complex, str, bytes, bytearray, memoryview, range, slice, type, enum.Enum),
    *(types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial),
    *(BaseException, io.IOBase, logging.Filterer, logging.Manager),
    *(nn.Module, torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Generator),
)


@dataclasses.dataclass(frozen=True)
class Unusable:
    """Something in an output that holds values, and that hookx cannot take; `reason` says what it is."""

    reason: str


class _TooMuchError(Exception):
    pass


def look_into(value: Any) -> Iterator[tuple[Parts, Tensor | Unusable]]:
    """Yield every tensor in an output, and whatever may hold others that cannot be taken, with its path.

    A key that is not a string is named by its text. Keys of one mapping that have the same text are named with their
    types, so that no two parts have the same path.

    Example:
        >>> [(parts, found.reason) for parts, found in look_into({"out": {torch.ones(1)}})]
        [(('out',), 'it is a set, which has no order: return a list or a dict')]
    """
    try:
        yield from _Search().into(value, ())
    except _TooMuchError:
        yield (), Unusable(f"it holds more than {_MAX_OBJECTS:,} objects")


def tensors_in(value: Any) -> Iterator[tuple[Parts, Tensor]]:
    """Yield the tensors in nested tuples, lists, mappings, dataclasses and other objects, with their path.

    Example:
        >>> [parts for parts, _ in tensors_in({"out": torch.ones(1), "aux": (torch.ones(1), None)})]
        [('out',), ('aux', '0')]
        >>> [parts for parts, _ in tensors_in({0: torch.ones(1), "0": torch.ones(1)})]
        [('int=0',), ('str=0',)]
    """
    return ((parts, found) for parts, found in look_into(value) if isinstance(found, Tensor))


def look_into_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Parts, Tensor | Unusable]]:
    """Return what `look_into` finds in a call's arguments; a lone argument with tensors needs no name."""
    arguments: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    found = list(look_into(arguments))
    with_tensors = {parts[:1] for parts, one in found if isinstance(one, Tensor)}
    if len(with_tensors) > 1 or not found:
        return found
    [lone] = with_tensors or {parts[:1] for parts, _ in found[:1]}
    return [(parts[1:] if parts[:1] == lone else parts, one) for parts, one in found]


def tensors_given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Parts, Tensor]]:
    """Return the tensors among a call's arguments; a lone argument with tensors needs no name."""
    return [(parts, found) for parts, found in look_into_arguments(args, kwargs) if isinstance(found, Tensor)]


def replace_tensors(value: Any, replacements: Mapping[int, Tensor], _above: tuple[int, ...] = ()) -> Any:
    """Return an output with tensors replaced by id, in copies of the containers around them; else the same object.

    Containers that cannot be copied or changed keep what they hold.
    """
    if isinstance(value, Tensor):
        return replacements.get(id(value), value)
    if isinstance(value, _LEAVES) or id(value) in _above or len(_above) >= _MAX_DEPTH:
        return value
    above = (*_above, id(value))
    try:
        items = _items_of(value)
        if isinstance(items, str):
            return value
        changed = {key: new for key, item in items if (new := replace_tensors(item, replacements, above)) is not item}
        if not changed:
            return value
        if isinstance(value, tuple):
            replaced = [replace_tensors(item, replacements, above) for item in value]
            return type(value)(*replaced) if hasattr(value, "_fields") else type(value)(replaced)
        copied = copy.copy(value)
        for name, new in changed.items():
            if isinstance(value, MutableMapping | MutableSequence) and not isinstance(name, _Attribute):
                copied[name] = new
            else:
                object.__setattr__(copied, name, new)  # A dataclass may be frozen.
        # Mappings that offer their items as attributes, too.
        for name, one in list(getattr(copied, "__dict__", {}).items()):
            if isinstance(one, Tensor) and id(one) in replacements:
                object.__setattr__(copied, name, replacements[id(one)])
        return copied
    except Exception:  # The code of a stranger's class can raise anything.
        return value


def computable(tensor: Tensor) -> Tensor:
    """Return the same values in a type that torch computes with: float8 becomes float32, uint16 becomes int32."""
    wider = _COMPUTABLE.get(tensor.dtype)
    return tensor if wider is None else tensor.to(wider)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Attribute(str):
    """The name of an attribute that a mapping or a sequence has beside its items."""


class _Search:
    """One walk through an output, within a budget."""

    def __init__(self) -> None:
        self._objects = 0
        self._above: set[int] = set()  # ids of the containers around the current one, each entered once

    def into(self, value: Any, parts: Parts) -> Iterator[tuple[Parts, Tensor | Unusable]]:
        if isinstance(value, _LEAVES) or id(value) in self._above:
            return
        self._objects += 1
        if self._objects > _MAX_OBJECTS:
            raise _TooMuchError
        if isinstance(value, Tensor):
            yield parts, _take(value)
            return
        if len(parts) >= _MAX_DEPTH:
            yield parts, Unusable(f"it is nested more than {_MAX_DEPTH} levels deep")
            return
        self._above.add(id(value))
        try:
            if isinstance(value, AbstractSet) and not isinstance(value, MappingView):
                if any(True for item in value for _ in self.into(item, parts)):
                    yield (
                        parts,
                        Unusable(f"it is a {type(value).__name__}, which has no order: return a list or a dict"),
                    )
                return
            try:
                items = _items_of(value)
            except Exception as error:  # The code of a stranger's class can raise anything.
                yield parts, Unusable(f"its items cannot be read: {type(error).__name__}: {error}")
                return
            if isinstance(items, str):
                yield parts, Unusable(items)
                return
            for name, (_, item) in zip(_names_of([key for key, _ in items]), items, strict=True):
                yield from self.into(item, (*parts, name))
        finally:
            self._above.discard(id(value))


def _take(tensor: Tensor) -> Tensor | Unusable:
    """Return a tensor as its plain values, or why that is not possible."""
    if tensor.is_nested:
        return Unusable("it is a nested tensor, whose images differ in shape: pad it in the model")
    if tensor.layout != torch.strided:
        layout = str(tensor.layout).removeprefix("torch.").removeprefix("_")
        return Unusable(f"it is not a dense tensor ({layout}): use .to_dense() in the model")
    if _PACKED_DTYPES.fullmatch(dtype_name(tensor.dtype)):
        return Unusable(f"it is {dtype_name(tensor.dtype)}, which torch cannot convert")
    if tensor.is_quantized:
        # A quantized tensor's integers mean nothing without its scale; dequantizing is exact.
        return tensor.dequantize()
    if type(tensor) in (Tensor, nn.Parameter):
        return tensor
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return Unusable(f"it is a {type(tensor).__name__}, which keeps its values in other tensors")
    return tensor.as_subclass(Tensor)


def _items_of(value: Any) -> list[tuple[Any, Any]] | str:
    """Return what an object holds, by key, position or name; or why that cannot be told."""
    if isinstance(value, Iterator):
        return f"it is a {type(value).__name__}, which reading would use up: return a list"
    attributes = _attributes_of(value)
    items: list[tuple[Any, Any]]
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = list(zip(value._fields, value, strict=True))
    elif isinstance(value, Sequence | ValuesView | KeysView | ItemsView):
        items = list(enumerate(value))
    else:
        if dataclasses.is_dataclass(value):  # Its fields first, in their order; a field may be a property.
            names = [field.name for field in dataclasses.fields(value)]
            attributes = {name: getattr(value, name) for name in names if hasattr(value, name)} | (attributes or {})
        if attributes is None and not _is_plain(value):
            kind = f"{_package_of(value)}.{type(value).__name__}"
            return f"it is a {kind}, not a tensor, and hookx cannot look into it"
        return list((attributes or {}).items())
    # Many mappings and named tuples offer their items as attributes too, and keep them in a container of their own.
    known = {id(item) for _, item in items}
    more = {name: one for name, one in (attributes or {}).items() if isinstance(one, Tensor) and id(one) not in known}
    return [*items, *((_Attribute(name), one) for name, one in more.items())]


def _attributes_of(value: Any) -> dict[str, Any] | None:
    """Return what an object stores under names, without running its code; None if it has no place for names."""
    kind: Any = type(value)  # mypy takes a class for one that cannot be hashed.
    slots = _slots_of(kind)
    found = {}
    for name, slot in slots.items():
        with contextlib.suppress(AttributeError):  # It has no value.
            found[name] = slot.__get__(value)
    try:
        stored = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return found if slots else None
    for name, one in stored.items():
        # A property that is computed at its first use is stored from then on, or never.
        of_class = getattr(kind, name, None)
        if not hasattr(of_class, "__get__") or hasattr(of_class, "__set__"):
            found[name] = one
    return found


@functools.cache
def _slots_of(kind: type) -> dict[str, types.MemberDescriptorType]:
    members = {name: member for above in reversed(kind.__mro__) for name, member in vars(above).items()}
    return {
        name: member
        for name, member in members.items()
        if isinstance(member, types.MemberDescriptorType) and name not in ("__dict__", "__weakref__")
    }


def _is_plain(value: Any) -> bool:
    """Return whether an object without attributes is one of Python's own, or a number of numpy's."""
    package = _package_of(value)
    return package in sys.stdlib_module_names or (package == "numpy" and type(value).__name__ != "ndarray")


def _package_of(value: Any) -> str:
    return type(value).__module__.partition(".")[0]


def _names_of(keys: Sequence[Any]) -> list[str]:
    """Name the keys of one container: by their texts, and with their types where two have the same text."""
    names = [key if type(key) is str else _text_of(key) for key in keys]
    repeated = _repeated(names)
    kinds = ["attribute" if isinstance(key, _Attribute) else type(key).__name__ for key in keys]
    names = [f"{kind}={name}" if name in repeated else name for kind, name in zip(kinds, names, strict=True)]
    while repeated := _repeated(names):  # Two of a type, or one whose text is that of another with its type.
        names = [f"{name}#{place}" if name in repeated else name for place, name in enumerate(names)]
    return names


def _repeated(names: Sequence[str]) -> set[str]:
    if len(set(names)) == len(names):
        return set()
    return {name for name, count in Counter(names).items() if count > 1}


def _text_of(key: Any) -> str:
    if all(getattr(type(key), name) is getattr(object, name) for name in ("__repr__", "__str__")):
        return type(key).__name__  # Its text would be an address in memory, another one in every process.
    return str(key)
