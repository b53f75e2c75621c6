"""`hookx visualize`: images or a run -> pictures."""

from __future__ import annotations

from pathlib import Path

import typer

from hookx.cli.options import command
from hookx.errors import UsageError
from hookx.options import LookOptions, ReportOptions, StoredRunOptions, VisualizeOptions, list_paths


@command(
    "visualize",
    "hookx visualize --model resnet18 --layers conv1,layer1,layer4 images/animals/chelsea.jpg",
    "hookx visualize -m vit_b_16 --attention -l '**.*_layer_11' images/animals/chelsea.jpg",
    "hookx visualize features/ --image animals/chelsea.jpg -l conv1 --top 16 --images images/",
)
def visualize(options: VisualizeOptions, stored: StoredRunOptions, report: ReportOptions) -> None:
    """Draw feature maps: one picture per layer, and an overview with a row per model and a column per depth."""
    sources = list_paths(options.images)
    if not sources:
        raise UsageError("no images are named", "give image files or folders, or the directory of a run")
    is_run = len(sources) == 1 and (Path(sources[0]) / "plan.json").is_file()
    if is_run and (options.model or options.attention):
        raise UsageError(f"{sources[0]} is a run, whose model does not run again", "name images instead of the run")
    if not is_run and (stored.keys or stored.images_of_run):
        raise UsageError("--image and --images need a run", "name its directory, as in hookx visualize features/")
    from hookx.cli import documents, streams, terminal
    from hookx.cli.progress import show_progress, talk_on_stderr
    from hookx.pictures.models import visualize
    from hookx.pictures.runs import visualize_run

    with talk_on_stderr(report.quiet), show_progress("pictures", quiet=report.quiet) as advance:
        if is_run:
            look, images = options.values_of(LookOptions), stored.images_of_run
            gallery = visualize_run(sources[0], stored.keys, options.layers, images=images, progress=advance, **look)
        else:
            gallery = visualize(**vars(options) | {"progress": advance})
    if report.json:
        streams.print_json(documents.describe_gallery(gallery))
    elif report.quiet:
        streams.print_lines([picture.file for picture in gallery.pictures])
    else:
        terminal.print_gallery(gallery)
    if gallery.failures:
        raise typer.Exit(3)
