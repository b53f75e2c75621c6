"""Steps of scripts/gpu-check about what moves: copies in flight, and pixels that nvjpeg decodes."""

from __future__ import annotations

import shutil
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from benchmark import largest_difference
from PIL import Image
from torch import Tensor, nn

from gpu_check.step import Report, Settings

# --- copies in flight ----------------------------------------------------------------------------------------------


class Overwrites(nn.Module):
    """Large activations, each overwritten in place many times right after it was returned."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        maps = self.relu(self.norm(self.conv(pixels_NCHW)))
        for number in range(20):
            maps.mul_(0).add_(number)
        return maps


class Load:
    """Keeps a GPU busy from several streams of this process: products of matrices, copies both ways, fresh memory."""

    def __init__(self, streams: int) -> None:
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(streams)]
        self.rounds = 0

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        torch.cuda.synchronize()

    def _work(self) -> None:
        host = torch.empty(4 * 2**20, pin_memory=True)
        with torch.cuda.stream(torch.cuda.Stream()):
            matrix = torch.randn(1024, 1024, device="cuda")
            while not self._stop.is_set():
                fresh = torch.full((4 * 2**20,), 3.0, device="cuda")  # Overwrites memory that others have freed.
                for _ in range(4):
                    matrix = (matrix @ matrix).clamp(-1, 1)
                host.copy_(fresh, non_blocking=True)
                fresh.copy_(host, non_blocking=True)
                del fresh
                torch.cuda.current_stream().synchronize()
                self.rounds += 1


def copies(settings: Settings, report: Report) -> None:
    """Compare rows that were copied while the GPU went on with a reference that was computed synchronously."""
    from conformance import arithmetic

    from hookx.capture.probe import probe
    from hookx.capture.rows import RowCapture
    from hookx.capture.runner import Runner
    from hookx.layers.select import parse_selectors, select

    images, side, passes, channels = (4, 16, 6, 4) if settings.quick else (32, 112, 240, 64)
    in_flight = 4
    torch.set_num_threads(1)  # Several steps share the cores.
    torch.manual_seed(0)
    net = Overwrites(channels).eval().to(settings.device)
    batches = [
        torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(number)).to(settings.device)
        for number in range(4)
    ]
    addresses = ["conv", "norm", "relu", "norm@mean23"]
    references: list[dict[str, Tensor]] = []
    for batch in batches:
        with torch.inference_mode(), arithmetic(batch.device.type, "fp32"):
            conv = net.conv(batch)
            norm = net.norm(conv)
            references.append({"conv": conv, "norm": norm, "relu": norm.relu(), "norm@mean23": norm.mean((2, 3))})

    runner = Runner.of(net)
    targets = select(parse_selectors(",".join(addresses)), probe(runner, batches[0][:3]), "net").targets
    memory = [
        {
            str(target.address): torch.empty((images, *target.shape), pin_memory=settings.on_gpu)
            for target in targets
        }
        for _ in range(in_flight)
    ]  # fmt: skip
    rubbish = torch.full((max(tensor.numel() for tensor in references[0].values()),), -1.0, device=settings.device)
    if settings.on_gpu:
        # Fresh memory is rare, so freed memory is used again at once, by this stream and the others.
        used = torch.cuda.memory_reserved() + 30 * images * side**2 * channels * 4
        torch.cuda.set_per_process_memory_fraction(used / torch.cuda.get_device_properties(0).total_memory)
    wrong = compared = 0
    load = Load(3) if settings.on_gpu else None

    def compare(number: int) -> None:
        nonlocal wrong, compared
        capture.wait(number + 1)
        rows, expected = memory[number % in_flight], references[number % len(batches)]
        for address in addresses:
            compared += 1
            differing = int((rows[address].to(settings.device) != expected[address]).sum())
            if differing:
                wrong += 1
                if wrong <= 3:
                    report.problems.append(f"pass {number}: {differing:,} values of '{address}' are others")
            rows[address].copy_(rubbish[: expected[address].numel()].view_as(expected[address]))  # no earlier values

    with RowCapture(runner, targets) as capture:
        if load:
            load.__enter__()
        try:
            for first in range(0, passes, in_flight):
                if report.seconds_left < 5:
                    report.left_out.append(f"{passes - first} of {passes} passes")
                    break
                # Without a pause, so that the copies of a pass meet the next passes and the memory that these reuse.
                together = range(first, min(first + in_flight, passes))
                for number in together:
                    # As in a run, the pixels are a temporary that the pass may still read when it is freed.
                    capture.run(batches[number % len(batches)].clone(), memory[number % in_flight])
                for number in together:
                    compare(number)
        finally:
            if load:
                load.__exit__()
    size = sum(row.nbytes for row in memory[0].values())
    report.figure = f"{compared:,} tensors of {passes} passes, {size / 1e6:.0f} MB each: {wrong} wrong"
    if load:
        report.figure += f"; {load.rounds:,} rounds of load beside them"
        if load.rounds < passes // 4:
            report.left_out.append("the load did not get its turn")
    report.figures = {"compared": compared, "wrong": wrong, "bytes in a pass": size}


# --- nvjpeg --------------------------------------------------------------------------------------------------------

SUBSAMPLINGS = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}
SIZES_PX = [(500, 375), (333, 251), (1023, 767), (64, 64), (17, 90)]
MOST_LEVELS_ON_AVERAGE = 2.0  # over the files of a kind
MOST_CHANGE = 0.05  # of an activation, relative to the largest value


def make_jpegs(folder: Path, photographs: list[Path]) -> dict[str, list[Path]]:
    """Save photographs as JPEGs of several kinds; return the files by kind."""
    folder.mkdir()
    by_kind: dict[str, list[Path]] = {}
    for number, file in enumerate(photographs):
        with Image.open(file) as opened:
            image = opened.convert("RGB")
        for size in SIZES_PX:
            resized = image.resize(size, Image.Resampling.BICUBIC)
            kinds: dict[str, tuple[Image.Image, dict[str, Any]]] = {
                name: (resized, {"subsampling": value, "quality": 90}) for name, value in SUBSAMPLINGS.items()
            }
            kinds["progressive"] = (resized, {"progressive": True, "quality": 90})
            kinds["quality 30"] = (resized, {"quality": 30})
            kinds["grey"] = (resized.convert("L"), {"quality": 90})
            for kind, (picture, options) in kinds.items():
                name = f"{number}-{size[0]}x{size[1]}-{kind.replace(':', '').replace(' ', '')}.jpg"
                picture.save(folder / name, **options)
                by_kind.setdefault(kind, []).append(folder / name)
    return by_kind


def nvjpeg(settings: Settings, report: Report) -> None:
    """Measure by how many levels the pixels of nvjpeg differ from Pillow's, and the activations by how much."""
    from torchvision.io import ImageReadMode, decode_jpeg

    import hookx
    from hookx.images.decoding import decode, decode_jpegs

    root = Path(__file__).resolve().parents[2] / "images"
    torch.set_num_threads(1)  # Several steps share the cores.
    photographs = sorted(root.rglob("*.jpg"))[: 1 if settings.quick else 8]
    kinds = {"photographs": photographs, **make_jpegs(settings.scratch / "jpegs", photographs[:3])}
    exact = hookx.load_model("resnet18", "none").preprocessing
    device = torch.device(settings.device)
    decoded_mean: list[float] = []
    model_mean: list[float] = []
    decoded_most = model_most = 0
    for kind, files in kinds.items():
        of_kind: list[tuple[float, int, float, int]] = []
        for file in files:
            content, _ = decode(str(file), replace(exact, decode="nvjpeg"))
            if content.ndim != 1:
                report.problems.append(f"{file.name} is not left to nvjpeg")
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ours = decode_jpeg(content, ImageReadMode.RGB, device).cpu().int()
            with Image.open(file) as image:
                pillow = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).int()
            (pixels_CHW,), refused = decode_jpegs([content], exact, device)
            if refused:
                report.problems.append(f"{file.name}: {refused[0]}")
                continue
            raw = (ours - pillow).abs()
            scaled = (pixels_CHW.cpu().int() - decode(str(file), exact)[0].int()).abs()
            of_kind.append((float(raw.float().mean()), int(raw.max()), float(scaled.float().mean()), int(scaled.max())))
        if of_kind:
            columns = list(zip(*of_kind, strict=True))
            report.figures[kind] = {
                "decoded": {"mean": sum(columns[0]) / len(of_kind), "max": max(columns[1])},
                "resized": {"mean": sum(columns[2]) / len(of_kind), "max": max(columns[3])},
                "worst file": {"mean decoded": max(columns[0]), "mean resized": max(columns[2])},
            }
            decoded_mean += map(float, columns[0])
            model_mean += map(float, columns[2])
            decoded_most, model_most = max(decoded_most, *columns[1]), max(model_most, *columns[3])
            report.lines.append(
                f"nvjpeg, {kind}: decoded {sum(columns[0]) / len(of_kind):.2f} levels on average, {max(columns[1])} at "
                f"most; resized and cropped {sum(columns[2]) / len(of_kind):.2f} and {max(columns[3])}"
            )
            if sum(columns[2]) / len(of_kind) > MOST_LEVELS_ON_AVERAGE:
                report.problems.append(f"{kind}: {sum(columns[2]) / len(of_kind):.2f} levels on average")
        report.save()
    if not decoded_mean:
        return
    report.figure = (
        f"{len(decoded_mean)} files: {sum(decoded_mean) / len(decoded_mean):.2f} levels on average, {decoded_most} at "
        f"most; after resizing {sum(model_mean) / len(model_mean):.2f} and {model_most}"
    )
    if not settings.on_gpu:
        return
    rows = {}
    way: Literal["exact", "nvjpeg"]
    for way in ("exact", "nvjpeg"):
        out = settings.scratch / way
        hookx.extract(
            *("resnet18", "layer1@mean23,avgpool", settings.scratch / "jpegs"),
            weights="none",
            device=settings.device,
            decode=way,
            workers=4,
            out=out,
        )
        rows[way] = out
    change = largest_difference(rows["exact"], rows["nvjpeg"])
    report.figures["activations"] = change
    report.figure += f"; activations change by up to {change:.1%}"
    if change > MOST_CHANGE:
        report.problems.append(f"activations change by {change:.1%} of a row's largest value")
    shutil.rmtree(settings.scratch / "jpegs")
