"""Texts from a command line -> the arguments of a function, of the types that it annotates."""

from __future__ import annotations

import ast
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union

from hookx.errors import ModelError, closest

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def arguments_for(
    function: Callable[..., Any], texts: Mapping[str, str], name: str
) -> tuple[list[Any], dict[str, Any]]:
    """Read arguments as a function's annotations say; return the positional ones and the others.

    Raises:
        ModelError: an argument is unknown, missing, or not what its annotation says.

    Example:
        >>> def net(width: int, *, bias: bool = True, scale: float | None = None): ...
        >>> arguments_for(net, {"width": "8", "bias": "no", "scale": "none"}, "net")
        ([], {'width': 8, 'bias': False, 'scale': None})
    """
    try:
        parameters = dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # Compiled code can be without a signature.
        return [], {key: literal(text) for key, text in texts.items()}
    annotations = _annotations(function)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    named = {
        key: parameter
        for key, parameter in parameters.items()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }
    for key in texts:
        if key not in named and not takes_any:
            known = f"; closest: {closest(key, named)}" if named else ": it takes none"
            raise ModelError(f"{name} takes no argument '{key}'{known}")
    missing = [key for key, parameter in named.items() if parameter.default is parameter.empty and key not in texts]
    if missing:
        described = ", ".join(f"{key}{_described(annotations.get(key))}" for key in missing)
        raise ModelError(
            f"{name} needs arguments: {described}",
            "give them: " + " ".join(f"--model-arg {key}=..." for key in missing),
        )
    positional, keywords = [], {}
    for key, text in texts.items():
        default = named[key].default if key in named else inspect.Parameter.empty
        annotation = annotations.get(key) if key in named else None
        try:
            value = _typed(text, annotation, default)
        except (ValueError, TypeError) as error:
            raise ModelError(f"{name}: --model-arg {key}={text} is not{_described(annotation)}: {error}") from None
        if key not in named or named[key].kind is not inspect.Parameter.POSITIONAL_ONLY:
            keywords[key] = value
    for key, parameter in named.items():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            if key not in texts:
                break
            positional.append(_typed(texts[key], annotations.get(key), parameter.default))
    return positional, keywords


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
    except Exception:  # A name that exists for type checkers only.
        return {
            key: value for key, value in getattr(where, "__annotations__", {}).items() if not isinstance(value, str)
        }


def _typed(text: str, annotation: Any, default: Any) -> Any:
    if annotation in (None, Any):
        if isinstance(default, str):
            return text
        return _typed(text, type(default), None) if isinstance(default, bool | Enum) else literal(text)
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _typed(text, inside[0], default)
    if origin in (Union, types.UnionType):
        return _first_that_fits(text, inside, default)
    if origin is Literal:
        choices = {str(choice): choice for choice in inside}
        if text not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return choices[text]
    if origin in (list, tuple, set, frozenset, Sequence) or annotation in (list, tuple, Sequence):
        return _sequence(text, origin or annotation, inside)
    if annotation is bool:
        if text.lower() not in _TRUE + _FALSE:
            raise ValueError("true or false")
        return text.lower() in _TRUE
    if annotation is type(None):
        if text.lower() != "none":
            raise ValueError("none")
        return None
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        by_name = {member.name: member for member in annotation}
        if text not in by_name:
            raise ValueError(f"one of {', '.join(by_name)}")
        return by_name[text]
    if annotation in (int, float, str, Path):
        return annotation(text)
    if annotation is dict or origin is dict or annotation is object:
        return literal(text)
    raise TypeError("it cannot be written on a command line; write a factory that makes it")


def _first_that_fits(text: str, members: Sequence[Any], default: Any) -> Any:
    # A text fits `str` always, so the others are asked before it.
    problems = []
    for member in sorted(members, key=lambda member: (member is str, member is not type(None))):
        try:
            return _typed(text, member, default)
        except (ValueError, TypeError) as error:
            problems.append(str(error))
    raise ValueError("; or ".join(problems))


def _sequence(text: str, kind: Any, inside: tuple[Any, ...]) -> Any:
    pieces = [piece.strip() for piece in text.strip("()[]").split(",") if piece.strip()]
    fixed = kind is tuple and inside and inside[-1] is not Ellipsis
    if fixed and len(pieces) != len(inside):
        raise ValueError(f"{len(inside)} values with commas between")
    types_of = list(inside) if fixed else [inside[0] if inside else None] * len(pieces)
    values = [_typed(piece, each, None) for piece, each in zip(pieces, types_of, strict=True)]
    return kind(values) if kind in (tuple, set, frozenset) else values


def literal(text: str) -> Any:
    """Read a text as Python would write the value; one that Python would not is itself.

    Example:
        >>> literal("8"), literal("(64, 64)"), literal("true"), literal("avg")
        (8, (64, 64), True, 'avg')
    """
    plain = {"true": True, "false": False, "none": None}
    if text.lower() in plain:
        return plain[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _described(annotation: Any) -> str:
    if annotation is None:
        return ""
    name = annotation.__name__ if isinstance(annotation, type) and not typing.get_args(annotation) else str(annotation)
    return f" ({name.replace('typing.', '')})"
