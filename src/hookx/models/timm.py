"""timm's models, with published weights, random ones, or those of a file. Needs the extra 'timm'."""

from __future__ import annotations

import functools
import json
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hookx.errors import ModelError, closest, one_line
from hookx.models import hub, preprocessing
from hookx.models.arguments import literal
from hookx.models.checkpoints import Weights
from hookx.models.fitting import Filled, without_prefix
from hookx.models.names import TIMM
from hookx.models.preprocessing import sides_px, size_text
from hookx.models.timm_files import convert
from hookx.models.zoo import Architecture, Prepared, Zoo, cached_download, explaining, import_extra, no_such_weights
from hookx.options import ModelOptions
from hookx.plan import WeightsIdentity, describe_arguments

_NEXT_STEP = "use a file: --weights weights.safetensors    or random weights: --weights none"


class Timm(Zoo):
    """The models that `timm.list_models` names: 'timm:resnet18', or with a tag 'timm:resnet18.a1_in1k'."""

    takes_arguments = True

    def owns(self, ref: str) -> bool:
        return ref.startswith(TIMM)

    def list_models(self, pattern: str = "*") -> dict[str, str]:
        """Return the models that match a glob, each with its kind; one with a '.' matches their tags, too."""
        timm, glob = _timm(), pattern.removeprefix(TIMM)
        found = timm.list_models(glob, include_tags="." in glob)
        if not found:
            similar = closest(glob, timm.list_models(include_tags="." in glob))
            raise ModelError(f"no model of timm matches '{glob}'; closest: {similar}")
        return {TIMM + name: "timm" for name in found}

    def weights_of(self, ref: str) -> list[tuple[str, bool]]:
        """Return the names of a model's weights, which timm calls tags, each with whether it is in the cache."""
        architecture, _, default = self.find(ref, "").name.partition(".")
        tags = (
            [default] if "." in ref else sorted(_tags_by_architecture()[architecture], key=lambda tag: tag != default)
        )
        return [(tag, _is_cached(_config_of(f"{architecture}.{tag}".removesuffix(".")))) for tag in tags]

    def find(self, ref: str, published: str, options: ModelOptions = ModelOptions()) -> TimmModel:
        timm, known = _timm(), _tags_by_architecture()
        architecture, _, tag = ref.removeprefix(TIMM).partition(".")
        if architecture not in known:
            similar = closest(architecture, known).replace(", ", f", {TIMM}")
            raise ModelError(
                f"timm {timm.__version__} has no model '{architecture}'; closest: {TIMM}{similar}",
                f"list them all: hookx list-models '{TIMM}*'",
            )
        tags = known[architecture]
        asked = published if published != "default" else ""
        for wanted in filter(None, (asked, tag)):
            if wanted not in tags:
                raise no_such_weights(TIMM + architecture, wanted, tags)
        if asked and tag and asked != tag:
            raise ModelError(f"{ref} names the weights {tag}, and --weights names {asked}", "name them in one place")
        first = _config_of(architecture)
        default = first.tag or "" if first is not None and first.tag in tags else "".join(tags[:1])
        ref = f"{TIMM}{architecture}.{asked or tag or default}".removesuffix(".")
        model = TimmModel(ref=ref, arguments=_parse_arguments(ref, options), image_fit=options.fit)
        if published:
            model.check_published()
        return model.at_size(options.size_px)


def _timm() -> Any:
    return import_extra("timm", "timm")


def _config_of(name: str) -> Any:
    return _timm().models.get_pretrained_cfg(name)


@functools.lru_cache(maxsize=1)
def _tags_by_architecture() -> dict[str, tuple[str, ...]]:
    timm = _timm()
    tags: dict[str, tuple[str, ...]] = dict.fromkeys(timm.list_models(), ())
    for name in timm.list_pretrained():
        architecture, _, tag = name.partition(".")
        tags[architecture] += (tag,)
    return tags


def _parse_arguments(ref: str, options: ModelOptions) -> dict[str, Any]:
    """Parse arguments of `timm.create_model`, whose models do not annotate the types of theirs."""
    arguments = {name: literal(text) for name, text in options.model_args.items()}
    for name in ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"):
        if name in arguments:
            raise ModelError(f"--model-arg {name} is not supported: choose the weights of {ref} with --weights")
    if arguments.get("features_only") not in (None, False):
        raise ModelError(f"--model-arg features_only={arguments['features_only']}: hookx takes the whole model")
    channels = arguments.get("in_chans", 3)
    if not isinstance(channels, int) or isinstance(channels, bool) or channels < 1:
        raise ModelError(f"--model-arg in_chans={channels}: write the number of channels, as in in_chans=13")
    return arguments


@dataclass(frozen=True, kw_only=True)
class TimmModel(Architecture):
    """An architecture with the tag of the weights whose configuration it takes, if there are published ones."""

    size_px: tuple[int, int] | None = None
    """Another size of the input than its own."""
    image_fit: str | None = None

    @property
    def name(self) -> str:
        return self.ref.removeprefix(TIMM)

    @property
    def architecture(self) -> str:
        return self.name.partition(".")[0]

    @property
    def channels(self) -> int | None:
        return self.arguments.get("in_chans")

    def build(self, **source: Any) -> nn.Module:
        arguments = {**self.arguments, **self.variant, **self._sizing()}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return _timm().create_model(self.name, **source, **arguments)
        except Exception as error:
            if not arguments:
                raise
            said, steps = describe_arguments(arguments), ["try another --size"] if self.size_px else []
            raise ModelError(f"{self.ref} cannot be built with {said}: {one_line(error)}", *steps) from error

    def at_size(self, size_px: tuple[int, int] | None) -> TimmModel:
        """Return the architecture for another size of its input."""
        argument = self.arguments.get("img_size")
        if size_px is not None and argument is not None and sides_px(argument, self.ref) != size_px:
            raise ModelError(
                f"{self.ref}: --size {size_text(size_px)} and --model-arg img_size={argument} differ",
                "give one of them",
            )
        return self if size_px in (None, self._own_size_px()) else replace(self, size_px=size_px)

    def _own_size_px(self) -> tuple[int, int]:
        config = _config_of(self.name)
        return sides_px(self.arguments.get("img_size") or (config.input_size if config else 224), self.ref)

    def _sizing(self) -> dict[str, Any]:
        """Return the argument that builds a model for the size; {} if it takes any size as it is."""
        if self.size_px is None or self.arguments.get("dynamic_img_size") or not _takes_size(self.name, self.size_px):
            return {}
        height, width = self.size_px
        return {"img_size": height if height == width else self.size_px}

    def check_published(self) -> None:
        """Refuse published weights where there are none, or where they are for another number of classes."""
        if "." not in self.name:
            raise ModelError(f"timm has no published weights for {self.ref}", _NEXT_STEP)
        classes = _config_of(self.name).num_classes
        if self.arguments.get("num_classes") not in (None, 0, classes):
            raise ModelError(
                f"the weights of {self.ref} are for {classes} classes, not {self.arguments['num_classes']}",
                "num_classes=0 leaves out the classifier; load a classifier of your own from a file: --weights FILE",
            )

    def build_published(self, options: ModelOptions) -> Filled:
        overlay, config = {}, _config_of(self.name)
        if config.hf_hub_id:
            repository, names, revision = _on_hub(config)
            file = hub.fetch_file(self.ref, repository, names, revision, _NEXT_STEP)
            # `custom_load` describes the file behind the configuration's URL.
            overlay = {"file": str(file), "custom_load": config.custom_load if config.hf_hub_filename else False}
        torch.manual_seed(options.seed)
        with hub.tensors_only(), explaining(f"weights for {self.ref} could not be loaded", _NEXT_STEP):
            module = self.build(pretrained=True, pretrained_cfg_overlay=overlay)
        return Filled(module, WeightsIdentity(self.ref))

    def fit(self, weights: Weights) -> tuple[Weights, TimmModel]:
        module = self.build_bare()
        own, classes = module.state_dict(), getattr(module, "num_classes", None)
        weights = convert(without_prefix(weights, own.keys(), self.ref), module, self.architecture)
        if "num_classes" in self.arguments or not isinstance(classes, int) or not classes:
            return weights, self
        return weights, self.adapt_classes(weights, own, classes)

    def prepare(self, module: nn.Module) -> Prepared:
        """Return timm's own data configuration, as `timm.data.resolve_model_data_config` does."""
        data, published = _timm().data, getattr(module, "pretrained_cfg")  # noqa: B009
        asked = {}
        if size := self.size_px or self.arguments.get("img_size"):
            asked["input_size"] = (3, *sides_px(size, self.ref))
        config = data.resolve_data_config(asked, pretrained_cfg=published)
        said = size_text(self.size_px) if self.size_px else ""
        if self.image_fit is not None:  # In place of `crop_mode`; what is cut off stays `crop_pct`.
            config["crop_mode"] = "center"
        if (simple := preprocessing.from_timm_config(config, self.ref)) is not None:
            return replace(simple, size=said), None, ()
        transform = data.create_transform(**config, is_training=False)
        description = json.dumps(config, sort_keys=True)
        recorded, made = preprocessing.try_transform(transform, "timm.data.create_transform", description)
        return replace(recorded, size=said), made, ()


@functools.lru_cache(maxsize=64)
def _takes_size(name: str, size_px: tuple[int, int]) -> bool:
    """Return whether a model is built for a size; one of convolutions takes any and has no such argument."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _timm().create_model(name, img_size=size_px)
    except TypeError as error:
        return "unexpected keyword argument 'img_size'" not in str(error)
    except Exception:  # It takes the argument, and not this size: building the model says so.
        return True
    return True


def _on_hub(config: Any) -> tuple[str, tuple[str, ...], str | None]:
    repository, _, revision = config.hf_hub_id.partition("@")
    names = ("model.safetensors", "pytorch_model.bin")
    return repository, (config.hf_hub_filename,) if config.hf_hub_filename else names, revision or None


def _is_cached(config: Any) -> bool:
    if config.hf_hub_id:
        repository, names, revision = _on_hub(config)
        return hub.cached_file(repository, names, revision) is not None
    return cached_download(config.url or "").is_file()
