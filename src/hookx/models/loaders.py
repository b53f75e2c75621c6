"""A function of the user's own that reads images: named by a reference, or given in Python."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

from hookx.errors import ModelError
from hookx.models.importing import import_named, parse_ref, print_to_stderr, with_article

Reader = Callable[[Any], Any]
_NEXT_STEP = "a loader takes one argument, a path or an open file, and returns an image"


def load_loader(loader: str | Reader) -> tuple[Reader, str]:
    """Return a loader, and what a plan records about it: its file, its name, and the SHA-256 of its source.

    Raises:
        ModelError: there is no such function, it cannot be called with one argument, or its source cannot be read.
    """
    if isinstance(loader, str):
        function = import_named(loader, "function", "a function that reads an image")
        where, name = parse_ref(loader)
        sources = [where] if isinstance(where, Path) else []
    else:
        function, name, sources = loader, "", []
    said = loader if isinstance(loader, str) else f"the loader {_name_of(function)}"
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        raise ModelError(f"{said} cannot be called with one argument", _NEXT_STEP) from None
    except ValueError:  # Compiled code need not say what it takes.
        pass
    digest, file = _digest(function, sources, said)
    is_module = isinstance(loader, str) and not sources
    named = loader if is_module else f"{file}:{name or _name_of(function)}"
    return print_to_stderr(function), f"{named} sha256:{digest}"


def _digest(function: Reader, files: list[Path], said: str) -> tuple[str, str]:
    """Return the SHA-256 of the source of a function, and the name of its first file."""
    defined = _defined_by(function)
    contents = [(file.name, file.read_bytes()) for file in files]
    try:
        file = Path(inspect.getsourcefile(defined) or "")
        if not file.is_file():  # Typed into a shell or a notebook.
            contents.append((file.name, inspect.getsource(defined).encode()))
        elif file.resolve() not in [one.resolve() for one in files]:
            contents.append((file.name, file.read_bytes()))
    except (OSError, TypeError):
        code = getattr(defined, "__code__", None)
        if code is not None and not contents:  # Typed into a shell that keeps no source.
            contents.append((Path(code.co_filename).name, repr(_parts_of(code)).encode()))
        if not contents:
            raise ModelError(
                f"{said} has no source that a plan could record: it is {with_article(defined)} of compiled code",
                "call it from a function in a file",
            ) from None
    return hashlib.sha256(b"\0".join(content for _, content in contents)).hexdigest(), contents[0][0]


def _parts_of(code: CodeType) -> tuple[Any, ...]:
    """Return what compiled code consists of, without the places that it came from."""
    constants: list[Any] = [_parts_of(one) if isinstance(one, CodeType) else one for one in code.co_consts]
    constants = [sorted(map(repr, one)) if isinstance(one, frozenset) else one for one in constants]  # without an order
    return code.co_code, code.co_names, code.co_varnames, code.co_freevars, constants


def _defined_by(function: Any) -> Any:
    """Return what has the source of something that can be called."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    has_code = inspect.isroutine(function) or inspect.isclass(function)
    return function if has_code else type(function)


def _name_of(function: Any) -> str:
    return str(getattr(_defined_by(function), "__qualname__", type(function).__name__))
