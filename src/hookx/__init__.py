"""Exact per-layer activations of vision models.

The names below are imported when they are first used: `import hookx` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if find_spec("fcntl") is None:
    raise ImportError("hookx needs Linux, or macOS: this system has no file locks of POSIX (on Windows, use WSL)")

from hookx.errors import HookxError

if TYPE_CHECKING:
    from hookx.capture.session import Capture
    from hookx.check.finish import finish
    from hookx.check.inspect import inspect
    from hookx.check.recompute import recompute
    from hookx.check.status import status
    from hookx.check.verify import verify
    from hookx.exporting import export
    from hookx.launch.extract import extract
    from hookx.models import LoadedModel, list_models, load_model
    from hookx.pictures.gallery import Gallery
    from hookx.pictures.models import visualize
    from hookx.pictures.runs import visualize_run
    from hookx.read.activations import Activations
    from hookx.read.features import Features, Join, join
    from hookx.read.features import open_features as open
    from hookx.run.summary import Summary

_HOMES = {
    "Activations": ("hookx.read.activations", "Activations"),
    "Capture": ("hookx.capture.session", "Capture"),
    "Features": ("hookx.read.features", "Features"),
    "Join": ("hookx.read.features", "Join"),
    "Gallery": ("hookx.pictures.gallery", "Gallery"),
    "LoadedModel": ("hookx.models", "LoadedModel"),
    "Summary": ("hookx.run.summary", "Summary"),
    "export": ("hookx.exporting", "export"),
    "extract": ("hookx.launch.extract", "extract"),
    "finish": ("hookx.check.finish", "finish"),
    "inspect": ("hookx.check.inspect", "inspect"),
    "join": ("hookx.read.features", "join"),
    "list_models": ("hookx.models", "list_models"),
    "load_model": ("hookx.models", "load_model"),
    "open": ("hookx.read.features", "open_features"),
    "recompute": ("hookx.check.recompute", "recompute"),
    "status": ("hookx.check.status", "status"),
    "verify": ("hookx.check.verify", "verify"),
    "visualize": ("hookx.pictures.models", "visualize"),
    "visualize_run": ("hookx.pictures.runs", "visualize_run"),
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
    "finish",
    "inspect",
    "join",
    "list_models",
    "load_model",
    "open",
    "recompute",
    "status",
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
