"""A run is whole, or everything that is wrong with it is found and named; and its rows are what the model returns."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torchvision.models import resnet18
from typer.testing import CliRunner

from hookx.check.recompute import recompute
from hookx.check.verify import Problem, verify
from hookx.cli.app import app
from hookx.errors import HookxError, StoreError, UsageError
from hookx.launch.extract import extract
from hookx.store.directory import RunDirectory, read_plan
from hookx.store.record import ShardRecord, read_record
from kit import ROOT
from kit.shards import publish

SHARDS = [f"shard-0000{number}-of-00003.safetensors" for number in range(3)]
Options = dict[str, Any]
SMALL: Options = {"resize": 32, "crop": 32, "shard_images": 3, "batch_size": 2, "workers": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def whole(mixed_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run over five pictures and four files that are none, in three shards."""
    out = tmp_path_factory.mktemp("whole") / "features"
    extract("resnet18", "conv1@mean23,fc", mixed_folder, out=out, weights="none", **SMALL)
    return out


@pytest.fixture(scope="module")
def other(mixed_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run over the same files with other weights."""
    out = tmp_path_factory.mktemp("other") / "features"
    extract("resnet18", "conv1@mean23,fc", mixed_folder, out=out, weights="none", seed=1, **SMALL)
    return out


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """Return a copy of the run, to be damaged."""
    shutil.copytree(whole, tmp_path / "features")
    return tmp_path / "features"


def problems_of(path: Path) -> dict[str, str]:
    return {problem.file: problem.what for problem in verify(path).problems}


def forge(path: Path, number: int, change: Callable[[dict[str, torch.Tensor], ShardRecord], None]) -> None:
    """Write a shard anew with something else in it, and with checksums that fit."""
    plan = read_plan(path)
    shard = plan.shards[number]
    record = read_record(path, plan, shard)
    tensors = load_file(path / SHARDS[number])
    tensors = {address: tensor.clone() for address, tensor in tensors.items()}
    change(tensors, record)
    with RunDirectory(path, plan) as directory:
        publish(directory, shard, tensors, record)
    (path / "shards.csv").unlink(missing_ok=True)  # Its sizes are those of the shards before.


# --- whole ---------------------------------------------------------------------------------------------------------


def test_a_whole_run_has_no_problem_and_is_counted(whole: Path) -> None:
    found = verify(whole)
    assert found.problems == found.notes == ()
    assert (found.shards, found.shards_whole, found.rows, found.failures) == (3, 3, 5, 4)
    assert found.bytes == 5 * 4 * (64 + 1000)


def test_the_command_prints_what_it_found_and_exits_with_0_or_1(run: Path) -> None:
    result = CliRunner().invoke(app, ["verify", str(run)])
    assert (result.exit_code, "is whole" in result.stdout) == (0, True)
    (run / SHARDS[1]).unlink()
    (run / "plan.json.bak").touch()
    result = CliRunner().invoke(app, ["verify", str(run)])
    assert result.exit_code == 1
    assert f"{SHARDS[1]} is missing\n" in result.stdout
    assert "note: plan.json.bak is not part of this run\n" in result.stdout
    document = json.loads(CliRunner().invoke(app, ["verify", str(run), "--json"]).stdout)
    assert (document["ok"], document["shards_whole"]) == (False, 2)
    assert document["problems"] == [{"file": SHARDS[1], "what": "is missing"}]


def test_what_is_not_a_directory_is_an_error_and_an_empty_one_has_no_plan(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no directory"):
        verify(tmp_path / "absent")
    assert "holds no run of hookx" in problems_of(tmp_path)["plan.json"]


def test_leavings_and_foreign_files_are_mentioned_and_are_no_error(run: Path) -> None:
    (run / f".{SHARDS[0]}.aside").write_bytes(b"half")
    (run / "notes.txt").touch()
    found = verify(run)
    assert found.is_whole
    assert [note.file for note in found.notes] == [f".{SHARDS[0]}.aside", "notes.txt"]


# --- damaged -------------------------------------------------------------------------------------------------------


def test_a_name_that_no_plan_has_is_found(run: Path) -> None:
    plan = run / "plan.json"
    plan.write_text(plan.read_text().replace('"notes"', '"ootes"'))
    assert "altered, or written by a later hookx: it holds 'ootes'" in problems_of(run)["plan.json"]


@given(st.data())
def test_one_flipped_bit_anywhere_is_found_and_its_file_is_named(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from([*SHARDS, "plan.json", "index.csv", "failures.csv"]))
    content = bytearray((whole / name).read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    # The batch size changes values by rounding only, and is not part of the fingerprint.
    if name == "plan.json" and content[position : position + 1].isdigit() and position > content.index(b'"chosen"'):
        return
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.mktemp("flipped") / "features"
    shutil.copytree(whole, path, copy_function=os.link)
    (path / name).unlink()
    (path / name).write_bytes(content)
    try:
        assert set(problems_of(path)) == {name}
    finally:
        shutil.rmtree(path)


def test_a_flipped_byte_in_the_data_names_the_layer(run: Path) -> None:
    content = bytearray((run / SHARDS[2]).read_bytes())
    content[-1] ^= 1
    (run / SHARDS[2]).write_bytes(content)
    assert re.fullmatch(r"is damaged: 'fc' does not match the checksum .*", problems_of(run)[SHARDS[2]])


def test_a_truncated_or_prolonged_shard_is_named(run: Path) -> None:
    content = (run / SHARDS[0]).read_bytes()
    for changed in (content[:-1], content[: len(content) // 2], content[:4], b"", content + b"\0"):
        (run / SHARDS[0]).write_bytes(changed)
        found = problems_of(run)
        assert set(found) == {SHARDS[0]} and found[SHARDS[0]].startswith("is damaged: ")


def test_swapped_shards_are_both_named_with_what_they_are(run: Path) -> None:
    (run / SHARDS[0]).rename(run / "aside")
    (run / SHARDS[1]).rename(run / SHARDS[0])
    (run / "aside").rename(run / SHARDS[1])
    assert problems_of(run) == {
        SHARDS[0]: "is shard 1 of this run, and was renamed",
        SHARDS[1]: "is shard 0 of this run, and was renamed",
    }


def test_a_renamed_shard_is_missing_where_it_belongs_and_named_where_it_is(run: Path) -> None:
    (run / SHARDS[1]).rename(run / "shard-00001.safetensors")
    assert problems_of(run) == {
        SHARDS[1]: "is missing",
        "shard-00001.safetensors": "is not one of the 3 shards of this plan",
    }
    (run / SHARDS[0]).rename(run / SHARDS[1])
    assert problems_of(run)[SHARDS[1]] == "is shard 0 of this run, and was renamed"


def test_missing_shards_are_named_from_the_first_to_the_last(run: Path) -> None:
    for name in SHARDS[1:]:
        (run / name).unlink()
    (run / "index.csv").unlink()
    found = verify(run)
    assert found.problems == (Problem(SHARDS[1], f"is missing, and so are all up to {SHARDS[2]} (2 shards)"),)
    assert (found.shards_whole, found.shards) == (1, 3)


def test_a_foreign_shard_is_named(run: Path, other: Path) -> None:
    shutil.copy(other / SHARDS[1], run / SHARDS[1])
    shutil.copy(other / SHARDS[2], run / "shard-00003-of-00004.safetensors")
    save_file({"fc": torch.zeros(3, 1000)}, run / SHARDS[2])
    assert problems_of(run) == {
        SHARDS[1]: "belongs to another run",
        SHARDS[2]: "belongs to another run",
        "shard-00003-of-00004.safetensors": "is not one of the 3 shards of this plan",
    }


def test_all_that_is_wrong_is_named_at_once(run: Path, other: Path) -> None:
    (run / SHARDS[0]).write_bytes((run / SHARDS[0]).read_bytes()[:-1])
    (run / SHARDS[1]).unlink()
    shutil.copy(other / SHARDS[2], run / SHARDS[2])
    assert set(problems_of(run)) == set(SHARDS)


@pytest.mark.parametrize("name", ["index.csv", "failures.csv"])
def test_a_table_that_does_not_say_what_the_shards_say_is_named_with_the_line(run: Path, name: str) -> None:
    lines = (run / name).read_text().splitlines(keepends=True)
    (run / name).write_text("".join([lines[0], lines[2], lines[1], *lines[3:]]))
    assert problems_of(run) == {name: f"differs from the shards in line 2, which should be: {lines[1].rstrip()}"}
    (run / name).write_text("".join(lines[:-1]))
    assert f"in line {len(lines)}" in problems_of(run)[name]
    (run / name).write_text("".join([*lines, "x"]))
    assert problems_of(run) == {name: f"continues after the {len(lines)} lines derived from the shards"}
    (run / name).unlink()
    assert problems_of(run) == {name: "is missing"}


def test_failures_that_no_shard_has_are_named(thumbnails: Path, tmp_path: Path) -> None:
    extract("resnet18", "fc", thumbnails / "sky", out=tmp_path, weights="none", **SMALL)
    assert verify(tmp_path).is_whole
    (tmp_path / "failures.csv").write_text("key,reason\n")
    assert problems_of(tmp_path) == {"failures.csv": "exists, but no shard has failures"}


def test_an_edited_plan_is_named(run: Path) -> None:
    text = (run / "plan.json").read_text()
    (run / "plan.json").write_text(text.replace('"image_count": 9', '"image_count": 8'))
    assert problems_of(run) == {"plan.json": "was altered: its fingerprint does not match its contents"}
    (run / "plan.json").unlink()
    assert "cannot read plan.json" in problems_of(run)["plan.json"]


def change_a_key(tensors: dict[str, torch.Tensor], record: ShardRecord) -> None:
    record.failures[0] = (record.failures[0][0] + "0", "OSError: cut")


def change_a_size(tensors: dict[str, torch.Tensor], record: ShardRecord) -> None:
    record.sizes_bytes[0] += 1


@pytest.mark.parametrize("change", [change_a_key, change_a_size])
def test_a_shard_with_other_images_than_the_plan_lists_is_found_though_its_checksums_fit(
    run: Path, change: Callable[[dict[str, torch.Tensor], ShardRecord], None]
) -> None:
    forge(run, 1, change)
    assert problems_of(run)["plan.json"] == "lists images (names or sizes) other than those in the shards"


def test_rows_and_failures_are_a_partition_of_the_list_in_its_order(run: Path, whole: Path) -> None:
    def repeat(tensors: dict[str, torch.Tensor], record: ShardRecord) -> None:
        record.failures[0] = (record.keys[0], "OSError: cut")

    def turn(tensors: dict[str, torch.Tensor], record: ShardRecord) -> None:
        record.failures.reverse()

    def begin_early(tensors: dict[str, torch.Tensor], record: ShardRecord) -> None:
        record.keys[0] = "a.png"

    def forget_sizes(tensors: dict[str, torch.Tensor], record: ShardRecord) -> None:
        record.sizes_bytes.pop()

    forge(run, 0, repeat)
    assert problems_of(run) == {SHARDS[0]: "holds the image 'a.png' twice"}
    shutil.copy(whole / SHARDS[0], run / SHARDS[0])
    forge(run, 0, turn)
    assert "does not hold its images in the order of their keys" in problems_of(run)[SHARDS[0]]
    forge(run, 2, begin_early)
    assert "does not come after" in problems_of(run)[SHARDS[2]]
    forge(run, 1, forget_sizes)
    assert problems_of(run)[SHARDS[1]] == "records the sizes of 2 images, but holds 3"


# --- true ----------------------------------------------------------------------------------------------------------


def test_rows_computed_again_have_the_same_bits_though_unreadable_images_were_in_their_batches(
    whole: Path, mixed_folder: Path
) -> None:
    again = recompute(whole, 100, mixed_folder)
    assert again.problems == ()
    assert [row.key for row in again.rows] == [f"{name}.png" for name in "adegi"]
    assert again.rows_with_same_bits == 5 and again.deviations == {"conv1@mean23": 0.0, "fc": 0.0}


def test_the_choice_of_rows_is_random_and_a_seed_repeats_it(whole: Path, mixed_folder: Path) -> None:
    choices = {
        seed: tuple(row.key for row in recompute(whole, 2, mixed_folder, seed=seed).rows) for seed in (1, 2, 3, 4)
    }
    assert all(len(set(keys)) == 2 for keys in choices.values()) and len(set(choices.values())) > 1
    assert tuple(row.key for row in recompute(whole, 2, mixed_folder, seed=1).rows) == choices[1]


def test_a_row_that_is_not_what_the_layer_returns_is_named_though_its_checksum_fits(
    run: Path, mixed_folder: Path
) -> None:
    def spoil(tensors: dict[str, torch.Tensor], record: ShardRecord) -> None:
        tensors["fc"][0, 7] += 0.01 * tensors["fc"][0].abs().max()

    forge(run, 1, spoil)
    assert verify(run).is_whole
    arguments = ["verify", str(run), "--recompute", "5", "--images", str(mixed_folder)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert re.search(
        rf"^{SHARDS[1]} row 0 \('d.png'\) is not what fc returns: it deviates by 1.0e-02 ", result.stdout, re.MULTILINE
    )
    document = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert document["ok"] is False and len(document["problems"]) == 1
    assert document["recomputed"]["rows_with_same_bits"] == 4


def test_rounding_is_not_a_problem_and_its_size_is_told(run: Path, mixed_folder: Path) -> None:
    def round_off(tensors: dict[str, torch.Tensor], record: ShardRecord) -> None:
        tensors["fc"] *= 1 + 1e-6

    forge(run, 0, round_off)
    again = recompute(run, 100, mixed_folder)
    assert again.problems == () and 1e-8 < again.deviations["fc"] < 1e-5
    assert again.rows_with_same_bits < 5


def test_nan_and_infinity_deviate_unless_they_are_in_both(run: Path, mixed_folder: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor], record: ShardRecord) -> None:
        tensors["fc"][0, 0] = float("nan")

    forge(run, 0, spoil)
    again = recompute(run, 100, mixed_folder)
    assert [problem.file for problem in again.problems] == [SHARDS[0]] and again.deviations["fc"] == float("inf")


def test_an_image_that_is_gone_or_changed_is_named(whole: Path, mixed_folder: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(mixed_folder, images, symlinks=True)
    (images / "d.png").unlink()
    (images / "i.png").write_bytes((images / "i.png").read_bytes() + b"\0")
    again = recompute(whole, 100, images)
    said = [problem.what for problem in again.problems]
    assert any("needs the image 'd.png', which is not in --images" in what for what in said)
    assert any("needs the image 'i.png': changed since it was listed" in what for what in said)
    assert "a.png" in [row.key for row in again.rows]


def test_weights_from_a_file_have_to_be_the_same_file(mixed_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "features"
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(resnet18().state_dict(), tmp_path / f"{seed}.pt")
    extract("resnet18", "fc", mixed_folder, out=out, weights=str(tmp_path / "0.pt"), dtype="bf16", **SMALL)
    with pytest.raises(UsageError, match=r"the weights of this run are a file \(sha256:"):
        recompute(out, 1, mixed_folder)
    with pytest.raises(StoreError, match="these are other weights"):
        recompute(out, 1, mixed_folder, weights=str(tmp_path / "1.pt"))
    again = recompute(out, 100, mixed_folder, weights=str(tmp_path / "0.pt"))
    assert again.problems == () and again.rows_with_same_bits == 5


def test_recompute_needs_images_and_rows_and_a_run(whole: Path, mixed_folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["verify", str(whole), "--recompute", "1"])
    assert isinstance(result.exception, UsageError) and "--images" in str(result.exception)
    with pytest.raises(UsageError, match="--recompute must be at least 1, got 0"):
        recompute(whole, 0, mixed_folder)
    with pytest.raises(HookxError, match="no such file or folder: "):
        recompute(whole, 1, tmp_path / "absent")


@pytest.mark.parametrize("model", ["python:os:system", "./model.pt", "hf:./folder"])
def test_a_plan_alone_cannot_have_a_model_built_that_may_run_code(run: Path, mixed_folder: Path, model: str) -> None:
    plan = replace(read_plan(run), model=model)
    out = run.parent / "crafted"
    with RunDirectory(out, plan) as directory:
        record = ShardRecord(["a.png"], [("b", ""), ("c", "")])
        publish(directory, plan.shards[0], {"conv1@mean23": torch.zeros(1, 64), "fc": torch.zeros(1, 1000)}, record)
    with pytest.raises(UsageError, match="building it may run code"):
        recompute(out, 1, mixed_folder)


def test_a_model_of_ones_own_is_computed_again_if_it_is_named_again(thumbnails: Path, tmp_path: Path) -> None:
    code = tmp_path / "net.py"
    code.write_text(
        "from torch import nn\n"
        "def tiny(width: int) -> nn.Module:\n"
        "    return nn.Sequential(nn.Conv2d(3, width, 3, stride=2), nn.ReLU(inplace=True))\n"
    )
    ref, arguments, out = f"{code}:tiny", {"width": "5"}, tmp_path / "own"
    extract(ref, "0", thumbnails, out=out, weights="none", crop=32, resize=32, model_args=arguments, workers=0)
    with pytest.raises(UsageError, match="building it may run code"):
        recompute(out, 3, thumbnails, model_args=arguments)
    again = recompute(out, 3, thumbnails, model=ref, model_args=arguments)
    assert again.problems == () and again.rows_with_same_bits == 3
    with pytest.raises(UsageError, match="and not 'resnet18'"):
        recompute(out, 3, thumbnails, model="resnet18", model_args=arguments)


NETS = ROOT / "tests" / "kit" / "deceivers.py"


@pytest.mark.parametrize("name", ["Crowded", "Numerous", "Bright", "Experts", "Masks"])
@pytest.mark.parametrize("count", [1, 3, 24])
def test_a_run_of_a_model_that_looks_at_the_whole_batch_is_not_called_whole(
    thumbnails: Path, tmp_path: Path, name: str, count: int
) -> None:
    out, ref = tmp_path / "features", f"{NETS}:{name}"
    options: Options = {"weights": "none", "resize": 48, "crop": 48, "workers": 0, "device": "cpu"}
    extract(ref, "conv,trap", thumbnails, out=out, batch_size=12, self_check="off", **options)
    again = recompute(out, count, thumbnails, model=ref, seed=2)
    assert again.rows_with_same_bits == len(again.rows) == count  # in its own batch
    named = [problem.what for problem in again.problems]
    assert all(
        re.match(r"row [\d,]+ \('\S+'\) is not that of its image: trap depends on the other", what) for what in named
    )
    assert len({what.split("'")[1] for what in named}) == len(named) >= 1
    if count == 24:
        flags = ["--recompute", "24", "--images", str(thumbnails), "--model", ref]
        result = CliRunner().invoke(app, ["verify", str(out), *flags])
        assert result.exit_code == 1 and "is whole" not in result.stdout


@pytest.mark.parametrize(
    ("name", "batch_size"), [("Honest", 5), ("Honest", 2), ("Mask", 4), ("Amplifies", 4), ("Crowded", 1)]
)
def test_rows_that_are_right_are_found_right_in_other_company(
    thumbnails: Path, tmp_path: Path, name: str, batch_size: int
) -> None:
    out, ref = tmp_path / "features", f"{NETS}:{name}"
    options: Options = {"weights": "none", "resize": 48, "crop": 48, "workers": 0, "device": "cpu"}
    extract(ref, "trap", thumbnails, out=out, batch_size=batch_size, **options)
    again = recompute(out, 24, thumbnails, model=ref)
    assert again.problems == () and again.rows_with_same_bits == 24


def test_a_model_that_no_longer_computes_an_image_alone_is_a_problem(thumbnails: Path, tmp_path: Path) -> None:
    out, ref = tmp_path / "features", f"{NETS}:NeedsTwo"
    options: Options = {"weights": "none", "resize": 48, "crop": 48, "workers": 0, "device": "cpu"}
    extract(ref, "trap", thumbnails, out=out, batch_size=4, self_check="off", **options)
    again = recompute(out, 3, thumbnails, model=ref)
    assert len(again.problems) == 3
    assert all("the model fails on an image alone: ValueError" in problem.what for problem in again.problems)


def test_shards_that_were_made_image_by_image_are_checked_so_whatever_their_plan_began_with(
    thumbnails: Path, tmp_path: Path
) -> None:
    code, out = tmp_path / "net.py", tmp_path / "features"
    code.write_text(
        "from torch import nn\n"
        "class Mixes(nn.Sequential):\n"
        "    def __init__(self):\n"
        "        super().__init__(nn.Conv2d(3, 4, 8, 8), nn.BatchNorm2d(4, track_running_stats=False))\n"
    )
    options: Options = {"weights": "none", "resize": 48, "crop": 48, "workers": 0, "device": "cpu"}
    extract(f"{code}:Mixes", "1", thumbnails, out=out, batch_size=1, **options)
    plan = out / "plan.json"
    plan.write_text(plan.read_text().replace('"batch_size": 1', '"batch_size": 12'))
    assert read_plan(out).batch_size == 12
    assert recompute(out, 3, thumbnails, model=f"{code}:Mixes").problems == ()
