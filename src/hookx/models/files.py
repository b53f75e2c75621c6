"""A file as a model: a checkpoint that names its architecture, or a pickled module."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from hookx.errors import ModelError
from hookx.models.checkpoints import (
    architecture_of,
    choose,
    is_weights_file,
    read_content,
    sha256_of,
    trusted_note,
)
from hookx.models.preprocessing import imagenet_preprocessing
from hookx.models.source import LoadedModel, Source
from hookx.models.torchvision import Torchvision
from hookx.options import ModelOptions
from hookx.plan import WeightsIdentity


def is_model_file(ref: str) -> bool:
    """Return whether a reference names a file, which need not exist.

    Example:
        >>> is_model_file("checkpoint.pth.tar"), is_model_file("resnet18")
        (True, False)
    """
    return Path(ref).is_file() or (not re.match(r"\w+:", ref) and is_weights_file(ref))


def check_own_weights(ref: str, weights: str) -> None:
    """Refuse a model file that does not exist, and weights other than its own."""
    if not Path(ref).is_file():
        raise ModelError(f"there is no model file '{ref}'", "list the names of models: hookx list-models")
    if weights != "default":
        raise ModelError(
            f"'{ref}' holds its own weights; --weights {weights} asks for others",
            f"leave out --weights, or name an architecture: --model NAME --weights {weights}",
        )


class ModelFiles(Source):
    """Files that hold weights, and the architecture by name or as a pickled module."""

    def owns(self, ref: str) -> bool:
        return is_model_file(ref)

    def load_model(self, ref: str, weights: str = "default", options: ModelOptions = ModelOptions()) -> LoadedModel:
        return self._load(ref, weights, options, shapes_only=False)

    def skeleton(self, ref: str, weights: str = "default", options: ModelOptions = ModelOptions()) -> LoadedModel:
        return self._load(ref, weights, options, shapes_only=True)

    def _load(self, ref: str, weights: str, options: ModelOptions, *, shapes_only: bool) -> LoadedModel:
        check_own_weights(ref, weights)
        path, zoo = Path(ref), Torchvision()
        content = read_content(path, trust=options.trust_checkpoint, shapes_only=shapes_only)
        architecture = architecture_of(content.value)
        if zoo.owns(architecture):
            load = zoo.skeleton if shapes_only else zoo.load_model
            loaded = load(architecture, ref, options)
            note = f"{path.name} names the architecture {architecture}, taken to be torchvision's"
            return dataclasses.replace(loaded, notes=(note, *loaded.notes))
        found = choose(content.value, options.weights_key, path)
        if isinstance(found.value, nn.Module):
            return _unwrap_pickled(path, found.value, found.entry)
        named = f"'{architecture}', which torchvision does not have" if architecture else "no architecture"
        settings = " (an entry 'arch')" if isinstance(content.value, Mapping) and not architecture else ""
        raise ModelError(
            f"'{ref}' holds weights and names {named}{settings}",
            f"name it: --model {f'timm:{architecture}' if architecture else 'NAME'} --weights {ref}",
        )


def _unwrap_pickled(path: Path, module: nn.Module, entry: str) -> LoadedModel:
    while isinstance(module, nn.DataParallel):
        module = module.module  # So that paths are those of the model itself.
    preprocessing = imagenet_preprocessing()
    return LoadedModel(
        name=path.name,
        module=module.to("cpu").eval(),
        preprocessing=preprocessing,
        weights=str(WeightsIdentity.of_file(sha256_of(path), entry)),
        forward=module,
        notes=(
            trusted_note(path),
            f"{path.name} does not say how to prepare images; assumed ImageNet's default: {preprocessing}",
        ),
    )
