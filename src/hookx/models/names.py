"""What the name of a model tells by itself. No torch: shells complete names with it."""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

TIMM, HUGGING_FACE, OPEN_CLIP, PYTHON = "timm:", "hf:", "open_clip:", "python:"
LISTED_PREFIXES = (TIMM, OPEN_CLIP)  # zoos other than torchvision that have a list of models

# A decorated builder is registered under the name that the decorator gives, or under its own.
_REGISTERED = re.compile(r'^@register_model\((?:(?:name=)?"(\w+)")?.*?^def (\w+)', re.MULTILINE | re.DOTALL)


def may_run_code(ref: str) -> bool:
    """Return whether building a model may run code other than that of an installed model zoo.

    What a plan names is built without asking only if this is False: the plan may come from a stranger.

    Example:
        >>> [may_run_code(ref) for ref in ("resnet18", "timm:resnet18", "hf:./folder", "python:os:system", "model.pt")]
        [False, False, True, True, True]
    """
    return not ref.startswith(LISTED_PREFIXES) and ref not in torchvision_names()


def distribution_of(ref: str) -> str:
    """Return the distribution on PyPI that a model comes from; torchvision also stands for files and custom code."""
    prefix = ref[: ref.find(":") + 1]
    return {TIMM: "timm", HUGGING_FACE: "transformers", OPEN_CLIP: "open-clip-torch"}.get(prefix, "torchvision")


@cache
def torchvision_names() -> tuple[str, ...]:
    """Read the names of torchvision's models out of its source; importing it takes seconds."""
    spec = find_spec("torchvision")
    assert spec is not None and spec.origin is not None
    files = Path(spec.origin).parent.glob("models/**/*.py")
    registered = [found for file in files for found in _REGISTERED.findall(file.read_text(encoding="utf-8"))]
    return tuple(name or function for name, function in registered)
