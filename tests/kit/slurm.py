"""A real Slurm on this host: munged, slurmctld, and a slurmd for each of its nodes."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kit.kept import Kept, kept
from kit.runs import wait_for

NODES = ("n1", "n2", "n3")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
# Slurm's first answers come within seconds, but not on a machine that does something else as well.
_START_SECONDS = 60
_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}


@dataclass(frozen=True)
class Job:
    """A job, or a task of an array, as `scontrol show job` describes it."""

    fields: dict[str, str]

    @property
    def state(self) -> str:
        return self.fields["JobState"]

    @property
    def exit_code(self) -> int:
        return int(self.fields["ExitCode"].partition(":")[0])

    @property
    def node(self) -> str:
        """Return where it runs or has run; '' if it waits."""
        node = self.fields.get("NodeList", "")
        return "" if node == "(null)" else node

    @property
    def restarts(self) -> int:
        return int(self.fields["Restarts"])

    @property
    def has_ended(self) -> bool:
        return self.state in _ENDED

    @property
    def output(self) -> str:
        """Return what it has printed, on both of its streams."""
        path = Path(self.fields["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""


@dataclass
class Slurm:
    """A running Slurm; the processes of each node are held together.

    `environment` makes the commands of Slurm, and programs that call them, talk to it.
    """

    folder: Path
    environment: dict[str, str]
    nodes: dict[str, Kept] = field(default_factory=dict)

    def command(self, *arguments: str, stdin: str | None = None) -> str:
        """Run a command of Slurm; return what it printed.

        Raises:
            AssertionError: it failed.
        """
        done = subprocess.run(
            arguments, input=stdin, env=self.environment, capture_output=True, text=True, timeout=_START_SECONDS
        )
        assert done.returncode == 0, f"{arguments} ended with {done.returncode}: {done.stderr}"
        return done.stdout

    def sbatch(self, script: str, *options: str) -> str:
        """Submit a script without its first line; return the number of the job."""
        output = f"--output={self.folder}/job-%A-%a.txt" if _is_array(options) else f"--output={self.folder}/job-%j.txt"
        printed = self.command("sbatch", "--parsable", output, *options, stdin=f"#!/bin/bash\n{script}\n")
        return printed.strip().partition(";")[0]

    def srun(self, *arguments: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a command by srun, outside any job."""
        return subprocess.run(
            ["srun", *arguments], env=self.environment, capture_output=True, text=True, timeout=seconds
        )

    def jobs(self, number: str) -> list[Job]:
        """Return a job, or the tasks of an array by their number; waiting tasks may still be one entry."""
        lines = self.command("scontrol", "--oneliner", "show", "job", number).splitlines()
        jobs = [Job(dict(re.findall(r"(\S+?)=(\S*)", line))) for line in lines if line.strip()]
        return sorted(jobs, key=lambda job: int(job.fields.get("ArrayTaskId", "0").partition("-")[0].partition(",")[0]))

    def wait(self, number: str, seconds: float = 120) -> list[Job]:
        """Wait until a job, or each task of an array, has ended; return them."""
        deadline = time.monotonic() + seconds
        while True:
            jobs = self.jobs(number)
            if all(job.has_ended for job in jobs):
                return jobs
            assert time.monotonic() < deadline, f"not ended after {seconds} s: {[job.fields for job in jobs]}"
            time.sleep(0.2)

    def state_of(self, node: str) -> str:
        """Return the state of a node in Slurm's words, such as IDLE, ALLOCATED or DOWN+NOT_RESPONDING."""
        described = self.command("scontrol", "--oneliner", "show", "node", node)
        return dict(re.findall(r"(\S+?)=(\S*)", described))["State"]

    def start_node(self, node: str) -> None:
        """Start a node, also one that was killed."""
        command = ["slurmd", "-D", "-N", node, "-f", str(self.folder / "slurm.conf")]
        self.nodes[node] = Kept(command, self.folder / f"{node}.out", self.environment)

    def kill_node(self, node: str) -> None:
        """Kill a node: its slurmd, its slurmstepds, and the processes of jobs. Slurm is not told."""
        self.nodes[node].kill()

    def end_nodes(self) -> None:
        for node in self.nodes.values():
            node.end()

    def logs(self) -> str:
        """Return the last lines of what the daemons logged."""
        logs = [*sorted(self.folder.glob("*.log")), *sorted(self.folder.glob("*.out"))]
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-2000:]}" for log in logs)


@contextmanager
def slurm(nodes: Sequence[str] = NODES, cpus: int = 2) -> Iterator[Slurm]:
    """Start a Slurm whose nodes are idle; kill everything of it when the block is left.

    Args:
        nodes: Their names.
        cpus: How many CPUs a node declares, whatever this host has.
    """
    # A socket's path has at most 107 characters, so not below pytest's folder.
    folder = Path(tempfile.mkdtemp(prefix="hookx-slurm-"))
    # The daemons are not on every user's PATH.
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    variables = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment = variables | {"PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}
    running = Slurm(folder, environment)
    try:
        with ExitStack() as stack:
            folder.chmod(0o755)
            _configure(folder, nodes, cpus)
            stack.enter_context(kept(_munged(folder), folder / "munged.out", environment))
            wait_for((folder / "munge.socket").exists, _START_SECONDS)
            control = ["slurmctld", "-D", "-f", str(folder / "slurm.conf")]
            stack.enter_context(kept(control, folder / "slurmctld.out", environment))
            stack.callback(running.end_nodes)
            for node in nodes:
                running.start_node(node)
            try:
                wait_for(lambda: _are_idle(running, nodes), _START_SECONDS)
            except AssertionError:
                raise AssertionError(f"Slurm did not start: {running.logs()}") from None
            yield running
    finally:
        shutil.rmtree(folder)


def _munged(folder: Path) -> list[str]:
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    # --force: the folder is below /tmp, where others may write too.
    return ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files]


def _configure(folder: Path, nodes: Sequence[str], cpus: int) -> None:
    (folder / "munge.key").touch(0o400)
    (folder / "munge.key").write_bytes(os.urandom(128))
    control_port, *ports = _free_ports(1 + len(nodes))
    host = socket.gethostname()
    lines = [
        "ClusterName=hookx",
        f"SlurmctldHost={host.partition('.')[0]}(127.0.0.1)",
        f"SlurmctldPort={control_port}",
        "SlurmUser=root",
        "SlurmdUser=root",
        # The second is also how long a job waits that is started again, 120 s by default.
        f"AuthInfo=socket={folder}/munge.socket,cred_expire=10",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool-%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/%n.pid",
        f"SlurmctldLogFile={folder}/slurmctld.log",
        f"SlurmdLogFile={folder}/%n.log",
        "ProctrackType=proctrack/pgid",
        "TaskPlugin=task/none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core",
        "SlurmdParameters=config_overrides",
        "JobAcctGatherType=jobacct_gather/none",
        "MpiDefault=none",
        "SwitchType=switch/none",
        "ReturnToService=2",
        "SlurmdTimeout=15",
        "SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=5,bf_interval=5",
        "KillWait=3",
        "JobRequeue=1",
        *(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=1024"
            for node, port in zip(nodes, ports, strict=True)
        ),
        f"PartitionName=all Nodes={','.join(nodes)} Default=YES MaxTime=INFINITE State=UP",
    ]
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
    (folder / "state").mkdir()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _are_idle(running: Slurm, nodes: Sequence[str]) -> bool:
    time.sleep(0.1)
    try:
        return all(running.state_of(node) == "IDLE" for node in nodes)
    except AssertionError:
        return False  # slurmctld does not listen yet.


def _is_array(options: Sequence[str]) -> bool:
    return any(option.startswith(("--array", "-a")) for option in options)
