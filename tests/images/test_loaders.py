"""A function of the user's own reads images that Pillow does not know, and the run treats them like any others."""

from __future__ import annotations

import dataclasses
import errno
import functools
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import nibabel
import numpy as np
import pydicom
import pytest
import tifffile
import torch
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

import hookx
from hookx.errors import HookxError, ModelError, OtherRunError, UsageError
from hookx.images.decoding import decode, model_input
from hookx.images.listing import list_images
from hookx.images.loaders import WrongResultError
from hookx.images.retries import UnavailableError
from hookx.images.unreadable import UnreadableError
from hookx.models import load_model
from hookx.models.importing import import_named
from hookx.models.loaders import load_loader
from hookx.options import ModelOptions
from hookx.plan import Preprocessing
from kit.pictures import CHELSEA, SMALL
from kit.processes import environment_for

random = np.random.default_rng(11)
Array = np.ndarray[Any, Any]
RESNET = "timm:resnet10t"
BANDS = {"mean": [0.5] * 13, "std": [0.25] * 13, "model_args": {"in_chans": "13"}}
OWN = dataclasses.replace(SMALL, loader="own")

READERS = '''
import nibabel, numpy as np, pydicom, tifffile
from PIL import Image

def dicom(file):
    """12 bits of grey, as RGB from 0 to 1."""
    scan = pydicom.dcmread(file)
    grey = scan.pixel_array.astype("float32") / (2 ** scan.BitsStored - 1)
    return np.stack([grey] * 3)

def npy(file):
    return np.load(file)

def bands(file):
    return np.moveaxis(tifffile.imread(file), -1, 0).astype("float32") / 65535

def slice_of_nifti(path):
    volume = nibabel.load(path).get_fdata()
    middle = volume[:, :, volume.shape[2] // 2]
    return np.stack([(middle - volume.min()) / (volume.max() - volume.min())] * 3)

def picture(file):
    print("opened")
    return Image.open(file)
'''


@pytest.fixture
def readers(tmp_path: Path) -> Path:
    (tmp_path / "readers.py").write_text(READERS)
    return tmp_path / "readers.py"


def write_dicom(file: Path, values: Array) -> None:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = generate_uid(), ExplicitVRLittleEndian
    scan = FileDataset(str(file), {}, file_meta=meta, preamble=bytes(128))
    scan.SOPClassUID, scan.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    scan.Rows, scan.Columns = values.shape
    scan.SamplesPerPixel, scan.PhotometricInterpretation, scan.PixelRepresentation = 1, "MONOCHROME2", 0
    scan.BitsAllocated, scan.BitsStored, scan.HighBit = 16, 12, 11
    scan.PixelData = values.astype("<u2").tobytes()
    scan.save_as(file, enforce_file_format=True)


def conv1_of(images: Any, out: Path, model: str = "resnet18", **options: Any) -> dict[str, torch.Tensor]:
    """Run a model, and return what its first layer gave for each image."""
    asked = {"weights": "none", "out": out, **options}
    hookx.extract(model, "conv1", images, **asked)
    stored = hookx.open(out)["conv1"]
    return {key: stored[number] for number, key in enumerate(stored.keys)}


# --- formats -------------------------------------------------------------------------------------------------------


def test_a_dicom_of_twelve_bits_keeps_them(readers: Path, tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    ramp = np.arange(4096).reshape(64, 64)
    write_dicom(tmp_path / "scans" / "a.dcm", ramp)
    (tmp_path / "scans" / "notes.txt").write_text("12 bits")
    pixels_CHW, _ = decode(str(tmp_path / "scans" / "a.dcm"), plain(64), loader=load(readers, "dicom"))
    assert torch.equal(pixels_CHW, torch.tensor(ramp.astype(np.float32) / 4095).expand(3, -1, -1))
    rows = conv1_of(tmp_path / "scans", tmp_path / "run", loader=f"{readers}:dicom", suffix=".dcm")
    assert list(rows) == ["a.dcm"]


def test_an_npy_of_bytes_gives_the_bits_of_the_png_that_holds_the_same(readers: Path, tmp_path: Path) -> None:
    for name in ("npy", "png"):
        (tmp_path / name).mkdir()
    for number, shape in enumerate([(300, 280, 3), (256, 256, 3), (60, 90, 3)]):
        values = random.integers(0, 256, shape, np.uint8)
        np.save(tmp_path / "npy" / f"{number}.npy", np.moveaxis(values, -1, 0))
        Image.fromarray(values).save(tmp_path / "png" / f"{number}.png")
    own = conv1_of(tmp_path / "npy", tmp_path / "own", loader=f"{readers}:npy", suffix=".npy")
    pillow = conv1_of(tmp_path / "png", tmp_path / "pillow")
    assert all(torch.equal(own[f"{number}.npy"], pillow[f"{number}.png"]) for number in range(3))
    again = conv1_of(tmp_path / "png", tmp_path / "again", loader=f"{readers}:picture")
    assert all(torch.equal(again[key], pillow[key]) for key in pillow)


def geotiffs(folder: Path, count: int = 3) -> Path:
    folder.mkdir()
    for number in range(count):
        values = random.integers(0, 65536, (70, 80, 13), np.uint16)
        tifffile.imwrite(folder / f"{number}.tif", values, photometric="minisblack", planarconfig="contig")
    return folder


def test_thirteen_bands_go_into_a_model_of_thirteen_channels(readers: Path, tmp_path: Path) -> None:
    images = geotiffs(tmp_path / "sentinel")
    rows = conv1_of(images, tmp_path / "run", RESNET, loader=f"{readers}:bands", **BANDS)
    loaded = load_model(RESNET, "none", ModelOptions(model_args={"in_chans": "13"}))
    prepared = hookx.inspect(tmp_path / "run").plan.preprocessing
    assert prepared.mean == (0.5,) * 13 and prepared.loader.startswith("readers.py:bands sha256:")
    for key, row in rows.items():
        bands = torch.tensor(tifffile.imread(images / key)).permute(2, 0, 1).to(torch.float32) / 65535
        side_px = prepared.resize_px
        size = (side_px, int(side_px * 80 / 70))
        resized = torch.nn.functional.interpolate(
            bands[None], size, mode="bicubic", antialias=True, align_corners=False
        )
        top, left = (round((side - prepared.crop_px) / 2) for side in size)
        cropped = resized[..., top : top + prepared.crop_px, left : left + prepared.crop_px].clamp(0, 1)
        conv1: Any = loaded.module.conv1
        expected = conv1(((cropped - 0.5) / 0.25).to(memory_format=torch.channels_last))[0]
        assert torch.allclose(row, expected, atol=2e-2), key


def test_the_same_rows_come_from_processes_devices_and_a_tar(readers: Path, tmp_path: Path) -> None:
    images, options = geotiffs(tmp_path / "sentinel", 5), {"loader": f"{readers}:bands", **BANDS, "shard_images": 2}
    here = conv1_of(images, tmp_path / "here", RESNET, workers=0, **options)
    assert len(here) == 5
    with tarfile.open(tmp_path / "bands.tar", "w") as tar:
        tar.add(images, arcname=".")
    for name, source, more in (
        ("workers", images, {"workers": 2}),
        ("devices", images, {"devices": "cpu*2"}),
        ("tar", tmp_path / "bands.tar", {}),
    ):
        there = conv1_of(source, tmp_path / name, RESNET, **options | more)
        assert all(torch.equal(there[key], here[key.removeprefix("bands.tar/")]) for key in there) and len(there) == 5


def test_a_slice_of_a_nifti_is_an_image(readers: Path, tmp_path: Path) -> None:
    volume = random.normal(size=(40, 50, 9)).astype(np.float32)
    (tmp_path / "brains").mkdir()
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "brains" / "a.nii.gz")
    rows = conv1_of(tmp_path / "brains", tmp_path / "run", loader=f"{readers}:slice_of_nifti", suffix=".nii.gz")
    assert list(rows) == ["a.nii.gz"] and bool(rows["a.nii.gz"].isfinite().all())


# --- what a loader gets and returns --------------------------------------------------------------------------------


def plain(side_px: int, channels: int = 3) -> Preprocessing:
    zeros, ones = (0.0,) * channels, (1.0,) * channels
    return Preprocessing(side_px, side_px, zeros, ones, "bilinear", loader="own")


def load(readers: Path, name: str) -> Callable[[Any], Any]:
    found: dict[str, Any] = {}
    exec(readers.read_text(), found)
    function: Callable[[Any], Any] = found[name]
    return function


def test_a_loose_file_is_given_as_a_path_and_a_member_as_an_open_file(tmp_path: Path) -> None:
    seen: list[Any] = []

    def note(file: str | BinaryIO) -> Array:
        seen.append(file if isinstance(file, str) else file.read())
        return np.zeros((3, 30, 30), np.uint8)

    (tmp_path / "a.bin").write_bytes(b"loose")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "a.bin", "a.bin")
    images = list_images([tmp_path / "a.bin", tmp_path / "x.tar"], suffixes=["*"])
    for file in images.files:
        decode(file, OWN, loader=note)
    assert seen == [str(tmp_path / "a.bin"), b"loose"] and list(images.keys) == ["a.bin", "x.tar/a.bin"]


@pytest.mark.parametrize(
    ("kind", "convert"),
    [
        ("uint8", lambda values: values),
        ("torch", torch.tensor),
        ("float64", lambda values: values / 255),
        ("big-endian", lambda values: (values / np.float32(255)).astype(">f4")),
        ("negative strides", lambda values: values[:, ::-1][:, ::-1]),
        ("a gradient", lambda values: torch.tensor(values / 255, requires_grad=True)),
        ("read only", lambda values: np.frombuffer(values.tobytes(), np.uint8).reshape(values.shape)),
    ],
)
def test_arrays_and_tensors_of_bytes_or_floats_are_the_same_image(kind: str, convert: Any, tmp_path: Path) -> None:
    values = random.integers(0, 256, (3, 24, 24), np.uint8)
    (tmp_path / "x").write_text(kind)
    prepared = dataclasses.replace(plain(24), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    pixels_CHW, _ = decode(str(tmp_path / "x"), prepared, loader=lambda path: convert(values))
    expected = model_input(torch.tensor(values)[None], prepared)[0]
    assert pixels_CHW.dtype == torch.float32 and torch.allclose(pixels_CHW, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (None, "the loader returned None; expected a PIL image, or an array"),
        ([1, 2], "the loader returned list; expected"),
        (np.zeros((3, 9, 9), np.uint16), "the loader returned an array of uint16; expected"),
        (np.zeros((3, 9, 9), bool), "the loader returned an array of bool; expected"),
        (torch.zeros((3, 9, 9), dtype=torch.int32), "the loader returned a tensor of int32; expected"),
        (np.full((3, 9, 9), 1.01), "the loader returned floats of 1.01 to 1.01; expected"),
        (np.full((3, 9, 9), -1e-3), "the loader returned floats of -0.001 to -0.001; expected"),
        (np.full((3, 9, 9), np.nan), "the loader returned floats of values that are not finite; expected"),
        (
            np.zeros((9, 9)),
            r"the loader returned the shape \(9, 9\); expected .*: add the channel, as in array\[None\]",
        ),
        (np.zeros((3, 0, 9)), r"the loader returned the shape \(3, 0, 9\); expected"),
        (np.zeros((1, 9, 9)), r"the loader returned 1 channel, \(1, 9, 9\); the model takes 3"),
        (np.zeros((9, 9, 3)), r"the loader returned 9 channels, .*move the channels to the front: np\.moveaxis"),
    ],
)
def test_what_is_no_image_is_the_fault_of_the_code_and_found_before_the_run(
    result: Any, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "x.bin").write_text("x")
    with pytest.raises(WrongResultError, match=reason):
        decode(str(tmp_path / "x.bin"), OWN, loader=lambda path: result)
    with pytest.raises(ModelError, match=f"--loader test_loaders.py:.*: {reason}"):
        hookx.extract(
            *("resnet18", "conv1", tmp_path / "x.bin"), weights="none", out=tmp_path / "run", loader=lambda path: result
        )
    assert not (tmp_path / "run").exists()


def test_an_image_has_three_channels_where_a_model_takes_more(tmp_path: Path) -> None:
    with pytest.raises(WrongResultError, match="has 3 channels as RGB; the model takes 13"):
        decode(str(CHELSEA), plain(24, 13), loader=Image.open)


def test_what_a_loader_raises_is_a_failure_of_the_image_without_a_path(tmp_path: Path) -> None:
    for name in ("a.bin", "b.bin"):
        (tmp_path / name).write_text(name)

    def fussy(path: str) -> Array:
        if path.endswith("a.bin"):
            raise ValueError(f"no scan in\n{path}")
        return np.zeros((3, 30, 30), np.uint8)

    summary = hookx.extract(
        *("resnet18", "conv1", tmp_path), weights="none", out=tmp_path / "run", loader=fussy, suffix=[".bin"]
    )
    assert (summary.images, summary.failures) == (1, 1)
    assert (tmp_path / "run" / "failures.csv").read_text() == "key,reason\na.bin,ValueError: no scan in the file\n"


def test_a_fault_of_the_system_is_no_failure_of_an_image(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_text("x")

    def unlucky(path: str) -> Array:
        raise OSError(errno.EIO, "Input/output error", path)

    with pytest.raises(UnavailableError, match="Input/output error"):
        decode(str(tmp_path / "x.bin"), OWN, loader=unlucky)

    def careless(path: str) -> Array:
        raise OSError("not a scan")

    with pytest.raises(UnreadableError, match="OSError: not a scan"):
        decode(str(tmp_path / "x.bin"), OWN, loader=careless)


# --- naming a loader -----------------------------------------------------------------------------------------------


def read_twice(path: str, size: int) -> None:
    """Take two arguments, which is one too many."""


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ("readers.py:nii", "'readers.py' has no 'nii'; closest: dicom, npy, bands"),
        ("readers.py", "'readers.py' does not name a function\n  write readers.py:function"),
        ("nowhere.py:read", "there is no file 'nowhere.py'"),
        ("python:no_such_package:read", "there is no module 'no_such_package'"),
        ("python:math:pi", "python:math:pi is a float; expected a function that reads an image"),
        ("python:numpy:zeros_like", "no image found"),
        (read_twice, "the loader read_twice cannot be called with one argument"),
        (len, "the loader len has no source that a plan could record"),
        (3, "invalid --loader '3': give a function, or its name, as in file.py:function"),
    ],
)
def test_a_loader_that_cannot_be_called_is_an_error_at_once(
    loader: Any, message: str, readers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images = tmp_path if message == "no image found" else CHELSEA
    with pytest.raises(HookxError) as caught:
        hookx.extract("resnet18", "conv1", images, weights="none", loader=loader)
    assert str(caught.value).startswith(message)


def test_another_source_is_another_run_and_the_error_says_so(readers: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"weights": "none", "out": tmp_path / "run", "loader": f"{readers}:picture"}
    hookx.extract("resnet18", "avgpool", CHELSEA, **options)
    assert hookx.extract("resnet18", "avgpool", CHELSEA, **options).shards_computed == 0
    readers.write_text(f"{READERS}\n# changed\n")
    with pytest.raises(OtherRunError) as caught:
        hookx.extract("resnet18", "avgpool", CHELSEA, **options)
    there, asked = (f"{where}: loader readers.py:picture sha256:" for where in ("there", "asked"))
    assert "preprocessing differ" in str(caught.value) and there in str(caught.value) and asked in str(caught.value)
    assert "resize_px" not in str(caught.value)
    with pytest.raises(OtherRunError, match=r"loader readers\.py:picture sha256:.*; asked: loader none"):
        hookx.extract("resnet18", "avgpool", CHELSEA, **options | {"loader": None})


def test_a_function_is_the_loader_that_its_file_names(readers: Path, tmp_path: Path) -> None:
    module: Any = import_named(f"{readers}:picture")
    for number, loader in enumerate((f"{readers}:picture", module, functools.partial(module))):
        hookx.extract("resnet18", "avgpool", CHELSEA, weights="none", out=tmp_path / f"{number}", loader=loader)
    plans = {hookx.inspect(tmp_path / f"{number}").plan.fingerprint for number in range(3)}
    assert len(plans) == 1
    with pytest.raises(UsageError, match="a loader that is a function cannot be sent to other processes"):
        hookx.extract(
            "resnet18", "avgpool", CHELSEA, weights="none", out=tmp_path / "x", loader=module, devices="cpu*2"
        )


def test_a_function_without_source_is_known_by_its_code() -> None:
    def made_of(text: str) -> Any:
        found: dict[str, Any] = {}
        exec(compile(text, "<typed>", "exec"), found)
        return found["read"]

    one, again, other = (f"\n\ndef read(path):\n    return {number}" for number in (1, 1, 2))
    described = [load_loader(made_of(text))[1] for text in (one, again.strip(), other)]
    assert described[0] == described[1] != described[2] and described[0].startswith("<typed>:read sha256:")


def test_channels_without_their_means_are_an_error_that_says_how_many(readers: Path, tmp_path: Path) -> None:
    images, loader = geotiffs(tmp_path / "sentinel", 1), f"{readers}:bands"
    for options, message in (
        ({"loader": loader}, "there are 3 means and 3 deviations for 13 channels\n  give as many of each as timm:"),
        ({"loader": loader, "mean": [0.5] * 13}, "there are 13 means and 3 deviations for 13 channels"),
        ({}, "takes 13 channels, and images have the 3 of RGB\n  read them with a function of your own: --loader"),
        ({"loader": loader, "decode": "fast"}, "--decode fast and --loader exclude each other"),
    ):
        with pytest.raises(UsageError, match=message):
            hookx.extract(RESNET, "conv1", images, weights="none", model_args={"in_chans": "13"}, **options)


def test_a_transform_gets_what_the_loader_returns(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import numpy as np, torch\n"
        "def read(path): return np.full((5, 40, 40), 0.25, np.float32)\n"
        "def transform(): return lambda bands: torch.as_tensor(bands)[:3, :32, :32] * 2\n"
    )
    options: dict[str, Any] = {"loader": f"{tmp_path}/own.py:read", "transform": f"{tmp_path}/own.py:transform"}
    hookx.extract("resnet18", ".", CHELSEA, weights="none", out=tmp_path / "run", **options)
    model = load_model("resnet18", "none").module
    assert torch.allclose(hookx.open(tmp_path / "run")["."][0], model(torch.full((1, 3, 32, 32), 0.5))[0], atol=1e-5)


# --- the commands --------------------------------------------------------------------------------------------------


def test_each_command_takes_the_loader(readers: Path, tmp_path: Path) -> None:
    geotiffs(tmp_path / "sentinel")
    means = ",".join(["0.5"] * 13)

    def said(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hookx", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment_for(__file__), timeout=100
        )

    model = ["-m", RESNET, "-w", "none", "--model-arg", "in_chans=13", "--mean", means, "--std", means]
    own = ["--loader", "readers.py:bands"]
    done = said("extract", *model, *own, "-l", "conv1", "-o", "run", "--json", "sentinel")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["preprocessing"]["loader"].startswith("readers.py:bands sha256:")
    name = hookx.inspect(tmp_path / "run").plan.model
    again = ["verify", "run", "--recompute", "3", "--images", "sentinel", "-m", name, "--model-arg", "in_chans=13"]
    done = said(*again, *own)
    assert done.returncode == 0 and "3 with the same bits" in done.stdout, done.stdout + done.stderr
    done = said(*again)
    assert done.returncode != 0 and "were read by readers.py:bands" in done.stderr
    done = said("visualize", *model, *own, "-l", "conv1", "-o", "maps", "sentinel")
    assert done.returncode == 0 and (tmp_path / "maps" / "overview.png").is_file(), done.stderr
    done = said("list-layers", RESNET, "--model-arg", "in_chans=13", "--json")
    assert done.returncode == 0, done.stderr


def test_what_a_loader_prints_goes_to_standard_error(readers: Path, tmp_path: Path) -> None:
    command = ["extract", "-m", "resnet18", "-w", "none", "-l", "avgpool", "-o", "run", "-q", "-j", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "hookx", *command, "--loader", f"{readers}:picture", str(CHELSEA)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment_for(__file__),
        timeout=100,
    )
    assert done.stdout == "run/shard-00000-of-00001.safetensors\n" and "opened" in done.stderr


def test_what_is_not_taken_says_how_to_read_it(tmp_path: Path) -> None:
    for name in ("a.dcm", "b.dcm", "c.nii.gz", "d.txt", "e.png"):
        (tmp_path / name).write_text("x")
    assert list_images([tmp_path]).remarks.sentences() == [
        "4 files not taken: 2 .dcm (--loader), 1 .nii.gz (--loader), 1 .txt"
    ]
    taken = list_images([tmp_path], suffixes=[".dcm", ".nii.gz"])
    assert list(taken.keys) == ["a.dcm", "b.dcm", "c.nii.gz"] and taken.remarks.not_taken == {".txt": 1, ".png": 1}
    assert len(list_images([tmp_path], suffixes=["*"])) == 5


def test_bytes_of_a_member_are_read_as_a_file_would_be(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.full((3, 30, 30), 200, np.uint8))
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        member = tarfile.TarInfo("a.npy")
        member.size = len(buffer.getvalue())
        tar.addfile(member, io.BytesIO(buffer.getvalue()))
    [file] = list_images([tmp_path / "x.tar"], suffixes=[".npy"]).files
    pixels_CHW, _ = decode(file, plain(30), loader=np.load)
    assert torch.equal(pixels_CHW, torch.full((3, 30, 30), 200 / 255))
