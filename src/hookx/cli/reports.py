"""What a command reports on standard output: a JSON document, tables on a terminal, or plain lines in a pipe.

The only file that imports rich.
"""

from __future__ import annotations

import ctypes
import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.filesize import decimal

from hookx.cli.streams import in_one_line, print_lines
from hookx.layers.address import Address
from hookx.layers.select import Layer, TensorInfo
from hookx.plan import LayerSpec, Plan

if TYPE_CHECKING:  # They import torch.
    from hookx.check.inspect import Inspection, Statistics
    from hookx.check.recompute import Recomputation
    from hookx.check.verify import Problem, Verification
    from hookx.exporting import Export
    from hookx.pictures.gallery import Gallery

Facts = list[tuple[str, str]]  # names and values, a line each
# A model's name -> the names of its weights, and whether each is in the cache.
ModelWeights = Mapping[str, Sequence[tuple[str, bool]]]


def checked_text(self_checked: int | None) -> str:
    if self_checked is None:
        return "no row was computed again: without --self-check"
    return f"{self_checked:,} rows computed again in other company: the same within rounding"


def describe_stored(layers: Iterable[LayerSpec], images: int) -> list[dict[str, Any]]:
    return [
        {
            "address": layer.address,
            "shape": [images, *layer.shape],
            "dtype": layer.dtype,
            "bytes": images * layer.bytes_per_image,
        }
        for layer in layers
    ]


def print_stored(layers: Iterable[LayerSpec], images: int) -> None:
    rows = [_stored_row(**layer) for layer in describe_stored(layers, images)]
    print_rows(rows, header=("layer", "shape", "type", "size"), right_aligned=(3,))


def _stored_row(address: str, shape: Sequence[int], dtype: str, bytes: int) -> list[str]:
    return [address, ",".join(map(str, shape)), dtype, decimal(bytes)]


def plan_facts(
    plan: Plan, device: object = "", *, batch_size: int = 0, notes: Iterable[str] = (), made: Iterable[str] = ()
) -> Facts:
    computed = f"{plan.precision} on {device}" if device else plan.precision
    memory_format = "" if plan.memory_format == "contiguous" else f", {plan.memory_format}"
    return [
        ("model", f"{plan.model}, weights {plan.weights}"),
        *(("note", note) for note in notes),
        ("computed", f"{computed}, batches of {batch_size or plan.batch_size:,}{memory_format}"),
        *(("made", text) for text in made),
        ("pixels", str(plan.preprocessing)),
    ]


def made_text(made: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in made.items())


def problems_of(verification: Verification, recomputation: Recomputation | None) -> list[Problem]:
    """Return the problems that a verification found, then those of a recomputation."""
    return [*verification.problems, *(recomputation.problems if recomputation is not None else ())]


def describe_verification(verification: Verification, recomputation: Recomputation | None) -> dict[str, Any]:
    """Describe what is wrong and right with a run, and the rows that were computed again, if any were."""
    document = asdict(verification)
    document["problems"] = [asdict(problem) for problem in problems_of(verification, recomputation)]
    document["ok"] = not document["problems"]
    if recomputation is not None:
        document["recomputed"] = {
            "device": recomputation.device,
            "rows": [asdict(row) for row in recomputation.rows],
            "rows_with_same_bits": recomputation.rows_with_same_bits,
        }
    return document


def print_verification(verification: Verification, recomputation: Recomputation | None) -> None:
    """Print what is wrong with a run, a line each, then what is right with it."""
    problems = problems_of(verification, recomputation)
    print_lines([f"{problem.file} {problem.what}" for problem in problems])
    print_lines([f"note: {note.file} {note.what}" for note in verification.notes])
    whole = f"{verification.shards_whole:,} of {verification.shards:,} whole"
    if verification.shards_unreadable:
        whole += f", {verification.shards_unreadable:,} cannot be read now"
    facts = [
        ("shards", f"{whole}; {decimal(verification.bytes)} of activations agree with their checksums"),
        ("images", f"{verification.rows:,} rows, {verification.failures:,} failures"),
    ]
    if recomputation is not None:
        again = f"{len(recomputation.rows):,} rows on {recomputation.device}, in other company too"
        if recomputation.rows:
            address, deviation = max(recomputation.deviations.items(), key=lambda item: item[1])
            again += f", {recomputation.rows_with_same_bits:,} with the same bits"
            again += f"; largest deviation {deviation:.1e} ({address})" if deviation else ""
        facts.append(("computed", f"again: {again}"))
    wrong = f"{len(problems):,} problem{'s' if len(problems) > 1 else ''}"
    facts.append(("result", f"{verification.path}/ {f'has {wrong}' if problems else 'is whole'}"))
    if problems and {problem.file for problem in problems} <= {"index.csv", "failures.csv"}:
        facts.append(("next", "the same hookx extract command writes the tables again"))
    print_rows(facts)


def describe_inspection(inspection: Inspection) -> dict[str, Any]:
    plan = inspection.plan
    document = asdict(inspection)
    document["plan"] = {"fingerprint": plan.fingerprint, **plan.identity, "batch_size": plan.batch_size}
    document["shards"] = len(plan.shards)
    document["is_finished"] = inspection.is_finished
    return document


def print_inspection(inspection: Inspection) -> None:
    from hookx.images.listing import describe_columns

    plan = inspection.plan
    header = ["layer", "shape", "type", "size"]
    rows = [_stored_row(layer.address, layer.shape, layer.dtype, layer.bytes) for layer in inspection.layers]
    if any(layer.statistics for layer in inspection.layers):
        header += ["mean", "deviation", "minimum", "maximum", "zeros", "non-finite"]
        for row, layer in zip(rows, inspection.layers, strict=True):
            row += _statistics_texts(layer.statistics)
    # In a pipe no table has a header but this one: statistics would be a row of nameless numbers.
    if len(header) > 4 and not sys.stdout.isatty():
        rows.insert(0, header)
    if rows:
        print_rows(rows, header=header, right_aligned=range(3, len(header)))
    shards = f"{inspection.shards_finished:,} of {len(plan.shards):,} finished"
    if inspection.shards_finished == len(plan.shards) and not inspection.has_index:
        shards += ", index.csv missing"
    made = map(made_text, inspection.made)
    facts = [
        ("images", f"{inspection.rows:,} stored, {inspection.failures:,} failures, of {plan.image_count:,}"),
        *([("columns", describe_columns(inspection.columns))] if inspection.columns else []),
        *(("values", sentence) for sentence in inspection.counts.sentences()),
        *(("note", sentence) for sentence in inspection.ranges.sentences()),
        ("shards", f"{shards}; {decimal(inspection.bytes)} of activations"),
        *plan_facts(plan, made=made),
        *([] if inspection.self_checked is None else [("checked", checked_text(inspection.self_checked))]),
        ("plan", plan.fingerprint),
        ("result", f"{inspection.path}/ is {'finished' if inspection.is_finished else 'not finished'}"),
    ]
    if not inspection.is_finished:
        facts.append(("next", "the same hookx extract command goes on"))
    print_rows(facts)


def _statistics_texts(statistics: Statistics | None) -> list[str]:
    assert statistics is not None
    described = (statistics.mean, statistics.deviation, statistics.minimum, statistics.maximum)
    share = f"{statistics.zeros / max(statistics.values, 1):.1%}"
    numbers = ["-" if number is None else f"{number:.6g}" for number in described]
    return [*numbers, share, f"{statistics.non_finite:,}"]


def print_export(exported: Export) -> None:
    print_rows([_stored_row(exported.layer, exported.shape, exported.dtype, exported.bytes)])
    images = f"{exported.shape[0]:,} stored"
    if exported.failures:
        images += f", {exported.failures:,} could not be read, and are not in it"
    print_rows([("images", images), *(("result", file) for file in exported.files)])


def describe_gallery(gallery: Gallery) -> dict[str, Any]:
    """Describe the pictures that were drawn; an overview has no layer."""
    document = asdict(gallery)
    for picture in document["pictures"]:
        picture.update({name: picture[name] or None for name in ("image", "model", "layer")})
    return document


def print_gallery(gallery: Gallery) -> None:
    print_rows([(picture.file, picture.shows) for picture in gallery.pictures], header=("picture", "shows"))


def describe_layers(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """Describe a model's layers; in a shape, null stands for the batch."""
    return [
        {
            "path": str(Address(layer.path)),
            "class": layer.class_name,
            "parameters": layer.parameters,
            "calls": len(layer.calls),
            "never_called_because": layer.never_called_because or None,
            "same_as": layer.same_as or None,
            "outputs": _describe_tensors(layer.addresses()),
            "attention": _describe_tensors(layer.addresses(of_attention=True)),
        }
        for layer in layers
    ]


def _describe_tensors(tensors: Mapping[Address, TensorInfo]) -> list[dict[str, Any]]:
    return [
        {
            "address": str(address),
            "shape": _shape_with_batch(tensor),
            "dtype": tensor.dtype,
            "constant": tensor.is_constant,
            "problem": tensor.problem or None,
        }
        for address, tensor in tensors.items()
    ]


def _shape_with_batch(tensor: Any) -> list[int | None]:
    shape: list[int | None] = list(tensor.shape)
    if tensor.batch_dim is not None:
        shape.insert(tensor.batch_dim, None)
    return shape


def print_model_layers(layers: Sequence[Layer], tree: bool) -> None:
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
    print_rows(rows, header=("layer", "class", "output", "parameters", "calls"), right_aligned=(3,))


def _outputs_text(layer: Layer) -> str:
    texts: list[str] = []
    for address, tensor in (layer.addresses() | layer.addresses(of_attention=True)).items():
        text = f"{address.place}={tensor.shape_text}" if address.place else tensor.shape_text
        if tensor.is_constant:
            text += " (constant)"
        elif tensor.problem:
            text += " (not by image)" if tensor.is_dense else " (cannot be captured)"
        texts.append(text)
    return " ".join(dict.fromkeys(texts)) or "-"


def _in_tree(path: str) -> str:
    above, dot, name = path.rpartition(".")
    return path if path == "." else "  " * (above.count(".") + 1 + bool(dot)) + str(Address(name))


def _calls_text(layer: Layer) -> str:
    if layer.calls:
        return str(len(layer.calls)) + (f" (same module as {layer.same_as})" if layer.same_as else "")
    return "never called" + (f" ({layer.never_called_because})" if layer.never_called_because else "")


def describe_models(kinds: Mapping[str, str], weights: ModelWeights) -> dict[str, Any]:
    return {
        name: {"kind": kind, "weights": [{"name": weight, "cached": cached} for weight, cached in weights[name]]}
        for name, kind in kinds.items()
    }


def print_models(kinds: Mapping[str, str], weights: ModelWeights) -> None:
    """Print models, a line each: kind, and the names of their weights, marked where they are in the cache."""
    rows = [
        (name, kind, " ".join(f"{weight} (cached)" if is_cached else weight for weight, is_cached in weights[name]))
        for name, kind in kinds.items()
    ]
    print_rows(rows, header=("model", "kind", "weights"))


def versions() -> dict[str, str]:
    """Return what a bug report needs: the versions that are installed, torch's CUDA, and the devices here. No torch."""
    packages = {name: _version(name) for name in ("torch", "torchvision", "safetensors", "pillow")}
    return {"hookx": _version("hookx-vision"), "python": platform.python_version(), **packages, "CUDA": _cuda()}


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:  # A checkout that is only on PYTHONPATH, say.
        return "not installed"


def _cuda() -> str:
    # Read torch/version.py as text: importing it would import all of torch.
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    built_for = re.search(r"^cuda\b.*= '(.+)'", (Path(spec.origin).parent / "version.py").read_text(), re.MULTILINE)
    if not built_for:
        return "not in this torch"
    driver, devices = _cuda_devices()
    if not devices:
        return f"{built_for[1]}, no device here"
    return f"{built_for[1]}, driver {driver}: {', '.join(devices)}"


def _cuda_devices() -> tuple[str, list[str]]:
    """Return the newest CUDA that the driver can run, and the names of its devices: docs.nvidia.com/cuda."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "", []
    newest, count, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    if driver.cuInit(0) or driver.cuDriverGetVersion(ctypes.byref(newest)):
        return "", []
    names = []
    driver.cuDeviceGetCount(ctypes.byref(count))
    for number in range(count.value):
        driver.cuDeviceGetName(name, len(name), number)
        names.append(name.value.decode())
    return f"{newest.value // 1000}.{newest.value % 1000 // 10}", names


def print_rows(rows: Sequence[Sequence[str]], header: Sequence[str] = (), right_aligned: Sequence[int] = ()) -> None:
    """Print a table with a header on a terminal, or the rows in columns."""
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


def _print_table(rows: Sequence[Sequence[str]], header: Sequence[str], right_aligned: Sequence[int]) -> None:
    """Print a table in which no word is broken, so that names can be copied: the last columns go first."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    width = Console().width
    columns = list(zip(*([header] if header else []), *rows, strict=True))
    # A first column is one name in each row, which keeps its line; others fold between words.
    least = [max(map(cell_len, column if number == 0 else _words(column))) for number, column in enumerate(columns)]
    shown = _count_that_fit(least, width) if header else len(least)
    most = [max(map(cell_len, column)) for column in columns[:shown]]
    is_tight = _table_width(most) > width
    widths = _share_out(least[:shown], most, width)
    table = Table(box=box.SIMPLE_HEAD if header else None, show_header=bool(header), pad_edge=bool(header))
    for number in range(shown):
        table.add_column(
            header[number] if header else "",
            justify="right" if number in right_aligned else "left",
            style="bold" if number == 0 else "",
            width=widths[number] if is_tight else None,  # rich shrinks the widest below its longest word's width
            no_wrap=number == 0,
        )
    for row in rows:
        table.add_row(*map(Text, row[:shown]))  # Text, because brackets in a name are not markup.
    # A line that is still too long is left to the terminal, which copies it whole.
    console = Console(width=max(width, _table_width(least[:shown])))
    with console.capture() as printed:
        console.print(table, crop=False)
    print(re.sub(r" +$", "", printed.get(), flags=re.MULTILINE), end="")
    if shown < len(least):
        print(f"  not shown in {width} columns: {', '.join(header[shown:])}; a wider terminal or a pipe shows all")


def _words(cells: Iterable[str]) -> list[str]:
    return [word for cell in cells for word in cell.split()] or [""]


def _table_width(widths: Sequence[int]) -> int:
    return sum(widths) + 3 * len(widths) + 1  # a space on each side, one between, and the edges


def _share_out(least: Sequence[int], most: Sequence[int], width: int) -> list[int]:
    """Return widths of columns that share what a table leaves of a width, the last ones first."""
    widths, spare = list(least), max(0, width - _table_width(least))
    for number in reversed(range(len(widths))):
        more = min(spare, most[number] - widths[number])
        widths[number], spare = widths[number] + more, spare - more
    return widths


def _count_that_fit(widths: Sequence[int], width: int) -> int:
    """Return how many of the first columns fit into a width: at least one."""
    return next((count for count in range(len(widths), 1, -1) if _table_width(widths[:count]) <= width), 1)
