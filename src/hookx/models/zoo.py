"""What the zoos have in common: an architecture is found by name, built, and given weights."""

from __future__ import annotations

import contextlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, Self
from urllib.parse import urlparse

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hookx.errors import ModelError, one_line
from hookx.models.checkpoints import Weights, is_weights_file, read_weights
from hookx.models.fitting import Filled, fill, tensors_in_both, without_prefix
from hookx.models.source import LoadedModel, Source
from hookx.models.unexpected import OPTION
from hookx.options import ModelOptions
from hookx.plan import Preprocessing, WeightsIdentity

Prepared = tuple[Preprocessing, Callable[[Any], Tensor] | None, tuple[str, ...]]
_MAX_CLASSES_TRIED = 8


@dataclass(frozen=True, kw_only=True)
class Architecture(ABC):
    """A model of a zoo before it has weights."""

    ref: str
    """The name of the model, with the zoo's prefix."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """What the user passed with `--model-arg`; part of the weights' identity."""
    variant: Mapping[str, Any] = field(default_factory=dict)
    """The arguments that the weights need."""
    notes: tuple[str, ...] = ()
    """What a user should read about the architecture."""
    fitting_notes: tuple[str, ...] = ()
    """What a user should read about the variant; a plan holds it behind the notes on the weights."""

    @property
    def channels(self) -> int | None:
        """How many the model takes, if an argument says so."""
        return None

    @abstractmethod
    def build(self) -> nn.Module:
        """Build the module with random weights, drawn from torch's global generator."""

    @abstractmethod
    def build_published(self, options: ModelOptions) -> Filled:
        """Build the module with published weights, downloaded unless they are in the cache."""

    @abstractmethod
    def prepare(self, module: nn.Module) -> Prepared:
        """Return the preprocessing, the transform if a plan cannot express it, and notes."""

    def build_bare(self) -> nn.Module:
        """Build the module on the meta device, without memory for its parameters."""
        with _Unallocated():
            module = self.build()
        return module.to("meta")

    def fit(self, weights: Weights) -> tuple[Weights, Architecture]:
        """Rename a file's tensors to match the architecture, and adapt the architecture to the file."""
        return without_prefix(weights, self.build_bare().state_dict().keys(), self.ref), self

    def adapt_classes(self, weights: Weights, own: Mapping[str, Any], classes: int) -> Self:
        """Adapt the number of classes to a file's classifier, if that is the only difference in shape.

        Args:
            weights: under the model's names.
            own: the state dict of the model, which is for `classes` classes.
        """
        pairs = {name: (there.shape, here.shape) for name, there, here in tensors_in_both(weights, own)}
        other = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
        if any(there[1:] != here[1:] or not here or not there for there, here in other.values()):
            return self
        # A detector's head has several outputs per class.
        counts = {
            there[0] * classes // here[0]
            for there, here in other.values()
            if here[0] and not there[0] * classes % here[0]
        }
        for count in sorted(counts - {0})[:_MAX_CLASSES_TRIED]:
            adapted = replace(self, variant={**self.variant, "num_classes": count})
            built = adapted.build_bare().state_dict()
            changed = {n for n, tensor in built.items() if isinstance(tensor, Tensor) and tensor.shape != own[n].shape}
            if changed == other.keys() and all(built[name].shape == other[name][0] for name in changed):
                note = f"{self.ref} is built for {count} classes, as the classifier in {weights.file.name} is"
                return replace(adapted, fitting_notes=(note,))
        return self

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
            channels=self.channels,
            notes=(*self.notes, *filled.notes, *self.fitting_notes, *notes),
            random_paths=filled.random_paths,
        )


class Zoo(Source, Protocol):
    """A source whose architectures are found by name and can be built without weights."""

    @abstractmethod
    def find(self, ref: str, published: str, options: ModelOptions) -> Architecture:
        """Find an architecture by name, in the variant that its weights need.

        Args:
            ref: the name, with the zoo's prefix.
            published: 'default' or the name of published weights; '' for random weights and those of a file.
            options: the arguments to build the architecture with.

        Raises:
            ModelError: there is no such model, or it has no such published weights.
        """

    def load_model(self, ref: str, weights: str = "default", options: ModelOptions = ModelOptions()) -> LoadedModel:
        """Build an architecture with random weights, those of a file, or published ones."""
        architecture = self.find(ref, _published(weights), options)
        random = WeightsIdentity.of_seed(options.seed)
        if is_weights_file(weights):
            found, architecture = architecture.fit(read_weights(weights, options))
            torch.manual_seed(options.seed)  # For what the file may lack.
            filled = fill(architecture.build(), found, architecture.ref, options, str(random))
            return architecture.finish(filled)
        refuse_without_file(options)
        if weights == "none":
            torch.manual_seed(options.seed)
            filled = Filled(architecture.build(), random)
        else:
            filled = architecture.build_published(options)
        return architecture.finish(filled)

    def skeleton(self, ref: str, weights: str = "default", options: ModelOptions = ModelOptions()) -> LoadedModel:
        """Build an architecture on the meta device; only the shapes of a weights file are read, if it exists."""
        architecture = self.find(ref, _published(weights), options)
        if is_weights_file(weights) and Path(weights).is_file():
            _, architecture = architecture.fit(read_weights(weights, options, shapes_only=True))
        elif not is_weights_file(weights):
            refuse_without_file(options)
        return architecture.finish(Filled(architecture.build_bare(), WeightsIdentity("none")))


def _published(weights: str) -> str:
    return "" if weights == "none" or is_weights_file(weights) else weights


def refuse_without_file(options: ModelOptions) -> None:
    """Refuse an option that is about the tensors of a weights file where there is none."""
    if options.ignore_unexpected:
        said = ",".join(options.ignore_unexpected)
        raise ModelError(f"{OPTION} {said} is about the tensors of a weights file, and none is read", "--weights FILE")


class _Unallocated(TorchFunctionMode):
    """Let the factories that parameters come from allocate nothing.

    `torch.device("meta")` would do so for every tensor, but RegNet's constructor computes its widths with small real
    tensors (`torch.arange`, `torch.tensor`).
    """

    _FACTORIES = frozenset({torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._FACTORIES and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def no_such_weights(ref: str, weights: str, known: Iterable[str]) -> ModelError:
    return ModelError(
        f"{ref} has no weights '{weights}'; it has: {', '.join(known) or 'none'}",
        "also: default, none (random), or a file (.safetensors, .pt, .pth)",
    )


def cached_download(url: str) -> Path:
    """Return where torch.hub keeps the file of a URL."""
    return Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(url).path).name)


@contextlib.contextmanager
def explaining(problem: str, *next_steps: str) -> Iterator[None]:
    """Turn what a library raises into an error that says what failed; files and networks can raise anything."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{problem}: {one_line(error)}", *next_steps) from error


def import_extra(library: str, zoo: str) -> Any:
    """Import the library of a zoo, which is an extra of hookx."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module(library)
    except ImportError as error:
        step = f"install it as an extra of hookx: pip install 'hookx-vision[{library}]'"
        if error.name == library:
            raise ModelError(f"models of {zoo} need {library}, which is not installed", step) from None
        raise ModelError(f"{library} cannot be imported: {one_line(error)}", step) from None
