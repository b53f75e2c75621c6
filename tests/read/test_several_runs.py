"""Several runs read as one: as if one run had computed all of their images."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import hookx
from hookx.errors import StoreError, UsageError
from kit.runs import same_bits

SMALL: dict[str, Any] = {"weights": "none", "resize": 32, "crop": 32, "workers": 0, "batch_size": 1}


@pytest.fixture(scope="module")
def runs(thumbnails: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of a run of all images, and of three runs that have them between them."""
    folder = tmp_path_factory.mktemp("runs")
    files = sorted(thumbnails.rglob("*.png"))
    order = random.Random(1).sample(range(24), 24)
    for number in range(3):
        for one in order[8 * number : 8 * number + 8]:
            target = folder / f"images{number}" / files[one].relative_to(thumbnails)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(files[one], target)
        (folder / f"images{number}" / f"bad{number}.png").write_text("no picture")
        label = "parent" if number else None
        settings = {**SMALL, "shard_images": 3 + number, "label": label}
        hookx.extract("resnet18", "conv1,avgpool", folder / f"images{number}", out=folder / f"{number}", **settings)
    hookx.extract("resnet18", "conv1,avgpool", thumbnails, out=folder / "all", label="parent", **SMALL)
    return folder


def test_rows_are_those_of_one_run_in_its_order(runs: Path) -> None:
    many, one = hookx.open([runs / "2", runs / "0", runs / "1"]), hookx.open(runs / "all")
    assert list(many.keys_of_rows) == list(one.keys_of_rows) and list(many) == list(one)
    assert sorted(many.failures) == ["bad0.png", "bad1.png", "bad2.png"] and many.plan.image_count == 27
    for address in one:
        assert same_bits(many[address].torch(), one[address].torch()) and many[address].shape == one[address].shape
        for index in (0, -1, slice(3, 20, 4), [5, 2, 5, 23], np.arange(24) % 3 == 0):
            assert same_bits(many[address][index], one[address][index])
        assert all(same_bits(many[address].of(key), one[address].of(key)) for key in one.keys_of_rows)
        shards = list(many[address].shards())
        assert [key for _, keys in shards for key in keys] == list(one.keys_of_rows)
        assert same_bits(torch.cat([rows for rows, _ in shards]), one[address].torch())
        assert same_bits(torch.cat([rows for rows, _ in many[address].batches(5)]), one[address].torch())


def test_they_train_export_and_join_as_one(runs: Path, tmp_path: Path) -> None:
    many, one = hookx.open([str(runs / name) for name in "012"]), hookx.open(runs / "all")
    dataset = many.dataset("avgpool")
    loader = DataLoader(dataset, batch_size=5, sampler=dataset.sampler(seed=3))
    seen = {key: row for rows, keys in loader for row, key in zip(rows, keys, strict=True)}
    assert all(same_bits(seen[key], one["avgpool"].of(key)) for key in one.keys_of_rows) and len(seen) == 24
    for number, features in enumerate((many, one)):
        hookx.export(features, "avgpool", tmp_path / f"{number}.npy")
    assert (tmp_path / "0.npy").read_bytes() == (tmp_path / "1.npy").read_bytes()
    both = hookx.join(many, hookx.open(runs / "1"))
    assert len(both.keys) == 8 and same_bits(both.left["conv1"].torch(), both.right["conv1"].torch())
    whole = hookx.join(one, many)
    assert same_bits(whole.left["avgpool"].torch(), whole.right["avgpool"].torch())


def test_columns_that_some_of_them_lack_are_lacking_there(runs: Path) -> None:
    many, one = hookx.open([runs / name for name in "012"]), hookx.open(runs / "all")
    first = set(hookx.open(runs / "0").keys_of_rows)
    expected = [
        None if key in first else label for key, label in zip(one.keys_of_rows, one.columns["label"], strict=True)
    ]
    assert many.columns["label"].tolist() == expected and list(many.columns) == ["label"]
    assert hookx.open([runs / "1", runs / "2"]).dataset("conv1", target="label").classes
    assert many.to_pandas()["label"].isna().sum() == 8


def test_what_does_not_belong_together_is_refused(runs: Path, thumbnails: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"both hold '.*'\n  only runs of different images"):
        hookx.open([runs / "0", runs / "all"])
    hookx.extract("resnet18", "conv1", thumbnails / "sky", out=tmp_path / "sky", **SMALL)
    with pytest.raises(StoreError, match="cannot be read as one: layers differ"):
        hookx.open([runs / "0", tmp_path / "sky"])
    with pytest.raises(UsageError, match="no run is named"):
        hookx.open([])
    assert list(hookx.open([runs / "0"]).keys_of_rows) == list(hookx.open(runs / "0").keys_of_rows)
