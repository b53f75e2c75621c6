"""Exact per-layer activations of vision models.

The names below are imported when they are first used: `import hookx` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hookx.errors import HookxError

if TYPE_CHECKING:
    from hookx.activations import Activations
    from hookx.capture import Capture
    from hookx.exporting import export
    from hookx.extraction import Summary, extract
    from hookx.features import Features, Join, join
    from hookx.features import open_features as open
    from hookx.inspection import inspect
    from hookx.models import LoadedModel, list_models, load_model
    from hookx.recomputation import recompute
    from hookx.verification import verify
    from hookx.visualization import Gallery, visualize, visualize_run

_HOMES = {
    "Activations": ("hookx.activations", "Activations"),
    "Capture": ("hookx.capture", "Capture"),
    "Features": ("hookx.features", "Features"),
    "Join": ("hookx.features", "Join"),
    "Gallery": ("hookx.visualization", "Gallery"),
    "LoadedModel": ("hookx.models", "LoadedModel"),
    "Summary": ("hookx.extraction", "Summary"),
    "export": ("hookx.exporting", "export"),
    "extract": ("hookx.extraction", "extract"),
    "inspect": ("hookx.inspection", "inspect"),
    "join": ("hookx.features", "join"),
    "list_models": ("hookx.models", "list_models"),
    "load_model": ("hookx.models", "load_model"),
    "open": ("hookx.features", "open_features"),
    "recompute": ("hookx.recomputation", "recompute"),
    "verify": ("hookx.verification", "verify"),
    "visualize": ("hookx.visualization", "visualize"),
    "visualize_run": ("hookx.visualization", "visualize_run"),
}

__all__ = [
    "Activations",
    "Capture",
    "Features",
    "Gallery",
    "HookxError",
    "Join",
    "LoadedModel",
    "Summary",
    "export",
    "extract",
    "inspect",
    "join",
    "list_models",
    "load_model",
    "open",
    "recompute",
    "verify",
    "visualize",
    "visualize_run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hookx' has no attribute '{name}'")
    home, attribute = _HOMES[name]
    value = getattr(import_module(home), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
