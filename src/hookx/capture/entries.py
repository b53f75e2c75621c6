"""Single things that a pass can change, each with a name: what it was, whether it still is, and how to put it back."""

from __future__ import annotations

import array
import functools
import random
import types
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

ATOMS = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size, range, slice)


class Entry(Protocol):
    """One thing that can change."""

    def names(self) -> Iterable[str]: ...

    def changed(self) -> Iterable[str]: ...

    def restore(self, wanted: set[str] | None) -> None: ...


class Namespace:
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


class Whole:
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


class Values:
    """The values of a tensor, in the memory that it had."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name, self._tensor, self._memory = name, tensor, tensor.detach()
        self.nbytes = tensor.nbytes
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
    return isinstance(one, ATOMS) and (one == other or repr(one) == repr(other))


def _has_room(tensor: Tensor) -> bool:
    """Return whether a copy fits beside a tensor; a GPU may be filled by the model alone."""
    return tensor.device.type != "cuda" or torch.cuda.mem_get_info(tensor.device)[0] > 4 * tensor.nbytes + 2**30


def fill_array(values: np.ndarray[Any, Any], saved: np.ndarray[Any, Any]) -> None:
    values[...] = saved


def fill_dict(mapping: dict[Any, Any], saved: list[tuple[Any, Any]]) -> None:
    mapping.clear()
    for key, value in saved:
        mapping[key] = value


def fill_list(sequence: Any, saved: list[Any]) -> None:
    sequence[:] = array.array(sequence.typecode, saved) if isinstance(sequence, array.array) else saved


def fill_again(container: Any, saved: list[Any]) -> None:
    container.clear()
    for value in saved:
        container.add(value) if isinstance(container, set) else container.append(value)


def fill_cell(cell: types.CellType, value: Any) -> None:
    cell.cell_contents = value


# --- random numbers ------------------------------------------------------------------------------------------------


class Generator(Whole):
    """A generator of random numbers."""


def generator_entry(value: Any, name: str) -> Generator | None:
    """Return the entry of a generator of random numbers; None for any other value."""
    if isinstance(value, torch.Generator):
        return Generator(name, value.get_state, functools.partial(_set_state, value))
    if isinstance(value, random.Random):
        return Generator(name, value.getstate, value.setstate)
    if isinstance(value, np.random.RandomState):
        return Generator(name, functools.partial(value.get_state, legacy=False), value.set_state)
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        read, write = functools.partial(getattr, bits, "state"), functools.partial(setattr, bits, "state")
        return Generator(name, read, write)
    return None


def _set_state(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)


def global_generators() -> list[Generator]:
    numpys: Any = functools.partial(np.random.get_state, legacy=False)
    found = [
        Generator("torch's random numbers", torch.get_rng_state, torch.set_rng_state),
        Generator("Python's random numbers", random.getstate, random.setstate),
        Generator("numpy's random numbers", numpys, np.random.set_state),
    ]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            read = functools.partial(torch.cuda.get_rng_state, device)
            write = functools.partial(torch.cuda.set_rng_state, device=device)
            found.append(Generator(f"the random numbers of cuda:{device}", read, write))
    return found
