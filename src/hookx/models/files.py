"""A file as --model: a checkpoint that names its architecture, a pickled module, an exported program."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from torch import nn
from torchvision import models as zoo

from hookx.errors import ModelError
from hookx.models import torchvision as torchvision_zoo
from hookx.models.checkpoints import (
    architecture_of,
    chosen,
    is_weights_file,
    kind_of,
    read_content,
    sha256_of,
    trusted_note,
)
from hookx.models.exported import load_exported_model
from hookx.models.loaded import LoadedModel, imagenet_preprocessing
from hookx.options import ModelOptions


def is_model_file(ref: str) -> bool:
    """Tell whether --model names a file, rather than an architecture.

    Example:
        >>> is_model_file("checkpoint.pth.tar"), is_model_file("resnet18")
        (True, False)
    """
    if ref in zoo.list_models():
        return False
    names_a_source = re.match(r"\w+:", ref)  # timm:..., python:...
    return Path(ref).is_file() or (not names_a_source and is_weights_file(ref))


def load_model(ref: str, weights: str = "default", options: ModelOptions = ModelOptions()) -> LoadedModel:
    """Build the model that a file holds, with the weights in it.

    Raises:
        ModelError: the file names no architecture, needs to be trusted, or cannot be read.
    """
    return _load(ref, weights, options, shapes_only=False)


def skeleton(ref: str, weights: str = "default", options: ModelOptions = ModelOptions()) -> LoadedModel:
    """Build the model that a file holds, without values where only its architecture is in the file."""
    return _load(ref, weights, options, shapes_only=True)


def _load(ref: str, weights: str, options: ModelOptions, *, shapes_only: bool) -> LoadedModel:
    path = Path(ref)
    if not path.is_file():
        raise ModelError(f"there is no model file '{ref}'", "list the names of models: hookx list-models")
    if weights != "default":
        raise ModelError(
            f"'{ref}' holds its own weights, and --weights {weights} asks for others",
            f"leave out --weights, or name an architecture: --model NAME --weights {weights}",
        )
    if kind_of(path) == "exported program":
        return load_exported_model(path, options)
    content = read_content(path, trust=options.trust_checkpoint, shapes_only=shapes_only)
    architecture = architecture_of(content.value)
    if architecture in zoo.list_models():
        load = torchvision_zoo.skeleton if shapes_only else torchvision_zoo.load_model
        loaded = load(architecture, ref, options)
        note = f"{path.name} says that its architecture is {architecture}, taken to be torchvision's"
        return dataclasses.replace(loaded, notes=(note, *loaded.notes))
    found = chosen(content.value, options.weights_key, path)
    if isinstance(found.value, nn.Module):
        return _pickled(path, found.value, found.entry)
    named = f"'{architecture}', which torchvision does not have" if architecture else "no architecture"
    settings = " (an entry 'arch')" if isinstance(content.value, Mapping) and not architecture else ""
    raise ModelError(
        f"'{ref}' holds weights and names {named}{settings}",
        f"name it: --model {f'timm:{architecture}' if architecture else 'NAME'} --weights {ref}",
    )


def _pickled(path: Path, module: nn.Module, entry: str) -> LoadedModel:
    while isinstance(module, nn.DataParallel):
        module = module.module  # Without it the paths are those of the model itself.
    preprocessing = imagenet_preprocessing()
    return LoadedModel(
        name=path.name,
        module=module.to("cpu").eval(),
        preprocessing=preprocessing,
        weights=f"sha256:{sha256_of(path)}" + (f" ({entry})" if entry else ""),
        forward=module,
        notes=(
            trusted_note(path),
            f"{path.name} does not say how images are prepared; ImageNet's default is taken: {preprocessing}",
        ),
    )
