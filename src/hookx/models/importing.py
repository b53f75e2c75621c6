"""Code of the user's own, named by a reference: imported and run, with what it prints and raises kept in order.

The code runs in this process. Standard output is for data, so what the code prints goes to standard error.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import operator
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from hookx.errors import HookxError, ModelError, closest, one_line
from hookx.models.names import PYTHON

_FACTORY = ", where factory can also be a class or a model"


def parse_ref(ref: str, noun: str = "factory") -> tuple[Path | str, str]:
    """Split a reference into a file or module, and a name in it."""
    where, colon, name = ref.removeprefix(PYTHON).rpartition(":")
    if not colon or not where or not all(part.isidentifier() for part in name.split(".")):
        whole = ref if ref.startswith(PYTHON) else ref.rpartition(".py")[0] + ".py"
        raise ModelError(
            f"'{ref}' does not name a {noun}",
            f"write {whole.rstrip(':')}:{noun}" + (_FACTORY if noun == "factory" else ""),
        )
    return (Path(where).expanduser(), name) if where.endswith(".py") else (where, name)


def import_named(ref: str, noun: str = "factory", expected: str = "a factory or an nn.Module") -> Any:
    """Import the code that a reference names, and return what the reference stands for, which can be called."""
    where, name = parse_ref(ref, noun)
    if isinstance(where, Path) and not where.is_file():
        raise ModelError(f"there is no file '{where}'")
    with running(f"'{where}' cannot be imported", ref):
        try:
            module = _import_file(where) if isinstance(where, Path) else importlib.import_module(where)
        except ModuleNotFoundError as error:
            if isinstance(where, str) and error.name and f"{where}.".startswith(f"{error.name}."):
                raise ModelError(
                    f"there is no module '{error.name}' for {ref}",
                    f"install it, or put it into the working directory; write a file as path/to/file.py:{noun}",
                ) from None
            raise
    try:
        found = operator.attrgetter(name)(module)
    except AttributeError as error:
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        similar = f"; closest: {closest(error.name or name, own)}" if own else ""
        raise ModelError(f"'{where}' has no '{name}'{similar}") from None
    if not callable(found):
        raise ModelError(f"{ref} is {with_article(found)}; expected {expected}")
    return found


def _import_file(file: Path) -> ModuleType:
    # Not under its own name: 'resnet.py' or 'queue.py' must not replace an installed module.
    path = file.resolve()
    name = f"hookx_file_{re.sub(r'[^0-9a-zA-Z]', '_', path.stem)}_{hashlib.sha256(bytes(path)).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Where dataclasses and pickle look up a class's module.
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.dont_write_bytecode = writes
    return module


@contextlib.contextmanager
def running(what: str, ref: str) -> Iterator[None]:
    """Run the user's code: send what it prints to standard error, and turn what it raises into an error with a line."""
    where, _ = parse_ref(ref)
    folder = str(where.resolve().parent) if isinstance(where, Path) else os.getcwd()
    sys.path.insert(0, folder)  # Where Python puts a script's folder.
    with _stdout_to_stderr():
        try:
            yield
        except HookxError:
            raise
        except (Exception, SystemExit) as error:  # Code can raise anything, and some modules call sys.exit.
            raise ModelError(f"{what}: {type(error).__name__}: {one_line(error)}{_locate(error)}") from error
        finally:
            with contextlib.suppress(ValueError):
                sys.path.remove(folder)
            if folder not in sys.path:  # Code may import more when it runs.
                sys.path.append(folder)


def _locate(error: BaseException) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({Path(error.filename).name}, line {error.lineno})"
    not_theirs = (str(Path(__file__).parent), "<frozen importlib")
    frames = [one for one in traceback.extract_tb(error.__traceback__) if not one.filename.startswith(not_theirs)]
    own = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send what Python, compiled code and child processes write to standard output to standard error."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def with_article(value: Any) -> str:
    noun = type(value).__name__
    return "None" if value is None else f"{'an' if noun[0] in 'aeiouAEIOU' else 'a'} {noun}"


def print_to_stderr(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def call(argument: Any) -> Any:
        with contextlib.redirect_stdout(sys.stderr):
            return function(argument)

    return call
