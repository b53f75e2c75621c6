"""Whoever removes, cuts or replaces what a run is writing gets an error within seconds, and a run that resumes."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hookx.check.verify import verify
from hookx.errors import StoreError
from hookx.plan import LayerSpec
from hookx.store.directory import RunDirectory, finished_shards
from hookx.store.record import ShardRecord
from hookx.store.writer import ShardWriter
from kit import warm
from kit.runs import plan_of
from kit.writing import expected

PLAN = plan_of((LayerSpec("conv1", (1000,), "float32"),), 12, 6)
SECONDS = 10


def remove(aside: Path) -> None:
    aside.unlink()


def replace_by_another(aside: Path) -> None:
    aside.unlink()
    aside.write_bytes(b"of somebody else")


def remove_folder(aside: Path) -> None:
    shutil.rmtree(aside.parent)


def rename_folder(aside: Path) -> None:
    aside.parent.rename(aside.parent.with_name("elsewhere"))


def replace_folder(aside: Path) -> None:
    rename_folder(aside)
    aside.parent.mkdir()


def cut(aside: Path) -> None:
    os.truncate(aside, 0)


Disturb = Callable[[Path], None]
REMOVALS = [remove, replace_by_another, remove_folder, rename_folder, replace_folder]


@pytest.mark.parametrize("disturb", REMOVALS)
def test_a_process_that_waits_for_the_batch_before_ends_when_its_file_is_gone(tmp_path: Path, disturb: Disturb) -> None:
    with (
        pytest.raises(StoreError, match=r"while hookx was writing it\n.*\n.*run the same command again to resume"),
        RunDirectory(tmp_path / "run", PLAN) as directory,
        ShardWriter(directory, PLAN.shards, 2, expected) as writer,
    ):
        writer.rows(range(2, 4), 2)
        waiting = writer.write(range(2, 4))
        time.sleep(0.05)
        disturb(directory.aside_of(PLAN.shards[0]))
        waiting.result(timeout=SECONDS)


@pytest.mark.parametrize("disturb", REMOVALS)
def test_a_process_that_comes_to_a_shard_whose_file_is_gone_does_not_wait_for_it(
    tmp_path: Path, disturb: Disturb
) -> None:
    with (
        pytest.raises(StoreError, match=r"(was removed|was replaced|cannot write)"),
        RunDirectory(tmp_path / "run", PLAN) as directory,
        ShardWriter(directory, PLAN.shards, 6, expected) as writer,
    ):
        disturb(directory.aside_of(PLAN.shards[1]))
        writer.rows(range(6, 12), 6)
        written = writer.write(range(6, 12))
        written.result(timeout=SECONDS)
        writer.rows(range(6), 6)  # What was replaced before anybody opened it shows when it is published.
        writer.publish(expected(PLAN.shards[0]), [writer.write(range(6))])
        writer.publish(expected(PLAN.shards[1]), [written])
        writer.finish()


@pytest.mark.parametrize("unreadable", [0, 2])
@pytest.mark.parametrize("disturb", [*REMOVALS, cut])
@pytest.mark.parametrize("when", ["in between", "at the end"])
def test_what_was_disturbed_is_never_published(tmp_path: Path, disturb: Disturb, when: str, unreadable: int) -> None:
    first = PLAN.shards[0]
    with (
        pytest.raises(StoreError, match=r"(was removed|was replaced|was cut short|cannot write)"),
        RunDirectory(tmp_path / "run", PLAN) as directory,
        ShardWriter(directory, PLAN.shards, 2, expected) as writer,
    ):
        written = []
        for positions in first.batches(2):
            if when == "in between" and positions.start == 4:
                disturb(directory.aside_of(first))
            count = 2 - (unreadable if positions.start == 0 else 0)
            writer.rows(positions, count)["conv1"][:] = 1.5
            written.append(writer.write(positions))
            written[-1].result(timeout=SECONDS)
        if when == "at the end":
            disturb(directory.aside_of(first))
        record = ShardRecord([f"{row:04}" for row in range(unreadable, 6)], [("0", "cut"), ("1", "cut")][:unreadable])
        writer.publish(record, written)
        writer.finish()
    assert not list(tmp_path.glob("*/shard-*"))


def test_a_file_that_was_cut_and_grew_again_behind_the_back_of_its_writer_is_not_published(tmp_path: Path) -> None:
    first = PLAN.shards[0]
    with (
        pytest.raises(StoreError, match="was cut short while hookx was writing it"),
        RunDirectory(tmp_path, PLAN) as directory,
        ShardWriter(directory, PLAN.shards, 6, expected) as writer,
    ):
        writer.rows(range(6), 6)["conv1"][:] = 1.5
        written = writer.write(range(6))
        written.result(timeout=SECONDS)
        size_bytes = directory.aside_of(first).stat().st_size
        os.truncate(directory.aside_of(first), 0)
        os.truncate(directory.aside_of(first), size_bytes)  # As the write of another process would leave it.
        writer.publish(expected(first), [written])
        writer.finish()
    assert not list(tmp_path.glob("shard-*"))


def test_an_error_of_the_publisher_reaches_the_run_before_its_next_shard_is_finished(tmp_path: Path) -> None:
    with (
        pytest.raises(StoreError, match="was removed"),
        RunDirectory(tmp_path, PLAN) as directory,
        ShardWriter(directory, PLAN.shards, 6, expected) as writer,
    ):
        writer.rows(range(6), 6)
        written = writer.write(range(6))
        written.result(timeout=SECONDS)
        directory.aside_of(PLAN.shards[0]).unlink()
        writer.publish(expected(PLAN.shards[0]), [written])
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            writer.check()
    assert finished_shards(tmp_path, PLAN) == []


@pytest.mark.parametrize("disturb", [remove, cut, rename_folder])
def test_a_command_whose_files_vanish_ends_within_seconds_and_the_same_command_resumes(
    thumbnails: Path, tmp_path: Path, disturb: Disturb
) -> None:
    command = [
        *warm.python("torch"),
        "-m",
        "hookx",
        "extract",
        "-m",
        "resnet18",
        "-w",
        "none",
        "-l",
        "layer1",
        "-j",
        "2",
    ]
    command += ["--shard-images", "2", "-b", "1", "--self-check", "off", "--crop", "64", "--resize", "64", "-o"]
    out = tmp_path / "run"
    run = subprocess.Popen([*command, str(out), str(thumbnails)], stderr=subprocess.PIPE, text=True)
    killer = threading.Timer(60, run.kill)
    killer.start()
    disturbed = 0.0
    while run.poll() is None:
        asides = sorted(out.glob(".shard*.aside"))
        with contextlib.suppress(FileNotFoundError):  # It has been published in between.
            if asides and asides[0].stat().st_size and not disturbed:
                disturb(asides[0])
                disturbed = time.monotonic()
        time.sleep(0.0005)
    killer.cancel()
    assert run.stderr is not None
    with run.stderr:
        said = run.stderr.read()
    assert disturbed and time.monotonic() - disturbed < SECONDS
    if run.returncode == 0:  # What was cut had been written on, and checked, or the aside was a link to a whole shard.
        pytest.skip("the disturbance came too late")
    assert (run.returncode, "Traceback" in said) == (1, False), said
    assert "error: " in said and "again" in said
    if disturb is rename_folder:
        (tmp_path / "elsewhere").rename(out)
    again = subprocess.run([*command, str(out), str(thumbnails)], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert verify(out).is_whole
    assert not list(out.glob(".*"))
