"""timm's models: by name, with published weights, random ones, or those of a file. Needs the extra 'timm'."""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from hookx.errors import ModelError, closest
from hookx.models import hub, preprocessing
from hookx.models.arguments import literal
from hookx.models.checkpoints import Weights, is_weights_file, read_weights
from hookx.models.fitting import classes_in, load_weights, notes_on_types, without_prefix
from hookx.models.loaded import LoadedModel, Unallocated, one_line
from hookx.options import ModelOptions
from hookx.plan import Preprocessing

PREFIX = "timm:"
_NEXT_STEP = "use a file: --weights weights.safetensors    or random weights: --weights none"


def list_models(pattern: str = "*") -> dict[str, str]:
    """Return timm's models that a glob names, each with its kind; one with a '.' names their tags, too.

    Example:
        >>> list_models("timm:resnet18.a*")
        {'timm:resnet18.a1_in1k': 'timm', 'timm:resnet18.a2_in1k': 'timm', 'timm:resnet18.a3_in1k': 'timm'}
    """
    timm, glob = _timm(), pattern.removeprefix(PREFIX)
    found = timm.list_models(glob, include_tags="." in glob)
    if not found:
        similar = closest(glob, timm.list_models(include_tags="." in glob))
        raise ModelError(f"no model of timm matches '{glob}'; closest: {similar}")
    return {PREFIX + name: "timm" for name in found}


def weights_of(ref: str) -> list[tuple[str, bool]]:
    """Return the weights that a model has (timm calls them tags), the default first, and whether they are in the cache.

    Example:
        >>> [tag for tag, is_cached in weights_of("timm:resnet26")]
        ['bt_in1k']
    """
    entry = _entry(ref)
    tags = [entry.tag] if "." in ref else sorted(entry.tags, key=lambda tag: tag != entry.tag)
    return [(tag, _is_cached(_config(entry.architecture, tag))) for tag in tags]


def load_model(ref: str, weights: str = "default", options: ModelOptions = ModelOptions()) -> LoadedModel:
    """Build a model of timm with the weights asked for.

    Args:
        ref: 'timm:' and a name of timm, with or without a tag: 'timm:resnet18', 'timm:resnet18.a1_in1k'.
        weights: 'default' (those of the tag, or of the first one that timm lists), a tag, 'none' (random:
            `torch.manual_seed(seed)`, then `timm.create_model`), or a file.
        options: `model_args` are `timm.create_model`'s, as in img_size=384.

    Raises:
        ModelError: no such model or weights; weights that cannot be downloaded, read, or made to fit.
    """
    entry = _entry(ref, weights)
    arguments = _arguments(entry, options)
    torch.manual_seed(options.seed)
    if weights == "none":
        return _loaded(entry, _build(entry, arguments), arguments, f"random (seed {options.seed})")
    if is_weights_file(weights):
        return _from_file(entry, read_weights(weights, options), arguments, options)
    module = _build_published(entry, arguments)
    return _loaded(entry, module, arguments, f"{PREFIX}{entry.name}")


def skeleton(ref: str, weights: str = "default", options: ModelOptions = ModelOptions()) -> LoadedModel:
    """Build a model of timm without memory for its parameters (meta device)."""
    entry = _entry(ref, weights)
    arguments = _arguments(entry, options)
    if is_weights_file(weights) and Path(weights).is_file():
        _, arguments = _fitted(entry, read_weights(weights, options, shapes_only=True), arguments)
    elif weights != "none" and not is_weights_file(weights):
        _check_published(entry, arguments)
    return _loaded(entry, _bare(entry, arguments), arguments, "none")


@dataclass(frozen=True)
class _Entry:
    """A model of timm: its architecture, and the weights whose configuration it takes ('' if it has none)."""

    architecture: str
    tag: str
    tags: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.architecture}.{self.tag}" if self.tag else self.architecture

    @property
    def ref(self) -> str:
        return PREFIX + self.name


def _timm() -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import timm
            import timm.data
    except ImportError as error:
        if error.name == "timm":
            raise ModelError("models of timm need timm, which is not installed", _install("timm")) from None
        raise ModelError(f"timm cannot be imported: {one_line(error)}", _install("timm")) from None
    return timm


def _install(extra: str) -> str:
    return f"install it as an extra of hookx: pip install 'hookx-vision[{extra}]'"


def _entry(ref: str, weights: str = "default") -> _Entry:
    timm, known = _timm(), _tags()
    architecture, _, tag = ref.removeprefix(PREFIX).partition(".")
    if architecture not in known:
        similar = closest(architecture, known).replace(", ", f", {PREFIX}")
        raise ModelError(
            f"timm {timm.__version__} has no model '{architecture}'; closest: {PREFIX}{similar}",
            f"list them all: hookx list-models '{PREFIX}*'",
        )
    tags = known[architecture]
    asked = weights if weights not in ("default", "none") and not is_weights_file(weights) else ""
    for wanted in filter(None, (asked, tag)):
        if wanted not in tags:
            raise ModelError(
                f"{PREFIX}{architecture} has no weights '{wanted}'; it has: {', '.join(tags) or 'none'}",
                "also: default, none (random), or a file (.safetensors, .pt, .pth)",
            )
    if asked and tag and asked != tag:
        raise ModelError(f"{ref} names the weights {tag}, and --weights names {asked}", "name them in one place")
    first = timm.models.get_pretrained_cfg(architecture)
    default = first.tag or "" if first is not None and first.tag in tags else "".join(tags[:1])
    return _Entry(architecture, asked or tag or default, tags)


@functools.lru_cache(maxsize=1)
def _tags() -> dict[str, tuple[str, ...]]:
    """Return every architecture of timm, with the tags of its weights."""
    timm = _timm()
    tags: dict[str, list[str]] = {name: [] for name in timm.list_models()}
    for name in timm.list_pretrained():
        architecture, _, tag = name.partition(".")
        tags[architecture].append(tag)
    return {architecture: tuple(names) for architecture, names in tags.items()}


def _config(architecture: str, tag: str) -> Any:
    return _timm().models.get_pretrained_cfg(f"{architecture}.{tag}" if tag else architecture)


def _arguments(entry: _Entry, options: ModelOptions) -> dict[str, Any]:
    """Read the arguments of `timm.create_model`; its models do not say of which types theirs are."""
    arguments = {name: literal(text) for name, text in options.model_args.items()}
    for name in ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"):
        if name in arguments:
            raise ModelError(f"--model-arg {name}: which weights {entry.ref} gets is said by --weights")
    for name in ("features_only", "in_chans"):
        if arguments.get(name) not in (None, False, 3):
            raise ModelError(f"--model-arg {name}={arguments[name]}: hookx takes the whole model, and RGB images")
    return arguments


def _build(entry: _Entry, arguments: Mapping[str, Any], **source: Any) -> nn.Module:
    timm = _timm()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module: nn.Module = timm.create_model(entry.name, **source, **arguments)
        except Exception as error:
            if not arguments:
                raise
            said = ", ".join(f"{name}={value}" for name, value in arguments.items())
            raise ModelError(f"{entry.ref} cannot be built with {said}: {one_line(error)}") from error
    return module


def _bare(entry: _Entry, arguments: Mapping[str, Any]) -> nn.Module:
    with Unallocated():
        module = _build(entry, arguments)
    return module.to("meta")


def _check_published(entry: _Entry, arguments: Mapping[str, Any]) -> None:
    if not entry.tag:
        raise ModelError(f"timm has no published weights for {entry.ref}", _NEXT_STEP)
    classes = _config(entry.architecture, entry.tag).num_classes
    if arguments.get("num_classes") not in (None, 0, classes):
        raise ModelError(
            f"the weights of {entry.ref} are for {classes} classes, not {arguments['num_classes']}",
            "num_classes=0 leaves the classifier out; one of your own comes from a file: --weights FILE",
        )


def _build_published(entry: _Entry, arguments: Mapping[str, Any]) -> nn.Module:
    _check_published(entry, arguments)
    config = _config(entry.architecture, entry.tag)
    overlay = {}
    if config.hf_hub_id:
        repository, names, revision = _on_hub(config)
        file = hub.fetched_file(entry.ref, repository, names, revision, _NEXT_STEP)
        # `custom_load` is about the file behind the configuration's URL.
        overlay = {"file": str(file), "custom_load": config.custom_load if config.hf_hub_filename else False}
    with hub.tensors_only():
        try:
            return _build(entry, arguments, pretrained=True, pretrained_cfg_overlay=overlay)
        except ModelError:
            raise
        except Exception as error:  # Sockets, proxies, disks, and files that are not what they were.
            raise ModelError(f"weights for {entry.ref} could not be loaded: {one_line(error)}", _NEXT_STEP) from error


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


def _fitted(entry: _Entry, weights: Weights, arguments: Mapping[str, Any]) -> tuple[Weights, dict[str, Any]]:
    """Bring the names in a file to those of a model, and the model to the number of classes in the file."""
    own = _bare(entry, arguments)
    weights = without_prefix(weights, own.state_dict().keys(), entry.ref)
    classes = None
    if "num_classes" not in arguments and isinstance(count := getattr(own, "num_classes", None), int) and count:
        classes = classes_in(
            weights,
            own.state_dict(),
            lambda count: _bare(entry, {**arguments, "num_classes": count}).state_dict(),
            count,
        )
    return weights, {**arguments, **({"num_classes": classes} if classes else {})}


def _from_file(entry: _Entry, weights: Weights, arguments: Mapping[str, Any], options: ModelOptions) -> LoadedModel:
    weights, fitting = _fitted(entry, weights, arguments)
    module = _build(entry, fitting)
    random_paths = load_weights(module, weights, entry.ref, options.allow_missing)
    identity, notes = weights.identity, [*weights.notes, *notes_on_types(module, weights)]
    if fitting.keys() != arguments.keys():
        notes.append(f"{entry.ref} is built for {fitting['num_classes']} classes, as {weights.file.name} is")
    if random_paths:
        identity += f"; random (seed {options.seed}): {', '.join(random_paths)}"
        notes.append(f"random, because {weights.file.name} lacks them: {', '.join(random_paths)}")
    loaded = _loaded(entry, module, arguments, identity)
    return dataclasses.replace(loaded, notes=tuple(notes), random_paths=random_paths)


def _loaded(entry: _Entry, module: nn.Module, arguments: Mapping[str, Any], identity: str) -> LoadedModel:
    prepares, transform = _preprocessing(entry, module, arguments)
    said = ", ".join(f"{name}={value}" for name, value in sorted(arguments.items()))
    return LoadedModel(
        name=entry.ref,
        module=module.eval(),
        preprocessing=prepares,
        weights=identity + (f" ({said})" if said else ""),
        forward=module,
        transform=transform,
    )


def _preprocessing(
    entry: _Entry, module: nn.Module, arguments: Mapping[str, Any]
) -> tuple[Preprocessing, Callable[[Any], Tensor] | None]:
    """Return timm's own data configuration, as `timm.data.resolve_model_data_config` gives it."""
    timm = _timm()
    published: Any = module.pretrained_cfg
    asked = {"input_size": _input_size(arguments["img_size"])} if arguments.get("img_size") else {}
    config = timm.data.resolve_data_config(asked, pretrained_cfg=published)
    simple = preprocessing.from_timm_config(config, entry.ref)
    if simple is not None:
        return simple, None
    transform = timm.data.create_transform(**config, is_training=False)
    description = json.dumps(config, sort_keys=True)
    return preprocessing.of_transform(transform, "timm.data.create_transform", description)


def _input_size(size: Any) -> tuple[int, int, int]:
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return 3, int(height), int(width)
