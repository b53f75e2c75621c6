#!/usr/bin/env python
"""Store activations without hookx: the contestants of scripts/benchmark.py, one function for each.

    scripts/benchmark_contestants.py hand-written --model resnet18 --layers conv1,avgpool --out there/ images/

Each contestant runs the files of a flat folder, in the order of their names, through a model with random weights (seed
0) and writes safetensors files to the output directory: one tensor per layer, one row per image. It prints one line of
JSON: the seconds between 'ready' (imported, built, hooked; no image read yet) and 'done' (written), and those until
the files are on the disk.

With `--device cuda`, hand-written and fx do on a GPU what people write for one: pinned batches, copies that do not
block, autocast for bf16, and `.cpu()` in each hook.
"""

from __future__ import annotations

import argparse
import contextlib
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
    """One layer, addressed as in hookx: `layer1`, `layer2@mean23`, `encoder.ln@cls`, `classifier/in`."""

    address: str
    path: str
    is_input: bool
    reduction: str
    dimensions: tuple[int, ...]

    @classmethod
    def parse(cls, address: str) -> Wanted:
        match = re.fullmatch(r"([\w.]+)(/in)?(?:@(cls|mean)(\d*))?", address)
        if not match:
            raise SystemExit(f"error: the contestants do not support the address '{address}'")
        path, is_input, reduction, dimensions = match.groups(default="")
        return cls(address, path, bool(is_input), reduction, tuple(map(int, dimensions)))

    def operation(self, before: dict[str, str]) -> str:
        """Name the layer for a tool that captures the outputs of operations, and not the inputs of modules.

        Args:
            before: the operation that produces the input of a module, by the path of the module.
        """
        if self.is_input and self.path not in before:
            raise SystemExit(f"error: the operation before {self.path} is not known")
        return before[self.path] if self.is_input else self.path

    def reduce(self, activation: Tensor) -> Tensor:
        """Return the activation, reduced to a new, smaller tensor if the address says so."""
        match self.reduction:
            case "mean":
                return activation.mean(self.dimensions)
            case "cls":
                return activation[:, 0].clone()
        return activation


@dataclass(frozen=True)
class Compute:
    """Where the model runs, in which precision, and how it is fed."""

    device: str = "cpu"
    precision: str = "fp32"
    batch_size: int = BATCH
    workers: int = CORES

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision == "bf16":
            return torch.autocast(self.device, torch.bfloat16)
        return contextlib.nullcontext()

    def place(self, pixels_NCHW: Tensor) -> Tensor:
        return pixels_NCHW.to(self.device, non_blocking=True)

    def keep(self, activation: Tensor) -> Tensor:
        """Return a copy on the CPU of an activation that may be overwritten later."""
        return activation.clone() if self.device == "cpu" else activation.cpu()


class Photographs(Dataset[Tensor]):
    """The images in a folder, preprocessed as published with the weights of a model."""

    def __init__(self, folder: Path, model: str, compute: Compute = Compute()) -> None:
        self.files = sorted(folder.iterdir())
        self.compute = compute
        self.transform = get_model_weights(model).DEFAULT.transforms()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> Tensor:
        with Image.open(self.files[number]) as image:
            pixels_CHW: Tensor = self.transform(image.convert("RGB"))
        return pixels_CHW

    def batches(self) -> DataLoader[Tensor]:
        compute = self.compute
        pinned = compute.device != "cpu"
        return DataLoader(self, batch_size=compute.batch_size, num_workers=compute.workers, pin_memory=pinned)


@dataclass
class Task:
    """The input of a contestant, which calls `ready` once, when its preparations are done."""

    model: nn.Module
    wanted: list[Wanted]
    photographs: Photographs
    out: Path
    compute: Compute = Compute()
    ready_at: float = field(default=0.0)

    def ready(self) -> None:
        self.ready_at = time.perf_counter()

    def save(self, chunks: dict[str, list[Tensor]]) -> None:
        """Concatenate the batches and write one file; free the batches of a layer as soon as they are concatenated."""
        rows = {address: torch.cat(chunks.pop(address)) for address in list(chunks)}
        names = json.dumps([file.name for file in self.photographs.files])
        save_file(rows, self.out / "activations.safetensors", metadata={"keys": names})


def build(model: str) -> nn.Module:
    """Build a model with the random weights that all contestants share."""
    torch.manual_seed(0)
    return get_model(model, weights=None).eval()


def clone_hooks(model: nn.Module, wanted: Iterable[Wanted], compute: Compute = Compute()) -> dict[str, list[Tensor]]:
    """Hook the wanted layers; return the lists to which every pass appends its copies."""
    chunks: dict[str, list[Tensor]] = {}

    def hook(one: Wanted) -> None:
        kept = chunks[one.address] = []

        def keep(activation: Tensor) -> None:
            if not one.reduction:
                kept.append(compute.keep(activation))
            else:  # A reduced activation is a new tensor already.
                kept.append(one.reduce(activation).cpu())

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
    """Run what a competent engineer writes in an afternoon: DataLoader, inference mode, cloning hooks, one file."""
    compute = task.compute
    chunks = clone_hooks(task.model, task.wanted, compute)
    task.ready()
    with torch.inference_mode(), compute.autocast():
        for pixels_NCHW in task.photographs.batches():
            task.model(compute.place(pixels_NCHW))
    task.save(chunks)


def naive(task: Task) -> None:
    """Run a plain loop: one process, small batches."""
    chunks = clone_hooks(task.model, task.wanted)
    task.ready()
    with torch.inference_mode():
        for start in range(0, len(task.photographs), 4):
            numbers = range(start, min(start + 4, len(task.photographs)))
            task.model(torch.stack([task.photographs[number] for number in numbers]))
    task.save(chunks)


def fx(task: Task) -> None:
    """Run torchvision's feature extractor: the traced model, cut after the last requested node."""
    from torchvision.models.feature_extraction import create_feature_extractor

    nodes = {one.operation({"classifier": "flatten"}): one for one in task.wanted}
    if len(nodes) < len(task.wanted):
        raise SystemExit("error: fx cannot return a node twice")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "NOTE: The nodes obtained by tracing the model in eval mode")
        extractor = create_feature_extractor(task.model, list(nodes))
    chunks: dict[str, list[Tensor]] = {one.address: [] for one in task.wanted}
    task.ready()
    compute = task.compute
    with torch.inference_mode(), compute.autocast():
        for pixels_NCHW in task.photographs.batches():
            features = extractor(compute.place(pixels_NCHW))
            for node, one in nodes.items():
                chunks[one.address].append(one.reduce(features[node]).cpu())
    task.save(chunks)


def torchhook(task: Task) -> None:
    """Run TorchHook as in its quick start, with a DataLoader: https://github.com/zzaiyan/TorchHook."""
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
    """Run torchextractor as in its README, with a DataLoader: https://github.com/antoinebrl/torchextractor."""
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
    """Run torchlens' `extract_dataset` into a directory: https://github.com/johnmarktaylor91/torchlens."""
    import torchlens as tl

    pools = {
        ("mean", (2, 3)): "spatial_mean",
        ("mean", (1,)): {"preset": "token_mean", "unmasked": True},  # An image has no padded tokens.
        ("cls", ()): "cls",
    }
    # torchlens does not allow a slash in a name.
    layers = {one.address.replace("/", "|"): one.operation({"classifier": "flatten_1"}) for one in task.wanted}
    pool = {one.address: pools[one.reduction, one.dimensions] for one in task.wanted if one.reduction}
    # torchlens: "Any iterable of unbatched samples works". This one decodes in one process per core.
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
    parser.add_argument("--model", required=True, help="a torchvision model")
    parser.add_argument("--layers", required=True, help="comma-separated addresses")
    parser.add_argument("--out", type=Path, required=True, help="an empty output directory")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda: only hand-written and fx")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="only hand-written and fx")
    parser.add_argument("--batch-size", type=int, default=BATCH)
    parser.add_argument("--workers", type=int, default=CORES, help="processes that decode")
    parser.add_argument("images", type=Path, help="a flat folder of images")
    arguments = parser.parse_args()
    compute = Compute(arguments.device, arguments.precision, arguments.batch_size, arguments.workers)
    if compute.device != "cpu":
        # By default, convolutions run in TF32, and would be compared with those of hookx in fp32.
        torch.backends.cudnn.allow_tf32 = False
    task = Task(
        build(arguments.model).to(compute.device),
        [Wanted.parse(address) for address in arguments.layers.split(",")],
        Photographs(arguments.images, arguments.model, compute),
        arguments.out,
        compute,
    )
    try:
        CONTESTANTS[arguments.contestant](task)
    except ModuleNotFoundError as error:
        raise SystemExit(f"error: {error.name} is not installed: run scripts/setup bench") from None
    seconds = time.perf_counter() - task.ready_at
    for file in arguments.out.glob("*.safetensors"):
        with open(file, "rb") as written:
            os.fsync(written.fileno())
    print(json.dumps({"seconds": seconds, "seconds_flushed": time.perf_counter() - task.ready_at}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
