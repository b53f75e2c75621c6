"""The sources of models, and the functions that choose one by a model's name."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch

from hookx.errors import ModelError
from hookx.models.files import ModelFiles
from hookx.models.huggingface import HuggingFace
from hookx.models.loaders import load_loader
from hookx.models.open_clip import OpenClip
from hookx.models.own_code import OwnCode, load_transform
from hookx.models.preprocessing import at_size
from hookx.models.source import LoadedModel, Source
from hookx.models.timm import Timm
from hookx.models.torchvision import Torchvision
from hookx.options import ModelOptions

_TORCHVISION = Torchvision()
# Asked in this order. A file called 'resnet18' does not stand in for torchvision's model.
_SOURCES: tuple[Source, ...] = (Timm(), HuggingFace(), OpenClip(), OwnCode(), _TORCHVISION, ModelFiles())


def list_models(pattern: str = "*") -> dict[str, str]:
    """Return torchvision's models, or, for a pattern like 'timm:*' or 'open_clip:*', the models of that zoo that match.

    Video and optical-flow models are listed but refused by `load_model`: they do not take still images.

    Example:
        >>> models = list_models()
        >>> models["resnet18"], models["fcn_resnet50"], models["raft_large"]
        ('classification', 'segmentation', 'optical flow')
    """
    return (_source_of(pattern) if ":" in pattern else _TORCHVISION).list_models(pattern)


def weights_of(ref: str) -> list[tuple[str, bool]]:
    """Return the names of a model's weights, the default first, each with whether it is in the cache.

    Example:
        >>> [name for name, is_cached in weights_of("resnet50")]
        ['IMAGENET1K_V2', 'IMAGENET1K_V1']
    """
    return _source_of(ref).weights_of(ref)


def load_model(ref: str, weights: str = "default", options: ModelOptions = ModelOptions()) -> LoadedModel:
    """Build a model with the requested weights.

    Args:
        ref: a name that `list_models` returns; 'timm:NAME', 'hf:NAME', 'open_clip:NAME/TAG',
            'python:package.module:factory', 'path/to/file.py:factory'; or a file: a checkpoint that names its
            architecture (`{"arch": "resnet18", "state_dict": ...}`), a pickled module, or an exported program (.pt2).
        weights: 'default' (the architecture's DEFAULT weights, or those in the file), a weights name such as
            'IMAGENET1K_V2', 'none' (random: `torch.manual_seed(seed)`, then the model is built on the CPU), or a
            weights file, which is read without running code in it.
        options: the seed of random weights, and further options.

    Raises:
        ModelError: there is no such model or weights; the weights cannot be downloaded or read, or do not fit.

    Example:
        >>> model = load_model("resnet18", weights="none")
        >>> model.module.training, model.weights, str(model.preprocessing)[:33]
        (False, 'random (seed 0)', 'resize 256 (bilinear), crop 224, ')
    """
    source = _source_of(ref, options)
    return _prepared(source, source.load_model(ref, weights, options), options)


def skeleton(ref: str, weights: str = "default", options: ModelOptions = ModelOptions()) -> LoadedModel:
    """Build a model without memory for its parameters (meta device): its layers, and what it expects of an image.

    A model that exists only as a whole (a pickled module, an exported program, a factory's) is the model itself.

    Example:
        >>> model = skeleton("vit_h_14")
        >>> next(model.module.parameters()).device.type, model.preprocessing.crop_px
        ('meta', 518)
    """
    source = _source_of(ref, options)
    return _prepared(source, source.skeleton(ref, weights, options), options)


def forget_skeletons() -> None:
    """Drop the models that a source has built for `skeleton` and that no `load_model` has taken."""
    for source in _SOURCES:
        source.forget_skeletons()


def release_models() -> None:
    """Put back what was changed in models of the user's own to make them ready; none of them is used any more."""
    for source in _SOURCES:
        source.release()


@contextlib.contextmanager
def borrowed_models() -> Iterator[None]:
    """Release the models that were loaded in the `with` block at its end, and put back PyTorch's random state."""
    random_state = torch.get_rng_state()
    try:
        yield
    finally:
        release_models()
        torch.set_rng_state(random_state)


def _source_of(ref: str, options: ModelOptions = ModelOptions()) -> Source:
    # An unknown name gets torchvision's error, which lists similar ones.
    source = next((source for source in _SOURCES if source.owns(ref)), _TORCHVISION)
    if options.model_args and not source.takes_arguments:
        raise ModelError(f"{ref} takes no --model-arg; only models of python:, timm: and hf: do")
    return source


def _prepared(source: Source, loaded: LoadedModel, options: ModelOptions) -> LoadedModel:
    """Replace a model's preprocessing as the user asks: by a transform and a loader, for a size, with a fit."""
    loader, described = (None, "") if options.loader is None else load_loader(options.loader)
    if options.transform is not None:
        preprocessing, transform = load_transform(options.transform, None if loader is None else loaded.channels or 3)
        loaded = dataclasses.replace(loaded, preprocessing=preprocessing, transform=transform)
    fit = None if source.fits_images and loaded.transform is not None and options.transform is None else options.fit
    preprocessing = at_size(loaded.preprocessing, options.size_px, fit, loaded.name)
    preprocessing = dataclasses.replace(preprocessing, loader=described)
    return dataclasses.replace(loaded, preprocessing=preprocessing, loader=loader)
