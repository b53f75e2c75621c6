"""The command line: read flags, call one function, print one report, return one exit code.

torch is imported by the commands that need it, so that `hookx --help` answers at once.
"""

from __future__ import annotations

import shlex
import signal
import sys
import tomllib
from fnmatch import fnmatchcase
from importlib.metadata import version as version_of
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from hookx.errors import HookxError, Interrupted, UsageError
from hookx.layers import closest

EXIT_CODES = """Exit codes: 0 done; 1 error; 2 usage; 3 done, but some images could not be read; 130 interrupted;
143 terminated."""

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
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    sys.unraisablehook = _report_unraisable
    try:
        try:
            app()
        except Exception:
            _stop_if_asked()  # A signal during an import leaves a module half made, and any error may follow.
            raise
    except HookxError as error:
        from hookx.report import printable

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


def _show_version(wanted: bool) -> None:
    if wanted:
        others = ", ".join(f"{name} {version_of(name)}" for name in ("torch", "torchvision", "safetensors", "pillow"))
        typer.echo(f"hookx {version_of('hookx-vision')} ({others})")
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

Device = Annotated[str, typer.Option("-d", "--device", help="auto, cpu, cuda, cuda:1 or mps.", **_variable("DEVICE"))]
Precision = Annotated[
    str, typer.Option("--precision", help="Arithmetic: fp32, bf16 or fp16.", **_variable("PRECISION"))
]

# What several commands take in place of the preprocessing that came with the weights.
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
    str, typer.Option("--exif", help="Rotations recorded by cameras: ignore or apply.", **_variable("EXIF"))
]


@app.command(epilog=EXIT_CODES)
def extract(
    images: Annotated[
        list[str] | None,
        typer.Argument(help="Folders (searched recursively), image files, or - for paths on standard input."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("-m", "--model", help="A model's name; hookx list-models shows them.", **_variable("MODEL")),
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            "-l", "--layers", help="Layers: paths, globs, type:Class; with commas, or repeated.", **_variable("LAYERS")
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="Layers to leave out of those.", **_variable("EXCLUDE"))
    ] = None,
    weights: Annotated[
        str,
        typer.Option(
            "-w",
            "--weights",
            help="default, a weights name, none (random, seeded), or a state-dict file.",
            **_variable("WEIGHTS"),
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
        int, typer.Option("-b", "--batch-size", help="Images a forward pass.", **_variable("BATCH_SIZE"))
    ] = 32,
    device: Device = "auto",
    workers: Annotated[
        int | None,
        typer.Option(
            "-j", "--workers", min=0, help="Decoding processes; default from the cores.", **_variable("WORKERS")
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
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="Stored type: fp32, fp16, bf16; default: as returned.", **_variable("DTYPE")),
    ] = None,
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
    """Store the activations of images; the same command again finishes what was interrupted.

    hookx extract --model resnet18 --layers conv1,avgpool images/
    """
    if not model:
        raise UsageError("no model is named", "as in --model resnet18    see them: hookx list-models")
    if not images:
        if not null:
            raise UsageError("no images are named", "give folders, files, or - to read paths from standard input")
        images = ["-"]
    from hookx import report
    from hookx.extraction import prepare, run

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
            dtype=dtype,
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
        with report.progress_of(job, quiet) as advance:

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


@app.command("list-layers", epilog=EXIT_CODES)
def list_layers(
    model: Annotated[str, typer.Argument(help="A model's name; hookx list-models shows them.")],
    weights: Annotated[
        str, typer.Option("-w", "--weights", help="The weights name, which decides the size of the input.")
    ] = "default",
    trust_checkpoint: TrustCheckpoint = False,
    model_arg: ModelArg = None,
    transform: Transform = None,
    types: Annotated[
        list[str] | None, typer.Option("--type", help="Only modules of these classes, as in Conv2d,Linear.")
    ] = None,
    paths: Annotated[
        list[str] | None, typer.Option("--filter", help="Only paths that match a glob, or contain a text.")
    ] = None,
    depth: Annotated[
        int | None, typer.Option("--depth", min=0, help="Only paths of at most this many names; 0 is the model itself.")
    ] = None,
    tree: Annotated[bool, typer.Option("--tree", help="Indent each layer beneath the one that holds it.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show what can be captured: every module, in the order of execution. Needs no weights.

    hookx list-layers resnet18
    """
    from hookx import report
    from hookx.layers import narrowed
    from hookx.models import ModelOptions, skeleton
    from hookx.probe import example_images, probe

    options = ModelOptions(trust_checkpoint=trust_checkpoint, model_args=_model_args(model_arg), transform=transform)
    bare = skeleton(model, weights, options)
    layers = probe(bare.module, example_images(bare.module, bare.preprocessing.crop_px), forward=bare.forward)
    layers = narrowed(layers, model, paths=paths or [], types=types or [], depth=depth)
    report.print_json(report.layers_document(layers)) if json else report.print_model_layers(layers, tree=tree)


@app.command("list-models", epilog=EXIT_CODES)
def list_models(
    pattern: Annotated[str, typer.Argument(help="A glob, as in 'resnet*' or 'timm:vit*'.")] = "*",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show which models can be named, a line each: kind, weights (the default first), and which are in the cache.

    hookx list-models 'resnet*'
    """
    from hookx import models, report

    known = models.list_models(pattern)
    kinds = {name: kind for name, kind in known.items() if fnmatchcase(name, pattern)}
    if not kinds:
        raise HookxError(f"no model matches '{pattern}'; closest: {closest(pattern, known)}")
    weights = {name: models.weights_of(name) for name in kinds}
    report.print_json(report.models_document(kinds, weights)) if json else report.print_models(kinds, weights)


@app.command(epilog=EXIT_CODES)
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
        typer.Option("-m", "--model", help="For --recompute: the model again, if it is not one of torchvision's."),
    ] = None,
    device: Annotated[
        str, typer.Option("-d", "--device", help="For --recompute: auto, cpu, cuda, cuda:1 or mps.")
    ] = "cpu",
    weights_key: WeightsKey = None,
    allow_missing: AllowMissing = None,
    trust_checkpoint: TrustCheckpoint = False,
    model_arg: ModelArg = None,
    transform: Transform = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Check that a run is whole, and with --recompute that it is true; name everything that is wrong.

    hookx verify features/ --recompute 10 --images images/
    """
    if recompute and not images:
        raise UsageError("the plan does not say where the images are", "name them: --images images/")
    from hookx import report
    from hookx.verification import verify

    with report.talk_on_stderr(), report.progress_of_shards() as advance:
        verification = verify(path, progress=advance)
    recomputation = None
    if recompute and verification.shards_whole:
        from hookx.models import ModelOptions
        from hookx.recomputation import recompute as recompute_rows

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


@app.command("inspect", epilog=EXIT_CODES)
def inspect_run(
    path: Annotated[Path, typer.Argument(help="The directory that hookx extract wrote.")] = Path("features"),
    stats: Annotated[
        bool, typer.Option("--stats", help="Mean, deviation, minimum, maximum, zeros, non-finite; reads everything.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show a run, finished or not: its plan, how far it has come, and what every layer holds.

    hookx inspect features/ --stats
    """
    from hookx import report
    from hookx.inspection import inspect

    with report.progress_of_shards() as advance:
        inspection = inspect(path, statistics=stats, progress=advance)
    report.print_json(report.inspection_document(inspection)) if json else report.print_inspection(inspection)


@app.command("visualize", epilog=EXIT_CODES)
def visualize_images(
    sources: Annotated[
        list[str] | None, typer.Argument(help="Image files and folders; or the directory of a run.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option("-m", "--model", help="A model's name; repeated, a row for each.")
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option("-l", "--layers", help="Layers, as in extract; of several models, once for all or once for each."),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option("-w", "--weights", help="As in extract; of several models, once for all or once for each."),
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="The directory for the pictures.")] = Path("maps"),
    channels: Annotated[str, typer.Option("--channels", help="Which channels, as in 0-63,128.")] = "",
    top: Annotated[
        int | None, typer.Option("--top", metavar="K", help="Only the K strongest channels, the strongest first.")
    ] = None,
    reduce: Annotated[
        str, typer.Option("--reduce", help="One heat map a layer: mean, max or norm of its channels.")
    ] = "",
    colormap: Annotated[
        str, typer.Option("--colormap", help="One of matplotlib's; default: viridis, and inferno for heat maps.")
    ] = "",
    attention: Annotated[
        bool, typer.Option("--attention", help="How the heads of attention look at the image, in place of activations.")
    ] = False,
    layout: Annotated[
        str, typer.Option("--layout", help="nchw, nhwc or tokens, where the model does not tell it.")
    ] = "",
    image: Annotated[
        list[str] | None, typer.Option("--image", metavar="KEY", help="Of a run: which image; can be repeated.")
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
    """Draw feature maps: a picture a layer, and an overview with a row a model and a column a depth.

    hookx visualize --model resnet18 --layers conv1,layer1,layer4 cat.jpg -o maps/
    """
    if not sources:
        raise UsageError("no image is named", "give image files or folders, or the directory of a run")
    is_run = len(sources) == 1 and (Path(sources[0]) / "plan.json").is_file()
    if is_run and (model or weights or attention):
        raise UsageError(f"{sources[0]} is a run, whose model is known and does not run again", "name images instead")
    if not is_run and (image or images):
        raise UsageError(
            "--image and --images choose from a run", "name its directory, as in hookx visualize features/"
        )
    from hookx import report
    from hookx.visualization import visualize, visualize_run

    look: dict[str, Any] = {
        "out": out,
        "channels": channels,
        "top": top,
        "reduce": reduce,
        "colormap": colormap,
        "layout": layout,
    }
    with report.talk_on_stderr(quiet), report.progress_of_pictures(quiet) as advance:

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
