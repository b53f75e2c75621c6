"""What was computed batch by batch is in the shards bit for bit, whoever computed it and whatever was unreadable."""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import multiprocessing
import os
import resource
import signal
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

import hookx
from hookx.check.verify import verify
from hookx.errors import StoreError
from hookx.plan import DTYPES, LayerSpec, Shard
from hookx.store.directory import RunDirectory, finished_shards
from hookx.store.shard_file import Tuning, open_direct
from hookx.store.writer import ShardWriter, Written
from kit.runs import ALL_DTYPES, MAPS, bits, forked, plan_of, random_rows, same_bits, wait_for
from kit.writing import expected, key_of, write

LARGE = (LayerSpec("conv1", (64, 1000), "float32"), LayerSpec("mask", (3,), "bool"), LayerSpec("fc", (7,), "float64"))


# --- the format ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [5, 1, 0])
def test_every_dtype_is_read_back_bit_for_bit_by_the_safetensors_library(tmp_path: Path, rows: int) -> None:
    plan = plan_of(ALL_DTYPES, max(rows, 1))
    tensors = write(tmp_path, plan, batch_size=2, unreadable=[] if rows else [0])
    file = tmp_path / plan.shard_file(plan.shards[0])
    loaded = load_file(file)
    assert loaded.keys() == tensors.keys()
    assert all(same_bits(loaded[address], tensors[address]) for address in tensors)
    with safe_open(file, framework="pt") as opened:
        assert json.loads(opened.metadata()["keys"]) == [key_of(row) for row in range(rows)]
        assert all(same_bits(opened.get_slice(address)[:], tensors[address]) for address in tensors)
        checksums = json.loads(opened.metadata()["checksums"])
    assert checksums == {address: zlib.crc32(bits(tensor)) for address, tensor in tensors.items()}


@settings(max_examples=40, deadline=None)
@given(
    layers=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3).map(tuple)),
        min_size=1,
        max_size=4,
    ),
    data=st.data(),
    image_count=st.integers(1, 12),
    images_per_shard=st.integers(1, 8),
    batch_size=st.integers(1, 5),
    workers=st.sampled_from([0, 0, 0, 2]),
)
def test_any_layers_in_any_batches_with_any_images_unreadable_are_stored_as_they_were(
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
    layers: dict[str, tuple[str, tuple[int, ...]]],
    image_count: int,
    images_per_shard: int,
    batch_size: int,
    workers: int,
) -> None:
    specs = tuple(LayerSpec(name, shape, dtype) for name, (dtype, shape) in layers.items())
    plan = plan_of(specs, image_count, images_per_shard)
    unreadable = data.draw(st.sets(st.integers(0, image_count - 1)))
    # Longer than the keys, so that headers grow over the room that was left for them.
    reason = "cut" * data.draw(st.sampled_from([1, 2000]))
    path = tmp_path_factory.mktemp("run")
    values = write(path, plan, batch_size, unreadable, reason, workers)
    loaded = [load_file(path / plan.shard_file(shard)) for shard in plan.shards]
    for address, tensor in values.items():
        assert same_bits(torch.cat([shard[address] for shard in loaded]), tensor)
    # The checksums are those of the bytes; the plan tells of other images.
    assert {problem.file for problem in verify(path).problems} <= {"plan.json"}


def test_every_tensor_in_a_shard_begins_at_a_multiple_of_its_elements_size(tmp_path: Path) -> None:
    plan = plan_of(ALL_DTYPES, 3)
    write(tmp_path, plan, batch_size=2)
    file = (tmp_path / plan.shard_file(plan.shards[0])).read_bytes()
    header_bytes = int.from_bytes(file[:8], "little")
    width = dict(DTYPES.values())
    for name, entry in json.loads(file[8 : 8 + header_bytes]).items():
        if name != "__metadata__":
            assert (8 + header_bytes + entry["data_offsets"][0]) % width[entry["dtype"]] == 0


# --- large pieces --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unreadable", [(), (0,), (9, 10), (39,), range(8, 16)])
def test_pieces_that_go_to_the_disk_past_the_page_cache_are_stored_as_they_were(
    tmp_path: Path, unreadable: Collection[int]
) -> None:
    plan = plan_of(LARGE, 40, 23)
    values = write(tmp_path / "direct", plan, 8, unreadable, workers=3)
    write(tmp_path / "cached", plan, 8, unreadable, tuning=Tuning(move_bytes=100_000, direct=False))
    features = hookx.open(tmp_path / "direct")
    assert all(same_bits(features[address][:], tensor) for address, tensor in values.items())
    for shard in plan.shards:
        name = plan.shard_file(shard)
        assert (tmp_path / "direct" / name).read_bytes() == (tmp_path / "cached" / name).read_bytes()


def test_most_of_a_large_batch_is_not_in_the_page_cache_when_it_is_written(tmp_path: Path) -> None:
    with open(tmp_path / "empty", "xb") as empty:
        can_bypass = open_direct(tmp_path / "empty", empty.fileno()) is not None
    if not can_bypass:
        pytest.skip("this file system writes everything through the page cache")
    plan = plan_of((LayerSpec("conv1", (64, 1000), "float32"),), 80)  # 20 MB
    write(tmp_path / "run", plan, 20)
    assert share_in_page_cache(tmp_path / "run" / plan.shard_file(plan.shards[0])) < 0.1


def share_in_page_cache(file: Path) -> float:
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, mmap.MAP_PRIVATE) as mapped:
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        pages = ctypes.create_string_buffer(-(-len(mapped) // mmap.PAGESIZE))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), pages) == 0
    return sum(page & 1 for page in pages.raw) / len(pages.raw)


# --- memory --------------------------------------------------------------------------------------------------------


def test_a_run_of_many_batches_takes_the_memory_of_two_and_mixes_none_of_them_up(tmp_path: Path) -> None:
    plan = plan_of((LayerSpec("conv1", (1000,), "float32"),), 40, 6)
    places = set()
    with (
        RunDirectory(tmp_path, plan) as directory,
        ShardWriter(directory, plan.shards, 2, expected) as writer,
    ):
        for shard in plan.shards:
            written = []
            for positions in shard.batches(2):
                rows = writer.rows(positions, 2)["conv1"]
                places.add(rows.data_ptr() // 20_000)
                rows[:] = torch.tensor(positions)[:, None]
                written.append(writer.write(positions))
            writer.publish(expected(shard), written)
        writer.finish()
    assert len(places) <= 4  # Rows may begin in either of two such ranges.
    assert torch.equal(hookx.open(tmp_path)["conv1"][:][:, 0], torch.arange(40.0))


@pytest.mark.parametrize(("at_once", "batch_size", "in_memory"), [(1, 10, 2), (3, 10, 4), (1, 11, 1), (3, 11, 3)])
def test_activations_that_only_wait_for_the_disk_have_a_limit_of_memory(
    tmp_path: Path, at_once: int, batch_size: int, in_memory: int
) -> None:
    plan = plan_of(LARGE, 100)
    tuning = Tuning(spare_bytes=10 * plan.bytes_per_image)
    batches = list(plan.shards[0].batches(batch_size))
    with (
        RunDirectory(tmp_path, plan) as directory,
        ShardWriter(directory, plan.shards, batch_size, expected, filled_at_once=at_once, tuning=tuning) as writer,
        ThreadPoolExecutor() as pool,
    ):
        for positions in batches[:in_memory]:
            writer.rows(positions, len(positions))
        waiting = pool.submit(writer.rows, batches[in_memory], 1)
        time.sleep(0.05)
        assert not waiting.done()
        writer.write(batches[0]).result()
        waiting.result(timeout=10)


# --- processes -----------------------------------------------------------------------------------------------------


def test_a_batch_waits_until_it_is_known_how_many_rows_are_before_it(tmp_path: Path) -> None:
    plan = plan_of((LayerSpec("fc", (3,), "float32"),), 6)
    with (
        RunDirectory(tmp_path, plan) as directory,
        ShardWriter(directory, plan.shards, 2, expected) as writer,
    ):
        written = {}
        for start in (4, 2, 0):
            positions = range(start, start + 2)
            writer.rows(positions, 1 if start == 2 else 2)["fc"][:] = start
            written[start] = writer.write(positions)
            time.sleep(0.05)
            assert written[start].done() == (start == 0)
        assert [written[start].result().first_row for start in (0, 2, 4)] == [0, 2, 3]


def test_a_batch_is_written_once_a_gpu_has_filled_its_rows_and_not_before(tmp_path: Path) -> None:
    plan = plan_of((LayerSpec("fc", (3,), "float32"),), 2)
    is_filled = threading.Event()
    with (
        RunDirectory(tmp_path, plan) as directory,
        ShardWriter(directory, plan.shards, 2, expected) as writer,
    ):
        rows = writer.rows(range(2), 2)["fc"]
        rows[:] = float("nan")
        written = writer.write(range(2), lambda: assert_true(is_filled.wait(10)))
        time.sleep(0.05)
        assert not written.done()
        rows[:] = 5.0
        is_filled.set()
        writer.publish(expected(plan.shards[0]), [written])
        writer.finish()
    assert torch.equal(hookx.open(tmp_path)["fc"][:], torch.full((2, 3), 5.0))


def test_what_went_wrong_with_a_gpu_is_raised_where_the_next_batch_begins(tmp_path: Path) -> None:
    plan = plan_of((LayerSpec("fc", (3,), "float32"),), 4)
    with (
        RunDirectory(tmp_path, plan) as directory,
        ShardWriter(directory, plan.shards, 2, expected) as writer,
    ):
        writer.rows(range(2), 2)
        with pytest.raises(ZeroDivisionError):
            writer.write(range(2), lambda: assert_true(1 // 0)).result()
        with pytest.raises(ZeroDivisionError):
            writer.rows(range(2, 4), 2)


def assert_true(value: object) -> None:
    assert value


def test_what_was_known_of_a_batch_that_is_read_again_is_forgotten_with_all_behind_it(tmp_path: Path) -> None:
    plan = plan_of((LayerSpec("fc", (3,), "float32"),), 8, 6)
    with (
        RunDirectory(tmp_path, plan) as directory,
        ShardWriter(directory, plan.shards, 2, expected) as writer,
    ):

        def written(positions: range, rows: int) -> Future[Written]:
            writer.rows(positions, rows)["fc"][:] = 0.0
            return writer.write(positions)

        assert [written(range(start, start + 2), 2).result().first_row for start in (0, 2, 4)] == [0, 2, 4]
        writer.forget(range(2, 4))  # As after a crash of the process that had read it.
        last = written(range(4, 6), 2)
        time.sleep(0.05)
        assert not last.done()
        assert written(range(2, 4), 1).result().first_row == 2
        assert last.result().first_row == 3


@pytest.mark.parametrize("what", ["the batch before", "the file of its shard"])
def test_a_process_that_waits_for_another_ends_when_the_run_was_killed(tmp_path: Path, what: str) -> None:
    plan = plan_of((LayerSpec("fc", (3,), "float32"),), 8, 2)
    waits_for = range(1, 2) if what == "the batch before" else range(6, 7)
    ready = multiprocessing.get_context("fork").SimpleQueue()

    def run() -> None:
        with (
            RunDirectory(tmp_path, plan) as directory,
            ShardWriter(directory, plan.shards, 1, expected) as writer,
        ):

            def wait() -> None:
                ready.put(os.getpid())
                writer.rows(waits_for, 1)
                writer.write(waits_for).result()

            multiprocessing.get_context("fork").Process(target=wait).start()
            time.sleep(60)

    run_process = multiprocessing.get_context("fork").Process(target=run)
    run_process.start()
    waiting = Path(f"/proc/{ready.get()}/stat")
    time.sleep(0.1)
    assert waiting.read_text().split()[2] != "Z"
    run_process.kill()
    run_process.join()
    deadline = time.monotonic() + 10
    while waiting.exists() and waiting.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "it waits forever"
        time.sleep(0.01)


def test_a_process_of_a_killed_run_writes_nothing_into_the_file_of_the_run_after_it(tmp_path: Path) -> None:
    plan = plan_of((LayerSpec("fc", (3,), "float32"),), 4, 1)
    go_on, ready = multiprocessing.get_context("fork").Event(), multiprocessing.get_context("fork").SimpleQueue()

    def run() -> None:
        with (
            RunDirectory(tmp_path, plan) as directory,
            ShardWriter(directory, plan.shards, 1, expected) as writer,
        ):

            def write_late() -> None:
                directory.release()
                ready.put(os.getpid())
                writer.rows(range(1), 1)["fc"][:] = 13
                go_on.wait()
                writer.write(range(1)).result()

            multiprocessing.get_context("fork").Process(target=write_late).start()
            time.sleep(60)

    with forked(run):
        late = Path(f"/proc/{ready.get()}/stat")
    with RunDirectory(tmp_path, plan) as directory, ShardWriter(directory, plan.shards, 1, expected):
        go_on.set()
        wait_for(lambda: not late.exists() or late.read_text().split()[2] == "Z")
        assert [file.stat().st_size for file in tmp_path.glob(".shard-*")] == [0, 0]


# --- whole or absent -----------------------------------------------------------------------------------------------


def fill(writer: ShardWriter, shard: Shard) -> list[Future[Written]]:
    """Write a shard of whatever memory holds, in one batch."""
    positions = range(shard.start, shard.stop)
    writer.rows(positions, len(shard))
    return [writer.write(positions)]


@pytest.mark.parametrize("layer", [LayerSpec("conv1", (64, 1024), "float32"), LayerSpec("conv1", (512, 1024), "int8")])
def test_a_disk_that_takes_no_more_leaves_no_shard_and_the_error_says_so(tmp_path: Path, layer: LayerSpec) -> None:
    plan = plan_of((layer,), 8, 4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (
        RunDirectory(tmp_path, plan) as directory,
        ShardWriter(directory, plan.shards, 4, expected) as writer,
    ):
        writer.publish(expected(plan.shards[0]), fill(writer, plan.shards[0]))
        writer.finish()
        # The limit is what stops the second, not something else.
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            writer.publish(expected(plan.shards[1]), fill(writer, plan.shards[1]))
            with pytest.raises(StoreError, match=r"cannot write .*shard-00001-of-00002.safetensors: File too large"):
                writer.finish()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        # Whoever would go on is told, and does not wait forever.
        with pytest.raises(StoreError, match="File too large"):
            writer.rows(range(4, 8), 4)
    names = [plan.shard_file(plan.shards[0]), "plan.json"]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(names)


def test_a_shard_handed_over_before_an_error_is_still_written_and_one_that_was_not_is_absent(tmp_path: Path) -> None:
    plan = plan_of(MAPS, 6, 3)
    first, second = plan.shards
    with pytest.raises(ZeroDivisionError), RunDirectory(tmp_path, plan) as directory:
        with ShardWriter(directory, plan.shards, 3, expected) as writer:
            writer.publish(expected(first), fill(writer, first))
            fill(writer, second)
            _ = 1 // 0
    assert finished_shards(tmp_path, plan) == [Shard(0, 0, 3)]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["plan.json", plan.shard_file(first)]


def test_an_interruption_at_any_moment_leaves_nothing_half_written(tmp_path: Path) -> None:
    class Interruption(BaseException):
        pass

    def interrupt(*_: object) -> None:
        raise Interruption

    plan = plan_of(MAPS, 60, images_per_shard=1)
    before, interrupted = signal.signal(signal.SIGALRM, interrupt), 0
    try:
        for moment in range(300):
            with RunDirectory(tmp_path, plan) as directory, contextlib.suppress(Interruption):
                writer = ShardWriter(directory, plan.shards, 1, expected, processes=30)
                interrupted += 1
                signal.setitimer(signal.ITIMER_REAL, 1e-6 + moment * 1e-5)
                with writer:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                interrupted -= 1
            assert sorted(file.name for file in tmp_path.iterdir()) == ["plan.json"]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 30


def test_a_file_that_cannot_be_made_leaves_no_other(tmp_path: Path) -> None:
    plan = plan_of(MAPS, 8, images_per_shard=4)
    with RunDirectory(tmp_path, plan) as directory:
        aside = directory.aside_of(plan.shards[1])
        aside.mkdir()
        with (
            pytest.raises(StoreError, match="cannot write"),
            ShardWriter(directory, plan.shards, 2, expected),
        ):
            pass
    assert {file.name for file in tmp_path.iterdir()} == {"plan.json", aside.name}


def test_a_process_killed_between_two_batches_leaves_no_shard_and_the_next_run_begins_it_anew(tmp_path: Path) -> None:
    plan = plan_of(MAPS, 4)

    def write_half() -> None:
        with (
            RunDirectory(tmp_path, plan) as directory,
            ShardWriter(directory, plan.shards, 2, expected) as writer,
        ):
            writer.rows(range(2), 2)
            writer.write(range(2)).result()
            (tmp_path / "half").touch()
            time.sleep(60)

    with forked(write_half):
        wait_for((tmp_path / "half").exists)
    assert list(tmp_path.glob(".shard-*")) and finished_shards(tmp_path, plan) == []
    values = write(tmp_path, plan, 2)
    assert not list(tmp_path.glob(".*"))
    features = hookx.open(tmp_path)
    assert all(same_bits(features[address][:], tensor) for address, tensor in values.items())


@pytest.fixture
def interrupted_writes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Have the system write some 1,000 bytes at a time, as it may."""
    lengths: list[int] = []
    write_all: Callable[[int, memoryview, int], int] = os.pwrite

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        lengths.append(write_all(descriptor, data[:1000], offset))
        return lengths[-1]

    monkeypatch.setattr(os, "pwrite", pwrite)
    yield lengths


def test_what_the_system_writes_in_parts_is_written_to_the_end(tmp_path: Path, interrupted_writes: list[int]) -> None:
    plan = plan_of((LayerSpec("conv1", (999,), "float32"),), 4)
    values = write(tmp_path, plan, 2, tuning=Tuning(direct=False))
    assert len(interrupted_writes) > 16
    assert same_bits(hookx.open(tmp_path)["conv1"][:], values["conv1"])


def test_checksums_computed_beside_the_writing_are_those_of_the_bytes(tmp_path: Path) -> None:
    plan = plan_of((LayerSpec("maps", (64, 64, 64), "float32"), LayerSpec("fc", (7,), "float64")), 6)
    values = random_rows(plan, 6)
    with (
        RunDirectory(tmp_path, plan) as directory,
        ShardWriter(directory, plan.shards, 2, expected, filled_at_once=3) as writer,
    ):
        written = []
        for start in (0, 2, 4):  # All three are filled before the first is written, as beside a GPU.
            for address, rows in writer.rows(range(start, start + 2), 2).items():
                rows[:] = values[address][start : start + 2]
        for start in (0, 2, 4):
            written.append(writer.write(range(start, start + 2)))
        writer.publish(expected(plan.shards[0]), written)
        writer.finish()
    assert not [problem for problem in verify(tmp_path).problems if problem.file.startswith("shard-")]
    assert all(same_bits(hookx.open(tmp_path)[address][:], rows) for address, rows in values.items())
