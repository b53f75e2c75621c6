"""Runs whose keys stay in the shards are read as any other."""

from __future__ import annotations

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hookx
from hookx.check.verify import verify
from hookx.errors import NotStoredError, ShardError, StoreError
from hookx.exporting import export
from hookx.keys import images_sha256
from hookx.plan import LayerSpec, Plan
from hookx.read import features
from hookx.store import index
from hookx.store.directory import RunDirectory, read_plan
from hookx.store.index import publish_index, read_shard_table
from hookx.store.record import ShardRecord
from kit.runs import plan_of
from kit.shards import publish

KEYS = [f"{letter}/{number:02}.png" for letter in ("a", "\udcff", "ä", "=b") for number in range(8)]
KEYS = sorted(KEYS, key=lambda key: key.encode("utf-8", "surrogateescape"))
FAILED = {KEYS[3]: "it is empty", **dict.fromkeys(KEYS[8:12], "no image"), KEYS[-1]: 'has a "comma", too'}


@pytest.fixture
def run(tmp_path: Path, plan_of_maps: Plan) -> Path:
    """Return a run of eight shards of four images; one shard has no row at all."""
    plan, path = plan_of_maps, tmp_path / "run"
    with RunDirectory(path, plan) as directory:
        for shard in plan.shards:
            listed = KEYS[shard.start : shard.stop]
            rows = [key for key in listed if key not in FAILED]
            record = ShardRecord(rows, [(key, FAILED[key]) for key in listed if key in FAILED], sizes_bytes=[1] * 4)
            values = torch.full((len(rows), 2, 3), float(shard.number)) + torch.arange(len(rows)).view(-1, 1, 1) / 8
            publish(directory, shard, {"layer1": values}, record)
        directory.publish_index()
    return path


@pytest.fixture
def plan_of_maps() -> Plan:
    plan = plan_of((LayerSpec("layer1", (2, 3), "float32"),), len(KEYS), 4)
    return replace(plan, images_sha256=images_sha256(KEYS, [1] * len(KEYS)))


@pytest.fixture
def opened(run: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[hookx.Features, hookx.Features]:
    """Return the run with its keys in memory, and with its keys in its shards."""
    at_once = hookx.open(run)
    monkeypatch.setattr(features, "_MAX_READ_AT_ONCE", 0)
    return at_once, hookx.open(run)


def test_keys_in_shards_are_those_in_memory(opened: tuple[hookx.Features, hookx.Features]) -> None:
    there, lazily = (one.keys for one in opened)
    assert type(opened[0].rows.keys) is not type(opened[1].rows.keys)
    assert list(there) == list(lazily) and there == lazily and len(lazily) == len(KEYS) - len(FAILED)
    assert [lazily[position] for position in range(-len(there), len(there))] == [*there, *there]
    assert lazily[3:17:5] == there[3:17:5] and repr(lazily) == repr(there)
    for key in [*KEYS, "", "zz", "a/03", "\udcff", "~"]:
        assert (key in lazily) == (key in there) and lazily.place(key) == there.place(key)
        if key in there:
            assert lazily.index(key) == there.index(key)
    assert "\ud800" not in lazily


def test_rows_failures_and_joins_are_the_same(opened: tuple[hookx.Features, hookx.Features], tmp_path: Path) -> None:
    there, lazily = opened
    assert dict(lazily.failures) == dict(there.failures) == FAILED and len(lazily.failures) == len(FAILED)
    assert torch.equal(lazily["layer1"][:], there["layer1"][:])
    for key in there.keys:
        assert torch.equal(lazily["layer1"].of(key), there["layer1"].of(key))
    with pytest.raises(NotStoredError, match="it is empty"):
        lazily["layer1"].of(KEYS[3])
    with pytest.raises(NotStoredError, match=r"closest: a/07\.png"):
        lazily["layer1"].of("a/77.png")
    both = hookx.join(lazily, there)
    assert both.keys == there.keys and not len(both.only_left) and not len(both.only_right)
    data = [run.dataset("layer1") for run in (there, pickle.loads(pickle.dumps(lazily)))]
    assert all(torch.equal(one, other) and a == b for (one, a), (other, b) in zip(*data, strict=True))
    for run, name in ((there, "there"), (lazily, "lazily")):
        export(run, "layer1", tmp_path / f"{name}.npy")
    assert (tmp_path / "there.npy").read_bytes() == (tmp_path / "lazily.npy").read_bytes()
    assert (tmp_path / "there.keys.csv").read_bytes() == (tmp_path / "lazily.keys.csv").read_bytes()


def test_opening_reads_no_header_and_a_key_reads_one(
    run: Path, monkeypatch: pytest.MonkeyPatch, opened: tuple[hookx.Features, hookx.Features]
) -> None:
    for file in run.glob("shard-*"):
        file.rename(file.with_suffix(".away"))
    shards = sorted(run.glob("*.away"))
    for file in shards:
        file.with_suffix(".safetensors").write_bytes(bytes(file.stat().st_size))
    again = hookx.open(run)
    with pytest.raises(ShardError, match="shard-00000"):
        again.keys[0]
    shards[4].rename(shards[4].with_suffix(".safetensors"))
    place = opened[0].keys.index(KEYS[17])
    assert again.keys[place] == KEYS[17] and KEYS[18] in again.keys
    with pytest.raises(ShardError, match="shard-00000"):
        len(dict(again.failures))


def test_a_shard_of_another_run_is_refused_when_it_is_read(
    run: Path, opened: tuple[hookx.Features, hookx.Features]
) -> None:
    first, second = run / "shard-00000-of-00008.safetensors", run / "shard-00001-of-00008.safetensors"
    content = first.read_bytes()
    whole = second.read_bytes()
    second.write_bytes((content + bytes(4096))[: len(whole)])
    with pytest.raises(StoreError):
        hookx.open(run)["layer1"][4]
    shutil.copy(first, second)
    with pytest.raises(ShardError, match="was renamed"):  # The sizes are not those of the table, so all are read.
        hookx.open(run)
    with pytest.raises(ShardError, match="is shard 0 of this run, and was renamed"):
        opened[1]["layer1"][4]


def test_the_table_counts_only_if_it_is_of_the_shards_that_are_there(run: Path) -> None:
    plan, file = read_plan(run), run / "shards.csv"
    whole = file.read_bytes()
    table = read_shard_table(run, plan)
    assert table and list(table.rows) == [3, 4, 0, 4, 4, 4, 4, 3] and table.first_keys[2] == ""
    lines = whole.splitlines(keepends=True)
    wrong = [b"", whole[:-9], b"".join(lines[:-1]), whole + lines[-1], whole[:-1] + b"0\n"]
    wrong += [whole.replace(b",4,0,", b",5,0,"), whole.replace(b"shard-00003", b"shard-00002"), b"\xff\0" * 500]
    wrong += [b"".join([lines[0], lines[2], lines[1], *lines[3:]]), whole.replace(b",4,0,", b",-4,8,")]
    for content in wrong:
        file.write_bytes(content)
        assert read_shard_table(run, plan) is None, content
        assert list(hookx.open(run).keys) == [key for key in KEYS if key not in FAILED]
        assert [problem.file for problem in verify(run).problems] == ["shards.csv"]
    file.unlink()
    assert read_shard_table(run, plan) is None and verify(run).is_whole, "earlier versions wrote none"


def test_beyond_ten_million_rows_there_is_no_index_of_images(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = read_plan(run)
    monkeypatch.setattr(index, "MAX_INDEX_ROWS", len(KEYS))
    publish_index(run, plan)
    assert (run / "index.csv").exists()
    monkeypatch.setattr(index, "MAX_INDEX_ROWS", len(KEYS) - 1)
    publish_index(run, plan)
    assert not (run / "index.csv").exists() and (run / "failures.csv").exists()
    assert verify(run).is_whole and hookx.status(run).is_finished
    assert hookx.open(run)["layer1"].of(KEYS[0]).shape == (2, 3)
