"""One's own code: a factory in an installed module or in a file -> its model, or a transform of images.

The code runs in this process and may do anything, so everything that can be wrong with what it returns is looked for.
What it prints goes to standard error, because standard output is for data.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hookx.errors import HookxError, ModelError, closest
from hookx.models import preprocessing
from hookx.models.arguments import arguments_for
from hookx.models.checkpoints import is_weights_file, read_weights
from hookx.models.fitting import load_weights, notes_on_types, without_prefix
from hookx.models.loaded import LoadedModel, imagenet_preprocessing, one_line
from hookx.options import ModelOptions
from hookx.plan import Preprocessing

PREFIX = "python:"

_SIDE_PX = 224  # of an image for a model that does not say
_CONFIG_OF_TIMM = {"input_size", "mean", "std"}
_NAMES_OF_INPUT_SIZE = ("input_size", "image_size", "img_size")


def is_own_code(ref: str) -> bool:
    """Tell whether a name is that of a factory, in a module or in a file.

    Example:
        >>> [is_own_code(ref) for ref in ("python:torchvision.models:resnet18", "nets/small.py:Net", "resnet18")]
        [True, True, False]
    """
    return ref.startswith(PREFIX) or bool(re.search(r"\.py(:|$)", ref))


def load_model(ref: str, weights: str = "default", options: ModelOptions = ModelOptions()) -> LoadedModel:
    """Call a factory for its model.

    Args:
        ref: 'python:package.module:factory' or 'path/to/file.py:factory'. A factory is a function or a class that
            returns an `nn.Module`; an `nn.Module` itself will do.
        weights: 'default' (as the factory made them), 'none' (said to be random), or a file. In any case
            `torch.manual_seed(seed)` comes before the factory.
        options: `model_args` are the factory's arguments, read as its annotations say.

    Raises:
        ModelError: the code cannot be imported, fails, or returns something else than a model that can be run.

    Example:
        >>> options = ModelOptions(model_args={"num_classes": "10"})
        >>> model = load_model("python:torchvision.models:squeezenet1_1", "none", options)
        >>> model.weights[:76], model.module.classifier[1].out_channels
        ('random (seed 0), python:torchvision.models:squeezenet1_1(num_classes=10) sha', 10)
    """
    is_file = _check_weights(ref, weights)
    # A skeleton that was made before is the model itself: what a factory prints or downloads, it does once.
    built = _waiting.pop(_key(ref, options), None) or _built(ref, options)
    notes = list(built.notes)
    random_paths: tuple[str, ...] = ()
    if is_file:
        found = read_weights(weights, options)
        found = without_prefix(found, built.module.state_dict().keys(), ref)
        random_paths = load_weights(built.module, found, ref, options.allow_missing)
        identity = f"{built.name} {found.identity}"
        notes += [*found.notes, *notes_on_types(built.module, found)]
        if random_paths:
            kept = f"as the factory made them: {', '.join(random_paths)}"
            identity += f"; {kept} (sha256:{state_sha256(built.module)})"
            notes.append(f"{kept}, because {found.file.name} lacks them")
    else:
        seed = f"random (seed {options.seed}), " if weights == "none" else ""
        identity = f"{seed}{built.name} sha256:{state_sha256(built.module)}"
    return _loaded(built, identity, notes, random_paths)


def skeleton(ref: str, weights: str = "default", options: ModelOptions = ModelOptions()) -> LoadedModel:
    """Call a factory for its model, and keep that for the `load_model` that follows."""
    _check_weights(ref, weights)
    key = _key(ref, options)
    if key not in _waiting:
        _waiting.clear()
        _waiting[key] = _built(ref, options)
    return _loaded(_waiting[key], "none", _waiting[key].notes, ())


def with_transform(loaded: LoadedModel, transform: str | None) -> LoadedModel:
    """Replace a model's preprocessing by one's own: 'python:package.module:factory', or a factory in a file."""
    if transform is None:
        return loaded
    prepares, function = _transform(transform)
    return dataclasses.replace(loaded, preprocessing=prepares, transform=function)


# --- building ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Built:
    """What a factory returned, ready to run."""

    ref: str
    name: str  # with the arguments that it was called with
    module: nn.Module
    preprocessing: Preprocessing
    transform: Callable[[Any], Tensor] | None
    notes: tuple[str, ...]


_waiting: dict[object, _Built] = {}  # skeletons that no `load_model` has taken yet; one at the most


def _key(ref: str, options: ModelOptions) -> object:
    file, _ = _parsed(ref)
    state = file.stat() if isinstance(file, Path) and file.is_file() else None
    version = (state.st_mtime_ns, state.st_size) if state else ()
    return ref, tuple(sorted(options.model_args.items())), options.seed, options.transform, version


def _check_weights(ref: str, weights: str) -> bool:
    """Return whether the weights are a file."""
    is_file = is_weights_file(weights)
    if weights not in ("default", "none") and not is_file:
        raise ModelError(
            f"{ref} has no weights '{weights}'; it has: default (as the factory makes them)",
            "also: none (said to be random), or a file (.safetensors, .pt, .pth)",
        )
    return is_file


def _built(ref: str, options: ModelOptions) -> _Built:
    torch.manual_seed(options.seed)  # A model can be made while its module is imported.
    found = _found(ref)
    if isinstance(found, nn.Module):
        if options.model_args:
            name = next(iter(options.model_args))
            raise ModelError(f"{ref} is a model and no factory, so it takes no --model-arg {name}")
        made: Any = found
    else:
        arguments, keywords = arguments_for(found, options.model_args, ref)
        torch.manual_seed(options.seed)
        with _running(f"{ref} fails", _folder(ref)):
            made = found(*arguments, **keywords)
    said = ", ".join(f"{name}={text}" for name, text in sorted(options.model_args.items()))
    name = f"{ref}({said})" if said else ref
    module, notes = _ready(made, ref)
    if options.transform is not None:
        return _Built(ref, name, module, imagenet_preprocessing(), None, tuple(notes))
    prepares, transform, aloud = _preprocessing(module, ref)
    return _Built(ref, name, module, prepares, transform, (*notes, *aloud))


def _ready(made: Any, ref: str) -> tuple[nn.Module, list[str]]:
    """Check what a factory returned; return it in eval mode on the CPU, and what was done to it."""
    if not isinstance(made, nn.Module):
        what = type(made).__name__
        if isinstance(made, tuple):
            what += f" of {', '.join(type(item).__name__ for item in made)}"
        forgotten = "; does it end with 'return model'?" if made is None else ""
        raise ModelError(f"{ref} returns {_a(what)}, and not an nn.Module{forgotten}", "return the model alone")
    notes = []
    while type(made).__name__ in ("OptimizedModule", "DataParallel", "DistributedDataParallel"):
        # Their copies of the modules run without the hooks.
        notes.append(f"{ref}: taken out of its {type(made).__name__}")
        made = made._orig_mod if type(made).__name__ == "OptimizedModule" else made.module
    tensors = {**dict(made.named_parameters()), **dict(made.named_buffers())}
    if lazy := [name for name, tensor in tensors.items() if is_lazy(tensor)]:
        raise ModelError(
            f"{ref} has lazy parameters, which get their shapes in a first forward pass: {_some(lazy)}",
            "make that pass in the factory",
        )
    if empty := [name for name, tensor in tensors.items() if tensor.device.type == "meta"]:
        raise ModelError(f"{ref} has parameters on the meta device, where there are no numbers: {_some(empty)}")
    devices = sorted({str(tensor.device) for tensor in tensors.values()} - {"cpu"})
    if devices:
        notes.append(f"{ref}: moved from {', '.join(devices)} to the CPU; the device is chosen by --device")
        made = made.cpu()
    if training := [path or "." for path, module in made.named_modules() if module.training]:
        some = f" ({_some(training)} {'was' if len(training) == 1 else 'were'} in training mode)"
        notes.append(f"{ref}: put into eval mode" + ("" if made.training else some))
        made = made.eval()
    if stubborn := [path or "." for path, module in made.named_modules() if module.training]:
        raise ModelError(f"{ref} stays in training mode after eval(): {_some(stubborn)}", "look at its train method")
    return made, notes


def _loaded(built: _Built, identity: str, notes: Any, random_paths: tuple[str, ...]) -> LoadedModel:
    return LoadedModel(
        name=built.ref,
        module=built.module,
        preprocessing=built.preprocessing,
        weights=identity,
        forward=_talking_on_stderr(built.module),
        transform=built.transform,
        notes=tuple(notes),
        random_paths=random_paths,
    )


def state_sha256(module: nn.Module) -> str:
    """Return the digest of a state dict: of every tensor's name, type, shape and numbers.

    Example:
        >>> state_sha256(nn.Identity())[:12]
        'e3b0c44298fc'
    """
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor):
            plain = value.dequantize() if value.is_quantized else value.to_dense()
            plain = plain.detach().cpu().contiguous()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(f"{name} {value!r}\n".encode())
    return digest.hexdigest()


# --- what it expects of an image -----------------------------------------------------------------------------------


def _preprocessing(
    module: nn.Module, ref: str
) -> tuple[Preprocessing, Callable[[Any], Tensor] | None, tuple[str, ...]]:
    """Return what a model says of its images; where it says nothing, what is assumed, aloud."""
    given = getattr(module, "preprocessing", None)
    if isinstance(given, Preprocessing):
        return given, None, ()
    if given is not None:
        return *_usable(given, f"the attribute 'preprocessing' of {ref}"), ()
    config = next(
        (
            config
            for name in ("pretrained_cfg", "default_cfg")
            if isinstance(config := getattr(module, name, None), Mapping) and set(config) >= _CONFIG_OF_TIMM
        ),
        None,
    )
    if config is not None:
        usual = {"crop_pct": 0.875, "crop_mode": "center", "interpolation": "bicubic"}
        if (simple := preprocessing.from_timm_config({**usual, **config}, ref)) is not None:
            return simple, None, ()
    side_px = _side_px(module, ref)
    assumed = imagenet_preprocessing(side_px or _SIDE_PX)
    size = "" if side_px else f" {_SIDE_PX} pixels and"
    return (
        assumed,
        None,
        (
            f"{ref} does not say how it wants its images: assumed{size} ImageNet's mean and std ({assumed}); "
            "say it with --resize, --crop, --mean, --std, or with --transform",
        ),
    )


def _side_px(module: nn.Module, ref: str) -> int | None:
    for holder in (module, getattr(module, "default_cfg", None), getattr(module, "config", None)):
        for name in _NAMES_OF_INPUT_SIZE:
            size = holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)
            if isinstance(size, int | list | tuple | Mapping) and not isinstance(size, bool):
                return preprocessing.square_side_px(size, ref)
    return None


@functools.lru_cache(maxsize=8)
def _transform(ref: str) -> tuple[Preprocessing, Callable[[Any], Tensor] | None]:
    found = _found(ref)
    if isinstance(found, type | functools.partial) or hasattr(found, "__code__"):
        arguments, keywords = arguments_for(found, {}, ref)
        with _running(f"{ref} fails", _folder(ref)):
            found = found(*arguments, **keywords)
    if not callable(found):
        raise ModelError(
            f"{ref} returns {_a(type(found).__name__)}, and not what turns an image into pixels",
            "it is a factory: called without arguments, it returns a function of an RGB image (PIL)",
        )
    return _usable(found, ref)


def _usable(transform: Any, source: str) -> tuple[Preprocessing, Callable[[Any], Tensor] | None]:
    if not callable(transform):
        raise ModelError(f"{source} is {_a(type(transform).__name__)}, and not a function of an image")
    with contextlib.redirect_stdout(sys.stderr):
        prepares, function = preprocessing.of_transform(transform, source)
    return prepares, function and _talking_on_stderr(function)


def _talking_on_stderr(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def talks(argument: Any) -> Any:
        with contextlib.redirect_stdout(sys.stderr):
            return function(argument)

    return talks


# --- importing -----------------------------------------------------------------------------------------------------


def _parsed(ref: str) -> tuple[Path | str, str]:
    """Split a name into the file or module, and what is looked for in it."""
    where, colon, name = ref.removeprefix(PREFIX).rpartition(":")
    if not colon or not where or not all(part.isidentifier() for part in name.split(".")):
        whole = ref if ref.startswith(PREFIX) else ref.rpartition(".py")[0] + ".py"
        raise ModelError(
            f"'{ref}' does not name a factory",
            f"write {whole.rstrip(':')}:factory, or the name of a class or of a model in it",
        )
    return (Path(where).expanduser(), name) if where.endswith(".py") else (where, name)


def _folder(ref: str) -> str:
    where, _ = _parsed(ref)
    return str(where.resolve().parent) if isinstance(where, Path) else os.getcwd()


def _found(ref: str) -> Any:
    """Import the code of a name, and return what the name stands for."""
    where, name = _parsed(ref)
    if isinstance(where, Path) and not where.is_file():
        raise ModelError(f"there is no file '{where}'")
    with _running(f"'{where}' cannot be imported", _folder(ref)):
        try:
            found: Any = _import_file(where) if isinstance(where, Path) else importlib.import_module(where)
        except ModuleNotFoundError as error:
            if isinstance(where, str) and error.name and f"{where}.".startswith(f"{error.name}."):
                raise ModelError(
                    f"there is no module '{error.name}' for {ref}",
                    "it has to be installed, or lie in the working directory; a file is named path/to/file.py:factory",
                ) from None
            raise
    module = found
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            similar = f"; closest: {closest(part, own)}" if own else ""
            raise ModelError(f"'{where}' has no '{name}'{similar}") from None
    if not callable(found):
        raise ModelError(f"{ref} is {_a(type(found).__name__)}, and neither a factory nor an nn.Module")
    return found


def _import_file(file: Path) -> ModuleType:
    # Not under its own name: 'resnet.py' or 'queue.py' must not stand in for a module that is installed.
    path = file.resolve()
    name = f"hookx_file_{re.sub(r'[^0-9a-zA-Z]', '_', path.stem)}_{hashlib.sha256(bytes(path)).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Dataclasses and pickles look for the module of their class there.
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
def _running(what: str, folder: str) -> Iterator[None]:
    """Run somebody's code: what it prints goes to standard error, what it raises becomes an error that says where."""
    with _importable(folder), _stdout_is_stderr():
        try:
            yield
        except HookxError:
            raise
        except (Exception, SystemExit) as error:  # Any code can raise anything; some modules call sys.exit.
            raise ModelError(f"{what}: {type(error).__name__}: {one_line(error)}{_where(error)}") from error


def _where(error: BaseException) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({Path(error.filename).name}, line {error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    frames = [frame for frame in frames if not frame.filename.startswith("<frozen importlib")]
    own = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""


@contextlib.contextmanager
def _importable(folder: str) -> Iterator[None]:
    """Put a folder in front of the import path, as Python does for a script; afterwards it is the last one.

    It stays there, because code may import more when it runs.
    """
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)


@contextlib.contextmanager
def _stdout_is_stderr() -> Iterator[None]:
    """Send to standard error what Python, compiled code, or a process begun here writes to standard output."""
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


def _a(noun: str) -> str:
    return "None" if noun == "NoneType" else f"{'an' if noun[0] in 'aeiouAEIOU' else 'a'} {noun}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f", and {len(names) - 3} more" if len(names) > 3 else "")
