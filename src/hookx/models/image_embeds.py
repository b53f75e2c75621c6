"""The image embedding of a model of images and texts: what its `get_image_features` makes of its vision tower's output.

hookx runs the vision tower alone. What lies behind it, a projection or nothing, becomes one more module of the tower,
`image_embeds`, so that the addresses within the tower stay what they are.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hookx.errors import one_line
from hookx.models.checkpoints import Weights

NAME = "image_embeds"
_METHOD = "get_image_features"
_STD = 0.02  # of random weights that a model does not initialize itself


class ImageEmbeds(nn.Module):
    """Turns what a vision tower returned into the image embedding, by the whole model's own method."""

    def __init__(self, side: ImageSide, parts: Mapping[str, Any]) -> None:
        super().__init__()
        self.side, self.config = side, side.config
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, of_tower: Any) -> Tensor:
        # The method sets an entry of what its tower returns.
        copied = of_tower if isinstance(of_tower, Tensor) else type(of_tower)(**of_tower)
        object.__setattr__(self, self.side.tower, lambda *_, **__: copied)
        embedding = _embedding_in(getattr(self.side.whole_class, _METHOD)(self, pixel_values=None))
        assert embedding is not None
        return embedding


@dataclass(frozen=True)
class Loaded:
    """What was loaded of a whole model's weights, with the names that they lack and those that were left out.

    The names of missing tensors are those of the tower, with `image_embeds` as one of its modules.
    """

    tower: Any
    embeds: ImageEmbeds
    missing: list[str]
    unexpected: set[str]


@dataclass(frozen=True)
class ImageSide:
    """A class of models of images and texts, and what its method for images uses of them.

    Args:
        tower: the name of the vision tower, and its class.
        parts: the names of the other modules and parameters.
    """

    whole_class: Any
    config: Any
    tower: str
    tower_class: Any
    parts: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parts' tensors within the whole model."""
        whole = self._build_bare()
        return tuple(name for part in self.parts for name in _names_within(part, getattr(whole, part)))

    def build(self) -> ImageEmbeds:
        """Build the parts with random weights."""
        whole = self._build_bare()
        for name, parameter in list(whole._parameters.items()):
            if parameter is not None and name in self.parts:
                setattr(whole, name, nn.Parameter(torch.empty(parameter.shape)))
        for module in whole.children():
            module.to_empty(device="cpu")
        for tensor in [*whole.parameters(), *whole.buffers()]:
            if tensor.is_floating_point() and tensor.device.type == "cpu":
                nn.init.normal_(tensor, std=_STD)
        with contextlib.suppress(Exception):  # Not every class says how; then the values above stand.
            for module in whole.children():
                module.apply(lambda one: self.whole_class._init_weights(whole, one))
        return ImageEmbeds(self, {name: getattr(whole, name) for name in self.parts})

    def load(self, folder: Path, *, with_tower: bool = False, **arguments: Any) -> Loaded:
        """Load the parts from a folder of the whole model's weights, and the tower if asked, but nothing else."""
        kept = (self.tower, *self.parts) if with_tower else self.parts
        whole, report = self._reduced_class(kept).from_pretrained(
            folder,
            config=self.config,
            local_files_only=True,
            output_loading_info=True,
            dtype=torch.float32,
            **arguments,
        )
        embeds = ImageEmbeds(self, {name: getattr(whole, name) for name in self.parts})
        of_tower = f"{self.tower}."
        missing = [
            name.removeprefix(of_tower) if name.startswith(of_tower) else f"{NAME}.{name}"
            for name in sorted(report["missing_keys"])
        ]
        tower = getattr(whole, self.tower) if with_tower else None
        return Loaded(tower, embeds, missing, set(report["unexpected_keys"]))

    def tensors_in(self, weights: Weights) -> dict[str, Any] | None:
        """Return the parts' tensors of a file under the names of a tower with `image_embeds`; None if it lacks them."""
        names = self.names
        prefixes = {name.removesuffix(names[0]) for name in weights.state if name.endswith(names[0])} if names else {""}
        for prefix in sorted(prefixes, key=len):
            if all(prefix + name in weights.state for name in names):
                return {f"{NAME}.{name}": weights.state[prefix + name] for name in names}
        return None

    def _build_bare(self) -> Any:
        with torch.device("meta"):
            return self._reduced_class(self.parts)._from_config(self.config, dtype=torch.float32)

    def _reduced_class(self, kept: tuple[str, ...]) -> Any:
        """Return the class with some of its modules and parameters, so that the weights of others are not loaded."""
        whole_class = self.whole_class

        def initialize(self: Any, config: Any, *arguments: Any, **keywords: Any) -> None:
            whole_class.__init__(self, config, *arguments, **keywords)
            for kind in (self._modules, self._parameters):
                for name in [name for name in kind if name not in kept]:
                    del kind[name]
            self.all_tied_weights_keys = {}

        def initialize_weights(self: Any, module: nn.Module) -> None:
            with contextlib.suppress(AttributeError):  # The model as a whole initializes what has been taken out, too.
                whole_class._init_weights(self, module)

        methods = {
            "__init__": initialize,
            "_init_weights": initialize_weights,
            # They are about language models, which have been taken out.
            **dict.fromkeys(("tie_weights", "get_input_embeddings", "get_output_embeddings"), lambda *_, **__: None),
            "__module__": whole_class.__module__,
        }
        return type(whole_class.__name__, (whole_class,), methods)


def find_image_side(whole_class: Any, config: Any, size_px: tuple[int, int]) -> ImageSide | str:
    """Return what turns the vision tower's output into the image embedding, or why that is not known."""
    if not (hasattr(whole_class, _METHOD) and hasattr(whole_class, "get_text_features")):
        return f"{whole_class.__name__} has no embedding that images and texts share"
    try:
        with torch.device("meta"):
            whole = whole_class._from_config(config).eval()
            recorder = _Recorder(whole)
            with torch.no_grad():
                returned = getattr(whole_class, _METHOD)(recorder, pixel_values=torch.empty((2, 3, *size_px)))
    except Exception as error:  # Another input than pixels, an extra that is missing, a method of another kind.
        return f"the image embedding of {whole_class.__name__} is not known: {one_line(error)}"
    embedding, used = _embedding_in(returned), recorder.used
    if embedding is None or embedding.ndim not in (2, 3) or embedding.shape[0] != 2 or not used:
        return f"{whole_class.__name__}.{_METHOD} returns no image embedding"
    tower, *parts = used
    return ImageSide(whole_class, config, tower, type(getattr(whole, tower)), tuple(parts))


def find_whole_class(tower_class: Any, config: Any) -> Any:
    """Return the class of models of images and texts that a vision tower belongs to, or None."""
    for found in vars(sys.modules[tower_class.__module__]).values():
        whole_config = getattr(found, "config_class", None)
        towers = getattr(whole_config, "sub_configs", None) or {}
        if (
            isinstance(found, type)
            and hasattr(found, _METHOD)
            and hasattr(found, "get_text_features")
            and towers.get("vision_config") is type(config)
        ):
            return found
    return None


def find_tower_class(side: ImageSide, config: Any) -> Any:
    """Return the class of a vision tower that takes pixels and can be loaded alone, or None."""
    for found in (side.tower_class, *vars(sys.modules[side.tower_class.__module__]).values()):
        is_tower = isinstance(found, type) and found.__name__.endswith(("VisionModel", "ImageModel"))
        if is_tower and found.config_class is type(config) and found.main_input_name == "pixel_values":
            return found
    return None


class _Recorder:
    """Stands in for a model while one of its methods runs, and records which of its modules and parameters it uses."""

    def __init__(self, whole: nn.Module) -> None:
        self._whole = whole
        self.used: dict[str, None] = {}

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._whole, name)
        if isinstance(value, nn.Module | Tensor):
            self.used[name] = None
        return value


def _embedding_in(returned: Any) -> Tensor | None:
    """Return the embedding in what `get_image_features` returns: before transformers 5 the tensor itself."""
    if isinstance(returned, Tensor):
        return returned
    pooled = getattr(returned, "pooler_output", None)
    return pooled if isinstance(pooled, Tensor) else None


def _names_within(name: str, part: Any) -> list[str]:
    return [name] if isinstance(part, Tensor) else [f"{name}.{inner}" for inner in part.state_dict()]
