"""Small runs with random activations, and processes to write them."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from hookx.plan import DTYPES, LayerSpec, Plan, Preprocessing
from hookx.store.directory import RunDirectory
from hookx.store.record import ShardRecord
from kit.shards import publish

SHAPES = [(), (3,), (2, 3), (4, 1, 5), (0, 2)]
ALL_DTYPES = tuple(
    LayerSpec(f"{dtype}.{number}", shape, dtype) for dtype in DTYPES for number, shape in enumerate(SHAPES)
)
MAPS = (LayerSpec("layer1", (2, 3), "float32"), LayerSpec("avgpool", (5,), "bfloat16"))
UNREADABLE = {"04": "OSError: cut", "06": "OSError: cut", "07": "OSError: cut", "08": "OSError: cut"}


def plan_of(layers: tuple[LayerSpec, ...], image_count: int, images_per_shard: int = 100) -> Plan:
    return Plan(
        model="net",
        weights="random (seed 0)",
        layers=layers,
        preprocessing=Preprocessing(256, 224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear"),
        precision="fp32",
        memory_format="contiguous",
        image_count=image_count,
        images_sha256="0" * 64,
        images_per_shard=images_per_shard,
        batch_size=2,
    )


def random_tensor(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Tensor:
    """Return random bits: every pattern, also the NaNs."""
    width = DTYPES[dtype][1]
    high = 2 if dtype == "bool" else 256
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, high, (*shape, width), dtype=torch.uint8, generator=generator).view(getattr(torch, dtype))[
        ..., 0
    ]


def random_rows(plan: Plan, rows: int, seed: int = 0) -> dict[str, Tensor]:
    return {
        layer.address: random_tensor((rows, *layer.shape), layer.dtype, seed + number)
        for number, layer in enumerate(plan.layers)
    }


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and bits(one) == bits(other)


def write_run(path: Path, plan: Plan) -> dict[str, Tensor]:
    """Write a whole run of random activations; return them."""
    written: dict[str, list[Tensor]] = {layer.address: [] for layer in plan.layers}
    with RunDirectory(path, plan) as directory:
        for shard in plan.shards:
            keys = [f"{position:02}" for position in range(shard.start, shard.stop)]
            record = ShardRecord(
                keys=[key for key in keys if key not in UNREADABLE],
                failures=[(key, UNREADABLE[key]) for key in keys if key in UNREADABLE],
            )
            tensors = random_rows(plan, len(record.keys), seed=100 * shard.number)
            publish(directory, shard, tensors, record)
            for address, tensor in tensors.items():
                written[address].append(tensor)
        directory.publish_index()
    return {address: torch.cat(tensors) for address, tensors in written.items()}


@contextmanager
def forked(work: Callable[[], None]) -> Iterator[int]:
    """Run `work` in a process that is killed, if it has not ended, when the block is left; yields its id."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    assert process.pid is not None
    try:
        yield process.pid
    finally:
        process.kill()
        process.join()
        process.close()


def wait_for(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.001)
