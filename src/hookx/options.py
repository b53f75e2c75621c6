"""Every option once: its name, type, default, vocabulary, bounds and sentence of help. No torch.

An option is a field of a class below, which is a frozen dataclass. From the field follow

- the argument of the Python function: `takes` gives a function the signature of its class of options;
- the flag, `--batch-size`, what a shell completes for it, its key in a TOML file, and the reference page;
- the environment variable, `HOOKX_BATCH_SIZE`, in the classes marked with `variables=True`: those of `hookx extract`
  except what shapes one call (`CallOptions`). Other commands read the variables of the groups that they share with it.

Making a value of such a class checks its fields, so a flag, a variable, a file and a Python caller get the same error.
"""

# No `from __future__ import annotations`: the annotations are read at run time.

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Literal

from hookx.errors import UsageError
from hookx.option import Options, option
from hookx.option import takes as takes

Device = Literal["auto", "cpu", "cuda", "mps"] | str  # the words that a shell offers, or another, as in cuda:1
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
MemoryFormat = Literal["contiguous", "channels_last"]
Dtype = Literal["fp64", "fp32", "fp16", "bf16"]
Exif = Literal["ignore", "apply"]
Decode = Literal["exact", "fast", "nvjpeg"]
Interpolation = Literal["nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos"]
Layout = Literal["nchw", "nhwc", "tokens"]
ChannelReduction = Literal["mean", "max", "norm"]

AnyPath = str | os.PathLike[str]
Paths = AnyPath | Iterable[AnyPath]

# A plan and a shard have the long names, which are torch's.
DTYPE_NAMES: dict[str, str] = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

MAX_SHARD_BYTES, MAX_SHARD_IMAGES = 512 * 2**20, 4096  # unless a user says otherwise


def parse_bytes(text: str) -> int:
    """Read a size: '512MiB', '2GB', '1.5 GiB', '4096'.

    Example:
        >>> parse_bytes("512MiB"), parse_bytes("2GB"), parse_bytes("4096")
        (536870912, 2000000000, 4096)
    """
    try:
        return _read_size(text)
    except ValueError as error:
        raise UsageError(f"'{text}' is not a size; {error}") from None


def list_paths(paths: Paths) -> list[AnyPath]:
    """Return one path, or several, as a list."""
    return [paths] if isinstance(paths, str | os.PathLike) else list(paths)


def _read_size(value: str | int) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B?\s*", str(value))
    size = 0
    if match and (match[2] or not match[3]):
        power = " KMGT".index(match[2].upper() or " ")
        size = int(Fraction(match[1]) * (1024 if match[3] else 1000) ** power)
    if size == 0:
        raise ValueError("write it as in 512MiB, 2GB or 4096")
    return size


def _read_channels(value: str | Iterable[float]) -> tuple[float, ...]:
    """Read a number for red, green and blue each."""
    try:
        numbers = tuple(float(number) for number in (value.split(",") if isinstance(value, str) else value))
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 3:
        raise ValueError("give three numbers, as in 0.485,0.456,0.406")
    return numbers


def _read_deviations(value: str | Iterable[float]) -> tuple[float, ...]:
    numbers = _read_channels(value)
    if 0.0 in numbers:
        raise ValueError("no deviation can be 0")
    return numbers


def _read_arguments(value: Mapping[str, str] | Iterable[str]) -> dict[str, str]:
    if isinstance(value, Mapping):
        return dict(value)
    pairs = [text.partition("=") for text in value]
    if not all(equals for _, equals, _ in pairs):
        raise ValueError("write key=value, as in width=2")
    return {key: text for key, _, text in pairs}


def _read_globs(value: str | Iterable[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _read_dtype(name: str) -> str:
    """Return the short name of a type that may have been given by its long one."""
    return next((short for short, long in DTYPE_NAMES.items() if long == name), name)


def _ignore(count: int) -> None:
    """Report no progress."""


# --- options of several commands ------------------------------------------------------------------------------------

Progress = Callable[[int], None]
_CALLED = "Called with the number finished since the last call."
_DEVICE = "auto, cpu, cuda, cuda:1 or mps."
_MODEL, _NO_MODEL = "A model's name; hookx list-models shows them.", "no model is named"
_RUN, _IMAGES_OF_RUN = "The directory that hookx extract wrote.", "The folders and files that the run was given."
_KEYS = "The image to draw, if the run holds several."


class BuildOptions(Options, title="Your own models and checkpoints", variables=True):
    """How to build a model that is not a published one."""

    trust_checkpoint: bool = option(
        "--trust-checkpoint",
        "Read a pickled module or a .pt2 file, which can run code.",
        default=False,
        variable=False,  # What was set for another program must not decide to run code.
    )
    model_args: Mapping[str, str] = option(
        "--model-arg KEY=VALUE...", "An argument for building the model.", default={}, parse=_read_arguments
    )
    transform: str | None = option(
        "--transform REF", "Your own preprocessing, as in python:package.module:factory.", default=None
    )


class CheckpointOptions(BuildOptions, title="Your own models and checkpoints", variables=True):
    """How to read the file that holds a model's weights."""

    weights_key: str | None = option(
        "--weights-key KEY", "The entry of a checkpoint that holds the weights, as in model_ema.", default=None
    )
    allow_missing: Sequence[str] = option(
        "--allow-missing GLOB...", "Globs over weights that the file may lack.", default=(), parse=_read_globs
    )


class ModelOptions(CheckpointOptions, title="Model", variables=True):
    """What can be said about a model beside its name and its weights.

    Example:
        >>> ModelOptions(seed=1, allow_missing="fc.*").allow_missing
        ('fc.*',)
    """

    seed: int = option("--seed N", "Seed of --weights none.", default=0)


class PreprocessingOptions(Options, title="Preprocessing", variables=True):
    """What replaces parts of the preprocessing that comes with the weights; None keeps a part."""

    resize: int | None = option(
        "--resize PX", "Length of the shorter side after resizing, in pixels.", default=None, minimum=1
    )
    crop: int | None = option("--crop PX", "Side of the centre crop, in pixels.", default=None, minimum=1)
    mean: str | Sequence[float] | None = option(
        "--mean R,G,B", "Channel means, as in 0.485,0.456,0.406.", default=None, parse=_read_channels
    )
    std: str | Sequence[float] | None = option(
        "--std R,G,B", "Channel deviations, as in 0.229,0.224,0.225.", default=None, parse=_read_deviations
    )
    interpolation: Interpolation | None = option("--interpolation NAME", "How to resize: {choices}.", default=None)
    exif: Exif = option("--exif NAME", "Rotations recorded by cameras: {choices}.", default="ignore")
    decode: Decode = option(
        "--decode NAME", "exact; fast: large JPEGs at reduced scale; nvjpeg: JPEGs on a GPU.", default="exact"
    )


class ComputeOptions(Options, title="Compute", variables=True):
    """Where a model runs, and in which arithmetic."""

    device: Device = option("-d --device NAME", _DEVICE, default="auto")
    precision: Precision = option("--precision NAME", "Arithmetic: {choices}.", default="fp32")


class LookOptions(Options, title="Pictures"):
    """How activations are drawn, and where to."""

    out: AnyPath = option("-o --out DIR", "The directory for the pictures.", default="maps")
    channels: str = option("--channels RANGES", "Which channels, as in 0-63,128.", default="")
    top: int | None = option("--top K", "Only the K strongest channels, strongest first.", default=None, minimum=1)
    reduce: ChannelReduction | Literal[""] = option(
        "--reduce NAME", "One heat map a layer: {choices} of its channels.", default=""
    )
    colormap: str = option(
        "--colormap NAME", "One of matplotlib's; default: viridis, and inferno for heat maps.", default=""
    )
    layout: Layout | Literal[""] = option("--layout NAME", "{choices}, if the model does not tell.", default="")


class JsonOptions(Options, title="Options"):
    """How a command reports."""

    json: bool = option("--json", "Print one JSON document.", default=False)


class ReportOptions(JsonOptions, title="Options"):
    """How a command that writes files reports."""

    quiet: bool = option("-q --quiet", "Print only the paths of the written files.", default=False)


# --- the options of each command ------------------------------------------------------------------------------------


class ExtractOptions(ComputeOptions, PreprocessingOptions, ModelOptions, title="Output", variables=True):
    model: str = option(
        "-m --model REF",
        _MODEL,
        kw_only=False,
        required=(_NO_MODEL, "as in --model resnet18    see them: hookx list-models"),
        completed_by=("models",),
        title="Model",
    )
    layers: str | Iterable[str] = option(
        "-l --layers LAYERS...",
        "Paths, globs or type:Class, with commas between.",
        kw_only=False,
        completed_by=("layers", "model"),
        title="Layers",
    )
    images: Paths = option(
        "IMAGES...", "Folders (searched recursively), image files, or - for paths on standard input.", kw_only=False
    )
    weights: str = option(
        "-w --weights NAME",
        "default, a weights name, none (random, seeded), or a state-dict file.",
        default="default",
        completed_by=("weights", "model"),
        title="Model",
    )
    exclude: str | Iterable[str] = option(
        "--exclude LAYERS...", "Layers to leave out.", default=(), completed_by=("layers", "model"), title="Layers"
    )
    out: AnyPath = option("-o --out DIR", "The output directory.", default="features")
    dtype: Dtype | None = option(
        "--dtype NAME", "Stored type: {choices}; default: as returned.", default=None, parse=_read_dtype
    )
    max_shard_size: int | str = option(
        "--max-shard-size SIZE", "Size of the largest shard.", default="512MiB", parse=_read_size
    )
    # A shard's header names its images and is read into memory whole, so their number is bounded.
    shard_images: int = option(
        "--shard-images N", "Most images in a shard.", default=MAX_SHARD_IMAGES, minimum=1, maximum=65_536
    )
    batch_size: int | Literal["auto"] = option(
        "-b --batch-size N",
        "Images in one forward pass; auto: hookx chooses.",
        default="auto",
        minimum=1,
        title="Compute",
    )
    workers: int | None = option(
        "-j --workers N", "Worker processes; default: by the number of cores.", default=None, minimum=0, title="Compute"
    )
    self_check: int | Literal["auto", "off"] = option(
        "--self-check N",
        "Compute images of N batches again in other company, and compare; auto: by the number of images; or off.",
        default="auto",
        minimum=1,
        title="Compute",
    )
    memory_format: MemoryFormat | Literal["auto"] = option(
        "--memory-format NAME", "Memory layout: {choices}.", default="auto", title="Compute"
    )
    strict: bool = option("--strict", "Stop at the first image that cannot be read.", default=False, title="Images")
    retry_failures: bool = option(
        "--retry-failures", "Compute the images again that the run could not read.", default=False, title="Images"
    )
    decode_timeout: float = option(
        "--decode-timeout SECONDS", "Time limit for one image; 0: none.", default=60.0, minimum=0, title="Images"
    )
    progress: Progress = option("", _CALLED, default=_ignore)


class CallOptions(ReportOptions, title="Options"):
    """What shapes one call of `hookx extract`."""

    null: bool = option("-0 --null", "Paths on standard input end with NUL.", default=False, title="Images")
    config: str | None = option("--config FILE", "A TOML file whose keys are these options.", default=None)
    dry_run: bool = option("--dry-run", "Check everything, write nothing.", default=False)


class ListLayersOptions(BuildOptions, title="Layers"):
    model: str = option(
        "MODEL", _MODEL, required=(_NO_MODEL, "as in hookx list-layers resnet18"), completed_by=("models",)
    )
    weights: str = option(
        "-w --weights NAME",
        "The weights name, which decides the size of the input.",
        default="default",
        completed_by=("weights", "model"),
        title="Model",
    )
    types: Sequence[str] = option(
        "--type CLASSES...",
        "Only modules of these classes, as in Conv2d,Linear.",
        default=(),
        completed_by=("classes", "model"),
    )
    paths: Sequence[str] = option(
        "--filter GLOB...",
        "Only paths that match a glob, or contain a text.",
        default=(),
        completed_by=("layers", "model"),
    )
    depth: int | None = option(
        "--depth N", "Only paths of at most this many names; 0: the model itself.", default=None, minimum=0
    )
    tree: bool = option("--tree", "Indent each layer beneath the one that holds it.", default=False)


class ListModelsOptions(Options):
    pattern: str = option(
        "PATTERN", "A glob over names, as in 'vit*' or '*resnet50*'.", default="*", completed_by=("models",)
    )


class RecomputeOptions(CheckpointOptions, title="Recomputation"):
    """What `hookx.recompute` and `hookx verify` take."""

    path: AnyPath = option("RUN", _RUN, kw_only=False, absent="features")
    count: int = option(
        "--recompute N", "Run the model again on N random rows, and compare.", kw_only=False, minimum=0, absent=0
    )
    images: Paths = option("--images PATH...", _IMAGES_OF_RUN, kw_only=False)
    model: str | None = option(
        "-m --model REF", "The run's model again, if it is not torchvision's.", default=None, completed_by=("models",)
    )
    weights: str | None = option("-w --weights FILE", "The file of the weights, if they came from one.", default=None)
    device: Device = option("-d --device NAME", _DEVICE, default="cpu")
    seed: int | None = option("", "Seed of the choice of rows; None: another choice each time.", default=None)
    options: ModelOptions | None = option("", "Deprecated: give its fields as arguments.", default=None)


class RunOptions(Options, title="Options"):
    path: AnyPath = option("RUN", _RUN, default="features")


class InspectOptions(RunOptions, title="Options"):
    stats: bool = option(
        "--stats", "Mean, deviation, minimum, maximum, zeros, non-finite; reads everything.", default=False
    )


class LayerOfRunOptions(RunOptions, title="Layer"):
    layer: str = option(
        "-l --layer ADDRESS",
        "An address of the run; hookx inspect shows them.",
        required=("no layer is named", "as in --layer avgpool    see them: hookx inspect"),
        completed_by=("addresses", "path"),
    )


class ExportOptions(LayerOfRunOptions, title="Options"):
    to: str = option(
        "--to FILE",
        "A new file: .npy, .npz, .parquet, .h5, .mat, .csv (vectors) or .zarr.",
        required=("no file is named", "as in --to avgpool.npy"),
    )
    partial: bool = option("--partial", "Accept a run that is not finished.", default=False)


class CatOptions(LayerOfRunOptions, title="Options"):
    image: str = option(
        "-i --image KEY",
        "An image's key; index.csv lists them.",
        required=("no image is named", "as in --image KEY    index.csv lists the keys"),
        completed_by=("keys", "path"),
    )
    raw: bool = option("--raw", "Write the bytes as they are stored, little-endian.", default=False)


_SHARED = "As in extract; for several models: once for all, or once for each."


class VisualizeOptions(LookOptions, ComputeOptions, PreprocessingOptions, ModelOptions, title="Model"):
    """What `hookx.visualize` takes, and `hookx visualize` for images."""

    model: str | Sequence[str] = option(
        "-m --model REF...", "A model's name; repeated: a row for each.", kw_only=False, completed_by=("models",)
    )
    layers: str | Sequence[str] = option(
        "-l --layers LAYERS...",
        _SHARED,
        kw_only=False,
        completed_by=("layers_or_addresses", "model", "images"),
        title="Layers",
    )
    images: Paths = option("SOURCES...", "Image files and folders; or the directory of a run.", kw_only=False)
    weights: str | Sequence[str] = option(
        "-w --weights NAME...", _SHARED, default="default", completed_by=("weights", "model"), variable=True
    )
    # A picture needs no nvJPEG, and a HOOKX_DECODE that asks for it is meant for extract.
    decode: Literal["exact", "fast"] = option(
        "--decode NAME",
        "exact; fast: large JPEGs at reduced scale.",
        default="exact",
        variable=False,
        title="Preprocessing",
    )
    attention: bool = option(
        "--attention", "How the heads of attention look at the image.", default=False, title="Layers"
    )
    progress: Progress = option("", _CALLED, default=_ignore)


class StoredRunOptions(Options, title="A stored run"):
    """What `hookx visualize` takes for a run only."""

    keys: Sequence[str] = option("--image KEY...", _KEYS, default=(), completed_by=("keys", "images"))
    images_of_run: Paths = option("--images PATH...", _IMAGES_OF_RUN, default=())


class VisualizeRunOptions(LookOptions, title="A stored run"):
    """What `hookx.visualize_run` takes."""

    path: AnyPath = option("RUN", _RUN, kw_only=False)
    keys: Sequence[str] = option("--image KEY...", _KEYS, default=(), kw_only=False)
    layers: str | Sequence[str] = option("", "Addresses, or globs over them; empty: all.", default=(), kw_only=False)
    images: Paths = option("--images PATH...", _IMAGES_OF_RUN, default=())
    progress: Progress = option("", _CALLED, default=_ignore)
