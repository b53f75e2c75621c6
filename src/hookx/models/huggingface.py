"""Image models of the Hugging Face hub, or of a folder that `save_pretrained` wrote. Needs the extra 'transformers'.

A model is of the class that its configuration names, because that is the class whose weights were saved: with a base
class a classifier would be lost, and a pooler could be random. Of a model of images and texts it is the vision tower.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from hookx.errors import ModelError
from hookx.layers.select import Selector
from hookx.models import hub, preprocessing
from hookx.models.checkpoints import is_weights_file, read_weights, sha256_of
from hookx.models.fitting import load_weights, notes_on_types, without_prefix
from hookx.models.loaded import LoadedModel, Unallocated, imagenet_preprocessing, one_line
from hookx.options import ModelOptions
from hookx.plan import Preprocessing

PREFIX = "hf:"

_CONFIG = "config.json"
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_NEXT_STEP = "a folder that save_pretrained wrote will do: --model hf:./folder"


def load_model(ref: str, weights: str = "default", options: ModelOptions = ModelOptions()) -> LoadedModel:
    """Build a model of images with `transformers`.

    Args:
        ref: 'hf:' and a repository ('hf:facebook/dinov2-small', with '@' and a revision if need be) or a folder
            ('hf:./my-vit').
        weights: 'default' (those of the repository or folder), 'none' (random: `torch.manual_seed(seed)`, then the
            model is built of its configuration), or a file.
        options: `model_args` can hold attn_implementation, as in attn_implementation=eager, which returns attention
            weights as parts; left out, it is what `transformers` chooses.

    Raises:
        ModelError: no such model; one that takes other things than images; weights that cannot be had or do not fit.
    """
    source = _source(ref)
    recipe = _recipe(source, options)
    random_paths: tuple[str, ...] = ()
    notes = list(recipe.notes)
    torch.manual_seed(options.seed)
    if weights == "none":
        module, identity = recipe.build(), f"random (seed {options.seed})"
    elif is_weights_file(weights):
        module, found = recipe.build(), read_weights(weights, options)
        found = without_prefix(found, module.state_dict().keys(), ref)
        random_paths = load_weights(module, found, ref, options.allow_missing)
        identity = found.identity
        notes += [*found.notes, *notes_on_types(module, found)]
    else:
        _check_weights(ref, weights)
        file = _weights_file(source)
        module, random_paths, aloud = _published(source, recipe, options.allow_missing)
        identity = f"{PREFIX}{source.name}@{source.commit}" if source.commit else f"sha256:{sha256_of(file)}"
        notes += aloud
    if random_paths:
        identity += f"; random (seed {options.seed}): {', '.join(random_paths)}"
        notes.append(f"random, because the weights lack them: {', '.join(random_paths)}")
    return _loaded(source, recipe, module, identity, notes, random_paths, options)


def skeleton(ref: str, weights: str = "default", options: ModelOptions = ModelOptions()) -> LoadedModel:
    """Build a model without memory for its parameters (meta device); of the hub only its configuration is read."""
    if weights != "none" and not is_weights_file(weights):
        _check_weights(ref, weights)
    source = _source(ref)
    recipe = _recipe(source, options)
    with Unallocated():
        module = recipe.build()
    return _loaded(source, recipe, module.to("meta"), "none", recipe.notes, (), options)


# --- where it is ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """A folder with a configuration; and what the hub calls it, if it comes from there."""

    ref: str
    name: str
    folder: Path
    commit: str = ""


def _source(ref: str) -> _Source:
    _transformers()
    name = ref.removeprefix(PREFIX)
    folder = Path(name).expanduser()
    if name.startswith((".", "/", "~")) or folder.is_dir():
        if not (folder / _CONFIG).is_file():
            why = "there is no folder" if not folder.is_dir() else f"there is no {_CONFIG} in"
            raise ModelError(f"{why} '{folder}'", "name a folder that model.save_pretrained(...) wrote")
        return _Source(ref, name, folder)
    repository, _, revision = name.partition("@")
    config = hub.fetched_file(ref, repository, [_CONFIG], revision or None, _NEXT_STEP)
    assert config is not None
    commit = hub.commit_of(config)
    # Everything else is of the same commit, whatever the branch has become since.
    hub.fetched_file(ref, repository, _PROCESSORS, commit, _NEXT_STEP, required=False)
    return _Source(ref, repository, config.parent, commit)


def _weights_file(source: _Source) -> Path:
    if source.commit:
        random = (_NEXT_STEP, "random weights: --weights none")
        file = hub.fetched_file(source.ref, source.name, hub.WEIGHTS, source.commit, *random)
        assert file is not None
        return hub.with_shards(source.ref, source.name, file, source.commit, *random)
    for name in hub.WEIGHTS:
        if (source.folder / name).is_file():
            return source.folder / name
    raise ModelError(
        f"there are no weights in '{source.folder}': none of {', '.join(hub.WEIGHTS)}",
        "save them there: model.save_pretrained(...)    or take random ones: --weights none",
    )


def _check_weights(ref: str, weights: str) -> None:
    if weights != "default":
        raise ModelError(
            f"{ref} has no weights '{weights}'; it has: default",
            f"another revision is a part of the name: {ref}@REVISION    also: none (random), or a file",
        )


# --- what it is ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Recipe:
    """A class of `transformers`, and the configuration to build it with."""

    model_class: Any
    config: Any
    is_tower: bool
    attention: dict[str, str]

    def build(self) -> nn.Module:
        with _quiet():
            try:
                module: nn.Module = self.model_class._from_config(self.config, dtype=torch.float32, **self.attention)
            except (ValueError, ImportError, TypeError, AttributeError) as error:
                raise _cannot_be_built(self.model_class.__name__, error) from error
        return module

    @property
    def notes(self) -> tuple[str, ...]:
        if not self.is_tower:
            return ()
        return (f"of a model of images and texts, the vision tower: {self.model_class.__name__}",)


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        step = "install it as an extra of hookx: pip install 'hookx-vision[transformers]'"
        if error.name == "transformers":
            raise ModelError("models of Hugging Face need transformers, which is not installed", step) from None
        raise ModelError(f"transformers cannot be imported: {one_line(error)}", step) from None
    return transformers


def _recipe(source: _Source, options: ModelOptions) -> _Recipe:
    if unknown := [name for name in options.model_args if name != "attn_implementation"]:
        raise ModelError(f"{source.ref} takes no argument '{unknown[0]}'; closest: attn_implementation")
    transformers = _transformers()
    with _quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(
                source.folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # Of what is in a file that somebody wrote.
            raise ModelError(
                f"{source.ref} is no model that transformers {transformers.__version__} knows: {one_line(error)}",
                "a model with code of its own is written --model path/to/file.py:factory",
            ) from None
    vision = getattr(config, "vision_config", None)
    config = vision or config
    named = None if vision else next(iter(config.architectures or ()), None)
    model_class = getattr(transformers, named, None) if named else None
    if model_class is None:
        model_class = transformers.MODEL_MAPPING.get(type(config), None)
    takes = getattr(model_class, "main_input_name", "nothing that hookx knows of")
    if takes != "pixel_values":
        what = model_class.__name__ if model_class is not None else type(config).__name__
        raise ModelError(f"{source.ref} ({what}) takes {takes}, and hookx gives a model images alone")
    return _Recipe(model_class, config, vision is not None, dict(options.model_args))


def _published(
    source: _Source, recipe: _Recipe, allow_missing: Iterable[str]
) -> tuple[nn.Module, tuple[str, ...], list[str]]:
    """Load the weights in a folder; return the module, what stayed random, and what there is to say."""
    with _quiet(), hub.tensors_only():
        try:
            module, report = recipe.model_class.from_pretrained(
                source.folder,
                config=recipe.config,
                local_files_only=True,
                output_loading_info=True,
                dtype=torch.float32,  # The arithmetic is chosen by --precision.
                **recipe.attention,
            )
        except Exception as error:  # Any bytes can stand in a file.
            raise ModelError(
                f"the weights of {source.ref} cannot be loaded as {recipe.model_class.__name__}: {one_line(error)}"
            ) from error
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    refused = [name for name in missing if not _is_allowed(name, allow_missing)]
    if refused:
        modules = list(dict.fromkeys(name.rpartition(".")[0] for name in refused))
        raise ModelError(
            f"the weights of {source.ref} do not fill {recipe.model_class.__name__}",
            f"missing ({len(refused)}): {', '.join(refused[:3])}{', ...' if len(refused) > 3 else ''}",
            f"if random values will do there: --allow-missing {','.join(modules[:3])}",
        )
    notes = []
    if unexpected:
        groups = Counter(name.split(".")[0] for name in unexpected)
        notes.append(
            f"left out of the weights of {source.ref}: "
            + ", ".join(f"{name} ({count} tensor{'s' * (count > 1)})" for name, count in groups.items())
        )
    stored = getattr(recipe.config, "dtype", None)
    if stored not in (None, torch.float32):
        notes.append(f"{source.ref}: {str(stored).removeprefix('torch.')} in the file, float32 in the model")
    return module, tuple(dict.fromkeys(name.rpartition(".")[0] for name in missing)), notes


def _is_allowed(name: str, patterns: Iterable[str]) -> bool:
    nodes = {name[:cut]: "" for cut, letter in enumerate(name) if letter == "."} | {name: ""}
    pieces = (piece.strip() for text in patterns for piece in text.split(","))
    return any(Selector.parse(piece).paths(nodes) for piece in pieces if piece)


def _cannot_be_built(name: str, error: Exception) -> ModelError:
    return ModelError(f"{name} cannot be built: {one_line(error)}")


def _loaded(
    source: _Source,
    recipe: _Recipe,
    module: nn.Module,
    identity: str,
    notes: Iterable[str],
    random_paths: tuple[str, ...],
    options: ModelOptions,
) -> LoadedModel:
    module = module.eval()
    prepares, transform, aloud = _preprocessing(source, recipe, options)
    said = ", ".join(f"{name}={value}" for name, value in sorted(options.model_args.items()))

    def forward(pixels_NCHW: Tensor) -> Any:
        return module(pixel_values=pixels_NCHW)

    return LoadedModel(
        name=source.ref,
        module=module,
        preprocessing=prepares,
        weights=identity + (f" ({said})" if said else ""),
        forward=forward,
        transform=transform,
        notes=(*notes, *aloud),
        random_paths=random_paths,
    )


# --- what it expects of an image -----------------------------------------------------------------------------------


def _preprocessing(
    source: _Source, recipe: _Recipe, options: ModelOptions
) -> tuple[Preprocessing, Callable[[Any], Tensor] | None, tuple[str, ...]]:
    """Return what the model's own image processor does; where there is none, what is assumed, aloud."""
    if options.transform is not None:
        return imagenet_preprocessing(), None, ()
    if not any((source.folder / name).is_file() for name in _PROCESSORS):
        size = getattr(recipe.config, "image_size", None)
        assumed = imagenet_preprocessing(preprocessing.square_side_px(size, source.ref) if size else 224)
        return (
            assumed,
            None,
            (
                f"{source.ref} has no image processor: assumed ImageNet's mean and std ({assumed}); "
                "say it with --resize, --crop, --mean, --std, or with --transform",
            ),
        )
    with _quiet():
        try:
            processor = _transformers().AutoImageProcessor.from_pretrained(
                source.folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # Of what is in a file that somebody wrote.
            raise ModelError(f"the image processor of {source.ref} cannot be built: {one_line(error)}") from error

    def transform(image: Any) -> Tensor:
        pixels: Tensor = processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels

    name = type(processor).__name__
    description = json.dumps(json.loads(processor.to_json_string()), sort_keys=True)
    return *preprocessing.of_transform(transform, name, description), ()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep `transformers` from writing tables and progress bars; what matters of them is in errors and notes."""
    from transformers.utils import logging as talk

    level, bars = talk.get_verbosity(), talk.is_progress_bar_enabled()
    talk.set_verbosity(talk.CRITICAL)
    talk.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        talk.set_verbosity(level)
        if bars:
            talk.enable_progress_bar()
