"""Runs on a real Ray end in the bytes of one process, even if a node dies, or freezes and thaws."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.files import contents
from kit.kept import Kept
from kit.ray_cluster import RayCluster, ray_cluster
from kit.runs import wait_for
from kit.whole_runs import extract, hookx, is_writing, variables

pytestmark = pytest.mark.cluster


@pytest.fixture
def two_nodes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[RayCluster]:
    """Give a cluster whose net takes as many seconds for an image as the test's parameter says."""
    for name, value in variables(SLOW_SECONDS=str(getattr(request, "param", 0))).items():
        monkeypatch.setenv(name, value)
    with ray_cluster() as cluster:
        yield cluster


def command(cluster: RayCluster, pictures: Path, out: Path) -> list[str]:
    return hookx(*extract(pictures, out, "--launcher", "ray", "--ray-address", cluster.address))


def writers(cluster: RayCluster, out: Path) -> set[str]:
    return {name for name, node in cluster.nodes.items() if is_writing(out, node.processes)}


def start(cluster: RayCluster, pictures: Path, out: Path) -> Kept:
    """Start a run; return when both nodes are in the middle of a shard."""
    driver = Kept(command(cluster, pictures, out), out.parent / "said.txt", cluster.environment)
    wait_for(lambda: len(writers(cluster, out)) == 2 or not driver.is_running, 120)
    assert driver.is_running, driver.log.read_text()
    return driver


def test_both_nodes_compute_and_end_in_the_bytes_of_one_process(
    two_nodes: RayCluster, pictures: Path, at_once: Path, tmp_path: Path
) -> None:
    out = tmp_path / "features"
    done = subprocess.run(
        command(two_nodes, pictures, out), env=two_nodes.environment, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 3, done.stderr
    assert contents(out) == contents(at_once)


@pytest.mark.parametrize("two_nodes", [0.5], indirect=True)
def test_a_node_that_dies_in_the_middle_of_a_shard_costs_no_byte(
    two_nodes: RayCluster, pictures: Path, at_once: Path, tmp_path: Path
) -> None:
    out = tmp_path / "features"
    driver = start(two_nodes, pictures, out)
    try:
        two_nodes.kill_node("n2")
        wait_for(lambda: not driver.is_running, 90)
    finally:
        driver.end()
    assert contents(out) == contents(at_once), driver.log.read_text()


@pytest.mark.parametrize("two_nodes", [0.5], indirect=True)
def test_a_node_that_freezes_in_the_middle_of_a_shard_and_thaws_costs_no_byte(
    two_nodes: RayCluster, pictures: Path, at_once: Path, tmp_path: Path
) -> None:
    out = tmp_path / "features"
    driver = start(two_nodes, pictures, out)
    try:
        two_nodes.freeze_node("n2")
        wait_for(lambda: not driver.is_running, 90)
        two_nodes.thaw_node("n2")
        wait_for(lambda: not writers(two_nodes, out), 60)
    finally:
        driver.end()
    subprocess.run(hookx("finish", str(out)), env=variables(), capture_output=True, timeout=60)
    assert contents(out) == contents(at_once), driver.log.read_text()
