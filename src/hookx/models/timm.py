"""timm's models, with published weights, random ones, or those of a file. Needs the extra 'timm'."""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlparse

import torch
from torch import nn

from hookx.errors import ModelError, closest, one_line
from hookx.models import hub, preprocessing
from hookx.models.arguments import literal
from hookx.models.checkpoints import Weights
from hookx.models.fitting import Filled, classes_in, without_prefix
from hookx.models.names import TIMM
from hookx.models.zoo import Architecture, Prepared, Zoo, names_published
from hookx.options import ModelOptions
from hookx.plan import WeightsIdentity, describe_arguments

_NEXT_STEP = "use a file: --weights weights.safetensors    or random weights: --weights none"


class Timm(Zoo):
    """The models that `timm.list_models` names: 'timm:resnet18', or with a tag 'timm:resnet18.a1_in1k'."""

    takes_arguments = True

    def owns(self, ref: str) -> bool:
        return ref.startswith(TIMM)

    def list_models(self, pattern: str = "*") -> dict[str, str]:
        """Return the models that match a glob, each with its kind; one with a '.' matches their tags, too.

        Example:
            >>> Timm().list_models("timm:resnet18.a*")
            {'timm:resnet18.a1_in1k': 'timm', 'timm:resnet18.a2_in1k': 'timm', 'timm:resnet18.a3_in1k': 'timm'}
        """
        timm, glob = _import_timm(), pattern.removeprefix(TIMM)
        found = timm.list_models(glob, include_tags="." in glob)
        if not found:
            similar = closest(glob, timm.list_models(include_tags="." in glob))
            raise ModelError(f"no model of timm matches '{glob}'; closest: {similar}")
        return {TIMM + name: "timm" for name in found}

    def weights_of(self, ref: str) -> list[tuple[str, bool]]:
        """Return the names of a model's weights, which timm calls tags, each with whether it is in the cache.

        Example:
            >>> [tag for tag, is_cached in Timm().weights_of("timm:resnet26")]
            ['bt_in1k']
        """
        model = self.find(ref, "none")
        tags = [model.tag] if "." in ref else sorted(model.tags, key=lambda tag: tag != model.tag)
        return [(tag, _is_cached(dataclasses.replace(model, tag=tag).config)) for tag in tags]

    def find(self, ref: str, weights: str, options: ModelOptions = ModelOptions()) -> TimmModel:
        timm, known = _import_timm(), _tags_by_architecture()
        architecture, _, tag = ref.removeprefix(TIMM).partition(".")
        if architecture not in known:
            similar = closest(architecture, known).replace(", ", f", {TIMM}")
            raise ModelError(
                f"timm {timm.__version__} has no model '{architecture}'; closest: {TIMM}{similar}",
                f"list them all: hookx list-models '{TIMM}*'",
            )
        tags = known[architecture]
        asked = weights if weights != "default" and names_published(weights) else ""
        for wanted in filter(None, (asked, tag)):
            if wanted not in tags:
                raise ModelError(
                    f"{TIMM}{architecture} has no weights '{wanted}'; it has: {', '.join(tags) or 'none'}",
                    "also: default, none (random), or a file (.safetensors, .pt, .pth)",
                )
        if asked and tag and asked != tag:
            raise ModelError(f"{ref} names the weights {tag}, and --weights names {asked}", "name them in one place")
        first = timm.models.get_pretrained_cfg(architecture)
        default = first.tag or "" if first is not None and first.tag in tags else "".join(tags[:1])
        model = TimmModel(architecture, asked or tag or default, tags, {})
        model = dataclasses.replace(model, arguments=_parse_arguments(model.ref, options))
        if names_published(weights):
            model.check_published()
        return model


def _import_timm() -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import timm
            import timm.data
    except ImportError as error:
        step = "install it as an extra of hookx: pip install 'hookx-vision[timm]'"
        if error.name == "timm":
            raise ModelError("models of timm need timm, which is not installed", step) from None
        raise ModelError(f"timm cannot be imported: {one_line(error)}", step) from None
    return timm


@functools.lru_cache(maxsize=1)
def _tags_by_architecture() -> dict[str, tuple[str, ...]]:
    timm = _import_timm()
    tags: dict[str, list[str]] = {name: [] for name in timm.list_models()}
    for name in timm.list_pretrained():
        architecture, _, tag = name.partition(".")
        tags[architecture].append(tag)
    return {architecture: tuple(names) for architecture, names in tags.items()}


def _parse_arguments(ref: str, options: ModelOptions) -> dict[str, Any]:
    """Parse arguments of `timm.create_model`, whose models do not annotate the types of theirs."""
    arguments = {name: literal(text) for name, text in options.model_args.items()}
    for name in ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"):
        if name in arguments:
            raise ModelError(f"--model-arg {name} is not supported: choose the weights of {ref} with --weights")
    for name in ("features_only", "in_chans"):
        if arguments.get(name) not in (None, False, 3):
            raise ModelError(f"--model-arg {name}={arguments[name]}: hookx takes the whole model, and RGB images")
    return arguments


@dataclass(frozen=True)
class TimmModel(Architecture):
    """An architecture, and the weights whose configuration it takes."""

    architecture: str
    tag: str
    """'' if the architecture has no published weights."""
    tags: tuple[str, ...]
    arguments: Mapping[str, Any]
    """The user's arguments of `timm.create_model`."""
    classes: int | None = None
    """The number of classes in a file of weights, if it differs."""
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.architecture}.{self.tag}" if self.tag else self.architecture

    @property
    def ref(self) -> str:  # type: ignore[override]
        return TIMM + self.name

    @property
    def config(self) -> Any:
        return _import_timm().models.get_pretrained_cfg(self.name)

    def build(self) -> nn.Module:
        return self._create()

    def _create(self, **source: Any) -> nn.Module:
        timm = _import_timm()
        arguments = {**self.arguments, **({"num_classes": self.classes} if self.classes else {})}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                module: nn.Module = timm.create_model(self.name, **source, **arguments)
            except Exception as error:
                if not arguments:
                    raise
                said = describe_arguments(arguments)
                raise ModelError(f"{self.ref} cannot be built with {said}: {one_line(error)}") from error
        return module

    def check_published(self) -> None:
        if not self.tag:
            raise ModelError(f"timm has no published weights for {self.ref}", _NEXT_STEP)
        classes = self.config.num_classes
        if self.arguments.get("num_classes") not in (None, 0, classes):
            raise ModelError(
                f"the weights of {self.ref} are for {classes} classes, not {self.arguments['num_classes']}",
                "num_classes=0 leaves out the classifier; load a classifier of your own from a file: --weights FILE",
            )

    def build_published(self, options: ModelOptions) -> Filled:
        overlay, config = {}, self.config
        if config.hf_hub_id:
            repository, names, revision = _on_hub(config)
            file = hub.fetch_file(self.ref, repository, names, revision, _NEXT_STEP)
            # `custom_load` describes the file behind the configuration's URL.
            overlay = {"file": str(file), "custom_load": config.custom_load if config.hf_hub_filename else False}
        torch.manual_seed(options.seed)
        with hub.tensors_only():
            try:
                module = self._create(pretrained=True, pretrained_cfg_overlay=overlay)
            except ModelError:
                raise
            except Exception as error:  # Sockets, proxies, disks and damaged files raise all kinds of exceptions.
                raise ModelError(
                    f"weights for {self.ref} could not be loaded: {one_line(error)}", _NEXT_STEP
                ) from error
        return Filled(module, WeightsIdentity(self.ref))

    def fit(self, weights: Weights) -> tuple[Weights, TimmModel]:
        own = self.build_bare()
        weights = without_prefix(weights, own.state_dict().keys(), self.ref)
        count = getattr(own, "num_classes", None)
        if "num_classes" in self.arguments or not isinstance(count, int) or not count:
            return weights, self
        classes = classes_in(weights, own.state_dict(), self._state_for_classes, count)
        if not classes:
            return weights, self
        note = f"{self.ref} is built for {classes} classes, as the classifier in {weights.file.name} is"
        return weights, dataclasses.replace(self, classes=classes, notes=(note,))

    def _state_for_classes(self, count: int) -> dict[str, Any]:
        return dataclasses.replace(self, classes=count).build_bare().state_dict()

    def prepare(self, module: nn.Module) -> Prepared:
        """Return timm's own data configuration, as `timm.data.resolve_model_data_config` does."""
        timm, published = _import_timm(), getattr(module, "pretrained_cfg")  # noqa: B009
        size = self.arguments.get("img_size")
        asked = {"input_size": _input_size(size)} if size else {}
        config = timm.data.resolve_data_config(asked, pretrained_cfg=published)
        simple = preprocessing.from_timm_config(config, self.ref)
        if simple is not None:
            return simple, None, ()
        transform = timm.data.create_transform(**config, is_training=False)
        description = json.dumps(config, sort_keys=True)
        return *preprocessing.try_transform(transform, "timm.data.create_transform", description), ()


def _input_size(size: Any) -> tuple[int, int, int]:
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return 3, int(height), int(width)


def _on_hub(config: Any) -> tuple[str, tuple[str, ...], str | None]:
    repository, _, revision = config.hf_hub_id.partition("@")
    names = ("model.safetensors", "pytorch_model.bin")
    return repository, (config.hf_hub_filename,) if config.hf_hub_filename else names, revision or None


def _is_cached(config: Any) -> bool:
    if config.hf_hub_id:
        repository, names, revision = _on_hub(config)
        return hub.cached_file(repository, names, revision) is not None
    name = Path(urlparse(config.url or "").path).name
    return bool(name) and (Path(torch.hub.get_dir()) / "checkpoints" / name).is_file()
