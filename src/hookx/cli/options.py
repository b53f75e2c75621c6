"""A class of options -> what Typer understands: flags, variables, completion, sections of the help, keys of a file."""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand

from hookx.errors import UsageError, closest
from hookx.options.option import Option, Options, as_text, options_of

EXIT_CODES = """Exit codes: 0 done; 1 error; 2 usage; 3 done, but some images could not be read; 130 interrupted;
143 terminated."""


@dataclass(frozen=True)
class Command:
    """A command: its name, the function that it calls with values of classes of options, and examples that run."""

    name: str
    function: Callable[..., None]
    examples: tuple[str, ...]

    @property
    def groups(self) -> dict[str, type[Options]]:
        """The classes of options by the parameter of the function that takes them."""
        return {name: kind for name, kind in get_type_hints(self.function).items() if name != "return"}

    @property
    def options(self) -> dict[str, Option]:
        """Every option that has a flag or is an argument, by name."""
        options = {name: option for group in self.groups.values() for name, option in options_of(group).items()}
        return {name: option for name, option in options.items() if option.synopsis}

    def add_to(self, app: typer.Typer) -> None:
        """Register the command with Typer, by a function whose signature is made of the options."""
        groups, options = self.groups, self.options

        def call(context: typer.Context, **values: Any) -> None:
            said = {name: value for name, value in values.items() if value is not None}
            for name, value in said.items():
                _check(context, options[name], value)
            self.function(**{parameter: _make(group, said) for parameter, group in groups.items()})

        call.__doc__ = self.function.__doc__
        context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        parameters = [context, *(_parameter(option, options) for option in options.values())]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        lines = "\n".join(f"  {example}" for example in self.examples)
        # \b: these lines are not filled into a paragraph.
        epilog = f"\b\nExamples:\n{lines}\n\n{EXIT_CODES}"
        app.command(self.name, cls=_SectionedCommand, epilog=epilog)(call)


def command(name: str, *examples: str) -> Callable[[Callable[..., None]], Command]:
    """Make a command of a function whose parameters are annotated with classes of options."""
    return lambda function: Command(name, function, examples)


def _make(group: type[Options], said: Mapping[str, Any]) -> Options:
    """Make a value of a class of options of what a command line says."""
    options = options_of(group)
    absent = {name: () if one.is_repeated else one.absent for name, one in options.items() if one.default is ...}
    return group(**absent | {name: value for name, value in said.items() if name in options})


def _check(context: typer.Context, option: Option, value: Any) -> None:
    """Check a value that is not on the command line, to say where a wrong one comes from."""
    source = context.get_parameter_source(option.name)
    origins = {"ENVIRONMENT": f"the variable {variable_of(option)}", "DEFAULT_MAP": "the configuration file"}
    if source is not None and source.name in origins:
        try:
            option.read(value)
        except UsageError as error:
            raise UsageError(str(error), f"it comes from {origins[source.name]}") from None


class _SectionedCommand(TyperCommand):
    """A command whose options stand in titled sections of plain help."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": []}
        for parameter in self.get_params(ctx):
            is_argument = parameter.param_type_name == "argument"
            title = "Arguments" if is_argument else getattr(parameter, "rich_help_panel", None) or "Options"
            names, text = parameter.get_help_record(ctx) or ("", "")
            sections.setdefault(title, []).append((names.partition(" <")[0], text))  # an argument without its type
        sections["Options"] = sections.pop("Options")
        width = min(30, max(len(names) for rows in sections.values() for names, _ in rows))
        for title, rows in sections.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl([(names.ljust(width), text) for names, text in rows])


def _parameter(option: Option, options: Mapping[str, Option]) -> inspect.Parameter:
    """Describe one of a command's options to Typer. All but switches arrive as text, for `Option.read`."""
    kind: Any = bool if bool in option.types else list[str] if option.is_repeated else str
    notes = [f"default: {option.default_text}"] * bool(option.default_text)
    notes += ["repeatable"] * bool(option.is_repeated and option.flags)
    settings: dict[str, Any] = {"help": option.sentence + (f"  [{'; '.join(notes)}]" if notes else "")}
    if option.completed_by:
        settings["autocompletion"] = _completer(*option.completed_by)
    elif option.choices:
        settings["autocompletion"] = lambda: list(option.choices)
    if kind is not bool:
        settings["metavar"] = option.metavar
    if option.variable and option.flags:
        settings |= {"envvar": variable_of(option), "show_envvar": False}
    if option.name == "config":
        settings |= {"callback": _config_reader(options), "is_eager": True}
    if option.flags:
        info: Any = typer.Option(*option.flags, rich_help_panel=option.title, **settings)
        given: Any = False if kind is bool else None
    else:
        info = typer.Argument(**settings)
        given = ... if option.required else None
    annotation: Any = Annotated[kind if kind is bool else kind | None, info]
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=given, annotation=annotation)


def variable_of(option: Option) -> str:
    """Return the environment variable of an option: HOOKX_BATCH_SIZE of --batch-size."""
    return f"HOOKX_{key_of(option).replace('-', '_').upper()}"


def key_of(option: Option) -> str:
    """Return the key of an option in a file: its long flag, or the name of an argument."""
    return option.flag.removeprefix("--")


def _completer(function: str, *names: str) -> Callable[[typer.Context, str], list[str]]:
    """Make a function of `hookx.cli.completion` offer values, by what was said for other options."""

    def offered(context: typer.Context, incomplete: str) -> list[str]:
        from hookx.cli import completion

        said = dict(context.params)
        if context.args:  # Typer leaves the arguments unread behind an option that still lacks its value.
            said[next(p.name for p in context.command.params if p.param_type_name == "argument")] = context.args[0]
        values = [said.get(name) for name in names]
        # The last of the values of a repeated option belongs to the value that is being typed.
        values = [value[-1] if isinstance(value, list | tuple) and value else value or None for value in values]
        return list(getattr(completion, function)(*values, incomplete))

    return offered


def _config_reader(options: Mapping[str, Option]) -> Callable[[typer.Context, str | None], str | None]:
    """Return what makes the values of a TOML file the defaults of a command; flags and variables are stronger."""
    known = {key_of(option): option for option in options.values() if option.name != "config"}

    def read(context: typer.Context, path: str | None) -> str | None:
        if path is None:
            return None
        try:
            with open(path, "rb") as file:
                document = tomllib.load(file)
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise UsageError(f"cannot read the configuration {path}: {error}") from None
        for key in document:
            if key not in known:
                raise UsageError(f"{path}: there is no option '{key}'; closest: {closest(key, known)}")
        defaults = {known[key].name: _as_said(known[key], value) for key, value in document.items()}
        context.default_map = {**(context.default_map or {}), **defaults}
        return path

    return read


def _as_said(option: Option, value: Any) -> Any:
    """Write a value of a TOML file as the command line would have it."""
    if bool in option.types:
        return option.read(value)
    if option.is_repeated:
        return [str(one) for one in (value if isinstance(value, list) else [value])]
    return as_text(value)
