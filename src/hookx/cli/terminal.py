"""What a command prints on standard output: tables on a terminal, plain lines in a pipe.

The only file that imports rich.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.filesize import decimal

from hookx.cli.documents import ModelWeights, problems_of
from hookx.cli.streams import in_one_line, print_lines
from hookx.layers.address import Address
from hookx.layers.select import Layer
from hookx.plan import LayerSpec

if TYPE_CHECKING:  # They import torch.
    from hookx.check.inspect import Inspection, Statistics
    from hookx.check.recompute import Recomputation
    from hookx.check.verify import Verification
    from hookx.exporting import Export
    from hookx.pictures.gallery import Gallery
    from hookx.run.prepare import Job
    from hookx.run.summary import Summary

Rows = Sequence[Sequence[str]]


def print_summary(summary: Summary) -> None:
    """Print what a run did."""
    _print_layers(summary.layers, summary.images)
    stored = f"{summary.images:,} stored"
    if summary.failures:
        stored += f", {summary.failures:,} could not be read (failures.csv says why)"
    shards = f"{summary.shards:,}"
    if summary.shards_computed < summary.shards:
        shards += f", {summary.shards - summary.shards_computed:,} of them already there"
    facts = [
        ("images", stored),
        ("shards", f"{shards}; {decimal(summary.bytes)} of activations"),
        ("model", f"{summary.model}, weights {summary.weights}"),
        *(("note", note) for note in summary.notes),
        (
            "computed",
            f"{summary.precision} on {summary.device}, {_batches_text(summary.batch_size, summary.memory_format)}",
        ),
        ("pixels", str(summary.preprocessing)),
        ("time", _time_text(summary)),
        ("result", f"{summary.out}/"),
    ]
    if summary.rotations_ignored:
        note = f"{summary.rotations_ignored:,} images carry a rotation that was ignored; --exif apply turns them"
        facts.insert(1, ("rotation", note))
    facts[1:1] = [("values", sentence) for sentence in summary.counts.sentences()]
    _print_rows(facts)


def _batches_text(batch_size: int, memory_format: str) -> str:
    return f"batches of {batch_size:,}" + (f", {memory_format}" if memory_format != "contiguous" else "")


def _time_text(summary: Summary) -> str:
    """Write how fast a run was, and the share of the time for which each part worked, the slowest first."""
    speed = f"{summary.seconds_total:.1f} s, {summary.images_computed / summary.seconds_total:.0f} images/s"
    parts = sorted(summary.busy, key=lambda part: part != summary.bound_by)
    busy = [f"{part} {summary.busy[part]:.0%}" for part in parts if round(summary.busy[part], 2)]
    return f"{speed}; busy: {', '.join(busy)}" if busy else speed


def print_job(job: Job) -> None:
    """Print what a run would do."""
    plan = job.plan
    _print_layers(plan.layers, plan.image_count)
    pending = f"{len(job.pending):,} of {len(plan.shards):,} to compute"
    _print_rows(
        [
            ("images", f"{plan.image_count:,}"),
            ("shards", f"{pending}, of up to {plan.images_per_shard:,} images"),
            ("bytes", f"{decimal(job.bytes_to_write)} to write, {decimal(job.bytes_free)} free"),
            ("model", f"{plan.model}, weights {plan.weights}"),
            ("computed", f"{plan.precision} on {job.device}, {_batches_text(plan.batch_size, plan.memory_format)}"),
            ("pixels", str(plan.preprocessing)),
            ("result", f"{job.out}/ (nothing was written)"),
        ]
    )


def print_verification(verification: Verification, recomputation: Recomputation | None = None) -> None:
    """Print what is wrong with a run, a line each, then what is right with it."""
    problems = problems_of(verification, recomputation)
    print_lines([f"{problem.file} {problem.what}" for problem in problems])
    print_lines([f"note: {note.file} {note.what}" for note in verification.notes])
    whole = f"{verification.shards_whole:,} of {verification.shards:,} whole"
    facts = [
        ("shards", f"{whole}; {decimal(verification.bytes)} of activations agree with their checksums"),
        ("images", f"{verification.rows:,} rows, {verification.failures:,} failures"),
    ]
    if recomputation is not None:
        again = f"{len(recomputation.rows):,} rows on {recomputation.device}"
        if recomputation.rows:
            address, deviation = max(recomputation.deviations.items(), key=lambda item: item[1])
            again += f", {recomputation.rows_with_same_bits:,} with the same bits"
            again += f"; largest deviation {deviation:.1e} ({address})" if deviation else ""
        facts.append(("computed", f"again: {again}"))
    wrong = f"{len(problems):,} problem{'s' if len(problems) > 1 else ''}"
    facts.append(("result", f"{verification.path}/ {f'has {wrong}' if problems else 'is whole'}"))
    _print_rows(facts)


def print_inspection(inspection: Inspection) -> None:
    """Print what a run holds."""
    plan = inspection.plan
    header = ["layer", "shape", "type", "size"]
    rows = [
        [layer.address, ",".join(map(str, layer.shape)), layer.dtype, decimal(layer.bytes)]
        for layer in inspection.layers
    ]
    if any(layer.statistics for layer in inspection.layers):
        header += ["mean", "deviation", "minimum", "maximum", "zeros", "non-finite"]
        for row, layer in zip(rows, inspection.layers, strict=True):
            row += _statistics_texts(layer.statistics)
    # In a pipe no table has a header but this one: statistics would be a row of nameless numbers.
    if len(header) > 4 and not sys.stdout.isatty():
        rows.insert(0, header)
    if rows:
        _print_rows(rows, header=header, right_aligned=range(3, len(header)))
    shards = f"{inspection.shards_finished:,} of {len(plan.shards):,} finished"
    if inspection.shards_finished == len(plan.shards) and not inspection.has_index:
        shards += ", index.csv missing"
    facts = [
        ("images", f"{inspection.rows:,} stored, {inspection.failures:,} failures, of {plan.image_count:,}"),
        *(("values", sentence) for sentence in inspection.counts.sentences()),
        ("shards", f"{shards}; {decimal(inspection.bytes)} of activations"),
        ("model", f"{plan.model}, weights {plan.weights}"),
        ("computed", f"{plan.precision}, {_batches_text(plan.batch_size, plan.memory_format)}"),
        *(("made", ", ".join(f"{name} {value}" for name, value in made.items())) for made in inspection.made),
        ("pixels", str(plan.preprocessing)),
        ("plan", plan.fingerprint),
        ("result", f"{inspection.path}/ is {'finished' if inspection.is_finished else 'not finished'}"),
    ]
    if not inspection.is_finished:
        facts.append(("next", "the same hookx extract command goes on"))
    _print_rows(facts)


def print_export(exported: Export) -> None:
    """Print what was written where."""
    shape = ",".join(map(str, exported.shape))
    _print_rows([(exported.layer, shape, exported.dtype, decimal(exported.bytes))])
    images = f"{exported.shape[0]:,} stored"
    if exported.failures:
        images += f", {exported.failures:,} could not be read, and are not in it"
    _print_rows([("images", images), *(("result", file) for file in exported.files)])


def print_gallery(gallery: Gallery) -> None:
    """Print the pictures that were drawn, a line each: the file, and what it shows."""
    _print_rows([(picture.file, picture.shows) for picture in gallery.pictures], header=("picture", "shows"))


def print_model_layers(layers: Sequence[Layer], *, tree: bool = False) -> None:
    """Print a model's layers, a line each: path, class, what it returns, parameters, calls in a forward pass."""
    rows = [
        (
            _in_tree(layer.path) if tree else str(Address(layer.path)),
            layer.class_name,
            _outputs_text(layer),
            f"{layer.parameters:,}",
            _calls_text(layer),
        )
        for layer in layers
    ]
    _print_rows(rows, header=("layer", "class", "output", "parameters", "calls"), right_aligned=(3,))


def print_models(kinds: Mapping[str, str], weights: ModelWeights) -> None:
    """Print models, a line each: kind, and the names of their weights, marked where they are in the cache."""
    rows = [
        (name, kind, " ".join(f"{weight} (cached)" if is_cached else weight for weight, is_cached in weights[name]))
        for name, kind in kinds.items()
    ]
    _print_rows(rows, header=("model", "kind", "weights"))


def print_facts(facts: Mapping[str, str]) -> None:
    """Print names and values, a line each."""
    _print_rows(list(facts.items()))


def _print_layers(layers: Sequence[LayerSpec], images: int) -> None:
    rows = [
        (
            layer.address,
            ",".join(map(str, (images, *layer.shape))),
            layer.dtype,
            decimal(images * layer.bytes_per_image),
        )
        for layer in layers
    ]
    _print_rows(rows, header=("layer", "shape", "type", "size"), right_aligned=(3,))


def _print_rows(rows: Rows, header: Sequence[str] = (), right_aligned: Sequence[int] = ()) -> None:
    rows = [[in_one_line(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _print_table(rows, header, right_aligned)
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if number in right_aligned else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _print_table(rows: Rows, header: Sequence[str], right_aligned: Sequence[int]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD if header else None, show_header=bool(header), pad_edge=bool(header))
    for number in range(len(rows[0]) if rows else 0):
        table.add_column(
            header[number] if header else "",
            justify="right" if number in right_aligned else "left",
            style="bold" if number == 0 else "",
            overflow="fold",
        )
    for row in rows:
        table.add_row(*map(Text, row))  # Text, because brackets in a name are not markup.
    Console().print(table)


def _statistics_texts(statistics: Statistics | None) -> list[str]:
    assert statistics is not None
    described = (statistics.mean, statistics.deviation, statistics.minimum, statistics.maximum)
    share = f"{statistics.zeros / max(statistics.values, 1):.1%}"
    numbers = ["-" if number is None else f"{number:.6g}" for number in described]
    return [*numbers, share, f"{statistics.non_finite:,}"]


def _outputs_text(layer: Layer) -> str:
    texts: list[str] = []
    for address, tensor in layer.addresses().items():
        place = "/".join(address.parts)
        text = f"{place}={tensor.shape_text}" if place else tensor.shape_text
        if tensor.is_constant:
            text += " (constant)"
        elif tensor.problem:
            text += " (not by image)"
        if text not in texts:
            texts.append(text)
    return " ".join(texts) or "-"


def _in_tree(path: str) -> str:
    above, dot, name = path.rpartition(".")
    return path if path == "." else "  " * (above.count(".") + 1 + bool(dot)) + str(Address(name))


def _calls_text(layer: Layer) -> str:
    if layer.calls:
        return str(len(layer.calls)) + (f" (same module as {layer.same_as})" if layer.same_as else "")
    return "never called" + (f" ({layer.never_called_because})" if layer.never_called_because else "")
