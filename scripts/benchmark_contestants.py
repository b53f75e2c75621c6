#!/usr/bin/env python
"""Store activations without hookx, as one would otherwise: the contestants of scripts/benchmark.py, one a function.

    scripts/benchmark_contestants.py hand-written --model resnet18 --layers conv1,avgpool --out there/ images/

Each takes every file of a flat folder, in the order of the names, through a model with random weights (seed 0), and
leaves safetensors files in the output directory: one tensor per layer, a row per image. It prints one JSON line: the
seconds between 'ready' (imported, built, hooked; no image read yet) and 'done' (written).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models import get_model, get_model_weights

BATCH = 32
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Wanted:
    """One layer, as hookx would address it: `layer1`, `layer2@mean23`, `encoder.ln@cls`, `classifier/in`."""

    address: str
    path: str
    is_input: bool
    reduction: str
    dimensions: tuple[int, ...]

    @classmethod
    def of(cls, address: str) -> Wanted:
        match = re.fullmatch(r"([\w.]+)(/in)?(?:@(cls|mean)(\d*))?", address)
        if not match:
            raise SystemExit(f"no contestant knows what '{address}' is")
        path, is_input, reduction, dimensions = match.groups(default="")
        return cls(address, path, bool(is_input), reduction, tuple(map(int, dimensions)))

    def operation(self, before: dict[str, str]) -> str:
        """Name the layer for a tool that knows what operations return, and so not what a module is given.

        Args:
            before: by module, what the tool calls the operation that gives the module its input.
        """
        if self.is_input and self.path not in before:
            raise SystemExit(f"it is not known here which operation comes before {self.path}")
        return before[self.path] if self.is_input else self.path

    def reduce(self, activation: Tensor) -> Tensor:
        """Return the activation, or, if a reduction is asked for, a new and smaller tensor."""
        match self.reduction:
            case "mean":
                return activation.mean(self.dimensions)
            case "cls":
                return activation[:, 0].clone()
        return activation


class Photographs(Dataset[Tensor]):
    """The files of a folder, decoded and prepared as was published with the model's weights."""

    def __init__(self, folder: Path, model: str) -> None:
        self.files = sorted(folder.iterdir())
        self.transform = get_model_weights(model).DEFAULT.transforms()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> Tensor:
        with Image.open(self.files[number]) as image:
            pixels_CHW: Tensor = self.transform(image.convert("RGB"))
        return pixels_CHW

    def batches(self) -> DataLoader[Tensor]:
        return DataLoader(self, batch_size=BATCH, num_workers=CORES)


@dataclass
class Task:
    """What every contestant is given. It calls `ready` once, when its preparations are over."""

    model: nn.Module
    wanted: list[Wanted]
    photographs: Photographs
    out: Path
    ready_at: float = field(default=0.0)

    def ready(self) -> None:
        self.ready_at = time.perf_counter()

    def save(self, chunks: dict[str, list[Tensor]]) -> None:
        """Join what the batches gave and write one file; a layer's pieces are let go as soon as they are joined."""
        rows = {address: torch.cat(chunks.pop(address)) for address in list(chunks)}
        names = json.dumps([file.name for file in self.photographs.files])
        save_file(rows, self.out / "activations.safetensors", metadata={"keys": names})


def build(model: str) -> nn.Module:
    """Build a model with the random weights that everyone has."""
    torch.manual_seed(0)
    return get_model(model, weights=None).eval()


def clone_hooks(model: nn.Module, wanted: Iterable[Wanted]) -> dict[str, list[Tensor]]:
    """Hook the wanted layers; return the lists into which every pass will put its clones."""
    chunks: dict[str, list[Tensor]] = {}

    def hook(one: Wanted) -> None:
        kept = chunks[one.address] = []

        def keep(activation: Tensor) -> None:
            kept.append(one.reduce(activation) if one.reduction else activation.clone())

        module = model.get_submodule(one.path)
        if one.is_input:
            module.register_forward_pre_hook(lambda _module, inputs: keep(inputs[0]))
        else:
            module.register_forward_hook(lambda _module, _inputs, output: keep(output))

    for one in wanted:
        hook(one)
    return chunks


# --- contestants ---------------------------------------------------------------------------------------------------


def hand_written(task: Task) -> None:
    """Run what somebody competent writes in an afternoon: a DataLoader, inference mode, hooks that clone, one file."""
    chunks = clone_hooks(task.model, task.wanted)
    task.ready()
    with torch.inference_mode():
        for pixels_NCHW in task.photographs.batches():
            task.model(pixels_NCHW)
    task.save(chunks)


def naive(task: Task) -> None:
    """Run the plain loop: one process, small batches."""
    chunks = clone_hooks(task.model, task.wanted)
    task.ready()
    with torch.inference_mode():
        for start in range(0, len(task.photographs), 4):
            numbers = range(start, min(start + 4, len(task.photographs)))
            task.model(torch.stack([task.photographs[number] for number in numbers]))
    task.save(chunks)


def fx(task: Task) -> None:
    """Run torchvision's feature extractor: the model, traced, and cut after the last node asked for."""
    from torchvision.models.feature_extraction import create_feature_extractor

    nodes = {one.operation({"classifier": "flatten"}): one for one in task.wanted}
    if len(nodes) < len(task.wanted):
        raise SystemExit("a node can be asked for once only")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "NOTE: The nodes obtained by tracing the model in eval mode")
        extractor = create_feature_extractor(task.model, list(nodes))
    chunks: dict[str, list[Tensor]] = {one.address: [] for one in task.wanted}
    task.ready()
    with torch.inference_mode():
        for pixels_NCHW in task.photographs.batches():
            features = extractor(pixels_NCHW)
            for node, one in nodes.items():
                chunks[one.address].append(one.reduce(features[node]))
    task.save(chunks)


def torchhook(task: Task) -> None:
    """Run TorchHook as in its quick start, with the loader around it: https://github.com/zzaiyan/TorchHook."""
    from torchhook import HookManager

    manager = HookManager(task.model)
    for one in task.wanted:
        options: dict[str, Any] = {}
        if one.is_input:
            options["custom_hook"] = lambda _module, inputs, _output, one=one: one.reduce(inputs[0])
        elif one.reduction:
            options["output_transform"] = one.reduce
        manager.add(layer_name=one.address, layer=task.model.get_submodule(one.path), **options)
    task.ready()
    with torch.no_grad():
        for pixels_NCHW in task.photographs.batches():
            task.model(pixels_NCHW)
    chunks = {one.address: list(manager.get(one.address)) for one in task.wanted}
    manager.clear_hooks()
    task.save(chunks)


def torchextractor(task: Task) -> None:
    """Run torchextractor as in its README, with the loader around it: https://github.com/antoinebrl/torchextractor."""
    from torchextractor import Extractor

    inputs_of = {one.path for one in task.wanted if one.is_input}

    def keep(_module: nn.Module, inputs: Any, output: Any, name: str, features: dict[str, Any]) -> None:
        features[name] = inputs[0] if name in inputs_of else output

    paths = [one.path for one in task.wanted]
    extractor = Extractor(task.model, paths, capture_fn=keep) if inputs_of else Extractor(task.model, paths)
    chunks: dict[str, list[Tensor]] = {one.address: [] for one in task.wanted}
    task.ready()
    with torch.no_grad():
        for pixels_NCHW in task.photographs.batches():
            _output, features = extractor(pixels_NCHW)
            for one in task.wanted:
                chunks[one.address].append(one.reduce(features[one.path]))
    task.save(chunks)


def torchlens(task: Task) -> None:
    """Run torchlens' extraction of a data set into a directory: https://github.com/johnmarktaylor91/torchlens."""
    import torchlens as tl

    pools = {
        ("mean", (2, 3)): "spatial_mean",
        ("mean", (1,)): {"preset": "token_mean", "unmasked": True},  # An image has no padded tokens.
        ("cls", ()): "cls",
    }
    # A name in a torchlens file has no slash.
    layers = {one.address.replace("/", "|"): one.operation({"classifier": "flatten_1"}) for one in task.wanted}
    pool = {one.address: pools[one.reduction, one.dimensions] for one in task.wanted if one.reduction}
    # "Any iterable of unbatched samples works": this one is decoded by as many processes as cores.
    samples = DataLoader(task.photographs, batch_size=None, num_workers=CORES)
    task.ready()
    tl.extract_dataset(
        task.model, samples, layers, batch_size=BATCH, output_dir=task.out, pool=pool or None, progress=False
    )


CONTESTANTS: dict[str, Callable[[Task], None]] = {
    "hand-written": hand_written,
    "fx": fx,
    "naive": naive,
    "torchhook": torchhook,
    "torchextractor": torchextractor,
    "torchlens": torchlens,
}


def main() -> int:
    """Run the contestant named on the command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("contestant", choices=CONTESTANTS)
    parser.add_argument("--model", required=True, help="a name of torchvision")
    parser.add_argument("--layers", required=True, help="addresses, with commas between them")
    parser.add_argument("--out", type=Path, required=True, help="an empty directory")
    parser.add_argument("images", type=Path, help="a flat folder")
    arguments = parser.parse_args()
    task = Task(
        build(arguments.model),
        [Wanted.of(address) for address in arguments.layers.split(",")],
        Photographs(arguments.images, arguments.model),
        arguments.out,
    )
    try:
        CONTESTANTS[arguments.contestant](task)
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is not installed; it comes with the extra 'bench'") from None
    print(json.dumps({"seconds": time.perf_counter() - task.ready_at}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
