"""How an option is described, how its value is checked, and how a function gets the signature of its options."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, ClassVar, Literal, ParamSpec, TypeVar, dataclass_transform, get_args, get_origin

from hookx.errors import UsageError

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")


@dataclass
class Option:
    """What there is to say about an option beside its field, which gives its name, type and default."""

    synopsis: str  # '-b --batch-size N', or 'RUN' of an argument; '...' behind it: repeatable; '': Python alone
    help: str  # one sentence; '{choices}' stands for the words of the type
    _: dataclasses.KW_ONLY
    minimum: float | None = None
    maximum: float | None = None
    parse: Callable[[Any], Any] | None = None  # takes text and the natural type; its ValueError says what to write
    required: tuple[str, ...] = ()  # the error and the next step where it is missing
    absent: Any = None  # what the command line uses where a Python caller has to choose
    completed_by: tuple[str, ...] = ()  # a function of `hookx.cli.completion`, and the options whose values it gets
    variable: bool | None = None  # whether an environment variable sets it; None: as its class says
    title: str = ""  # its section of the help; '': that of its class
    default: Any = ...
    # The field and its class give these.
    name: str = ""
    types: tuple[Any, ...] = ()

    @functools.cached_property
    def flags(self) -> tuple[str, ...]:
        return tuple(word for word in self.synopsis.split() if word.startswith("-"))

    @property
    def flag(self) -> str:
        """The long flag, as errors name it; the name of an argument."""
        return self.flags[-1] if self.flags else self.name

    @property
    def metavar(self) -> str:
        return self.synopsis.split()[-1].removesuffix("...")

    @property
    def is_repeated(self) -> bool:
        return self.synopsis.endswith("...")

    @functools.cached_property
    def choices(self) -> tuple[str, ...]:
        """The words of the type."""
        words = [get_args(kind) for kind in self.types if get_origin(kind) is Literal]
        return tuple(word for some in words for word in some if word)

    @property
    def sentence(self) -> str:
        """The help, with the words that can be chosen."""
        return self.help.replace("{choices}", in_words(self.choices))

    @property
    def default_text(self) -> str:
        """The default as it is typed, or '' where there is none to show."""
        default = self.absent if self.default is ... else self.default
        if isinstance(default, bool) or default in (None, "", (), {}):
            return ""
        return f"{default:g}" if isinstance(default, float) else str(default)

    def read(self, value: Any) -> Any:
        """Check a value, or read it from text; `UsageError` names the flag, the value and what is possible."""
        if self.required and (value is None or (isinstance(value, str) and not value)):
            raise UsageError(*self.required)
        if value is None:
            return None if self.default is ... else self.default
        if self.parse is not None:
            try:
                value = self.parse(value)
            except ValueError as error:
                raise UsageError(f"invalid {self.flag} '{as_text(value)}': {error}") from None
        if isinstance(value, str) and (value == self.default or value in self.choices):
            return value
        if int in self.types or float in self.types:
            return self._read_number(value)
        if self.choices and str not in self.types:
            raise UsageError(f"invalid {self.flag} '{value}': choose {', '.join(self.choices)}")
        if bool in self.types and not isinstance(value, bool):
            raise UsageError(f"{self.flag} must be true or false, got '{value}'")
        return value

    def _read_number(self, value: Any) -> float:
        is_whole = int in self.types
        try:
            if is_whole:
                number: float = int(value) if isinstance(value, str) else operator.index(value)
            else:
                number = float(value)
        except (TypeError, ValueError):
            possible = in_words(("a whole number" if is_whole else "a number", *self.choices))
            raise UsageError(f"{self.flag} must be {possible}, got '{value}'") from None
        if self.minimum is not None and not number >= self.minimum:  # also NaN
            raise UsageError(f"{self.flag} must be at least {self.minimum:,}, got {number:,}")
        if self.maximum is not None and not number <= self.maximum:
            raise UsageError(f"{self.flag} must be at most {self.maximum:,}, got {number:,}")
        return number


def option(synopsis: str, help: str, *, default: Any = ..., kw_only: bool = True, **settings: Any) -> Any:
    """Describe a field of a class of options; without a default, it has to be given."""
    metadata = {"option": Option(synopsis, help, default=default, **settings)}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, kw_only=kw_only, metadata=metadata)
    return dataclasses.field(default=MISSING if default is ... else default, kw_only=kw_only, metadata=metadata)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(option,))
class Options:
    """A group of options. Subclasses are frozen dataclasses, whose values are read and checked when they are made."""

    _own: ClassVar[dict[str, Option]] = {}

    def __init_subclass__(cls, *, title: str = "", variables: bool = False) -> None:
        dataclass(frozen=True, kw_only=True)(cls)
        annotations, fields = inspect.get_annotations(cls), dataclasses.fields(typing.cast(Any, cls))
        cls._own = {field.name: field.metadata["option"] for field in fields if field.name in annotations}
        for name, option in cls._own.items():
            origin: Any = get_origin(annotations[name])
            is_union = origin is typing.Union or origin is types.UnionType
            option.types = get_args(annotations[name]) if is_union else (annotations[name],)
            option.name, option.title = name, option.title or title
            option.variable = variables if option.variable is None else option.variable

    def __post_init__(self) -> None:
        for name, option in options_of(type(self)).items():
            object.__setattr__(self, name, option.read(getattr(self, name)))

    def values_of(self, group: type[Options]) -> dict[str, Any]:
        """Return the values of the options that stand in another group, by name."""
        return {name: getattr(self, name) for name in options_of(group)}


def words_of(options: Options, group: type[Options]) -> list[str]:
    """Return the flags that ask for the values of a group's options, without those that are the default.

    Example:
        >>> from hookx.options import ComputeOptions
        >>> words_of(ComputeOptions(device="cuda:1"), ComputeOptions)
        ['--device=cuda:1']
    """
    words = []
    for name, option in options_of(group).items():
        value = getattr(options, name)
        if not option.flags or value == option.default or value is None:
            continue
        if bool in option.types:
            words.append(option.flag)
        elif isinstance(value, dict):
            words += [f"{option.flag}={key}={one}" for key, one in value.items()]
        elif option.is_repeated and not isinstance(value, str):
            words += [f"{option.flag}={one}" for one in value]
        else:
            words.append(f"{option.flag}={as_text(value)}")
    return words


def options_of(group: type[Options]) -> dict[str, Option]:
    """Return the options of a class by name: its own first, then those of the groups that it is made of.

    Example:
        >>> from hookx.options import ComputeOptions
        >>> list(options_of(ComputeOptions)), options_of(ComputeOptions)["precision"].choices
        (['device', 'precision'], ('fp32', 'tf32', 'bf16', 'fp16'))
    """
    found: dict[str, Option] = {}
    for owner in group.__mro__:
        for name, option in vars(owner).get("_own", {}).items():
            found.setdefault(name, option)
    return found


def takes(group: Callable[P, T]) -> Callable[[Callable[[T], R]], Callable[P, R]]:
    """Give a function of one value the signature of the value's class: every option becomes an argument.

    Type checkers and editors follow the ParamSpec; `help()` and `inspect.signature` are told at run time, as are the
    sentences of the options, which stand in front of the docstring's "Raises", or at its end.

    Example:
        >>> from hookx.options import ComputeOptions
        >>> @takes(ComputeOptions)
        ... def place(options: ComputeOptions) -> str:
        ...     return f"{options.precision} on {options.device}"
        >>> place(device="cpu"), inspect.signature(place).parameters["device"].default
        ('fp32 on cpu', 'auto')
    """

    def give_signature(function: Callable[[T], R]) -> Callable[P, R]:
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return function(group(*args, **kwargs))

        assert isinstance(function, types.FunctionType)
        # It gets the globals of the function's own module, because doctest skips functions of other modules.
        called: Any = types.FunctionType(call.__code__, function.__globals__, function.__name__, None, call.__closure__)
        called.__module__, called.__qualname__ = function.__module__, function.__qualname__
        options = options_of(typing.cast(type[Options], group))
        parameters = inspect.signature(group).parameters
        ordered = [
            parameters[name].replace(default=inspect.Parameter.empty if option.default is ... else option.default)
            for name, option in options.items()
        ]
        called.__signature__ = inspect.Signature(
            sorted(ordered, key=lambda parameter: parameter.kind),  # what can be given by position comes first
            return_annotation=inspect.signature(function).return_annotation,
        )
        sentences = "".join(f"        {name}: {option.sentence}\n" for name, option in options.items())
        described, raises, errors = (function.__doc__ or "").partition("    Raises:\n")
        called.__doc__ = f"{described.rstrip()}\n\n    Args:\n{sentences}\n{raises}{errors}"
        return typing.cast(Callable[P, R], called)

    return give_signature


def in_words(alternatives: Sequence[str]) -> str:
    """List alternatives as a sentence does: 'fp32, bf16 or fp16'."""
    *others, last = alternatives or ("",)
    return f"{', '.join(others)} or {last}" if others else last


def as_text(value: Any) -> str:
    """Write a value as it is typed, with commas in a list."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
