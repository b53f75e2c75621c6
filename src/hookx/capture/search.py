"""The search for what a pass can change: from a model's modules through all that they hold."""

from __future__ import annotations

import array
import contextlib
import dis
import functools
import itertools
import sys
import types
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hookx.capture import entries
from hookx.capture.entries import ATOMS, Entry, Namespace, Values, Whole

_MAX_OBJECTS = 200_000  # to search; what lies beyond them is not remembered
_MAX_GLOBAL_BYTES = 2**26
_NOT_DATA = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, classmethod, staticmethod, property)
# Classes of other modules of the standard library are machinery: locks, loggers, files, enumerations.
_STANDARD = sys.stdlib_module_names - {"__main__", "argparse", "collections", "types"}
# Hooks on a module, hookx's own included, are not state of its passes.
_MACHINERY = set(vars(nn.Module())) - {"training"}


class Search:
    """Walks from modules through all that they hold, and makes entries."""

    def __init__(self) -> None:
        self.inside: list[Entry] = []  # the model: its modules, what they hold, and their classes
        self.outside: list[Entry] = []  # files, and variables and arguments of functions
        self._is_outside = self._in_globals = False
        self._seen: dict[int, Any] = {}  # also keeps the objects alive, so that an id names one object

    def add_module(self, module: nn.Module, path: str) -> None:
        if not self._is_new(module):
            return
        dot = path and f"{path}."
        if isinstance(module, torch.jit.ScriptModule):
            self._add_script_module(module, dot)
        else:
            self._add_mapping(module._modules, functools.partial(_name, "module", dot), search=False)
            self._add_mapping(module._parameters, functools.partial(_name, "parameter", dot))
            self._add_mapping(module._buffers, functools.partial(_name, "buffer", dot))
            self._add_mapping(module.__dict__, functools.partial(_name, "attribute", dot), without=_MACHINERY)
        for name, child in module._modules.items():
            if child is not None:
                self.add_module(child, f"{dot}{name}")
        for base in type(module).__mro__:
            self._add_class(base)

    def add(self, value: Any, name: str) -> None:
        """Remember a value and what it holds."""
        if isinstance(value, nn.Module):
            if not self._in_globals:  # There it is another model.
                self.add_module(value, name.partition("'")[2].rstrip("'") or name)
            return
        if isinstance(value, ATOMS) or (self._in_globals and _is_large(value)) or not self._is_new(value):
            return
        if isinstance(value, Tensor):
            self._add_tensor(value, name)
        elif isinstance(value, np.ndarray):
            self._put(Whole(name, value.copy, functools.partial(entries.fill_array, value)))
        elif (generator := entries.generator_entry(value, name)) is not None:
            self._put(generator)
        elif isinstance(value, dict):
            self._put(Whole(name, lambda: list(value.items()), functools.partial(entries.fill_dict, value)))
            self._add_all([*value.values()], name)
            self._add_attributes(value, name)
        elif isinstance(value, list | bytearray | array.array):
            self._put(Whole(name, lambda: list(value), functools.partial(entries.fill_list, value)))
            self._add_all(value if isinstance(value, list) else (), name)
            self._add_attributes(value, name)
        elif isinstance(value, deque | set):
            self._put(Whole(name, lambda: list(value), functools.partial(entries.fill_again, value)))
            self._add_all(list(value), name)
            self._add_attributes(value, name)
        elif isinstance(value, tuple | frozenset):
            self._add_all(value, name)
        else:
            self._add_object(value, name)

    def _put(self, entry: Entry) -> None:
        (self.outside if self._is_outside else self.inside).append(entry)

    @contextlib.contextmanager
    def _go_outside(self) -> Iterator[None]:
        before, self._is_outside = self._is_outside, True
        try:
            yield
        finally:
            self._is_outside = before

    def _is_new(self, value: Any) -> bool:
        is_new = id(value) not in self._seen and len(self._seen) < _MAX_OBJECTS
        if is_new:
            self._seen[id(value)] = value
        return is_new

    def _add_all(self, values: Iterable[Any], name: str) -> None:
        for value in values:
            self.add(value, name)

    def _add_mapping(
        self,
        held: MutableMapping[str, Any],
        name_of: Callable[[str], str],
        *,
        without: Collection[str] = (),
        search: bool = True,
    ) -> None:
        def read() -> dict[str, Any]:
            return {key: value for key, value in held.items() if key not in without}

        self._add_namespace(Namespace(read, name_of, held.__setitem__, held.__delitem__), search=search)

    def _add_namespace(self, namespace: Namespace, *, search: bool = True) -> None:
        self._put(namespace)
        if search:
            for key, value in namespace.saved.items():
                self.add(value, namespace.name_of(key))

    def _add_tensor(self, tensor: Tensor, name: str) -> None:
        if tensor.device.type == "meta":
            return
        try:
            self._put(Values(name, tensor))
        except (RuntimeError, NotImplementedError):  # A layout or a subclass that cannot be cloned: sparse, lazy.
            return
        self._add_all(vars(tensor).values(), name)

    def _add_object(self, value: Any, name: str) -> None:
        if isinstance(value, types.MethodType):
            self.add(value.__self__, name)
            self.add(value.__func__, name)
        elif isinstance(value, types.FunctionType):
            self._add_function(value, name)
        elif isinstance(value, functools.partial):
            self._add_all((value.func, value.args, value.keywords), name)
        elif isinstance(value, _NOT_DATA) or _is_machinery(type(value)):
            return
        else:
            self._add_attributes(value, name)
            for slot in itertools.chain.from_iterable(_slots(base) for base in type(value).__mro__):
                if hasattr(value, slot):
                    read, write = functools.partial(getattr, value, slot), functools.partial(setattr, value, slot)
                    self._put(Whole(name, read, write))
                    self.add(getattr(value, slot), name)
            for base in type(value).__mro__:
                self._add_class(base)

    def _add_attributes(self, value: Any, name: str) -> None:
        if isinstance(held := getattr(value, "__dict__", None), dict):
            self.add(held, name)

    def _add_function(self, function: types.FunctionType, name: str) -> None:
        with self._go_outside():
            self.add(function.__dict__, name)
            self._add_all(function.__defaults__ or (), name)
            self._add_all((function.__kwdefaults__ or {}).values(), name)
            for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
                if variable == "__class__" or not self._is_new(cell):
                    continue
                try:
                    cell.cell_contents  # noqa: B018
                except ValueError:  # not assigned yet
                    continue
                called = f"variable '{variable}' of {function.__qualname__}"
                read = functools.partial(getattr, cell, "cell_contents")
                self._put(Whole(called, read, functools.partial(entries.fill_cell, cell)))
                self.add(cell.cell_contents, called)

    def _add_class(self, of: type) -> None:
        if _is_machinery(of) or not self._is_new(of):
            return

        self._add_namespace(_namespace_of(of, "class attribute", of.__name__, lambda _key: True))
        file = sys.modules.get(of.__module__)
        if file is not None and _is_own_code(file):
            for function in _functions_of(of):
                self.add(function, f"a default argument of {function.__qualname__}")
            self._add_file(file)

    def _add_file(self, file: types.ModuleType) -> None:
        """Add the globals of a user's own file."""
        if not self._is_new(file):
            return
        stem = Path(str(file.__file__)).stem
        functions, classes = [], []
        for value in list(vars(file).values()):
            if getattr(value, "__module__", None) == file.__name__:
                functions += [value] if isinstance(value, types.FunctionType) else []
                classes += [value] if isinstance(value, type) else []
        for of in classes:
            self._add_class(of)
        self._in_globals = True
        with self._go_outside():
            for key, value in list(vars(file).items()):
                if _is_data(key, value):
                    self.add(value, f"global '{stem}.{key}'")
            for function in functions:
                self.add(function, f"a default argument of {function.__name__}")
            functions += itertools.chain.from_iterable(map(_functions_of, classes))
            assigned = {name for function in functions for name in _assigned_globals(function.__code__)}
            self._add_namespace(_namespace_of(file, "global", stem, assigned.__contains__))
        self._in_globals = False

    def _add_script_module(self, module: torch.jit.ScriptModule, dot: str) -> None:
        """Add what compiled TorchScript shows of itself: tensors, and attributes that are numbers or texts."""
        for held, kind in ((module._parameters, "parameter"), (module._buffers, "buffer")):
            for key, tensor in held.items():
                if tensor is not None:
                    self.add(tensor, _name(kind, dot, key))
        attributes: Iterable[str] = getattr(getattr(module, "_concrete_type", None), "get_attributes", dict)()
        for key in attributes:
            value = getattr(module, key, None)
            if isinstance(value, int | float | str):
                read, write = functools.partial(getattr, module, key), functools.partial(setattr, module, key)
                self._put(Whole(_name("attribute", dot, key), read, write))


def _namespace_of(holder: Any, kind: str, prefix: str, counts: Callable[[str], bool]) -> Namespace:
    """Return the namespace of the data of a class or a file, or of some of them."""

    def read() -> dict[str, Any]:
        return {key: value for key, value in vars(holder).items() if counts(key) and _is_data(key, value)}

    name_of = functools.partial(_name, kind, f"{prefix}.")
    return Namespace(read, name_of, functools.partial(setattr, holder), functools.partial(delattr, holder))


def _functions_of(of: type) -> list[types.FunctionType]:
    values = [
        function
        for value in vars(of).values()
        for function in (value, getattr(value, "__func__", None), getattr(value, "fget", None))
    ]
    return [function for function in values if isinstance(function, types.FunctionType)]


def _name(kind: str, dot: str, key: str) -> str:
    return f"{kind} '{dot}{key}'"


def _is_data(key: str, value: Any) -> bool:
    return not (key.startswith("__") or key == "_abc_impl" or isinstance(value, _NOT_DATA) or hasattr(value, "__get__"))


def _is_own_code(file: types.ModuleType) -> bool:
    """Return whether a file is a user's own. What an installed package registers is not state of passes."""
    path = getattr(file, "__file__", None)
    is_installed = not path or "site-packages" in path or "dist-packages" in path
    return not is_installed and file.__name__.partition(".")[0] != "hookx"


def _is_large(value: Any) -> bool:
    """Return whether a global is rather a data set than what a pass remembers."""
    return getattr(value, "nbytes", 0) > _MAX_GLOBAL_BYTES


def _assigned_globals(code: types.CodeType) -> Iterator[str]:
    """Yield the globals that a function, or one within it, assigns."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _assigned_globals(constant)


def _is_machinery(of: type) -> bool:
    """Return whether a class is Python's or PyTorch's, so that neither it nor its instances hold a model's state."""
    top = of.__module__.partition(".")[0]
    if top == "torch":
        return not of.__module__.startswith("torch.distributions")
    return top in _STANDARD or top in ("numpy", "pytest", "_pytest", "typing_extensions")


def _slots(of: type) -> Iterator[str]:
    slots = vars(of).get("__slots__", ())
    for slot in (slots,) if isinstance(slots, str) else slots:
        if slot not in ("__dict__", "__weakref__"):
            yield f"_{of.__name__.lstrip('_')}{slot}" if slot.startswith("__") and not slot.endswith("__") else slot
