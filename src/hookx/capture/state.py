"""What a forward pass may change in a model: remembered, named and put back."""

from __future__ import annotations

import array
import dis
import functools
import itertools
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, MutableMapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

_MAX_OBJECTS = 200_000  # to search; what lies beyond them is not remembered
_MAX_GLOBAL_BYTES = 2**26
_ATOMS = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size, range, slice)
_NOT_DATA = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, classmethod, staticmethod, property)
# Classes of other modules of the standard library are machinery: locks, loggers, files, enumerations.
_STANDARD = sys.stdlib_module_names - {"__main__", "argparse", "collections", "types"}
# Whatever hooks a module, hookx's own included, is no state of its passes.
_MACHINERY = set(vars(nn.Module())) - {"training"}


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

    def __init__(self, entries: Iterable[_Entry] = ()) -> None:
        self._entries = list(entries)

    @classmethod
    def of(cls, module: nn.Module, forward: Callable[..., Any] | None = None) -> ModuleState:
        """Remember the state of a model, and of the function that takes a batch through it."""
        search = _Search()
        search.add_module(module, "")
        search.add(forward, "the function that runs the model")
        return cls([*search.entries, *_global_generators()])

    def changed(self) -> list[str]:
        """Return the names of what is not as it was."""
        return list(dict.fromkeys(name for entry in self._entries for name in entry.changed()))

    def restore(self, names: Iterable[str] | None = None) -> None:
        """Put back what these names stand for; by default everything."""
        wanted = None if names is None else set(names)
        with torch.inference_mode():  # A model's tensors may be inference tensors, which only change here.
            for entry in self._entries:
                entry.restore(wanted)

    def generators(self) -> ModuleState:
        """Return the state of the generators of random numbers alone."""
        return ModuleState(entry for entry in self._entries if isinstance(entry, _Generator))

    def narrow(self, names: Iterable[str]) -> ModuleState:
        """Return the state of these names alone, and forget the values of the others."""
        wanted = set(names)
        return ModuleState(entry for entry in self._entries if not wanted.isdisjoint(entry.names()))


class _Entry(Protocol):
    """One thing that can change."""

    def names(self) -> Iterable[str]: ...

    def changed(self) -> Iterable[str]: ...

    def restore(self, wanted: set[str] | None) -> None: ...


class _Namespace:
    """The values of a module, a class or a file, each with a name of its own."""

    def __init__(
        self,
        read: Callable[[], dict[str, Any]],
        name_of: Callable[[str], str],
        put: Callable[[str, Any], None],
        drop: Callable[[str], None],
    ) -> None:
        self._read, self.name_of, self._put, self._drop = read, name_of, put, drop
        self.saved = read()

    def names(self) -> Iterable[str]:
        return map(self.name_of, self.saved.keys() | self._read().keys())

    def changed(self) -> Iterable[str]:
        return [self.name_of(key) for key in self._changed_keys()]

    def restore(self, wanted: set[str] | None) -> None:
        for key in self._changed_keys():
            if wanted is None or self.name_of(key) in wanted:
                if key in self.saved:
                    self._put(key, self.saved[key])
                else:
                    self._drop(key)

    def _changed_keys(self) -> list[str]:
        now = self._read()
        return [
            key
            for key in dict.fromkeys([*self.saved, *now])
            if key not in now or key not in self.saved or not _is_same(now[key], self.saved[key])
        ]


class _Whole:
    """What is read and written as a whole, under one name: the content of a container, a closed-over variable."""

    def __init__(self, name: str, read: Callable[[], Any], write: Callable[[Any], None]) -> None:
        self.name, self._read, self._write = name, read, write
        self.saved = read()

    def names(self) -> Iterable[str]:
        return (self.name,)

    def changed(self) -> Iterable[str]:
        return () if _is_same(self._read(), self.saved) else (self.name,)

    def restore(self, wanted: set[str] | None) -> None:
        if (wanted is None or self.name in wanted) and self.changed():
            self._write(self.saved)


class _Values:
    """The values of a tensor, in the memory that it had."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name, self._tensor, self._memory = name, tensor, tensor.detach()
        self._kept = self._memory.clone() if _has_room(tensor) else self._memory.to("cpu", copy=True)

    def names(self) -> Iterable[str]:
        return (self.name,)

    def changed(self) -> Iterable[str]:
        return () if not self._has_moved() and self._has_same_values() else (self.name,)

    def restore(self, wanted: set[str] | None) -> None:
        if wanted is not None and self.name not in wanted:
            return
        if self._has_moved():
            self._tensor.data = self._memory
        if not self._has_same_values():
            self._memory.copy_(self._kept)

    def _has_moved(self) -> bool:
        now, then = self._tensor, self._memory
        return (
            now.data_ptr() != then.data_ptr()
            or now.shape != then.shape
            or now.stride() != then.stride()
            or now.dtype != then.dtype
        )

    def _has_same_values(self) -> bool:
        kept = self._kept.to(self._memory.device)
        if torch.equal(self._memory, kept):
            return True
        return bool(((self._memory == kept) | ((self._memory != self._memory) & (kept != kept))).all())


class _Search:
    """Walks from modules through all that they hold, and makes entries."""

    def __init__(self) -> None:
        self.entries: list[_Entry] = []
        self._in_globals = False
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
            for hooks in ("_forward_pre_hooks", "_forward_hooks"):
                for hook in module.__dict__.get(hooks, {}).values():
                    self.add(hook, f"a hook of '{path or '.'}'")
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
        if isinstance(value, _ATOMS) or (self._in_globals and _is_large(value)) or not self._is_new(value):
            return
        if isinstance(value, Tensor):
            self._add_tensor(value, name)
        elif isinstance(value, np.ndarray):
            self.entries.append(_Whole(name, value.copy, functools.partial(_fill_array, value)))
        elif (generator := _generator(value, name)) is not None:
            self.entries.append(generator)
        elif isinstance(value, dict):
            self.entries.append(_Whole(name, lambda: list(value.items()), functools.partial(_fill_dict, value)))
            self._add_all([*value.values()], name)
            self._add_attributes(value, name)
        elif isinstance(value, list | bytearray | array.array):
            self.entries.append(_Whole(name, lambda: list(value), functools.partial(_fill_list, value)))
            self._add_all(value if isinstance(value, list) else (), name)
            self._add_attributes(value, name)
        elif isinstance(value, deque | set):
            self.entries.append(_Whole(name, lambda: list(value), functools.partial(_fill_again, value)))
            self._add_all(list(value), name)
            self._add_attributes(value, name)
        elif isinstance(value, tuple | frozenset):
            self._add_all(value, name)
        else:
            self._add_object(value, name)

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

        self._add_namespace(_Namespace(read, name_of, held.__setitem__, held.__delitem__), search=search)

    def _add_namespace(self, namespace: _Namespace, *, search: bool = True) -> None:
        self.entries.append(namespace)
        if search:
            for key, value in namespace.saved.items():
                self.add(value, namespace.name_of(key))

    def _add_tensor(self, tensor: Tensor, name: str) -> None:
        if tensor.device.type == "meta":
            return
        try:
            self.entries.append(_Values(name, tensor))
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
                    self.entries.append(_Whole(name, read, write))
                    self.add(getattr(value, slot), name)
            for base in type(value).__mro__:
                self._add_class(base)

    def _add_attributes(self, value: Any, name: str) -> None:
        if isinstance(held := getattr(value, "__dict__", None), dict):
            self.add(held, name)

    def _add_function(self, function: types.FunctionType, name: str) -> None:
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
            read, write = functools.partial(getattr, cell, "cell_contents"), functools.partial(_fill_cell, cell)
            self.entries.append(_Whole(called, read, write))
            self.add(cell.cell_contents, called)

    def _add_class(self, of: type) -> None:
        if _is_machinery(of) or not self._is_new(of):
            return

        self._add_namespace(_namespace_of(of, "class attribute", of.__name__, lambda _key: True))
        for function in _functions_of(of):
            self.add(function, f"a default argument of {function.__qualname__}")
        self._add_file(sys.modules.get(of.__module__))

    def _add_file(self, file: types.ModuleType | None) -> None:
        """Add the globals of a user's own file; an installed package has registries, which are no state of passes."""
        path = getattr(file, "__file__", None)
        if file is None or not path or not self._is_new(file):
            return
        if "site-packages" in path or "dist-packages" in path or file.__name__.partition(".")[0] == "hookx":
            return

        functions, classes = [], []
        for value in list(vars(file).values()):
            if getattr(value, "__module__", None) == file.__name__:
                functions += [value] if isinstance(value, types.FunctionType) else []
                classes += [value] if isinstance(value, type) else []
        for of in classes:
            self._add_class(of)
        self._in_globals = True
        for key, value in list(vars(file).items()):
            if _is_data(key, value):
                self.add(value, f"global '{Path(path).stem}.{key}'")
        for function in functions:
            self.add(function, f"a default argument of {function.__name__}")
        functions += itertools.chain.from_iterable(map(_functions_of, classes))
        assigned = {name for function in functions for name in _assigned_globals(function.__code__)}
        self._add_namespace(_namespace_of(file, "global", Path(path).stem, assigned.__contains__))
        self._in_globals = False

    def _add_script_module(self, module: torch.jit.ScriptModule, dot: str) -> None:
        """Add what compiled TorchScript shows of itself: tensors, and attributes that are numbers or texts."""
        for held, kind in ((module._parameters, "parameter"), (module._buffers, "buffer")):
            for key, tensor in held.items():
                if tensor is not None:
                    self.add(tensor, _name(kind, dot, key))
        attributes = getattr(getattr(module, "_concrete_type", None), "get_attributes", dict)()
        for key in attributes:
            value = getattr(module, key, None)
            if isinstance(value, int | float | str):
                read, write = functools.partial(getattr, module, key), functools.partial(setattr, module, key)
                self.entries.append(_Whole(_name("attribute", dot, key), read, write))


def _namespace_of(holder: Any, kind: str, prefix: str, counts: Callable[[str], bool]) -> _Namespace:
    """Return the namespace of the data of a class or a file, or of some of them."""

    def read() -> dict[str, Any]:
        return {key: value for key, value in vars(holder).items() if counts(key) and _is_data(key, value)}

    name_of = functools.partial(_name, kind, f"{prefix}.")
    return _Namespace(read, name_of, functools.partial(setattr, holder), functools.partial(delattr, holder))


def _functions_of(of: type) -> list[types.FunctionType]:
    values = [
        function
        for value in vars(of).values()
        for function in (value, getattr(value, "__func__", None), getattr(value, "fget", None))
    ]
    return [function for function in values if isinstance(function, types.FunctionType)]


def _name(kind: str, dot: str, key: str) -> str:
    return f"{kind} '{dot}{key}'"


def _is_same(one: Any, other: Any) -> bool:
    """Return whether two values are the same object, or equal numbers or texts, or such in lists and tuples."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple) and len(one) > 600 // 2 and isinstance(one[0], int):  # the state of a generator
        return bool(one == other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if isinstance(one, np.ndarray):
        return one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, Tensor):  # the state of a generator; those of a model are compared by identity
        return one.dtype == torch.uint8 and one.ndim == 1 and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_is_same(one[key], other[key]) for key in one)
    return isinstance(one, _ATOMS) and (one == other or repr(one) == repr(other))


def _is_data(key: str, value: Any) -> bool:
    return not (key.startswith("__") or key == "_abc_impl" or isinstance(value, _NOT_DATA) or hasattr(value, "__get__"))


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


def _has_room(tensor: Tensor) -> bool:
    """Return whether a copy fits beside a tensor; a GPU may be filled by the model alone."""
    return tensor.device.type != "cuda" or torch.cuda.mem_get_info(tensor.device)[0] > 4 * tensor.nbytes + 2**30


def _fill_array(values: np.ndarray[Any, Any], saved: np.ndarray[Any, Any]) -> None:
    values[...] = saved


def _fill_dict(mapping: dict[Any, Any], saved: list[tuple[Any, Any]]) -> None:
    mapping.clear()
    for key, value in saved:
        mapping[key] = value


def _fill_list(sequence: Any, saved: list[Any]) -> None:
    sequence[:] = array.array(sequence.typecode, saved) if isinstance(sequence, array.array) else saved


def _fill_again(container: Any, saved: list[Any]) -> None:
    container.clear()
    for value in saved:
        container.add(value) if isinstance(container, set) else container.append(value)


def _fill_cell(cell: types.CellType, value: Any) -> None:
    cell.cell_contents = value


# --- random numbers ------------------------------------------------------------------------------------------------


class _Generator(_Whole):
    """A generator of random numbers."""


def _generator(value: Any, name: str) -> _Generator | None:
    """Return the entry of a generator of random numbers; None for any other value."""
    if isinstance(value, torch.Generator):
        return _Generator(name, value.get_state, functools.partial(_set_state, value))
    if isinstance(value, random.Random):
        return _Generator(name, value.getstate, value.setstate)
    if isinstance(value, np.random.RandomState):
        return _Generator(name, functools.partial(value.get_state, legacy=False), value.set_state)
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        read, write = functools.partial(getattr, bits, "state"), functools.partial(setattr, bits, "state")
        return _Generator(name, read, write)
    return None


def _set_state(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)


def _global_generators() -> list[_Generator]:
    numpys: Any = functools.partial(np.random.get_state, legacy=False)
    found = [
        _Generator("torch's random numbers", torch.get_rng_state, torch.set_rng_state),
        _Generator("Python's random numbers", random.getstate, random.setstate),
        _Generator("numpy's random numbers", numpys, np.random.set_state),
    ]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            read = functools.partial(torch.cuda.get_rng_state, device)
            write = functools.partial(torch.cuda.set_rng_state, device=device)
            found.append(_Generator(f"the random numbers of cuda:{device}", read, write))
    return found
