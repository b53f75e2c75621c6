"""The Slurm of the tests is a real one: it runs arrays and steps, and survives the death of a node."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.runs import wait_for
from kit.slurm import NODES, Slurm, slurm

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def three_nodes() -> Iterator[Slurm]:
    with slurm() as running:
        yield running


def test_an_array_runs_on_all_nodes(three_nodes: Slurm) -> None:
    jobs = three_nodes.wait(
        three_nodes.sbatch("echo $SLURM_ARRAY_TASK_ID; sleep 1", "--array=0-2", "--cpus-per-task=2")
    )
    assert {job.node for job in jobs} == set(NODES)
    assert [(job.state, job.output) for job in jobs] == [("COMPLETED", f"{number}\n") for number in range(3)]


def test_a_step_has_as_many_tasks_as_srun_is_asked_for(three_nodes: Slurm) -> None:
    done = three_nodes.srun("-n", "4", "bash", "-c", "echo $SLURM_PROCID of $SLURM_STEP_NUM_TASKS")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"{number} of 4" for number in range(4)]


def test_a_job_whose_node_is_killed_runs_again(three_nodes: Slurm, tmp_path: Path) -> None:
    started = tmp_path / "started"
    job = three_nodes.sbatch(f"echo $$ >> {started}; sleep $((SLURM_RESTART_COUNT ? 0 : 1000))", "-w", "n2")
    wait_for(lambda: started.exists() and started.read_text().endswith("\n"), 60)
    first = int(started.read_text())
    assert first in three_nodes.nodes["n2"].processes
    three_nodes.kill_node("n2")
    assert not Path(f"/proc/{first}").exists()
    wait_for(lambda: "DOWN" in three_nodes.state_of("n2"), 60)
    three_nodes.start_node("n2")
    [ended] = three_nodes.wait(job)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1)
    assert len(started.read_text().split()) == 2
