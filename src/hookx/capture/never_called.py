"""Why a forward pass never calls a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

Reason = Callable[[str, Mapping[str, nn.Module]], str]


def why_never_called(path: str, modules: Mapping[str, nn.Module], of_this_model: Reason) -> str:
    """Return why the module at a path is never called, given all modules by path; '' if unknown.

    `of_this_model` knows reasons of the model's own.
    """
    module, parent_path = modules[path], path.rpartition(".")[0] or "."
    parent = modules[parent_path]
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return f"an nn.{type(module).__name__} only holds other modules"
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention uses its weights directly"
    if reason := of_this_model(path, modules):
        return reason
    if type(module).__name__ in ("QFunctional", "FloatFunctional"):
        return "it is used through its methods, such as add"
    if parent is modules["."] or type(parent) in (nn.ModuleList, nn.ModuleDict):
        return ""
    return why_never_called(parent_path, modules, of_this_model)
