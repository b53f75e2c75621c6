"""What every source of models returns, and how a model is built without memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hookx.plan import Preprocessing

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class LoadedModel:
    """A module in eval mode on the CPU, with the preprocessing and the identity of its weights.

    `forward` takes a batch (N, 3, H, W) through the module; it is what a run calls. `transform`, if there is one,
    turns an RGB image into pixels (3, H, W) in place of what `preprocessing` would do, and is described by it. `notes`
    are sentences that a user should read, such as what was unwrapped from a checkpoint. The modules of `random_paths`
    were not in the weights.
    """

    name: str
    module: nn.Module
    preprocessing: Preprocessing
    weights: str  # 'ResNet18_Weights.IMAGENET1K_V1', 'random (seed 0)', 'sha256:...'
    forward: Callable[[Tensor], Any]
    cpu_only: bool = False
    transform: Callable[[Image], Tensor] | None = None
    notes: tuple[str, ...] = ()
    random_paths: tuple[str, ...] = ()


class Unallocated(TorchFunctionMode):
    """Let the factories that parameters come from allocate nothing.

    `torch.device("meta")` would do it for every tensor; but RegNet's constructor computes its widths with small real
    tensors (`torch.arange`, `torch.tensor`), which have to keep their values.
    """

    _FACTORIES: frozenset[Callable[..., Any]] = frozenset(
        {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn}
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._FACTORIES and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def imagenet_preprocessing(side_px: int = 224) -> Preprocessing:
    """Return what most classifiers of photographs were trained with, for a model that does not say.

    Example:
        >>> str(imagenet_preprocessing())
        'resize 256 (bilinear), crop 224, mean 0.485,0.456,0.406, std 0.229,0.224,0.225'
    """
    return Preprocessing(
        resize_px=round(side_px * 256 / 224),
        crop_px=side_px,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        interpolation="bilinear",
    )
