"""What every source of models offers, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from hookx.errors import ModelError
from hookx.models.names import distribution_of
from hookx.options import ModelOptions
from hookx.plan import Preprocessing

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class LoadedModel:
    """A module in eval mode on the CPU, with its preprocessing and the identity of its weights."""

    name: str
    module: nn.Module
    preprocessing: Preprocessing
    weights: str
    """A `WeightsIdentity`, as a plan records it: 'ResNet18_Weights.IMAGENET1K_V1', 'sha256:...'."""
    forward: Callable[[Tensor], Any]
    """Takes a batch (N, 3, H, W) through the module; this is what a run calls."""
    cpu_only: bool = False
    transform: Callable[[Image], Tensor] | None = None
    """Turns an RGB image into pixels (3, H, W) in place of `preprocessing`, which then only describes it."""
    loader: Callable[[Any], Any] | None = None
    """Reads images in place of Pillow; `preprocessing` names it."""
    channels: int | None = None
    """How many the module takes, if the source knows that they are not the three of RGB."""
    notes: tuple[str, ...] = ()
    """Sentences that a user should read, such as what was unwrapped from a checkpoint."""
    random_paths: tuple[str, ...] = ()
    """The modules that the weights lacked."""
    why_never_called: Callable[[str, Mapping[str, nn.Module]], str] = lambda _path, _modules: ""
    """Returns why a forward pass skips the module at a path, given all modules by path; '' where it does not know."""

    @property
    def distribution(self) -> str:
        """The distribution on PyPI that the model comes from; a shard records its version."""
        return distribution_of(self.name)


class Source(Protocol):
    """Where models come from: a zoo, files, someone's code. `hookx.models.loading` asks them in turn.

    Whether a reference may be built without running unknown code is told by `hookx.models.names`, without torch.
    """

    takes_arguments: bool = False
    """Whether its models take `--model-arg`."""
    fits_images: bool = False
    """Whether its own transforms fit images as `--fit` says, or refuse to."""

    def owns(self, ref: str) -> bool:
        """Return whether a reference names one of its models."""
        ...

    def load_model(self, ref: str, weights: str = "default", options: ModelOptions = ModelOptions()) -> LoadedModel:
        """Build a model with the requested weights; see `hookx.models.loading.load_model`."""
        ...

    def skeleton(self, ref: str, weights: str = "default", options: ModelOptions = ModelOptions()) -> LoadedModel:
        """Build a model without memory for its parameters where the source can; otherwise the model itself."""
        ...

    def forget_skeletons(self) -> None:
        """Drop what it keeps of a skeleton for the `load_model` that follows."""
        return

    def release(self) -> None:
        """Put back the mode, device and memory layout of models that someone else may hold; nobody uses them now."""
        return

    def list_models(self, pattern: str = "*") -> dict[str, str]:
        """Return its models that match a glob, each with its kind."""
        raise ModelError(f"'{pattern}' cannot be listed: only torchvision, timm and open_clip have a list")

    def weights_of(self, ref: str) -> list[tuple[str, bool]]:
        """Return the names of a model's weights, default first, each with whether it is in the cache."""
        raise ModelError(f"{ref} has no list of weights: only the models of torchvision, timm and open_clip do")
