"""Pickles -> tensors and inert stand-ins. Nothing that a file names runs, but PyTorch's own functions for tensors."""

from __future__ import annotations

import pickle
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor

_MAX_DEPTH = 60  # of objects within objects, in a search for tensors

# No honest checkpoint names these. A file that does is refused as a whole, even though nothing would run.
_HOSTILE_MODULES = frozenset(
    "os posix nt sys subprocess shutil socket pty ctypes importlib runpy webbrowser code pdb signal".split()
)
_HOSTILE_BUILTINS = frozenset(("eval", "exec", "compile", "open", "__import__", "breakpoint", "input"))


class HostileError(pickle.UnpicklingError):
    """A file names a function that no checkpoint needs; the text is its name."""


class StandIn:
    """What stands in place of an object or a class that a file names: it takes whatever the file does to it."""

    def __init__(self, name: str, arguments: tuple[Any, ...] = ()) -> None:
        self.name = name
        self.arguments = arguments
        self.state: Any = None
        self.items: list[Any] = []
        self.entries: list[tuple[Any, Any]] = []

    def attribute(self, name: str) -> Any:
        """Return an attribute that the file gives the object; None without it."""
        return self.state.get(name) if isinstance(self.state, dict) else None


def holds_tensors(value: Any) -> bool:
    """Return whether a value is a stand-in that holds tensors, as that of a pickled module does."""
    return isinstance(value, StandIn) and _holds_tensors(value, _MAX_DEPTH, set())


def _holds_tensors(value: Any, depth: int, seen: set[int]) -> bool:
    if isinstance(value, Tensor | torch.UntypedStorage | torch.TypedStorage):
        return True
    if depth == 0 or id(value) in seen:
        return False
    seen.add(id(value))
    return any(_holds_tensors(one, depth - 1, seen) for one in _parts(value))


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, StandIn):
        yield from (value.arguments, value.state, value.items, value.entries)
    elif isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, list | tuple | set):
        yield from value


def _empty_dict(*_: Any) -> dict[Any, Any]:
    return {}


def _tensor_functions() -> dict[str, Callable[..., Any]]:
    """Return the functions that torch.save names in the place of tensors; `weights_only` calls them, too."""
    utils: Any = torch._utils
    names = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter", "_rebuild_qtensor")
    serialization: Any = torch.serialization
    return {
        **{f"torch._utils.{name}": getattr(utils, name) for name in names},
        "torch.serialization._get_layout": serialization._get_layout,
        "torch.Size": torch.Size,
        "torch.device": torch.device,
        "collections.OrderedDict": OrderedDict,
        "collections.defaultdict": _empty_dict,
    }


_Unpickler: Any = pickle._Unpickler  # The one in C cannot be told what to call.


class _InertUnpickler(_Unpickler):  # type: ignore[misc]
    """Reads all protocols. It calls only `_tensor_functions`, and changes only lists, dicts, sets and stand-ins."""

    dispatch: ClassVar[dict[int, Any]] = dict(_Unpickler.dispatch)

    def __init__(self, file: BinaryIO, **options: Any) -> None:
        super().__init__(file, encoding=options.get("encoding", "latin1"), errors="surrogateescape")
        self._allowed = _tensor_functions()

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] in _HOSTILE_MODULES or (
            module in ("builtins", "__builtin__") and name in _HOSTILE_BUILTINS
        ):
            raise HostileError(f"{module}.{name}")
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype | torch.qscheme):
            return found
        return self._allowed.get(f"{module}.{name}") or StandIn(f"{module}.{name}")

    def get_extension(self, code: int) -> None:
        self.append(StandIn(f"extension {code}"))

    def _call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        if any(function is allowed for allowed in self._allowed.values()):
            return function(*arguments)
        return StandIn(getattr(function, "name", type(function).__name__), arguments)

    def _reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], arguments)

    def _new_with_keywords(self) -> None:
        keywords = self.stack.pop()
        arguments = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], (*arguments, *([keywords] if keywords else [])))

    def _instance(self) -> None:
        module, name = (self.readline()[:-1].decode("ascii") for _ in range(2))
        self.append(self._call(self.find_class(module, name), tuple(self.pop_mark())))

    def _object(self) -> None:
        function, *arguments = self.pop_mark()
        self.append(self._call(function, tuple(arguments)))

    def _build(self) -> None:
        state, built = self.stack.pop(), self.stack[-1]
        if isinstance(built, StandIn):
            built.state = state
        elif type(built) is not OrderedDict:  # The metadata of a state dict are not needed.
            raise pickle.UnpicklingError(f"it changes a {type(built).__name__}")

    def _extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        (target.items if isinstance(target, StandIn) else _checked(target, list)).extend(values)

    def _add(self) -> None:
        values, target = self.pop_mark(), self.stack[-1]
        target.items.extend(values) if isinstance(target, StandIn) else _checked(target, set).update(values)

    def _set(self, values: list[Any]) -> None:
        pairs, target = list(zip(values[::2], values[1::2], strict=True)), self.stack[-1]
        target.entries.extend(pairs) if isinstance(target, StandIn) else _checked(target, dict).update(pairs)

    def _set_one(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _persistent(self) -> None:
        named = self.stack.pop()
        if isinstance(named, tuple) and named[:1] == ("module",):  # Early versions stored a module's source, too.
            self.append(named[1])
        else:
            self.append(self.persistent_load(named))

    def _bytearray(self) -> None:
        self.append(self.read(int.from_bytes(self.read(8), "little")))

    dispatch[pickle.REDUCE[0]] = dispatch[pickle.NEWOBJ[0]] = _reduce
    dispatch[pickle.BINPERSID[0]] = _persistent
    dispatch[pickle.NEWOBJ_EX[0]] = _new_with_keywords
    dispatch[pickle.INST[0]] = _instance
    dispatch[pickle.OBJ[0]] = _object
    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.APPEND[0]] = lambda self: self._extend([self.stack.pop()])
    dispatch[pickle.APPENDS[0]] = lambda self: self._extend(self.pop_mark())
    dispatch[pickle.ADDITEMS[0]] = _add
    dispatch[pickle.SETITEM[0]] = _set_one
    dispatch[pickle.SETITEMS[0]] = lambda self: self._set(self.pop_mark())
    dispatch[pickle.BYTEARRAY8[0]] = _bytearray


def _checked(target: Any, kind: type) -> Any:
    if type(target) is not kind and not (kind is dict and type(target) is OrderedDict):
        raise pickle.UnpicklingError(f"it changes a {type(target).__name__}")
    return target


def load_inert(file: BinaryIO, **options: Any) -> Any:
    """Read one pickle."""
    return _InertUnpickler(file, **options).load()


_PICKLE_MODULE: Any = SimpleNamespace(__name__="hookx.models.inert", Unpickler=_InertUnpickler, load=load_inert)


def load_saved(path: Path, *, mapped: bool = False) -> Any:
    """Read what `torch.save` wrote: tensors as they are, and stand-ins for all that is not made of tensors."""
    if not zipfile.is_zipfile(path) and tarfile.is_tarfile(path):  # torch would unpack it to the disk.
        raise pickle.UnpicklingError("it is in the tar format of early versions of torch")
    # `weights_only` would take torch's own unpickler in place of this one.
    return torch.load(path, map_location="cpu", pickle_module=_PICKLE_MODULE, weights_only=False, mmap=mapped)
