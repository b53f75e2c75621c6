"""`--launcher slurm` writes a script that is the same run again; a real Slurm runs it in tests/cluster."""

from __future__ import annotations

import json
import os
import shlex
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import hookx
from hookx.cli.app import app
from hookx.cli.options import command
from hookx.errors import HookxError, UsageError
from hookx.options import CallOptions, ExtractOptions
from kit import warm
from kit.files import contents

RUN = ["extract", "-m", "resnet18", "-w", "none", "-l", "avgpool,layer4@mean23", "--shard-images", "2", "-b", "2"]
RUN += ["--resize", "32", "--crop", "32", "-j", "0", "--exclude", "layer1,layer2", "--mean", "0.1,0.2,0.3"]
SLURM = ["--launcher", "slurm", "--tasks", "3", "--at-once", "2", "--sbatch", "--gpus=1 -p 'a 100' -t 4:00:00"]


def invoke(*arguments: str) -> Any:
    result = CliRunner().invoke(app, list(arguments))
    if isinstance(result.exception, HookxError):
        raise result.exception
    return result


def scripts_of(*arguments: str) -> dict[str, str]:
    result = invoke(*arguments, "--dry-run", "--json")
    document = json.loads(result.stdout)
    assert document["job"] is None
    return {Path(file).name: text for file, text in document["scripts"].items()}


def said_by(words: list[str]) -> ExtractOptions:
    """Return the options that a command line means."""
    taken: list[ExtractOptions] = []

    @command("extract")
    def extract(options: ExtractOptions, call: CallOptions) -> None:
        taken.append(options)

    import typer

    other = typer.Typer()
    extract.add_to(other)
    result = CliRunner().invoke(other, words)
    assert result.exit_code == 0, result.output
    return taken[0]


def test_a_task_is_the_same_run_without_its_launcher(mixed_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "the features"
    scripts = scripts_of(*RUN, *SLURM, "-o", str(out), str(mixed_folder))
    last = scripts["extract.sh"].splitlines()[-1]
    words = shlex.split(last)
    assert words[0] == "exec" and words[2:5] == ["-m", "hookx", "extract"]
    again, asked = said_by(words[5:]), said_by([*RUN[1:], "-o", str(out), str(mixed_folder)])
    assert again == asked


def test_the_scripts_hold_what_slurm_and_the_user_need(mixed_folder: Path, tmp_path: Path) -> None:
    scripts = scripts_of(*RUN, *SLURM, "-o", str(tmp_path / "features"), str(mixed_folder))
    lines = [line.removeprefix("#SBATCH ") for line in scripts["extract.sh"].splitlines()]
    assert {"--array=0-2%2", "--requeue", "--signal=B:TERM@120", "--gpus=1 -p 'a 100' -t 4:00:00"} <= set(lines)
    finish = scripts["finish.sh"].splitlines()
    assert "#SBATCH -p 'a 100'" in finish and not any("gpus" in line for line in finish)
    assert shlex.split(finish[-1])[3:] == ["hookx", "finish", str(tmp_path / "features"), "--parts", "3"]
    for text in scripts.values():
        assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    assert not (tmp_path / "features").exists() and not (tmp_path / "features.slurm").exists()


def test_more_tasks_than_shards_would_have_nothing_to_do(mixed_folder: Path, tmp_path: Path) -> None:
    scripts = scripts_of(*RUN, "--launcher", "slurm", "--tasks", "64", "-o", str(tmp_path / "o"), str(mixed_folder))
    assert "#SBATCH --array=0-4\n" in scripts["extract.sh"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--launcher", "slurm"], "how many tasks is the array to have"),
        (["--launcher", "slurm", "--tasks", "2", "--shard", "0/2"], "a task of the array computes its part"),
        (["--launcher", "slurm", "--tasks", "2", "--devices", "cpu*2"], "a task of the array computes its part"),
        (["--launcher", "slurm", "--tasks", "2", "--sbatch", "--array=0-7"], "--array=0-7 does not belong"),
        (["--tasks", "2"], "--tasks needs a launcher"),
        (["--ray-address", "auto"], "--ray-address needs a launcher"),
        (["--launcher", "slrm"], "invalid --launcher 'slrm': choose slurm, ray"),
        (["--launcher", "slurm", "--tasks", "0"], "--tasks must be at least 1, got 0"),
    ],
)
def test_what_does_not_fit_together_is_an_error(
    arguments: list[str], problem: str, mixed_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=problem.replace("*", r"\*")):
        invoke(*RUN, *arguments, "-o", str(tmp_path / "features"), str(mixed_folder))
    assert not (tmp_path / "features").exists()


def test_an_absent_slurm_is_an_error_that_names_the_way_out(
    mixed_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HookxError, match=r"(?s)no sbatch on the PATH.*--dry-run"):
        invoke(*RUN, *SLURM, "-o", str(tmp_path / "features"), str(mixed_folder))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="submits jobs"):
        hookx.extract("resnet18", "avgpool", mixed_folder, weights="none", launcher="slurm", tasks=3)


@pytest.mark.cluster
def test_the_scripts_are_submitted_and_what_they_do_is_the_run(
    mixed_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/submitted\nwc -l < {tmp_path}/submitted\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    out, listed = tmp_path / "features", "\n".join(str(file) for file in sorted(mixed_folder.iterdir()))
    hookx_command = [*warm.python("torch"), "-m", "hookx"]
    done = subprocess.run(
        [*hookx_command, *RUN, *SLURM, "-o", str(out), "-"], input=listed, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0 and "job     1: 3 tasks, 2 at once" in done.stdout, done.stderr
    folder = tmp_path / "features.slurm"
    assert (tmp_path / "submitted").read_text().splitlines() == [
        f"--parsable {folder}/extract.sh",
        f"--parsable --dependency=afterany:1 {folder}/finish.sh",
    ]
    for task in ("2", "0", "1"):
        variables = {"MIN": "0", "MAX": "2", "STEP": "1", "COUNT": "3", "ID": task}
        array = {f"SLURM_ARRAY_TASK_{name}": value for name, value in variables.items()}
        assert subprocess.run(["bash", folder / "extract.sh"], env=os.environ | array, timeout=100).returncode == 0
    assert subprocess.run(["bash", folder / "finish.sh"], timeout=100).returncode == 3
    alone = [*hookx_command, *RUN, "-o", str(tmp_path / "alone"), "-"]
    assert subprocess.run(alone, input=listed, text=True, timeout=100).returncode == 3
    assert contents(out) == contents(tmp_path / "alone")
