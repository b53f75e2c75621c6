"""A model's name and its weights -> a module in eval mode, and what it expects of an image.

The only package that knows model zoos. The names below are imported on first use, so that `hookx.models.names` answers
without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hookx.models.loading import list_models, load_model, skeleton, weights_of
    from hookx.models.names import may_run_code
    from hookx.models.source import LoadedModel
    from hookx.options import ModelOptions

_HOMES = {
    "LoadedModel": "hookx.models.source",
    "ModelOptions": "hookx.options",
    "list_models": "hookx.models.loading",
    "load_model": "hookx.models.loading",
    "may_run_code": "hookx.models.names",
    "skeleton": "hookx.models.loading",
    "weights_of": "hookx.models.loading",
}

__all__ = ["LoadedModel", "ModelOptions", "list_models", "load_model", "may_run_code", "skeleton", "weights_of"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hookx.models' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
