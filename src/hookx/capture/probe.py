"""The probe: learn from two tiny batches what a forward pass does to each layer."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hookx.capture.hooks import Taps, tap
from hookx.capture.runner import Runner, modules_of, parameter_count
from hookx.capture.tensors import Parts, Unusable, dtype_name, look_into, look_into_arguments
from hookx.errors import CaptureError
from hookx.layers.select import Call, Layer, TensorInfo

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
    are compared. The layers are in the order of their first call.

    Args:
        runner: how to take a batch through the model.
        images_NCHW: three images of ordinary values, on the runner's device.
        paths: the modules to describe; None for all.
        why_never_called: returns why the model never calls the module at a path, given all modules; '' if unknown.

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
    first: dict[_Key, tuple[torch.Size, bool]]
    first, entered, calls = _record(runner, tapped, images_NCHW[:2], lambda _, tensor: (tensor.shape, _has_nan(tensor)))
    infos: dict[_Key, TensorInfo]
    infos, _, calls_for_3 = _record(
        runner, tapped, poisoned, lambda key, tensor: _describe(key[3], first.get(key), tensor)
    )
    for path in tapped:
        if calls[path] != calls_for_3[path]:
            raise CaptureError(
                f"'{path}' is called {calls[path]} times for 2 images and {calls_for_3[path]} times for 3, "
                "so its activations cannot be assigned to images"
            )
    tensors: dict[tuple[str, int, bool], list[TensorInfo]] = {}
    for key, seen in first.items():
        info = infos.pop(key, None)
        if isinstance(seen, Unusable) or isinstance(info, Unusable):
            reason = seen.reason if isinstance(seen, Unusable) else info.reason
            info = TensorInfo.of_unusable(key[3], reason)
        elif info is None:
            info = TensorInfo(key[3], tuple(seen[0]), "", None, problem="it exists for 2 images but not for 3")
        tensors.setdefault(key[:3], []).append(info)
    for key, info in infos.items():  # They exist for 3 images only.
        if isinstance(info, Unusable):
            info = TensorInfo.of_unusable(key[3], info.reason)
        tensors.setdefault(key[:3], []).append(info)
    first_paths = {id(module): path for path, module in reversed(modules.items())}
    layers, place = [], -1
    for path, module in tapped.items():
        # A module that is never called takes the place of the one registered before it.
        place = entered.get(path, place)
        layer = Layer(
            path=path,
            class_name=type(module).__name__,
            parameters=parameter_count(module),
            calls=tuple(
                Call(tuple(tensors.get((path, call, True), ())), tuple(tensors.get((path, call, False), ())))
                for call in range(calls[path])
            ),
            never_called_because="" if calls[path] else _why_never_called(path, modules, why_never_called),
            same_as="" if first_paths[id(module)] == path else first_paths[id(module)],
        )
        layers.append((place, layer))
    return [layer for _, layer in sorted(layers, key=operator.itemgetter(0))]


def example_images(runner: Runner, side_px: int) -> Tensor:
    """Return three square images of ordinary values to probe a model with, on the model's device."""
    shape = (3, 3, side_px, side_px)
    if runner.device.type == "meta":
        return torch.empty(shape, device=runner.device)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(runner.device)


def _record(
    runner: Runner,
    modules: Mapping[str, nn.Module],
    pixels_NCHW: Tensor,
    look: Callable[[_Key, Tensor], Any],
) -> tuple[dict[_Key, Any], dict[str, int], dict[str, int]]:
    """Run a pass; return what `look` makes of each tensor, and path -> when it was first called, and how often."""
    seen: dict[_Key, Any] = {}
    entered: dict[str, int] = {}

    def note(path: str, call: int, is_input: bool, found: Iterable[tuple[Parts, Tensor | Unusable]]) -> None:
        for parts, one in found:
            key = (path, call, is_input, parts)
            seen[key] = one if isinstance(one, Unusable) else look(key, one)

    def on_enter(path: str, call: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.setdefault(path, len(entered))
        note(path, call, True, look_into_arguments(args, kwargs))

    taps = Taps(on_enter, lambda path, call, _args, _kwargs, output: note(path, call, False, look_into(output)))
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
    if not torch.equal(random_state, torch.get_rng_state()):
        raise CaptureError(
            "the forward pass draws random numbers, so its activations are not reproducible; look for dropout that is "
            "still active, or random masking"
        )
    return seen, entered, taps.calls


def _has_nan(tensor: Tensor) -> bool:
    return tensor.device.type != "meta" and bool(tensor.isnan().any())


def _describe(parts: Parts, seen: tuple[torch.Size, bool] | None, of_3: Tensor) -> TensorInfo:
    """Compare a tensor for 2 images, its shape and whether it has NaN, with that for 3, the first and last NaN."""

    def info(shape: Sequence[int], batch_dim: int | None = None, rows: int = 1, problem: str = "") -> TensorInfo:
        return TensorInfo(parts, tuple(shape), dtype_name(of_3.dtype), batch_dim, rows, problem)

    if seen is None:
        return info(of_3.shape, problem="it exists for 3 images but not for 2")
    of_2, had_nan = seen
    grown = [d for d, (two, three) in enumerate(zip(of_2, of_3.shape, strict=False)) if two != three]
    rest = [length for d, length in enumerate(of_3.shape) if d not in grown]
    if len(of_2) != of_3.ndim or len(grown) > 1:
        return info(of_2, problem="more than one dimension changes with the number of images")
    if not grown:
        tainted = not had_nan and _has_nan(of_3)
        return info(of_2, problem="it depends on the images but has no batch dimension" if tainted else "")
    dim = grown[0]
    rows = of_2[dim] // 2
    if of_2[dim] != 2 * rows or of_3.shape[dim] != 3 * rows or (rows > 1 and dim > 0):
        return info(of_2, problem=f"dimension {dim} is {of_2[dim]} for 2 images and {of_3.shape[dim]} for 3")
    outer_first, middle, outer_last = (not had_nan and _has_nan(image) for image in of_3.split(rows, dim))
    if rows == 1:
        return info(rest, dim, 1, "an image's values depend on the other images of its batch" if middle else "")
    problem = ""
    if middle:
        problem = f"the {rows} rows of an image are not adjacent, or depend on other images"
    elif of_3.device.type != "meta" and not (outer_first and outer_last):
        problem = f"the {rows} rows of an image cannot be proved adjacent"
    return info((rows, *rest), 0, rows, problem)


def _why_never_called(path: str, modules: Mapping[str, nn.Module], of_this_model: _Explain) -> str:
    module, parent_path = modules[path], path.rpartition(".")[0] or "."
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
