"""The straight line from images to shards: exact, accounted for, resumable, and refusing early."""

from __future__ import annotations

import contextlib
import csv
import json
import shlex
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torchvision.models import get_model, get_model_weights
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

import hookx
from hookx.errors import CaptureError, ImageError, LayerError, StoreError, UsageError
from hookx.launch.extract import extract
from hookx.options import parse_bytes
from hookx.plan import Plan
from hookx.run.prepare import prepare
from hookx.run.run import run

# A forward pass over 32 x 32 pixels takes milliseconds; the traps of a network are the same.
SMALL: dict[str, Any] = {"weights": "none", "resize": 32, "crop": 32, "workers": 0}
LAYERS = ["conv1", "bn1", "relu", "layer1", "layer2.0.downsample.1", "layer4.1.bn2", "avgpool"]


def keys_in(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.[jp][pn]g"))


def batches_of(keys: Sequence[str], shard_images: int, batch_size: int) -> list[list[str]]:
    """Cut keys into shards, and each shard into batches, from the sentence in the design and not from the code."""
    shards = [keys[start : start + shard_images] for start in range(0, len(keys), shard_images)]
    return [list(shard[start : start + batch_size]) for shard in shards for start in range(0, len(shard), batch_size)]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def reference(
    folder: Path,
    batches: list[list[str]],
    layers: list[str],
    transform: Callable[[Image.Image], Tensor],
    autocast: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Take activations with plain torch and torchvision: hooks that clone, no early end, one batch after another."""
    torch.manual_seed(0)
    model = get_model("resnet18", weights=None).eval().to(memory_format=torch.channels_last)
    taken: dict[str, list[Tensor]] = {layer: [] for layer in layers}

    def clone_into(tensors: list[Tensor]) -> Callable[..., None]:
        return lambda _module, _args, output: tensors.append(output.clone())

    for layer in layers:
        model.get_submodule(layer).register_forward_hook(clone_into(taken[layer]))
    for keys in batches:
        pixels_NCHW = torch.stack([transform(Image.open(folder / key).convert("RGB")) for key in keys])
        pixels_NCHW = pixels_NCHW.contiguous(memory_format=torch.channels_last)
        with one_thread(), torch.inference_mode(), torch.autocast("cpu", autocast, enabled=autocast is not None):
            model(pixels_NCHW)
    return {layer: torch.cat(tensors) for layer, tensors in taken.items()}


def small_transform(**changes: Any) -> ImageClassification:
    return ImageClassification(**{"crop_size": 32, "resize_size": 32, **changes})


def files_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def assert_stored(path: Path, expected: dict[str, Tensor]) -> None:
    features = hookx.open(path)
    assert set(features) == set(expected)
    for address, tensor in expected.items():
        assert features[address].dtype == tensor.dtype and torch.equal(features[address][:], tensor), address


def test_the_function_hookx_extract_is_there_also_when_its_module_was_imported_first() -> None:
    assert callable(hookx.extract)


# --- exact ---------------------------------------------------------------------------------------------------------


def test_stored_activations_equal_bit_for_bit_what_cloning_hooks_take_from_torchvisions_own_pass(
    photos: Path, tmp_path: Path
) -> None:
    summary = extract("resnet18", LAYERS, photos, weights="none", out=tmp_path, batch_size=3)
    keys = keys_in(photos)
    transform = get_model_weights("resnet18").DEFAULT.transforms()
    assert hookx.open(tmp_path).keys_of_rows == keys and len(keys) == 8
    assert_stored(tmp_path, reference(photos, batches_of(keys, 4096, 3), LAYERS, transform))
    assert (summary.images, summary.failures, summary.shards, summary.shards_computed) == (8, 0, 1, 1)
    assert summary.bytes == 8 * summary_bytes_per_image(tmp_path)


def summary_bytes_per_image(path: Path) -> int:
    """Count the bytes of one image's activations in the files themselves."""
    with_rows = [load_file(file) for file in path.glob("*.safetensors")]
    return sum(tensor.nbytes for shard in with_rows for tensor in shard.values()) // sum(
        len(next(iter(shard.values()))) for shard in with_rows
    )


def test_batches_never_straddle_shards_and_the_last_of_a_shard_may_be_small(thumbnails: Path, tmp_path: Path) -> None:
    keys = keys_in(thumbnails)[:8]
    images_done: list[int] = []
    files = [thumbnails / key for key in keys]
    summary = extract(
        "resnet18", LAYERS, files, out=tmp_path, shard_images=3, batch_size=2, progress=images_done.append, **SMALL
    )
    assert images_done == [2, 1, 2, 1, 2]
    assert summary.shards == 3 == len(list(tmp_path.glob("shard-0000?-of-00003.safetensors")))
    names = {Path(key).name: key for key in keys}
    assert hookx.open(tmp_path).keys_of_rows == sorted(names)
    batches = batches_of([names[name] for name in sorted(names)], 3, 2)
    assert_stored(tmp_path, reference(thumbnails, batches, LAYERS, small_transform()))


def test_progress_adds_up_to_the_number_of_images_readable_or_not(mixed_folder: Path, tmp_path: Path) -> None:
    images_done: list[int] = []
    extract(
        "resnet18", "fc", mixed_folder, out=tmp_path, batch_size=2, shard_images=5, progress=images_done.append, **SMALL
    )
    assert sum(images_done) == 9


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"resize": 48, "crop": 40}, {"resize_size": 48, "crop_size": 40}),
        ({"interpolation": "nearest"}, {"interpolation": InterpolationMode.NEAREST}),
        ({"mean": [0.1, 0.2, 0.3], "std": (0.5, 1, 2)}, {"mean": (0.1, 0.2, 0.3), "std": (0.5, 1.0, 2.0)}),
    ],
)
def test_preprocessing_that_is_asked_for_replaces_that_of_the_weights(
    thumbnails: Path, tmp_path: Path, options: dict[str, Any], changes: dict[str, Any]
) -> None:
    folder = thumbnails / "things"
    extract("resnet18", "conv1,avgpool", folder, out=tmp_path, **{**SMALL, **options})
    expected = reference(folder, [keys_in(folder)], ["conv1", "avgpool"], small_transform(**changes))
    assert_stored(tmp_path, expected)


def test_bf16_arithmetic_is_autocasts_and_is_stored_as_the_layer_returned_it(thumbnails: Path, tmp_path: Path) -> None:
    folder = thumbnails / "things"
    extract("resnet18", "conv1,layer2,avgpool", folder, out=tmp_path, precision="bf16", batch_size=32, **SMALL)
    layers = ["conv1", "layer2", "avgpool"]
    expected = reference(folder, [keys_in(folder)], layers, small_transform(), torch.bfloat16)
    assert expected["conv1"].dtype == torch.bfloat16
    assert_stored(tmp_path, expected)


def test_a_value_that_overflows_the_stored_type_is_counted_and_never_silent(thumbnails: Path, tmp_path: Path) -> None:
    folder, std = thumbnails / "things", (1e-7, 1e-7, 1e-7)
    summary = extract("resnet18", "conv1,bn1@mean23", folder, out=tmp_path, dtype="fp16", std=std, **SMALL)
    conv1 = reference(folder, [keys_in(folder)], ["conv1"], small_transform(std=std))["conv1"]
    stored = hookx.open(tmp_path)["conv1"]
    assert stored.dtype == torch.float16 and torch.equal(stored[:], conv1.half())
    assert summary.counts["conv1"]["overflowed"] == int(conv1.half().isinf().sum()) > 0
    again = extract("resnet18", "conv1,bn1@mean23", folder, out=tmp_path, dtype="fp16", std=std, **SMALL)
    assert again.counts == summary.counts and again.shards_computed == 0


def test_excluded_layers_are_left_out(thumbnails: Path, tmp_path: Path) -> None:
    job = prepare(
        "resnet18", "layer1.**,conv1,fc", thumbnails, out=tmp_path / "o", exclude=["type:ReLU,*.0.**", "fc"], **SMALL
    )
    below_block_1 = ["layer1.1", "layer1.1.conv1", "layer1.1.bn1", "layer1.1.conv2", "layer1.1.bn2"]
    assert sorted(layer.address for layer in job.plan.layers) == sorted(["conv1", "layer1.0", *below_block_1])


# --- accounted -----------------------------------------------------------------------------------------------------


def test_every_listed_image_ends_as_one_row_or_as_one_failure_with_its_reason(
    mixed_folder: Path, tmp_path: Path
) -> None:
    summary = extract("resnet18", "layer1,fc", mixed_folder, out=tmp_path, shard_images=4, batch_size=2, **SMALL)
    features = hookx.open(tmp_path)
    assert features.keys_of_rows == ["a.png", "d.png", "e.png", "g.png", "i.png"]
    assert list(features.failures) == ["b-text.jpg", "c-empty.png", "f-cut.png", "h-dangling.png"]
    assert all(features.failures.values())
    assert (summary.images, summary.failures) == (5, 4)
    with open(tmp_path / "failures.csv", newline="") as file:
        assert {line["key"]: line["reason"] for line in csv.DictReader(file)} == features.failures
    with open(tmp_path / "index.csv", newline="") as file:
        for line in csv.DictReader(file):
            row = load_file(tmp_path / line["shard"])["fc"][int(line["row"])]
            assert torch.equal(row, features["fc"][features.keys_of_rows.index(line["key"])])
    batches = [["a.png"], ["d.png"], ["e.png"], ["g.png"], ["i.png"]]  # what remains of a,b | c,d || e,f | g,h || i
    assert_stored(tmp_path, reference(mixed_folder, batches, ["layer1", "fc"], small_transform()))


def test_a_batch_in_which_every_image_fails_gives_failures_and_no_row(mixed_folder: Path, tmp_path: Path) -> None:
    unreadable = [mixed_folder / name for name in ("b-text.jpg", "c-empty.png", "f-cut.png")]
    summary = extract("resnet18", "fc", [*unreadable, mixed_folder / "i.png"], out=tmp_path, batch_size=2, **SMALL)
    assert (summary.images, summary.failures) == (1, 3)


def test_a_run_in_which_every_image_fails_is_done_and_holds_no_row(mixed_folder: Path, tmp_path: Path) -> None:
    unreadable = [mixed_folder / name for name in ("b-text.jpg", "c-empty.png", "f-cut.png")]
    summary = extract("resnet18", "fc", unreadable, out=tmp_path, shard_images=2, **SMALL)
    assert (summary.images, summary.failures, summary.bytes) == (0, 3, 0)
    assert hookx.open(tmp_path)["fc"][:].shape == (0, 1000)


def test_strict_stops_at_the_first_unreadable_image_and_keeps_the_shards_before_it(
    mixed_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ImageError, match=r"cannot read 'b-text.jpg': .*\n  leave out --strict"):
        extract("resnet18", "fc", mixed_folder, out=tmp_path, strict=True, shard_images=1, **SMALL)
    features = hookx.open(tmp_path, partial=True)
    assert features.keys_of_rows == ["a.png"] and features.failures == {}


# --- resumable -----------------------------------------------------------------------------------------------------

CUTS: dict[str, Any] = {"shard_images": 2, "batch_size": 2, **SMALL}


@pytest.fixture(scope="module")
def finished(mixed_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output of a run of five shards that nothing interrupted."""
    path = tmp_path_factory.mktemp("finished")
    extract("resnet18", "conv1,avgpool", mixed_folder, out=path, **CUTS)
    return path


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "features"))


def test_a_run_that_lost_shards_is_finished_to_the_same_bytes_of_every_file(
    finished: Path, copy: Path, mixed_folder: Path
) -> None:
    for name in ("shard-00001-of-00005.safetensors", "shard-00004-of-00005.safetensors", "index.csv"):
        (copy / name).unlink()
    (copy / ".shard-00001-of-00005.safetensors.aside").write_bytes(b"half of it")
    images_done: list[int] = []
    summary = extract("resnet18", "conv1,avgpool", mixed_folder, out=copy, progress=images_done.append, **CUTS)
    assert (summary.shards, summary.shards_computed, sum(images_done)) == (5, 2, 3)
    assert files_of(copy) == files_of(finished)


def test_a_finished_run_computes_nothing(copy: Path, mixed_folder: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in copy.glob("*.safetensors")}
    images_done: list[int] = []
    job = prepare("resnet18", "conv1,avgpool", mixed_folder, out=copy, **CUTS)
    summary = run(job, images_done.append)
    assert job.pending == [] and job.bytes_to_write == 0 and images_done == []
    assert (summary.shards, summary.shards_computed, summary.images, summary.failures) == (5, 0, 5, 4)
    assert {file: file.stat().st_mtime_ns for file in copy.glob("*.safetensors")} == before


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_the_number_of_workers_changes_no_byte(
    finished: Path, mixed_folder: Path, tmp_path: Path, workers: int
) -> None:
    extract("resnet18", "conv1,avgpool", mixed_folder, out=tmp_path, **{**CUTS, "workers": workers})
    assert files_of(tmp_path) == files_of(finished)


@pytest.mark.parametrize("name", ["resnet18", pytest.param("vit_b_16", marks=pytest.mark.slow), "densenet121"])
def test_the_number_of_workers_changes_no_bit_of_any_layer_at_full_size(
    photos: Path, tmp_path: Path, name: str
) -> None:
    for workers in (0, 2):
        extract(name, "type:Conv2d@mean23,type:Linear,.", photos, weights="none", batch_size=3, shard_images=5,
                workers=workers, out=tmp_path / str(workers))  # fmt: skip
    assert files_of(tmp_path / "0") == files_of(tmp_path / "2")


def test_what_was_chosen_automatically_is_in_the_plan_and_a_resumed_run_keeps_it(
    thumbnails: Path, tmp_path: Path
) -> None:
    def begin(**options: Any) -> Plan:
        job = prepare("resnet18", "fc", thumbnails, out=tmp_path / "out", shard_images=8, **{**SMALL, **options})
        run(job)
        return job.plan

    chosen = begin()
    assert (chosen.batch_size, chosen.memory_format) == (4, "channels_last")
    shutil.rmtree(tmp_path / "out")
    asked = begin(batch_size=3, memory_format="contiguous")
    before = files_of(tmp_path / "out")
    (tmp_path / "out" / "shard-00001-of-00003.safetensors").unlink()
    kept = begin()
    assert (kept.batch_size, kept.memory_format) == (asked.batch_size, asked.memory_format) == (3, "contiguous")
    assert files_of(tmp_path / "out") == before
    with pytest.raises(StoreError, match=r"memory formats differ \(there: contiguous; asked: channels_last\)"):
        begin(memory_format="channels_last")


def test_a_model_that_cannot_run_in_channels_last_runs_contiguous_unless_it_was_asked_for(
    thumbnails: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "takes_a_view.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv = torch.nn.Conv2d(3, 4, 3)\n"
        "        self.fc = torch.nn.Linear(4 * 30 * 30, 2)\n"
        "    def forward(self, x):\n"
        "        return self.fc(self.conv(x).view(len(x), -1))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model, options = "python:takes_a_view:Net", {**SMALL, "out": tmp_path / "out"}
    assert prepare(model, "fc", thumbnails, **options).plan.memory_format == "contiguous"
    with pytest.raises(CaptureError, match=r"the model fails on a batch of images .*view"):
        prepare(model, "fc", thumbnails, memory_format="channels_last", **options)


def test_a_model_that_fails_in_a_worker_says_why_and_keeps_the_shards_there_are(
    thumbnails: Path, tmp_path: Path
) -> None:
    cuts = {"shard_images": 8, "batch_size": 4, "workers": 1, "self_check": "off"}
    out, passes = tmp_path / "out", tmp_path / "passes"  # a file, because variables are put back
    job = prepare("resnet18", "fc", thumbnails, out=out, **{**SMALL, **cuts})

    def turn_wide(module: Any, args: Any, output: Tensor) -> Tensor:
        if len(output) == 4:
            with open(passes, "a") as file:
                file.write(".")
        is_of_third_shard = len(output) == 4 and passes.stat().st_size > 4
        return torch.cat([output, output], 1) if is_of_third_shard else output

    job.ready.loaded.module.get_submodule("fc").register_forward_hook(turn_wide)
    with pytest.raises(CaptureError, match=r"^'fc' is float32 \[4, 2000\] in this batch; the probe saw") as error:
        run(job)
    assert "worker" not in str(error.value)
    assert len(list(out.glob("shard-0000[01]-of-00003.safetensors"))) == 2 == len(list(out.glob("shard-*")))


def test_fast_decoding_changes_large_jpegs_a_little_and_nothing_else(thumbnails: Path, tmp_path: Path) -> None:
    side = np.linspace(0, 6 * np.pi, 1600)
    wave = np.stack([np.sin(side)[:, None] * np.cos(side[:1200] * k) for k in (1, 2, 3)], 2)
    Image.fromarray((127 + 120 * wave).astype(np.uint8)).save(tmp_path / "large.jpg", quality=95)
    shutil.copy(thumbnails / "sky" / "hubble-0.png", tmp_path / "small.png")
    rows = {}
    for decode in ("exact", "fast"):
        options: dict[str, Any] = {"weights": "none", "resize": 64, "crop": 56, "decode": decode, "workers": 0}
        extract("resnet18", "./in", tmp_path, out=tmp_path / decode, **options)
        rows[decode] = hookx.open(tmp_path / decode)["./in"][:]
    deviation = (rows["fast"] - rows["exact"]).abs()
    assert deviation[0].max() > 0 and deviation[0].mean() < 0.02 and not deviation[1].any()
    assert json.loads((tmp_path / "fast" / "plan.json").read_text())["preprocessing"]["decode"] == "fast"
    with pytest.raises(StoreError, match=r"preprocessing differ .*decode fast"):
        prepare("resnet18", "./in", tmp_path, out=tmp_path / "exact", **options)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers": "conv1"}, r"layers differ \(there: conv1, avgpool; asked: conv1\)"),
        ({"dtype": "fp16"}, r"layers differ \(there: conv1 .* float32, .*; asked: conv1 .* float16"),
        ({"seed": 1}, r"weights differ \(there: random \(seed 0\); asked: random \(seed 1\)\)"),
        ({"crop": 16}, r"preprocessing differ.*crop_px 32.*crop_px 16"),
        ({"model": "resnet34"}, r"model.* differ \(there: resnet18; asked: resnet34\)"),
        ({"shard_images": 3}, r"(per.shard|cuts|images).* differ.*2.*3"),
    ],
)
def test_another_run_in_the_same_directory_is_refused_and_the_error_says_what_differs(
    copy: Path, mixed_folder: Path, changes: dict[str, Any], said: str
) -> None:
    before = files_of(copy)
    arguments = {"model": "resnet18", "layers": "conv1,avgpool", "images": mixed_folder, "out": copy, **CUTS, **changes}
    with pytest.raises(StoreError, match=f"holds another run: .*{said}.*; choose another --out"):
        extract(**arguments)
    assert files_of(copy) == before


def test_an_image_list_that_has_changed_is_another_run(copy: Path, mixed_folder: Path) -> None:
    with pytest.raises(StoreError, match=r"holds another run: .*images"):
        prepare("resnet18", "conv1,avgpool", [mixed_folder / "a.png"], out=copy, **CUTS)


def test_a_damaged_shard_is_refused_before_anything_is_computed(copy: Path, mixed_folder: Path) -> None:
    file = copy / "shard-00002-of-00005.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StoreError, match=f"{file} is damaged: .*\n  remove it"):
        prepare("resnet18", "conv1,avgpool", mixed_folder, out=copy, **CUTS)


# --- nothing is guessed, and everything is said before the first shard ---------------------------------------------


def test_preparing_writes_nothing_and_says_what_a_run_would_write(thumbnails: Path, tmp_path: Path) -> None:
    job = prepare("resnet18", "conv1,avgpool", thumbnails, out=tmp_path / "a" / "b", max_shard_size="300kB", **SMALL)
    bytes_per_image = 64 * 16 * 16 * 4 + 512 * 4
    assert [(layer.address, layer.shape) for layer in job.plan.layers] == [
        ("conv1", (64, 16, 16)),
        ("avgpool", (512, 1, 1)),
    ]
    assert job.bytes_to_write == 24 * bytes_per_image and (job.bytes_free or 0) > 0
    assert job.plan.images_per_shard == parse_bytes("300kB") // bytes_per_image == 4
    assert len(job.pending) == 6
    assert list(tmp_path.iterdir()) == []


DiskUsage = namedtuple("DiskUsage", "total used free")


def test_a_run_too_large_for_the_disk_is_refused_before_it_begins(
    thumbnails: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 24 * 1000 * 4
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: DiskUsage(10**9, 10**9, needed - 1))
    with pytest.raises(StoreError, match=r"need 96,000 bytes and .* has 95,999 free\n.*--dtype fp16"):
        prepare("resnet18", "fc", thumbnails, out=tmp_path / "features", **SMALL)
    assert list(tmp_path.iterdir()) == []
    prepare("resnet18", "fc", thumbnails, out=tmp_path / "features", dtype="fp16", **SMALL)


def bad_arguments() -> Iterator[Any]:
    def case(error: type[Exception], said: str, **changes: Any) -> Any:
        return pytest.param(changes, error, said, id=next(iter(changes)) + "=" + str(next(iter(changes.values()))))

    yield case(LayerError, r"no layer matches 'layer1.1.con1' in resnet18; closest: layer1", layers="layer1.1.con1")
    yield case(UsageError, "no layer is named", layers=" , ")
    yield case(LayerError, "--exclude leaves no layer to capture", exclude="fc")
    yield case(LayerError, "no layer matches 'fcc'", exclude="fcc")
    yield case(UsageError, "--batch-size must be at least 1, got 0", batch_size=0)
    yield case(UsageError, "--batch-size must be a whole number or auto, got 'many'", batch_size="many")
    yield case(
        UsageError, "invalid --memory-format 'nhwc': choose contiguous, channels_last, auto", memory_format="nhwc"
    )
    yield case(UsageError, "invalid --decode 'fastest': choose exact, fast, nvjpeg", decode="fastest")
    yield case(UsageError, "--shard-images must be at least 1, got 0", shard_images=0)
    yield case(UsageError, "invalid --precision 'fp8': choose fp32, tf32, bf16, fp16", precision="fp8")
    yield case(UsageError, "invalid --dtype 'int8': choose fp64, fp32, fp16, bf16", dtype="int8")
    yield case(UsageError, "invalid --device 'tpu': this machine has cpu", device="tpu")
    yield case(UsageError, "invalid --max-shard-size 'much': write it as in 512MiB, 2GB or 4096", max_shard_size="much")
    yield case(UsageError, "--crop 64 is larger than --resize 32", crop=64)
    yield case(UsageError, "there are 1 means and 3 deviations for 3 channels", mean=[0.5])
    yield case(UsageError, "invalid --std '0.0,1.0,1.0': no deviation can be 0", std=[0.0, 1.0, 1.0])
    yield case(
        UsageError, "invalid --interpolation 'cubic': choose nearest, nearest-exact, bilinear", interpolation="cubic"
    )
    yield case(UsageError, "invalid --exif 'rotate': choose ignore, apply", exif="rotate")
    yield case(ImageError, "no such file or folder: 'nowhere'", images="nowhere")


@pytest.mark.parametrize(("changes", "error", "said"), list(bad_arguments()))
def test_an_argument_that_makes_no_sense_is_refused_and_named(
    thumbnails: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], said: str
) -> None:
    arguments = {"model": "resnet18", "layers": "fc", "images": thumbnails, "out": tmp_path / "o", **SMALL, **changes}
    with pytest.raises(error, match=said):
        extract(**arguments)
    assert list(tmp_path.iterdir()) == []


MOODY = """
import torch
from torch import nn

class Moody(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 8, 8)

    def forward(self, x):
        for image in x:
            if (image == 0.25).all():
                raise {error}
        return self.conv(x)

def net():
    return Moody()
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_a_model_that_fails_in_the_middle_of_a_run_is_an_error_with_what_it_raised(
    thumbnails: Path, tmp_path: Path, workers: int
) -> None:
    (tmp_path / "moody.py").write_text(MOODY.format(error='ValueError("too quiet")'))
    folder = tmp_path / "images"
    shutil.copytree(thumbnails, folder)
    Image.new("RGB", (32, 32), (51, 51, 51)).save(folder / "zzz.png")
    options: dict[str, Any] = {"mean": (0, 0, 0), "std": (0.8, 0.8, 0.8), "resize": 32, "crop": 32, "batch_size": 5}
    with pytest.raises(CaptureError, match=r"the model fails on a batch of 5 images: ValueError: too quiet\n"):
        extract(f"{tmp_path}/moody.py:net", "conv", folder, out=tmp_path / "out", workers=workers, **options)


def test_a_device_that_fails_ends_the_process_with_the_command_that_resumes(thumbnails: Path, tmp_path: Path) -> None:
    broken = 'RuntimeError("CUDA error: device-side assert triggered\\nand more")'
    (tmp_path / "moody.py").write_text(MOODY.format(error=broken))
    Image.new("RGB", (32, 32), (51, 51, 51)).save(tmp_path / "grey.png")
    arguments = ["extract", "-m", f"{tmp_path}/moody.py:net", "-l", "conv", "--mean", "0,0,0", "--std", "0.8,0.8,0.8"]
    arguments += ["-o", str(tmp_path / "out"), str(tmp_path / "grey.png")]
    finished = subprocess.run([sys.executable, "-m", "hookx", *arguments], capture_output=True, text=True)
    assert finished.returncode == 1 and "Traceback" not in finished.stderr
    said = "error: the device failed in the middle of a run: CUDA error: device-side assert triggered\n"
    assert said in finished.stderr
    assert finished.stderr.endswith(f"run the same command again to resume\n  {shlex.join(['hookx', *arguments])}\n")
