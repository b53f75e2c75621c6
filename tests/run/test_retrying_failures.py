"""`hookx extract --retry-failures` computes the failed images of a run again, and replaces their shards whole."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import hookx
from hookx import extract
from hookx.check.verify import verify
from hookx.cli.app import app
from hookx.errors import ImageError, StoreError
from hookx.run.prepare import prepare
from hookx.run.run import run
from hookx.run.summary import Summary
from kit.faults import Fault, Faults
from kit.files import contents
from kit.processes import environment_for
from kit.runs import MAPS, plan_of
from kit.writing import write

SETTINGS: dict[str, Any] = {"weights": "none", "shard_images": 4, "batch_size": 2, "workers": 0, "resize": 64}
SETTINGS |= {"crop": 64, "self_check": 2}
BROKEN = (1, 2, 13)  # positions in the list: in the first and the last of its shards


def store(images: Path, out: Path, **options: Any) -> Summary:
    return extract("resnet18", "conv1,avgpool", images, out=out, **SETTINGS | options)


@pytest.fixture(scope="module")
def good(thumbnails: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 14 readable images."""
    folder = tmp_path_factory.mktemp("good")
    for number, picture in enumerate(sorted(thumbnails.rglob("*.png"))[:14]):
        shutil.copy(picture, folder / f"{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def undisturbed(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "features"
    store(good, out)
    return out


def break_images(good: Path, folder: Path, *, same_size: bool) -> Path:
    """Copy a folder, and break some of its images; return the copy."""
    shutil.copytree(good, folder)
    for position in BROKEN:
        file = folder / f"{position:02}.png"
        file.write_bytes(b"x" * (file.stat().st_size if same_size else 100 + position))
    return folder


def mend(good: Path, folder: Path, positions: tuple[int, ...] = BROKEN) -> None:
    for position in positions:
        shutil.copy(good / f"{position:02}.png", folder)


def test_images_that_can_be_read_again_make_the_bytes_of_an_undisturbed_run(
    good: Path, undisturbed: Path, tmp_path: Path
) -> None:
    images, out = break_images(good, tmp_path / "images", same_size=True), tmp_path / "features"
    assert store(images, out).failures == 3
    before = {file.name: file.stat().st_ino for file in out.glob("*.safetensors")}
    mend(good, images)
    assert store(images, out).failures == 3  # The same command keeps what is finished.
    opened = hookx.open(out)
    of_before = next(opened["conv1"].shards())[0]
    copy_of_before = of_before.clone()
    summary = store(images, out, retry_failures=True)
    assert (summary.failures, summary.shards_computed, summary.images_computed) == (0, 2, 6)
    assert contents(out) == contents(undisturbed)
    replaced = {file.name for file in out.glob("*.safetensors") if file.stat().st_ino != before[file.name]}
    assert replaced == {"shard-00000-of-00004.safetensors", "shard-00003-of-00004.safetensors"}
    assert torch.equal(of_before, copy_of_before)  # A reader of the old shard keeps it.
    with pytest.raises(StoreError, match="has changed since the run was opened\n  open it again"):
        opened["avgpool"][0]


def test_images_that_were_mended_and_have_another_size_belong_to_the_same_run(
    good: Path, undisturbed: Path, tmp_path: Path
) -> None:
    images, out = break_images(good, tmp_path / "images", same_size=False), tmp_path / "features"
    assert store(images, out).failures == 3
    (out / "shard-00001-of-00004.safetensors").unlink()  # Also a run that is not finished.
    mend(good, images, BROKEN[:2])
    summary = store(images, out, retry_failures=True)
    assert (summary.failures, summary.shards_computed) == (1, 3)
    assert (out / "failures.csv").read_text().splitlines()[1].startswith("13.png,")
    mend(good, images)
    assert store(images, out).failures == 1
    summary = store(images, out, retry_failures=True)
    assert (summary.failures, summary.shards_computed) == (0, 1)
    # The plan names the sizes with which the run was begun; nothing else differs.
    mine, others = hookx.open(out), hookx.open(undisturbed)
    assert mine.keys_of_rows == others.keys_of_rows
    assert all(torch.equal(mine[address][:], others[address][:]) for address in others)
    assert contents(out)["index.csv"] == contents(undisturbed)["index.csv"]
    assert verify(out).is_whole
    assert hookx.recompute(out, 14, images).problems == ()
    assert store(images, out).shards_computed == 0
    (images / "01.png").write_bytes((good / "05.png").read_bytes() + b"0")
    with pytest.raises(StoreError, match=r"holds another run: images \(names or sizes\) differ"):
        store(images, out)


def test_a_change_of_an_image_that_was_read_is_another_run_also_beside_failures(good: Path, tmp_path: Path) -> None:
    images, out = break_images(good, tmp_path / "images", same_size=False), tmp_path / "features"
    store(images, out)
    mend(good, images)
    (images / "05.png").write_bytes((good / "05.png").read_bytes() + b"0")
    with pytest.raises(StoreError, match="holds another run: images"):
        store(images, out, retry_failures=True)


def test_a_shard_is_not_replaced_by_one_that_lacks_an_image_which_it_holds(good: Path, tmp_path: Path) -> None:
    images, out = break_images(good, tmp_path / "images", same_size=True), tmp_path / "features"
    store(images, out)
    before = contents(out)
    mend(good, images)
    file = images / "03.png"
    file.write_bytes(b"x" * file.stat().st_size)
    with pytest.raises(ImageError, match=r"cannot read '03.png' now, which .*shard-00000-of-00004.safetensors holds"):
        store(images, out, retry_failures=True)
    assert {name: contents(out)[name] for name in before} == before
    shutil.copy(good / "03.png", images)
    assert store(images, out, retry_failures=True).failures == 0


def test_the_command_says_how_it_ended(good: Path, tmp_path: Path) -> None:
    images, out = break_images(good, tmp_path / "images", same_size=False), tmp_path / "features"
    command = ["extract", "-m", "resnet18", "-w", "none", "-l", "avgpool", "-o", str(out), "--shard-images", "4"]
    command += ["-j", "0", "--self-check", "off", "--resize", "64", "--crop", "64", str(images)]

    def exits(*more: str) -> tuple[int, str]:
        ended = CliRunner().invoke(app, [*command, *more])
        return ended.exit_code, ended.stderr

    assert exits()[0] == 3
    code, said = exits()
    assert (code, "to try the images again that could not be read: --retry-failures" in said) == (3, True)
    assert exits("--retry-failures")[0] == 3
    mend(good, images)
    assert exits("--retry-failures")[0] == 0
    code, said = exits("--retry-failures")
    assert (code, "there are no failures to try again" in said) == (0, True)


def test_a_job_says_before_it_runs_which_shards_it_replaces(good: Path, tmp_path: Path) -> None:
    images, out = break_images(good, tmp_path / "images", same_size=True), tmp_path / "features"
    store(images, out)
    job = prepare("resnet18", "conv1,avgpool", images, out=out, retry_failures=True, **SETTINGS)
    assert [shard.number for shard in job.pending] == [0, 3] == sorted(job.replaced)
    before = contents(out)
    assert run(job).failures == 3  # They are still broken.
    assert contents(out) == before


# --- kills ---------------------------------------------------------------------------------------------------------

PLAN = plan_of(MAPS, 12, 3)
UNREADABLE = (4, 5, 11)
REPLACED = (1, 3)
CALLS = ("open", "write", "fsync", "ftruncate", "rename", "link", "unlink", "fstat", "stat")

# Forks a process for every folder, which retries, and may be killed on the way.
SCRIPT = """
import json, multiprocessing, sys
from pathlib import Path
from kit.writing import write
from test_retrying_failures import PLAN, REPLACED
fork = multiprocessing.get_context("fork")
for folder in map(Path, sys.argv[1:]):
    retry = fork.Process(target=write, args=(folder, PLAN, 2), kwargs={"replaced": REPLACED})
    retry.start()
    retry.join()
    print(json.dumps([folder.name, retry.exitcode]), flush=True)
"""


def retry_under(faults: Mapping[str, Fault], folder: Path) -> dict[str, int]:
    """Retry in each of these folders, with their faults; return the exit codes."""
    all_faults = Faults(*faults.values())
    environment = environment_for(__file__, all_faults.environment)
    command = [sys.executable, "-c", SCRIPT, *(str(folder / name) for name in faults)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return dict(map(json.loads, ended.stdout.splitlines()))


def test_a_kill_at_any_moment_leaves_the_old_shard_or_the_new_one_and_the_next_run_ends_in_the_same_bytes(
    tmp_path: Path,
) -> None:
    write(tmp_path / "old", PLAN, 2, UNREADABLE)
    write(tmp_path / "new", PLAN, 2)
    old, new = contents(tmp_path / "old"), contents(tmp_path / "new")

    faults = {
        f"{call}-{number}": Fault(call, "SIGKILL", number, number, f"{call}-{number}/")
        for call in CALLS
        for number in (1, 2, 3, 5, 8, 13)
    }
    for name in faults:
        shutil.copytree(tmp_path / "old", tmp_path / name)
    codes = retry_under(faults, tmp_path)
    assert list(codes.values()).count(-9) > 20 and set(codes.values()) <= {-9, 0}
    for name in faults:
        there = contents(tmp_path / name)
        for shard in (shard for shard in new if shard.startswith("shard")):
            assert there[shard] in (old[shard], new[shard]), (name, shard)
        write(tmp_path / name, PLAN, 2, replaced=REPLACED)
        assert contents(tmp_path / name) == new, name


def test_the_same_command_mends_the_tables_if_it_was_killed_before_them(
    good: Path, undisturbed: Path, tmp_path: Path
) -> None:
    images, out = break_images(good, tmp_path / "images", same_size=True), tmp_path / "features"
    store(images, out)
    mend(good, images)
    code = "import sys; from test_retrying_failures import store; store(*sys.argv[1:], retry_failures=True)"
    faults = Faults(Fault("rename", "SIGKILL", path="index.csv"))
    environment = environment_for(__file__, faults.environment)
    ended = subprocess.run([sys.executable, "-c", code, str(images), str(out)], env=environment, capture_output=True)
    assert ended.returncode == -9
    assert "index.csv" in {problem.file for problem in verify(out).problems}
    said = CliRunner().invoke(app, ["verify", str(out)]).stdout
    assert "the same hookx extract command writes the tables again" in said
    store(images, out)
    assert contents(out) == contents(undisturbed)
