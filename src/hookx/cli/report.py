"""What a person or a pipe sees: tables, JSON, progress, and the talk on standard error.

The only file that imports rich and tqdm. On a terminal there are tables and a bar; in a pipe, plain lines.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hookx.errors import HookxError
from hookx.layers.address import Address
from hookx.layers.tree import Layer
from hookx.plan import LayerSpec

if TYPE_CHECKING:  # At run time it would import torch, for which an error of usage need not wait.
    from hookx.check.inspect import Inspection, Statistics
    from hookx.check.recompute import Recomputation
    from hookx.check.verify import Verification
    from hookx.exporting import Export
    from hookx.pictures.gallery import Gallery
    from hookx.run.prepare import Job
    from hookx.run.summary import Summary
Rows = Sequence[Sequence[str]]
_VALUES = {
    "non_finite": "NaN or infinity in {address} of {count:,} images",
    "all_zero": "{address} is all zero for {count:,} images",
    "overflowed": "{count:,} values of {address} became infinite in the stored type",
    "flushed": "{count:,} values of {address} became zero in the stored type",
}


@contextlib.contextmanager
def talk_on_stderr(quiet: bool = False) -> Iterator[None]:
    """Print hookx's log on standard error: notes as they are, warnings marked. `quiet` leaves the warnings only."""
    handler = _Talk()
    log = logging.getLogger("hookx")
    level_before = log.level
    log.addHandler(handler)
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level_before)


class _Talk(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        mark = "warning: " if record.levelno >= logging.WARNING else ""
        tqdm.write(f"{mark}{printable(record.getMessage())}", file=sys.stderr)  # above the bar, if there is one


@contextlib.contextmanager
def progress_of_images(job: Job, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Show a bar of the images of a job, if standard error is a terminal; yields what advances it."""
    from tqdm import tqdm

    pending = sum(map(len, job.pending))
    done = len(job.images) - pending
    with tqdm(
        total=len(job.images),
        initial=done,
        unit=" images",
        unit_scale=len(job.images) >= 100_000,
        file=sys.stderr,
        disable=True if quiet else None,  # None: only off a terminal
        dynamic_ncols=True,
    ) as bar:
        yield lambda count: bar.update(count) and None


@contextlib.contextmanager
def progress_of(unit: str, total: int | None = None, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Show a bar of shards, rows or pictures, if standard error is a terminal; yields what advances it."""
    from tqdm import tqdm

    hidden = True if quiet else None
    with tqdm(total=total, unit=f" {unit}", file=sys.stderr, disable=hidden, dynamic_ncols=True, leave=False) as bar:
        yield lambda count: bar.update(count) and None


def print_summary(summary: Summary) -> None:
    """Print what a run did."""
    _print_layers(summary.layers, summary.images)
    stored = f"{summary.images:,} stored"
    if summary.failures:
        stored += f", {summary.failures:,} could not be read (failures.csv says why)"
    shards = f"{summary.shards:,}"
    if summary.shards_computed < summary.shards:
        shards += f", of which {summary.shards - summary.shards_computed:,} were there already"
    facts = [
        ("images", stored),
        ("shards", f"{shards}; {human_bytes(summary.bytes)} of activations"),
        ("model", f"{summary.model}, weights {summary.weights}"),
        *(("note", note) for note in summary.notes),
        ("computed", f"{summary.precision} on {summary.device}, {_batches(summary.batch_size, summary.memory_format)}"),
        ("pixels", str(summary.preprocessing)),
        ("time", _time(summary)),
        ("result", f"{summary.out}/"),
    ]
    if summary.rotations_ignored:
        note = f"{summary.rotations_ignored:,} images carry a rotation that was ignored; --exif apply turns them"
        facts.insert(1, ("rotation", note))
    facts[1:1] = _values_facts(summary.counts)
    _print_rows(facts)


def _batches(batch_size: int, memory_format: str) -> str:
    return f"batches of {batch_size:,}" + (f", {memory_format}" if memory_format != "contiguous" else "")


def _time(summary: Summary) -> str:
    """Say how fast it was, and for how much of the time each part worked; first the one that the others waited for."""
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
            ("bytes", f"{human_bytes(job.bytes_to_write)} to write, {human_bytes(job.bytes_free)} free"),
            ("model", f"{plan.model}, weights {plan.weights}"),
            ("computed", f"{plan.precision} on {job.device}, {_batches(plan.batch_size, plan.memory_format)}"),
            ("pixels", str(plan.preprocessing)),
            ("result", f"{job.out}/ (nothing was written)"),
        ]
    )


def summary_document(summary: Summary) -> dict[str, Any]:
    """Return a run's summary as plain JSON values."""
    document = _plain(summary)
    document["layers"] = [_layer_document(layer, summary.images) for layer in summary.layers]
    return document


def job_document(job: Job) -> dict[str, Any]:
    """Return what a run would do as plain JSON values."""
    plan = job.plan
    return {
        "dry_run": True,
        "out": str(job.out),
        "model": plan.model,
        "weights": plan.weights,
        "preprocessing": _plain(plan.preprocessing),
        "layers": [_layer_document(layer, plan.image_count) for layer in plan.layers],
        "images": plan.image_count,
        "shards": len(plan.shards),
        "shards_pending": len(job.pending),
        "images_per_shard": plan.images_per_shard,
        "bytes_to_write": job.bytes_to_write,
        "bytes_free": job.bytes_free,
        "device": str(job.device),
        "precision": plan.precision,
        "memory_format": plan.memory_format,
        "batch_size": plan.batch_size,
        "workers": job.workers,
        "fingerprint": plan.fingerprint,
    }


def print_verification(verification: Verification, recomputation: Recomputation | None = None) -> None:
    """Print what is wrong with a run, a line each, then what is right with it."""
    problems = _problems(verification, recomputation)
    print_lines([f"{problem.file} {problem.what}" for problem in problems])
    print_lines([f"note: {note.file} {note.what}" for note in verification.notes])
    whole = f"{verification.shards_whole:,} of {verification.shards:,} whole"
    facts = [
        ("shards", f"{whole}; {human_bytes(verification.bytes)} of activations agree with their checksums"),
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


def verification_document(verification: Verification, recomputation: Recomputation | None = None) -> dict[str, Any]:
    """Return what is wrong and right with a run as plain JSON values; the recomputed rows only if there are any."""
    document = _plain(verification)
    document["problems"] = [_plain(problem) for problem in _problems(verification, recomputation)]
    document["ok"] = not document["problems"]
    if recomputation is not None:
        document["recomputed"] = {
            "device": recomputation.device,
            "rows": [_plain(row) for row in recomputation.rows],
            "rows_with_same_bits": recomputation.rows_with_same_bits,
        }
    return document


def print_inspection(inspection: Inspection) -> None:
    """Print what a run holds."""
    plan = inspection.plan
    header = ["layer", "shape", "type", "size"]
    rows = [
        [layer.address, ",".join(map(str, layer.shape)), layer.dtype, human_bytes(layer.bytes)]
        for layer in inspection.layers
    ]
    if any(layer.statistics for layer in inspection.layers):
        header += ["mean", "deviation", "minimum", "maximum", "zeros", "non-finite"]
        for row, layer in zip(rows, inspection.layers, strict=True):
            row += _statistics_texts(layer.statistics)
    # In a pipe there is no header, as everywhere; the statistics would be a row of nameless numbers, and get one.
    if len(header) > 4 and not sys.stdout.isatty():
        rows.insert(0, header)
    if rows:
        _print_rows(rows, header=header, right_aligned=range(3, len(header)))
    shards = f"{inspection.shards_finished:,} of {len(plan.shards):,} finished"
    if inspection.shards_finished == len(plan.shards) and not inspection.has_index:
        shards += ", index.csv missing"
    facts = [
        ("images", f"{inspection.rows:,} stored, {inspection.failures:,} failures, of {plan.image_count:,}"),
        *_values_facts(inspection.counts),
        ("shards", f"{shards}; {human_bytes(inspection.bytes)} of activations"),
        ("model", f"{plan.model}, weights {plan.weights}"),
        ("computed", f"{plan.precision}, {_batches(plan.batch_size, plan.memory_format)}"),
        *(("made", ", ".join(f"{name} {value}" for name, value in made.items())) for made in inspection.made),
        ("pixels", str(plan.preprocessing)),
        ("plan", plan.fingerprint),
        ("result", f"{inspection.path}/ is {'finished' if inspection.is_finished else 'not finished'}"),
    ]
    if not inspection.is_finished:
        facts.append(("next", "the same hookx extract command goes on"))
    _print_rows(facts)


def inspection_document(inspection: Inspection) -> dict[str, Any]:
    """Return what a run holds as plain JSON values."""
    document = _plain(inspection)
    document["plan"] = {
        "fingerprint": inspection.plan.fingerprint,
        **inspection.plan.identity,
        "batch_size": inspection.plan.batch_size,
    }
    document["shards"] = len(inspection.plan.shards)
    document["is_finished"] = inspection.is_finished
    return document


def print_export(exported: Export) -> None:
    """Print what was written where."""
    shape = ",".join(map(str, exported.shape))
    _print_rows([(exported.layer, shape, exported.dtype, human_bytes(exported.bytes))])
    images = f"{exported.shape[0]:,} stored"
    if exported.failures:
        images += f", {exported.failures:,} could not be read, and are not in it"
    _print_rows([("images", images), *(("result", file) for file in exported.files)])


def export_document(exported: Export) -> dict[str, Any]:
    """Return what was written where as plain JSON values."""
    return _plain(exported)


def print_gallery(gallery: Gallery) -> None:
    """Print the pictures that were drawn, a line each: the file, and what it shows."""
    _print_rows([(picture.file, picture.shows) for picture in gallery.pictures], header=("picture", "shows"))


def gallery_document(gallery: Gallery) -> dict[str, Any]:
    """Return the pictures that were drawn as plain JSON values; an overview has no layer."""
    document = _plain(gallery)
    for picture in document["pictures"]:
        picture.update({name: picture[name] or None for name in ("image", "model", "layer")})
    return document


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


def layers_document(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """Return a model's layers as plain JSON values; in a shape, null stands for the batch."""
    return [
        {
            "path": str(Address(layer.path)),
            "class": layer.class_name,
            "parameters": layer.parameters,
            "calls": len(layer.calls),
            "never_called_because": layer.never_called_because or None,
            "same_as": layer.same_as or None,
            "outputs": [
                {
                    "address": str(address),
                    "shape": _shape_with_batch(tensor),
                    "dtype": tensor.dtype,
                    "constant": tensor.is_constant,
                    "problem": tensor.problem or None,
                }
                for address, tensor in layer.addresses().items()
            ],
        }
        for layer in layers
    ]


Weights = Mapping[str, Sequence[tuple[str, bool]]]


def print_models(kinds: Mapping[str, str], weights: Weights) -> None:
    """Print models, a line each: kind, and the names of their weights, marked where they are in the cache."""
    rows = [
        (name, kind, " ".join(f"{weight} (cached)" if is_cached else weight for weight, is_cached in weights[name]))
        for name, kind in kinds.items()
    ]
    _print_rows(rows, header=("model", "kind", "weights"))


def models_document(kinds: Mapping[str, str], weights: Weights) -> dict[str, Any]:
    """Return models as plain JSON values, by name."""
    return {
        name: {"kind": kind, "weights": [{"name": weight, "cached": cached} for weight, cached in weights[name]]}
        for name, kind in kinds.items()
    }


def print_facts(facts: Mapping[str, str]) -> None:
    """Print names with what there is to say of them, a line each."""
    _print_rows(list(facts.items()))


def print_bytes(pieces: Iterable[bytes | memoryview]) -> None:
    """Print data a piece at a time."""
    try:
        for piece in pieces:
            sys.stdout.buffer.write(piece)
    except BrokenPipeError:
        raise  # The reader has seen enough, and Typer ends the command without a word.
    except OSError as error:
        raise _not_written(error) from None


def hand_over_output() -> None:
    """Give the system what is still buffered; Python would do so at its end, where an error cannot be told any more."""
    try:
        sys.stdout.flush()
    except OSError as error:
        not_written = _not_written(error)
        if isinstance(error, BrokenPipeError):
            sys.exit(1)
        raise not_written from None


def print_json(document: Any) -> None:
    """Print one JSON document."""
    print(json.dumps(document, indent=2))


def print_lines(lines: Sequence[str]) -> None:
    """Print lines, made safe for a terminal."""
    for line in lines:
        print(_in_one_line(line))


def human_bytes(count: int) -> str:
    """Write a number of bytes as a person reads it.

    Example:
        >>> human_bytes(25_690_112), human_bytes(512)
        ('25.7 MB', '512 bytes')
    """
    amount, units = float(count), ["bytes", "kB", "MB", "GB", "TB", "PB"]
    while amount >= 999.95 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    return f"{count} bytes" if units[0] == "bytes" else f"{amount:.1f} {units[0]}"


def printable(text: str) -> str:
    r"""Escape what would act on a terminal instead of showing: control characters, bytes that are not UTF-8.

    A line break stays where an indented line follows, as in hookx's own errors: no name can begin a line of its own.

    Example:
        >>> print(printable("no layer matches '\x1b[2J\nerror: x'\n  list them all"))
        no layer matches '\x1b[2J\nerror: x'
          list them all
    """
    lines = re.split(r"\n(?=  )", text)
    return "\n".join("".join(char if char.isprintable() else ascii(char)[1:-1] for char in line) for line in lines)


def _not_written(error: OSError) -> HookxError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python will try once more to write what is left.
    return HookxError(f"cannot write to standard output: {error.strerror}")


def _in_one_line(text: str) -> str:
    return printable(text).replace("\n", "\\n")


def _print_layers(layers: Sequence[LayerSpec], images: int) -> None:
    rows = [
        (
            layer.address,
            ",".join(map(str, (images, *layer.shape))),
            layer.dtype,
            human_bytes(images * layer.bytes_per_image),
        )
        for layer in layers
    ]
    _print_rows(rows, header=("layer", "shape", "type", "size"), right_aligned=(3,))


def _print_rows(rows: Rows, header: Sequence[str] = (), right_aligned: Sequence[int] = ()) -> None:
    rows = [[_in_one_line(cell) for cell in row] for row in rows]
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
        table.add_row(*map(Text, row))  # Text, so that brackets in a name are not taken for markup.
    Console().print(table)


def _problems(verification: Verification, recomputation: Recomputation | None) -> list[Any]:
    return [*verification.problems, *(recomputation.problems if recomputation is not None else ())]


def _values_facts(counts: Mapping[str, Mapping[str, int]]) -> list[tuple[str, str]]:
    return [
        # What another version of hookx counts has no sentence here.
        ("values", _VALUES.get(what, "{count:,} of {address} are of another kind").format(count=count, address=address))
        for address, by_what in counts.items()
        for what, count in by_what.items()
    ]


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


def _shape_with_batch(tensor: Any) -> list[int | None]:
    shape: list[int | None] = list(tensor.shape)
    if tensor.batch_dim is not None:
        shape.insert(tensor.batch_dim, None)
    return shape


def _layer_document(layer: LayerSpec, images: int) -> dict[str, Any]:
    return {
        "address": layer.address,
        "shape": [images, *layer.shape],
        "dtype": layer.dtype,
        "bytes": images * layer.bytes_per_image,
    }


def _plain(record: Any) -> dict[str, Any]:
    import dataclasses

    return dataclasses.asdict(record)
