"""Activations, as the layers return them: the probe that learns what there is, the captures that take it.

The only file that registers a hook. A copy is made inside the hook, at the moment the layer returns: nothing that runs
later (an in-place ReLU, a second call of the same module) can reach it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hookx.errors import CaptureError, LayerError, NotCapturedError, UsageError
from hookx.layers import (
    Address,
    Call,
    Layer,
    Reduction,
    Selector,
    Target,
    TensorInfo,
    closest,
    matched_paths,
    parse_selectors,
)

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def module_classes(model: nn.Module) -> dict[str, str]:
    """Return path -> class name of every module, in the order they are registered; the model itself is '.'.

    Example:
        >>> module_classes(nn.Sequential(nn.ReLU()))
        {'.': 'Sequential', '0': 'ReLU'}
    """
    return {path: type(module).__name__ for path, module in _modules(model).items()}


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    # A module that is registered twice keeps both names.
    return {path or ".": module for path, module in model.named_modules(remove_duplicate=False)}


# --- what passes through a module ----------------------------------------------------------------------------------

Parts = tuple[str, ...]


def tensors_in(value: Any, parts: Parts = ()) -> Iterator[tuple[Parts, Tensor]]:
    """Find the tensors in a layer's output: nested tuples, lists, mappings, named tuples and dataclasses.

    Example:
        >>> [parts for parts, _ in tensors_in({"out": torch.ones(1), "aux": (torch.ones(1), None)})]
        [('out',), ('aux', '0')]
    """
    if isinstance(value, Tensor):
        # The integers of a quantized tensor mean nothing without its scale; dequantizing is exact.
        yield parts, value.dequantize() if value.is_quantized else value
        return
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = zip(value._fields, value, strict=True)
    elif isinstance(value, tuple | list):
        items = enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    for name, item in items:
        yield from tensors_in(item, (*parts, str(name)))


def _tensors_given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Parts, Tensor]]:
    """Find the tensors among a call's arguments; a single argument needs no name."""
    arguments: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    with_tensors = {name: value for name, value in arguments.items() if any(True for _ in tensors_in(value))}
    return list(tensors_in(next(iter(with_tensors.values())) if len(with_tensors) == 1 else with_tensors))


def reduce(tensor: Tensor, reduction: Reduction | None) -> Tensor:
    """Apply an address's reduction to an activation whose dimension 0 is the batch.

    Example:
        >>> reduce(torch.ones(8, 512, 7, 7), Reduction.parse("mean23")).shape
        torch.Size([8, 512])
    """
    if reduction is None:
        return tensor
    match reduction.name:
        case "mean":
            return tensor.mean(reduction.dims)
        case "sum":
            return tensor.sum(reduction.dims)
        case "max":
            return tensor.amax(reduction.dims)
        case "min":
            return tensor.amin(reduction.dims)
        case "norm":
            return torch.linalg.vector_norm(tensor, dim=reduction.dims)
        case "cls":
            return tensor[:, 0]
        case "flatten":
            return tensor.flatten(1)
    raise AssertionError(reduction)


def _batch_first(tensor: Tensor, info: TensorInfo) -> Tensor:
    """Return a view of a layer's tensor with one row an image."""
    if info.rows_per_image > 1:
        return tensor.unflatten(0, (-1, info.rows_per_image))
    assert info.batch_dim is not None
    return tensor.movedim(info.batch_dim, 0)


def stored_dtype(target: Target) -> str:
    """Return the type that a target has after its reduction; `LayerError` if it cannot be reduced."""
    try:
        example = torch.empty((2, *target.tensor.shape), dtype=getattr(torch, target.tensor.dtype), device="meta")
        return _name(reduce(example, target.address.reduction).dtype)
    except RuntimeError as error:
        raise LayerError(f"'{target.address}' cannot be computed from {target.tensor.dtype}: {error}") from None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- hooks ---------------------------------------------------------------------------------------------------------


class _Taps:
    """Hooks on some modules of a model.

    `on_enter(path, call, args, kwargs)` runs when a module is called, `on_return(..., output)` when it returns.
    """

    def __init__(
        self,
        on_enter: Callable[[str, int, tuple[Any, ...], dict[str, Any]], None],
        on_return: Callable[[str, int, tuple[Any, ...], dict[str, Any], Any], None],
    ) -> None:
        self.on_enter, self.on_return = on_enter, on_return
        self.calls: dict[str, int] = {}
        self._open_calls: dict[str, list[int]] = {}
        self._hooks: dict[str, list[Any]] = {}

    def attach(self, path: str, module: nn.Module) -> None:
        """Put the hooks on a module, unless they are on it."""
        if path not in self._hooks:
            self.calls[path], self._open_calls[path] = 0, []
            self._hooks[path] = [
                module.register_forward_pre_hook(self._enter(path), with_kwargs=True),
                module.register_forward_hook(self._return(path), with_kwargs=True),
            ]

    def detach(self, path: str) -> None:
        """Take the hooks off a module."""
        for hook in self._hooks.pop(path, ()):
            hook.remove()

    def detach_all(self) -> None:
        for path in list(self._hooks):
            self.detach(path)

    def begin_pass(self) -> None:
        """Number the calls of every module from 0 again."""
        self.calls = dict.fromkeys(self.calls, 0)
        self._open_calls = {path: [] for path in self._open_calls}

    # What a hook returns replaces the layer's input or output, so these return None, whatever the callbacks do.

    def _enter(self, path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = self.calls[path]
            self.calls[path] += 1
            self._open_calls[path].append(call)
            self.on_enter(path, call, args, kwargs)

        return hook

    def _return(self, path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._open_calls[path]:  # Empty only if the hooks came on while the module was running.
                self.on_return(path, self._open_calls[path].pop(), args, kwargs, output)

        return hook


@contextlib.contextmanager
def _tapped(modules: Mapping[str, nn.Module], taps: _Taps) -> Iterator[None]:
    try:
        for path, module in modules.items():
            taps.attach(path, module)
        yield
    finally:
        taps.detach_all()


@contextlib.contextmanager
def _every_submodule_is_called() -> Iterator[None]:
    """Switch off PyTorch's transformer fast path, which computes a whole encoder layer without calling its parts."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _inference(device: torch.device, precision: str) -> Iterator[None]:
    autocast = PRECISIONS[precision]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(_every_submodule_is_called())
        if autocast is not None:
            stack.enter_context(torch.autocast(device.type, autocast))
        yield


class _ForwardIsDone(BaseException):
    """Ends a forward pass early. Not an `Exception`, so that no `except Exception` of a model swallows it."""


# --- the probe -----------------------------------------------------------------------------------------------------

_Key = tuple[str, int, bool, Parts]


def probe(
    model: nn.Module,
    images_NCHW: Tensor,
    *,
    paths: Sequence[str] | None = None,
    precision: str = "fp32",
    forward: Callable[[Tensor], Any] | None = None,
) -> list[Layer]:
    """Learn what a forward pass does to each layer: calls, structure, shapes, and which dimension is the batch.

    Two passes are made, with 2 and with 3 images. The dimension that grows is the batch. In the second pass all images
    but one are NaN: a row that becomes NaN depends on another image, and does not belong to the one it stands for.
    On the meta device there are only the shapes.

    Args:
        images_NCHW: three images of ordinary values, on the model's device.
        paths: the modules to describe; all of them if None.
        precision: 'fp32', or 'bf16' or 'fp16' (autocast).
        forward: what takes a batch through the model, if not a call of the model itself.

    Returns:
        The layers in the order in which they are first called; one that is never called stands after its neighbour.

    Example:
        >>> relu = nn.ReLU(inplace=True)
        >>> for layer in probe(nn.Sequential(nn.Conv2d(3, 4, 1), relu, relu), torch.rand(3, 3, 8, 8)):
        ...     print(layer.path, len(layer.calls), layer.calls[0].outputs[0].shape_text)
        . 1 N,4,8,8
        0 1 N,4,8,8
        1 2 N,4,8,8
        2 2 N,4,8,8
    """
    modules = _modules(model)
    tapped = modules if paths is None else {path: modules[path] for path in paths}
    device = images_NCHW.device
    poisoned = images_NCHW.clone()
    if device.type != "meta":
        poisoned[0], poisoned[2] = float("nan"), float("nan")
    run = model if forward is None else forward
    first = _record(run, tapped, images_NCHW[:2], precision, lambda tensor, _: (tensor.shape, _has_nan(tensor)))
    shapes = {key: shape for key, (shape, _) in first.seen.items()}
    spoilt = {key for key, (_, has_nan) in first.seen.items() if has_nan}
    second = _record(
        run,
        tapped,
        poisoned,
        precision,
        lambda tensor, key: _describe(key, shapes.get(key), tensor, provable=key not in spoilt),
    )
    for path in tapped:
        if first.calls[path] != second.calls[path]:
            raise CaptureError(
                f"'{path}' is called {first.calls[path]} times for 2 images and {second.calls[path]} times for 3, "
                "so its activations cannot be given to single images"
            )
    infos = {
        key: TensorInfo(key[3], tuple(shape), "", None, problem="it is there for 2 images and not for 3")
        for key, shape in shapes.items()
    }
    infos.update(second.seen)
    return _layers(model, tapped, first, infos)


def example_images(model: nn.Module, side_px: int) -> Tensor:
    """Return three square images of ordinary values to probe a model with, on the model's device."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    shape = (3, 3, side_px, side_px)
    if device.type == "meta":
        return torch.empty(shape, device=device)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


class _Recording:
    """What one pass showed: per tensor what `look` returned, and the order of it all."""

    def __init__(self) -> None:
        self.seen: dict[_Key, Any] = {}
        self.entered: dict[str, int] = {}  # path -> when it was first called
        self.calls: dict[str, int] = {}


def _record(
    forward: Callable[[Tensor], Any],
    modules: Mapping[str, nn.Module],
    pixels_NCHW: Tensor,
    precision: str,
    look: Callable[[Tensor, _Key], Any],
) -> _Recording:
    recording = _Recording()

    def note(path: str, call: int, is_input: bool, tensors: Iterable[tuple[Parts, Tensor]]) -> None:
        for parts, tensor in tensors:
            key = (path, call, is_input, parts)
            recording.seen[key] = look(tensor, key)

    def on_enter(path: str, call: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recording.entered.setdefault(path, len(recording.entered))
        note(path, call, True, _tensors_given(args, kwargs))

    def on_return(path: str, call: int, _args: Any, _kwargs: Any, output: Any) -> None:
        note(path, call, False, tensors_in(output))

    taps = _Taps(on_enter, on_return)
    with _tapped(modules, taps), _inference(pixels_NCHW.device, precision):
        try:
            forward(pixels_NCHW)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            shape = ", ".join(map(str, pixels_NCHW.shape))
            raise CaptureError(
                f"the model fails on a batch of images ({shape}): {type(error).__name__}: {error}"
            ) from error
        recording.calls = taps.calls
    return recording


def _has_nan(tensor: Tensor) -> bool:
    is_float = tensor.is_floating_point() or tensor.is_complex()
    return tensor.device.type != "meta" and is_float and bool(torch.isnan(tensor).any())


def _describe(key: _Key, of_2: torch.Size | None, of_3: Tensor, provable: bool) -> TensorInfo:
    """Compare a tensor's shape for 2 images with the tensor for 3, of which the first and last are NaN."""
    if of_2 is None:
        problem = "it is there for 3 images and not for 2"
        return TensorInfo(key[3], tuple(of_3.shape), _name(of_3.dtype), None, problem=problem)
    grown = [d for d, (two, three) in enumerate(zip(of_2, of_3.shape, strict=False)) if two != three]
    rest = [length for d, length in enumerate(of_3.shape) if d not in grown]
    real = of_3.device.type != "meta"
    provable = provable and real and (of_3.is_floating_point() or of_3.is_complex())
    tainted = provable and _has_nan(of_3)

    def info(shape: Sequence[int], batch_dim: int | None = None, rows: int = 1, problem: str = "") -> TensorInfo:
        return TensorInfo(key[3], tuple(shape), _name(of_3.dtype), batch_dim, rows, problem)

    if len(of_2) != of_3.ndim or len(grown) > 1:
        return info(of_2, problem="more than one dimension changes with the number of images")
    if not grown:
        return info(of_2, problem="it depends on the images and has no batch dimension" if tainted else "")
    dim = grown[0]
    rows = of_2[dim] // 2
    if of_2[dim] != 2 * rows or of_3.shape[dim] != 3 * rows or (rows > 1 and dim > 0):
        return info(of_2, problem=f"dimension {dim} is {of_2[dim]} for 2 images and {of_3.shape[dim]} for 3")
    mixed = provable and _has_nan(of_3.narrow(dim, rows, rows))
    if rows > 1:
        outer_are_tainted = _has_nan(of_3[:rows]) and _has_nan(of_3[2 * rows :])
        problem = ""
        if mixed:
            problem = f"the {rows} rows of an image do not lie together, or depend on other images"
        elif real and not (provable and outer_are_tainted):
            problem = f"nothing proves that the {rows} rows of an image lie together"
        return info((rows, *rest), 0, rows, problem)
    return info(rest, dim, 1, "an image's values depend on the other images of its batch" if mixed else "")


def _layers(
    model: nn.Module, tapped: Mapping[str, nn.Module], recording: _Recording, infos: Mapping[_Key, TensorInfo]
) -> list[Layer]:
    by_call: dict[tuple[str, int, bool], list[TensorInfo]] = {}
    for (path, call, is_input, _), info in infos.items():
        by_call.setdefault((path, call, is_input), []).append(info)
    modules = _modules(model)
    first_paths: dict[int, str] = {}
    for path, module in modules.items():
        first_paths.setdefault(id(module), path)
    layers, places = [], []
    place = -1  # A module that is never called stands after the one it is registered after.
    for number, (path, module) in enumerate(tapped.items()):
        place = recording.entered.get(path, place)
        places.append((place, number))
        calls = tuple(
            Call(tuple(by_call.get((path, call, True), ())), tuple(by_call.get((path, call, False), ())))
            for call in range(recording.calls[path])
        )
        first_path = first_paths[id(module)]
        layers.append(
            Layer(
                path=path,
                class_name=type(module).__name__,
                parameters=_parameters(module),
                calls=calls,
                never_called_because="" if calls else _why_never_called(path, modules),
                same_as="" if first_path == path else first_path,
            )
        )
    return [layer for _, layer in sorted(zip(places, layers, strict=True), key=lambda pair: pair[0])]


def _why_never_called(path: str, modules: Mapping[str, nn.Module]) -> str:
    """Say why a forward pass leaves a module out, where the reason is known."""
    module = modules[path]
    parent_path, _, name = path.rpartition(".")
    parent = modules[parent_path or "."]
    parent_class = type(parent).__name__
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return f"an nn.{type(module).__name__} only holds other modules"
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention uses its weights directly"
    if parent_class.startswith("ShiftedWindowAttention") and name in ("qkv", "proj"):
        return f"{parent_class} uses its weights directly"
    if parent_class in ("GoogLeNet", "Inception3") and name.lower().startswith("aux"):
        return "auxiliary classifiers run in training only"
    if type(modules["."]).__module__.startswith("torchvision.models.detection") and not path.startswith("backbone"):
        return "its rows are boxes and proposals, not images"
    if type(module).__name__ in ("QFunctional", "FloatFunctional"):
        return "it is used through its methods, such as add"
    if type(module).__name__ == "StochasticDepth":
        return "its block has no residual connection"
    if parent is not modules["."] and (above := _why_never_called(parent_path, modules)):
        return above if parent_class not in ("ModuleList", "ModuleDict") else ""
    return ""


# --- the capture of a run ------------------------------------------------------------------------------------------


class RowCapture:
    """Forward passes that leave the targets' activations in rows of preallocated buffers, and stop after the last.

    Hooks are on the model while the `with` block lasts. Memory: nothing but what the caller hands in.

    Raises:
        CaptureError: a pass differs from what the probe saw: another shape or type, a call more or less.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        *,
        device: torch.device,
        precision: str,
        forward: Callable[[Tensor], Any] | None = None,
    ) -> None:
        self.device, self.precision = device, precision
        self._forward = model if forward is None else forward
        self.overflows = {str(target.address): 0 for target in targets}
        self._targets: dict[tuple[str, int, bool], dict[Parts, list[Target]]] = {}
        for target in targets:
            address = target.address
            event = (address.path, address.call or 0, address.is_input)
            self._targets.setdefault(event, {}).setdefault(address.parts, []).append(target)
        modules = _modules(model)
        self._calls = {target.address.path: target.calls for target in targets}
        self._modules = {path: modules[path] for path in self._calls}
        self._taps = _Taps(self._on_enter, self._on_return)
        self._rows: Mapping[str, Tensor] = {}
        self._remaining: set[tuple[str, int, bool]] = set()

    def __enter__(self) -> RowCapture:
        for path, module in self._modules.items():
            self._taps.attach(path, module)
        return self

    def __exit__(self, *_: object) -> None:
        self._taps.detach_all()

    def run(self, pixels_NCHW: Tensor, rows: Mapping[str, Tensor]) -> None:
        """Run one batch; `rows` holds for every address a tensor (images of the batch, *shape) to write into."""
        self._rows, self._remaining = rows, set(self._targets)
        self._taps.begin_pass()
        with _inference(self.device, self.precision), contextlib.suppress(_ForwardIsDone):
            self._forward(pixels_NCHW)
        if self._remaining:
            address = next(iter(self._targets[min(self._remaining)].values()))[0].address
            raise CaptureError(f"'{address}' did not run in this batch, though the probe saw it")

    def _on_enter(self, path: str, call: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if call >= self._calls[path]:
            raise CaptureError(
                f"'{Address(path)}' ran more often in this batch than in the probe ({self._calls[path]})"
            )
        if (path, call, True) in self._targets:
            self._take((path, call, True), _tensors_given(args, kwargs))

    def _on_return(self, path: str, call: int, _args: Any, _kwargs: Any, output: Any) -> None:
        if (path, call, False) in self._targets:
            self._take((path, call, False), tensors_in(output))

    def _take(self, event: tuple[str, int, bool], tensors: Iterable[tuple[Parts, Tensor]]) -> None:
        found = dict(tensors)
        for parts, targets in self._targets[event].items():
            for target in targets:
                if parts not in found:
                    raise CaptureError(f"'{target.address}' is missing in this batch, though the probe saw it")
                self._store(target, found[parts])
        self._remaining.discard(event)
        if not self._remaining:
            raise _ForwardIsDone

    def _store(self, target: Target, tensor: Tensor) -> None:
        info, rows = target.tensor, self._rows[str(target.address)]
        expected = list(info.shape)
        if info.rows_per_image > 1:
            expected[0] *= len(rows)
        else:
            assert info.batch_dim is not None
            expected.insert(info.batch_dim, len(rows))
        if list(tensor.shape) != expected or _name(tensor.dtype) != info.dtype:
            raise CaptureError(
                f"'{target.address}' is {_name(tensor.dtype)} {list(tensor.shape)} in this batch; "
                f"the probe saw {info.dtype} {expected}"
            )
        value = reduce(_batch_first(tensor, info), target.address.reduction)
        if value.dtype != rows.dtype and value.is_floating_point() and rows.is_floating_point():
            narrowed = value.to(rows.dtype)
            if torch.finfo(rows.dtype).max < torch.finfo(value.dtype).max:
                self.overflows[str(target.address)] += int((narrowed.isinf() & ~value.isinf()).sum())
            value = narrowed
        # This copy is the snapshot: whatever overwrites `tensor` later in the pass comes after it in stream order.
        rows.copy_(value, non_blocking=self.device.type == "cuda")


# --- the capture of your own forward passes ------------------------------------------------------------------------


Transform = Callable[[Tensor], Tensor]
Hook = Callable[[nn.Module, tuple[Any, ...], Any], Tensor | None]


@dataclasses.dataclass(frozen=True)
class _Wish:
    """What to keep of one module: `address` holds the name in place of the path, and what follows it."""

    module: nn.Module
    address: Address
    transform: Transform | None
    hook: Hook | None


class Capture(Mapping[str, Tensor]):
    """Take activations out of your own forward passes, of any module, on any device, in any mode.

    Hooks are on the model from construction until `remove()`, or until the `with` block ends; the model is otherwise
    untouched. A pass begins when the model itself is called. As a mapping, a capture shows the last pass: address ->
    tensor, a copy made when the layer returned. A module that ran twice is there as `relu:0` and `relu:1`, a tuple as
    `attention/0`.

    Args:
        model: the module whose `forward` you call.
        layers: addresses, globs, 'type:Conv2d' (one string with commas, or a sequence), modules of the model, or a
            mapping from names of your own to any of these. More can be added later.
        keep: how many passes to hold, the last ones; None for all of them (see `history`).
        detach: False keeps the activations in the autograd graph.
        transform: applied to each tensor before it is kept.
        hook: `hook(module, inputs, output)` runs instead; the tensor it returns is kept, None keeps nothing. What it
            returns never reaches the model.

    Raises:
        LayerError: a layer does not exist (with the closest names).
        NotCapturedError: (on reading; a KeyError) the layer has not run, or has run more than once.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)).eval()
        >>> with Capture(model, ["0", "1@mean23"]) as capture:
        ...     _ = model(torch.rand(2, 3, 8, 8))
        >>> capture["0"].shape, capture["1@mean23"].shape
        (torch.Size([2, 4, 6, 6]), torch.Size([2, 4]))
        >>> bool((capture["1@mean23"] == capture["0"].mean((2, 3))).all())  # and no ReLU has reached either
        False

        Names of your own, a transform, and the last three passes:

        >>> with Capture(model, {"maps": model[0]}, keep=3, transform=lambda maps: maps.amax((2, 3))) as capture:
        ...     for _ in range(5):
        ...         _ = model(torch.rand(2, 3, 8, 8))
        >>> [tuple(maps.shape) for maps in capture.history("maps")]
        [(2, 4), (2, 4), (2, 4)]
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str | nn.Module | Iterable[str | nn.Module] | Mapping[str, str | nn.Module] = (),
        *,
        keep: int | None = 1,
        detach: bool = True,
        transform: Transform | None = None,
        hook: Hook | None = None,
    ) -> None:
        if keep is not None and keep < 1:
            raise UsageError(f"keep is {keep}; it is the number of passes to hold, 1 or more, or None for all")
        self.model = model
        self._detach = detach
        self._wishes: dict[str, list[_Wish]] = {}
        self._passes: deque[dict[Address, Tensor]] = deque(maxlen=keep)
        self._taps = _Taps(self._on_enter, self._on_return)
        self._fastpath = True
        self._model_hooks = [
            model.register_forward_pre_hook(self._begin_pass, prepend=True),
            model.register_forward_hook(self._end_pass, always_call=True),
        ]
        try:
            self.add(layers, transform=transform, hook=hook)
        except BaseException:
            self.remove()
            raise

    def add(
        self,
        layers: str | nn.Module | Iterable[str | nn.Module] | Mapping[str, str | nn.Module],
        *,
        transform: Transform | None = None,
        hook: Hook | None = None,
    ) -> Capture:
        """Capture more layers, with a transform or a hook of their own; returns the capture itself.

        Example:
            >>> model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
            >>> capture = Capture(model).add("0").add("1", transform=torch.sigmoid)
            >>> _ = model(torch.rand(5, 3))
            >>> list(capture)
            ['0', '1']
        """
        modules = _modules(self.model)
        class_names = {path: type(module).__name__ for path, module in modules.items()}
        paths = {id(module): path for path, module in reversed(modules.items())}
        named: Iterable[tuple[str | None, str | nn.Module]]
        if isinstance(layers, Mapping):
            named = layers.items()
        else:
            named = [(None, layer) for layer in ([layers] if isinstance(layers, str | nn.Module) else layers)]
        for name, layer in named:
            if isinstance(layer, nn.Module):
                if id(layer) not in paths:
                    raise LayerError(f"the {type(layer).__name__} to capture is not a module of this model")
                selectors = [Selector("path", Address(paths[id(layer)]), "")]
            else:
                selectors = parse_selectors(layer)
            for selector in selectors:
                for path in matched_paths([selector], class_names, "this model"):
                    if name is not None and (len(selectors) > 1 or selector.kind != "path"):
                        raise LayerError(f"'{name}' is one name, and '{layer}' can be several layers")
                    address = dataclasses.replace(selector.address, path=name or path)
                    wish = _Wish(modules[path], address, transform, hook)
                    if wish not in self._wishes.setdefault(path, []):
                        self._wishes[path].append(wish)
                    self._taps.attach(path, modules[path])
        return self

    def remove(self, name: str | None = None) -> None:
        """Take all hooks off the model, or those of one path or name; what was captured stays."""
        if name is None:
            self._taps.detach_all()
            for hook in self._model_hooks:
                hook.remove()
            self._wishes.clear()
            return
        path_or_name = Address.parse(name).path
        known = {wish.address.path for wishes in self._wishes.values() for wish in wishes}
        if path_or_name not in known:
            raise LayerError(f"'{name}' is not being captured; there is: {', '.join(known) or 'nothing'}")
        for path, wishes in list(self._wishes.items()):
            self._wishes[path] = [wish for wish in wishes if wish.address.path != path_or_name]
            if not self._wishes[path]:
                del self._wishes[path]
                self._taps.detach(path)

    def clear(self) -> None:
        """Forget what was captured; the hooks stay."""
        self._passes.clear()
        self._taps.begin_pass()

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    # --- reading

    def __getitem__(self, address: str) -> Tensor:
        return _find(self._passes[-1] if self._passes else {}, address)

    def __iter__(self) -> Iterator[str]:
        return map(str, _canonical(self._passes[-1]) if self._passes else ())

    def __len__(self) -> int:
        return len(self._passes[-1]) if self._passes else 0

    def history(self, address: str) -> list[Tensor]:
        """Return one activation of every pass that is held, the oldest first."""
        return [_find(one_pass, address) for one_pass in self._passes]

    def summary(self) -> str:
        """Describe the model and, for each layer: class, parameters, calls, and what the last pass kept.

        Example:
            >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
            >>> capture = Capture(model, "0,1")
            >>> print(capture.summary())
            Sequential: 16 parameters, 0 passes held
            0  Linear  16  has not run
            1  ReLU     0  has not run
        """
        last = _canonical(self._passes[-1]) if self._passes else {}
        rows = []
        for path, wishes in self._wishes.items():
            calls = self._taps.calls[path]
            for wish in wishes:
                kept = [
                    f"{key} {list(tensor.shape)} {_name(tensor.dtype)} {tensor.device}"
                    for key, tensor in last.items()
                    if key.path == wish.address.path and key.reduction == wish.address.reduction
                ]
                times = f"{calls} call{'s' * (calls != 1)}: {', '.join(kept) or 'nothing kept'}"
                state = times if calls else "has not run"
                rows.append((str(wish.address), type(wish.module).__name__, f"{_parameters(wish.module):,}", state))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            f"{name:{widths[0]}}  {kind:{widths[1]}}  {count:>{widths[2]}}  {state}"
            for name, kind, count, state in rows
        ]
        total = f"{type(self.model).__name__}: {_parameters(self.model):,} parameters, {len(self._passes)} passes held"
        return "\n".join([total, *lines])

    def __repr__(self) -> str:
        return f"Capture({type(self.model).__name__}: {', '.join(self) or 'nothing yet'})"

    # --- during a pass

    def _begin_pass(self, _module: nn.Module, _args: Any) -> None:
        self._taps.begin_pass()
        self._passes.append({})
        self._fastpath = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)

    def _end_pass(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        torch.backends.mha.set_fastpath_enabled(self._fastpath)

    def _on_enter(self, path: str, call: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for wish in self._wishes.get(path, ()):
            if wish.address.is_input and wish.hook is None:
                self._keep(wish, call, _tensors_given(args, kwargs))

    def _on_return(self, path: str, call: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        for wish in self._wishes.get(path, ()):
            if wish.hook is not None:
                result = wish.hook(wish.module, args, output)
                self._keep(wish, call, tensors_in(result))
            elif not wish.address.is_input:
                self._keep(wish, call, tensors_in(output))

    def _keep(self, wish: _Wish, call: int, tensors: Iterable[tuple[Parts, Tensor]]) -> None:
        wanted = wish.address
        if wanted.call not in (None, call):
            return
        if not self._passes:
            self._passes.append({})  # A layer was called by itself, outside of any call of the model.
        for parts, tensor in tensors:
            if parts[: len(wanted.parts)] != wanted.parts:
                continue
            value = reduce(tensor.detach() if self._detach else tensor, wanted.reduction)
            if wish.transform is not None:
                value = wish.transform(value)
                if not isinstance(value, Tensor):
                    raise CaptureError(f"the transform of '{wanted}' returned a {type(value).__name__}, not a tensor")
            self._passes[-1][dataclasses.replace(wanted, call=call, parts=parts)] = value.clone()


def _canonical(one_pass: Mapping[Address, Tensor]) -> dict[Address, Tensor]:
    """Drop the number of a call that was its module's only one."""
    called_again = {(key.path, key.is_input) for key in one_pass if key.call}
    return {
        key if (key.path, key.is_input) in called_again else dataclasses.replace(key, call=None): tensor
        for key, tensor in one_pass.items()
    }


def _find(one_pass: Mapping[Address, Tensor], address: str) -> Tensor:
    wanted, stored = Address.parse(address), _canonical(one_pass)
    if wanted in stored:
        return stored[wanted]
    if wanted in one_pass:
        return one_pass[wanted]  # relu:0 of a relu that ran once
    if not stored:
        raise NotCapturedError(f"'{address}': nothing has been captured yet; call the model")
    beneath = [str(key) for key in stored if key.path == wanted.path]
    there = ", ".join(beneath) or closest(address, map(str, stored))
    raise NotCapturedError(f"'{address}' was not captured; there is {there}")


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
