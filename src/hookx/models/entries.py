"""The entry of a checkpoint that holds the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hookx.errors import ModelError, closest
from hookx.models.inert import StandIn, holds_tensors
from hookx.models.unexpected import is_no_model, order_by_use, settle

# What training scripts call the weights, most likely first, and their moving averages.
_ORDINARY = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "module")
AVERAGED = ("state_dict_ema", "model_ema", "ema", "ema_state_dict", "ema_model", "model_ema_state_dict", "params_ema")
_KNOWN = (*_ORDINARY, *AVERAGED, "teacher", "student", "app")
_MAX_DEPTH = 4  # of entries within entries: those that refer to each other twice would take exponential time

SAVE_WEIGHTS = "save the weights alone: torch.save(model.state_dict(), 'weights.pt')"


class NoWeightsError(ModelError):
    """A file holds no weights that can be read without running code."""

    blocked = ""
    """The class of the object that may be the weights."""

    @classmethod
    def of_stand_in(cls, value: StandIn, file: Path) -> NoWeightsError:
        error = cls(f"the weights in '{file}' are an object that is not read ({value.name})", SAVE_WEIGHTS)
        error.blocked = value.name
        return error


@dataclass(frozen=True)
class Chosen:
    """A state dict or a module, its entry in the file, and the entries that were passed over."""

    value: Any
    entry: str = ""
    others: tuple[str, ...] = ()


def choose(content: Any, key: str | None, file: Path, patterns: Sequence[str] = ()) -> Chosen:
    """Find the weights in a file's contents: those under a key, or the only plausible ones.

    Args:
        content: what the file holds.
        key: the entry that the user names, if any.
        file: for errors.
        patterns: globs over what the user leaves out, which can be sets of weights.

    Raises:
        ModelError: there is no such entry, none holds weights, or several do.
    """
    if key is None:
        return _choose_only(content, "", file, patterns)
    if (value := _follow(content, key)) is not None:
        return _choose_only(value, key, file, patterns)
    names = list(map(str, content)) if isinstance(content, Mapping) else []
    if is_state(content):  # It has too many names to list; the first parts of names are entries as well.
        names = [name.split(".")[0] for name in names]
    names = list(dict.fromkeys(names))
    problem = f"'{file}' has no entry '{key}'"
    if not names:
        raise NoWeightsError(problem)
    raise ModelError(
        f"{problem}; closest: {closest(key, names)}",
        f"its entries: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}",
    )


def _choose_only(value: Any, entry: str, file: Path, patterns: Sequence[str]) -> Chosen:
    if isinstance(value, StandIn):
        raise NoWeightsError.of_stand_in(value, file)
    if isinstance(value, nn.Module) or is_state(value):
        for inner in () if isinstance(value, nn.Module) else value.values():
            if holds_tensors(inner):  # A tensor of a class of its own: without it, the weights are not whole.
                raise NoWeightsError.of_stand_in(inner, file)
        return Chosen(value, entry)
    found = _entries(value)
    if not found and isinstance(value, Mapping):
        found = {str(name): inner for name, inner in value.items() if holds_tensors(inner)}
    dotted = f"{entry}." if entry else ""
    known = [name for name in _KNOWN if name in found]
    if not found:
        inside = f"entry '{entry}' of '{file}'" if entry else f"'{file}'"
        what = f"keys: {', '.join(map(str, list(value)[:5]))}" if isinstance(value, Mapping) else type(value).__name__
        raise NoWeightsError(f"{inside} is not a state dict (name -> tensor); found {what}", SAVE_WEIGHTS)
    found = {name: inner for name, inner in found.items() if not is_no_model(name)} or found
    if len(found) > 1 and not found.keys() & set(_ORDINARY):
        rivals = order_by_use(found)
        settled = settle(rivals, patterns, entry)
        if settled is None:
            raise ModelError(
                f"'{file}' holds several sets of weights: {', '.join(dotted + name for name in rivals)}",
                f"choose one: --weights-key {dotted}{rivals[0]}",
            )
        known = [settled, *(name for name in rivals if name != settled)]
    # Entries with unknown names can be a loss or an optimizer; do not mention those.
    name, *others = known or found
    inner = _choose_only(found[name], dotted + name, file, patterns)
    return Chosen(inner.value, inner.entry, (*(dotted + other for other in others), *inner.others))


def _entries(value: Any, depth: int = _MAX_DEPTH) -> dict[str, Any]:
    """Return the entries of a checkpoint that hold weights, directly or below an entry with a known name."""
    if not isinstance(value, Mapping) or depth == 0:
        return {}
    return {
        name: inner
        for name, inner in value.items()
        if isinstance(name, str)
        and (
            isinstance(inner, nn.Module)
            or is_state(inner)
            or (name in _KNOWN and (holds_tensors(inner) or bool(_entries(inner, depth - 1))))
        )
    }


def is_entry_of_state(value: Any) -> bool:
    """Return whether a value is one of those that a state dict holds."""
    # A quantized layer stores its packed weights in a tuple, and their dtype beside it.
    return isinstance(value, Tensor | torch.dtype) or (
        isinstance(value, tuple) and any(isinstance(item, Tensor) for item in value)
    )


def is_state(value: Any) -> bool:
    """Return whether a value is a state dict."""
    return (
        isinstance(value, Mapping)
        and all(isinstance(name, str) for name in value)
        and any(isinstance(item, Tensor) for item in value.values())
        and not any(isinstance(item, Mapping | nn.Module) for item in value.values())
    )


def _follow(value: Any, key: str) -> Any:
    """Follow a dotted key through nested entries and on into the names of tensors."""
    if not isinstance(value, Mapping):
        return None
    if key in value:
        return value[key]
    named = {name: inner for name, inner in value.items() if isinstance(name, str)}
    for name, inner in named.items():
        if key.startswith(f"{name}.") and (found := _follow(inner, key.removeprefix(f"{name}."))) is not None:
            return found
    under = f"{key}."
    return {name.removeprefix(under): inner for name, inner in named.items() if name.startswith(under)} or None


def names_beside(content: Any, entry: str) -> tuple[str, ...]:
    """Return the entries of a file beside the one that holds the weights."""
    names = [name for name in content if isinstance(name, str)] if isinstance(content, Mapping) and entry else []
    return tuple(name for name in names if name != entry and not entry.startswith(f"{name}."))
