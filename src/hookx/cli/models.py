"""`hookx list-layers` and `hookx list-models`: what can be named."""

from __future__ import annotations

from fnmatch import fnmatchcase

from hookx.cli.options import command
from hookx.errors import HookxError, closest
from hookx.options import BuildOptions, JsonOptions, ListLayersOptions, ListModelsOptions, ModelOptions


@command(
    "list-layers",
    "hookx list-layers resnet18",
    "hookx list-layers vit_b_16 --type MultiheadAttention",
    "hookx list-layers resnet50 --depth 1 --json",
)
def list_layers(options: ListLayersOptions, report: JsonOptions) -> None:
    """Show what can be captured: every module in execution order. Needs no weights."""
    from hookx.capture.probe import example_images, probe
    from hookx.capture.runner import Runner
    from hookx.cli import documents, streams, terminal
    from hookx.layers.select import narrowed
    from hookx.models import skeleton

    bare = skeleton(options.model, options.weights, ModelOptions(**options.values_of(BuildOptions)))
    runner = Runner.of(bare.module, bare.forward)
    examples_NCHW = example_images(runner, bare.preprocessing.crop_px)
    layers = probe(runner, examples_NCHW, why_never_called=bare.why_never_called)
    layers = narrowed(layers, options.model, paths=options.paths, types=options.types, depth=options.depth)
    if report.json:
        streams.print_json(documents.describe_layers(layers))
    else:
        terminal.print_model_layers(layers, tree=options.tree)


@command("list-models", "hookx list-models", "hookx list-models 'vit*'", "hookx list-models --json '*resnet50*'")
def list_models(options: ListModelsOptions, report: JsonOptions) -> None:
    """Show the models that can be named: kind, weights (the default first), and which are in the cache."""
    from hookx import models
    from hookx.cli import documents, streams, terminal

    known = models.list_models(options.pattern)
    kinds = {name: kind for name, kind in known.items() if fnmatchcase(name, options.pattern)}
    if not kinds:
        raise HookxError(f"no model matches '{options.pattern}'; closest: {closest(options.pattern, known)}")
    weights = {name: models.weights_of(name) for name in kinds}
    if report.json:
        streams.print_json(documents.describe_models(kinds, weights))
    else:
        terminal.print_models(kinds, weights)
