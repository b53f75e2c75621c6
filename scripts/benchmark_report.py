#!/usr/bin/env python
"""Show the measurements of scripts/benchmark.py: ratios, goals, a table and a picture.

    scripts/benchmark_report.py speed.json                         print the table
    scripts/benchmark_report.py speed.json --picture speed.png     and draw the picture

The docstring of scripts/benchmark.py defines the figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HOOKX = ("hookx", "hookx-bf16")


@dataclass(frozen=True)
class Goal:
    """A speed that hookx aims for on 2 cores: at least this many times as fast as something else."""

    model: str
    layers: str
    against: str
    at_least: float


GOALS = [
    Goal("resnet18", layers, against, at_least)
    for layers, goals in {
        "pooled": {"hand-written": 1.6, "bound": 0.9, "fastest other": 1.5},
        "first+pooled": {"hand-written": 2.2, "bound": 0.85, "fastest other": 2.0},
        "early": {"hand-written": 3.5, "bound": 0.85, "fastest other": 2.3},
        "first": {"hand-written": 5.0, "bound": 0.8, "fastest other": 3.0, "write only": 0.9},
    }.items()
    for against, at_least in goals.items()
]


# --- figures -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """A figure over all rounds."""

    median: float
    lowest: float
    highest: float
    rounds: tuple[float, ...]

    @classmethod
    def of(cls, rounds: Sequence[float]) -> Spread:
        return cls(statistics.median(rounds), min(rounds), max(rounds), tuple(rounds))

    def __str__(self) -> str:
        return f"{format_number(self.median)} ({format_number(self.lowest)}-{format_number(self.highest)})"


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Divide round by round: what slowed the machine down in a round slowed both."""
    return Spread.of([a / b for a, b in zip(ours, theirs, strict=True)])


def bound_of(limits: Mapping[str, Mapping[str, Any]], cores: int) -> float:
    """Return the images per second of a program that wastes nothing; scripts/benchmark.py derives the formula."""
    write_cpu = limits["write"]["cpu_seconds_per_image"]
    on_the_cores = (
        1 / limits["decode"]["images_per_second"] + 1 / limits["forward"]["images_per_second"] + write_cpu / cores
    )
    return float(1 / max(on_the_cores, limits["write"]["seconds_per_image"] - write_cpu))


def ratios_of(contestants: Mapping[str, Any], limits: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the speed of hookx relative to each contestant that agrees, the fastest of them, and the bound."""

    def rates(name: str, how: str) -> tuple[float, ...]:
        return tuple(contestants[name]["images_per_second"][how]["rounds"])

    timed = [name for name, one in contestants.items() if one["status"] == "agrees" and name != "hookx"]
    ratios: dict[str, dict[str, Any]] = {
        name: {how: asdict(paired(rates("hookx", how), rates(name, how))) for how in ("steady", "whole")}
        for name in timed
    }
    others = [name for name in timed if name not in HOOKX]
    if others:
        fastest = max(others, key=lambda name: statistics.median(rates(name, "steady")))
        ratios["fastest other"] = {"name": fastest, **ratios[fastest]}
    ratios["bound"] = {"steady": asdict(paired(rates("hookx", "steady"), limits["bound"]["rounds"]))}
    ratios["write only"] = {
        "steady": asdict(paired(limits["hookx's writer"]["rounds"], limits["write only"]["rounds"]))
    }
    return ratios


def goals_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the goals that the measured rows decide, each with its measurement."""
    by_name = {(row["model"], row["layers"]): row for row in rows}
    decided = []
    for goal in GOALS:
        ratio = by_name.get((goal.model, goal.layers), {"ratios": {}})["ratios"].get(goal.against)
        if ratio:
            measured = ratio["steady"]["median"]
            decided.append({**asdict(goal), "measured": measured, "met": measured >= goal.at_least})
    first, pooled = by_name.get(("resnet18", "first")), by_name.get(("resnet18", "pooled"))
    if first and pooled and first["images"] >= 1000 and "hand-written" in pooled["contestants"]:
        # The pooled activations are tiny, so this is the memory of a model and a loader.
        without_activations = pooled["contestants"]["hand-written"]["peak_bytes"]
        peak_bytes, two_shards = first["contestants"]["hookx"]["peak_bytes"], 2 * 512 * 2**20
        if without_activations:
            share = (without_activations + two_shards) / peak_bytes
            against = "hand-written's model and loader and two shards, in memory"
            decided.append({**asdict(Goal("resnet18", "first", against, 1.0)), "measured": share, "met": share >= 1.0})
    return decided


def sentence_of(goal: Mapping[str, Any]) -> str:
    what = f"{goal['model']} {goal['layers']}, hookx/{goal['against']}"
    verdict = "met" if goal["met"] else "missed"
    return f"goal {verdict}: {what} {format_number(goal['measured'])} (at least {format_number(goal['at_least'])})"


# --- the table -----------------------------------------------------------------------------------------------------


def format_number(value: float) -> str:
    """Format a number with at least three digits: '1,284', '46.2', '0.91'."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def format_bytes(size_bytes: float | None) -> str:
    if size_bytes is None:
        return "-"
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.3g} {unit}"
    return f"{size_bytes / 1e3:.3g} kB"


def table_of(row: Mapping[str, Any]) -> str:
    """Format a row as text: one line per contestant, then the limits."""

    def spread(values: Mapping[str, Any]) -> str:
        return str(Spread(values["median"], values["lowest"], values["highest"], ()))

    lines = [["", "images/s steady", "whole", "hookx/this steady", "whole", "CPU s/image", "memory", "written"]]
    for name, one in row["contestants"].items():
        if one["status"] != "agrees":
            lines.append([name, f"{one['status']}: {one['reason']}"])
            continue
        rates, ratios = one["images_per_second"], row["ratios"].get(name)
        lines.append(
            [
                name,
                *(spread(rates[how]) for how in ("steady", "whole")),
                *(spread(ratios[how]) if ratios else "-" for how in ("steady", "whole")),
                format_number(one["cpu_seconds_per_image"]["median"]),
                format_bytes(one["peak_bytes"]),
                format_bytes(one["bytes_written"]),
            ]
        )
    for name, values in row["limits"].items():
        ratio = row["ratios"]["bound"]["steady"] if name == "bound" else None
        lines.append([name, spread(values), "", spread(ratio) if ratio else "", values.get("pass", "")])
    widths = [max(len(line[column]) for line in lines if len(line) > max(2, column)) for column in range(len(lines[0]))]
    texts = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)).rstrip() for line in lines]
    title = f"{row['model']}, {row['layers']}: {row['selectors']}; {row['images']} images, "
    return "\n".join([title + f"{format_bytes(row['bytes_per_image'])} each", *texts, ""])


# --- the picture ---------------------------------------------------------------------------------------------------

# Colours and markers that are distinct on white and on black, also for colour-blind readers.
_MARKS = {
    "hookx": ("#e8542c", "o"),
    "hand-written": ("#3b8fd9", "s"),
    "fx": ("#2aa584", "^"),
    "naive": ("#9a7fd1", "v"),
    "torchhook": ("#c9972b", "D"),
    "torchextractor": ("#7d9c3c", "P"),
    "torchlens": ("#cf6ba9", "X"),
}
_GREY = "#808080"


def draw(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw each row as a line: the images per second of each contestant, relative to the bound. No background."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), _GREY)
    with matplotlib.rc_context({**colours, "font.size": 11, "svg.hashsalt": "hookx"}):
        figure, axes = pyplot.subplots(figsize=(9, 1.6 + 0.34 * len(rows)), layout="constrained")
        labelled = set()
        for line, row in enumerate(rows):
            bound = row["limits"]["bound"]["median"]
            axes.axhline(line, color=_GREY, linewidth=0.5, alpha=0.5, zorder=0)
            for name, (colour, marker) in _MARKS.items():
                one = row["contestants"].get(name, {"status": "left out"})
                if one["status"] == "agrees":
                    rates = one["images_per_second"]["steady"]
                    size = 10 if name == "hookx" else 7
                    label = None if name in labelled else name
                    labelled.add(name)
                    span = [rates["lowest"] / bound, rates["highest"] / bound]
                    axes.plot(span, [line, line], color=colour, linewidth=2)
                    axes.plot(
                        rates["median"] / bound, line, marker, color=colour, markersize=size, label=label, zorder=3
                    )
            hookx = row["contestants"]["hookx"]["images_per_second"]["steady"]["median"]
            axes.annotate(
                f"{format_number(hookx)} images/s",
                (1.02, line),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=10,
            )
        axes.axvline(1, color=_GREY, linewidth=1.5, linestyle="--", zorder=0)
        axes.set_yticks(range(len(rows)), [f"{row['model']}  {row['layers']}" for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(left=0)
        cores = rows[0]["cores"]
        axes.set_xlabel(f"share of what {cores} cores can do if nothing is wasted (steady state; right: hookx)")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        figure.legend(loc="outside upper center", ncols=4, frameon=False)
        figure.savefig(file, transparent=True, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)
        pyplot.close(figure)


def main() -> int:
    """Print the table of a JSON file and draw its picture."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figures", type=Path, help="JSON file from scripts/benchmark.py --json")
    parser.add_argument("--picture", type=Path, metavar="FILE", help=".svg or .png")
    arguments = parser.parse_args()
    rows = json.loads(arguments.figures.read_text())["rows"]
    for row in rows:
        print(table_of(row))
    for goal in goals_of(rows):
        print(sentence_of(goal))
    if arguments.picture:
        draw(rows, arguments.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
