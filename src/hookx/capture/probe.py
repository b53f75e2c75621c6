"""The probe: learn from two tiny batches what a forward pass does to each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hookx.capture.hooks import Taps, tap
from hookx.capture.modules import modules_of, parameter_count
from hookx.capture.runner import Runner
from hookx.capture.tensors import Parts, dtype_name, tensors_given, tensors_in
from hookx.errors import CaptureError
from hookx.layers.tree import Call, Layer, TensorInfo

_Key = tuple[str, int, bool, Parts]
_Explain = Callable[[str, Mapping[str, nn.Module]], str]


def probe(
    runner: Runner,
    images_NCHW: Tensor,
    *,
    paths: Sequence[str] | None = None,
    why_never_called: _Explain = lambda _path, _modules: "",
) -> list[Layer]:
    """Learn what a forward pass does to each layer: calls, structure, shapes, and which dimension is the batch.

    It makes two passes, with 2 and with 3 images; the dimension that grows is the batch. In the second pass all images
    but the middle one are NaN: if its row becomes NaN, the row depends on other images. On the meta device only shapes
    are compared.

    Args:
        runner: how to take a batch through the model.
        images_NCHW: three images of ordinary values, on the runner's device.
        paths: the modules to describe; None for all.
        why_never_called: returns why the model never calls the module at a path, given all modules; '' if unknown.

    Returns:
        The layers in the order of their first call; one that is never called follows the module registered before it.

    Raises:
        CaptureError: the model fails on a batch of images, draws random numbers, or calls a module a different number
            of times for 2 and for 3 images.

    Example:
        >>> relu = nn.ReLU(inplace=True)
        >>> runner = Runner.of(nn.Sequential(nn.Conv2d(3, 4, 1), relu, relu))
        >>> for layer in probe(runner, torch.rand(3, 3, 8, 8)):
        ...     print(layer.path, len(layer.calls), layer.calls[0].outputs[0].shape_text)
        . 1 N,4,8,8
        0 1 N,4,8,8
        1 2 N,4,8,8
        2 2 N,4,8,8
    """
    modules = modules_of(runner.module)
    tapped = modules if paths is None else {path: modules[path] for path in paths}
    poisoned = images_NCHW.clone()
    if runner.device.type != "meta":
        poisoned[0], poisoned[2] = float("nan"), float("nan")
    first = _record(runner, tapped, images_NCHW[:2], lambda tensor, _: (tensor.shape, _has_nan(tensor)))
    shapes = {key: shape for key, (shape, _) in first.seen.items()}
    spoilt = {key for key, (_, has_nan) in first.seen.items() if has_nan}
    second = _record(
        runner,
        tapped,
        poisoned,
        lambda tensor, key: _describe(key, shapes.get(key), tensor, provable=key not in spoilt),
    )
    for path in tapped:
        if first.calls[path] != second.calls[path]:
            raise CaptureError(
                f"'{path}' is called {first.calls[path]} times for 2 images and {second.calls[path]} times for 3, "
                "so its activations cannot be assigned to images"
            )
    infos = {
        key: TensorInfo(key[3], tuple(shape), "", None, problem="it exists for 2 images but not for 3")
        for key, shape in shapes.items()
    }
    infos.update(second.seen)
    return _layers(runner.module, tapped, first, infos, why_never_called)


def example_images(runner: Runner, side_px: int) -> Tensor:
    """Return three square images of ordinary values to probe a model with, on the model's device."""
    shape = (3, 3, side_px, side_px)
    if runner.device.type == "meta":
        return torch.empty(shape, device=runner.device)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(runner.device)


class _Recording:
    """What one pass showed: for each tensor what `look` returned, and the order and number of calls."""

    def __init__(self) -> None:
        self.seen: dict[_Key, Any] = {}
        self.entered: dict[str, int] = {}  # path -> when it was first called
        self.calls: dict[str, int] = {}


def _record(
    runner: Runner,
    modules: Mapping[str, nn.Module],
    pixels_NCHW: Tensor,
    look: Callable[[Tensor, _Key], Any],
) -> _Recording:
    recording = _Recording()

    def note(path: str, call: int, is_input: bool, tensors: Iterable[tuple[Parts, Tensor]]) -> None:
        for parts, tensor in tensors:
            key = (path, call, is_input, parts)
            recording.seen[key] = look(tensor, key)

    def on_enter(path: str, call: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recording.entered.setdefault(path, len(recording.entered))
        note(path, call, True, tensors_given(args, kwargs))

    def on_return(path: str, call: int, _args: Any, _kwargs: Any, output: Any) -> None:
        note(path, call, False, tensors_in(output))

    taps = Taps(on_enter, on_return)
    random_state = torch.get_rng_state()
    with tap(modules, taps):
        try:
            runner.run(pixels_NCHW)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            shape = ", ".join(map(str, pixels_NCHW.shape))
            raise CaptureError(
                f"the model fails on a batch of images ({shape}): {type(error).__name__}: {error}"
            ) from error
        recording.calls = taps.calls
    if not torch.equal(random_state, torch.get_rng_state()):
        raise CaptureError(
            "the forward pass draws random numbers, so its activations are not reproducible; look for dropout that is "
            "still active, or random masking"
        )
    return recording


def _has_nan(tensor: Tensor) -> bool:
    is_float = tensor.is_floating_point() or tensor.is_complex()
    return tensor.device.type != "meta" and is_float and bool(torch.isnan(tensor).any())


def _describe(key: _Key, of_2: torch.Size | None, of_3: Tensor, provable: bool) -> TensorInfo:
    """Compare a tensor's shape for 2 images with the tensor for 3 images, the first and last of them NaN."""
    if of_2 is None:
        problem = "it exists for 3 images but not for 2"
        return TensorInfo(key[3], tuple(of_3.shape), dtype_name(of_3.dtype), None, problem=problem)
    grown = [d for d, (two, three) in enumerate(zip(of_2, of_3.shape, strict=False)) if two != three]
    rest = [length for d, length in enumerate(of_3.shape) if d not in grown]
    real = of_3.device.type != "meta"
    provable = provable and real and (of_3.is_floating_point() or of_3.is_complex())
    tainted = provable and _has_nan(of_3)

    def info(shape: Sequence[int], batch_dim: int | None = None, rows: int = 1, problem: str = "") -> TensorInfo:
        return TensorInfo(key[3], tuple(shape), dtype_name(of_3.dtype), batch_dim, rows, problem)

    if len(of_2) != of_3.ndim or len(grown) > 1:
        return info(of_2, problem="more than one dimension changes with the number of images")
    if not grown:
        return info(of_2, problem="it depends on the images but has no batch dimension" if tainted else "")
    dim = grown[0]
    rows = of_2[dim] // 2
    if of_2[dim] != 2 * rows or of_3.shape[dim] != 3 * rows or (rows > 1 and dim > 0):
        return info(of_2, problem=f"dimension {dim} is {of_2[dim]} for 2 images and {of_3.shape[dim]} for 3")
    mixed = provable and _has_nan(of_3.narrow(dim, rows, rows))
    if rows > 1:
        outer_are_tainted = _has_nan(of_3[:rows]) and _has_nan(of_3[2 * rows :])
        problem = ""
        if mixed:
            problem = f"the {rows} rows of an image are not adjacent, or depend on other images"
        elif real and not (provable and outer_are_tainted):
            problem = f"the {rows} rows of an image cannot be proved adjacent"
        return info((rows, *rest), 0, rows, problem)
    return info(rest, dim, 1, "an image's values depend on the other images of its batch" if mixed else "")


def _layers(
    model: nn.Module,
    tapped: Mapping[str, nn.Module],
    recording: _Recording,
    infos: Mapping[_Key, TensorInfo],
    why_never_called: _Explain,
) -> list[Layer]:
    by_call: dict[tuple[str, int, bool], list[TensorInfo]] = {}
    for (path, call, is_input, _), info in infos.items():
        by_call.setdefault((path, call, is_input), []).append(info)
    modules = modules_of(model)
    first_paths: dict[int, str] = {}
    for path, module in modules.items():
        first_paths.setdefault(id(module), path)
    layers, places = [], []
    place = -1  # A module that is never called takes the place of the one registered before it.
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
                parameters=parameter_count(module),
                calls=calls,
                never_called_because="" if calls else _why_never_called(path, modules, why_never_called),
                same_as="" if first_path == path else first_path,
            )
        )
    return [layer for _, layer in sorted(zip(places, layers, strict=True), key=lambda pair: pair[0])]


def _why_never_called(path: str, modules: Mapping[str, nn.Module], of_this_model: _Explain) -> str:
    """Return why a forward pass leaves a module out, if the reason is known."""
    module = modules[path]
    parent_path = path.rpartition(".")[0] or "."
    parent = modules[parent_path]
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return f"an nn.{type(module).__name__} only holds other modules"
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention uses its weights directly"
    if reason := of_this_model(path, modules):
        return reason
    if type(module).__name__ in ("QFunctional", "FloatFunctional"):
        return "it is used through its methods, such as add"
    if parent is modules["."] or type(parent) in (nn.ModuleList, nn.ModuleDict):
        return ""
    return _why_never_called(parent_path, modules, of_this_model)
