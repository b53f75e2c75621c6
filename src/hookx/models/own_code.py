"""The user's code: a factory in an installed module or in a file -> its model, or a transform of images.

The code runs in this process and can return anything, so its result is checked thoroughly. Standard output is for data,
so what the code prints goes to standard error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import operator
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hookx.errors import HookxError, ModelError, closest, one_line
from hookx.models.arguments import arguments_for
from hookx.models.checkpoints import is_weights_file, read_weights
from hookx.models.fitting import fill, without_prefix
from hookx.models.names import PYTHON
from hookx.models.preprocessing import Recorded, from_timm_config, imagenet_preprocessing, square_side_px, try_transform
from hookx.models.source import LoadedModel, Source
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
        file, _ = _parse_ref(ref)
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
    made = named = _import_factory(ref)
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
        forward=_print_to_stderr(module),
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
    where, name = _parse_ref(ref)
    try:
        return isinstance(where, Path) or operator.attrgetter(name)(sys.modules[where]) is named
    except (AttributeError, KeyError):
        return False


def _call(factory: Callable[..., Any], texts: Mapping[str, str], ref: str) -> Any:
    arguments, keywords = arguments_for(factory, texts, ref)
    with _running(f"{ref} fails", ref):
        return factory(*arguments, **keywords)


def _make_ready(made: Any, ref: str) -> tuple[nn.Module, list[str]]:
    """Check what a factory returned; return it in eval mode on the CPU, and what was done to it."""
    if not isinstance(made, nn.Module):
        items = f" of {', '.join(type(item).__name__ for item in made)}" if isinstance(made, tuple) else ""
        forgotten = "; does it end with 'return model'?" if made is None else ""
        raise ModelError(f"{ref} returns {_a(made)}{items}; expected an nn.Module{forgotten}", "return only the model")
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
        with _running(f"{ref} cannot be moved to the CPU", ref):
            made = made.cpu()
    if training := [path or "." for path, module in made.named_modules() if module.training]:
        some = f" ({_list_some(training)} {'was' if len(training) == 1 else 'were'} in training mode)"
        notes.append(f"{ref}: put into eval mode" + ("" if made.training else some))
        with _running(f"{ref} cannot be put into eval mode", ref):
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
    side_px = _side_px(module, ref)
    assumed = imagenet_preprocessing(side_px or _DEFAULT_SIDE_PX)
    size = "" if side_px else f" {_DEFAULT_SIDE_PX} pixels and"
    note = (
        f"{ref} does not say how to prepare images: assumed{size} ImageNet's mean and std ({assumed}); "
        "override them with --resize, --crop, --mean, --std, or with --transform"
    )
    return (assumed, None), (note,)


def _side_px(module: nn.Module, ref: str) -> int | None:
    for holder in (module, getattr(module, "default_cfg", None), getattr(module, "config", None)):
        for name in ("input_size", "image_size", "img_size"):
            size = holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)
            if isinstance(size, int | list | tuple | Mapping) and not isinstance(size, bool):
                return square_side_px(size, ref)
    return None


@functools.lru_cache(maxsize=8)
def load_transform(ref: str) -> Recorded:
    """Call the factory of a transform, and try what it returns."""
    found = _import_factory(ref)
    if isinstance(found, type | functools.partial) or hasattr(found, "__code__"):
        found = _call(found, {}, ref)
    if not callable(found):
        raise ModelError(
            f"{ref} returns {_a(found)}; expected a function of an RGB image (PIL)",
            "--transform names a factory, which is called without arguments and returns that function",
        )
    return _check_transform(found, ref)


def _check_transform(transform: Any, source: str) -> Recorded:
    if not callable(transform):
        raise ModelError(f"{source} is {_a(transform)}; expected a function of an image")
    with contextlib.redirect_stdout(sys.stderr):
        preprocessing, function = try_transform(transform, source)
    return preprocessing, function and _print_to_stderr(function)


def _print_to_stderr(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def call(argument: Any) -> Any:
        with contextlib.redirect_stdout(sys.stderr):
            return function(argument)

    return call


# --- importing -----------------------------------------------------------------------------------------------------


def _parse_ref(ref: str) -> tuple[Path | str, str]:
    """Split a reference into a file or module, and a name in it."""
    where, colon, name = ref.removeprefix(PYTHON).rpartition(":")
    if not colon or not where or not all(part.isidentifier() for part in name.split(".")):
        whole = ref if ref.startswith(PYTHON) else ref.rpartition(".py")[0] + ".py"
        raise ModelError(
            f"'{ref}' does not name a factory",
            f"write {whole.rstrip(':')}:factory, where factory can also be a class or a model",
        )
    return (Path(where).expanduser(), name) if where.endswith(".py") else (where, name)


def _import_factory(ref: str) -> Any:
    """Import the code that a reference names, and return what the reference stands for."""
    where, name = _parse_ref(ref)
    if isinstance(where, Path) and not where.is_file():
        raise ModelError(f"there is no file '{where}'")
    with _running(f"'{where}' cannot be imported", ref):
        try:
            module = _import_file(where) if isinstance(where, Path) else importlib.import_module(where)
        except ModuleNotFoundError as error:
            if isinstance(where, str) and error.name and f"{where}.".startswith(f"{error.name}."):
                raise ModelError(
                    f"there is no module '{error.name}' for {ref}",
                    "install it, or put it into the working directory; write a file as path/to/file.py:factory",
                ) from None
            raise
    try:
        found = operator.attrgetter(name)(module)
    except AttributeError as error:
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        similar = f"; closest: {closest(error.name or name, own)}" if own else ""
        raise ModelError(f"'{where}' has no '{name}'{similar}") from None
    if not callable(found):
        raise ModelError(f"{ref} is {_a(found)}; expected a factory or an nn.Module")
    return found


def _import_file(file: Path) -> ModuleType:
    # Not under its own name: 'resnet.py' or 'queue.py' must not replace an installed module.
    path = file.resolve()
    name = f"hookx_file_{re.sub(r'[^0-9a-zA-Z]', '_', path.stem)}_{hashlib.sha256(bytes(path)).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Where dataclasses and pickle look up a class's module.
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.dont_write_bytecode = writes
    return module


@contextlib.contextmanager
def _running(what: str, ref: str) -> Iterator[None]:
    """Run the user's code: send what it prints to standard error, and turn what it raises into an error with a line."""
    where, _ = _parse_ref(ref)
    folder = str(where.resolve().parent) if isinstance(where, Path) else os.getcwd()
    sys.path.insert(0, folder)  # Where Python puts a script's folder.
    with _stdout_to_stderr():
        try:
            yield
        except HookxError:
            raise
        except (Exception, SystemExit) as error:  # Code can raise anything, and some modules call sys.exit.
            raise ModelError(f"{what}: {type(error).__name__}: {one_line(error)}{_locate(error)}") from error
        finally:
            with contextlib.suppress(ValueError):
                sys.path.remove(folder)
            if folder not in sys.path:  # Code may import more when it runs.
                sys.path.append(folder)


def _locate(error: BaseException) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({Path(error.filename).name}, line {error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    frames = [frame for frame in frames if not frame.filename.startswith("<frozen importlib")]
    own = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send what Python, compiled code and child processes write to standard output to standard error."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _a(value: Any) -> str:
    noun = type(value).__name__
    return "None" if value is None else f"{'an' if noun[0] in 'aeiouAEIOU' else 'a'} {noun}"


def _list_some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f", and {len(names) - 3} more" if len(names) > 3 else "")
