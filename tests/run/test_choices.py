"""What a run uses where the user names nothing follows rules, so that the same command stores the same bits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import get_model

from hookx.layers.select import parse_selectors
from hookx.options import ExtractOptions
from hookx.run.defaults import (
    choose_batch_size,
    choose_memory_format,
    choose_workers,
    count_usable_cores,
    single_threaded,
)
from hookx.run.ready import ready_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("crop_px", "images"), [(32, 16), (256, 16), (299, 11), (384, 7), (518, 3), (5000, 1)])
def test_a_batch_on_the_cpu_is_16_images_or_as_many_as_have_their_pixels(crop_px: int, images: int) -> None:
    assert choose_batch_size("auto", CPU, crop_px, 10**6, 2048) == images
    assert images == 1 or images * crop_px**2 <= 16 * 256**2


@pytest.mark.parametrize(("image_count", "images"), [(1, 4), (64, 4), (100, 6), (256, 16), (300, 16)])
def test_a_short_list_makes_small_batches_so_that_every_worker_has_one(image_count: int, images: int) -> None:
    assert choose_batch_size("auto", CPU, 224, image_count, 2048) == images


@pytest.mark.parametrize(("megabytes", "images"), [(2, 16), (2.2, 8), (4, 8), (4.2, 4), (100, 4)])
def test_large_activations_make_small_batches_that_divide_a_shard(megabytes: float, images: int) -> None:
    assert choose_batch_size("auto", CPU, 224, 10**6, int(megabytes * 2**20)) == images


def test_a_batch_size_that_is_asked_for_is_taken_on_any_device() -> None:
    assert choose_batch_size(24, CPU, 518, 1, 10**8) == choose_batch_size(24, CUDA, 518, 1, 10**8) == 24


@pytest.mark.parametrize(
    ("name", "memory_format"),
    [
        ("resnet18", "channels_last"),
        ("mobilenet_v3_small", "channels_last"),
        ("convnext_tiny", "channels_last"),  # its 7 x 7 convolutions overlap, its 2 x 2 ones do not
        ("vit_b_16", "contiguous"),
        ("swin_t", "contiguous"),
    ],
)
def test_convolutions_over_overlapping_windows_run_in_channels_last(name: str, memory_format: str) -> None:
    with torch.device("meta"):
        module = get_model(name, weights=None)
    convolutions = [part for part in module.modules() if isinstance(part, nn.Conv2d)]
    assert choose_memory_format("auto", convolutions, CPU, "fp32") == memory_format
    assert choose_memory_format("auto", convolutions, CUDA, "bf16") == memory_format
    assert choose_memory_format("auto", convolutions, CUDA, "fp32") == "contiguous"
    for asked in ("contiguous", "channels_last"):
        assert choose_memory_format(asked, convolutions, CPU, "fp32") == asked


@pytest.mark.parametrize(
    ("layers", "memory_format"),
    [
        ("conv1", "contiguous"),
        ("relu:0,maxpool", "contiguous"),
        ("layer1/in", "contiguous"),
        ("layer1.0.conv1/in", "contiguous"),
        ("layer1.0.conv1", "channels_last"),
        ("layer1", "channels_last"),
        ("conv1,fc", "channels_last"),
        (".", "channels_last"),
        ("conv*", "contiguous"),
    ],
)
def test_what_runs_after_the_last_layer_has_no_say_in_the_memory_format(layers: str, memory_format: str) -> None:
    options = ExtractOptions(model="resnet18", layers=layers, images="images")
    ready = ready_model("resnet18", "none", options, parse_selectors(layers))
    assert ready.runner.memory_format == memory_format


def test_every_core_computes_on_the_cpu_and_one_is_left_beside_a_gpu() -> None:
    assert [choose_workers(None, device, cores=16) for device in (CPU, CUDA)] == [16, 15]
    assert choose_workers(3, CPU, cores=16) == 3
    assert choose_workers(None, CPU) == count_usable_cores()


@pytest.mark.parametrize(("quota", "cores"), [("150000 100000", 2), ("20000 100000", 1), ("max 100000", 64), ("", 64)])
def test_the_quota_of_a_container_bounds_the_cores(
    quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)
    if quota:
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert count_usable_cores(tmp_path / "cpu.max") == cores


def test_computing_on_one_thread_ends_with_its_block_also_after_an_error() -> None:
    threads = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), single_threaded():
        assert torch.get_num_threads() == 1
        _ = 1 // 0
    assert torch.get_num_threads() == threads


def told_by_a_process(code: str) -> int:
    finished = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return int(finished.stdout)


def faults_of_a_worker(prepare: str) -> int:
    """Count the pages that a fresh process is given while it makes and drops a tensor of 48 MB, ten times."""
    return told_by_a_process(
        "import resource, torch; from hookx.run.defaults import keep_freed_memory\n"
        f"{prepare}\n"
        "torch.set_num_threads(1)\nfor _ in range(5): torch.ones(12_000_000)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(10): torch.ones(12_000_000)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )


def test_a_worker_computes_in_memory_that_it_already_has() -> None:
    usual = faults_of_a_worker("")
    # Where a heap meets another mapping, which the system puts at random, glibc begins a new one: so up to three tries.
    assert any(faults_of_a_worker("keep_freed_memory()") < usual / 3 for _ in range(3))


def huge_pages_are_for_those_who_ask() -> bool:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.exists() and "[never]" not in setting.read_text()


@pytest.mark.skipif(not huge_pages_are_for_those_who_ask(), reason="this system gives no huge pages")
def test_what_a_worker_computes_lies_in_pages_of_two_megabytes() -> None:
    code = (
        "import torch; from hookx.run.defaults import keep_freed_memory\n"
        "keep_freed_memory(); kept = torch.ones(12_000_000)\n"
        "lines = open('/proc/self/smaps_rollup').read().splitlines()\n"
        "print(next(line.split()[1] for line in lines if line.startswith('AnonHugePages')))"
    )
    assert any(told_by_a_process(code) > 40_000 for _ in range(3))  # kB
