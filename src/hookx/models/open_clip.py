"""The image towers of open_clip's models: CLIP, SigLIP, CoCa, EVA, ConvNeXt. Needs the extra 'open_clip'.

The tower of the texts is not built. What the image tower returns is `model.encode_image`, before it is normalized.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import Any

from torch import nn

from hookx.errors import ModelError, closest, one_line
from hookx.models import hub, preprocessing
from hookx.models.checkpoints import Weights, read_weights
from hookx.models.fitting import Filled, fill, without_prefix
from hookx.models.names import OPEN_CLIP
from hookx.models.preprocessing import sides_px, size_text
from hookx.models.source import LoadedModel
from hookx.models.zoo import Architecture, Prepared, Zoo, explaining, import_extra, no_such_weights
from hookx.options import ModelOptions
from hookx.plan import Preprocessing, WeightsIdentity

_NEXT_STEP = "use a file: --weights weights.safetensors    or random weights: --weights none"
_TOWER = "visual"  # what models call the image tower
_POSITIONS = ("positional_embedding",)
_MAX_TAGS_SHOWN = 6


class OpenClip(Zoo):
    """The models that `open_clip.list_models` names: 'open_clip:ViT-B-32', or with a tag '.../openai'."""

    def owns(self, ref: str) -> bool:
        return ref.startswith(OPEN_CLIP)

    def list_models(self, pattern: str = "*") -> dict[str, str]:
        """Return the models that match a glob, each with its kind; one with a '/' matches their tags, too."""
        library, glob = _library(), pattern.removeprefix(OPEN_CLIP)
        tagged = [f"{name}/{tag}" for name, tag in library.list_pretrained()]
        known = tagged if "/" in glob else library.list_models()
        found = [name for name in known if fnmatchcase(name, glob)]
        if not found:
            raise ModelError(f"no model of open_clip matches '{glob}'; closest: {closest(glob, known)}")
        return {OPEN_CLIP + name: "open_clip" for name in found}

    def weights_of(self, ref: str) -> list[tuple[str, bool]]:
        """Return the names of a model's weights, which open_clip calls tags, each with whether it is in the cache."""
        name, _, tag = ref.removeprefix(OPEN_CLIP).partition("/")
        tags = [tag] if tag else _library().list_pretrained_tags_by_model(name)
        return [(one, _is_cached(_config_of(name, one))) for one in tags]

    def find(self, ref: str, published: str, options: ModelOptions = ModelOptions()) -> OpenClipTower:
        library = _library()
        name, _, tag = ref.removeprefix(OPEN_CLIP).partition("/")
        if name not in library.list_models():
            similar = closest(name, library.list_models()).replace(", ", f", {OPEN_CLIP}")
            raise ModelError(
                f"open_clip {library.__version__} has no model '{name}'; closest: {OPEN_CLIP}{similar}",
                f"list them all: hookx list-models '{OPEN_CLIP}*'",
            )
        tags = library.list_pretrained_tags_by_model(name)
        asked = published if published != "default" else ""
        for wanted in filter(None, (asked, tag)):
            if wanted not in tags:
                raise _no_such_tag(OPEN_CLIP + name, wanted, tags)
        if asked and tag and asked != tag:
            raise ModelError(f"{ref} names the weights {tag}, and --weights names {asked}", "name them in one place")
        tag = asked or tag
        if published and not tag:
            tag = _only_tag(OPEN_CLIP + name, tags)
        tower = OpenClipTower(ref=f"{OPEN_CLIP}{name}{f'/{tag}' * bool(tag)}", notes=_note_activation(name, tag))
        return tower if options.size_px in (None, tower.own_size_px) else replace(tower, size_px=options.size_px)


def _library() -> Any:
    return import_extra("open_clip", "open_clip")


def _config_of(name: str, tag: str) -> dict[str, Any]:
    return dict(_library().get_pretrained_cfg(name, tag))


def _on_hub(config: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Return the repository of published weights, and the names that their file can have, preferred ones first."""
    repository, _, file = config["hf_hub"].rpartition("/")
    if not file:
        return repository, ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    stem, _, suffix = file.rpartition(".")
    return repository, tuple(dict.fromkeys((f"{stem}.safetensors", file))) if suffix in ("bin", "pth") else (file,)


def _is_cached(config: Mapping[str, Any]) -> bool:
    return bool(config["hf_hub"]) and hub.cached_file(*_on_hub(config)) is not None


def _no_such_tag(model: str, tag: str, tags: Sequence[str]) -> ModelError:
    if len(tags) <= _MAX_TAGS_SHOWN:
        return no_such_weights(model, tag, tags)
    return ModelError(
        f"{model} has no weights '{tag}'; closest: {closest(tag, tags)}",
        f"list them all: hookx list-models '{model}/*'    also: none (random), or a file (.safetensors, .pt, .pth)",
    )


def _only_tag(model: str, tags: Sequence[str]) -> str:
    """Return the tag of a model that has one; no tag is the default of several."""
    if not tags:
        raise ModelError(f"open_clip has no published weights for {model}", _NEXT_STEP)
    if len(tags) > 1:
        some = ", ".join(tags[:_MAX_TAGS_SHOWN]) + (", ..." if len(tags) > _MAX_TAGS_SHOWN else "")
        raise ModelError(
            f"{model} has several weights, and none is the default: {some}",
            f"name one: --model {model}/{tags[-1]}    list them all: hookx list-models '{model}/*'",
            "or use random weights: --weights none",
        )
    return tags[0]


def _note_activation(name: str, tag: str) -> tuple[str, ...]:
    """Return a note if weights were trained with another activation than the architecture has."""
    library = _library()
    own = bool(library.get_model_config(name).get("quick_gelu", False))
    trained = bool(_config_of(name, tag).get("quick_gelu", False)) if tag else own
    if own == trained:
        return ()
    with_quick, other = "QuickGELU", f"{OPEN_CLIP}{name}-quickgelu/{tag}"
    if own:
        with_quick, other = "GELU", f"{OPEN_CLIP}{name.removesuffix('-quickgelu')}/{tag}"
    return (
        f"the weights {tag} of {OPEN_CLIP}{name} were trained with {with_quick}, which it does not use: {other} does",
    )


@dataclass(frozen=True, kw_only=True)
class OpenClipTower(Architecture):
    """The image tower of a model, with the tag of the weights whose preprocessing it takes, if they are published."""

    size_px: tuple[int, int] | None = None
    """Another size of the input than its own."""

    @property
    def name(self) -> str:
        return self.ref.removeprefix(OPEN_CLIP).partition("/")[0]

    @property
    def tag(self) -> str:
        return self.ref.removeprefix(OPEN_CLIP).partition("/")[2]

    @property
    def own_size_px(self) -> tuple[int, int]:
        return sides_px(self._config["vision_cfg"].get("image_size", 224), self.ref)

    @property
    def _config(self) -> dict[str, Any]:
        return dict(_library().get_model_config(self.name))

    @property
    def _is_timm(self) -> bool:
        return "timm_model_name" in self._config["vision_cfg"]

    def build(self) -> nn.Module:
        config = self._config
        vision = {**config["vision_cfg"]}
        if self._is_timm:
            vision["timm_model_pretrained"] = False
        elif self.size_px is not None:  # A tower of timm's gets its size behind its weights; see `finish`.
            height, width = self.size_px
            vision["image_size"] = height if height == width else self.size_px
        with warnings.catch_warnings(), explaining(f"the image tower of {self.ref} cannot be built"):
            warnings.simplefilter("ignore")
            return _library().model._build_vision_tower(config["embed_dim"], vision, config.get("quick_gelu", False))

    def build_published(self, options: ModelOptions) -> Filled:
        config = _config_of(self.name, self.tag)
        if not config["hf_hub"]:  # As of OpenAI's weights before open_clip 3: TorchScript behind a URL.
            version = _library().__version__
            problem = f"open_clip {version} has no file on the Hugging Face hub for {self.ref}"
            raise ModelError(problem, "install a later one: pip install -U open-clip-torch", _NEXT_STEP)
        file = hub.fetch_file(self.ref, *_on_hub(config), None, _NEXT_STEP)
        assert file is not None
        weights = read_weights(str(file), ModelOptions(seed=options.seed))
        weights, _ = self.fit(weights)
        filled = fill(self.build(), weights, self.ref, options, "")
        notes = []
        if weights.left_out:
            groups = ", ".join(
                f"{name} ({count} tensor{'s' * (count > 1)})" for name, count in weights.left_out.items()
            )
            notes.append(f"left out of the weights of {self.ref}: {groups}")
        return Filled(filled.module, WeightsIdentity(self.ref), tuple(notes))

    def fit(self, weights: Weights) -> tuple[Weights, OpenClipTower]:
        library = _library()
        whole: Any = SimpleNamespace(visual=self.build_bare())
        with explaining(f"the weights in {weights.file.name} cannot be turned into those of {self.ref}"):
            state = dict(library.convert.convert_state_dict(whole, dict(weights.state)))
        weights = without_prefix(replace(weights, state=state), whole.visual.state_dict().keys(), self.ref)
        positions = {f"{_TOWER}.{name}": weights.state[name] for name in _POSITIONS if name in weights.state}
        if self.size_px is not None:
            library.model.resize_pos_embed(positions, whole)
        resized = {name.removeprefix(f"{_TOWER}."): tensor for name, tensor in positions.items()}
        return replace(weights, state={**weights.state, **resized}), self

    def prepare(self, module: nn.Module) -> Prepared:
        """Return open_clip's own preprocessing of the tag; without one, that of its models that do not say."""
        transform = _library().transform
        config = {**asdict(transform.PreprocessCfg()), **(_config_of(self.name, self.tag) if self.tag else {})}
        config = transform.merge_preprocess_dict(transform.PreprocessCfg(), config)
        size_px = self.size_px or self.own_size_px
        said = size_text(size_px) if self.size_px else ""
        if config["resize_mode"] == "longest":
            made = transform.image_transform_v2(transform.PreprocessCfg(**{**config, "size": size_px}), is_train=False)
            recorded, function = preprocessing.try_transform(made, "open_clip.transform.image_transform_v2")
            return replace(recorded, size=said), function, ()
        mean, std = (tuple(map(float, config[key])) for key in ("mean", "std"))
        plain = Preprocessing(1, 1, mean, std, config["interpolation"]).sized(size_px, size_px)
        fit = "squash" if config["resize_mode"] == "squash" else "crop"
        return replace(plain, fit=fit, size=said), None, ()

    def finish(self, filled: Filled) -> LoadedModel:
        module: Any = filled.module
        if self._is_timm and self.size_px is not None and hasattr(module, "set_input_size"):
            try:
                module.set_input_size(self.size_px)
            except Exception as error:
                asked = size_text(self.size_px)
                raise ModelError(
                    f"{self.ref} takes no images of {asked}: {one_line(error)}", "try another --size"
                ) from error
        return super().finish(filled)
