"""A model's name and its weights -> a module in eval mode, and what it expects of an image.

The only file that knows model zoos.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import re
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision import models as zoo

from hookx.errors import ModelError
from hookx.layers import closest
from hookx.plan import Preprocessing

log = logging.getLogger("hookx")

_WEIGHT_FILES = (".safetensors", ".pt", ".pth")
_DOWNLOAD_TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True)
class LoadedModel:
    """A module in eval mode on the CPU, with the preprocessing and the identity of its weights.

    `forward` takes a batch (N, 3, H, W) through the module; it is what a run calls.
    """

    name: str
    module: nn.Module
    preprocessing: Preprocessing
    weights: str  # 'ResNet18_Weights.IMAGENET1K_V1', 'random (seed 0)', 'sha256:...'
    forward: Callable[[Tensor], Any]
    cpu_only: bool = False


def list_models() -> dict[str, str]:
    """Return every model of torchvision, sorted by name, with its kind.

    Video and optical-flow models are listed, and refused by `load_model`: they do not take still images.

    Example:
        >>> models = list_models()
        >>> models["resnet18"], models["fcn_resnet50"], models["raft_large"]
        ('classification', 'segmentation', 'optical flow')
    """
    return {name: _kind(name) for name in sorted(zoo.list_models())}


def load_model(ref: str, weights: str = "default", *, seed: int = 0) -> LoadedModel:
    """Build a model of torchvision's zoo with the weights asked for.

    Args:
        ref: a name that `list_models` gives.
        weights: 'default' (the architecture's DEFAULT weights), a weights name such as 'IMAGENET1K_V2', 'none'
            (random: `torch.manual_seed(seed)`, then the model is built on the CPU), or a state-dict file
            (.safetensors, .pt, .pth), which is read without running any code in it.
        seed: of the random weights; unused otherwise.

    Raises:
        ModelError: no such model or weights; weights that cannot be downloaded, read, or made to fit.

    Example:
        >>> model = load_model("resnet18", weights="none")
        >>> model.module.training, model.weights, str(model.preprocessing)[:33]
        (False, 'random (seed 0)', 'resize 256 (bilinear), crop 224, ')
    """
    entry = _entry(ref)
    if weights == "none":
        torch.manual_seed(seed)
        module, identity = _build(ref, entry), f"random (seed {seed})"
    elif _is_file(weights):
        state = _read_state_dict(Path(weights))
        sha256 = _sha256(Path(weights))
        entry = _recognised(ref, sha256) or entry
        module, identity = _build_for_file(ref, entry, state), f"sha256:{sha256}"
        _load(module, state, ref, weights)
        if hasattr(module, "transform_input"):
            # The published GoogLeNet and Inception were trained on images normalised in another way.
            setattr(module, "transform_input", _recognised(ref, sha256) is not None)  # noqa: B010
    else:
        entry = _entry(ref, weights)
        module, identity = _build_published(ref, entry), str(entry)
    return _loaded(ref, entry, module, identity)


def skeleton(ref: str, weights: str = "default") -> LoadedModel:
    """Build a model without memory for its parameters (meta device): its layers, and what it expects of an image.

    `vit_h_14` with its 633 million parameters takes as long as `resnet18`. A quantized model is built for real: its
    integer layers cannot do without numbers.

    Example:
        >>> model = skeleton("vit_h_14")
        >>> next(model.module.parameters()).device.type, model.preprocessing.crop_px
        ('meta', 518)
    """
    published = weights != "none" and not _is_file(weights)
    entry = _entry(ref, weights if published else "default")
    if _kind(ref) == "quantized":
        return _loaded(ref, entry, _build(ref, entry), "none")
    # The auxiliary head of the published segmentation models runs in eval mode too, so it belongs to the layers.
    has_auxiliary = published and _kind(ref) == "segmentation" and not ref.startswith("lraspp")
    with _Unallocated():
        module = _build(ref, entry, **({"aux_loss": True} if has_auxiliary else {}))
    return _loaded(ref, entry, module.to("meta"), "none")


def _loaded(ref: str, entry: Any, module: nn.Module, identity: str) -> LoadedModel:
    return LoadedModel(
        name=ref,
        module=module.eval(),
        preprocessing=_preprocessing(entry, module),
        weights=identity,
        forward=forward_of(ref, module),
        cpu_only=_kind(ref) == "quantized",
    )


# --- torchvision's registry ----------------------------------------------------------------------------------------

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


def _build_for_file(ref: str, entry: Any, state: Mapping[str, Tensor]) -> nn.Module:
    """Build the variant of an architecture that a file holds: with or without its auxiliary classifiers."""
    if ref in ("googlenet", "inception_v3") and not any(key.startswith(("aux1.", "AuxLogits.")) for key in state):
        return _build(ref, entry, aux_logits=False)
    if _kind(ref) == "segmentation" and any(key.startswith("aux_classifier.") for key in state):
        return _build(ref, entry, aux_loss=True)
    return _build(ref, entry)


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
                f"the cached weights for {ref} ({entry.name}) cannot be used: {_one_line(error)}",
                f"remove {_cached_file(entry)}, and run again",
            ) from None
        raise ModelError(
            f"weights for {ref} ({entry.name}) are not in the cache and could not be downloaded: {_one_line(error)}",
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


# --- state-dict files ----------------------------------------------------------------------------------------------


def _is_file(weights: str) -> bool:
    return weights.lower().endswith(_WEIGHT_FILES) or os.sep in weights or Path(weights).is_file()


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ModelError(f"there is no weights file '{path}'")
    try:
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Any bytes can stand in a file; each reader has its own exceptions for them.
        refused = "Weights only load failed" in str(error)
        problem = "holds more than tensors, and reading it could run code" if refused else _one_line(error)
        raise ModelError(
            f"cannot read weights from '{path}': {problem}",
            "save the weights alone: torch.save(model.state_dict(), 'weights.pt')",
        ) from None
    if not (
        isinstance(state, dict)
        and state
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items())
    ):
        what = f"keys: {', '.join(map(str, list(state)[:5]))}" if isinstance(state, dict) else type(state).__name__
        raise ModelError(
            f"'{path}' is not a plain state dict (name -> tensor), but {what}",
            "save the weights alone: torch.save(model.state_dict(), 'weights.pt')",
        )
    return state


def _load(module: nn.Module, state: Mapping[str, Tensor], ref: str, file: str) -> None:
    """Load a state dict of which every tensor must fit."""
    own = module.state_dict()
    # Batch norm's step counter came with torch 0.4.1 and does not enter an eval-mode forward pass.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    misshapen = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if missing or unexpected or misshapen:
        raise ModelError(
            f"'{file}' does not fit {ref}",
            *(
                f"{kind} ({len(keys)}): {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
                for kind, keys in (("missing", missing), ("unexpected", unexpected), ("other shape", misshapen))
                if keys
            ),
        )
    own.update(state)  # It knows the versions of its modules, which a plain dict does not; MNASNet asks for them.
    module.load_state_dict(own)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# --- skeletons -----------------------------------------------------------------------------------------------------


class _Unallocated(TorchFunctionMode):
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
