"""Published checkpoints of other code -> the names that timm's models have, by timm's own functions."""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from hookx.models.checkpoints import Weights
from hookx.models.fitting import list_first
from hookx.models.zoo import import_extra

_State = Mapping[str, Any]


def convert(weights: Weights, module: nn.Module, architecture: str) -> Weights:
    """Convert a file as timm converts the published weights of an architecture, if that fits more of its tensors.

    A file that fits as it is stays as it is.

    Args:
        weights: without the prefix of a wrapper.
        module: the model, which may be on the meta device.
        architecture: its name in timm.
    """
    own = module.state_dict()
    best, most = weights.state, _count_fitting(weights.state, own)
    if most == len(own) == len(weights.state):
        return weights
    for function in _functions_of(architecture):
        state = _call(function, weights.state, module)
        count = _count_fitting(state, own)
        if count > most or (count == most and count and _count_unexpected(state, own) < _count_unexpected(best, own)):
            best, most = state, count
    if best is weights.state:
        return weights
    kept = {id(value) for value in best.values()}
    gone = [name for name, value in weights.state.items() if name not in best and id(value) not in kept]
    changes = [list_first("dropped or divided", sorted(gone, key=lambda name: name.count(".")))] if gone else []
    note = "; ".join((f"weights in {weights.file.name}: converted by timm's own function for {architecture}", *changes))
    notes = (*weights.fitting_notes, "; ".join((note, *_describe_sizes(best, weights.state))))
    return replace(weights, state=best, beside=(*weights.beside, *gone), fitting_notes=notes)


def _describe_sizes(state: _State, before: _State) -> Iterator[str]:
    pairs = [(name, value, before.get(name)) for name, value in state.items()]
    resized = [
        f"{name} from {tuple(other.shape)} to {tuple(value.shape)}"
        for name, value, other in pairs
        if isinstance(value, Tensor) and isinstance(other, Tensor) and value.shape != other.shape
    ]
    if resized:
        yield list_first("resized", resized)


def _functions_of(architecture: str) -> Iterator[Callable[..., Any]]:
    """Yield the functions that convert checkpoints in the module that defines an architecture."""
    entry = import_extra("timm", "timm").models.model_entrypoint(architecture)
    for name, function in vars(sys.modules[entry.__module__]).items():
        if inspect.isfunction(function) and "filter" in name and function.__module__.startswith("timm.models."):
            parameters = inspect.signature(function).parameters
            if next(iter(parameters), "") == "state_dict":
                yield function
                if "adapt_layer_scale" in parameters:  # As timm does for DeiT III.
                    yield partial(function, adapt_layer_scale=True)


def _call(function: Callable[..., Any], state: _State, module: nn.Module) -> _State:
    """Return what a function makes of a state dict; {} if it is for files of another kind."""
    takes_model = "model" in inspect.signature(function).parameters
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            found = function(dict(state), module) if takes_model else function(dict(state))
    except Exception:  # A file of another kind can lack whatever the function looks up.
        return {}
    return found if isinstance(found, Mapping) else {}


def _count_fitting(state: _State, own: _State) -> int:
    return sum(
        name in own and getattr(own[name], "shape", None) == getattr(v, "shape", None) for name, v in state.items()
    )


def _count_unexpected(state: _State, own: _State) -> int:
    return sum(name not in own for name in state)
