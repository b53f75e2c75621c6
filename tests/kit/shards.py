"""Shards of activations that are there already, for tests of what reads them; laid out by the safetensors library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from hookx.plan import Shard
from hookx.store.directory import RunDirectory
from hookx.store.files import write_whole
from hookx.store.format import checksum
from hookx.store.record import ShardRecord


def publish(directory: RunDirectory, shard: Shard, tensors: Mapping[str, Tensor], record: ShardRecord) -> Path:
    """Write one shard of a run."""
    record.checksums = {address: checksum(tensor) for address, tensor in tensors.items()}
    file = directory.path / directory.plan.shard_file(shard)
    write_whole(file, [save(dict(tensors), record.to_metadata(directory.plan, shard))])
    assert isinstance(file, Path)
    return file
