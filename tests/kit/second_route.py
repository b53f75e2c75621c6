"""A model's activations by two routes that share no code: captured as in a run, and cloned as the layers return."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hookx.capture.probe import example_images, probe
from hookx.capture.rows import RowCapture, stored_dtype
from hookx.capture.runner import Runner
from hookx.images.decoding import decode, model_input
from hookx.layers.select import Target, TensorInfo, parse_selectors, select
from hookx.models import LoadedModel
from hookx.plan import Preprocessing


def input_of(file: Path, preprocessing: Preprocessing) -> Tensor:
    """Decode one image file to what a model takes, (3, crop_px, crop_px)."""
    pixels_CHW, _ = decode(str(file), preprocessing)
    return model_input(pixels_CHW.unsqueeze(0), preprocessing)[0]


def captured_of(loaded: LoadedModel, layers: str = "**,.", side_px: int = 0) -> dict[str, Tensor]:
    """Probe and capture two images; check that each row equals a clone of what the layer returned."""
    side_px = side_px or loaded.preprocessing.crop_px
    runner = Runner.of(loaded.module, loaded.forward)
    probed = probe(runner, example_images(runner, side_px))
    targets = select(parse_selectors(layers), probed, loaded.name).targets
    pixels_NCHW = torch.randn(2, 3, side_px, side_px, generator=torch.Generator().manual_seed(1))
    rows = {str(t.address): torch.full((2, *t.shape), 7, dtype=getattr(torch, stored_dtype(t))) for t in targets}
    with RowCapture(runner, targets) as capture:
        capture.run(pixels_NCHW, rows)
    cloned = _cloned(loaded, targets, pixels_NCHW)
    assert rows.keys() == cloned.keys() and rows
    for address, row in rows.items():
        assert torch.equal(row, cloned[address]), address
    return rows


def _cloned(loaded: LoadedModel, targets: list[Target], pixels_NCHW: Tensor) -> dict[str, Tensor]:
    outputs: dict[str, list[dict[tuple[str, ...], Tensor]]] = {}

    def watch(path: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            outputs.setdefault(path, []).append({parts: tensor.clone() for parts, tensor in _tensors(output)})

        return hook

    modules = dict(loaded.module.named_modules(remove_duplicate=False))
    paths = {target.address.path for target in targets}
    handles = [modules[path.removeprefix(".")].register_forward_hook(watch(path)) for path in paths]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # It would skip submodules, and rounds differently.
    with torch.no_grad():
        loaded.forward(pixels_NCHW)
    torch.backends.mha.set_fastpath_enabled(fast_path)
    for handle in handles:
        handle.remove()
    found = {}
    for target in targets:
        tensor = outputs[target.address.path][target.address.call or 0][target.address.parts]
        found[str(target.address)] = by_image(tensor, target.tensor, len(pixels_NCHW))
    return found


def by_image(tensor: Tensor, info: TensorInfo, count: int) -> Tensor:
    """Move a tensor's images to the front, by gathering the rows of each."""
    dim = info.batch_dim or 0
    if info.rows_per_image == 1:
        return tensor.movedim(dim, 0)
    in_group = info.rows_per_image // info.groups_per_image
    rows = torch.arange(tensor.shape[dim])
    return torch.stack([tensor.index_select(dim, rows[rows // in_group % count == image]) for image in range(count)])


def _tensors(value: Any, parts: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    if isinstance(value, Tensor):
        yield parts, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _tensors(item, (*parts, str(name)))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _tensors(item, (*parts, str(number)))
