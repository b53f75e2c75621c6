"""On a GPU: the pixels, the activations and the copies on their way are those of plain torch on the same device."""

from __future__ import annotations

import shutil
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
from hookx.run.run import extract
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
    targets = targets_of(net, "conv,conv@mean23")
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
        (pixels_CHW,) = decode_jpegs([content], exact, GPU)
        assert isinstance(pixels_CHW, torch.Tensor) and pixels_CHW.device.type == "cuda"
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
