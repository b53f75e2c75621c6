"""The probe: learn from a few small batches what a forward pass does to each layer."""

from __future__ import annotations

import logging
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from hookx.capture.compare import Batch
from hookx.capture.diagnosis import explain
from hookx.capture.never_called import Reason, why_never_called
from hookx.capture.passes import Key, Passes
from hookx.capture.runner import Runner, modules_of, parameter_count
from hookx.capture.state import ModuleState
from hookx.errors import CaptureError, one_line
from hookx.layers.select import Call, Layer, TensorInfo

log = logging.getLogger("hookx")
_LARGE = 50  # times a pixel


def probe(
    runner: Runner,
    images_NCHW: Tensor,
    *,
    paths: Sequence[str] | None = None,
    why_never_called: Reason = lambda _path, _modules: "",
    batch_size: int | None = None,
    shapes_only: bool = False,
    state: ModuleState | None = None,
    attention: Collection[str] | None = (),
) -> list[Layer]:
    """Learn what a forward pass does to each layer: calls, structure, shapes, and whether rows are images.

    It follows one image through the model: alone, first, in the middle and last in batches of 2, 3 and 5; beside copies
    of itself, other images, very large ones and NaN. The dimension that grows with the batch is the batch. A tensor in
    which the image's row moves by more than rounding has a `problem` that says why. On the meta device only shapes are
    compared. The layers are in the order of their first call, and the model is left as it was.

    Args:
        runner: how to take a batch through the model.
        images_NCHW: three images of ordinary values, on the runner's device; the first is the one that is followed.
        paths: the modules to describe; None for all.
        why_never_called: returns why the model never calls the module at a path, given all modules; '' if unknown.
        batch_size: 1 if no batch has more than one image: then nothing can depend on other images, and only what
            depends on the batches before has a problem.
        shapes_only: compare shapes alone, on every device.
        state: the model's state; by default that of now.
        attention: the modules whose attention to describe, with what runs within them; None for all modules, each with
            the attention that it computes itself.

    Raises:
        CaptureError: the model fails on a batch of ordinary images.

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
    state = ModuleState.of(runner.module, runner.forward) if state is None else state
    shapes_only = shapes_only or runner.device.type == "meta"
    passes = Passes(runner, tapped, state, compares=not shapes_only, attention=attention)
    followed, other, third = images_NCHW[:1], images_NCHW[1:2], images_NCHW[2:3]
    reasons: dict[Key, str] = {}
    try:
        passes.begin(Batch(followed, (0,)))
        if shapes_only and batch_size == 1:
            _find_batch_dims(passes, followed)
        elif shapes_only:
            passes.go_on(Batch(torch.cat([followed, other]), (0,)))
        elif batch_size == 1:
            reasons = _compare_passes_of_one(passes, followed, other)
        else:
            reasons = _compare_batches(passes, followed, other, third)
    finally:
        state.restore()
    return _describe(passes, modules, reasons, why_never_called)


def example_images(
    runner: Runner,
    size_px: int | tuple[int, int],
    mean: Sequence[float] = (0.5,) * 3,
    std: Sequence[float] = (0.5,) * 3,
) -> Tensor:
    """Return three images to probe a model with, on its device, as pixels normalised by `mean` and `std`.

    `size_px` is their height and width, or the side of square ones. The first has values between 0 and 1, so that a
    model which looks at the range of a whole batch shows it.
    """
    height_px, width_px = (size_px, size_px) if isinstance(size_px, int) else size_px
    shape = (3, len(mean), height_px, width_px)
    if runner.device.type == "meta":
        return torch.empty(shape, device=runner.device)
    generator = torch.Generator().manual_seed(0)
    # Coarse patterns below the noise: means over an image differ from image to image.
    coarse = torch.rand((3, len(mean), 4, 4), generator=generator)
    coarse = nn.functional.interpolate(coarse, (height_px, width_px), mode="bilinear")
    pixels = (coarse + torch.rand(shape, generator=generator)) / 2
    pixels[1] = (1.6 * pixels[1] - 0.3).clamp(0, 1)
    pixels[2] = pixels[2] ** 3
    means, stds = (torch.tensor(values).reshape(-1, 1, 1) for values in (mean, std))
    normalised = (pixels - means) / stds
    low = (0 - means) / stds
    high = (1 - means) / stds
    # Between 0.02 and 0.98, as far as that is a pixel.
    normalised[0] = (0.02 + 0.96 * pixels[0]).clamp(low, high)
    return normalised.to(runner.device)


def _compare_batches(passes: Passes, followed: Tensor, other: Tensor, third: Tensor) -> dict[Key, str]:
    """Follow an image through batches; return why its rows move where they do."""
    passes.note_changes()
    nan, large = torch.full_like(followed, float("nan")), other * _LARGE
    passes.go_on(Batch(torch.cat([followed, followed]), (0, 1), calibrates=True))
    passes.go_on(Batch(torch.cat([followed, other]), (0,)))
    failed = passes.go_on_with_one_of(
        Batch(torch.cat([nan, followed, nan]), (1,), "of NaN"), Batch(torch.cat([other, followed, third]), (1,))
    )
    if failed:
        log.info("%s; so NaN proves nothing of it, and ordinary images do", failed)
    copies = followed.expand(3, -1, -1, -1)
    what = f"of {_LARGE} times the usual values"
    passes.go_on_with_one_of(
        Batch(torch.cat([large, other, copies]), (2, 3, 4), what),
        Batch(torch.cat([third, other, copies]), (2, 3, 4)),
        Batch(torch.cat([third, copies[:2]]), (1, 2)),  # An exported program may take no more.
    )
    if passes.batches[-1].what and any(comparison.is_excused for comparison in passes.comparisons.values()):
        passes.go_on(Batch(torch.cat([third, other, copies]), (2, 3, 4)))
    passes.note_changes()
    if passes.changed:
        # What the first pass alone leaves behind shows only if another batch is the first.
        last = passes.batches[-1]
        passes.state.restore()
        passes.go_on(replace(last))
        passes.go_on(passes.batches[0])
    return explain(passes, passes.state) if passes.failed() else {}


def _compare_passes_of_one(passes: Passes, followed: Tensor, other: Tensor) -> dict[Key, str]:
    """Follow an image through passes of one image each, between which others run."""
    passes.note_changes()
    _find_batch_dims(passes, followed)
    passes.state.restore()

    def look_for_dependence(key: Key, tensor: Tensor) -> None:
        comparison = passes.comparisons.get(key)
        if comparison is None or comparison.batch_dim is not None or comparison.is_whole:
            return
        if comparison.compare(tensor, passes.batches[0]) is not None:
            comparison.make_whole()

    passes.run(Batch(other, ()), look_for_dependence)
    passes.go_on(passes.batches[0])
    for images, what in ((torch.full_like(other, float("nan")), "of NaN"), (other * _LARGE, "of large values")):
        passes.go_on_with_one_of(Batch(images, (), what), Batch(other, ()))
    passes.note_changes()
    passes.go_on(Batch(other, ()))
    passes.go_on(passes.batches[0])
    return explain(passes, passes.state) if passes.failed() else {}


def _find_batch_dims(passes: Passes, followed: Tensor) -> None:
    """Find the batch dimensions, for batches of one image; a tensor without one belongs to its image as a whole."""
    batch = Batch(torch.cat([followed, followed]), ())

    def look(key: Key, tensor: Tensor) -> None:
        if key in passes.comparisons:
            passes.comparisons[key].see(tensor, batch, 0)

    try:
        passes.run(batch, look)
    except CaptureError as error:
        log.info("%s; it takes one image at a time", one_line(error))
    for comparison in passes.comparisons.values():
        comparison.groups = [1]
        # Shapes alone do not tell a constant from what depends on the image.
        if comparison.problem or (comparison.batch_dim is None and not passes.compares):
            comparison.make_whole()


def _describe(
    passes: Passes, modules: Mapping[str, nn.Module], reasons: Mapping[Key, str], of_this_model: Reason
) -> list[Layer]:
    """Return the layers, from what the passes have shown."""
    tensors: dict[tuple[str, int, bool], list[TensorInfo]] = {}
    uneven = {path: passes.uneven_calls(path) for path in passes.modules}
    for key, comparison in passes.comparisons.items():
        info = passes.others.get(key) or comparison.info(reasons.get(key, ""))
        if key in passes.drawn and info.is_dense:
            info = replace(info, problem="the forward pass draws random numbers before it")
        tensors.setdefault(key[:3], []).append(info)
    for key, info in passes.others.items():
        if key not in passes.comparisons:
            tensors.setdefault(key[:3], []).append(info)
    first_paths = {id(module): path for path, module in reversed(list(modules.items()))}
    layers, place = [], -1
    for path, module in passes.modules.items():
        # A module that is never called takes the place of the one registered before it.
        place = passes.entered.get(path, place)
        calls = next((calls[path] for _, calls in passes.calls if calls[path]), 0)
        described = [
            Call(tuple(tensors.get((path, call, True), ())), tuple(tensors.get((path, call, False), ())))
            for call in range(calls)
        ]
        if uneven[path]:
            problem = f"its module is {uneven[path]}"
            described = [
                Call(
                    *(tuple(replace(info, problem=problem) for info in infos) for infos in (call.inputs, call.outputs))
                )
                for call in described
            ]
        layer = Layer(
            path=path,
            class_name=type(module).__name__,
            parameters=parameter_count(module),
            calls=tuple(described),
            never_called_because="" if described else why_never_called(path, modules, of_this_model),
            same_as="" if first_paths[id(module)] == path else first_paths[id(module)],
        )
        layers.append((place, layer))
    return [layer for _, layer in sorted(layers, key=operator.itemgetter(0))]
