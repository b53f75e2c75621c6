"""Too little memory, and values that a person should know of."""

from __future__ import annotations

import logging
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import ResNet

import hookx
from hookx.capture.rows import RowCapture
from hookx.capture.runner import Runner
from hookx.errors import HookxError
from kit import nets
from kit.nets import images, targets_of

LAYERS = "conv1,layer1@mean23"


def run(folder: Path, out: Path, **options: Any) -> hookx.Summary:
    # The passes are counted below.
    options = {"weights": "none", "resize": 32, "crop": 32, "workers": 0, "self_check": "off", **options}
    return hookx.extract("resnet18", options.pop("layers", LAYERS), folder, out=out, **options)


def limit_the_memory(monkeypatch: pytest.MonkeyPatch, most_images: int) -> list[int]:
    """Let ResNets run out of memory above a size, halfway through the pass; return the sizes of the passes."""
    sizes: list[int] = []
    forward = ResNet._forward_impl

    def limited(self: ResNet, x: Tensor) -> Tensor:
        if x.is_meta:
            return forward(self, x)
        sizes.append(len(x))
        if len(x) > most_images:
            self.relu(self.bn1(self.conv1(x)))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, x)

    monkeypatch.setattr(ResNet, "_forward_impl", limited)
    return sizes


def test_out_of_memory_halves_the_batch_says_so_and_goes_on(
    thumbnails: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run(thumbnails, tmp_path / "whole", batch_size=16)
    sizes = limit_the_memory(monkeypatch, 4)
    with caplog.at_level(logging.WARNING, "hookx"):
        halved = run(thumbnails, tmp_path / "halved", batch_size=16)
    assert sizes[sizes.index(16) :] == [
        16,
        8,
        4,
        4,
        4,
        4,
        4,
        4,
    ]  # after the probe; it does not try the large ones again
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory with 16 images at once: going on with 8",
        "out of memory with 8 images at once: going on with 4",
    ]
    assert halved.images == whole.images == 24 and halved.counts == whole.counts
    for address in hookx.open(tmp_path / "whole"):
        one, other = (hookx.open(tmp_path / name)[address].torch() for name in ("whole", "halved"))
        torch.testing.assert_close(one, other)


def test_too_little_memory_for_one_image_is_an_error_and_not_a_loop(
    thumbnails: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_the_memory(monkeypatch, 0)
    with pytest.raises(HookxError, match="too little memory for 3 images at once: CUDA out of memory"):
        run(thumbnails, tmp_path / "probe")
    monkeypatch.undo()
    sizes = limit_the_memory(monkeypatch, 3)
    monkeypatch.setattr(RowCapture, "run", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")))
    with pytest.raises(HookxError, match="too little memory for 1 images at once: no memory"):
        run(thumbnails, tmp_path / "run")
    assert max(sizes) == 5 and not list((tmp_path / "run").glob("shard-*"))


class Odd(nn.Module):
    """The first image becomes zeros, the second has a NaN, the third an infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.odd = False

    def forward(self, x: Tensor) -> Tensor:
        if self.odd:
            x = x.clone()
            x[0], x[1, 0, 0, 0], x[2, 2, 3, 3] = 0.0, float("nan"), float("-inf")
        return self.layer(x)


@pytest.mark.parametrize("address", ["layer", "layer@flatten", "layer@max123"])
def test_images_with_non_finite_or_all_zero_activations_are_counted(address: str) -> None:
    net = Odd().eval()
    targets = targets_of(net, address)
    net.odd = True
    pixels = images(5)
    with RowCapture(Runner.of(net), targets) as capture:
        for _ in range(2):
            capture.run(pixels, {address: torch.empty(5, *targets[0].shape)})
    expected = {"non_finite": 4, "all_zero": 2} if address != "layer@max123" else {"non_finite": 2, "all_zero": 2}
    assert capture.take_counts() == {address: expected}
    assert capture.take_counts() == {}


def test_values_that_the_stored_type_makes_infinite_or_zero_are_counted() -> None:
    net = nn.Sequential(nn.Identity())
    targets = targets_of(net, "0", torch.ones(3, 3, 2, 2))
    pixels = torch.ones(2, 3, 2, 2)
    pixels[0, 0], pixels[1, 0, 0, 0], pixels[1, 1] = 1e6, 1e-30, 0.0
    with RowCapture(Runner.of(net), targets) as capture:
        capture.run(pixels, {"0": torch.empty(2, 3, 2, 2, dtype=torch.float16)})
    assert capture.take_counts() == {"0": {"overflowed": 4, "flushed": 1}}


def test_counts_survive_a_resume_and_ordinary_values_are_not_mentioned(thumbnails: Path, tmp_path: Path) -> None:
    summary = run(thumbnails, tmp_path, layers="conv1,relu@min123", shard_images=8)
    assert summary.counts == {"relu@min123": {"all_zero": 24}}  # A ReLU's least value is 0.
    (tmp_path / "shard-00001-of-00003.safetensors").unlink()
    assert run(thumbnails, tmp_path, layers="conv1,relu@min123", shard_images=8).counts == summary.counts


MEMORY = """
import sys
from pathlib import Path
import hookx
from resource import RUSAGE_SELF, getrusage
out, folder = map(Path, sys.argv[1:3])
hookx.extract("resnet18", "maxpool@mean23", folder, out=out, weights="none", resize=8, crop=8, workers=1,
              batch_size=64, shard_images=500)
print(getrusage(RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_resident_memory_does_not_grow_from_1_000_to_20_000_images(tmp_path: Path, photos: Path) -> None:
    from PIL import Image

    kilobytes = {}
    for count in (1_000, 20_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        with Image.open(photos / "animals" / "chelsea.jpg") as image:
            image.resize((8, 8)).save(folder / "first.png")
        for number in range(count - 1):
            (folder / f"{number:06}.png").hardlink_to(folder / "first.png")
        command = [sys.executable, "-c", MEMORY, str(tmp_path / f"out-{count}"), str(folder)]
        kilobytes[count] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert kilobytes[20_000] - kilobytes[1_000] < 19_000 * 0.5  # half a kilobyte an image, while the list is sorted
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss > 100_000  # it was measured


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_gpu_that_runs_out_of_memory_goes_on_with_smaller_batches(thumbnails: Path, tmp_path: Path) -> None:
    torch.cuda.set_per_process_memory_fraction(2e9 / torch.cuda.get_device_properties(0).total_memory)
    try:
        small = run(thumbnails, tmp_path, device="cuda", crop=1024, resize=1024, batch_size=24, layers="layer1@mean23")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert small.images == 24


def test_a_pass_that_runs_out_of_memory_is_not_counted_twice() -> None:
    net = nets.InPlace().eval()
    targets = targets_of(net, "conv,relu")
    rows = {"conv": torch.empty(2, 4, 8, 8), "relu": torch.empty(2, 4, 8, 8)}
    with RowCapture(Runner.of(net), targets) as capture:
        handle = net.relu.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
        pixels = torch.full((2, 3, 8, 8), float("nan"))
        with pytest.raises(torch.OutOfMemoryError):
            capture.run(pixels, rows)
        handle.remove()
        capture.run(pixels, rows)
    assert capture.take_counts() == {"conv": {"non_finite": 2}, "relu": {"non_finite": 2}}


def test_every_shard_begins_with_whole_batches_however_small_they_had_to_be_before(
    thumbnails: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = limit_the_memory(monkeypatch, 4)
    run(thumbnails, tmp_path / "resumed", batch_size=8, shard_images=8, self_check="off")
    assert sizes[sizes.index(8) :] == [8, 4, 4] * 3
    shards = sorted((tmp_path / "resumed").glob("shard-*"))
    contents = [shard.read_bytes() for shard in shards]
    shards[1].unlink()
    run(thumbnails, tmp_path / "resumed", batch_size=8, shard_images=8, self_check="off")
    assert [shard.read_bytes() for shard in shards] == contents
    made = [origin["batch_size"] for origin in hookx.inspect(tmp_path / "resumed").made]
    assert made == [4], "what a shard says of itself is the batch that ran"


def test_a_device_without_memory_for_the_pixels_of_a_batch_takes_fewer(
    thumbnails: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    move = Tensor.to

    def limited(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.dtype == torch.uint8 and self.ndim == 4 and len(self) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return move(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", limited)
    with caplog.at_level(logging.WARNING, "hookx"):
        assert run(thumbnails, tmp_path, batch_size=8).images == 24
    assert "out of memory with 8 images at once: going on with 4" in caplog.messages
