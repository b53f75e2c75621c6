"""On a GPU: the pixels, the activations and the copies on their way are those of plain torch on the same device."""

from __future__ import annotations

import copy
import gc
import logging
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import get_model, get_model_weights

import hookx
from hookx.capture.rows import RowCapture
from hookx.capture.runner import Runner
from hookx.check.recompute import recompute
from hookx.images.decoding import decode, decode_jpegs, model_input
from hookx.launch.extract import extract
from kit.nets import targets_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def _plain_torch_computes_as_fp32_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second routes multiply in full precision, by deterministic algorithms."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def test_pixels_are_scaled_on_the_gpu_to_the_same_bits_as_on_the_cpu(photos: Path) -> None:
    preprocessing = hookx.load_model("resnet18", "none").preprocessing
    for file in sorted(photos.rglob("*.jpg")):
        pixels_NCHW = decode(str(file), preprocessing)[0].unsqueeze(0)
        assert torch.equal(
            model_input(pixels_NCHW.to(GPU), preprocessing).cpu(), model_input(pixels_NCHW, preprocessing)
        )


@pytest.mark.parametrize("options", [{}, {"precision": "bf16"}, {"precision": "fp16", "dtype": "fp32"}])
def test_stored_activations_equal_bit_for_bit_those_of_the_same_pass_on_the_gpu(
    photos: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    layers = ["conv1", "bn1", "relu", "layer1.0.bn2", "layer4", "avgpool"]
    extract("resnet18", layers, photos, weights="none", device="cuda", out=tmp_path, batch_size=4, **options)
    features = hookx.open(tmp_path)
    channels_last = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    memory_format = channels_last[features.plan.memory_format]
    torch.manual_seed(0)
    model = get_model("resnet18", weights=None).eval().to(GPU).to(memory_format=memory_format)
    transform = get_model_weights("resnet18").DEFAULT.transforms()
    taken: dict[str, list[torch.Tensor]] = {layer: [] for layer in layers}
    for layer in layers:
        model.get_submodule(layer).register_forward_hook(lambda _m, _a, out, to=taken[layer]: to.append(out.clone()))
    keys = sorted(file.relative_to(photos).as_posix() for file in photos.rglob("*.jpg"))
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(options.get("precision", ""))
    for start in range(0, len(keys), 4):
        pixels = torch.stack([transform(Image.open(photos / key).convert("RGB")) for key in keys[start : start + 4]])
        with torch.inference_mode(), torch.autocast("cuda", autocast, enabled=autocast is not None):
            model(pixels.to(GPU).contiguous(memory_format=memory_format))
    for layer in layers:
        expected = torch.cat(taken[layer]).cpu()
        assert torch.equal(features[layer][:], expected.to(features[layer].dtype)), layer


def test_copies_on_their_way_are_out_of_reach_of_what_overwrites_a_layer_in_place() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 64, 3, padding=1)

        def forward(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
            maps = self.conv(pixels_NCHW)
            for _ in range(50):
                maps.mul_(0).add_(7)
            return maps

    net = Overwrites().eval()
    targets = targets_of(net, "conv,conv@mean23", torch.randn(3, 3, 256, 256))
    net.to(GPU)
    batches = [torch.randn(16, 3, 256, 256, generator=torch.Generator().manual_seed(n)) for n in range(6)]
    rows = [
        {str(t.address): torch.empty((16, *t.shape), pin_memory=True) for t in targets} for _ in batches
    ]  # fmt: skip
    with RowCapture(Runner.of(net), targets) as capture:
        for pixels_NCHW, places in zip(batches, rows, strict=True):
            capture.run(pixels_NCHW.to(GPU, non_blocking=True), places)
        capture.wait()
    assert capture.gpu_seconds > 0 and capture.gpu_copying_seconds > 0
    for pixels_NCHW, places in zip(batches, rows, strict=True):
        with torch.inference_mode():
            expected = net.conv(pixels_NCHW.to(GPU))
        assert torch.equal(places["conv"], expected.cpu())
        assert torch.equal(places["conv@mean23"], expected.mean((2, 3)).cpu())


def test_a_summary_says_how_busy_the_gpu_was_and_what_the_run_waited_for(photos: Path, tmp_path: Path) -> None:
    summary = extract("resnet18", "conv1,avgpool", photos, weights="none", device="cuda", out=tmp_path)
    assert summary.device.startswith("cuda") and summary.workers >= 1
    assert summary.bound_by in summary.busy and all(0 <= share <= 1 for share in summary.busy.values())
    assert summary.seconds_model > 0 and summary.seconds_copying > 0


def test_nvjpeg_moves_a_pixel_by_a_few_levels(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exact = hookx.load_model("resnet18", "none").preprocessing
    for file in sorted(map(str, photos.rglob("*.jpg"))):
        content, _ = decode(file, replace(exact, decode="nvjpeg"))
        (pixels_CHW,), refused = decode_jpegs([content], exact, GPU)
        assert not refused and pixels_CHW.device.type == "cuda"
        deviation = (pixels_CHW.cpu().int() - decode(file, exact)[0].int()).abs()
        with capsys.disabled():  # The figures of the README.
            print(f"{Path(file).name}: {deviation.float().mean():.2f} on average, {deviation.max()} at most")
        assert deviation.max() <= 48 and deviation.float().mean() < 2, file


def test_a_run_decoded_by_nvjpeg_is_close_to_the_exact_one_and_can_be_computed_again(
    photos: Path, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    shutil.copytree(photos, images)
    (images / "broken.jpg").write_bytes(b"\xff\xd8\xff" + bytes(1000) + b"\xff\xd9")
    Image.open(photos / "animals" / "chelsea.jpg").save(images / "cat.png")
    rows = {}
    for way in ("exact", "nvjpeg"):
        out = tmp_path / way
        summary = extract("resnet18", "avgpool", images, weights="none", device="cuda", decode=way, out=out)
        assert (summary.images, summary.failures) == (9, 1)
        rows[way] = hookx.open(out)["avgpool"][:]
    assert (rows["exact"] - rows["nvjpeg"]).abs().max() < 0.05 * rows["exact"].abs().max()
    again = recompute(tmp_path / "nvjpeg", 9, images, device="cuda")
    assert not again.problems and len(again.rows) == 9


# --- arithmetic --------------------------------------------------------------------------------------------------


def errors_against_float64(precision: str, memory_format: str = "contiguous") -> dict[str, float]:
    """Return each activation's largest error against the CPU in float64, relative to its largest value."""
    torch.manual_seed(0)
    net = get_model("resnet18", weights=None).eval()
    pixels_NCHW = torch.randn(4, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    targets = targets_of(net, "conv1,layer1.0.conv1,layer2,layer4.1.conv2,fc", pixels_NCHW[:3])
    exact = copy.deepcopy(net).double()
    reference: dict[str, torch.Tensor] = {}
    for target in targets:
        path = target.address.path
        exact.get_submodule(path).register_forward_hook(
            lambda _m, _a, out, to=path: reference.update({to: out.clone()})
        )
    with torch.inference_mode():
        exact(pixels_NCHW.double())
    layout = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}[memory_format]
    net.to(GPU).to(memory_format=layout)
    rows = {str(target.address): torch.empty((4, *target.shape), pin_memory=True) for target in targets}
    with RowCapture(Runner.of(net, precision=precision, memory_format=memory_format), targets) as capture:
        capture.run(pixels_NCHW.to(GPU), rows)
        capture.wait()
    return {path: float((rows[path] - out).abs().max() / out.abs().max()) for path, out in reference.items()}


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("caller", ["allows TF32", "forbids TF32"])
def test_fp32_means_fp32_and_tf32_means_tf32_whatever_the_caller_had_set(memory_format: str, caller: str) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = caller == "allows TF32"
    full, short = (errors_against_float64(precision, memory_format) for precision in ("fp32", "tf32"))
    assert max(full.values()) < 5e-6, full
    if torch.cuda.get_device_capability() >= (8, 0):
        assert max(short.values()) > 1e-4, short
    assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == (caller == "allows TF32")


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_the_same_plan_is_the_same_bytes_also_after_a_resume(photos: Path, tmp_path: Path, precision: str) -> None:
    def shards_of(out: Path) -> list[bytes]:
        options: dict[str, Any] = {"weights": "none", "device": "cuda", "batch_size": 2, "precision": precision}
        extract("resnet18", "conv1,layer4,avgpool", photos, out=out, shard_images=3, **options)
        return [shard.read_bytes() for shard in sorted(out.glob("shard-*"))]

    first = shards_of(tmp_path / "first")
    assert shards_of(tmp_path / "second") == first
    sorted((tmp_path / "first").glob("shard-*"))[1].unlink()
    assert shards_of(tmp_path / "first") == first
    (made,) = hookx.inspect(tmp_path / "first").made
    assert made["device"] == f"cuda ({torch.cuda.get_device_name()})", "without the number of the device"
    assert made["cuda"] == torch.version.cuda and made["cudnn"] == str(torch.backends.cudnn.version())
    assert made["capability"] == ".".join(map(str, torch.cuda.get_device_capability()))


def test_a_layer_without_a_deterministic_algorithm_is_named(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "ragged.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Ragged(nn.Module):\n"
        "    def forward(self, x):\n"
        "        places = torch.tensor([1, 1], device=x.device)\n"
        "        return x + x.new_zeros(4).put_(places, x.new_ones(2))[1]\n"
        "def net():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 8, 8), Ragged())\n"
    )
    with caplog.at_level(logging.WARNING, "hookx"):
        extract(f"{tmp_path / 'ragged.py'}:net", "1", photos, device="cuda", out=tmp_path / "out")
    assert any(message.startswith("'1' runs put_, which has no deterministic algorithm") for message in caplog.messages)
    assert hookx.inspect(tmp_path / "out").made[0]["nondeterministic"] == "1"


# --- memory and failures -----------------------------------------------------------------------------------------


def test_memory_that_earlier_passes_hold_is_waited_for_before_a_batch_is_halved() -> None:
    class Wide(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.repeat(1, 64, 1, 1)

    net = Wide().eval()
    targets = targets_of(net, ".", torch.randn(3, 3, 128, 128))
    pixels_NCHW = torch.randn(32, 3, 128, 128, device=GPU)
    a_pass_bytes = 32 * 192 * 128 * 128 * 4
    total_bytes = torch.cuda.get_device_properties(0).total_memory
    rows = [{".": torch.empty((32, 192, 128, 128), pin_memory=True)} for _ in range(4)]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 3.5 * a_pass_bytes) / total_bytes)
    try:
        with RowCapture(Runner(net, net, GPU, "fp32", "contiguous"), targets) as capture:
            for places in rows:
                try:
                    capture.run(pixels_NCHW, places)
                except torch.OutOfMemoryError:
                    assert capture.wait_for_all(), "passes were under way"
                    capture.run(pixels_NCHW, places)
            capture.wait()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    for places in rows:
        assert torch.equal(places["."], pixels_NCHW.repeat(1, 64, 1, 1).cpu())


def test_nothing_is_left_on_the_device_after_a_run(photos: Path, tmp_path: Path) -> None:
    allocated = []
    for name in ("first", "second"):  # The first leaves the workspace of cuBLAS behind, which stays.
        extract("resnet18", "conv1,avgpool", photos, weights="none", device="cuda", out=tmp_path / name)
        gc.collect()
        allocated.append(torch.cuda.memory_allocated())
    assert allocated[0] == allocated[1] < 64 * 2**20


FAILS_LATE = """
import os
import torch
from torch import nn

class FailsLate(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 8, 8)

    def forward(self, x):
        low, high = x.amin(), x.amax()
        if x.is_cuda and "FAIL" in os.environ:  # on an image of one grey, some time after this returns
            torch._assert_async(~((low == high) & (low > 0.1) & (low < 0.3)))
        return self.conv(x)

def net():
    torch.manual_seed(0)
    return FailsLate()
"""


def test_an_error_that_surfaces_late_ends_the_run_and_the_same_command_resumes_it(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(FAILS_LATE)
    images = tmp_path / "images"
    images.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(40):
        levels = torch.randint(0, 256, (48, 48, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(levels).save(images / f"{number:02}.png")
    Image.new("RGB", (48, 48), (51, 51, 51)).save(images / "30.png")

    def run(out: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        command = [
            *(sys.executable, "-m", "hookx", "extract", "-m", f"{tmp_path / 'late.py'}:net", "-l", "conv"),
            *("--device", "cuda", "--mean", "0,0,0", "--std", "1,1,1", "--resize", "48", "--crop", "48"),
            *("-b", "1", "--shard-images", "8", "-o", str(tmp_path / out), str(images)),
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=200, env=os.environ | environment)

    def shards(out: str) -> list[bytes]:
        return [shard.read_bytes() for shard in sorted((tmp_path / out).glob("shard-*"))]

    failed = run("out", {"FAIL": "1"})
    assert failed.returncode == 1 and "Traceback" not in failed.stderr, failed.stderr
    assert "the device failed in the middle of a run: CUDA error: device-side assert" in failed.stderr
    assert failed.stderr.endswith(
        f"run the same command again to resume\n  {shlex.join(['hookx', *failed.args[3:]])}\n"
    )
    assert len(shards("out")) < 5
    assert run("out", {}).returncode == run("uninterrupted", {}).returncode == 0
    assert shards("out") == shards("uninterrupted") and len(shards("out")) == 5


def test_two_runs_on_one_card_store_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    def start(out: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "hookx", "extract", "-m", "resnet18", "-w", "none", "-l", "layer2,avgpool"),
                *("--device", "cuda", "-q", "-o", str(tmp_path / out), str(photos)),
            ]
        )

    for process in [start("one"), start("other")]:
        assert process.wait(timeout=200) == 0
    one, other = (
        [shard.read_bytes() for shard in sorted((tmp_path / out).glob("shard-*"))] for out in ("one", "other")
    )
    assert one == other
