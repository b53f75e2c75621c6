"""The run's check of itself: a row that depends on more than its image ends the run, and publishes nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, load_file
from torch import Tensor, nn
from typer.testing import CliRunner

import hookx
from hookx.check.inspect import inspect
from hookx.check.verify import verify
from hookx.cli.app import app
from hookx.errors import CaptureError
from hookx.launch.extract import extract
from hookx.run.prepare import prepare
from hookx.run.run import run as run_job
from hookx.run.selfcheck import choose_batches
from hookx.store.directory import read_plan
from hookx.store.record import read_record
from kit import ROOT
from kit.deceivers import PASSES
from kit.runs import MAPS, plan_of, wait_for

NETS = ROOT / "tests" / "kit" / "deceivers.py"
SMALL: dict[str, Any] = {"weights": "none", "resize": 48, "crop": 48, "workers": 0, "batch_size": 12}


@pytest.fixture(autouse=True)
def no_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PASSES, "0")


def run(name: str, layers: str, folder: Path | list[Path], out: Path, **options: Any) -> hookx.Summary:
    return extract(f"{NETS}:{name}", layers, folder, out=out, **{**SMALL, **options})


def shards_in(out: Path) -> list[str]:
    return sorted(file.name for file in out.glob("*shard-*"))


def has_shards(out: Path, count: int) -> bool:
    return len(list(out.glob("shard-*"))) >= count


def rows_in(file: Path) -> Tensor:
    return load_file(file)["trap"]


def self_checked_of(out: Path) -> list[int | None]:
    plan = read_plan(out)
    return [read_record(out, plan, shard).self_checked for shard in plan.shards]


def files_of(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.iterdir()}


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Crowded", {}),
        ("Numerous", {}),
        ("Bright", {}),
        ("Late", {"batch_size": 1}),
        ("Late", {"batch_size": 1, "self_check": 1}),
        ("Drawn", {}),
        ("Experts", {}),
        ("Masks", {}),
        ("Crowded", {"self_check": 1}),
        ("Crowded", {"dtype": "fp16"}),
        ("Numerous", {"dtype": "fp64"}),
        ("Crowded", {"layers": "trap/in"}),
        ("Crowded", {"layers": "trap@mean23"}),
        ("Crowded", {"layers": "conv,trap,pool"}),
    ],
    ids=str,
)
def test_a_row_that_depends_on_more_than_its_image_ends_the_run_before_its_shard(
    thumbnails: Path, tmp_path: Path, name: str, options: dict[str, Any], workers: int
) -> None:
    layers = options.get("layers", "trap")
    options = {key: value for key, value in options.items() if key != "layers"}
    with pytest.raises(CaptureError) as caught:
        run(name, layers, thumbnails, tmp_path / "out", workers=workers, **options)
    reason = "what ran before it" if name in ("Late", "Drawn") else "the other images of its batch"
    named = layers.split(",")[1] if "," in layers else layers
    assert str(caught.value).startswith(f"'{named}' of '")
    key = str(caught.value).split("'")[3]
    assert (thumbnails / key).is_file()
    assert f"' depends on {reason}" in str(caught.value) and " of the largest (rounding: " in str(caught.value)
    assert "--self-check off" in str(caught.value)
    assert ("--batch-size 1" in str(caught.value)) == (reason != "what ran before it")
    assert shards_in(tmp_path / "out") == []


def test_the_error_says_which_layer_which_image_by_how_much_and_what_to_do(thumbnails: Path, tmp_path: Path) -> None:
    with pytest.raises(CaptureError) as caught:
        run("Crowded", "conv,trap,pool", thumbnails, tmp_path / "out")
    problem, *steps = str(caught.value).splitlines()
    assert problem.startswith("'trap' of 'sky/hubble-2.png' depends")
    assert " on the other images of its batch, and so does 1 more: computed again beside 1 other, " in problem
    assert " of 288 values move by up to " in problem and problem.endswith(" of the largest (rounding: 1e-05)")
    assert steps == [
        "  batches of one image have no others: --batch-size 1",
        "  or name earlier layers; --self-check off stores such rows all the same",
    ]
    run("Crowded", "conv", thumbnails, tmp_path / "earlier")
    run("Crowded", "conv,trap,pool", thumbnails, tmp_path / "out", batch_size=1)
    run("Crowded", "conv,trap,pool", thumbnails, tmp_path / "off", self_check="off")


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_before_the_one_that_is_wrong_are_kept(thumbnails: Path, tmp_path: Path, workers: int) -> None:
    said = r"^'trap' of '.*' depends on (.*\n)+  shards .* may hold such rows, too: choose another --out$"
    with pytest.raises(CaptureError, match=said):
        run("Bright", "trap", thumbnails, tmp_path, workers=workers, batch_size=3, shard_images=3, self_check=8)
    shards = shards_in(tmp_path)
    assert 0 < len(shards) < 8
    assert shards == [f"shard-{number:05}-of-00008.safetensors" for number in range(len(shards))]
    honest = tmp_path / "honest"
    run("Bright", "trap", thumbnails, honest, batch_size=1, shard_images=3)
    for name in shards:
        assert torch.allclose(rows_in(tmp_path / name), rows_in(honest / name))


def test_a_model_that_cannot_compute_an_image_alone_is_refused(thumbnails: Path, tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"^the model fails on an image alone: ValueError: expected more than 1"):
        run("NeedsTwo", "trap", thumbnails, tmp_path, batch_size=5)
    assert shards_in(tmp_path) == []


# --- what is not ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16, 24, 100])
@pytest.mark.parametrize("name", ["Honest", "WritesToItsInput"])
def test_an_honest_model_passes_in_batches_of_any_size(
    thumbnails: Path, tmp_path: Path, name: str, batch_size: int
) -> None:
    summary = run(name, "conv,trap,pool/in,.", thumbnails, tmp_path, batch_size=batch_size, self_check=100)
    assert summary.images == 24 and summary.batch_size == min(batch_size, 24)
    # The last and the brightest of every batch, and one more of the first.
    checked = sum(min(2, batch_size, 24 - start) for start in range(0, 24, batch_size))
    assert summary.self_checked == checked + (batch_size > 2)


@pytest.mark.parametrize("name", ["RoundsMore", "Mask", "Signs", "Amplifies"])
@pytest.mark.parametrize("batch_size", [1, 4, 24])
def test_what_rounding_decides_is_no_dependence(thumbnails: Path, tmp_path: Path, name: str, batch_size: int) -> None:
    summary = run(name, "trap", thumbnails, tmp_path, batch_size=batch_size, self_check=100)
    assert summary.images == 24


def test_nan_and_infinity_are_no_dependence(thumbnails: Path, tmp_path: Path) -> None:
    summary = run("NotFinite", "trap,trap@mean23", thumbnails, tmp_path, batch_size=5, self_check=100, dtype="fp16")
    assert summary.counts["trap"]["non_finite"] == 24


def test_a_batch_that_ran_in_parts_is_checked_in_no_larger_ones(
    thumbnails: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"batch_size": 8, "self_check": 100}
    whole = run("Honest", "trap", thumbnails, tmp_path / "whole", **options)
    sizes: list[int] = []
    forward = nn.Conv2d.forward

    def limited(self: nn.Conv2d, x: Tensor) -> Tensor:
        sizes.append(len(x))
        if len(x) > 2 and not x.is_meta and is_running:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, x)

    monkeypatch.setattr(nn.Conv2d, "forward", limited)
    halved, is_running = tmp_path / "halved", False
    job = prepare(f"{NETS}:Honest", "trap", thumbnails, out=halved, **{**SMALL, **options})
    sizes, is_running = [], True
    summary = run_job(job)
    first = sizes.index(8)
    assert "going on with 2" in caplog.text and sizes[first : first + 3] == [8, 4, 2]
    assert set(sizes[:first]) <= {1} and set(sizes[first + 2 :]) == {1, 2}
    assert whole.batch_size == 8 and summary.batch_size == 2
    assert whole.self_checked == summary.self_checked == 7
    is_running = False
    job = prepare(f"{NETS}:Bright", "trap", thumbnails, out=tmp_path / "refused", **{**SMALL, **options})
    is_running = True
    with pytest.raises(CaptureError, match=r"^'trap' of '.*' depends on the other images of its batch"):
        run_job(job)


# --- what is checked -----------------------------------------------------------------------------------------------


@given(
    images=st.integers(1, 5000), in_shard=st.integers(1, 600), batch_size=st.integers(1, 70), asked=st.integers(1, 40)
)
def test_the_batches_to_check_begin_with_the_first_and_follow_at_equal_distances(
    images: int, in_shard: int, batch_size: int, asked: int
) -> None:
    plan = plan_of(MAPS, images, in_shard)
    plan = replace(plan, batch_size=batch_size)
    starts = [positions.start for shard in plan.shards for positions in shard.batches(batch_size)]
    chosen = sorted(choose_batches(plan, asked))
    assert len(chosen) == min(asked, len(starts)) and chosen[0] == 0
    numbers = [starts.index(start) for start in chosen]
    distances = {after - before for before, after in pairwise([*numbers, len(starts)])}
    assert max(distances) - min(distances) <= 1
    assert choose_batches(plan, "off") == frozenset()


@given(st.integers(1, 10_000_000))
def test_by_default_less_than_a_hundredth_of_a_run_of_1000_images_is_computed_again(images: int) -> None:
    plan = replace(plan_of(MAPS, images, 4096), batch_size=16)
    checks = len(choose_batches(plan, "auto"))
    assert checks >= min(2, -(-images // 16))
    assert images < 1000 or 3 * checks + 1 < images / 100


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_passed_over_and_batches_of_one_are_checked(
    mixed_folder: Path, tmp_path: Path, workers: int
) -> None:
    options: dict[str, Any] = {"batch_size": 2, "shard_images": 4, "self_check": 100}
    summary = run("Honest", "trap", mixed_folder, tmp_path / str(workers), workers=workers, **options)
    # What can be read of a,b | c,d || e,f | g,h || i.
    assert self_checked_of(tmp_path / str(workers)) == [2, 2, 1]
    assert (summary.images, summary.failures, summary.self_checked) == (5, 4, 5)
    with pytest.raises(CaptureError, match=r"^'trap' of '.*' depends on the other images of its batch"):
        run("Pairs", "trap", mixed_folder, tmp_path / "pairs", workers=workers, **options)


def test_a_batch_without_a_readable_image_has_nothing_to_check(mixed_folder: Path, tmp_path: Path) -> None:
    unreadable = [mixed_folder / name for name in ("b-text.jpg", "c-empty.png")]
    summary = run("Honest", "trap", unreadable, tmp_path)
    assert (summary.images, summary.self_checked) == (0, 0)


# --- what a shard says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("self_check", ["auto", 3, "off"])
def test_whoever_computes_a_shard_its_bytes_are_the_same(
    thumbnails: Path, tmp_path: Path, self_check: int | str
) -> None:
    options: dict[str, Any] = {"batch_size": 3, "shard_images": 5, "self_check": self_check}
    run("Honest", "conv,trap", thumbnails, tmp_path / "0", **options)
    expected = files_of(tmp_path / "0")
    run("Honest", "conv,trap", thumbnails, tmp_path / "2", workers=2, **options)
    assert files_of(tmp_path / "2") == expected
    for lost in ([0], [1, 3], [4], [0, 1, 2, 3]):
        for number in lost:
            (tmp_path / "2" / f"shard-{number:05}-of-00005.safetensors").unlink()
        run("Honest", "conv,trap", thumbnails, tmp_path / "2", workers=len(lost) % 3, **options)
        assert files_of(tmp_path / "2") == expected


def test_a_run_that_was_killed_is_finished_to_the_same_bytes(thumbnails: Path, tmp_path: Path) -> None:
    options = {"batch_size": 2, "shard_images": 4, "self_check": 100}
    run("Honest", "conv,trap", thumbnails, tmp_path / "whole", **options)
    flags = ["-m", f"{NETS}:Honest", "-l", "conv,trap", "-o", str(tmp_path / "killed"), "-w", "none", "--resize", "48"]
    flags += ["--crop", "48", "-b", "2", "--shard-images", "4", "--self-check", "100", "-j", "2", str(thumbnails)]
    for count in (1, 3):
        process = subprocess.Popen([sys.executable, "-m", "hookx", "extract", "--quiet", *flags])
        wait_for(partial(has_shards, tmp_path / "killed", count), 60)
        process.send_signal(signal.SIGKILL)
        process.wait()
    run("Honest", "conv,trap", thumbnails, tmp_path / "killed", **options)
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_shards_from_before_the_self_check_are_read_kept_and_completed(thumbnails: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch_size": 4, "shard_images": 8}
    # What such a shard lacks is what one without self-check lacks.
    run("Honest", "trap", thumbnails, tmp_path, self_check="off", **options)
    file = tmp_path / "shard-00001-of-00003.safetensors"
    with safe_open(file, framework="pt") as opened:
        assert "self_checked" not in opened.metadata()
    before = files_of(tmp_path)
    assert inspect(tmp_path).self_checked is None and verify(tmp_path).is_whole
    (tmp_path / "shard-00002-of-00003.safetensors").unlink()
    resumed = run("Honest", "trap", thumbnails, tmp_path, **options)
    assert self_checked_of(tmp_path) == [None, None, 2] and resumed.self_checked == inspect(tmp_path).self_checked == 2
    assert verify(tmp_path).is_whole
    after = files_of(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"shard-00002-of-00003.safetensors"}
    assert torch.equal(rows_in(file), load(before[file.name])["trap"])


def test_the_self_check_is_no_part_of_the_plan(thumbnails: Path, tmp_path: Path) -> None:
    for self_check in ("auto", 1, "off"):
        run("Honest", "trap", thumbnails, tmp_path / str(self_check), self_check=self_check)
    plans = {(tmp_path / name / "plan.json").read_bytes() for name in ("auto", "1", "off")}
    assert len(plans) == 1


def test_the_summary_says_what_was_checked(thumbnails: Path, tmp_path: Path) -> None:
    flags = ["extract", "-m", f"{NETS}:Honest", "-l", "trap", "-w", "none", "--resize", "48", "--crop", "48", "-j", "0"]

    def call(*more: str) -> str:
        result = CliRunner().invoke(app, [*flags, *more, str(thumbnails)])
        assert result.exit_code == 0, result.stderr
        return result.stdout

    out = str(tmp_path / "features")
    assert "checked   5 rows computed again in other company: the same within rounding\n" in call("-b", "12", "-o", out)
    assert json.loads(call("-b", "12", "-o", out, "--json"))["self_checked"] == 5
    assert "checked   5 rows computed again" in CliRunner().invoke(app, ["inspect", out]).stdout
    off = ["--self-check", "off", "-o", str(tmp_path / "off")]
    assert "checked   no row was computed again: without --self-check\n" in call(*off)
    assert json.loads(call(*off, "--json"))["self_checked"] is None
    assert "checked" not in CliRunner().invoke(app, ["inspect", str(tmp_path / "off")]).stdout


# --- the batch size of the summary ---------------------------------------------------------------------------------


def test_the_summary_has_the_batch_size_that_ran(thumbnails: Path, tmp_path: Path) -> None:
    def batch_size_of(out: str, **options: Any) -> int:
        return run("Honest", "trap", thumbnails, tmp_path / out, **options).batch_size

    assert batch_size_of("chosen", batch_size="auto") == 4
    assert batch_size_of("larger", batch_size=4000) == 24
    assert batch_size_of("cut", batch_size=16, shard_images=7) == 7
    assert batch_size_of("cut", batch_size=3, shard_images=7) == 7  # Nothing ran.
    next((tmp_path / "cut").glob("shard-00003*")).unlink()
    assert batch_size_of("cut", batch_size=3, shard_images=7) == 3
