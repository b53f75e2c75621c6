"""The options that several commands share."""

# No `from __future__ import annotations`: the annotations are read at run time.

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from hookx.options.option import Options, option
from hookx.options.values import (
    AnyPath,
    ChannelReduction,
    Decode,
    Device,
    Exif,
    Fit,
    InputSize,
    Interpolation,
    Launcher,
    Layout,
    Precision,
    read_arguments,
    read_channels,
    read_deviations,
    read_globs,
    read_grey_range,
    read_input_size,
    read_loader,
    read_path,
    read_shard,
    read_suffixes,
)

Progress = Callable[[int], None]
CALLED = "Called with the number finished since the last call."
DEVICE = "auto, cpu, cuda, cuda:1 or mps."
MODEL, NO_MODEL = "A model's name; hookx list-models shows them.", "no model is named"
RUN, IMAGES_OF_RUN = "What hookx extract wrote: a directory, or a URL.", "The folders and files that the run was given."
ROOT_OF_RUN = "The folder that the keys of the run are relative to, if the run had --root."
COLUMN_OF_RUN = "The column of a table, if the run had this option."
KEYS = "The image to draw, if the run holds several."


class BuildOptions(Options, title="Your own models and checkpoints", variables=True):
    """How to build a model that is not a published one."""

    trust_checkpoint: bool = option(
        "--trust-checkpoint",
        "Read a pickled module or a .pt2 file, which can run code.",
        default=False,
        variable=False,  # What was set for another program must not decide to run code.
    )
    model_args: Mapping[str, str] = option(
        "--model-arg KEY=VALUE...", "An argument for building the model.", default={}, parse=read_arguments
    )
    transform: str | None = option(
        "--transform REF", "Your own preprocessing, as in python:package.module:factory.", default=None
    )


class CheckpointOptions(BuildOptions, title="Your own models and checkpoints", variables=True):
    """How to read the file that holds a model's weights."""

    loader: str | Callable[[Any], Any] | None = option(
        "--loader REF",
        "Your own function that reads an image, as in python:package.module:function or file.py:function.",
        default=None,
        parse=read_loader,
        title="Images",
    )
    weights_key: str | None = option(
        "--weights-key KEY", "The entry of a checkpoint that holds the weights, as in model_ema.", default=None
    )
    allow_missing: Sequence[str] = option(
        "--allow-missing GLOB...", "Globs over weights that the file may lack.", default=(), parse=read_globs
    )
    ignore_unexpected: Sequence[str] = option(
        "--ignore-unexpected GLOB...",
        "Globs over tensors of the file that the model has no place for.",
        default=(),
        parse=read_globs,
    )


class SizeOptions(Options, title="Preprocessing", variables=True):
    """The size of a model's input."""

    size: InputSize | None = option(
        "--size HxW",
        "Size of the model's input in pixels, in place of --crop: 518, or 256x128 (height x width).",
        default=None,
        parse=read_input_size,
    )
    resize_positions: bool = option(
        "--resize-positions",
        "Resize the position embeddings of torchvision's vision transformers to --size.",
        default=False,
    )


class ModelOptions(CheckpointOptions, SizeOptions, title="Model", variables=True):
    """What can be said about a model beside its name and its weights.

    Example:
        >>> ModelOptions(seed=1, allow_missing="fc.*").allow_missing
        ('fc.*',)
    """

    seed: int = option("--seed N", "Seed of --weights none.", default=0)
    fit: Fit | None = option(
        "--fit NAME",
        "How an image of other proportions fits: crop its middle, squash it, or pad it with the mean colour; default: "
        "that of the weights.",
        default=None,
        title="Preprocessing",
    )

    @property
    def size_px(self) -> tuple[int, int] | None:
        """The height and the width of --size."""
        return None if self.size is None else read_input_size(self.size)


class PreprocessingOptions(Options, title="Preprocessing", variables=True):
    """What replaces parts of the preprocessing that comes with the weights; None keeps a part."""

    resize: int | None = option(
        "--resize PX", "Length of the shorter side after resizing, in pixels.", default=None, minimum=1
    )
    crop: int | None = option("--crop PX", "Side of the centre crop, in pixels.", default=None, minimum=1)
    mean: str | Sequence[float] | None = option(
        "--mean R,G,B",
        "Means of the channels, as in 0.485,0.456,0.406.",
        default=None,
        parse=read_channels,
    )
    std: str | Sequence[float] | None = option(
        "--std R,G,B",
        "Deviations of the channels, as in 0.229,0.224,0.225.",
        default=None,
        parse=read_deviations,
    )
    interpolation: Interpolation | None = option("--interpolation NAME", "How to resize: {choices}.", default=None)
    grey_range: str | Sequence[float] = option(
        "--grey-range RANGE",
        "Black and white where values have more than 8 bits: full (of their type), minmax (of each image), or two "
        "numbers, as in 0,4095.",
        default="full",
        parse=read_grey_range,
    )
    exif: Exif = option("--exif NAME", "Rotations recorded by cameras: {choices}.", default="ignore")
    decode: Decode = option(
        "--decode NAME", "exact; fast: large JPEGs at reduced scale; nvjpeg: JPEGs on a GPU.", default="exact"
    )


class ComputeOptions(Options, title="Compute", variables=True):
    """Where a model runs, and in which arithmetic."""

    device: Device = option("-d --device NAME", DEVICE, default="auto")
    precision: Precision = option("--precision NAME", "Arithmetic: {choices}.", default="fp32")


class SuffixOptions(Options, title="Images", variables=True):
    """Which files of folders and archives are images."""

    suffix: Sequence[str] = option(
        "--suffix SUFFIXES...",
        "Which files of folders and archives are images, as in .dcm,.npy; '*': all. Default: those that Pillow reads.",
        default=(),
        parse=read_suffixes,
    )


class LauncherOptions(Options, title="Many workers", variables=True):
    """Who computes: a part, the devices of this host, or a cluster."""

    shard: str | None = option(
        "--shard I/N",
        "Part I of N of the shards, numbered from 0; or all. Default: what Slurm, torchrun or Open MPI say.",
        default=None,
        parse=read_shard,
    )
    same_hardware: bool = option(
        "--same-hardware", "Compute only on the kind of machine, with the software, that began the run.", default=False
    )
    devices: str | None = option(
        "--devices LIST", "A process for each device of this host: all, 0,2,3, or cpu*4.", default=None
    )
    launcher: Launcher | None = option(
        "--launcher NAME", "Compute on a cluster: slurm submits an array of jobs, ray hands out shards.", default=None
    )
    tasks: int | None = option(
        "--tasks N", "Tasks of the array, or workers of Ray; Ray's default: all that it has.", default=None, minimum=1
    )
    at_once: int | None = option(
        "--at-once N", "Most tasks of the array that run at the same time.", default=None, minimum=1
    )
    sbatch: str = option("--sbatch OPTIONS", "Options of sbatch, as in '--gpus=1 -p a100 -t 4:00:00'.", default="")
    ray_address: str | None = option(
        "--ray-address ADDRESS",
        "A cluster of Ray; default: the one that runs here, or a new one.",
        default=None,
    )
    gpus_per_worker: float | None = option(
        "--gpus-per-worker N", "GPUs of a worker of Ray; default: 1 if the cluster has any.", default=None, minimum=0
    )


class LookOptions(Options, title="Pictures"):
    """How activations are drawn, and where to."""

    out: AnyPath = option("-o --out DIR", "The directory for the pictures.", default="maps", parse=read_path)
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
