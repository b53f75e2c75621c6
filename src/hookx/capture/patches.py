"""Which tokens of a sequence stand for which places of the image: proved on the model, layer by layer.

Attention lets every token see the whole image, so it is silenced: each attention adds nothing to its tokens, and a
token carries what it came with. Then strips of the image are replaced by those of another one. A token that changes
with one row and one column of the grid, and with no other, stands for that place; one that never changes stands for
none: a class token, a register. If other parts of a model mix its tokens, they all change, and nothing is proved.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hookx.capture.compare import split_by_image
from hookx.capture.hooks import Taps, tap
from hookx.capture.passes import Key
from hookx.capture.runner import Runner, modules_of
from hookx.capture.state import ModuleState
from hookx.capture.tensors import Parts, tensors_given, tensors_in
from hookx.layers.reductions import Patches
from hookx.layers.select import Layer, TensorInfo

_IMAGES_AT_ONCE = 16
# A share of a tensor's largest magnitude. A place that is replaced moves its token much further, and the same values at
# another place in a batch move by less.
_LEAST_MOVE = {torch.float16: 2e-2, torch.bfloat16: 5e-2}
_LEAST_MOVE_OF_FLOATS = 1e-3


def prove_patches(runner: Runner, images_NCHW: Tensor, layers: Sequence[Layer]) -> list[Layer]:
    """Return layers with what is known of their tokens: `TensorInfo.patches`, where it could be proved.

    Tensors N,tokens,channels and N,height,width,channels are looked at. The model is left as it was.

    Args:
        images_NCHW: at least two images of ordinary values, on the runner's device.

    Example:
        >>> from torchvision.models.vision_transformer import VisionTransformer
        >>> from hookx.capture.probe import probe
        >>> runner = Runner.of(VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=16).eval())
        >>> images_NCHW = torch.rand(3, 3, 32, 32)
        >>> [layer] = prove_patches(runner, images_NCHW, probe(runner, images_NCHW, paths=["encoder.ln"]))
        >>> patches = layer.calls[0].outputs[0].patches
        >>> patches.height, patches.width, patches.others
        (4, 4, (0,))
    """
    wanted = {
        (layer.path, number, is_input, info.parts): info
        for layer in layers
        for number, call in enumerate(layer.calls)
        for is_input, infos in ((True, call.inputs), (False, call.outputs))
        for info in infos
        if _may_be_tokens(info)
    }
    grids: dict[tuple[int, int], dict[Key, TensorInfo]] = {}
    for key, info in wanted.items():
        if grid := _grid_of(info, images_NCHW.shape[2], images_NCHW.shape[3]):
            grids.setdefault(grid, {})[key] = info
    state, proved = ModuleState.of(runner.module, runner.forward), dict[Key, Patches]()
    try:
        for (height, width), of_grid in grids.items():
            experiment = _Experiment(runner, images_NCHW, height, width)
            proved |= experiment.run(of_grid, by_codes=True)
            rest = {key: info for key, info in of_grid.items() if key not in proved}
            if rest:  # Overlapping patches see more than one row and column.
                proved |= experiment.run(rest, by_codes=False)
    finally:
        state.restore()
    return [_with(layer, proved) for layer in layers]


def _may_be_tokens(info: TensorInfo) -> bool:
    is_float = info.dtype.startswith(("float", "bfloat"))
    return is_float and info.batch_dim is not None and not info.problem and len(info.shape) in (2, 3)


def _grid_of(info: TensorInfo, height_px: int, width_px: int) -> tuple[int, int] | None:
    """Return the only grid of square patches that a sequence can hold; it has a row or a column for each side."""
    if len(info.shape) == 3:
        height, width, _ = info.shape
        fits = height_px * width == width_px * height and 1 < height <= height_px
        return (height, width) if fits else None
    count = info.shape[0]
    for patch_px in range(1, math.gcd(height_px, width_px) + 1):
        height, width = height_px // patch_px, width_px // patch_px
        if height_px % patch_px == 0 == width_px % patch_px and height * width <= count:
            return (height, width) if 2 * height * width > count and height * width > 1 else None
    return None


def _with(layer: Layer, proved: Mapping[Key, Patches]) -> Layer:
    calls = []
    for number, call in enumerate(layer.calls):
        both = [
            tuple(replace(info, patches=proved.get((layer.path, number, is_input, info.parts))) for info in infos)
            for is_input, infos in ((True, call.inputs), (False, call.outputs))
        ]
        calls.append(replace(call, inputs=both[0], outputs=both[1]))
    return replace(layer, calls=tuple(calls))


@dataclass
class _Experiment:
    """The images of a proof, and what they do to the tokens of a grid."""

    runner: Runner
    images_NCHW: Tensor
    height: int
    width: int

    def run(self, wanted: Mapping[Key, TensorInfo], *, by_codes: bool) -> dict[Key, Patches]:
        """Prove what can be proved, with few images by codes of rows and columns, or with one for each of them."""
        strips = _codes if by_codes else _one_by_one
        rows, columns = strips(self.height), strips(self.width)
        changed: dict[Key, list[Tensor]] = {key: [] for key in wanted}
        for start in range(0, len(rows) + len(columns), _IMAGES_AT_ONCE - 1):
            some = self._variants(rows, columns)[start : start + _IMAGES_AT_ONCE - 1]
            images_NCHW = torch.cat([self.images_NCHW[:1], *some])
            for key, of_images in self._look(images_NCHW, wanted).items():
                changed[key].append(of_images)
        proved = {}
        for key, parts in changed.items():
            if parts and sum(map(len, parts)) == len(rows) + len(columns):
                of_rows, of_columns = torch.cat(parts).split([len(rows), len(columns)])
                read = _read_codes if by_codes else _read_strips
                places = read(of_rows, self.height), read(of_columns, self.width)
                if found := _in_order(*places, self.height, self.width):
                    proved[key] = found
        return proved

    def _variants(self, rows: Sequence[Collection[int]], columns: Sequence[Collection[int]]) -> list[Tensor]:
        """Return the first image with strips of the second one: for each set of rows, then for each of columns."""
        one, other = self.images_NCHW[:1], self.images_NCHW[1:2]
        variants = []
        for strips, count, dim in ((rows, self.height, 2), (columns, self.width, 3)):
            length = one.shape[dim]
            for numbers in strips:
                variant = one.clone()
                for number in numbers:
                    start, stop = number * length // count, (number + 1) * length // count
                    variant.narrow(dim, start, stop - start).copy_(other.narrow(dim, start, stop - start))
                variants.append(variant)
        return variants

    def _look(self, images_NCHW: Tensor, wanted: Mapping[Key, TensorInfo]) -> dict[Key, Tensor]:
        """Return which tokens of a pass without attention differ from those of its first image: images, tokens."""
        found: dict[Key, Tensor] = {}

        def note(path: str, call: int, is_input: bool, tensors: Iterable[tuple[Parts, Tensor]]) -> None:
            for parts, tensor in tensors:
                key = path, call, is_input, parts
                if (info := wanted.get(key)) is not None:
                    with contextlib.suppress(RuntimeError):  # Its shape depends on more than the number of images.
                        tokens = split_by_image(tensor.detach(), info, len(images_NCHW))
                        if tokens.shape[1:] == info.shape:
                            found[key] = _changed(tokens.flatten(1, -2))

        taps = Taps(
            lambda path, call, args, kwargs: note(path, call, True, tensors_given(args, kwargs)),
            lambda path, call, _args, _kwargs, output: note(path, call, False, tensors_in(output)),
        )
        modules = modules_of(self.runner.module)
        paths = {path for path, *_ in wanted}
        try:
            with tap({path: modules[path] for path in paths}, taps), _silenced():
                self.runner.run(images_NCHW)
        except Exception:  # A model can depend on its attention in any way; then nothing is proved.
            return {}
        return found


class _Silence(TorchDispatchMode):
    """Has every attention of a pass add nothing, whatever module computes it."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = operation(*args, **kwargs)
        match operation.overloadpacket.__name__:
            case "softmax" | "_softmax" | "_safe_softmax":
                dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
                if output.ndim in (3, 4, 5) and dim in (-1, output.ndim - 1):
                    return torch.zeros_like(output)
            case "scaled_dot_product_attention":
                return torch.zeros_like(output)
        return output


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    with _Silence():  # type: ignore[no-untyped-call]
        yield


def _changed(tokens: Tensor) -> Tensor:
    """Return which tokens of the images but the first are others than those of the first: images, tokens."""
    least = _LEAST_MOVE.get(tokens.dtype, _LEAST_MOVE_OF_FLOATS)
    values = tokens.float()
    moves = (values[1:] - values[:1]).abs().amax(2)
    return ~(moves <= least * values[0].abs().amax(1)).cpu()


def _codes(count: int) -> list[list[int]]:
    """Number the strips from 1, and return for each binary digit the strips whose number has it."""
    return [[number for number in range(count) if (number + 1) >> digit & 1] for digit in range(count.bit_length())]


def _read_codes(changed: Tensor, count: int) -> Tensor:
    """Return the strip of each token; -1 for one that no strip changes, and a number too large for a wrong one."""
    digits = 2 ** torch.arange(len(changed)).unsqueeze(1)
    return (changed * digits).sum(0) - 1


def _one_by_one(count: int) -> list[list[int]]:
    return [[number] for number in range(count)]


def _read_strips(changed: Tensor, count: int) -> Tensor:
    """Return the strip in the middle of those that change a token, by rank; -1 for one that none changes."""
    strips = changed.int()
    middles = strips.argmax(0) + count - 1 - strips.flip(0).argmax(0)
    is_placed = changed.any(0)
    ranks = torch.full((changed.shape[1],), -1)
    ranks[is_placed] = middles[is_placed].unique(return_inverse=True)[1]
    return ranks


def _in_order(rows: Tensor, columns: Tensor, height: int, width: int) -> Patches | None:
    """Return the tokens of a grid, row by row, if there is one for each place."""
    placed = rows >= 0
    if not torch.equal(placed, columns >= 0) or int(placed.sum()) != height * width:
        return None
    numbers = placed.nonzero().flatten()
    places = rows[placed] * width + columns[placed]
    order = places.argsort()
    if not torch.equal(places[order], torch.arange(height * width)) or bool((columns[placed] >= width).any()):
        return None
    return Patches(height, width, tuple(numbers[order].tolist()), len(rows))
