"""What the commands report that compute a run: `extract`, `plan`, `status` and `finish`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from hookx.cli.reports import Facts, checked_text, describe_stored, made_text, plan_facts, print_rows, print_stored
from hookx.cli.streams import print_lines

if TYPE_CHECKING:  # They import torch.
    from hookx.check.finish import Finished
    from hookx.check.status import Status
    from hookx.launch.slurm import Submission
    from hookx.run.prepare import Job
    from hookx.run.summary import Summary

# The fields of a summary's document, in order.
_SUMMARY = (
    *("out", "model", "weights", "notes", "preprocessing", "layers", "images", "failures"),
    *("not_taken", "columns", "chosen", "shards", "shards_computed"),
    *("images_computed", "bytes", "device", "precision", "memory_format", "batch_size", "workers", "rotations_ignored"),
    *("ranges", "counts", "self_checked", "reused"),
    *("seconds_total", "seconds_reading", "seconds_nvjpeg", "seconds_model", "seconds_copying", "seconds_writing"),
    *("busy", "bound_by", "files"),
)


def describe_summary(summary: Summary) -> dict[str, Any]:
    document: dict[str, Any] = {name: getattr(summary, name) for name in _SUMMARY}
    document["preprocessing"] = asdict(summary.preprocessing)
    document["layers"] = describe_stored(summary.layers, summary.images)
    if summary.part is not None:
        document["part"] = {"number": summary.part.number, "count": summary.part.count}
        document["shards_finished"] = summary.shards_finished
    return document


def print_summary(summary: Summary) -> None:
    print_stored(summary.layers, summary.images)
    stored = f"{summary.images:,} stored"
    if summary.failures:
        where = "(failures.csv says why)" if summary.is_complete else "(failures.csv will say why)"
        stored += f", {summary.failures:,} could not be read {where}"
    facts = [("images", stored), *(("values", sentence) for sentence in summary.counts.sentences())]
    facts += [("note", sentence) for sentence in summary.remarks.sentences()]
    facts += [("note", sentence) for sentence in summary.ranges.sentences()]
    if summary.reused:
        total = summary.images * len(summary.layers)
        facts.append(("reused", f"{summary.reused:,} of {total:,} activations, copied from other runs"))
    if summary.rotations_ignored:
        note = f"{summary.rotations_ignored:,} images carry a rotation that was ignored; --exif apply turns them"
        facts.append(("rotation", note))
    if summary.part is not None:
        facts.insert(0, ("part", f"{summary.part.number} of {summary.part.count}"))
    shards, there = f"{len(summary.files):,}", len(summary.files) - summary.shards_computed
    if there:
        shards += f", {there:,} of them already there"
    facts.append(("shards", f"{shards}; {decimal(summary.bytes)} of activations"))
    facts += plan_facts(summary.plan, summary.device, batch_size=summary.batch_size, notes=summary.notes)
    if summary.part is None or summary.images_computed:
        facts.append(("checked", checked_text(summary.self_checked)))
    facts.append(("time", _time_text(summary)))
    result = f"{summary.out}/"
    if not summary.is_complete:
        result += f" has {summary.shards_finished:,} of {summary.shards:,} shards; the other parts compute the rest"
    print_rows([*facts, ("result", result)])


def _time_text(summary: Summary) -> str:
    """Write how fast a run was, and the share of the time for which each part worked, the slowest first."""
    speed = f"{summary.seconds_total:.1f} s, {summary.images_computed / summary.seconds_total:.0f} images/s"
    parts = sorted(summary.busy, key=lambda part: part != summary.bound_by)
    busy = [f"{part} {summary.busy[part]:.0%}" for part in parts if round(summary.busy[part], 2)]
    return f"{speed}; busy: {', '.join(busy)}" if busy else speed


def describe_job(job: Job) -> dict[str, Any]:
    plan = job.plan
    return {
        "dry_run": True,
        "out": str(job.out),
        "model": plan.model,
        "weights": plan.weights,
        "preprocessing": asdict(plan.preprocessing),
        "layers": describe_stored(plan.layers, plan.image_count),
        "images": plan.image_count,
        "not_taken": dict(job.images.remarks.not_taken),
        "columns": dict(job.images.remarks.columns),
        "chosen": job.images.remarks.chosen,
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


def print_job(job: Job, *, is_begun: bool = False) -> None:
    plan = job.plan
    print_stored(plan.layers, plan.image_count)
    pending = f"{len(job.pending):,} of {len(plan.shards):,} to compute"
    nothing_written = f"{job.out}/ (nothing was written)"
    free = "" if job.bytes_free is None else f", {decimal(job.bytes_free)} free"
    print_rows(
        [
            ("images", f"{plan.image_count:,}"),
            *(("note", sentence) for sentence in job.images.remarks.sentences()),
            ("shards", f"{pending}, of up to {plan.images_per_shard:,} images"),
            ("bytes", f"{decimal(job.bytes_to_write)} to write{free}"),
            *plan_facts(plan, job.device),
            ("result", f"{job.out}/ is begun; compute it with hookx extract" if is_begun else nothing_written),
        ]
    )


def describe_status(status: Status) -> dict[str, Any]:
    plan = status.plan
    document = asdict(status)
    document["plan"] = plan.fingerprint
    document |= {"shards": len(plan.shards), "images": plan.image_count, "is_finished": status.is_finished}
    return document


def print_status(status: Status) -> None:
    plan = status.plan
    share = f" ({status.images_finished / plan.image_count:.0%})"
    facts = [
        ("model", f"{plan.model}: {', '.join(layer.address for layer in plan.layers)}"),
        ("shards", f"{status.shards_finished:,} of {len(plan.shards):,} finished"),
        ("images", f"{status.images_finished:,} of {plan.image_count:,}{share}"),
    ]
    for writer in status.writers or ():
        shards = ", ".join(map(str, writer.shards))
        facts.append(
            ("writing", f"{writer.host}, process {writer.process}: {shards}; {_ago_text(writer.seconds_ago)} ago")
        )
    if status.images_per_second is not None:
        facts.append(("speed", f"{status.images_per_second:,.3g} images/s"))
    if status.seconds_left is not None:
        facts.append(("left", _ago_text(status.seconds_left)))
    if status.seconds_ago is not None:
        facts.append(("last", f"a shard was finished {_ago_text(status.seconds_ago)} ago"))
    print_rows([*facts, ("result", f"{status.path}/ {_state_text(status)}")])


def _state_text(status: Status) -> str:
    if status.is_finished:
        return "is finished" + (", with images that could not be read: failures.csv" if status.has_failures else "")
    if status.shards_finished == len(status.plan.shards):
        return f"has all of its shards; write its index with hookx finish {status.path}"
    if status.writers is None:
        return "is not finished"
    return "is being computed" if status.writers else "is not finished, and nobody is writing"


def _ago_text(seconds: float) -> str:
    """Write a time to two places, as in '45 s', '3 min 20 s' or '2 d 4 h'."""
    whole = round(seconds)
    places = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s")]
    while len(places) > 1 and not places[0][0]:
        places.pop(0)
    return " ".join(f"{count} {unit}" for count, unit in places[:2] if count or unit == places[0][1])


def describe_finished(finished: Finished) -> dict[str, Any]:
    plan, totals = finished.plan, finished.totals
    return {
        "out": finished.path,
        "layers": describe_stored(plan.layers, totals.rows),
        "images": totals.rows,
        "failures": totals.failures,
        "shards": len(plan.shards),
        "bytes": totals.rows * plan.bytes_per_image,
        "rotations_ignored": totals.rotations_ignored,
        "ranges": totals.ranges,
        "counts": totals.counts,
        "self_checked": totals.self_checked,
        "made": [{"made": dict(made), "shards": shards} for made, shards in finished.made],
    }


def print_finished(finished: Finished) -> None:
    plan, totals = finished.plan, finished.totals
    print_stored(plan.layers, totals.rows)
    stored = f"{totals.rows:,} stored"
    if totals.failures:
        stored += f", {totals.failures:,} could not be read (failures.csv says why)"
    facts: Facts = [("images", stored), *(("values", sentence) for sentence in totals.counts.sentences())]
    facts += [("note", sentence) for sentence in totals.ranges.sentences()]
    facts.append(("shards", f"{len(plan.shards):,}; {decimal(totals.rows * plan.bytes_per_image)} of activations"))
    facts += plan_facts(plan)
    if len(finished.made) == 1:
        facts.append(("made", made_text(finished.made[0][0])))
    else:
        common = _common(finished.made)
        for made, shards in finished.made:
            differing = {name: value for name, value in made.items() if name not in common}
            facts.append(("made", f"{shards:,} shards: {made_text(differing)}"))
        facts.append(
            ("note", "these kinds of machine can differ by rounding; hookx verify --recompute says by how much")
        )
    facts.append(("checked", checked_text(totals.self_checked)))
    print_rows([*facts, ("result", f"{finished.path}/ is finished")])


def _common(made: tuple[tuple[Mapping[str, Any], int], ...]) -> set[str]:
    """Return what all kinds of machine have in common, by name."""
    first = made[0][0]
    return {name for name, value in first.items() if all(other.get(name) == value for other, _ in made)}


def describe_submission(submission: Submission) -> dict[str, Any]:
    return {
        "out": submission.out,
        "tasks": submission.tasks,
        "at_once": submission.at_once,
        "job": submission.job or None,
        "finish_job": submission.finish_job or None,
        "scripts": {str(file): text for file, text in submission.scripts.items() if file.suffix == ".sh"},
    }


def print_submission(submission: Submission) -> None:
    """Print the numbers of the jobs; or, if nothing was submitted, the scripts."""
    scripts = [file for file in submission.scripts if file.suffix == ".sh"]
    if not submission.job:
        for file in scripts:
            print_lines([f"# {file}", *submission.scripts[file].splitlines(), ""])
        return
    at_once = f", {submission.at_once} at once" if submission.at_once else ""
    print_rows(
        [
            ("job", f"{submission.job}: {submission.tasks} tasks{at_once}"),
            ("then", f"{submission.finish_job}: hookx finish"),
            *(("script", str(file)) for file in scripts),
            ("watch", f"hookx status {submission.out}"),
        ]
    )
