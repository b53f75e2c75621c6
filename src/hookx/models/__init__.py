"""A model's name and its weights -> a module in eval mode, and what it expects of an image.

The only package that knows model zoos. What needs torch is imported on first use, so that `hookx.models.names` answers
without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hookx.models.names import may_run_code
from hookx.options import ModelOptions

if TYPE_CHECKING:
    from hookx.models.loading import (
        borrowed_models,
        forget_skeletons,
        list_models,
        load_model,
        release_models,
        skeleton,
        weights_of,
    )
    from hookx.models.source import LoadedModel

__all__ = [
    "LoadedModel",
    "ModelOptions",
    "borrowed_models",
    "forget_skeletons",
    "list_models",
    "load_model",
    "may_run_code",
    "release_models",
    "skeleton",
    "weights_of",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'hookx.models' has no attribute '{name}'")
    return getattr(import_module("hookx.models.loading"), name)
