"""The commands: check how the options fit together, call one function of hookx, report.

They import what they call when they run, because most of it imports torch.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import typer

from hookx import options as given
from hookx.cli.options import command
from hookx.cli.streams import print_bytes, report, show_progress, talk_on_stderr
from hookx.errors import HookxError, UsageError, closest
from hookx.options import JsonOptions, LookOptions, ReportOptions, list_paths


@command(
    "extract",
    "hookx extract --model resnet18 --layers conv1,avgpool images/",
    "hookx extract -m vit_b_16 -l 'encoder.layers.*@cls' -o tokens --dry-run images/",
    "find images/ -name '*.jpg' | hookx extract -m resnet18 -l layer4@mean23 -o pooled -",
)
def extract(options: given.ExtractOptions, call: given.CallOptions) -> None:
    """Store the activations of images; the same command again finishes what was interrupted."""
    options = _with_sources(options, call)
    from hookx.cli import run_reports
    from hookx.launch.extract import begin_run, check_run
    from hookx.run.parts import as_told

    with talk_on_stderr(call.quiet):
        if options.launcher == "slurm":
            _submit(options, call)
            return
        options = as_told(options) if options.launcher is None else options
        if call.dry_run:
            # Also with --quiet: no files are written whose paths could be printed.
            job = check_run(options)
            report(JsonOptions(json=call.json), run_reports.describe_job, run_reports.print_job, job)
            return
        with begin_run(options) as begun:
            images, done = begun.image_count, begun.images_done
            with show_progress("images", images, done=done, quiet=call.quiet, leave=True) as advance:
                summary = begun.run(advance)
    report(call, run_reports.describe_summary, run_reports.print_summary, summary, files=summary.files)
    if not summary.images and summary.part is None:
        raise _nothing_stored(summary.out)
    # A part that ended with 3 would stop the others: torchrun ends all, Slurm starts nothing that depends on it.
    if summary.failures and summary.part is None:
        raise typer.Exit(3)


def _nothing_stored(out: str) -> HookxError:
    return HookxError(f"no image could be read, so {out}/ holds no row", f"{out}/failures.csv says why")


def _submit(options: given.ExtractOptions, call: given.CallOptions) -> None:
    """Check a run here, and submit it to Slurm; with --dry-run, print its scripts."""
    from hookx.cli import run_reports
    from hookx.launch import slurm
    from hookx.launch.extract import check_run

    slurm.check_options(options)
    job = check_run(options)
    submission = slurm.describe_submission(job, job.images.files)
    if not job.pending:
        raise HookxError(f"{job.out}/ has all of its shards", f"there is nothing to submit: hookx finish {job.out}")
    if not call.dry_run:
        submission = slurm.submit(submission)
    files = [str(file) for file in submission.scripts]
    report(call, run_reports.describe_submission, run_reports.print_submission, submission, files=files)


def _with_sources(options: given.ExtractOptions, call: given.GivenOptions) -> given.ExtractOptions:
    """Return the options with what standard input is to be read as; `UsageError` if no images are named."""
    sources = list_paths(options.images)
    if not sources and not call.null:
        raise UsageError("no images are named", "give folders, files, or - to read paths from standard input")
    if call.null:
        sources = ["-0" if source == "-" else source for source in sources or ["-"]]
    return replace(options, images=sources)


@command(
    "plan",
    "hookx plan --model resnet18 --layers conv1,avgpool -o features images/",
    "hookx plan -m vit_b_16 -l 'encoder.layers.*@cls' -o tokens --for cuda images/",
    "find images/ -name '*.jpg' | hookx plan -m resnet18 -l layer4@mean23 -o pooled --json -",
)
def plan(options: given.ExtractOptions, call: given.PlanOptions) -> None:
    """Begin a run and compute nothing: check everything, fetch the weights, write plan.json.

    Several processes then compute it, each with hookx extract --shard I/N.
    """
    options = _with_sources(options, call)
    from hookx.cli import run_reports
    from hookx.run.run import plan

    with talk_on_stderr():
        job = plan(options, call.chosen_for, with_list=call.with_list)
    report(call, run_reports.describe_job, partial(run_reports.print_job, is_begun=True), job)


@command("status", "hookx status features/", "hookx status features/ --json", "hookx status features/ | grep shards")
def status(options: given.RunOptions, form: JsonOptions) -> None:
    """Show how far a run is, who computes it, how fast, and how long it will take. Opens no shard."""
    from hookx.check.status import status
    from hookx.cli import run_reports

    report(form, run_reports.describe_status, run_reports.print_status, status(options.path))


@command("finish", "hookx finish features/", "hookx finish features/ --parts 16", "hookx finish features/ --json")
def finish(options: given.FinishOptions, form: JsonOptions) -> None:
    """Complete a run of many processes: write index.csv and failures.csv, and remove what killed processes left.

    The last part does so too, unless its file system shows the others' shards late.
    """
    from hookx.check.finish import finish
    from hookx.cli import run_reports

    with talk_on_stderr(), show_progress("shards") as advance:
        finished = finish(options.path, options.parts, progress=advance)
    report(form, run_reports.describe_finished, run_reports.print_finished, finished)
    if not finished.totals.rows:
        raise _nothing_stored(finished.path)
    if finished.totals.failures:
        raise typer.Exit(3)


@command(
    "list-layers",
    "hookx list-layers resnet18",
    "hookx list-layers vit_b_16 --type MultiheadAttention",
    "hookx list-layers resnet50 --depth 1 --json",
)
def list_layers(options: given.ListLayersOptions, form: JsonOptions) -> None:
    """Show what can be captured: every module in execution order. Needs no weights."""
    from hookx.capture.probe import example_images, probe
    from hookx.capture.runner import Runner
    from hookx.cli import reports
    from hookx.layers.select import narrow
    from hookx.models import borrowed_models, skeleton
    from hookx.run.ready import explaining_size

    with borrowed_models():
        said = options.values_of(given.BuildOptions) | options.values_of(given.SizeOptions)
        bare = skeleton(options.model, options.weights, given.ModelOptions(**said))
        runner = Runner.of(bare.module, bare.forward)
        prepared = bare.preprocessing
        statistics = (prepared.mean, prepared.std)
        if bare.channels not in (None, len(prepared.mean)):
            statistics = ((0.5,) * bare.channels, (0.5,) * bare.channels)
        examples_NCHW = example_images(runner, prepared.size_px, *statistics)
        with explaining_size(options.model, prepared):
            layers = probe(runner, examples_NCHW, why_never_called=bare.why_never_called, attention=None)
    layers = narrow(layers, options.model, paths=options.paths, types=options.types, depth=options.depth)
    report(form, reports.describe_layers, partial(reports.print_model_layers, tree=options.tree), layers)


@command("list-models", "hookx list-models", "hookx list-models 'vit*'", "hookx list-models --json '*resnet50*'")
def list_models(options: given.ListModelsOptions, form: JsonOptions) -> None:
    """Show the models that can be named: kind, weights (the default first), and which are in the cache."""
    from hookx import models
    from hookx.cli import reports

    known = models.list_models(options.pattern)
    kinds = {name: kind for name, kind in known.items() if fnmatchcase(name, options.pattern)}
    if not kinds:
        raise HookxError(f"no model matches '{options.pattern}'; closest: {closest(options.pattern, known)}")
    weights = {name: models.weights_of(name) for name in kinds}
    report(form, reports.describe_models, reports.print_models, kinds, weights)


@command(
    "verify",
    "hookx verify features/",
    "hookx verify features/ --recompute 3 --images images/",
    "hookx verify features/ --json",
)
def verify(options: given.RecomputeOptions, form: JsonOptions) -> None:
    """Check that a run is whole and, with --recompute, that it is true; list everything that is wrong."""
    if options.count and not options.images:
        raise UsageError("the plan does not say where the images are", "name them: --images images/")
    from hookx.check.verify import verify
    from hookx.cli import reports

    with talk_on_stderr(), show_progress("shards") as advance:
        found = verify(options.path, progress=advance)
    again = None
    if options.count and found.shards_whole:
        from hookx.check.recompute import recompute

        with talk_on_stderr():
            again = recompute(**vars(options))
    report(form, reports.describe_verification, reports.print_verification, found, again)
    if reports.problems_of(found, again):
        raise typer.Exit(1)


@command("inspect", "hookx inspect features/", "hookx inspect features/ --stats", "hookx inspect features/ --json")
def inspect(options: given.InspectOptions, form: JsonOptions) -> None:
    """Show a run, finished or not: its plan, its progress, and what every layer holds."""
    from hookx.check.inspect import inspect
    from hookx.cli import reports

    with show_progress("shards") as advance:
        inspection = inspect(options.path, statistics=options.stats, progress=advance)
    report(form, reports.describe_inspection, reports.print_inspection, inspection)


@command(
    "export",
    "hookx export features/ --layer avgpool --to avgpool.npy",
    "hookx export features/ -l avgpool --to avgpool.csv",
    "hookx export features/ -l conv1 --to conv1.npz --quiet",
)
def export(options: given.ExportOptions, form: ReportOptions) -> None:
    """Write one layer of a run to a file for another program; the suffix chooses the format."""
    from hookx.cli import reports
    from hookx.exporting import export
    from hookx.read.features import open_features

    with talk_on_stderr(form.quiet):
        features = open_features(options.path, partial=options.partial)
        with show_progress("rows", len(features.keys_of_rows), quiet=form.quiet) as advance:
            exported = export(features, options.layer, options.to, progress=advance)
    report(form, asdict, reports.print_export, exported, files=exported.files)


@command(
    "cat",
    "hookx cat features/ --layer avgpool --image animals/chelsea.jpg",
    "hookx cat features/ -l avgpool -i people/astronaut.jpg | sort -g | tail -3",
    "hookx cat features/ -l conv1 -i people/astronaut.jpg --raw > conv1.f32",
)
def cat(options: given.CatOptions, form: JsonOptions) -> None:
    """Print one activation: a number a line, or rows of numbers with a blank line between channels."""
    if form.json and options.raw:
        raise UsageError("--json and --raw exclude each other", "choose one")
    if options.raw and sys.stdout.isatty():
        raise UsageError("--raw writes bytes, and standard output is a terminal", "send them to a file: > FILE")
    from hookx.exporting import printing
    from hookx.store.format import bytes_of

    activation = printing.read_activation(options.path, options.layer, options.image)
    if options.raw:
        print_bytes([bytes_of(activation.values)])
    else:
        print_bytes(printing.to_json(activation) if form.json else printing.to_text(activation.values))


def _holds_a_run(source: given.AnyPath) -> bool:
    """Whether a source of images is a run instead; both may lie behind a URL."""
    from hookx.images.addresses import is_url, parse_url
    from hookx.store.files import report_read_errors
    from hookx.store.location import location_of
    from hookx.store.objects.path import SCHEMES

    name = os.fspath(source)
    if is_url(os.fsencode(name)):
        address = parse_url(name)
        if address.scheme not in SCHEMES or "." in address.key.rpartition("/")[2] or not address.key.strip("/"):
            return False  # Neither a web server nor the root of a bucket holds runs, and a file is not one.
    location = location_of(source)
    if isinstance(location, Path):
        return (location / "plan.json").is_file()
    with report_read_errors(location):
        return (location / "plan.json").exists()


@command(
    "visualize",
    "hookx visualize --model resnet18 --layers conv1,layer1,layer4 images/animals/chelsea.jpg",
    "hookx visualize -m vit_b_16 --attention -l '**.*_layer_11' images/animals/chelsea.jpg",
    "hookx visualize features/ --image animals/chelsea.jpg -l conv1 --top 16 --images images/",
)
def visualize(options: given.VisualizeOptions, stored: given.StoredRunOptions, form: ReportOptions) -> None:
    """Draw feature maps: one picture per layer, and an overview with a row per model and a column per depth."""
    sources = list_paths(options.images)
    if not sources:
        raise UsageError("no images are named", "give image files or folders, or the directory of a run")
    is_run = len(sources) == 1 and _holds_a_run(sources[0])
    if is_run and (options.model or options.attention):
        raise UsageError(f"{sources[0]} is a run, whose model does not run again", "name images instead of the run")
    if not is_run and (stored.keys or stored.images_of_run or stored.root):
        raise UsageError(
            "--image, --images and --root need a run", "name its directory, as in hookx visualize features/"
        )
    from hookx.cli import reports
    from hookx.pictures.models import visualize
    from hookx.pictures.runs import visualize_run

    with talk_on_stderr(form.quiet), show_progress("pictures", quiet=form.quiet) as advance:
        if is_run:
            look, images = options.values_of(LookOptions), stored.images_of_run
            gallery = visualize_run(
                sources[0], stored.keys, options.layers, images=images, root=stored.root, progress=advance, **look
            )
        else:
            gallery = visualize(**vars(options) | {"progress": advance})
    paths = [picture.file for picture in gallery.pictures]
    report(form, reports.describe_gallery, reports.print_gallery, gallery, files=paths)
    if gallery.failures:
        raise typer.Exit(3)
