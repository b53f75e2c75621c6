"""What the zoos have in common: an architecture is found by name, built, and given weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hookx.models.checkpoints import Weights, is_weights_file, read_weights
from hookx.models.fitting import Filled, fill, without_prefix
from hookx.models.source import LoadedModel, Source, build_without_memory
from hookx.options import ModelOptions
from hookx.plan import Preprocessing, WeightsIdentity

Prepared = tuple[Preprocessing, Callable[[Any], Tensor] | None, tuple[str, ...]]


class Architecture(ABC):
    """A model of a zoo before it has weights."""

    ref: str
    """The name of the model, with the zoo's prefix."""
    arguments: Mapping[str, object]
    """What the user passed with `--model-arg`; part of the weights' identity."""
    notes: tuple[str, ...]
    """What a user should read about the architecture."""

    @abstractmethod
    def build(self) -> nn.Module:
        """Build the module with random weights, drawn from torch's global generator."""

    @abstractmethod
    def build_published(self, options: ModelOptions) -> Filled:
        """Build the module with published weights.

        Raises:
            ModelError: the weights cannot be downloaded, read, or made to fit.
        """

    def build_bare(self) -> nn.Module:
        """Build the module on the meta device."""
        return build_without_memory(self.build)

    def fit(self, weights: Weights) -> tuple[Weights, Architecture]:
        """Rename a file's tensors to match the architecture, and adapt the architecture to the file."""
        return without_prefix(weights, self.build_bare().state_dict().keys(), self.ref), self

    @abstractmethod
    def prepare(self, module: nn.Module) -> Prepared:
        """Return the preprocessing, the transform if a plan cannot express it, and notes."""

    def finish(self, filled: Filled) -> LoadedModel:
        """Put a module with its weights into eval mode, and describe it."""
        module = filled.module.eval()
        preprocessing, transform, notes = self.prepare(module)
        return LoadedModel(
            name=self.ref,
            module=module,
            preprocessing=preprocessing,
            weights=str(filled.identity.with_arguments(self.arguments)),
            forward=module,
            transform=transform,
            notes=(*self.notes, *filled.notes, *notes),
            random_paths=filled.random_paths,
        )


class Zoo(Source, Protocol):
    """A source whose architectures are found by name and can be built without weights."""

    @abstractmethod
    def find(self, ref: str, weights: str, options: ModelOptions) -> Architecture:
        """Find an architecture by name, in the variant that the weights need.

        Raises:
            ModelError: there is no such model, or it has no such published weights.
        """

    def load_model(self, ref: str, weights: str = "default", options: ModelOptions = ModelOptions()) -> LoadedModel:
        """Build an architecture with random weights, those of a file, or published ones."""
        architecture = self.find(ref, weights, options)
        random = WeightsIdentity.of_seed(options.seed)
        if is_weights_file(weights):
            found, architecture = architecture.fit(read_weights(weights, options))
            torch.manual_seed(options.seed)  # For what the file may lack.
            filled = fill(architecture.build(), found, architecture.ref, options, str(random))
        elif weights == "none":
            torch.manual_seed(options.seed)
            filled = Filled(architecture.build(), random)
        else:
            filled = architecture.build_published(options)
        return architecture.finish(filled)

    def skeleton(self, ref: str, weights: str = "default", options: ModelOptions = ModelOptions()) -> LoadedModel:
        """Build an architecture on the meta device; only the shapes of a weights file are read, if it exists."""
        architecture = self.find(ref, weights, options)
        if is_weights_file(weights) and Path(weights).is_file():
            _, architecture = architecture.fit(read_weights(weights, options, shapes_only=True))
        return architecture.finish(Filled(architecture.build_bare(), WeightsIdentity("none")))


def names_published(weights: str) -> bool:
    """Return whether `--weights` names published weights: the default ones, or some by name."""
    return weights != "none" and not is_weights_file(weights)
