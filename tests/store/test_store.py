"""The output directory: shards are ordinary safetensors files, whole or absent, of one run and one writer at a time."""

from __future__ import annotations

import itertools
import os
import pickle
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import hookx
from hookx.errors import StoreError
from hookx.plan import LayerSpec, Plan
from hookx.store.directory import RunDirectory, finished_shards
from hookx.store.files import made_whole, write_whole
from hookx.store.record import ShardRecord, read_record
from kit.runs import MAPS, forked, plan_of, random_rows, same_bits, wait_for, write_run
from kit.shards import publish

# --- the format ----------------------------------------------------------------------------------------------------


def test_a_file_name_that_is_not_utf_8_keeps_its_bytes_in_the_shard_and_in_the_index(tmp_path: Path) -> None:
    key = os.fsdecode(b"caf\xe9, \xff.png")
    plan = plan_of((LayerSpec("fc", (), "uint8"),), 1)
    with RunDirectory(tmp_path, plan) as directory:
        publish(directory, plan.shards[0], random_rows(plan, 1), ShardRecord([key]))
        directory.publish_index()
    assert hookx.open(tmp_path).keys_of_rows == [key]
    assert b'"caf\xe9, \xff.png",' in (tmp_path / "index.csv").read_bytes()


# --- whole or absent -----------------------------------------------------------------------------------------------


def test_a_writer_that_fails_half_way_leaves_no_file(tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"half of it"
        assert [file.name for file in tmp_path.iterdir()] != ["shard"]
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        write_whole(tmp_path / "shard", chunks())
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_replaced_stays_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "index.csv"
    file.write_text("before")
    with pytest.raises(ZeroDivisionError):
        write_whole(file, (bytes([1 // count]) for count in (1, 0)))
    assert file.read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_and_what_was_made_beside_it_appear_together_or_not_at_all(tmp_path: Path) -> None:
    def make(aside: Path) -> None:
        aside.mkdir()
        (aside / "chunk").write_bytes(b"0")
        aside.with_name("keys.csv").write_bytes(b"key")

    with pytest.raises(ZeroDivisionError), made_whole(tmp_path / "export.zarr") as aside:
        make(aside)
        _ = 1 // 0
    assert list(tmp_path.iterdir()) == []
    with made_whole(tmp_path / "export.zarr") as aside:
        make(aside)
        assert not (tmp_path / "export.zarr").exists()
        with pytest.raises(StoreError, match=r"another hookx process is writing .*export.zarr\n  wait for it"):
            made_whole(tmp_path / "export.zarr").__enter__()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export.zarr", "keys.csv"]
    assert (tmp_path / "export.zarr" / "chunk").read_bytes() == b"0"
    with pytest.raises(StoreError, match="already exists"), made_whole(tmp_path / "export.zarr") as aside:
        make(aside)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export.zarr", "keys.csv"]


def test_a_folder_that_a_killed_process_left_aside_is_made_anew(tmp_path: Path) -> None:
    def make_forever() -> None:
        with made_whole(tmp_path / "export.npy") as aside:
            aside.write_bytes(b"half of it")
            signal.pause()

    with forked(make_forever):
        wait_for(lambda: any(tmp_path.glob(".export.npy.*.aside/export.npy")))
    with made_whole(tmp_path / "export.npy") as aside:
        assert not aside.exists()
        aside.write_bytes(b"all of it")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"export.npy": b"all of it"}


def test_a_process_killed_while_it_writes_leaves_no_shard_and_the_next_run_removes_its_leavings(tmp_path: Path) -> None:
    plan = plan_of(MAPS, 1)
    shard = tmp_path / plan.shard_file(plan.shards[0])

    def write_forever() -> None:
        write_whole(shard, itertools.repeat(bytes(1000)))

    with forked(write_forever):
        wait_for(lambda: any(file.stat().st_size > 0 for file in tmp_path.glob(".*")))
    assert not shard.exists() and list(tmp_path.glob(".*"))
    with RunDirectory(tmp_path, plan):
        assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


# --- one run, one process ------------------------------------------------------------------------------------------


def test_a_directory_takes_one_writer_at_a_time(tmp_path: Path) -> None:
    plan = plan_of(MAPS, 1)
    with RunDirectory(tmp_path, plan):
        with pytest.raises(StoreError, match=f"another hookx process is writing to {tmp_path}"):
            RunDirectory(tmp_path, plan).__enter__()
        with pytest.raises(StoreError, match="another hookx process"):  # The failed attempt did not open the lock.
            RunDirectory(tmp_path, plan).__enter__()
    with RunDirectory(tmp_path, plan):
        pass


def test_a_killed_writer_does_not_keep_the_directory_locked(tmp_path: Path) -> None:
    plan = plan_of(MAPS, 1)

    def hold() -> None:
        with RunDirectory(tmp_path, plan):
            (tmp_path / "held").touch()
            signal.pause()

    with forked(hold) as holder:
        wait_for((tmp_path / "held").exists)
        with pytest.raises(StoreError, match="another hookx process"):
            RunDirectory(tmp_path, plan).__enter__()
        os.kill(holder, signal.SIGKILL)
        wait_for(lambda: os.waitid(os.P_PID, holder, os.WEXITED | os.WNOWAIT | os.WNOHANG))
        with RunDirectory(tmp_path, plan):
            pass


def test_a_forked_worker_lets_go_of_the_lock_and_a_spawned_one_never_had_it(tmp_path: Path) -> None:
    plan = plan_of(MAPS, 1)
    with RunDirectory(tmp_path, plan) as directory:
        pickle.loads(pickle.dumps(directory)).release()
        with pytest.raises(StoreError, match="another hookx process"):
            RunDirectory(tmp_path, plan).__enter__()

        def worker() -> None:
            directory.release()
            (tmp_path / "released").touch()
            signal.pause()

        with forked(worker):
            wait_for((tmp_path / "released").exists)
            directory.release()  # What the kernel does when the parent is killed.
            with RunDirectory(tmp_path, plan):
                pass


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": MAPS[:1]}, r"layers differ \(there: layer1, avgpool; asked: layer1\)"),
        ({"layers": (MAPS[0], replace(MAPS[1], dtype="float32"))}, r"avgpool \[5\] bfloat16; .*avgpool \[5\] float32"),
        ({"precision": "bf16"}, r"precision.* differ \(there: fp32; asked: bf16\)"),
        ({"images_sha256": "1" * 64}, r"images .*differ \(there: 0000"),
        ({"model": "net2", "weights": "x"}, r"model.* differ \(there: net; asked: net2\); weights differ"),
    ],
)
def test_a_directory_of_another_run_is_refused_and_the_error_says_what_differs(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    plan = plan_of(MAPS, 10, 3)
    with RunDirectory(tmp_path, plan):
        pass
    before = (tmp_path / "plan.json").read_bytes()
    with pytest.raises(StoreError, match=f"holds another run: .*{said}.*; choose another --out"):
        RunDirectory(tmp_path, replace(plan, **change)).__enter__()  # type: ignore[arg-type]
    assert (tmp_path / "plan.json").read_bytes() == before
    with RunDirectory(tmp_path, replace(plan, batch_size=64)):  # decides nothing but rounding
        pass


def test_shards_without_a_plan_are_nobodys_and_are_refused(tmp_path: Path) -> None:
    plan = plan_of(MAPS, 10, 3)
    write_run(tmp_path, plan)
    (tmp_path / "plan.json").unlink()
    with pytest.raises(StoreError, match=r"holds shards without a plan.json"):
        RunDirectory(tmp_path, plan).__enter__()


def test_an_altered_plan_is_refused(tmp_path: Path) -> None:
    plan = plan_of(MAPS, 10, 3)
    write_run(tmp_path, plan)
    text = (tmp_path / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(text.replace('"fp32"', '"bf16"'))
    with pytest.raises(StoreError, match="altered"):
        hookx.open(tmp_path)


def test_a_path_that_cannot_be_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match=str(path)):
            RunDirectory(path, plan_of(MAPS, 1)).__enter__()


# --- damaged shards ------------------------------------------------------------------------------------------------


@pytest.fixture
def run_of_ten(tmp_path: Path) -> tuple[Path, Plan, dict[str, Tensor]]:
    plan = plan_of(MAPS, 10, 3)
    path = tmp_path / "features"
    return path, plan, write_run(path, plan)


Run = tuple[Path, Plan, dict[str, Tensor]]


def test_a_truncated_or_prolonged_shard_is_refused_and_named(run_of_ten: Run) -> None:
    path, plan, _ = run_of_ten
    file = path / plan.shard_file(plan.shards[1])
    whole = file.read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(StoreError, match=f"{file} is damaged"):
            finished_shards(path, plan)
    file.write_bytes(whole + b"\0")
    with pytest.raises(StoreError, match=f"{file} is damaged"):
        hookx.open(path)


def test_a_renamed_or_foreign_shard_is_refused_and_named(run_of_ten: Run, tmp_path: Path) -> None:
    path, plan, _ = run_of_ten
    first, second = (path / plan.shard_file(shard) for shard in plan.shards[:2])
    other = replace(plan, precision="bf16")
    write_run(tmp_path / "other", other)
    whole = second.read_bytes()
    for foreign in (first.read_bytes(), (tmp_path / "other" / second.name).read_bytes()):
        second.write_bytes(foreign)
        with pytest.raises(
            StoreError, match=f"{second} (belongs to another run|is shard 0 of this run, and was renamed)"
        ):
            hookx.open(path)
    save_file({"layer1": torch.zeros(3, 2, 3)}, second)
    with pytest.raises(StoreError, match=f"{second} belongs to another run"):
        hookx.open(path)
    second.write_bytes(whole)
    hookx.open(path)


def test_no_flipped_bit_in_a_header_changes_an_activation_or_escapes_as_another_error(tmp_path: Path) -> None:
    plan = plan_of(MAPS, 3)
    written = write_run(tmp_path, plan)
    shard = plan.shards[0]
    file = tmp_path / plan.shard_file(shard)
    whole = file.read_bytes()
    header_bytes = int.from_bytes(whole[:8], "little")
    tensors_begin = whole.index(b'"layer1":{"dtype"')
    refused = 0
    for position in range(8 + header_bytes):
        bit = 1 << position % 8
        file.write_bytes(whole[:position] + bytes([whole[position] ^ bit]) + whole[position + 1 :])
        try:
            read_record(tmp_path, plan, shard)
        except StoreError as error:
            refused += 1
            assert str(file) in str(error)
            continue
        assert 8 <= position < tensors_begin  # in a key, or in what a shard tells of its making
        activations = hookx.open(tmp_path)
        assert all(same_bits(activations[address][:], written[address]) for address in written)
    assert refused > 0.7 * header_bytes


def test_a_shard_that_does_not_account_for_its_images_is_refused(tmp_path: Path) -> None:
    plan = plan_of(MAPS, 3)
    with RunDirectory(tmp_path, plan) as directory:
        publish(directory, plan.shards[0], random_rows(plan, 2), ShardRecord(["00", "01"]))
    with pytest.raises(StoreError, match="does not account for 3 images"):
        finished_shards(tmp_path, plan)
