"""torchvision's models: by name, with published weights, random ones, or those of a file."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pickle
import re
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models as zoo

from hookx.errors import ModelError, closest
from hookx.models.checkpoints import Weights, is_weights_file, read_weights, sha256_of
from hookx.models.fitting import classes_in, load_weights, notes_on_types, without_prefix
from hookx.models.loaded import LoadedModel, Unallocated, one_line
from hookx.options import ModelOptions
from hookx.plan import Preprocessing

log = logging.getLogger("hookx")
_DOWNLOAD_TIMEOUT_SECONDS = 30.0


def list_models() -> dict[str, str]:
    """Return every model of torchvision, sorted by name, with its kind.

    Video and optical-flow models are listed, and refused by `load_model`: they do not take still images.

    Example:
        >>> models = list_models()
        >>> models["resnet18"], models["fcn_resnet50"], models["raft_large"]
        ('classification', 'segmentation', 'optical flow')
    """
    return {name: _kind(name) for name in sorted(zoo.list_models())}


def weights_of(ref: str) -> list[tuple[str, bool]]:
    """Return the names of the weights that a model has, the default ones first, and whether they are in the cache."""
    enum = zoo.get_model_weights(ref)
    default_first = sorted(enum, key=lambda entry: entry is not enum.DEFAULT)
    return [(entry.name, _is_cached(entry)) for entry in default_first]


def load_model(ref: str, weights: str = "default", options: ModelOptions = ModelOptions()) -> LoadedModel:
    """Build a model of torchvision's zoo with the weights asked for; `hookx.models.load_model` says how."""
    entry = _entry(ref)
    if weights == "none":
        torch.manual_seed(options.seed)
        module, identity = _build(ref, entry), f"random (seed {options.seed})"
    elif is_weights_file(weights):
        return _from_file(ref, weights, options)
    else:
        entry = _entry(ref, weights)
        module, identity = _build_published(ref, entry), str(entry)
    return _loaded(ref, entry, module, identity)


def _from_file(ref: str, file: str, options: ModelOptions) -> LoadedModel:
    weights, variant = _fitted(ref, read_weights(file, options))
    published = _recognised(ref, sha256_of(weights.file))
    entry = published or _entry(ref)
    torch.manual_seed(options.seed)  # Of what the file may lack.
    module = _build(ref, entry, **variant)
    random_paths = load_weights(module, weights, ref, options.allow_missing)
    if hasattr(module, "transform_input"):
        # The published GoogLeNet and Inception were trained on images normalised in another way.
        setattr(module, "transform_input", published is not None)  # noqa: B010
    identity, notes = weights.identity, [*weights.notes, *notes_on_types(module, weights)]
    if "num_classes" in variant:
        notes.append(
            f"{ref} is built for {variant['num_classes']} classes, as the classifier in {weights.file.name} is"
        )
    if random_paths:
        identity += f"; random (seed {options.seed}): {', '.join(random_paths)}"
        notes.append(f"random, because {weights.file.name} lacks them: {', '.join(random_paths)}")
    loaded = _loaded(ref, entry, module, identity)
    return dataclasses.replace(loaded, notes=tuple(notes), random_paths=random_paths)


def skeleton(ref: str, weights: str = "default", options: ModelOptions = ModelOptions()) -> LoadedModel:
    """Build a model without memory for its parameters (meta device): its layers, and what it expects of an image.

    Of a file of weights, if it is there, only the shapes are looked at: they decide the number of classes.

    `vit_h_14` with its 633 million parameters takes as long as `resnet18`. A quantized model is built for real: its
    integer layers cannot do without numbers.

    Example:
        >>> model = skeleton("vit_h_14")
        >>> next(model.module.parameters()).device.type, model.preprocessing.crop_px
        ('meta', 518)
    """
    if is_weights_file(weights) and Path(weights).is_file():
        _entry(ref)
        _, variant = _fitted(ref, read_weights(weights, options, shapes_only=True))
        entry = _recognised(ref, sha256_of(Path(weights))) or _entry(ref)
        return _loaded(ref, entry, _bare(ref, entry, **variant), "none")
    published = weights != "none" and not is_weights_file(weights)
    entry = _entry(ref, weights if published else "default")
    # The auxiliary head of the published segmentation models runs in eval mode too, so it belongs to the layers.
    return _loaded(ref, entry, _bare(ref, entry, **(_with_everything(ref) if published else {})), "none")


def _bare(ref: str, entry: Any, **arguments: Any) -> nn.Module:
    if _kind(ref) == "quantized":
        return _build(ref, entry, **arguments)
    with Unallocated():
        module = _build(ref, entry, **arguments)
    return module.to("meta")


def _loaded(ref: str, entry: Any, module: nn.Module, identity: str) -> LoadedModel:
    return LoadedModel(
        name=ref,
        module=module.eval(),
        preprocessing=_preprocessing(entry, module),
        weights=identity,
        forward=forward_of(ref, module),
        cpu_only=_kind(ref) == "quantized",
    )


_KINDS = {
    "torchvision.models": "classification",
    "torchvision.models.segmentation": "segmentation",
    "torchvision.models.quantization": "quantized",
    "torchvision.models.detection": "detection",
    "torchvision.models.video": "video",
    "torchvision.models.optical_flow": "optical flow",
}
_REFUSED = {"video": "clips of video", "optical flow": "pairs of video frames"}


def _kind(ref: str) -> str:
    package = zoo.get_model_builder(ref).__module__.rpartition(".")[0]
    return _KINDS.get(package, package)


def _entry(ref: str, weights: str = "default") -> Any:
    """Return the member of torchvision's weights enum that a name and a weights name mean."""
    if ref not in zoo.list_models():
        similar = closest(ref, zoo.list_models())
        raise ModelError(f"no model is called '{ref}'; closest: {similar}", "list them all: hookx list-models")
    if _kind(ref) in _REFUSED:
        raise ModelError(f"{ref} takes {_REFUSED[_kind(ref)]}, and hookx reads still images")
    enum = zoo.get_model_weights(ref)
    if weights == "default":
        return enum.DEFAULT
    name = weights.removeprefix(f"{enum.__name__}.")
    if name not in enum.__members__:
        known = ", ".join(member.name for member in enum)
        raise ModelError(
            f"{ref} has no weights '{weights}'; it has: {known}",
            "also: default, none (random), or a file (.safetensors, .pt, .pth)",
        )
    return enum[name]


def _recognised(ref: str, sha256: str) -> Any:
    """Return the published weights that a file holds, or None; their URL carries the beginning of their SHA-256."""
    for entry in zoo.get_model_weights(ref):
        published = re.search(r"-([0-9a-f]{8,})\.", entry.url)
        if published and sha256.startswith(published[1]):
            return entry
    return None


def _build(ref: str, entry: Any, **arguments: Any) -> nn.Module:
    """Build an architecture without weights, for the input size that `entry` expects."""
    if _kind(ref) in ("segmentation", "detection"):
        arguments["weights_backbone"] = None  # Left out, it would mean: download those of ImageNet.
    if _kind(ref) == "quantized":
        arguments["quantize"] = True
    if ref.startswith("vit_") and entry.transforms().crop_size[0] != 224:
        # A vision transformer accepts one size only; 224 is the builders' default.
        arguments["image_size"] = entry.transforms().crop_size[0]
    return _get_model(ref, weights=None, **arguments)


def _get_model(ref: str, **arguments: Any) -> nn.Module:
    with warnings.catch_warnings():
        # GoogLeNet and Inception announce a change of their random initialisation at every construction, and
        # torch.ao.quantization its successor.
        for category in (FutureWarning, DeprecationWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        return zoo.get_model(ref, **arguments)


def _with_everything(ref: str) -> dict[str, Any]:
    """Return the arguments that build an architecture with its auxiliary classifier, where that is left out else."""
    return {"aux_loss": True} if _kind(ref) == "segmentation" and not ref.startswith("lraspp") else {}


def _fitted(ref: str, weights: Weights) -> tuple[Weights, dict[str, Any]]:
    """Bring the names in a file to those of an architecture; return them and the variant that the file holds."""
    entry = _entry(ref)
    weights = without_prefix(weights, _bare(ref, entry, **_with_everything(ref)).state_dict().keys(), ref)
    if ref.startswith("densenet"):
        weights = dataclasses.replace(weights, state={_of_today(name): v for name, v in weights.state.items()})
    variant: dict[str, Any] = {}
    has_auxiliary = any(name.startswith(("aux1.", "AuxLogits.", "aux_classifier.")) for name in weights.state)
    if ref in ("googlenet", "inception_v3") and not has_auxiliary:
        variant["aux_logits"] = False
    if has_auxiliary:
        variant.update(_with_everything(ref))
    default = _bare(ref, entry, **variant).state_dict()
    classes = classes_in(
        weights,
        default,
        lambda count: _bare(ref, entry, **variant, num_classes=count).state_dict(),
        len(entry.meta["categories"]),
    )
    return weights, variant | ({"num_classes": classes} if classes else {})


def _of_today(name: str) -> str:
    # The published DenseNets carry names with dots where a module's name can no longer have one.
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", name)


def _build_published(ref: str, entry: Any) -> nn.Module:
    if not _is_cached(entry):
        log.info("downloading %s", entry.url)
    try:
        with _socket_timeout(_DOWNLOAD_TIMEOUT_SECONDS), _quiet_unless_terminal():
            # Only the download can fail for a reason outside this machine, so it is done apart from the building.
            # It also refuses a cached file that would run code, before torchvision, which would not, reads it again.
            entry.get_state_dict(progress=sys.stderr.isatty(), check_hash=True, weights_only=True)
            return _get_model(ref, weights=entry, **({"quantize": True} if _kind(ref) == "quantized" else {}))
    # URLError and HTTPError are OSErrors; a wrong hash is a RuntimeError; a damaged file is any of the others.
    except (OSError, RuntimeError, EOFError, TypeError, pickle.UnpicklingError) as error:
        if _is_cached(entry):
            raise ModelError(
                f"the cached weights for {ref} ({entry.name}) cannot be used: {one_line(error)}",
                f"remove {_cached_file(entry)}, and run again",
            ) from None
        raise ModelError(
            f"weights for {ref} ({entry.name}) are not in the cache and could not be downloaded: {one_line(error)}",
            f"use a file: --weights {ref}.safetensors    or random weights: --weights none",
            f"or put {_cached_file(entry).name} into {_cached_file(entry).parent}",
        ) from None


def _preprocessing(entry: Any, module: nn.Module) -> Preprocessing:
    """Return what the weights were published with; a model for images of any size gets them in one size, square."""
    preset = entry.transforms()
    match type(preset).__name__:
        case "ImageClassification":
            resize_px, crop_px = preset.resize_size[0], preset.crop_size[0]
        case "SemanticSegmentation":
            resize_px = crop_px = preset.resize_size[0]
        case "ObjectDetection":
            # These models resize and normalise by themselves, to this side; so it passes through unchanged.
            transform: Any = module.transform
            resize_px = crop_px = (transform.fixed_size or transform.min_size)[0]
            return Preprocessing(resize_px, crop_px, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bilinear")
        case other:
            raise ModelError(f"hookx does not know how to prepare images for {other}")
    return Preprocessing(
        resize_px=resize_px,
        crop_px=crop_px,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=preset.interpolation.value,
        antialias=bool(preset.antialias),
    )


def forward_of(ref: str, module: nn.Module) -> Callable[[Tensor], Any]:
    """Return what takes a batch of images through a model."""
    if _kind(ref) != "detection":
        return module
    model: Any = module

    def as_far_as_rows_are_images(pixels_NCHW: Tensor) -> Any:
        # The steps of the model's own forward, up to where its rows become boxes and proposals.
        images, _ = model.transform(list(pixels_NCHW))
        features = model.backbone(images.tensors)
        maps = list(features.values()) if isinstance(features, Mapping) else [features]
        return model.rpn.head(maps) if hasattr(model, "rpn") else model.head(maps)

    return as_far_as_rows_are_images


def _cached_file(entry: Any) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rsplit("/", 1)[1]


def _is_cached(entry: Any) -> bool:
    return _cached_file(entry).exists()


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Bound every wait of a download: a firewall that drops packets would otherwise hang the run for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextlib.contextmanager
def _quiet_unless_terminal() -> Iterator[None]:
    """Drop the line that torch.hub writes about a download (newer ones to stdout); hookx has said it already."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(nowhere):
            yield
