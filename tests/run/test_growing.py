"""Runs grow: what another run holds is copied, only the rest is computed, and a run grows in place or not at all."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import hookx
from hookx.errors import OtherRunError, StoreError, UsageError
from hookx.read.features import Features
from hookx.run.lane import Lane
from hookx.store.swap import take_place
from kit.files import contents
from kit.runs import same_bits

SMALL: dict[str, Any] = {"weights": "none", "resize": 32, "crop": 32, "workers": 0, "batch_size": 4, "shard_images": 7}
LAYERS = "conv1,avgpool"


def subset(folder: Path, thumbnails: Path, numbers: Sequence[int]) -> Path:
    """Make a folder of some of the 24 images."""
    files = sorted(thumbnails.rglob("*.png"))
    for number in numbers:
        target = folder / files[number].relative_to(thumbnails)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(files[number], target)
    return folder


def extract(folder: Path, out: Path, layers: str = LAYERS, **settings: Any) -> hookx.Summary:
    return hookx.extract("resnet18", layers, folder, out=out, **{**SMALL, **settings})


def agrees(one: Features, other: Features) -> bool:
    """Whether two runs hold the same rows; what was computed in other batches may differ by rounding."""
    assert list(one.keys_of_rows) == list(other.keys_of_rows) and list(one) == list(other)
    return all(torch.allclose(one[address].torch(), other[address].torch(), atol=1e-5) for address in one)


class Passes:
    """Counts the images that models see."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images, self.layers = 0, set[str]()
        run = Lane._run_in_parts

        def counted(lane: Lane, pixels: torch.Tensor, rows: Mapping[str, torch.Tensor]) -> list[range]:
            self.images += len(pixels)
            self.layers |= set(rows)
            return run(lane, pixels, rows)

        monkeypatch.setattr(Lane, "_run_in_parts", counted)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_another_run_has_are_copied_bit_for_bit(workers: int, thumbnails: Path, tmp_path: Path) -> None:
    old = subset(tmp_path / "some", thumbnails, [*range(0, 24, 2), 5, 7])
    extract(old, tmp_path / "old")
    grown = extract(thumbnails, tmp_path / "new", reuse=[tmp_path / "old"], workers=workers)
    extract(thumbnails, tmp_path / "plain")
    new, plain, source = (hookx.open(tmp_path / name) for name in ("new", "plain", "old"))
    assert grown.reused == 2 * 14 and new.plan.fingerprint == plain.plan.fingerprint and agrees(new, plain)
    for key in source.keys_of_rows:
        assert all(same_bits(new[address].of(key), source[address].of(key)) for address in source)
    assert not hookx.verify(tmp_path / "new").problems


def test_a_photograph_more_costs_a_photograph(
    thumbnails: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(subset(tmp_path / "some", thumbnails, range(1, 24)), tmp_path / "old")
    passes = Passes(monkeypatch)
    extract(thumbnails, tmp_path / "new", reuse=[tmp_path / "old"])
    assert passes.images == 1


def test_a_layer_more_costs_the_pass_up_to_that_layer(
    thumbnails: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(thumbnails, tmp_path / "old")
    passes = Passes(monkeypatch)
    grown = extract(thumbnails, tmp_path / "new", "conv1,avgpool,layer1.0@mean23", reuse=[tmp_path / "old"])
    assert passes.layers == {"layer1.0@mean23"} and passes.images == 24 and grown.reused == 48
    extract(thumbnails, tmp_path / "plain", "conv1,avgpool,layer1.0@mean23")
    new, plain, old = (hookx.open(tmp_path / name) for name in ("new", "plain", "old"))
    assert agrees(new, plain) and all(same_bits(new[address].torch(), old[address].torch()) for address in old)


@pytest.mark.parametrize("seed", range(4))
def test_any_mixture_of_runs_gives_what_one_run_gives(seed: int, thumbnails: Path, tmp_path: Path) -> None:
    chance = random.Random(seed)
    kinds, paths = ["conv1", "avgpool", "layer2@mean23", "maxpool"], []
    for number in range(3):
        folder = subset(tmp_path / f"f{number}", thumbnails, sorted(chance.sample(range(24), 14)))
        layers = ",".join(chance.sample(kinds, 2))
        extract(folder, tmp_path / f"r{number}", layers, shard_images=chance.choice([3, 5, 24]))
        paths.append(tmp_path / f"r{number}")
    extract(thumbnails, tmp_path / "new", ",".join(kinds), reuse=paths, batch_size=chance.choice([1, 5, 24]))
    extract(thumbnails, tmp_path / "plain", ",".join(kinds))
    assert agrees(hookx.open(tmp_path / "new"), hookx.open(tmp_path / "plain"))
    assert not hookx.verify(tmp_path / "new").problems


def test_images_that_changed_or_failed_are_computed(mixed_folder: Path, tmp_path: Path, thumbnails: Path) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(mixed_folder, folder, symlinks=True)
    extract(folder, tmp_path / "old")
    pictures = sorted(thumbnails.rglob("*.png"))
    shutil.copy(pictures[9], folder / "d.png")  # another size
    shutil.copy(pictures[11], folder / "c-empty.png")  # could not be read
    grown = extract(folder, tmp_path / "new", reuse=[tmp_path / "old"])
    extract(folder, tmp_path / "plain")
    assert grown.reused == 2 * 4 and grown.images == 6 and grown.failures == 3
    assert agrees(hookx.open(tmp_path / "new"), hookx.open(tmp_path / "plain"))


def test_what_is_remarkable_in_copied_values_is_counted(tmp_path: Path, thumbnails: Path) -> None:
    extract(thumbnails, tmp_path / "old", "layer1@max123,avgpool", dtype="fp16")
    plain = extract(thumbnails, tmp_path / "plain", "avgpool,layer4@mean123,layer1@max123", dtype="fp16")
    grown = extract(
        thumbnails, tmp_path / "new", "avgpool,layer4@mean123,layer1@max123", reuse=[tmp_path / "old"], dtype="fp16"
    )
    assert grown.counts == plain.counts


def test_runs_of_another_kind_and_damaged_ones_are_not_reused(thumbnails: Path, tmp_path: Path) -> None:
    extract(thumbnails, tmp_path / "old", resize=40)
    with pytest.raises(UsageError, match="holds rows of another kind: preprocessing"):
        extract(thumbnails, tmp_path / "new", reuse=[tmp_path / "old"])
    with pytest.raises(StoreError, match="holds no run"):
        extract(thumbnails, tmp_path / "new", reuse=[tmp_path])
    extract(thumbnails, tmp_path / "sound")
    shard = sorted((tmp_path / "sound").glob("shard*"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(StoreError, match="does not match the checksum taken when it was written"):
        extract(thumbnails, tmp_path / "new", "conv1,avgpool,bn1", reuse=[tmp_path / "sound"])


def test_a_killed_run_that_reuses_another_goes_on(thumbnails: Path, tmp_path: Path) -> None:
    extract(subset(tmp_path / "some", thumbnails, range(0, 24, 3)), tmp_path / "old")
    for part in ("0/2", "1/2"):
        extract(thumbnails, tmp_path / "new", reuse=[tmp_path / "old"], shard=part)
    extract(thumbnails, tmp_path / "whole", reuse=[tmp_path / "old"])
    assert contents(tmp_path / "new") == contents(tmp_path / "whole")


# --- in place --------------------------------------------------------------------------------------------------------


def test_a_run_grows_in_place_and_keeps_what_else_is_there(thumbnails: Path, tmp_path: Path) -> None:
    out, folder = tmp_path / "run", subset(tmp_path / "photos", thumbnails, range(0, 24, 2))
    extract(folder, out, append=True)  # There is none yet.
    before = hookx.open(out)
    rows = {key: before["avgpool"].of(key) for key in before.keys_of_rows}
    (out / "notes.txt").write_text("mine")
    subset(folder, thumbnails, range(24))
    grown = extract(folder, out, "conv1,avgpool,maxpool", append=True)
    assert grown.out == str(out) and grown.reused == 24 and (out / "notes.txt").read_text() == "mine"
    after = hookx.open(out)
    assert all(same_bits(after["avgpool"].of(key), row) for key, row in rows.items())
    extract(folder, tmp_path / "plain", "conv1,avgpool,maxpool")
    assert agrees(after, hookx.open(tmp_path / "plain")) and not hookx.verify(out).problems
    again = extract(folder, out, "conv1,avgpool,maxpool", append=True)
    assert again.shards_computed == 0 and sorted(os.listdir(tmp_path)) == ["photos", "plain", "run"]


def test_nothing_is_lost_by_growing(thumbnails: Path, tmp_path: Path) -> None:
    out, folder = tmp_path / "run", subset(tmp_path / "photos", thumbnails, range(12))
    extract(folder, out, label="parent")
    there = contents(out)
    subset(folder, thumbnails, range(20))
    with pytest.raises(UsageError, match=r"would lose columns of .*: label"):
        extract(folder, out, append=True)
    with pytest.raises(UsageError, match=r"would lose layers of .*: avgpool\n  name them as well: --layers conv1,avg"):
        extract(folder, out, "conv1", append=True, label="parent")
    next(folder.rglob("*.png")).unlink()
    with pytest.raises(UsageError, match=r"only adds images, and of those in .*/ 1 image is gone: "):
        extract(folder, out, append=True, label="parent")
    with pytest.raises(UsageError, match="holds rows of another kind"):
        extract(folder, out, append=True, label="parent", resize=40)
    with pytest.raises(UsageError, match="leave out --shard"):
        extract(folder, out, append=True, shard="0/2")
    with pytest.raises(UsageError, match="an object store cannot replace a run in one step"):
        hookx.extract("resnet18", LAYERS, folder, out="s3://bucket/run", append=True, **SMALL)
    assert contents(out) == there and sorted(os.listdir(tmp_path)) == ["photos", "run"]


def test_another_run_is_told_what_is_new_and_what_to_do(thumbnails: Path, tmp_path: Path) -> None:
    folder = subset(tmp_path / "photos", thumbnails, range(12))
    extract(folder, tmp_path / "run")
    subset(folder, thumbnails, range(17))
    with pytest.raises(
        OtherRunError, match=r"5 images are new: .*\n  to add what is new, .* the same command with --app"
    ):
        extract(folder, tmp_path / "run")
    gone = sorted(folder.rglob("*.png"))[3]
    gone.unlink()
    changed = sorted(folder.rglob("*.png"))[0]
    changed.write_bytes(changed.read_bytes() + b"x")
    with pytest.raises(OtherRunError) as caught:
        extract(folder, tmp_path / "run")
    key, other = (str(file.relative_to(folder)) for file in (gone, changed))
    for line in (
        "\n  5 images are new: ",
        f"\n  1 image is gone: {key}\n",
        f"\n  1 image has another size: {other}\n",
        f"--reuse {tmp_path}/run/ with another --out",
    ):
        assert line in str(caught.value)
    assert "--append" not in str(caught.value)  # It would lose an image.
    with pytest.raises(OtherRunError) as caught:
        extract(folder, tmp_path / "run", resize=40)
    assert "--reuse" not in str(caught.value)


_APPEND = """
import sys
import hookx
hookx.extract("resnet18", "conv1,avgpool,layer1@mean23", sys.argv[1], out=sys.argv[2], append=True, **{settings})
"""


@pytest.mark.parametrize("seed", range(3))
def test_kills_while_a_run_grows_lose_nothing(seed: int, thumbnails: Path, tmp_path: Path) -> None:
    out, chance = tmp_path / "run", random.Random(seed)
    extract(subset(tmp_path / "photos", thumbnails, range(9)), out)
    subset(tmp_path / "photos", thumbnails, range(24))
    program = _APPEND.format(settings=json.dumps({**SMALL, "shard_images": 2}))
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", program, tmp_path / "photos", out], stderr=subprocess.DEVNULL)
        until = time.monotonic() + 60
        beside = tmp_path / "run.append"
        wanted = chance.randrange(1, 8)
        while process.poll() is None and time.monotonic() < until:
            if len(list(beside.glob("shard*"))) >= wanted:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(hookx.open(out).keys_of_rows) in (9, 24)  # One or the other, and whole.
    subprocess.run([sys.executable, "-c", program, tmp_path / "photos", out], check=True, stderr=subprocess.DEVNULL)
    assert len(hookx.open(out).keys_of_rows) == 24 and not hookx.verify(out).problems
    assert sorted(os.listdir(tmp_path)) == ["photos", "run"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_every_step_of_the_swap_can_be_the_last(
    can_exchange: bool, thumbnails: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hookx.store import swap

    extract(subset(tmp_path / "photos", thumbnails, range(4)), tmp_path / "short")
    (tmp_path / "short" / "notes.txt").write_text("mine")
    extract(subset(tmp_path / "photos", thumbnails, range(6)), tmp_path / "long")
    if not can_exchange:
        monkeypatch.setattr(swap, "_exchange", lambda one, other: False)

    class KilledError(BaseException):
        pass

    done = False
    for last in range(20):
        if done:
            break
        place = tmp_path / f"{last}"
        place.mkdir()
        shutil.copytree(tmp_path / "short", place / "run")
        shutil.copytree(tmp_path / "long", place / "run.append")
        steps = 0

        def killed_at(name: str, call: Any, last: int = last) -> Any:
            def step(*arguments: Any, **how: Any) -> Any:
                nonlocal steps
                steps += 1
                if steps > last:
                    raise KilledError(name)
                return call(*arguments, **how)

            return step

        with monkeypatch.context() as patch:
            for of, name in ((os, "rename"), (os, "unlink"), (shutil, "rmtree"), (swap, "_exchange"), (swap, "flush")):
                patch.setattr(of, name, killed_at(name, getattr(of, name)))
            try:
                take_place(place / "run.append", place / "run")
                done = True
            except KilledError:
                pass
        extract(tmp_path / "photos", place / "run", append=True)
        assert len(hookx.open(place / "run").keys_of_rows) == 6 and sorted(os.listdir(place)) == ["run"]
        assert (place / "run" / "notes.txt").read_text() == "mine"
    assert done
