"""A real Ray cluster on this host: a head without cores, and nodes that can be killed, frozen and thawed."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from kit.kept import Kept, kept
from kit.runs import wait_for

_START_SECONDS = 60
_STORE_BYTES = 80 << 20  # of objects, the least that Ray takes and more than hookx needs
# How soon Ray gives up a node that does not answer: after 5 + 3 * 3 seconds; by default after more than a minute.
_HEALTH = {
    "health_check_initial_delay_ms": 5000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}


@dataclass
class RayCluster:
    """A running cluster; the raylet, the agents and the workers of each node are held together in `nodes`."""

    folder: Path
    address: str
    environment: dict[str, str]
    nodes: dict[str, Kept] = field(default_factory=dict)

    def start_node(self, name: str, cores: int) -> None:
        """Start a node, and wait for it: two that start at once can choose the same ports."""
        command = [*_RAY, "start", f"--address={self.address}", f"--num-cpus={cores}", *_options(self.folder)]
        node = self.nodes[name] = Kept(command, self.folder / f"{name}.out", self.environment)
        wait_for(lambda: "Ray runtime started" in node.log.read_text() or not node.is_running, _START_SECONDS)
        assert node.is_running, self.logs()

    def kill_node(self, name: str) -> None:
        """Kill a node: its raylet, its agents, its workers and what these have started. Ray is not told."""
        self.nodes[name].kill()

    def freeze_node(self, name: str) -> None:
        """Stop all processes of a node, as if the network to it were cut."""
        self.nodes[name].freeze()

    def thaw_node(self, name: str) -> None:
        self.nodes[name].thaw()

    def end_nodes(self) -> None:
        for node in self.nodes.values():
            node.end()

    def cores(self) -> int:
        """Return how many cores the nodes have that Ray believes to be alive."""
        code = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR'); "
        code += "print(int(sum(n['Resources'].get('CPU', 0) for n in ray.nodes() if n['Alive'])))"
        out = self.folder / "cores.txt"
        out.unlink(missing_ok=True)
        with kept([sys.executable, "-c", code, self.address], out, self.environment) as asking:
            wait_for(lambda: not asking.is_running, _START_SECONDS)
        with suppress(ValueError, IndexError):
            return int(out.read_text().splitlines()[-1])
        return 0

    def logs(self) -> str:
        """Return the last lines of what the nodes printed."""
        return "\n".join(f"--- {log.name}\n{log.read_text()[-2000:]}" for log in sorted(self.folder.glob("*.out")))


_RAY = [sys.executable, "-c", "import sys; from ray.scripts.scripts import main; sys.argv[0] = 'ray'; main()"]


@contextmanager
def ray_cluster(nodes: int = 2, cores: int = 1) -> Iterator[RayCluster]:
    """Start a head and some nodes called n1, n2, ...; kill all processes of them when the block is left."""
    # A socket's path has at most 107 characters, so not below pytest's folder.
    folder = Path(tempfile.mkdtemp(prefix="hookx-ray-"))
    port = _free_port()
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # A token of this cluster's own: Ray demands one or none by what lies in the user's home.
    variables |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1", "OMP_NUM_THREADS": "1"}
    cluster = RayCluster(folder, f"127.0.0.1:{port}", variables | quiet)
    head = [*_RAY, "start", "--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false"]
    head += [f"--system-config={json.dumps(_HEALTH)}", f"--temp-dir={folder}/head", *_options(folder)]
    try:
        with ExitStack() as stack:
            kept_head = stack.enter_context(kept(head, folder / "head.out", cluster.environment))
            wait_for(lambda: "Ray runtime started" in cluster.logs() or not kept_head.is_running, _START_SECONDS)
            assert kept_head.is_running, cluster.logs()
            stack.callback(cluster.end_nodes)
            for number in range(1, nodes + 1):
                cluster.start_node(f"n{number}", cores)
            try:
                wait_for(lambda: cluster.cores() == nodes * cores, _START_SECONDS)
            except AssertionError:
                raise AssertionError(f"Ray did not start: {cluster.logs()}") from None
            yield cluster
    finally:
        shutil.rmtree(folder)


def _options(folder: Path) -> list[str]:
    return [
        "--block",
        "--node-ip-address=127.0.0.1",
        f"--object-store-memory={_STORE_BYTES}",
        "--num-gpus=0",
        "--disable-usage-stats",
        "--dashboard-agent-listen-port=0",
    ]


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
