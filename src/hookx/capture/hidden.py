"""What keeps a layer's tensors from a capture: programs that call no hooks, and outputs that hold no tensor."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hookx.capture.runner import module_classes
from hookx.capture.tensors import Unusable
from hookx.errors import LayerError
from hookx.layers.select import Selector, matched_paths

_WRAPPED = "_orig_mod"  # where the module that torch.compile returns keeps the one that it was given


def match_visible(selector: Selector, model: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the paths that a selector matches; raise `LayerError` for one whose hooks would not run."""
    class_names = module_classes(model)
    try:
        paths = matched_paths([selector], class_names, "this model")
    except LayerError:
        # The user may write a path as it is without torch.compile: conv for _orig_mod.conv.
        within = {".".join(name for name in path.split(".") if name != _WRAPPED): path for path in class_names}
        unwrapped = {path: class_names[original] for path, original in within.items() if path != original and path}
        for path in selector.paths(unwrapped):
            _refuse_hidden(modules, within[path])
        raise
    for path in paths:
        _refuse_hidden(modules, path)
    return paths


def _refuse_hidden(modules: Mapping[str, nn.Module], path: str) -> None:
    """Raise if a layer runs within a program that calls no hooks, or in copies of the model."""
    names = path.split(".") if path != "." else []
    for outer in [".", *(".".join(names[:length]) for length in range(1, len(names) + 1))]:
        module, in_python = modules[outer], "model" if outer == "." else f"model.{outer}"
        inner = path.removeprefix(f"{outer}.") if outer != "." else path
        program = f"runs '{outer}' as one program, in which no layers are called"
        if hasattr(module, _WRAPPED) and outer != path:
            inner = inner.removeprefix(f"{_WRAPPED}.").replace(_WRAPPED, ".")
            raise LayerError(
                f"cannot capture '{path}': torch.compile {program}",
                f"capture and call {in_python}.{_WRAPPED}: hookx.Capture({in_python}.{_WRAPPED}, '{inner}')",
            )
        if getattr(module, "_compiled_call_impl", None):
            raise LayerError(
                f"cannot capture '{path}': torch.compile {program}",
                f"make the capture before {in_python}.compile(), or undo that, as there is no {_WRAPPED} to call: "
                f"{in_python}._compiled_call_impl = None",
            )
        if isinstance(module, torch.jit.ScriptModule) and outer != path:
            raise LayerError(
                f"cannot capture '{path}': TorchScript {program}",
                "capture and call the module that was scripted or traced",
            )
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1 and outer != path:
            raise LayerError(
                f"cannot capture '{path}': nn.DataParallel runs copies of '{outer}' side by side on "
                f"{len(module.device_ids)} devices, each with a part of the batch",
                f"capture and call {in_python}.module, or use DistributedDataParallel",
            )


def describe_compiled_calls() -> str:
    """Return how a layer can have run without its hooks, if torch.compile has compiled anything; else ''."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None or not dynamo.utils.counters["frames"]["total"]:
        return ""
    return ", or only in code that torch.compile had compiled before the capture was made, which calls no hooks"


AFTER_COMPILED_CALLS = (
    f"call the model itself (the {_WRAPPED} of a compiled one), or torch.compiler.reset() and call it again"
)


def describe_no_tensor(value: Any, found: list[Unusable], verb: str) -> str:
    """Return what a layer returned, or was given, in place of tensors."""
    if found:
        return "; ".join(dict.fromkeys(one.reason for one in found))
    what = "None" if value is None else f"a {type(value).__name__}"
    holds = ", which holds no tensor" if isinstance(value, tuple | list | dict | set | frozenset) else ""
    holds = ", which holds no tensor" if not holds and hasattr(value, "__dict__") else holds
    return f"its layer {verb} {what}{holds or (', not a tensor' if value is not None else '')}"
