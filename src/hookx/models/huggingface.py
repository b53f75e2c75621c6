"""Image models of the Hugging Face hub, or of a folder that `save_pretrained` wrote. Needs the extra 'transformers'.

A model is built with the class that its configuration names, whose weights were saved: a base class would lose the
classifier, and could add a random pooler. A model of images and texts is reduced to its vision tower.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hookx.errors import ModelError, one_line
from hookx.models import hub
from hookx.models.checkpoints import sha256_of
from hookx.models.fitting import Filled, find_allowed, list_first, modules_of
from hookx.models.names import HUGGING_FACE
from hookx.models.preprocessing import imagenet_preprocessing, square_side_px, try_transform
from hookx.models.source import LoadedModel
from hookx.models.zoo import Architecture, Prepared, Zoo, explaining, import_extra
from hookx.options import ModelOptions
from hookx.plan import WeightsIdentity

_CONFIG = "config.json"
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_NEXT_STEP = "use a folder that save_pretrained wrote: --model hf:./folder"


class HuggingFace(Zoo):
    """A repository, 'hf:facebook/dinov2-small' or with a revision 'hf:...@REVISION', or a folder, 'hf:./my-vit'.

    The argument `attn_implementation=eager` makes attention weights parts of the output; its default is that of
    `transformers`.
    """

    takes_arguments = True

    def owns(self, ref: str) -> bool:
        return ref.startswith(HUGGING_FACE)

    def find(self, ref: str, published: str, options: ModelOptions = ModelOptions()) -> HuggingFaceModel:
        if published not in ("", "default"):
            raise ModelError(
                f"{ref} has no weights '{published}'; it has: default",
                f"choose a revision by name: {ref}@REVISION    also: none (random), or a file",
            )
        folder, repository, commit = _find_folder(ref)
        if unknown := [name for name in options.model_args if name != "attn_implementation"]:
            raise ModelError(f"{ref} takes no argument '{unknown[0]}'; closest: attn_implementation")
        model_class, config, notes = _read_config(ref, folder)
        return HuggingFaceModel(
            ref=ref,
            arguments=options.model_args,
            notes=notes,
            folder=folder,
            repository=repository,
            commit=commit,
            model_class=model_class,
            config=config,
            has_transform=options.transform is not None,
        )


def _transformers() -> Any:
    return import_extra("transformers", "Hugging Face")


def _find_folder(ref: str) -> tuple[Path, str, str]:
    """Return the folder of a configuration, and, if it comes from the hub, its repository and commit."""
    _transformers()
    name = ref.removeprefix(HUGGING_FACE)
    folder = Path(name).expanduser()
    if name.startswith((".", "/", "~")) or folder.is_dir():
        if not (folder / _CONFIG).is_file():
            why = "there is no folder" if not folder.is_dir() else f"there is no {_CONFIG} in"
            raise ModelError(f"{why} '{folder}'", "name a folder that model.save_pretrained(...) wrote")
        return folder, "", ""
    repository, _, revision = name.partition("@")
    config = hub.fetch_file(ref, repository, [_CONFIG], revision or None, _NEXT_STEP)
    assert config is not None
    commit = hub.commit_of(config)
    # Take everything else from the same commit, even if the branch has moved on.
    hub.fetch_file(ref, repository, _PROCESSORS, commit, _NEXT_STEP, required=False)
    return config.parent, repository, commit


def _read_config(ref: str, folder: Path) -> tuple[Any, Any, tuple[str, ...]]:
    """Return the class of a model in `transformers`, the configuration to build it with, and notes."""
    transformers = _transformers()
    unknown = f"transformers {transformers.__version__} does not know the model {ref}"
    with _quiet(), explaining(unknown, "write a model with code of its own as --model path/to/file.py:factory"):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    vision = getattr(config, "vision_config", None)
    config = vision or config
    named = None if vision else next(iter(config.architectures or ()), None)
    model_class = getattr(transformers, named, None) if named else None
    if model_class is None:
        model_class = transformers.MODEL_MAPPING.get(type(config), None)
    takes = getattr(model_class, "main_input_name", "an unknown input")
    if takes != "pixel_values":
        what = model_class.__name__ if model_class is not None else type(config).__name__
        raise ModelError(f"{ref} ({what}) takes {takes}; hookx gives a model images only")
    note = f"{ref} takes images and texts; used its vision tower, {model_class.__name__}"
    return model_class, config, (note,) if vision else ()


@dataclass(frozen=True, kw_only=True)
class HuggingFaceModel(Architecture):
    """A class of `transformers`, and the configuration to build it with."""

    folder: Path
    repository: str
    commit: str
    """'' if the folder is the user's own."""
    model_class: Any
    config: Any
    has_transform: bool
    """Whether the user's transform takes the place of the model's image processor."""

    def build(self) -> nn.Module:
        try:
            with _quiet():
                return self.model_class._from_config(self.config, dtype=torch.float32, **self.arguments)
        except (ValueError, ImportError, TypeError, AttributeError) as error:
            raise ModelError(f"{self.model_class.__name__} cannot be built: {one_line(error)}") from error

    def build_published(self, options: ModelOptions) -> Filled:
        file = self._find_weights()
        torch.manual_seed(options.seed)  # For what the weights may lack.
        problem = f"the weights of {self.ref} cannot be loaded as {self.model_class.__name__}"
        with _quiet(), hub.tensors_only(), explaining(problem):
            module, report = self.model_class.from_pretrained(
                self.folder,
                config=self.config,
                local_files_only=True,
                output_loading_info=True,
                dtype=torch.float32,  # --precision chooses the arithmetic.
                **self.arguments,
            )
        missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
        allowed = find_allowed(options.allow_missing, module.state_dict(), self.ref)
        if refused := [name for name in missing if name not in allowed]:
            raise ModelError(
                f"the weights of {self.ref} do not fill {self.model_class.__name__}",
                list_first("missing", refused),
                f"to leave them random: --allow-missing {','.join(modules_of(refused)[:3])}",
            )
        notes = []
        if groups := Counter(name.split(".")[0] for name in unexpected):
            counts = ", ".join(f"{name} ({count} tensor{'s' * (count > 1)})" for name, count in groups.items())
            notes.append(f"left out of the weights of {self.ref}: {counts}")
        stored = getattr(self.config, "dtype", None)
        if stored not in (None, torch.float32):
            notes.append(f"{self.ref}: {str(stored).removeprefix('torch.')} in the file, float32 in the model")
        hub_name = f"{HUGGING_FACE}{self.repository}@{self.commit}"
        identity = WeightsIdentity(hub_name) if self.commit else WeightsIdentity.of_file(sha256_of(file))
        random = str(WeightsIdentity.of_seed(options.seed))
        # '' for a tensor of the model itself, unlike in other zoos: identities in existing plans say so.
        random_paths = tuple(dict.fromkeys(name.rpartition(".")[0] for name in missing))
        return Filled(module, identity, tuple(notes)).lacking(random_paths, random, file.name)

    def _find_weights(self) -> Path:
        if self.commit:
            steps = (_NEXT_STEP, "use random weights: --weights none")
            file = hub.fetch_file(self.ref, self.repository, hub.WEIGHTS, self.commit, *steps)
            assert file is not None
            return hub.fetch_shards(self.ref, self.repository, file, self.commit, *steps)
        for name in hub.WEIGHTS:
            if (self.folder / name).is_file():
                return self.folder / name
        raise ModelError(
            f"there are no weights in '{self.folder}': none of {', '.join(hub.WEIGHTS)}",
            "save them there: model.save_pretrained(...)    or use random ones: --weights none",
        )

    def prepare(self, module: nn.Module) -> Prepared:
        """Return what the model's own image processor does; without one, assume ImageNet's and say so."""
        if self.has_transform:
            return imagenet_preprocessing(), None, ()
        if not any((self.folder / name).is_file() for name in _PROCESSORS):
            size = getattr(self.config, "image_size", None)
            assumed = imagenet_preprocessing(square_side_px(size, self.ref) if size else 224)
            note = (
                f"{self.ref} has no image processor: assumed ImageNet's mean and std ({assumed}); "
                "override them with --resize, --crop, --mean, --std, or with --transform"
            )
            return assumed, None, (note,)
        with _quiet(), explaining(f"the image processor of {self.ref} cannot be built"):
            build = _transformers().AutoImageProcessor.from_pretrained
            processor = build(self.folder, local_files_only=True, trust_remote_code=False)

        def transform(image: Any) -> Any:
            return processor(images=image, return_tensors="pt")["pixel_values"][0]

        description = json.dumps(json.loads(processor.to_json_string()), sort_keys=True)
        return *try_transform(transform, type(processor).__name__, description), ()

    def finish(self, filled: Filled) -> LoadedModel:
        module = filled.module
        return replace(super().finish(filled), forward=lambda pixels_NCHW: module(pixel_values=pixels_NCHW))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep `transformers` from printing tables and progress bars; errors and notes say what matters in them."""
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
