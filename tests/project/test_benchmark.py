"""The benchmark: what it compares, counts and divides, and a complete run on eight images."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import hookx

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module", autouse=True)
def scripts_can_be_imported() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        yield


@pytest.fixture(scope="module")
def benchmark() -> Any:
    return import_module("benchmark")


@pytest.fixture(scope="module")
def report() -> Any:
    return import_module("benchmark_report")


@pytest.fixture(scope="module")
def limits() -> Any:
    return import_module("benchmark_limits")


# --- agreement -----------------------------------------------------------------------------------------------------


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """Return a folder of two layers with 5 rows each, in two shards."""
    rows = {"conv1": torch.randn(5, 4, 3, 3), "avgpool": torch.randn(5, 7)}
    (tmp_path / "ours").mkdir()
    for number, part in enumerate((slice(0, 3), slice(3, 5))):
        shard = {address: tensor[part].contiguous() for address, tensor in rows.items()}
        save_file(shard, tmp_path / "ours" / f"shard-{number:05}-of-00002.safetensors")
    return tmp_path / "ours"


def theirs(benchmark: Any, ours: Path, change: Any = lambda rows: None) -> Path:
    """Return a folder with the same rows in one file, after a change."""
    rows = {
        address: torch.cat([torch.from_numpy(part.values.copy()) for part in parts])
        for address, parts in benchmark.map_stored(ours).items()
    }
    change(rows)
    folder = ours.parent / "theirs"
    folder.mkdir()
    save_file(rows, folder / "activations.safetensors")
    return folder


def test_the_same_rows_agree_however_they_are_cut_into_files(benchmark: Any, ours: Path) -> None:
    assert benchmark.largest_difference(ours, theirs(benchmark, ours)) == 0


def test_rounding_is_a_small_difference(benchmark: Any, ours: Path) -> None:
    def rounded(rows: dict[str, Tensor]) -> None:
        rows["conv1"] *= 1 + 1e-6

    difference = benchmark.largest_difference(ours, theirs(benchmark, ours, rounded))
    assert 0 < difference < 1e-5 < benchmark.ROUNDING


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows["conv1"][4, 0, 0].fill_(9.0),
        lambda rows: rows.update(conv1=rows["conv1"].relu()),  # values after an in-place ReLU
        lambda rows: rows.update(avgpool=rows["avgpool"].flip(0)),  # rows of other images
        lambda rows: rows["avgpool"][1, 1].fill_(torch.nan),
    ],
)
def test_other_values_differ_by_more_than_rounding(benchmark: Any, ours: Path, change: Any) -> None:
    assert benchmark.largest_difference(ours, theirs(benchmark, ours, change)) > 100 * benchmark.ROUNDING


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda rows: rows.pop("conv1"), "stored avgpool instead of avgpool, conv1"),
        (lambda rows: rows.update(avgpool=rows["avgpool"][:4]), r"'avgpool' is \[4, 7\] instead of \[5, 7\]"),
        (lambda rows: rows.update(avgpool=rows["avgpool"][..., None]), r"is \[5, 7, 1\] instead of \[5, 7\]"),
    ],
)
def test_other_layers_or_shapes_do_not_agree(benchmark: Any, ours: Path, change: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        benchmark.largest_difference(ours, theirs(benchmark, ours, change))


def test_bf16_is_compared_as_the_numbers_it_stands_for(benchmark: Any, ours: Path) -> None:
    def narrowed(rows: dict[str, Tensor]) -> None:
        rows.update({address: tensor.bfloat16() for address, tensor in rows.items()})

    assert 1e-4 < benchmark.largest_difference(ours, theirs(benchmark, ours, narrowed)) < 2**-7


# --- figures -------------------------------------------------------------------------------------------------------

rates = st.floats(0.1, 1e5)


def test_ratios_are_paired_so_a_slow_round_does_not_spread_them(report: Any) -> None:
    spread = report.paired([10.0, 2.0, 40.0], [5.0, 1.0, 20.0])
    assert (spread.lowest, spread.median, spread.highest) == (2.0, 2.0, 2.0)
    # The ratio of the medians would be 10.
    assert report.paired([10.0, 1.0, 10.0], [1.0, 1.0, 10.0]).median == 1.0


def test_the_bound_is_that_of_the_cores_or_of_the_disk(report: Any) -> None:
    def bound(write_seconds: float, write_cpu_seconds: float) -> float:
        writing = {"seconds_per_image": write_seconds, "cpu_seconds_per_image": write_cpu_seconds}
        alone = {"decode": {"images_per_second": 100.0}, "forward": {"images_per_second": 100.0}, "write": writing}
        return float(report.bound_of(alone, 2))

    assert bound(0.0, 0.0) == pytest.approx(50)
    assert bound(0.04, 0.04) == pytest.approx(1 / (0.01 + 0.01 + 0.04 / 2)), "writing costs core-seconds"
    assert bound(0.015, 0.0) == pytest.approx(50), "a disk that is faster than the cores costs nothing"
    assert bound(0.1, 0.0) == pytest.approx(10), "a disk that is slower than the cores is the bound"


@given(decode=rates, forward=rates, write=rates, cpu_share=st.floats(0, 1), cores=st.integers(1, 64))
def test_no_bound_is_above_a_limit(
    report: Any, decode: float, forward: float, write: float, cpu_share: float, cores: int
) -> None:
    writing = {"seconds_per_image": 1 / write, "cpu_seconds_per_image": cpu_share / write}
    alone = {"decode": {"images_per_second": decode}, "forward": {"images_per_second": forward}, "write": writing}
    bound = report.bound_of(alone, cores)
    assert 0 < bound <= min(decode, forward) * (1 + 1e-9)
    nothing_written = {**alone, "write": {"seconds_per_image": 0.0, "cpu_seconds_per_image": 0.0}}
    assert bound <= report.bound_of(nothing_written, cores)


def test_measured_rows_decide_goals(report: Any) -> None:
    def row(layers: str, **ratios: float) -> dict[str, Any]:
        by_name = {name.replace("_", " "): {"steady": {"median": ratio}} for name, ratio in ratios.items()}
        peaks = {"hookx": {"peak_bytes": 1_500_000_000}, "hand-written": {"peak_bytes": 600_000_000}}
        return {"model": "resnet18", "layers": layers, "images": 1000, "ratios": by_name, "contestants": peaks}

    assert report.goals_of([]) == []
    decided = report.goals_of([row("pooled", bound=0.95, fastest_other=1.2), row("first", bound=0.5)])
    assert [(goal["layers"], goal["against"], goal["met"]) for goal in decided[:-1]] == [
        ("pooled", "bound", True),
        ("pooled", "fastest other", False),
        ("first", "bound", False),
    ]
    # 600 MB plus two shards of 512 MiB are more than 1,500 MB.
    assert "memory" in decided[-1]["against"] and decided[-1]["met"]


# --- images, processes and limits ----------------------------------------------------------------------------------


def test_generated_images_are_always_the_same_and_have_the_size_of_imagenets(benchmark: Any, tmp_path: Path) -> None:
    made = []
    for name in ("once", "again"):
        (tmp_path / name).mkdir()
        made.append([file.read_bytes() for file in benchmark.make_images(tmp_path / name, 12)])
    assert made[0] == made[1] and len(set(made[0])) == 12
    for file in sorted((tmp_path / "once").iterdir()):
        with Image.open(file) as image:
            assert image.format == "JPEG" and 350 <= min(image.size) <= 400 and 475 <= max(image.size) <= 525
    images = benchmark.link_images(benchmark.list_images(tmp_path / "once")[:3], tmp_path / "three")
    assert [file.name for file in sorted(images.iterdir())] == ["000000.jpg", "000001.jpg", "000002.jpg"]


def test_the_cpu_seconds_of_a_run_include_its_children(benchmark: Any) -> None:
    burn = "import time\nwhile time.process_time() < 0.5: pass"
    finished = benchmark.run(
        [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"]
    )
    assert finished.exit_code == 0 and 0.5 <= finished.cpu_seconds < 2 and finished.peak_bytes is None


@pytest.mark.skipif(sys.platform != "linux", reason="needs proportional set sizes")
def test_memory_that_two_processes_share_counts_once(benchmark: Any) -> None:
    pytest.importorskip("psutil")
    program = "import os, time\nheld = bytearray(200 * 10**6)\nos.fork()\ntime.sleep(1)"
    finished = benchmark.run([sys.executable, "-c", program], watch_memory=True)
    assert 200e6 < finished.peak_bytes < 300e6


def test_a_forward_pass_of_the_limits_ends_after_the_last_layer_in_the_order_of_execution(limits: Any) -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.first, self.third = nn.Identity(), nn.Identity(), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.third(self.second(self.first(x)))

    model, ran = Backwards(), []
    for name, module in model.named_children():
        module.register_forward_hook(lambda _m, _i, _o, name=name: ran.append(name))
    limits.end_after(model, [limits.Wanted.parse(address) for address in ("second", "first@mean1")], torch.zeros(1, 3))
    ran.clear()
    with pytest.raises(limits.Reached):
        model(torch.zeros(1, 3))
    assert ran == ["first", "second"]


# --- whole runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """Return what a quick run prints, and the figures that it writes.

    The ReLU after bn1 works in place, so fx, which returns references, returns wrong values for bn1.
    """
    pytest.importorskip("psutil")
    file = tmp_path_factory.mktemp("benchmark") / "speed.json"
    what = ["--quick", "--layers", "bn1,avgpool", "--contestants", "hand-written", "fx", "--json", str(file)]
    done = subprocess.run([sys.executable, SCRIPTS / "benchmark.py", *what], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(file.read_text())


@pytest.mark.slow
def test_a_quick_run_measures_everything_it_promises(quick: tuple[str, dict[str, Any]]) -> None:
    printed, document = quick
    (row,) = document["rows"]
    assert document["machine"]["cores"] >= 1 and torch.__version__.startswith(document["machine"]["versions"]["torch"])
    assert (row["model"], row["addresses"], row["images"]) == ("resnet18", ["bn1", "avgpool"], 8)
    for name in ("hookx", "hand-written"):
        one = row["contestants"][name]
        assert one["status"] == "agrees" and one["peak_bytes"] > 100e6 and one["cpu_seconds_per_image"]["median"] > 0
        assert one["bytes_written"] > row["images"] * row["bytes_per_image"]
        for how in ("steady", "whole"):
            spread = one["images_per_second"][how]
            assert 0 < spread["lowest"] <= spread["median"] <= spread["highest"] and len(spread["rounds"]) == 1
        assert one["images_per_second"]["whole"]["median"] < one["images_per_second"]["steady"]["median"]
    assert set(row["limits"]) == {"decode only", "forward only", "write only", "hookx's writer", "bound"}
    assert row["limits"]["bound"]["median"] < row["limits"]["forward only"]["median"]
    assert set(row["ratios"]) == {"hand-written", "fastest other", "bound", "write only"}
    assert row["ratios"]["fastest other"]["name"] == "hand-written"
    assert document["goals"] == []  # No goal is about bn1.
    assert all(line in printed for line in ("hookx", "hand-written", "decode only", "bound"))


@pytest.mark.slow
def test_a_contestant_that_stores_other_values_is_reported_as_wrong_and_not_timed(
    quick: tuple[str, dict[str, Any]],
) -> None:
    printed, document = quick
    fx = document["rows"][0]["contestants"]["fx"]
    assert fx["status"] == "wrong" and fx["largest_difference"] > 0.1 and "images_per_second" not in fx
    assert "fx              wrong: differs by" in printed


@pytest.mark.slow
def test_the_report_can_be_printed_again_from_the_figures(quick: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    printed, document = quick
    figures, light_and_dark = tmp_path / "speed.json", tmp_path / "speed.png"
    figures.write_text(json.dumps(document))
    command: list[str | Path] = [sys.executable, SCRIPTS / "benchmark_report.py", figures, "--picture", light_and_dark]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == printed
    with Image.open(light_and_dark) as picture:
        corner = picture.getpixel((0, 0))
        assert picture.mode == "RGBA" and picture.width > 1000 and isinstance(corner, tuple) and corner[3] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["naive", "torchhook", "torchextractor", "torchlens"])
def test_a_contestant_stores_what_hookx_stores(benchmark: Any, name: str, tmp_path: Path) -> None:
    if name != "naive":
        pytest.importorskip(name)
    images = benchmark.link_images(benchmark.list_images(SCRIPTS.parent / "images"), tmp_path / "images")
    hookx.extract("resnet18", "conv1,layer2@mean23", images, weights="none", out=tmp_path / "ours")
    (tmp_path / "theirs").mkdir()
    row = benchmark.Row("resnet18", "", "", 8, ("conv1", "layer2@mean23"), 0)
    finished = benchmark.run(benchmark.command_of(name, row, images, tmp_path / "theirs"))
    assert finished.exit_code == 0, finished.stderr
    assert benchmark.steady_seconds(name, finished) > 0
    assert benchmark.largest_difference(tmp_path / "ours", tmp_path / "theirs") < benchmark.ROUNDING
