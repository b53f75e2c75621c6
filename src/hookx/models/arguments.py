"""Texts from the command line -> arguments of a function, parsed as its annotations say."""

from __future__ import annotations

import ast
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, Union

from hookx.errors import ModelError, closest

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def arguments_for(factory: Callable[..., Any], texts: Mapping[str, str], name: str) -> tuple[list[Any], dict[str, Any]]:
    """Parse arguments as a factory's annotations say; return the positional ones and the keyword ones.

    Raises:
        ModelError: an argument is unknown, missing, or does not match its annotation.

    Example:
        >>> def net(width: int, *, bias: bool = True, scale: float | None = None): ...
        >>> arguments_for(net, {"width": "8", "bias": "no", "scale": "none"}, "net")
        ([], {'width': 8, 'bias': False, 'scale': None})
    """
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # Compiled code can lack a signature.
        return [], {key: literal(text) for key, text in texts.items()}
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {key: parameter for key, parameter in parameters.items() if parameter.kind not in variadic}
    annotations = {key: hint for key, hint in _annotations(factory).items() if key in named}
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key in texts:
        if key not in named and not takes_any:
            known = f"; closest: {closest(key, named)}" if named else ": it takes none"
            raise ModelError(f"{name} takes no argument '{key}'{known}")
    missing = [key for key, parameter in named.items() if parameter.default is parameter.empty and key not in texts]
    if missing:
        listed = ", ".join(f"{key}{_describe_type(annotations.get(key))}" for key in missing)
        flags = " ".join(f"--model-arg {key}=..." for key in missing)
        raise ModelError(f"{name} needs arguments: {listed}", f"pass them: {flags}")
    keywords = {}
    for key, text in texts.items():
        annotation = annotations.get(key)
        try:
            keywords[key] = _parse(text, annotation, named[key].default if key in named else None)
        except (ValueError, TypeError) as error:
            raise ModelError(f"{name}: --model-arg {key}={text} is not{_describe_type(annotation)}: {error}") from None
    only_positional = (key for key, parameter in named.items() if parameter.kind is parameter.POSITIONAL_ONLY)
    return [keywords.pop(key) for key in takewhile(keywords.__contains__, only_positional)], keywords


def _annotations(function: Callable[..., Any]) -> dict[str, Any]:
    while isinstance(function, functools.partial):
        function = function.func
    where: Any = function
    if isinstance(function, type):
        where = function.__init__  # type: ignore[misc]
    elif not hasattr(function, "__code__"):
        where = type(function).__call__
    try:
        return typing.get_type_hints(where)
    except Exception:  # An annotation can name what exists only for type checkers.
        hints = getattr(where, "__annotations__", {})
        return {key: hint for key, hint in hints.items() if not isinstance(hint, str)}


def _parse(text: str, annotation: Any, default: Any) -> Any:
    if annotation in (None, Any):
        if isinstance(default, str):
            return text
        return _parse(text, type(default), None) if isinstance(default, bool | Enum) else literal(text)
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _parse(text, inside[0], default)
    if origin in (Union, types.UnionType):
        problems = []
        # Any text is a `str`, so try the other members first.
        for member in sorted(inside, key=lambda member: (member is str, member is not type(None))):
            try:
                return _parse(text, member, default)
            except (ValueError, TypeError) as error:
                problems.append(str(error))
        raise ValueError("; or ".join(problems))
    if origin is Literal:
        return _choose(text, {str(choice): choice for choice in inside})
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return _choose(text, {member.name: member for member in annotation})
    if origin in (list, tuple, set, frozenset, Sequence) or annotation in (list, tuple, Sequence):
        return _parse_sequence(text, origin or annotation, inside)
    if annotation is bool:
        if text.lower() not in _TRUE + _FALSE:
            raise ValueError("true or false")
        return text.lower() in _TRUE
    if annotation is type(None):
        if text.lower() != "none":
            raise ValueError("none")
        return None
    if annotation in (int, float, str, Path):
        return annotation(text)
    if annotation is dict or origin is dict or annotation is object:
        return literal(text)
    raise TypeError("this type cannot be written on a command line; write a factory that builds it")


def _choose(text: str, choices: Mapping[str, Any]) -> Any:
    if text not in choices:
        raise ValueError(f"one of {', '.join(choices)}")
    return choices[text]


def _parse_sequence(text: str, kind: Any, inside: tuple[Any, ...]) -> Any:
    pieces = [piece.strip() for piece in text.strip("()[]").split(",") if piece.strip()]
    fixed = kind is tuple and inside and inside[-1] is not Ellipsis
    if fixed and len(pieces) != len(inside):
        raise ValueError(f"{len(inside)} values separated by commas")
    types_of = list(inside) if fixed else [inside[0] if inside else None] * len(pieces)
    values = [_parse(piece, each, None) for piece, each in zip(pieces, types_of, strict=True)]
    return kind(values) if kind in (tuple, set, frozenset) else values


def literal(text: str) -> Any:
    """Parse a text as a Python literal, in which case 'true' and 'none' count too; any other stands for itself."""
    try:
        return ast.literal_eval(text.title() if text.lower() in ("true", "false", "none") else text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _describe_type(annotation: Any) -> str:
    if annotation is None:
        return ""
    name = annotation.__name__ if isinstance(annotation, type) and not typing.get_args(annotation) else str(annotation)
    return f" ({name.replace('typing.', '')})"
