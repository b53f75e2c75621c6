"""Runs on a real Slurm end in the bytes of one process, even if a node dies in the middle of a shard."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.files import contents
from kit.runs import wait_for
from kit.slurm import NODES, Slurm, slurm
from kit.whole_runs import SHARDS, extract, hookx, is_writing, variables

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def three_nodes() -> Iterator[Slurm]:
    with slurm() as running:
        running.environment = variables(running.environment)
        yield running


def script_of(*arguments: str) -> str:
    return f"exec {shlex.join(hookx(*arguments))}"


def finish(out: Path) -> int:
    return subprocess.run(hookx("finish", str(out)), env=variables(), capture_output=True, timeout=60).returncode


def test_an_array_on_three_nodes_ends_in_the_bytes_of_one_process(
    three_nodes: Slurm, pictures: Path, at_once: Path, tmp_path: Path
) -> None:
    out = tmp_path / "features"
    job = three_nodes.sbatch(script_of(*extract(pictures, out)), "--array=0-2", "--cpus-per-task=2")
    tasks = three_nodes.wait(job)
    assert {task.node for task in tasks} == set(NODES)
    assert [(task.state, task.exit_code) for task in tasks] == [("COMPLETED", 0)] * 3, tasks[0].output
    for number, task in enumerate(tasks):
        assert f"part {number}/3 of the shards, by SLURM_ARRAY_TASK_ID" in task.output
    assert finish(out) == 3 and contents(out) == contents(at_once)


def test_a_node_that_dies_in_the_middle_of_a_shard_costs_no_byte(
    three_nodes: Slurm, pictures: Path, at_once: Path, tmp_path: Path
) -> None:
    out = tmp_path / "features"
    slow = f"export SLOW_SECONDS=$((SLURM_RESTART_COUNT ? 0 : 1))\n{script_of(*extract(pictures, out))}"
    job = three_nodes.sbatch(slow, "--array=0-2", "--cpus-per-task=2")
    wait_for(lambda: is_writing(out, three_nodes.nodes["n2"].processes), 60)
    three_nodes.kill_node("n2")
    wait_for(lambda: "DOWN" in three_nodes.state_of("n2"), 90)
    three_nodes.start_node("n2")
    tasks = three_nodes.wait(job, 180)
    assert sorted(task.restarts for task in tasks) == [0, 0, 1]
    assert {task.state for task in tasks} == {"COMPLETED"}
    assert finish(out) == 3 and contents(out) == contents(at_once)


def test_the_tasks_of_srun_are_parts(three_nodes: Slurm, pictures: Path, at_once: Path, tmp_path: Path) -> None:
    out = tmp_path / "features"
    done = three_nodes.srun("-n", "2", *hookx(*extract(pictures, out)))
    assert done.returncode == 0, done.stderr
    for number in range(2):
        assert f"part {number}/2 of the shards, by SLURM_PROCID and SLURM_STEP_NUM_TASKS" in done.stderr
    assert finish(out) == 3 and contents(out) == contents(at_once)


def test_a_script_without_srun_computes_everything_whatever_tasks_its_job_has(
    three_nodes: Slurm, pictures: Path, at_once: Path, tmp_path: Path
) -> None:
    out = tmp_path / "features"
    script = f"echo ntasks $SLURM_NTASKS\n{script_of(*extract(pictures, out))}"
    [job] = three_nodes.wait(three_nodes.sbatch(script, "--ntasks=6"))
    assert "ntasks 6" in job.output and "of the shards" not in job.output
    assert job.exit_code == 3, "this is the whole run, and images could not be read"
    assert contents(out) == contents(at_once)


def test_the_launcher_submits_an_array_and_what_finishes_it(
    three_nodes: Slurm, pictures: Path, at_once: Path, tmp_path: Path
) -> None:
    out = tmp_path / "features"
    options = ["--launcher", "slurm", "--tasks", "4", "--at-once", "2", "--sbatch", "--cpus-per-task=2", "--json"]
    submitted = subprocess.run(
        hookx(*extract(pictures, out, *options)),
        env=three_nodes.environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert submitted.returncode == 0, submitted.stderr
    document = json.loads(submitted.stdout)
    tasks = three_nodes.wait(document["job"])
    assert [task.exit_code for task in tasks] == [0] * 4, tasks[0].output
    [finishing] = three_nodes.wait(document["finish_job"])
    assert finishing.exit_code == 3, finishing.output
    assert contents(out) == contents(at_once)


def test_an_array_with_fewer_tasks_goes_on_where_another_was_cancelled(
    three_nodes: Slurm, pictures: Path, at_once: Path, tmp_path: Path
) -> None:
    out = tmp_path / "features"
    slow = f"export SLOW_SECONDS=0.5\n{script_of(*extract(pictures, out))}"
    job = three_nodes.sbatch(slow, "--array=0-2", "--cpus-per-task=2")
    wait_for(lambda: len(list(out.glob("shard-*"))) >= 2, 60)
    three_nodes.command("scancel", job)
    three_nodes.wait(job)
    assert 2 <= len(list(out.glob("shard-*"))) < SHARDS
    three_nodes.wait(three_nodes.sbatch(script_of(*extract(pictures, out)), "--array=0-1"))
    assert finish(out) == 3 and contents(out) == contents(at_once)
