"""What the name of a model tells by itself. No torch: shells complete names with it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

TIMM, HUGGING_FACE, PYTHON = "timm:", "hf:", "python:"
LISTED_PREFIXES = (TIMM,)  # zoos other than torchvision that have a list of models


def may_run_code(ref: str) -> bool:
    """Return whether building a model may run code other than that of an installed model zoo.

    What a plan names is built without asking only if this is False: the plan may come from a stranger.

    Example:
        >>> [may_run_code(ref) for ref in ("resnet18", "timm:resnet18", "hf:./folder", "python:os:system", "model.pt")]
        [False, False, True, True, True]
    """
    return not ref.startswith(TIMM) and ref not in torchvision_names()


def distribution_of(ref: str) -> str:
    """Return the distribution on PyPI that a model comes from; torchvision also stands for files and custom code.

    Example:
        >>> distribution_of("resnet18"), distribution_of("timm:resnet18"), distribution_of("hf:./folder")
        ('torchvision', 'timm', 'transformers')
    """
    prefix = ref[: ref.find(":") + 1]
    return {TIMM: "timm", HUGGING_FACE: "transformers"}.get(prefix, "torchvision")


@cache
def torchvision_names() -> tuple[str, ...]:
    """Read the names of torchvision's models out of its source; importing it takes seconds.

    Example:
        >>> "resnet18" in torchvision_names()
        True
    """
    return tuple(_registered_names())


def _registered_names() -> Iterator[str]:
    spec = find_spec("torchvision")
    assert spec is not None and spec.origin is not None
    for file in Path(spec.origin).parent.glob("models/**/*.py"):
        for registered in file.read_text(encoding="utf-8").split("\n@register_model(")[1:]:
            if name := re.match(r'(?:name=)?"(\w+)"', registered) or re.search(r"^def (\w+)", registered, re.MULTILINE):
                yield name[1]
