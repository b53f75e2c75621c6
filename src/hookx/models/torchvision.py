"""torchvision's models, with published weights, random ones, or those of a file."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import re
import socket
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torchvision import models as zoo
from torchvision.models.vision_transformer import interpolate_embeddings

from hookx.errors import ModelError, closest, one_line
from hookx.models.checkpoints import Weights, sha256_of
from hookx.models.fitting import Filled, without_prefix
from hookx.models.preprocessing import from_preset, sides_px, size_text
from hookx.models.source import LoadedModel
from hookx.models.zoo import Architecture, Prepared, Zoo, cached_download, explaining, no_such_weights
from hookx.options import ModelOptions
from hookx.plan import Preprocessing, WeightsIdentity

log = logging.getLogger("hookx")

_DOWNLOAD_TIMEOUT_SECONDS = 30.0
_KINDS = {
    "torchvision.models": "classification",
    "torchvision.models.segmentation": "segmentation",
    "torchvision.models.quantization": "quantized",
    "torchvision.models.detection": "detection",
    "torchvision.models.video": "video",
    "torchvision.models.optical_flow": "optical flow",
}
_BUILT_FOR_PX = 224  # by the builders of vision transformers
_POSITIONS = "encoder.pos_embedding"
_REFUSED = {"video": "video clips", "optical flow": "pairs of video frames"}


class Torchvision(Zoo):
    """The models that `torchvision.models.list_models` names."""

    def owns(self, ref: str) -> bool:
        return ref in zoo.list_models()

    def list_models(self, pattern: str = "*") -> dict[str, str]:
        """Return every model, sorted by name, with its kind; the pattern is ignored."""
        return {name: _kind_of(name) for name in sorted(zoo.list_models())}

    def weights_of(self, ref: str) -> list[tuple[str, bool]]:
        enum = zoo.get_model_weights(ref)
        default_first = sorted(enum, key=lambda entry: entry is not enum.DEFAULT)
        return [(entry.name, cached_download(entry.url).is_file()) for entry in default_first]

    def find(self, ref: str, published: str, options: ModelOptions = ModelOptions()) -> TorchvisionModel:
        if ref not in zoo.list_models():
            similar = closest(ref, zoo.list_models())
            raise ModelError(f"no model is called '{ref}'; closest: {similar}", "list them all: hookx list-models")
        kind, enum = _kind_of(ref), zoo.get_model_weights(ref)
        if kind in _REFUSED:
            raise ModelError(f"{ref} takes {_REFUSED[kind]}; hookx reads still images")
        if not published:
            return TorchvisionModel(ref=ref, entry=enum.DEFAULT).at_size(options)
        name = "DEFAULT" if published == "default" else published.removeprefix(f"{enum.__name__}.")
        if name not in enum.__members__:
            raise no_such_weights(ref, published, [entry.name for entry in enum])
        # The auxiliary head of published segmentation models also runs in eval mode, so it is one of their layers.
        model = TorchvisionModel(ref=ref, entry=enum[name], variant=_with_auxiliary_head(ref)).at_size(options)
        if model.has_positions and model.size_px and not options.resize_positions:
            raise model.explain_positions()
        return model


def _kind_of(ref: str) -> str:
    package = zoo.get_model_builder(ref).__module__.rpartition(".")[0]
    return _KINDS.get(package, package)


def _with_auxiliary_head(ref: str) -> dict[str, Any]:
    """Return the arguments that build an architecture with the auxiliary head that its default leaves out."""
    return {"aux_loss": True} if _kind_of(ref) == "segmentation" and not ref.startswith("lraspp") else {}


@dataclass(frozen=True, kw_only=True)
class TorchvisionModel(Architecture):
    """An architecture, and the weights whose preprocessing it takes."""

    entry: Any
    """A member of the architecture's weights enum."""
    transforms_input: bool = False
    """Whether GoogLeNet and Inception renormalize their input, as their published weights need."""
    size_px: tuple[int, int] | None = None
    """Another size of the input than that of `entry`."""
    resizes_positions: bool = False

    @property
    def has_positions(self) -> bool:
        """Whether it has an embedding for each place of a grid, and so takes images of a single size."""
        return self.ref.startswith("vit_")

    @property
    def own_size_px(self) -> tuple[int, int]:
        return sides_px(self.entry.transforms().crop_size, self.ref)

    def at_size(self, options: ModelOptions) -> TorchvisionModel:
        """Return the architecture for the size of --size."""
        size_px = options.size_px
        if size_px is None:
            return self
        if _kind_of(self.ref) == "detection":
            raise ModelError(f"{self.ref} resizes images itself, so --size cannot change what it sees")
        if _kind_of(self.ref) == "segmentation" or size_px == self.own_size_px:
            return self  # Images of any size, or its own.
        if self.has_positions and size_px[0] != size_px[1]:
            raise ModelError(f"{self.ref} takes square images, not {size_text(size_px)}", "try a model of timm")
        return replace(self, size_px=size_px, resizes_positions=options.resize_positions)

    def explain_positions(self) -> ModelError:
        size_px = self.size_px or self.own_size_px
        fitting = [one.name for one in type(self.entry) if sides_px(one.transforms().crop_size, self.ref) == size_px]
        steps = [f"or take weights for that size: --weights {fitting[0]}"] if fitting else []
        return ModelError(
            f"the weights of {self.ref} have position embeddings for images of {size_text(self.own_size_px)}, not "
            f"{size_text(size_px)}",
            "resize them, as torchvision's interpolate_embeddings does: --resize-positions",
            *steps,
        )

    def build(self) -> nn.Module:
        arguments, kind = dict(self.variant), _kind_of(self.ref)
        if kind in ("segmentation", "detection"):
            arguments["weights_backbone"] = None  # Without this argument, those of ImageNet would be downloaded.
        if kind == "quantized":
            arguments["quantize"] = True
        if self.has_positions and (side_px := (self.size_px or self.own_size_px)[0]) != _BUILT_FOR_PX:
            # A vision transformer accepts a single size.
            arguments["image_size"] = side_px
        if self.ref.startswith("maxvit_") and self.size_px:
            arguments["input_size"] = self.size_px
        if self.size_px is None:
            module = _get_model(self.ref, weights=None, **arguments)
        else:
            problem = f"{self.ref} cannot be built for images of {size_text(self.size_px)}"
            with explaining(problem, "try another --size"):
                module = _get_model(self.ref, weights=None, **arguments)
        if hasattr(module, "transform_input"):
            setattr(module, "transform_input", self.transforms_input)  # noqa: B010
        return module

    def build_bare(self) -> nn.Module:
        """Build the module on the meta device; for real if it is quantized, since integer layers need values."""
        return self.build() if _kind_of(self.ref) == "quantized" else super().build_bare()

    def build_published(self, options: ModelOptions) -> Filled:
        ref, entry, file = self.ref, self.entry, cached_download(self.entry.url)
        if not file.is_file():
            log.info("downloading %s", entry.url)
        try:
            with _downloading():
                # Download before building, so that a failure is the download's. This also refuses a cached file that
                # would run code; torchvision itself would not.
                state = entry.get_state_dict(progress=sys.stderr.isatty(), check_hash=True, weights_only=True)
                if self.size_px and ref.startswith(("vit_", "maxvit_")):
                    state, notes = self._resize_positions(state)
                    module = self.build()
                    module.load_state_dict(state)
                    return Filled(module, WeightsIdentity(str(entry)), notes)
                module = _get_model(ref, weights=entry, **({"quantize": True} if _kind_of(ref) == "quantized" else {}))
        # URLError and HTTPError are OSErrors, a wrong hash is a RuntimeError, a damaged file any of the others.
        except (OSError, RuntimeError, EOFError, TypeError, pickle.UnpicklingError) as error:
            if file.is_file():
                raise ModelError(
                    f"the cached weights for {ref} ({entry.name}) cannot be used: {one_line(error)}",
                    f"remove {file} and run again",
                ) from None
            raise ModelError(
                f"weights for {ref} ({entry.name}) are not in the cache and could not be downloaded: {one_line(error)}",
                f"use a file: --weights {ref}.safetensors    or random weights: --weights none",
                f"or put {file.name} into {file.parent}",
            ) from None
        return Filled(module, WeightsIdentity(str(entry)))

    def fit(self, weights: Weights) -> tuple[Weights, TorchvisionModel]:
        ref, head = self.ref, _with_auxiliary_head(self.ref)
        weights = without_prefix(weights, replace(self, variant=head).build_bare().state_dict().keys(), ref)
        notes: tuple[str, ...] = ()
        if self.size_px and self.has_positions and _POSITIONS in weights.state:
            state, notes = self._resize_positions(weights.state)
            weights = replace(weights, state=state)
        if ref.startswith("densenet"):
            # Published DenseNets have dots in names where a module's name can no longer have one.
            dotted = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
            weights = replace(weights, state={dotted.sub(r"\1\2", name): v for name, v in weights.state.items()})
        has_auxiliary = any(name.startswith(("aux1.", "AuxLogits.", "aux_classifier.")) for name in weights.state)
        without = {"aux_logits": False} if ref in ("googlenet", "inception_v3") else {}
        model = replace(self, variant=head if has_auxiliary else without)
        model = model.adapt_classes(weights, model.build_bare().state_dict(), len(self.entry.meta["categories"]))
        model = replace(model, fitting_notes=(*notes, *model.fitting_notes))
        published = self.recognize(sha256_of(weights.file))
        return weights, replace(model, entry=published or self.entry, transforms_input=published is not None)

    def _resize_positions(self, state: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Return weights whose position embeddings have the model's size, and a note if they had another."""
        if not self.has_positions or self.size_px is None:
            return dict(state), ()
        before, patch_px = state[_POSITIONS].shape[1], state["conv_proj.weight"].shape[-1]
        grid = self.size_px[0] // patch_px
        if before == 1 + grid * grid:
            return dict(state), ()
        if not self.resizes_positions:
            raise self.explain_positions()
        resized = dict(interpolate_embeddings(self.size_px[0], patch_px, OrderedDict(state)))
        return resized, (f"{self.ref}: position embeddings resized from {before - 1} to {grid * grid} patches",)

    def recognize(self, sha256: str) -> Any:
        """Return the published weights with a digest, or None; their URLs contain its beginning."""
        for entry in zoo.get_model_weights(self.ref):
            published = re.search(r"-([0-9a-f]{8,})\.", entry.url)
            if published and sha256.startswith(published[1]):
                return entry
        return None

    def prepare(self, module: nn.Module) -> Prepared:
        """Return what the weights were published with; a model for images of any size gets square ones."""
        preset = self.entry.transforms()
        match type(preset).__name__:
            case "ImageClassification":
                return from_preset(preset), None, ()
            case "SemanticSegmentation":
                return from_preset(preset, crop_px=preset.resize_size[0]), None, ()
            case "ObjectDetection":
                # These models resize and normalize images themselves, to this side; so pass pixels of it unchanged.
                transform: Any = module.transform
                side_px = (transform.fixed_size or transform.min_size)[0]
                return Preprocessing(side_px, side_px, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bilinear"), None, ()
            case other:
                raise ModelError(f"hookx cannot prepare images as {other} does")

    def finish(self, filled: Filled) -> LoadedModel:
        return replace(
            super().finish(filled),
            forward=forward_of(self.ref, filled.module),
            cpu_only=_kind_of(self.ref) == "quantized",
            why_never_called=why_never_called,
        )


def _get_model(ref: str, **arguments: Any) -> nn.Module:
    with warnings.catch_warnings():
        # GoogLeNet and Inception announce a change of their random initialization whenever they are built, and
        # torch.ao.quantization announces its successor.
        warnings.simplefilter("ignore")
        return zoo.get_model(ref, **arguments)


def forward_of(ref: str, module: nn.Module) -> Callable[[Tensor], Any]:
    """Return the function that takes a batch of images through a model."""
    if _kind_of(ref) != "detection":
        return module
    model: Any = module

    def forward(pixels_NCHW: Tensor) -> Any:
        # The steps of a detector's own forward, up to where its rows become boxes and proposals.
        images, _ = model.transform(list(pixels_NCHW))
        features = model.backbone(images.tensors)
        maps = list(features.values()) if isinstance(features, Mapping) else [features]
        return model.rpn.head(maps) if hasattr(model, "rpn") else model.head(maps)

    return forward


def why_never_called(path: str, modules: Mapping[str, nn.Module]) -> str:
    """Return why torchvision's models never call a module; '' if the reason is unknown."""
    parent_path, _, name = path.rpartition(".")
    parent_class = type(modules[parent_path or "."]).__name__
    if parent_class.startswith("ShiftedWindowAttention") and name in ("qkv", "proj"):
        return f"{parent_class} uses its weights directly"
    if parent_class in ("GoogLeNet", "Inception3") and name.lower().startswith("aux"):
        return "auxiliary classifiers run in training only"
    if type(modules["."]).__module__.startswith("torchvision.models.detection") and not path.startswith("backbone"):
        return "its rows are boxes and proposals, not images"
    if type(modules[path]).__name__ == "StochasticDepth":
        return "its block has no residual connection"
    return ""


@contextlib.contextmanager
def _downloading() -> Iterator[None]:
    """Bound every wait of a download, and drop torch.hub's line about it: hookx has logged its own.

    Behind a firewall that drops packets, a run would hang forever. Newer versions of torch write the line to stdout.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT_SECONDS)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(nowhere):
                yield
    finally:
        socket.setdefaulttimeout(before)
