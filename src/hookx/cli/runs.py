"""`hookx verify`, `inspect`, `export` and `cat`: what a run holds."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from hookx.cli.options import command
from hookx.errors import UsageError
from hookx.options import CatOptions, ExportOptions, InspectOptions, JsonOptions, RecomputeOptions, ReportOptions


@command(
    "verify",
    "hookx verify features/",
    "hookx verify features/ --recompute 3 --images images/",
    "hookx verify features/ --json",
)
def verify(options: RecomputeOptions, report: JsonOptions) -> None:
    """Check that a run is whole and, with --recompute, that it is true; list everything that is wrong."""
    if options.count and not options.images:
        raise UsageError("the plan does not say where the images are", "name them: --images images/")
    from hookx.check.verify import verify
    from hookx.cli import documents, streams, terminal
    from hookx.cli.progress import show_progress, talk_on_stderr

    with talk_on_stderr(), show_progress("shards") as advance:
        verification = verify(options.path, progress=advance)
    recomputation = None
    if options.count and verification.shards_whole:
        from hookx.check.recompute import recompute

        with talk_on_stderr():
            recomputation = recompute(**vars(options))
    document = documents.describe_verification(verification, recomputation)
    streams.print_json(document) if report.json else terminal.print_verification(verification, recomputation)
    if not document["ok"]:
        raise typer.Exit(1)


@command("inspect", "hookx inspect features/", "hookx inspect features/ --stats", "hookx inspect features/ --json")
def inspect(options: InspectOptions, report: JsonOptions) -> None:
    """Show a run, finished or not: its plan, its progress, and what every layer holds."""
    from hookx.check.inspect import inspect
    from hookx.cli import documents, streams, terminal
    from hookx.cli.progress import show_progress

    with show_progress("shards") as advance:
        inspection = inspect(options.path, statistics=options.stats, progress=advance)
    if report.json:
        streams.print_json(documents.describe_inspection(inspection))
    else:
        terminal.print_inspection(inspection)


@command(
    "export",
    "hookx export features/ --layer avgpool --to avgpool.npy",
    "hookx export features/ -l avgpool --to avgpool.csv",
    "hookx export features/ -l conv1 --to conv1.npz --quiet",
)
def export(options: ExportOptions, report: ReportOptions) -> None:
    """Write one layer of a run to a file for another program; the suffix chooses the format."""
    from hookx.cli import documents, streams, terminal
    from hookx.cli.progress import show_progress, talk_on_stderr
    from hookx.exporting import export
    from hookx.read.features import open_features

    with talk_on_stderr(report.quiet):
        features = open_features(options.path, partial=options.partial)
        with show_progress("rows", len(features.keys_of_rows), quiet=report.quiet) as advance:
            exported = export(features, options.layer, options.to, progress=advance)
    if report.json:
        streams.print_json(documents.plain(exported))
    elif report.quiet:
        streams.print_lines(exported.files)
    else:
        terminal.print_export(exported)


@command(
    "cat",
    "hookx cat features/ --layer avgpool --image animals/chelsea.jpg",
    "hookx cat features/ -l avgpool -i people/astronaut.jpg | sort -g | tail -3",
    "hookx cat features/ -l conv1 -i people/astronaut.jpg --raw > conv1.f32",
)
def cat(options: CatOptions, report: JsonOptions) -> None:
    """Print one activation: a number a line, or rows of numbers with a blank line between channels."""
    if report.json and options.raw:
        raise UsageError("--json and --raw exclude each other", "choose one")
    if options.raw and sys.stdout.isatty():
        raise UsageError("--raw writes bytes, and standard output is a terminal", "send them to a file: > FILE")
    from hookx.cli.streams import print_bytes
    from hookx.exporting import printing
    from hookx.store.format import bytes_of

    activation = printing.read_activation(Path(options.path), options.layer, options.image)
    if options.raw:
        print_bytes([bytes_of(activation.values)])
    else:
        print_bytes(printing.to_json(activation) if report.json else printing.to_text(activation.values))
