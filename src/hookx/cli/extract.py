"""`hookx extract`: images -> shards of activations."""

from __future__ import annotations

import typer

from hookx.cli.options import command
from hookx.errors import UsageError
from hookx.options import CallOptions, ExtractOptions, list_paths


@command(
    "extract",
    "hookx extract --model resnet18 --layers conv1,avgpool images/",
    "hookx extract -m vit_b_16 -l 'encoder.layers.*@cls' -o tokens --dry-run images/",
    "find images/ -name '*.jpg' | hookx extract -m resnet18 -l layer4@mean23 -o pooled -",
)
def extract(options: ExtractOptions, call: CallOptions) -> None:
    """Store the activations of images; the same command again finishes what was interrupted."""
    sources = list_paths(options.images)
    if not sources and not call.null:
        raise UsageError("no images are named", "give folders, files, or - to read paths from standard input")
    if call.null:
        sources = ["-0" if source == "-" else source for source in sources or ["-"]]
    from hookx.cli import documents, streams, terminal
    from hookx.cli.progress import show_progress, talk_on_stderr
    from hookx.run.prepare import prepare
    from hookx.run.run import run

    with talk_on_stderr(call.quiet):
        job = prepare(**vars(options) | {"images": sources})
        if call.dry_run:
            streams.print_json(documents.describe_job(job)) if call.json else terminal.print_job(job)
            return
        images = len(job.images)
        done = images - sum(map(len, job.pending))
        with show_progress("images", images, done=done, quiet=call.quiet, leave=True) as advance:
            summary = run(job, advance)
    if call.json:
        streams.print_json(documents.describe_summary(summary))
    elif call.quiet:
        streams.print_lines(summary.files)
    else:
        terminal.print_summary(summary)
    if summary.failures:
        raise typer.Exit(3)
