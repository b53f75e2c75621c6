"""A run as an array of Slurm's: its script, its submission, and the job that finishes the run behind it.

Nothing of hookx stays on the login node. Each task is an ordinary `hookx extract`, which Slurm tells its part; a task
whose node is lost is requeued by Slurm, and skips what it had finished.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hookx.errors import HookxError, UsageError
from hookx.images.files import File, first_with_query
from hookx.launch.messages import check_can_be_sent
from hookx.options import ExtractOptions, LauncherOptions, list_paths
from hookx.options.option import options_of, words_of
from hookx.run.prepare import Job
from hookx.store.files import report_write_errors
from hookx.store.location import absolute, location_of

_OF_FINISH = ("-p", "--partition", "-A", "--account", "-q", "--qos")  # A job without a GPU needs these as well.
_OURS = ("-a", "--array")
_WARNING_SECONDS = 120  # before Slurm kills a task: time for the shard in hand


@dataclass(frozen=True)
class Submission:
    """A run's scripts, and the jobs that they became.

    Args:
        scripts: the text of each, by the file that it is written to.
        job, finish_job: their numbers; '' if nothing was submitted.
    """

    out: str
    tasks: int
    at_once: int | None
    scripts: dict[Path, str]
    job: str = ""
    finish_job: str = ""


def check_options(options: ExtractOptions) -> None:
    """Raise `UsageError` if the options do not make an array."""
    if options.tasks is None:
        raise UsageError("how many tasks is the array to have?", "say it, as in --tasks 64 --at-once 16")
    if options.devices or options.shard:
        raise UsageError("a task of the array computes its part on its device", "leave out --shard and --devices")
    if ours := [word for word in _split(options.sbatch) if word.partition("=")[0] in _OURS]:
        raise UsageError(f"{ours[0]} does not belong into --sbatch", "hookx makes the array: --tasks 64 --at-once 16")


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(f"invalid --sbatch '{text}': {error}", "as in --sbatch '--gpus=1 -t 4:00:00'") from None


def describe_submission(job: Job, standard_input: Iterable[File] = ()) -> Submission:
    """Write the scripts of a run that was checked, without submitting anything.

    Args:
        standard_input: the files that standard input named; a task gets them from a file.
    """
    options = job.options
    check_can_be_sent(options)
    assert options.tasks is not None
    own, tasks = _split(options.sbatch), min(options.tasks, len(job.plan.shards))
    out = absolute(location_of(options.out))
    folder = Path(f"{out}.slurm" if isinstance(out, Path) else os.path.abspath(f"{out.name}.slurm"))
    at_once = f"%{options.at_once}" if options.at_once else ""
    hookx = [sys.executable, "-m", "hookx"]
    without = {name: option.default for name, option in options_of(LauncherOptions).items()}
    kept = dataclasses.replace(options, **without)
    words = words_of(kept, ExtractOptions)
    sources, listed = list_paths(options.images), folder / "images.list"
    if signed := first_with_query(job.images.files, [str(source) for source in sources]):
        raise UsageError(
            f"--launcher slurm writes scripts, and '{signed}' has a query, which may be a signature",
            "name the images in a table that lies where all nodes see it",
        )
    from_list = any(source in ("-", "-0") for source in sources)
    words += ["-0", "--", "-"] if from_list else ["--", *map(str, sources)]
    redirected = f" < {shlex.quote(str(listed))}" if from_list else ""
    extract = f"exec {shlex.join([*hookx, 'extract', *words])}{redirected}"
    finish = f"exec {shlex.join([*hookx, 'finish', str(out), '--parts', str(tasks)])}"
    scripts = {
        folder / "extract.sh": _script(
            [
                "--job-name=hookx",
                f"--array=0-{tasks - 1}{at_once}",
                "--requeue",
                "--open-mode=append",
                f"--signal=B:TERM@{_WARNING_SECONDS}",
                f"--output={folder}/part-%a.txt",
            ],
            own,
            extract,
        ),
        folder / "finish.sh": _script(
            ["--job-name=hookx-finish", f"--output={folder}/finish.txt"], _for_finish(own), finish
        ),
    }
    if from_list:
        if job.images.files.archives:
            raise UsageError(
                "--launcher slurm takes archives or a list on standard input, and not both", "submit two runs"
            )
        scripts[listed] = "".join(f"{file}\0" for file in standard_input)
    return Submission(str(options.out), tasks, options.at_once, scripts)


def submit(submission: Submission) -> Submission:
    """Write the scripts, and submit them: the array, and behind it what finishes the run; `HookxError` if refused."""
    if shutil.which("sbatch") is None:
        raise HookxError(
            "Slurm is not here: no sbatch on the PATH",
            "run this where jobs are submitted; or write the scripts only: --dry-run",
        )
    for file, text in submission.scripts.items():
        with report_write_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(os.fsencode(text))
    extract, finish, *_ = submission.scripts
    job = _sbatch(extract)
    return dataclasses.replace(submission, job=job, finish_job=_sbatch(finish, f"--dependency=afterany:{job}"))


def _script(options: Iterable[str], own: list[str], command: str) -> str:
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options), f"#SBATCH --chdir={shlex.quote(os.getcwd())}"]
    if own:
        lines.append(f"#SBATCH {shlex.join(own)}")
    # exec: Slurm's signals reach hookx, which finishes what it has in hand.
    return "\n".join([*lines, "", command, ""])


def _for_finish(own: list[str]) -> list[str]:
    """Return the options of sbatch that say where jobs may run at all."""
    kept: list[str] = []
    takes_next = False
    for word in own:
        name = word.partition("=")[0]
        if takes_next or name in _OF_FINISH or (re.match(r"-[pAq].", word) and not word.startswith("--")):
            kept.append(word)
        takes_next = not takes_next and word in _OF_FINISH
    return kept


def _sbatch(file: Path, *options: str) -> str:
    command = ["sbatch", "--parsable", *options, str(file)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise HookxError(f"cannot run sbatch: {error}") from None
    if done.returncode:
        raise HookxError(f"sbatch refused {file}: {' '.join(done.stderr.split())}", "see man sbatch; change --sbatch")
    return done.stdout.strip().partition(";")[0]
