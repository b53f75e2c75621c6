"""Headers of shards: hookx reads what safetensors reads, and nothing that safetensors refuses."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hookx.errors import ShardError
from hookx.store.format import open_shard
from hookx.store.reading import read_range

HEADER = {
    "__metadata__": {"a": "b"},
    "x": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "y": {"dtype": "U8", "shape": [5], "data_offsets": [24, 29]},
}
STRANGE: list[Any] = [0, 1, -1, 2.0, True, None, "x", [], {}, 2**70, 24, 29, [0, 24], "F16", [0], [1, 0], "F33"]
Described = tuple[dict[str, tuple[str, list[int]]], dict[str, str]]


def altered(value: Any, chance: random.Random) -> Any:
    """Return a header in which some values, names or entries are others."""
    if chance.random() < 0.08:
        return chance.choice(STRANGE)
    if isinstance(value, dict):
        others = ["dtype", "shape", "data_offsets", "q"]
        return {
            name if chance.random() > 0.03 else chance.choice(others): altered(one, chance)
            for name, one in value.items()
        }
    return [altered(one, chance) for one in value] if isinstance(value, list) else value


def as_safetensors_reads(file: Path) -> Described | None:
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            found = {name: (one.get_dtype(), one.get_shape()) for name, one in slices.items()}
            return found, opened.metadata() or {}
    except (SafetensorError, OSError):
        return None


def as_hookx_reads(file: Path) -> Described | None:
    try:
        with open_shard(file) as (_, header):
            return {name: (one.dtype, list(one.shape)) for name, one in header.tensors.items()}, dict(header.metadata)
    except ShardError as error:
        assert "is damaged: " in str(error)
        return None


def test_of_altered_headers_hookx_accepts_none_that_safetensors_refuses(tmp_path: Path) -> None:
    chance, file, accepted = random.Random(0), tmp_path / "altered", 0
    for _ in range(4000):
        text = bytearray(json.dumps(altered(HEADER, chance)).encode())
        if chance.random() < 0.2:
            text[chance.randrange(len(text))] = chance.randrange(256)
        file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(chance.choice([29, 29, 29, 28, 30, 0])))
        ours, theirs = as_hookx_reads(file), as_safetensors_reads(file)
        # hookx's own headers always have metadata, so where it is null, refusing is right as well.
        assert ours == theirs or (ours is None and b'"__metadata__": null' in text), bytes(text)
        accepted += ours is not None
    assert 200 < accepted < 2000  # Both kinds were there.


def test_the_bytes_of_a_tensor_are_those_that_safetensors_wrote(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(7, dtype=torch.float64),
        "b": torch.rand(3, 5).half(),
        "c": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "whole", {"k": "v"})
    with open_shard(tmp_path / "whole") as (opened, header):
        for name, tensor in tensors.items():
            place = header.tensors[name]
            assert read_range(opened, place.start, place.stop) == bytes(tensor.view(torch.uint8).numpy().tobytes())
