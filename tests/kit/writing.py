"""Runs of random activations that the real writer stores, in this process or with forked workers."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from pathlib import Path

import torch
from torch import Tensor

from hookx.plan import Plan, Shard
from hookx.store.directory import RunDirectory
from hookx.store.record import ShardRecord
from hookx.store.shard_file import Tuning
from hookx.store.writer import ShardWriter, Written
from kit.runs import random_rows


def key_of(position: int) -> str:
    return f"{position:04}"


def expected(shard: Shard) -> ShardRecord:
    return ShardRecord([key_of(position) for position in range(shard.start, shard.stop)], sizes_bytes=[1] * len(shard))


def write(
    path: Path,
    plan: Plan,
    batch_size: int,
    unreadable: Collection[int] = (),
    reason: str = "cut",
    workers: int = 0,
    tuning: Tuning = Tuning(),
    replaced: Collection[int] = (),
) -> dict[str, Tensor]:
    """Write a run of random activations by the real writer; return those of the images that could be read.

    With `replaced`, write only these shards, in place of those that are there.
    """
    shards = [shard for shard in plan.shards if not replaced or shard.number in replaced]
    values = random_rows(plan, plan.image_count)
    batches = [positions for shard in shards for positions in shard.batches(batch_size)]

    def readable(positions: range) -> list[int]:
        return [position for position in positions if position not in unreadable]

    def fill(writer: ShardWriter, positions: range) -> Future[Written]:
        read = readable(positions)
        for address, rows in writer.rows(positions, len(read)).items():
            rows[:] = _at(values[address], read)
        return writer.write(positions)

    with (
        RunDirectory(path, plan) as directory,
        ShardWriter(
            directory,
            shards,
            batch_size,
            expected,
            processes=max(1, workers),
            tuning=tuning,
            replaced=replaced,
        ) as writer,
        filled_by(workers, directory, batches, functools.partial(fill, writer)) as filled,
    ):
        for shard in shards:
            record, written = ShardRecord(sizes_bytes=[1] * len(shard)), []
            for positions in shard.batches(batch_size):
                written.append(next(filled))
                record.keys += map(key_of, readable(positions))
                record.failures += [(key_of(position), reason) for position in positions if position in unreadable]
            writer.publish(record, written)
        writer.finish()
        directory.publish_index()
    return {address: _at(tensor, readable(range(plan.image_count))) for address, tensor in values.items()}


def _at(values: Tensor, positions: list[int]) -> Tensor:
    """Return some of the rows; torch 2.6 cannot index every type with a list."""
    return torch.stack([values[position] for position in positions]) if positions else values[:0]


@contextlib.contextmanager
def filled_by(
    workers: int, directory: RunDirectory, batches: list[range], fill: Callable[[range], Future[Written]]
) -> Iterator[Iterator[Written | Future[Written]]]:
    """Fill batches in this process, or in forked ones, the last of the batches first as far as that can be."""
    if not workers:
        yield map(fill, batches)
        return
    fork = multiprocessing.get_context("fork")
    queues = [fork.SimpleQueue() for _ in batches]

    def work(number: int) -> None:
        torch.set_num_threads(1)
        directory.release()
        for mine in range(number, len(batches), workers):
            time.sleep(0.002 * (workers - number))  # so that each of them has to wait for those before it
            queues[mine].put(fill(batches[mine]).result())

    processes = [fork.Process(target=work, args=(number,)) for number in range(workers)]
    for process in processes:
        process.start()
    try:
        yield (queue.get() for queue in queues)
    finally:
        for process in processes:
            process.join()
