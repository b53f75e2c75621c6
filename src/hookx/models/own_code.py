"""The user's code: a factory in an installed module or in a file -> its model, or a transform of images.

The code runs in this process and can return anything, so its result is checked thoroughly. Standard output is for data,
so what the code prints goes to standard error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import operator
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hookx.errors import ModelError
from hookx.models.arguments import arguments_for
from hookx.models.checkpoints import is_weights_file, read_weights
from hookx.models.fitting import convert_to_float32, fill, without_prefix
from hookx.models.importing import import_named, parse_ref, print_to_stderr, running, with_article
from hookx.models.names import PYTHON
from hookx.models.preprocessing import Recorded, from_timm_config, imagenet_preprocessing, sides_px, try_transform
from hookx.models.source import LoadedModel, Source
from hookx.models.zoo import refuse_without_file
from hookx.options import ModelOptions
from hookx.plan import IMAGENET, Preprocessing, WeightsIdentity, describe_arguments

_DEFAULT_SIDE_PX = 224


class OwnCode(Source):
    """Factories: 'python:package.module:factory' or 'path/to/file.py:factory'.

    A factory is a function or a class that returns an `nn.Module`, or an `nn.Module` itself. The arguments of
    `--model-arg` are parsed as its annotations say. `torch.manual_seed(seed)` is called before the factory.

    Example:
        >>> options = ModelOptions(model_args={"num_classes": "10"})
        >>> model = OwnCode().load_model("python:torchvision.models:squeezenet1_1", "none", options)
        >>> model.weights[:76], model.module.classifier[1].out_channels
        ('random (seed 0), python:torchvision.models:squeezenet1_1(num_classes=10) sha', 10)
    """

    takes_arguments = True

    def __init__(self) -> None:
        self._skeletons: dict[object, LoadedModel] = {}  # at most one, which no `load_model` has taken yet
        self._made_by: object = None  # what its reference named: a factory, or a model
        self._give_back: list[Callable[[], None]] = []  # puts back what was changed in a model to make it ready

    def owns(self, ref: str) -> bool:
        return ref.startswith(PYTHON) or bool(re.search(r"\.py(:|$)", ref))

    def load_model(self, ref: str, weights: str = "default", options: ModelOptions = ModelOptions()) -> LoadedModel:
        # A skeleton built before is the model itself: what a factory prints or downloads, it does once.
        model = self.skeleton(ref, weights, options)
        named = self._made_by
        self.forget_skeletons()
        call = f"{ref}({describe_arguments(options.model_args)})" if options.model_args else ref
        if not is_weights_file(weights):
            refuse_without_file(options)
            seed = options.seed if weights == "none" else None
            identity = WeightsIdentity.of_factory(call, state_sha256(model.module), seed)
            return dataclasses.replace(model, weights=str(identity))
        if isinstance(named, nn.Module):
            self._give_back.append(_remember_values(model.module))
        found = without_prefix(read_weights(weights, options), model.module.state_dict().keys(), ref)
        filled = fill(model.module, found, ref, options, "as the factory made them")
        digest = state_sha256(model.module) if filled.random_paths else ""
        return dataclasses.replace(
            model,
            weights=str(filled.identity.in_factory_model(call, digest)),
            notes=(*model.notes, *filled.notes),
            random_paths=filled.random_paths,
        )

    def skeleton(self, ref: str, weights: str = "default", options: ModelOptions = ModelOptions()) -> LoadedModel:
        """Build the model, and keep it for the `load_model` that follows."""
        if weights not in ("default", "none") and not is_weights_file(weights):
            raise ModelError(
                f"{ref} has no weights '{weights}'; it has: default (as the factory makes them)",
                "also: none (recorded as random), or a file (.safetensors, .pt, .pth)",
            )
        file, _ = parse_ref(ref)
        status = file.stat() if isinstance(file, Path) and file.is_file() else None
        version = status and (status.st_mtime_ns, status.st_size)
        key = ref, tuple(sorted(options.model_args.items())), options.seed, options.transform, version
        if key not in self._skeletons or not _still_names(ref, self._made_by):
            self._skeletons.clear()
            model, self._made_by = _build(ref, options, self._give_back)
            self._skeletons[key] = model
        return self._skeletons[key]

    def forget_skeletons(self) -> None:
        self._skeletons.clear()
        self._made_by = None

    def release(self) -> None:
        self.forget_skeletons()
        while self._give_back:  # The memory before the values in it.
            self._give_back.pop(0)()


def _build(ref: str, options: ModelOptions, give_back: list[Callable[[], None]]) -> tuple[LoadedModel, object]:
    """Return a model, and what its reference named."""
    torch.manual_seed(options.seed)  # A module can build a model while it is imported.
    made = named = import_named(ref)
    if not isinstance(made, nn.Module):
        torch.manual_seed(options.seed)
        made = _call(made, options.model_args, ref)
    elif options.model_args:
        name = next(iter(options.model_args))
        raise ModelError(f"{ref} is a model, not a factory, so it takes no --model-arg {name}")
    if isinstance(made, nn.Module):  # The user's program may hold it, as a factory may return what it has kept.
        give_back.append(_remember(made))
    module, notes = _make_ready(made, ref)
    recorded, more = _find_preprocessing(module, ref) if options.transform is None else ((IMAGENET, None), ())
    loaded = LoadedModel(
        name=ref,
        module=module,
        preprocessing=recorded[0],
        weights="none",
        forward=print_to_stderr(module),
        transform=recorded[1],
        notes=(*notes, *more),
    )
    return loaded, named


def _remember(model: nn.Module) -> Callable[[], None]:
    """Return a function that puts back a model's mode, device and memory layout."""
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(parameter, parameter.data) for parameter in model.parameters()]
    tensors: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (held, dict(held)) for module in model.modules() for held in (module._parameters, module._buffers)
    ]

    def put_back() -> None:
        for module, training in modes:
            module.training = training
        for held, before in tensors:
            held.update(before)
        for parameter, data in parameters:
            parameter.data = data

    return put_back


def _remember_values(model: nn.Module) -> Callable[[], None]:
    """Return a function that puts back the values of a model's own weights."""
    values = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}

    def put_back() -> None:
        with torch.no_grad():
            for name, value in model.state_dict().items():
                if name in values:
                    value.copy_(values[name])

    return put_back


def _still_names(ref: str, named: object) -> bool:
    """Return whether a reference still names what it did; that of a file does as long as the file is the same."""
    where, name = parse_ref(ref)
    try:
        return isinstance(where, Path) or operator.attrgetter(name)(sys.modules[where]) is named
    except (AttributeError, KeyError):
        return False


def _call(factory: Callable[..., Any], texts: Mapping[str, str], ref: str) -> Any:
    arguments, keywords = arguments_for(factory, texts, ref)
    with running(f"{ref} fails", ref):
        return factory(*arguments, **keywords)


def _make_ready(made: Any, ref: str) -> tuple[nn.Module, list[str]]:
    """Check what a factory returned; return it in eval mode on the CPU, and what was done to it."""
    if not isinstance(made, nn.Module):
        items = f" of {', '.join(type(item).__name__ for item in made)}" if isinstance(made, tuple) else ""
        forgotten = "; does it end with 'return model'?" if made is None else ""
        raise ModelError(
            f"{ref} returns {with_article(made)}{items}; expected an nn.Module{forgotten}", "return only the model"
        )
    notes = []
    # Wrappers run copies of the modules, without the hooks; each keeps the module in an attribute.
    wrappers = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
    while (wrapper := type(made).__name__) in wrappers:
        notes.append(f"{ref}: unwrapped from its {wrapper}")
        made = getattr(made, wrappers[wrapper])
    tensors = {**dict(made.named_parameters()), **dict(made.named_buffers())}
    if lazy := [name for name, tensor in tensors.items() if is_lazy(tensor)]:
        raise ModelError(
            f"{ref} has lazy parameters, which get their shapes in a first forward pass: {_list_some(lazy)}",
            "make that pass in the factory",
        )
    if empty := [name for name, tensor in tensors.items() if tensor.device.type == "meta"]:
        raise ModelError(f"{ref} has parameters on the meta device, which have no values: {_list_some(empty)}")
    if devices := sorted({str(tensor.device) for tensor in tensors.values()} - {"cpu"}):
        notes.append(f"{ref}: moved from {', '.join(devices)} to the CPU; choose the device with --device")
        with running(f"{ref} cannot be moved to the CPU", ref):
            made = made.cpu()
    with running(f"{ref} cannot be converted to float32", ref):
        notes += convert_to_float32(made, ref)
    if training := [path or "." for path, module in made.named_modules() if module.training]:
        some = f" ({_list_some(training)} {'was' if len(training) == 1 else 'were'} in training mode)"
        notes.append(f"{ref}: put into eval mode" + ("" if made.training else some))
        with running(f"{ref} cannot be put into eval mode", ref):
            made = made.eval()
    if stubborn := [path or "." for path, module in made.named_modules() if module.training]:
        raise ModelError(f"{ref} stays in training mode after eval(): {_list_some(stubborn)}", "check its train method")
    return made, notes


def state_sha256(module: nn.Module) -> str:
    """Return the SHA-256 of a state dict, covering every tensor's name, dtype, shape and values."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor):
            plain = value.dequantize() if value.is_quantized else value.to_dense()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(plain.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(f"{name} {value!r}\n".encode())
    return digest.hexdigest()


# --- what it expects of an image -----------------------------------------------------------------------------------


def _find_preprocessing(module: nn.Module, ref: str) -> tuple[Recorded, tuple[str, ...]]:
    """Return what a model says about its images; if it says nothing, assume ImageNet's preprocessing and say so."""
    given = getattr(module, "preprocessing", None)
    if isinstance(given, Preprocessing):
        return (given, None), ()
    if given is not None:
        return _check_transform(given, f"the attribute 'preprocessing' of {ref}"), ()
    configs = [getattr(module, name, None) for name in ("pretrained_cfg", "default_cfg")]
    config = next((c for c in configs if isinstance(c, Mapping) and set(c) >= {"input_size", "mean", "std"}), None)
    usual = {"crop_pct": 0.875, "crop_mode": "center", "interpolation": "bicubic"}
    if config is not None and (simple := from_timm_config({**usual, **config}, ref)) is not None:
        return (simple, None), ()
    size_px = _size_px(module, ref)
    assumed = imagenet_preprocessing(size_px or _DEFAULT_SIDE_PX)
    size = "" if size_px else f" {_DEFAULT_SIDE_PX} pixels and"
    note = (
        f"{ref} does not say how to prepare images: assumed{size} ImageNet's mean and std ({assumed}); "
        "override them with --resize, --crop, --mean, --std, or with --transform"
    )
    return (assumed, None), (note,)


def _size_px(module: nn.Module, ref: str) -> tuple[int, int] | None:
    for holder in (module, getattr(module, "default_cfg", None), getattr(module, "config", None)):
        for name in ("input_size", "image_size", "img_size"):
            size = holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)
            if isinstance(size, int | list | tuple | Mapping) and not isinstance(size, bool):
                return sides_px(size, ref)
    return None


@functools.lru_cache(maxsize=8)
def load_transform(ref: str, channels: int | None = None) -> Recorded:
    """Call the factory of a transform, and try what it returns; on bands, too, if a loader gives that many channels."""
    found = import_named(ref)
    if isinstance(found, type | functools.partial) or hasattr(found, "__code__"):
        found = _call(found, {}, ref)
    if not callable(found):
        raise ModelError(
            f"{ref} returns {with_article(found)}; expected a function of an RGB image (PIL)",
            "--transform names a factory, which is called without arguments and returns that function",
        )
    return _check_transform(found, ref, channels)


def _check_transform(transform: Any, source: str, channels: int | None = None) -> Recorded:
    if not callable(transform):
        raise ModelError(f"{source} is {with_article(transform)}; expected a function of an image")
    with contextlib.redirect_stdout(sys.stderr):
        preprocessing, function = try_transform(transform, source, channels=channels)
    return preprocessing, function and print_to_stderr(function)


def _list_some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f", and {len(names) - 3} more" if len(names) > 3 else "")
