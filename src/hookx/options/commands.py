"""The options of each command."""

# No `from __future__ import annotations`: the annotations are read at run time.

from collections.abc import Iterable, Sequence
from typing import Literal

from hookx.options.groups import (
    CALLED,
    COLUMN_OF_RUN,
    DEVICE,
    IMAGES_OF_RUN,
    KEYS,
    MODEL,
    NO_MODEL,
    ROOT_OF_RUN,
    RUN,
    BuildOptions,
    CheckpointOptions,
    ComputeOptions,
    JsonOptions,
    LauncherOptions,
    LookOptions,
    ModelOptions,
    PreprocessingOptions,
    Progress,
    ReportOptions,
    SizeOptions,
    SuffixOptions,
)
from hookx.options.option import Options, option
from hookx.options.values import (
    MAX_SHARD_IMAGES,
    RETRY_SECONDS,
    AnyPath,
    Device,
    Dtype,
    Label,
    MemoryFormat,
    OnIOError,
    Paths,
    ignore_progress,
    read_columns,
    read_dtype,
    read_path,
    read_root,
    read_runs,
    read_size,
)


class ExtractOptions(
    SuffixOptions, LauncherOptions, ComputeOptions, PreprocessingOptions, ModelOptions, title="Output", variables=True
):
    model: str = option(
        "-m --model REF",
        MODEL,
        kw_only=False,
        required=(NO_MODEL, "as in --model resnet18    see them: hookx list-models"),
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
        "IMAGES...",
        "Folders (searched recursively), archives, tables, image files, or - for paths on standard input.",
        kw_only=False,
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
    out: AnyPath = option("-o --out DIR", "The output directory; or s3://BUCKET/RUN, gs://, az://.", default="features")
    scratch: AnyPath | None = option(
        "--scratch DIR",
        "Where shards are built that go to an object store; default: the folder for temporary files.",
        default=None,
    )
    dtype: Dtype | None = option(
        "--dtype NAME", "Stored type: {choices}; default: as returned.", default=None, parse=read_dtype
    )
    max_shard_size: int | str = option(
        "--max-shard-size SIZE", "Size of the largest shard.", default="512MiB", parse=read_size
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
    root: AnyPath | None = option(
        "--root DIR",
        "Make all keys relative to this folder; default: to each folder that is named.",
        default=None,
        parse=read_root,
        title="Images",
    )
    path_column: str | None = option(
        "--path-column NAME",
        "The column of a table that holds the paths; default: path, file_name, image or another usual name.",
        default=None,
        title="Images",
    )
    key_column: str | None = option(
        "--key-column NAME",
        "The column of a table that holds the keys; default: its paths.",
        default=None,
        title="Images",
    )
    columns: str | Sequence[str] | None = option(
        "--columns NAMES",
        "The columns of tables and sidecars to keep, as in label,split; default: all; '': none.",
        default=None,
        parse=read_columns,
        title="Images",
    )
    label: Label | None = option(
        "--label NAME",
        "parent: a column 'label' with the folder that each image is in.",
        default=None,
        title="Images",
    )
    reuse: Sequence[AnyPath] = option(
        "--reuse RUN...",
        "Runs whose rows are copied, image by image and layer by layer, so that only the rest is computed.",
        default=(),
        parse=read_runs,
    )
    append: bool = option(
        "--append", "Add images and layers to the run in --out, and compute only these.", default=False
    )
    limit: int | None = option(
        "--limit N",
        "Only the first N images, for a try; another run than that of all.",
        default=None,
        minimum=1,
        title="Images",
    )
    sample: int | None = option(
        "--sample N",
        "Only N images at random, by --seed, for a try; another run than that of all.",
        default=None,
        minimum=1,
        title="Images",
    )
    strict: bool = option("--strict", "Stop at the first image that cannot be read.", default=False, title="Images")
    retry_failures: bool = option(
        "--retry-failures", "Compute the images again that the run could not read.", default=False, title="Images"
    )
    decode_timeout: float = option(
        "--decode-timeout SECONDS", "Time limit for one image; 0: none.", default=60.0, minimum=0, title="Images"
    )
    retry_for: float = option(
        "--retry-for SECONDS",
        "How long to try again what the disk or the network cannot read now.",
        default=RETRY_SECONDS,
        minimum=0,
        title="Images",
    )
    on_io_error: OnIOError = option(
        "--on-io-error WHAT",
        "After that: stop, so that the same command goes on later; fail: a failure like any other.",
        default="stop",
        title="Images",
    )
    progress: Progress = option("", CALLED, default=ignore_progress)


class GivenOptions(Options, title="Options"):
    """Where images and options come from."""

    null: bool = option("-0 --null", "Paths on standard input end with NUL.", default=False, title="Images")
    config: str | None = option("--config FILE", "A TOML file whose keys are these options.", default=None)


class CallOptions(GivenOptions, ReportOptions, title="Options"):
    """What shapes one call of `hookx extract`."""

    dry_run: bool = option("--dry-run", "Check everything, write nothing.", default=False)


class PlanOptions(GivenOptions, JsonOptions, title="Options"):
    """What shapes one call of `hookx plan`."""

    with_list: bool = option(
        "--with-list", "Write the list of images beside the plan, so that no part lists them again.", default=False
    )
    chosen_for: Literal["cpu", "cuda", "mps"] | None = option(
        "--for DEVICE",
        "Choose batches and memory format for this kind of device, which need not be here: {choices}.",
        default=None,
    )


class ListLayersOptions(SizeOptions, BuildOptions, title="Layers"):
    model: str = option(
        "MODEL", MODEL, required=(NO_MODEL, "as in hookx list-layers resnet18"), completed_by=("models",)
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


class RecomputeOptions(SuffixOptions, CheckpointOptions, title="Recomputation"):
    """What `hookx.recompute` and `hookx verify` take."""

    path: AnyPath = option("RUN", RUN, kw_only=False, absent="features")
    count: int = option(
        "--recompute N", "Run the model again on N random rows, and compare.", kw_only=False, minimum=0, absent=0
    )
    images: Paths = option("--images PATH...", IMAGES_OF_RUN, kw_only=False)
    root: AnyPath | None = option("--root DIR", ROOT_OF_RUN, default=None)
    path_column: str | None = option("--path-column NAME", COLUMN_OF_RUN, default=None)
    key_column: str | None = option("--key-column NAME", COLUMN_OF_RUN, default=None)
    model: str | None = option(
        "-m --model REF", "The run's model again, if it is not torchvision's.", default=None, completed_by=("models",)
    )
    weights: str | None = option("-w --weights FILE", "The file of the weights, if they came from one.", default=None)
    device: Device = option("-d --device NAME", DEVICE, default="cpu")
    seed: int | None = option("", "Seed of the choice of rows; None: another choice each time.", default=None)
    options: ModelOptions | None = option("", "Deprecated: give its fields as arguments.", default=None)


class RunOptions(Options, title="Options"):
    path: AnyPath = option("RUN", RUN, default="features")


class FinishOptions(RunOptions, title="Options"):
    parts: int | None = option(
        "--parts N", "How many parts the run was cut into, to name those that are missing.", default=None, minimum=1
    )


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
        parse=read_path,
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


class VisualizeOptions(SuffixOptions, LookOptions, ComputeOptions, PreprocessingOptions, ModelOptions, title="Model"):
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
    progress: Progress = option("", CALLED, default=ignore_progress)


class StoredRunOptions(Options, title="A stored run"):
    """What `hookx visualize` takes for a run only."""

    keys: Sequence[str] = option("--image KEY...", KEYS, default=(), completed_by=("keys", "images"))
    images_of_run: Paths = option("--images PATH...", IMAGES_OF_RUN, default=())
    root: AnyPath | None = option("--root DIR", ROOT_OF_RUN, default=None)


class VisualizeRunOptions(LookOptions, title="A stored run"):
    """What `hookx.visualize_run` takes."""

    path: AnyPath = option("RUN", RUN, kw_only=False)
    keys: Sequence[str] = option("--image KEY...", KEYS, default=(), kw_only=False)
    layers: str | Sequence[str] = option("", "Addresses, or globs over them; empty: all.", default=(), kw_only=False)
    images: Paths = option("--images PATH...", IMAGES_OF_RUN, default=())
    root: AnyPath | None = option("--root DIR", ROOT_OF_RUN, default=None)
    progress: Progress = option("", CALLED, default=ignore_progress)
