"""What a person or a pipe sees: tables, JSON, progress, and the talk on standard error.

The only file that imports rich and tqdm. On a terminal there are tables and a bar; in a pipe, plain lines.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hookx.layers import Address, Layer
from hookx.plan import LayerSpec

if TYPE_CHECKING:  # At run time it would import torch, for which an error of usage need not wait.
    from hookx.extract import Job, Summary

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
def progress_of(job: Job, quiet: bool = False) -> Iterator[Callable[[int], None]]:
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
        ("computed", f"{summary.precision} on {summary.device}, batches of {summary.batch_size}"),
        ("pixels", str(summary.preprocessing)),
        (
            "time",
            f"{summary.seconds_total:.1f} s, {summary.images_computed / summary.seconds_total:.0f} images/s: reading "
            f"{summary.seconds_reading:.1f}, model {summary.seconds_model:.1f}, writing {summary.seconds_writing:.1f}",
        ),
        ("result", f"{summary.out}/"),
    ]
    if summary.rotations_ignored:
        note = f"{summary.rotations_ignored:,} images carry a rotation that was ignored; --exif apply turns them"
        facts.insert(1, ("rotation", note))
    for address, by_what in summary.counts.items():
        facts[1:1] = [("values", _VALUES[what].format(count=count, address=address)) for what, count in by_what.items()]
    _print_rows(facts)


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
            ("computed", f"{plan.precision} on {job.device}, batches of {plan.batch_size}"),
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
        "batch_size": plan.batch_size,
        "workers": job.workers,
        "fingerprint": plan.fingerprint,
    }


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


def print_models(kinds: Mapping[str, str]) -> None:
    """Print models and their kinds, a line each."""
    _print_rows(list(kinds.items()), header=("model", "kind"))


def print_json(document: Any) -> None:
    """Print one JSON document."""
    print(json.dumps(document, indent=2))


def print_lines(lines: Sequence[str]) -> None:
    """Print lines, made safe for a terminal."""
    for line in lines:
        print(printable(line))


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
    """Escape what would act on a terminal instead of showing: control characters, bytes that are not UTF-8."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


# --- drawing -------------------------------------------------------------------------------------------------------


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
    rows = [[printable(cell) for cell in row] for row in rows]
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
