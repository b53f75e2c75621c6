"""What a shell offers: names of models, layers and weights, and what a run holds.

A shell asks at every press of the tab key, so torch is imported only for what a built model alone can tell, its layers
and its weights, and the answer is kept in the user's cache.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from hookx.layers.address import Address
from hookx.layers.select import Selector
from hookx.models.names import LISTED_PREFIXES, distribution_of, may_run_code, torchvision_names
from hookx.plan import Plan
from hookx.store.tables import read_rows

_MAX_KEYS = 1000
_BASH_BREAKS = re.compile(r"[:=@]+")  # where readline cuts words, as far as addresses, models and options hold it


def answer(command: Callable[[], object]) -> NoReturn:
    """Answer a shell that asks for completions; offer none if anything goes wrong."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # A warning would appear in the line that is being typed.
    is_bash, untouched, is_quoted = os.environ["_HOOKX_COMPLETE"] == "complete_bash", "", False
    output, exit_code = io.StringIO(), 1
    try:
        if is_bash:
            untouched, is_quoted = _join_words_of_bash()
        with contextlib.redirect_stdout(output):
            command()
    except SystemExit as done:
        exit_code = done.code if isinstance(done.code, int) else 0  # fish asks for nothing else
    except Exception:
        sys.exit(exit_code)
    for line in output.getvalue().splitlines():
        line = line.removeprefix(untouched)
        print(re.sub(r"[^\w./:@%+,=~-]", r"\\\g<0>", line) if is_bash and not is_quoted else line)
    sys.exit(exit_code)


def _join_words_of_bash() -> tuple[str, bool]:
    """Join the words that bash cut at ':', '=' and '@', as Typer expects them.

    Returns what precedes the piece that bash will replace, and whether that piece is quoted.
    """
    words, current = os.environ["COMP_WORDS"].split("\n"), int(os.environ["COMP_CWORD"])
    joined, untouched = [""], ""
    for word in words[: current + 1]:
        is_break = _BASH_BREAKS.fullmatch(word)
        if not is_break and not _BASH_BREAKS.fullmatch(joined[-1][-1:]):
            joined.append("")
        untouched = joined[-1] + (word if is_break else "")
        joined[-1] += word
    os.environ.update(COMP_WORDS="\n".join(joined[1:]), COMP_CWORD=str(len(joined) - 2))
    untouched = untouched.removesuffix("@")  # bash replaces it with what follows it
    if untouched.startswith("-"):
        untouched = untouched.partition("=")[2]  # Typer completes the value of --layers=... alone
    return untouched, words[current].startswith(("'", '"'))


def models(incomplete: str) -> Iterable[str]:
    """Return the names of torchvision's models, or of the zoo whose prefix is typed."""
    prefix = next((prefix for prefix in LISTED_PREFIXES if incomplete.startswith(prefix)), "")
    return _remember(prefix, lambda: _list_models(f"{prefix}*")) if prefix else torchvision_names()


def weights(model: str | None, incomplete: str) -> Iterable[str]:
    """Return the names of a model's weights, and those that every model has."""
    return ["default", "none", *(_known_of(model)["weights"] if model else ())]


def _list_models(pattern: str) -> list[str]:
    from hookx.models import list_models

    return list(list_models(pattern))


def _known_of(model: str) -> dict[str, Any]:
    """Return the classes of a published model's modules by path, and the names of its weights."""

    def build() -> dict[str, Any]:
        from hookx.capture.runner import module_classes
        from hookx.models import skeleton, weights_of

        classes = module_classes(skeleton(model, "none").module)
        return {"classes": classes, "weights": [name for name, _ in weights_of(model)]}

    # Other references may run code, use the network, or change.
    if may_run_code(model) or not re.fullmatch(r"(\w+:)?[\w./-]+", model):
        return {"classes": {}, "weights": []}
    known: dict[str, Any] = _remember(model, build)
    return known


def _remember(name: str, find_out: Callable[[], Any]) -> Any:
    """Return what these versions found out before, or find it out and keep it in the user's cache."""
    versions = "-".join(f"{package}-{version(package)}" for package in ("torch", distribution_of(name)))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    file = cache / "hookx" / versions / f"{re.sub('[:/]', '-', name)}.json"
    with contextlib.suppress(OSError, ValueError):
        return json.loads(file.read_text())
    found = find_out()
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps(found))
        aside.replace(file)
    return found


def layers(model: str | None, incomplete: str) -> Iterable[str]:
    """Complete the last selector of a list with a model's layers, or with its classes after 'type:'."""
    classes: dict[str, str] = _known_of(model)["classes"] if model else {}
    return _in_list(incomplete, lambda selector: _selectors(classes, selector))


def classes(model: str | None, incomplete: str) -> Iterable[str]:
    """Complete the last name of a list with the classes of a model's modules."""
    found = dict.fromkeys(_known_of(model)["classes"].values()) if model else {}
    return _in_list(incomplete, lambda _: found)


def _in_list(incomplete: str, candidates: Callable[[str], Iterable[str]]) -> Iterator[str]:
    before, comma, last = incomplete.rpartition(",")
    return (before + comma + name for name in candidates(last) if name not in before.split(","))


def _selectors(classes: dict[str, str], begun: str) -> Iterator[str]:
    if begun and "type:".startswith(begun[:5]):
        yield from dict.fromkeys(f"type:{class_name}" for class_name in classes.values())
    if re.search(r"[*?]", begun):
        # A glob stays as it is; offer what is below the modules that it matches: layer*.0.co -> layer*.0.conv1
        above = begun.rpartition(".")[0]
        below = (path.rpartition(".")[2] for path in Selector.parse(f"{above}.*").paths(classes)) if above else ()
        yield from dict.fromkeys(f"{above}.{Address(name)}" for name in below)
    # Offer one level more than is typed: all 713 paths of a densenet201 help nobody.
    yield from (str(Address(path)) for path in classes if path.count(".") <= begun.count(".") + 1)


def addresses(run: str | Path | None, incomplete: str) -> Iterable[str]:
    """Return the addresses that a run holds."""
    plan = Plan.from_json((Path(run or "features") / "plan.json").read_text())
    return (layer.address for layer in plan.layers)


def layers_or_addresses(model: str | None, run: str | Path | None, incomplete: str) -> Iterable[str]:
    """Complete the last name of a list with a model's layers or, without a model, with what a run holds."""
    return layers(model, incomplete) if model else _in_list(incomplete, lambda _: addresses(run, ""))


def keys(run: str | Path | None, incomplete: str) -> Iterable[str]:
    """Return keys of a finished run: up to a thousand, and the last one, so that their common prefix is right."""
    with open(Path(run or "features") / "index.csv", newline="", errors="surrogateescape") as index:
        begun = (key for key, *_ in read_rows(index) if key.startswith(incomplete) and key.isprintable())
        return [*islice(begun, _MAX_KEYS), *deque(begun, 1)]
