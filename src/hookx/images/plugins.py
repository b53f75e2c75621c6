"""Formats that Pillow reads by plug-ins of their own, if these are installed: HEIC, and JPEG XL."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from typing import Any

# Each process decodes one image at a time, so a decoder with threads of its own would only be in the way of others.
_ONE_THREAD = 1
_MODULES = {"pillow_heif": (".heic", ".heif", ".hif"), "pillow_jxl": (".jxl",)}
EXTRA_SUFFIXES = tuple(suffix for suffixes in _MODULES.values() for suffix in suffixes)
INSTALL = "pip install 'hookx-vision[heif]'"


@functools.cache
def plugin_suffixes() -> frozenset[str]:
    """Return the suffixes of the formats whose plug-ins are installed; imports none of them."""
    return frozenset(
        suffix for module, suffixes in _MODULES.items() if importlib.util.find_spec(module) for suffix in suffixes
    )


@functools.cache
def register_plugins() -> None:
    """Let Pillow open the formats whose plug-ins are installed; an image of one that does not work is a failure."""
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener(decode_threads=_ONE_THREAD)
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_jxl")  # It registers itself.
        plugin: Any = importlib.import_module("pillow_jxl.JpegXLImagePlugin")
        plugin.DECODE_THREADS = 0  # none beside its own
