"""What a run holds, as numbers computed by another route, whether or not the run is finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner

import hookx
from hookx.check.inspect import Moments, inspect
from hookx.cli.app import app
from hookx.errors import ShardError, StoreError
from hookx.launch.extract import extract
from hookx.plan import DTYPES, LayerSpec, Plan, Preprocessing
from hookx.store.directory import RunDirectory
from hookx.store.record import ShardRecord
from kit.files import files_opened
from kit.shards import publish

PREPROCESSING = Preprocessing(256, 224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear")


def write(path: Path, values: Tensor, rows_per_shard: int, shards: int | None = None) -> Plan:
    """Write a run with one layer, or only its first shards."""
    dtype = str(values.dtype).removeprefix("torch.")
    layers = (LayerSpec("layer", tuple(values.shape[1:]), dtype),)
    plan = Plan(
        "net", "none", layers, PREPROCESSING, "fp32", "contiguous", len(values), "0" * 64, rows_per_shard, batch_size=1
    )
    with RunDirectory(path, plan) as directory:
        for shard in plan.shards[:shards]:
            keys = [f"{position:05}" for position in range(shard.start, shard.stop)]
            rows = values[shard.start : shard.stop].contiguous()
            publish(directory, shard, {"layer": rows}, ShardRecord(keys, made={"device": "cpu"}))
        if shards is None:
            directory.publish_index()
    return plan


@pytest.fixture(scope="module")
def features(mixed_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("inspected") / "features"
    options: dict[str, Any] = {
        "weights": "none",
        "resize": 32,
        "crop": 32,
        "shard_images": 4,
        "workers": 0,
        "device": "cpu",
    }
    extract("resnet18", "bn1,relu,layer1@mean23", mixed_folder, out=out, **options)
    return out


# --- statistics ----------------------------------------------------------------------------------------------------


@given(
    st.sampled_from(["float64", "float32", "bfloat16", "int16", "bool", "complex64"]),
    st.lists(st.floats(-1e6, 1e6) | st.sampled_from([0.0, float("nan"), float("inf")]), min_size=1, max_size=40),
    st.integers(1, 41),
)
def test_statistics_are_those_that_numpy_computes_from_all_values_at_once(
    dtype: str, numbers: list[float], values_per_piece: int
) -> None:
    whole_numbers = not dtype.startswith(("float", "bfloat", "complex"))
    values = (
        torch.tensor([int(number) % 999 if abs(number) <= 1e6 else 0 for number in numbers])
        if whole_numbers
        else (torch.tensor(numbers, dtype=torch.float64))
    )
    values = values.to(getattr(torch, dtype))
    moments = Moments()
    for piece in values.split(values_per_piece):
        moments.add(piece)
    found = moments.statistics()
    flat = (torch.view_as_real(values) if values.is_complex() else values).flatten().double().numpy()
    finite = flat[np.isfinite(flat)]
    assert (found.values, found.zeros, found.non_finite) == (flat.size, (flat == 0).sum(), flat.size - finite.size)
    if finite.size:
        assert (found.minimum, found.maximum) == (finite.min(), finite.max())
        scale = max(1.0, float(np.abs(finite).max()))
        assert found.mean == pytest.approx(finite.mean(), rel=1e-9, abs=1e-12 * scale)
        assert found.deviation == pytest.approx(finite.std(), rel=1e-9, abs=1e-9 * scale)
    else:
        assert (found.mean, found.deviation, found.minimum, found.maximum) == (None,) * 4


def test_shards_that_are_read_in_several_pieces_count_every_value_once(tmp_path: Path) -> None:
    values = torch.arange(5 * 2**21).reshape(5, 2**21)  # Rows of 16 MiB, in shards of two.
    write(tmp_path, values, rows_per_shard=2)
    found = inspect(tmp_path, statistics=True).layers[0].statistics
    count = values.numel()
    assert found is not None and (found.values, found.zeros) == (count, 1)
    assert (found.minimum, found.maximum) == (0, count - 1) and found.mean == pytest.approx((count - 1) / 2, rel=1e-12)
    assert found.deviation == pytest.approx(((count**2 - 1) / 12) ** 0.5, rel=1e-12)


def test_a_small_deviation_about_a_large_mean_is_not_lost(tmp_path: Path) -> None:
    values = 1e6 + torch.tensor([[0.0], [1.0]] * 50, dtype=torch.float64)
    write(tmp_path, values, rows_per_shard=7)
    found = inspect(tmp_path, statistics=True).layers[0].statistics
    assert found is not None and found.deviation == pytest.approx(0.5, rel=1e-9)


def test_statistics_of_a_real_run_are_those_of_what_is_read_back(features: Path) -> None:
    for layer in inspect(features, statistics=True).layers:
        values = hookx.open(features)[layer.address].numpy().astype(np.float64)
        found = layer.statistics
        assert found is not None and layer.shape == values.shape
        assert (found.minimum, found.maximum, found.non_finite) == (values.min(), values.max(), 0)
        assert found.mean == pytest.approx(values.mean(), rel=1e-12)
        assert found.deviation == pytest.approx(values.std(), rel=1e-12)
        assert found.zeros == (values == 0).sum()


def test_without_statistics_only_the_header_of_each_shard_is_read(features: Path) -> None:
    with files_opened() as names:
        layers = inspect(features).layers
    shards = sorted(file.name for file in features.glob("shard-*"))
    assert [layer.statistics for layer in layers] == [None] * 3
    assert sorted(name for name in names if name.startswith("shard-")) == shards


# --- progress ------------------------------------------------------------------------------------------------------


def test_a_finished_run_shows_its_plan_its_rows_and_how_it_was_made(features: Path) -> None:
    found = inspect(features)
    assert found.is_finished and (found.rows, found.failures, found.shards_finished) == (5, 4, 3)
    assert found.layers[0].shape == (5, 64, 16, 16) and found.layers[0].bytes == 5 * 64 * 16 * 16 * 4
    assert found.bytes == sum(layer.bytes for layer in found.layers)
    assert [made["device"] for made in found.made] == ["cpu"]


def test_an_unfinished_run_shows_what_is_there(tmp_path: Path) -> None:
    write(tmp_path, torch.ones(10, 3), rows_per_shard=2, shards=2)
    found = inspect(tmp_path, statistics=True)
    assert not found.is_finished and (found.shards_finished, found.rows, found.plan.image_count) == (2, 4, 10)
    assert found.layers[0].shape == (4, 3) and found.layers[0].statistics is not None
    assert found.layers[0].statistics.values == 12
    result = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert result.exit_code == 0
    assert "2 of 5 finished" in result.stdout and "is not finished" in result.stdout


def test_a_run_of_which_no_shard_is_there_yet_is_shown(tmp_path: Path) -> None:
    write(tmp_path, torch.ones(10, 3), rows_per_shard=2, shards=0)
    result = CliRunner().invoke(app, ["inspect", "--stats", str(tmp_path)])
    assert result.exit_code == 0 and "0 of 5 finished" in result.stdout
    found = inspect(tmp_path, statistics=True).layers[0].statistics
    assert found is not None and (found.values, found.mean) == (0, None)


def test_a_directory_without_a_run_and_a_damaged_shard_are_errors(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no run of hookx"):
        inspect(tmp_path)
    plan = write(tmp_path, torch.ones(4, 3), rows_per_shard=2)
    (tmp_path / plan.shard_file(plan.shards[1])).write_bytes(b"")
    with pytest.raises(ShardError, match=r"shard-00001-of-00002\.safetensors is damaged"):
        inspect(tmp_path)


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_prints_a_line_a_layer_and_with_stats_their_numbers(features: Path) -> None:
    lines = CliRunner().invoke(app, ["inspect", str(features)]).stdout.splitlines()
    assert lines[0].split() == ["bn1", "5,64,16,16", "float32", "327.7", "kB"]
    header, bn1, relu, *_ = CliRunner().invoke(app, ["inspect", "--stats", str(features)]).stdout.splitlines()
    assert header.split()[4:] == ["mean", "deviation", "minimum", "maximum", "zeros", "non-finite"]
    assert float(bn1.split()[7]) < 0 and float(relu.split()[7]) == 0 and relu.split()[9].endswith("%")


def test_the_command_as_json_is_one_document(features: Path) -> None:
    document = json.loads(CliRunner().invoke(app, ["inspect", "--stats", "--json", str(features)]).stdout)
    assert (document["is_finished"], document["shards"], document["rows"]) == (True, 3, 5)
    assert document["plan"]["model"] == "resnet18" and len(document["plan"]["fingerprint"]) == 64
    assert document["layers"][0]["shape"] == [5, 64, 16, 16]
    assert document["layers"][1]["statistics"]["minimum"] == 0
    assert set(DTYPES) > {layer["dtype"] for layer in document["layers"]}
