"""The command line: read flags, call one function, print one report, return one exit code.

torch is imported by the commands that need it, so that `hookx --help` answers at once.
"""

from __future__ import annotations

import gc
import os
import shlex
import signal
import sys
import tomllib
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from hookx.cli import completion
from hookx.errors import HookxError, Interrupted, UsageError, closest
from hookx.options import DECODE, EXIF

EXIT_CODES = """Exit codes: 0 done; 1 error; 2 usage; 3 done, but some images could not be read; 130 interrupted;
143 terminated."""


def _examples(*commands: str) -> str:
    """Write what stands below the options in a command's help: examples, each run by a test, and the exit codes."""
    lines = "\n".join(f"  {command}" for command in commands)
    return f"\b\nExamples:\n{lines}\n\n{EXIT_CODES}"  # \b: these lines are not filled into a paragraph.


app = typer.Typer(
    help="Exact per-layer activations of vision models: a folder of images in, safetensors shards out.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode=None,  # Plain help: the same in a pipe and on a terminal, and it need not import rich.
    pretty_exceptions_enable=False,  # A mistake of the user is one line; a bug is an ordinary traceback.
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def main() -> NoReturn:
    """Run the command line, with every error in the form of the design: what, which value, what to do next."""
    if "_HOOKX_COMPLETE" in os.environ:
        completion.answer(app)
    # Importing torch makes objects by the hundred thousand, which stay; looking through them for garbage again and
    # again takes a seventh of its time.
    gc.set_threshold(100_000, 50, 50)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    sys.unraisablehook = _report_unraisable
    try:
        try:
            app()
        except SystemExit:
            from hookx.cli.report import hand_over_output

            hand_over_output()
            raise
        except Exception:
            _stop_if_asked()  # A signal during an import leaves a module half made, and any error may follow.
            raise
    except HookxError as error:
        from hookx.cli.report import printable

        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Interrupted as interrupted:
        print(f"interrupted; finish it with the same command:\n{shlex.join(['hookx', *sys.argv[1:]])}", file=sys.stderr)
        sys.exit(interrupted.exit_code)
    sys.exit(0)


_signals: list[int] = []  # the one that asked this process to stop, if one did


def _interrupt(number: int, _frame: FrameType | None) -> None:
    for either in (signal.SIGINT, signal.SIGTERM):
        signal.signal(either, signal.SIG_DFL)  # A second signal ends the process at once.
    _signals.append(number)
    raise Interrupted(number)


def _stop_if_asked() -> None:
    """Raise again what Python has swallowed: an `Interrupted` in a destructor, an import, or a fork's callback."""
    if _signals:
        raise Interrupted(_signals[0])


def _report_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    if not isinstance(unraisable.exc_value, Interrupted):
        sys.__unraisablehook__(unraisable)


def _show_version(context: typer.Context, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        from hookx.cli import report
        from hookx.cli.versions import versions

        report.print_facts(versions())
        raise typer.Exit


@app.callback()
def _hookx(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the versions and exit.")
    ] = False,
) -> None:
    pass


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the values of a TOML file the defaults of a command; flags and HOOKX_* variables are stronger."""
    if path is None:
        return None
    try:
        document = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"cannot read the configuration {path}: {error}") from None
    names = {}
    for parameter in context.command.params:
        long_names = [flag.removeprefix("--") for flag in parameter.opts if flag.startswith("--")]
        names.update(dict.fromkeys(long_names or [parameter.name or ""], parameter))
    defaults: dict[str, Any] = {}
    for key, value in document.items():
        if key not in names or key in ("config", "help"):
            raise UsageError(f"{path}: there is no option '{key}'; closest: {closest(key, names)}")
        takes_many = names[key].multiple if hasattr(names[key], "multiple") and names[key].multiple else False
        takes_many = takes_many or names[key].nargs == -1
        if isinstance(value, list) and not takes_many:
            value = ",".join(map(str, value))
        elif takes_many and not isinstance(value, list):
            value = [value]
        defaults[names[key].name or key] = value
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def _variable(name: str) -> dict[str, Any]:
    return {"envvar": f"HOOKX_{name}", "show_envvar": False}


def _completes(names: Callable[..., Iterable[str]], *parameters: str) -> dict[str, Any]:
    """Make a function of `hookx.completion` offer the values of an option, by what was said for other parameters."""

    def offered(context: typer.Context, incomplete: str) -> list[str]:
        said = dict(context.params)
        if context.args:  # Behind an option that still lacks its value, Typer leaves the arguments unread.
            said[next(p.name for p in context.command.params if p.param_type_name == "argument")] = context.args[0]
        values = [said.get(name) for name in parameters]
        # What can be said several times was, for this value, said last.
        values = [value[-1] if isinstance(value, list | tuple) and value else value or None for value in values]
        return list(names(*values, incomplete))

    return {"autocompletion": offered}


def _one_of(names: Iterable[str]) -> dict[str, Any]:
    return {"autocompletion": lambda: list(names)}


# What several commands take of a model.
Seed = Annotated[int, typer.Option("--seed", help="Seed of --weights none.", **_variable("SEED"))]
WeightsKey = Annotated[
    str | None, typer.Option("--weights-key", help="The entry of a checkpoint that holds the weights, as in model_ema.")
]
AllowMissing = Annotated[
    list[str] | None, typer.Option("--allow-missing", help="Globs over weights that a file need not hold.")
]
TrustCheckpoint = Annotated[
    bool, typer.Option("--trust-checkpoint", help="Read a pickled module or a .pt2, which can run code.")
]
ModelArg = Annotated[
    list[str] | None, typer.Option("--model-arg", help="key=value for a model of python:, timm: or hf:.")
]
Transform = Annotated[
    str | None, typer.Option("--transform", help="python:module:factory of a preprocessing of your own.")
]
Device = Annotated[
    str,
    typer.Option(
        "-d",
        "--device",
        help="auto, cpu, cuda, cuda:1 or mps.",
        **_variable("DEVICE"),
        **_one_of(completion.DEVICES),
    ),
]
Precision = Annotated[
    str,
    typer.Option(
        "--precision",
        help="Arithmetic: fp32, bf16 or fp16.",
        **_variable("PRECISION"),
        **_one_of(completion.PRECISIONS),
    ),
]

# What several commands take in place of the preprocessing that came with the weights.
Decode = Annotated[
    str,
    typer.Option(
        "--decode",
        help="exact; fast: large JPEGs at reduced scale; nvjpeg: JPEGs on a GPU.",
        **_variable("DECODE"),
        **_one_of(DECODE),
    ),
]
Resize = Annotated[
    int | None, typer.Option("--resize", help="Shorter side after resizing, in pixels.", **_variable("RESIZE"))
]
Crop = Annotated[int | None, typer.Option("--crop", help="Side of the centre crop, in pixels.", **_variable("CROP"))]
Mean = Annotated[
    str | None, typer.Option("--mean", help="Channel means, as in 0.485,0.456,0.406.", **_variable("MEAN"))
]
Std = Annotated[
    str | None, typer.Option("--std", help="Channel deviations, as in 0.229,0.224,0.225.", **_variable("STD"))
]
Interpolation = Annotated[
    str | None, typer.Option("--interpolation", help="bilinear, bicubic, nearest, ...", **_variable("INTERPOLATION"))
]
Exif = Annotated[
    str,
    typer.Option(
        "--exif",
        help="Rotations recorded by cameras: ignore or apply.",
        **_variable("EXIF"),
        **_one_of(EXIF),
    ),
]


@app.command(
    epilog=_examples(
        "hookx extract --model resnet18 --layers conv1,avgpool images/",
        "hookx extract -m vit_b_16 -l 'encoder.layers.*@cls' -o tokens --dry-run images/",
        "find images/ -name '*.jpg' | hookx extract -m resnet18 -l layer4@mean23 -o pooled -",
    )
)
def extract(
    images: Annotated[
        list[str] | None,
        typer.Argument(help="Folders (searched recursively), image files, or - for paths on standard input."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--model",
            help="A model's name; hookx list-models shows them.",
            **_variable("MODEL"),
            **_completes(completion.models),
        ),
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            "-l",
            "--layers",
            help="Layers: paths, globs, type:Class; with commas, or repeated.",
            **_variable("LAYERS"),
            **_completes(completion.layers, "model"),
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude",
            help="Layers to leave out of those.",
            **_variable("EXCLUDE"),
            **_completes(completion.layers, "model"),
        ),
    ] = None,
    weights: Annotated[
        str,
        typer.Option(
            "-w",
            "--weights",
            help="default, a weights name, none (random, seeded), or a state-dict file.",
            **_variable("WEIGHTS"),
            **_completes(completion.weights, "model"),
        ),
    ] = "default",
    seed: Seed = 0,
    weights_key: WeightsKey = None,
    allow_missing: AllowMissing = None,
    trust_checkpoint: TrustCheckpoint = False,
    model_arg: ModelArg = None,
    transform: Transform = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="The output directory.", **_variable("OUT"))] = Path(
        "features"
    ),
    batch_size: Annotated[
        str,
        typer.Option("-b", "--batch-size", help="Images a forward pass: a number, or auto.", **_variable("BATCH_SIZE")),
    ] = "auto",
    device: Device = "auto",
    workers: Annotated[
        int | None,
        typer.Option(
            "-j", "--workers", min=0, help="Worker processes; default from the cores.", **_variable("WORKERS")
        ),
    ] = None,
    decode_timeout: Annotated[
        float,
        typer.Option(
            "--decode-timeout",
            min=0,
            metavar="SECONDS",
            help="Longest time for one image; 0: any.",
            **_variable("DECODE_TIMEOUT"),
        ),
    ] = 60,
    precision: Precision = "fp32",
    memory_format: Annotated[
        str,
        typer.Option(
            "--memory-format",
            help="contiguous, channels_last or auto.",
            **_variable("MEMORY_FORMAT"),
            **_one_of(completion.MEMORY_FORMATS),
        ),
    ] = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="Stored type: fp32, fp16, bf16; default: as returned.",
            **_variable("DTYPE"),
            **_one_of(completion.DTYPES),
        ),
    ] = None,
    decode: Decode = "exact",
    resize: Resize = None,
    crop: Crop = None,
    mean: Mean = None,
    std: Std = None,
    interpolation: Interpolation = None,
    exif: Exif = "ignore",
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", help="Largest shard.", **_variable("MAX_SHARD_SIZE"))
    ] = "512MiB",
    shard_images: Annotated[
        int, typer.Option("--shard-images", help="Most images a shard.", **_variable("SHARD_IMAGES"))
    ] = 4096,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first unreadable image.", **_variable("STRICT"))
    ] = False,
    null: Annotated[bool, typer.Option("-0", "--null", help="Paths on standard input end with NUL.")] = False,
    config: Annotated[
        Path | None,
        typer.Option("--config", callback=_read_config, is_eager=True, help="A TOML file; its keys are these options."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print the finished shards' paths only.")] = False,
) -> None:
    """Store the activations of images; the same command again finishes what was interrupted."""
    if not model:
        raise UsageError("no model is named", "as in --model resnet18    see them: hookx list-models")
    if not images:
        if not null:
            raise UsageError("no images are named", "give folders, files, or - to read paths from standard input")
        images = ["-"]
    from hookx.cli import report
    from hookx.run.prepare import prepare
    from hookx.run.run import run

    with report.talk_on_stderr(quiet):
        job = prepare(
            model,
            layers or [],
            ["-0" if null and source == "-" else source for source in images],
            out=out,
            weights=weights,
            seed=seed,
            weights_key=weights_key,
            allow_missing=allow_missing or [],
            trust_checkpoint=trust_checkpoint,
            model_args=_model_args(model_arg),
            transform=transform,
            exclude=exclude or [],
            batch_size=batch_size,
            device=device,
            workers=workers,
            decode_timeout=decode_timeout,
            precision=precision,
            memory_format=memory_format,
            dtype=dtype,
            decode=decode,
            resize=resize,
            crop=crop,
            mean=_numbers("--mean", mean),
            std=_numbers("--std", std),
            interpolation=interpolation,
            exif=exif,
            max_shard_size=max_shard_size,
            shard_images=shard_images,
            strict=strict,
        )
        if dry_run:
            report.print_json(report.job_document(job)) if json else report.print_job(job)
            return
        with report.progress_of_images(job, quiet) as advance:

            def progress(images_done: int) -> None:
                advance(images_done)
                _stop_if_asked()

            summary = run(job, progress)
    if json:
        report.print_json(report.summary_document(summary))
    elif quiet:
        report.print_lines(summary.files)
    else:
        report.print_summary(summary)
    if summary.failures:
        raise typer.Exit(3)


@app.command(
    "list-layers",
    epilog=_examples(
        "hookx list-layers resnet18",
        "hookx list-layers vit_b_16 --type MultiheadAttention",
        "hookx list-layers resnet50 --depth 1 --json",
    ),
)
def list_layers(
    model: Annotated[
        str,
        typer.Argument(help="A model's name; hookx list-models shows them.", **_completes(completion.models)),
    ],
    weights: Annotated[
        str,
        typer.Option(
            "-w",
            "--weights",
            help="The weights name, which decides the size of the input.",
            **_completes(completion.weights, "model"),
        ),
    ] = "default",
    trust_checkpoint: TrustCheckpoint = False,
    model_arg: ModelArg = None,
    transform: Transform = None,
    types: Annotated[
        list[str] | None,
        typer.Option(
            "--type",
            help="Only modules of these classes, as in Conv2d,Linear.",
            **_completes(completion.classes, "model"),
        ),
    ] = None,
    paths: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            help="Only paths that match a glob, or contain a text.",
            **_completes(completion.layers, "model"),
        ),
    ] = None,
    depth: Annotated[
        int | None, typer.Option("--depth", min=0, help="Only paths of at most this many names; 0 is the model itself.")
    ] = None,
    tree: Annotated[bool, typer.Option("--tree", help="Indent each layer beneath the one that holds it.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show what can be captured: every module, in the order of execution. Needs no weights."""
    from hookx.capture.probe import example_images, probe
    from hookx.capture.runner import Runner
    from hookx.cli import report
    from hookx.layers.select import narrowed
    from hookx.models import ModelOptions, skeleton

    options = ModelOptions(trust_checkpoint=trust_checkpoint, model_args=_model_args(model_arg), transform=transform)
    bare = skeleton(model, weights, options)
    runner = Runner.of(bare.module, bare.forward)
    layers = probe(runner, example_images(runner, bare.preprocessing.crop_px))
    layers = narrowed(layers, model, paths=paths or [], types=types or [], depth=depth)
    report.print_json(report.layers_document(layers)) if json else report.print_model_layers(layers, tree=tree)


@app.command(
    "list-models",
    epilog=_examples(
        "hookx list-models",
        "hookx list-models 'vit*'",
        "hookx list-models --json '*resnet50*'",
    ),
)
def list_models(
    pattern: Annotated[
        str, typer.Argument(help="A glob, as in 'resnet*' or 'timm:vit*'.", **_completes(completion.models))
    ] = "*",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show which models can be named, a line each: kind, weights (the default first), and which are in the cache."""
    from hookx import models
    from hookx.cli import report

    known = models.list_models(pattern)
    kinds = {name: kind for name, kind in known.items() if fnmatchcase(name, pattern)}
    if not kinds:
        raise HookxError(f"no model matches '{pattern}'; closest: {closest(pattern, known)}")
    weights = {name: models.weights_of(name) for name in kinds}
    report.print_json(report.models_document(kinds, weights)) if json else report.print_models(kinds, weights)


@app.command(
    epilog=_examples(
        "hookx verify features/",
        "hookx verify features/ --recompute 3 --images images/",
        "hookx verify features/ --json",
    )
)
def verify(
    path: Annotated[Path, typer.Argument(help="The directory that hookx extract wrote.")] = Path("features"),
    recompute: Annotated[
        int, typer.Option("--recompute", min=0, metavar="N", help="Run the model again on N random rows, and compare.")
    ] = 0,
    images: Annotated[
        list[str] | None, typer.Option("--images", help="For --recompute: the folders and files of the run.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option("-w", "--weights", help="For --recompute: the file of the weights, if it was one.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--model",
            help="For --recompute: the model again, if it is not one of torchvision's.",
            **_completes(completion.models),
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            "-d",
            "--device",
            help="For --recompute: auto, cpu, cuda, cuda:1 or mps.",
            **_one_of(completion.DEVICES),
        ),
    ] = "cpu",
    weights_key: WeightsKey = None,
    allow_missing: AllowMissing = None,
    trust_checkpoint: TrustCheckpoint = False,
    model_arg: ModelArg = None,
    transform: Transform = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Check that a run is whole, and with --recompute that it is true; name everything that is wrong."""
    if recompute and not images:
        raise UsageError("the plan does not say where the images are", "name them: --images images/")
    from hookx.check.verify import verify
    from hookx.cli import report

    with report.talk_on_stderr(), report.progress_of("shards") as advance:
        verification = verify(path, progress=advance)
    recomputation = None
    if recompute and verification.shards_whole:
        from hookx.check.recompute import recompute as recompute_rows
        from hookx.models import ModelOptions

        options = ModelOptions(
            weights_key=weights_key,
            allow_missing=tuple(allow_missing or ()),
            trust_checkpoint=trust_checkpoint,
            model_args=_model_args(model_arg),
            transform=transform,
        )
        with report.talk_on_stderr():
            recomputation = recompute_rows(
                path, recompute, images or [], model=model, weights=weights, device=device, options=options
            )
    document = report.verification_document(verification, recomputation)
    report.print_json(document) if json else report.print_verification(verification, recomputation)
    if not document["ok"]:
        raise typer.Exit(1)


@app.command(
    "inspect",
    epilog=_examples(
        "hookx inspect features/",
        "hookx inspect features/ --stats",
        "hookx inspect features/ --json",
    ),
)
def inspect_run(
    path: Annotated[Path, typer.Argument(help="The directory that hookx extract wrote.")] = Path("features"),
    stats: Annotated[
        bool, typer.Option("--stats", help="Mean, deviation, minimum, maximum, zeros, non-finite; reads everything.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show a run, finished or not: its plan, how far it has come, and what every layer holds."""
    from hookx.check.inspect import inspect
    from hookx.cli import report

    with report.progress_of("shards") as advance:
        inspection = inspect(path, statistics=stats, progress=advance)
    report.print_json(report.inspection_document(inspection)) if json else report.print_inspection(inspection)


@app.command(
    "export",
    epilog=_examples(
        "hookx export features/ --layer avgpool --to avgpool.npy",
        "hookx export features/ -l avgpool --to avgpool.csv",
        "hookx export features/ -l conv1 --to conv1.npz --quiet",
    ),
)
def export_layer(
    layer: Annotated[
        str,
        typer.Option(
            "-l",
            "--layer",
            help="An address of the run; hookx inspect shows them.",
            **_completes(completion.addresses, "path"),
        ),
    ],
    to: Annotated[
        Path, typer.Option("--to", help="A new file: .npy, .npz, .parquet, .h5, .mat, .csv (vectors) or .zarr.")
    ],
    path: Annotated[Path, typer.Argument(help="The directory that hookx extract wrote.")] = Path("features"),
    partial: Annotated[bool, typer.Option("--partial", help="Accept a run that is not finished.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print the written files' paths only.")] = False,
) -> None:
    """Write one layer of a run to a file for another program; its suffix says the format."""
    from hookx.cli import report
    from hookx.exporting import export
    from hookx.read.features import open_features

    with report.talk_on_stderr(quiet):
        features = open_features(path, partial=partial)
        with report.progress_of("rows", len(features.keys_of_rows), quiet) as advance:

            def progress(rows_written: int) -> None:
                advance(rows_written)
                _stop_if_asked()

            exported = export(features, layer, to, progress=progress)
    if json:
        report.print_json(report.export_document(exported))
    elif quiet:
        report.print_lines(exported.files)
    else:
        report.print_export(exported)


@app.command(
    epilog=_examples(
        "hookx cat features/ --layer avgpool --image animals/chelsea.jpg",
        "hookx cat features/ -l avgpool -i people/astronaut.jpg | sort -g | tail -3",
        "hookx cat features/ -l conv1 -i people/astronaut.jpg --raw > conv1.f32",
    )
)
def cat(
    layer: Annotated[
        str,
        typer.Option(
            "-l",
            "--layer",
            help="An address of the run; hookx inspect shows them.",
            **_completes(completion.addresses, "path"),
        ),
    ],
    image: Annotated[
        str,
        typer.Option(
            "-i",
            "--image",
            metavar="KEY",
            help="An image's key; index.csv lists them.",
            **_completes(completion.keys, "path"),
        ),
    ],
    path: Annotated[Path, typer.Argument(help="The directory that hookx extract wrote.")] = Path("features"),
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document, the values nested.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Write the bytes as they are stored, little-endian.")] = False,
) -> None:
    """Print one activation: a number a line, or rows of numbers with a blank line between channels."""
    if json and raw:
        raise UsageError("--json and --raw are two forms of one activation", "choose one")
    if raw and sys.stdout.isatty():
        raise UsageError("--raw writes bytes, and standard output is a terminal", "send them to a file: > FILE")
    from hookx.cli import report
    from hookx.exporting import text as printing

    activation = printing.read_activation(path, layer, image)
    if raw:
        report.print_bytes(printing.as_bytes(activation.values))
    else:
        report.print_bytes(printing.as_json(activation) if json else printing.as_text(activation.values))


@app.command(
    "visualize",
    epilog=_examples(
        "hookx visualize --model resnet18 --layers conv1,layer1,layer4 images/animals/chelsea.jpg",
        "hookx visualize -m vit_b_16 --attention -l '**.*_layer_11' images/animals/chelsea.jpg",
        "hookx visualize features/ --image animals/chelsea.jpg -l conv1 --top 16 --images images/",
    ),
)
def visualize_images(
    sources: Annotated[
        list[str] | None, typer.Argument(help="Image files and folders; or the directory of a run.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "-m",
            "--model",
            help="A model's name; repeated, a row for each.",
            **_completes(completion.models),
        ),
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            "-l",
            "--layers",
            help="Layers, as in extract; of several models, once for all or once for each.",
            **_completes(completion.layers_or_addresses, "model", "sources"),
        ),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            "-w",
            "--weights",
            help="As in extract; of several models, once for all or once for each.",
            **_variable("WEIGHTS"),
            **_completes(completion.weights, "model"),
        ),
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="The directory for the pictures.")] = Path("maps"),
    channels: Annotated[str, typer.Option("--channels", help="Which channels, as in 0-63,128.")] = "",
    top: Annotated[
        int | None, typer.Option("--top", metavar="K", help="Only the K strongest channels, the strongest first.")
    ] = None,
    reduce: Annotated[
        str,
        typer.Option(
            "--reduce",
            help="One heat map a layer: mean, max or norm of its channels.",
            **_one_of(completion.CHANNEL_REDUCTIONS),
        ),
    ] = "",
    colormap: Annotated[
        str, typer.Option("--colormap", help="One of matplotlib's; default: viridis, and inferno for heat maps.")
    ] = "",
    attention: Annotated[
        bool, typer.Option("--attention", help="How the heads of attention look at the image, in place of activations.")
    ] = False,
    layout: Annotated[
        str,
        typer.Option(
            "--layout",
            help="nchw, nhwc or tokens, where the model does not tell it.",
            **_one_of(completion.LAYOUTS),
        ),
    ] = "",
    image: Annotated[
        list[str] | None,
        typer.Option(
            "--image",
            metavar="KEY",
            help="Of a run: which image; can be repeated.",
            **_completes(completion.keys, "sources"),
        ),
    ] = None,
    images: Annotated[
        list[str] | None, typer.Option("--images", help="Of a run: its folders and files, to show the inputs.")
    ] = None,
    seed: Seed = 0,
    weights_key: WeightsKey = None,
    allow_missing: AllowMissing = None,
    trust_checkpoint: TrustCheckpoint = False,
    model_arg: ModelArg = None,
    transform: Transform = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    resize: Resize = None,
    crop: Crop = None,
    mean: Mean = None,
    std: Std = None,
    interpolation: Interpolation = None,
    exif: Exif = "ignore",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print the paths of the pictures only.")] = False,
) -> None:
    """Draw feature maps: a picture a layer, and an overview with a row a model and a column a depth."""
    if not sources:
        raise UsageError("no image is named", "give image files or folders, or the directory of a run")
    is_run = len(sources) == 1 and (Path(sources[0]) / "plan.json").is_file()
    if is_run and (model or attention):
        raise UsageError(f"{sources[0]} is a run, whose model is known and does not run again", "name images instead")
    if not is_run and (image or images):
        raise UsageError(
            "--image and --images choose from a run", "name its directory, as in hookx visualize features/"
        )
    from hookx.cli import report
    from hookx.pictures.models import visualize
    from hookx.pictures.runs import visualize_run

    look: dict[str, Any] = {
        "out": out,
        "channels": channels,
        "top": top,
        "reduce": reduce,
        "colormap": colormap,
        "layout": layout,
    }
    with report.talk_on_stderr(quiet), report.progress_of("pictures", quiet=quiet) as advance:

        def progress(pictures_done: int) -> None:
            advance(pictures_done)
            _stop_if_asked()

        if is_run:
            gallery = visualize_run(
                sources[0], image or [], layers or [], images=images or [], progress=progress, **look
            )
        else:
            gallery = visualize(
                model or [],
                layers or [],
                sources,
                weights=weights or "default",
                attention=attention,
                seed=seed,
                weights_key=weights_key,
                allow_missing=allow_missing or [],
                trust_checkpoint=trust_checkpoint,
                model_args=_model_args(model_arg),
                transform=transform,
                device=device,
                precision=precision,
                resize=resize,
                crop=crop,
                mean=_numbers("--mean", mean),
                std=_numbers("--std", std),
                interpolation=interpolation,
                exif=exif,
                progress=progress,
                **look,
            )
    if json:
        report.print_json(report.gallery_document(gallery))
    elif quiet:
        report.print_lines([picture.file for picture in gallery.pictures])
    else:
        report.print_gallery(gallery)
    if gallery.failures:
        raise typer.Exit(3)


def _model_args(texts: list[str] | None) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts or []]
    if wrong := ["".join(pair) for pair in pairs if not pair[1]]:
        raise UsageError(f"--model-arg '{wrong[0]}' is not key=value", "as in --model-arg width=2")
    return {key: value for key, _, value in pairs}


def _numbers(option: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} '{text}' is not numbers with commas between, as in 0.485,0.456,0.406") from None
