"""Image models of the Hugging Face hub, or of a folder that `save_pretrained` wrote. Needs the extra 'transformers'.

A model is built with the class that its configuration names, whose weights were saved: a base class would lose the
classifier, and could add a random pooler. A model of images and texts is reduced to its vision tower, and to what makes
the image embedding of that tower's output.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hookx.errors import ModelError, one_line
from hookx.models import hub
from hookx.models.checkpoints import Weights, sha256_of
from hookx.models.fitting import Filled, find_allowed, list_first, modules_of
from hookx.models.image_embeds import NAME as IMAGE_EMBEDS
from hookx.models.image_embeds import ImageSide, find_image_side, find_tower_class, find_whole_class
from hookx.models.names import HUGGING_FACE
from hookx.models.preprocessing import imagenet_preprocessing, sides_px, size_text
from hookx.models.processors import adapt
from hookx.models.source import LoadedModel
from hookx.models.zoo import Architecture, Prepared, Zoo, explaining, import_extra
from hookx.options import ModelOptions
from hookx.plan import WeightsIdentity

_CONFIG = "config.json"
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_VISION_CONFIGS = ("vision_config", "image_config")  # within that of a model of images and texts
_NAFLEX = "siglip2"  # the checkpoints of SigLIP 2 for one size have the type of SigLIP
_USUAL_PX = 224
_NEXT_STEP = "use a folder that save_pretrained wrote: --model hf:./folder"


class HuggingFace(Zoo):
    """A repository, 'hf:facebook/dinov2-small' or with a revision 'hf:...@REVISION', or a folder, 'hf:./my-vit'.

    The argument `attn_implementation=eager` makes attention weights parts of the output; its default is that of
    `transformers`.
    """

    takes_arguments = True
    fits_images = True

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
        model_class, config, side, notes = _read_config(ref, folder)
        return HuggingFaceModel(
            ref=ref,
            arguments=options.model_args,
            notes=notes,
            folder=folder,
            repository=repository,
            commit=commit,
            model_class=model_class,
            config=config,
            image_side=side,
            has_transform=options.transform is not None,
            size_px=options.size_px,
            image_fit=options.fit,
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


def _read_config(ref: str, folder: Path) -> tuple[Any, Any, ImageSide | None, tuple[str, ...]]:
    """Return the class of a model in `transformers`, the configuration to build it with, what embeds, and notes."""
    transformers = _transformers()
    unknown = f"transformers {transformers.__version__} does not know the model {ref}"
    with _quiet(), explaining(unknown, "write a model with code of its own as --model path/to/file.py:factory"):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    whole, mapping = config, transformers.MODEL_MAPPING
    config = next(filter(None, (getattr(whole, name, None) for name in _VISION_CONFIGS)), whole)
    if str(config.model_type).startswith(_NAFLEX):
        raise ModelError(
            f"{ref} takes patches of images of many shapes ({type(config).__name__}, NaFlex); hookx makes one",
            "use a checkpoint of the same model for one size, such as hf:google/siglip2-base-patch16-224",
        )
    model_class = _named_class(whole) if config is whole else None
    if model_class is None:
        model_class = mapping.get(type(config), None)
    side: ImageSide | str = ""
    if config is not whole:
        with _quiet():
            side = _find_side_of(_named_class(whole) or mapping.get(type(whole), None), whole, config, ref)
        if model_class is None and isinstance(side, ImageSide):
            model_class = find_tower_class(side, config)
    takes = getattr(model_class, "main_input_name", "an unknown input")
    if takes != "pixel_values":
        what = model_class.__name__ if model_class is not None else type(config).__name__
        raise ModelError(f"{ref} ({what}) takes {takes}; hookx gives a model images only")
    assert model_class is not None  # It takes pixels.
    if config is whole:
        with _quiet():
            return model_class, config, *_look_behind(ref, model_class, config)
    note = f"{ref} takes images and texts; used its vision tower, {model_class.__name__}"
    if isinstance(side, ImageSide):
        return model_class, config, side, (f"{note}; its image embedding is the layer {IMAGE_EMBEDS}",)
    return model_class, config, None, (f"{note}; {side}",)


def _named_class(config: Any) -> Any:
    """Return the class that a configuration names, or None."""
    named = next(iter(config.architectures or ()), None)
    return getattr(_transformers(), named, None) if named else None


def _find_side_of(whole_class: Any, whole: Any, config: Any, ref: str) -> ImageSide | str:
    if whole_class is None:
        return f"transformers has no class for {type(whole).__name__}"
    return find_image_side(whole_class, whole, sides_px(getattr(config, "image_size", None) or _USUAL_PX, ref))


def _look_behind(ref: str, model_class: Any, config: Any) -> tuple[ImageSide | None, tuple[str, ...]]:
    """Return what makes the image embedding if a model is a vision tower that needs no weights for it, and notes."""
    is_tower = model_class is _transformers().MODEL_MAPPING.get(type(config), None)
    whole_class = find_whole_class(model_class, config) if is_tower else None
    if whole_class is None:
        return None, ()
    side = _find_side_of(whole_class, whole_class.config_class(vision_config=config.to_dict()), config, ref)
    if isinstance(side, ImageSide) and not side.parts:
        return side, ()
    note = f"{ref} is the vision tower of a {whole_class.__name__} alone: it has no projection, so no {IMAGE_EMBEDS}"
    return None, (note,)


@dataclass(frozen=True, kw_only=True)
class HuggingFaceModel(Architecture):
    """A class of `transformers`, and the configuration to build it with."""

    folder: Path
    repository: str
    commit: str
    """'' if the folder is the user's own."""
    model_class: Any
    config: Any
    image_side: ImageSide | None
    """What makes the image embedding of the vision tower's output, which is then its module `image_embeds`."""
    has_transform: bool
    """Whether the user's transform takes the place of the model's image processor."""
    size_px: tuple[int, int] | None = None
    """The size that --size requests."""
    image_fit: str | None = None

    def build(self) -> nn.Module:
        try:
            with _quiet():
                module = self.model_class._from_config(self.config, dtype=torch.float32, **self.arguments)
                if self.image_side is not None:
                    setattr(module, IMAGE_EMBEDS, self.image_side.build())
                return module
        except (ValueError, ImportError, TypeError, AttributeError) as error:
            raise ModelError(f"{self.model_class.__name__} cannot be built: {one_line(error)}") from error

    def build_published(self, options: ModelOptions) -> Filled:
        file = self._find_weights()
        torch.manual_seed(options.seed)  # For what the weights may lack.
        problem = f"the weights of {self.ref} cannot be loaded as {self.model_class.__name__}"
        with _quiet(), hub.tensors_only(), explaining(problem):
            module, missing, unexpected, notes = self._load_tower()
            allowed = find_allowed(options.allow_missing, module.state_dict(), self.ref)
            if self.image_side is not None and not set(missing) <= set(allowed):
                # The tower alone does not know the names of its weights in the whole model.
                whole = self.image_side.load(self.folder, with_tower=True, **self.arguments)
                if type(whole.tower) is self.model_class and len(whole.missing) < len(missing):
                    module, missing, unexpected = whole.tower, whole.missing, whole.unexpected
                    setattr(module, IMAGE_EMBEDS, whole.embeds)
        if refused := [name for name in missing if name not in allowed]:
            raise ModelError(
                f"the weights of {self.ref} do not fill {self.model_class.__name__}",
                list_first("missing", refused),
                f"to leave them random: --allow-missing {','.join(modules_of(refused)[:3])}",
            )
        if groups := Counter(name.split(".")[0] for name in sorted(unexpected)):
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

    def _load_tower(self) -> tuple[nn.Module, list[str], set[str], list[str]]:
        """Return the model with its image embedding, what its weights lack, what was left out of them, and notes."""
        module, report = self.model_class.from_pretrained(
            self.folder,
            config=self.config,
            local_files_only=True,
            output_loading_info=True,
            dtype=torch.float32,  # --precision chooses the arithmetic.
            **self.arguments,
        )
        missing, unexpected = sorted(report["missing_keys"]), set(report["unexpected_keys"])
        if self.image_side is None:
            return module, missing, unexpected, []
        loaded = self.image_side.load(self.folder)
        if loaded.missing:
            note = f"the weights of {self.ref} lack {', '.join(loaded.missing)}, so there is no {IMAGE_EMBEDS}"
            return module, missing, unexpected, [note]
        setattr(module, IMAGE_EMBEDS, loaded.embeds)
        return module, missing, unexpected & loaded.unexpected, []

    def fit(self, weights: Weights) -> tuple[Weights, Architecture]:
        tower = replace(self, image_side=None)
        found, _ = super(HuggingFaceModel, tower).fit(weights)
        if self.image_side is None:
            return found, tower
        tensors = self.image_side.tensors_in(weights)
        if tensors is None:
            note = f"{weights.file.name} holds the vision tower without the projection: no {IMAGE_EMBEDS}"
            return found, replace(tower, fitting_notes=(note,))
        notes = (f"{IMAGE_EMBEDS} has {', '.join(self.image_side.names)} of {weights.file.name}",) if tensors else ()
        is_whole = any(name.startswith(f"{self.image_side.tower}.") for name in found.state)
        if (
            is_whole and not found.prefix
        ):  # The tower has the names that it has in the whole model: leave out what is beside it.
            own = {name.partition(".")[0] for name in tower.build_bare().state_dict()}
            inside = {name: value for name, value in found.state.items() if name.partition(".")[0] in own}
            left_out = Counter(name.partition(".")[0] for name in found.state.keys() - inside.keys())
            found = replace(found, state=inside, left_out=dict(sorted(left_out.items())))
        return replace(found, state={**found.state, **tensors}), replace(self, fitting_notes=notes)

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
            assumed = imagenet_preprocessing(self._own_size_px() or _USUAL_PX)
            note = (
                f"{self.ref} has no image processor: assumed ImageNet's mean and std ({assumed}); "
                "override them with --resize, --crop, --mean, --std, or with --transform"
            )
            return assumed, None, (note,)
        with _quiet(), explaining(f"the image processor of {self.ref} cannot be built"):
            build = _transformers().AutoImageProcessor.from_pretrained
            processor = build(self.folder, local_files_only=True, trust_remote_code=False)

        recorded, transform = adapt(processor, self.size_px, self.image_fit)
        if self.size_px is not None and self._interpolates(module):
            recorded = replace(recorded, size=size_text(self.size_px))
        return recorded, transform, ()

    def _own_size_px(self) -> tuple[int, int] | None:
        size = getattr(self.config, "image_size", None)
        return sides_px(size, self.ref) if size else None

    def _interpolates(self, module: nn.Module) -> bool:
        """Return whether the model is to interpolate its position embeddings to the size of --size."""
        takes = "interpolate_pos_encoding" in inspect.signature(module.forward).parameters
        return takes and self.size_px not in (None, self._own_size_px())

    def finish(self, filled: Filled) -> LoadedModel:
        module: Any = filled.module
        arguments = {"interpolate_pos_encoding": True} if self._interpolates(module) else {}
        embeds = getattr(module, IMAGE_EMBEDS, None)

        def forward(pixels_NCHW: Tensor) -> Any:
            output = module(pixel_values=pixels_NCHW, **arguments)
            if embeds is not None:
                embeds(output)
            return output

        return replace(super().finish(filled), forward=forward)


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
