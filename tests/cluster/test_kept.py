"""What a test starts ends with it, daemons included, however the test ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kit.kept import kept
from kit.runs import wait_for

pytestmark = pytest.mark.cluster

# The daemon's parent exits at once, so that it belongs to nobody.
DAEMON = ["bash", "-c", "(setsid sleep 1000 & echo $! > daemon); sleep 1000"]


def daemon_of(folder: Path) -> int:
    file = folder / "daemon"
    wait_for(lambda: file.exists() and file.read_text().endswith("\n"))
    return int(file.read_text())


def is_there(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def test_a_daemon_ends_with_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with kept(DAEMON, tmp_path / "log") as running:
        daemon = daemon_of(tmp_path)
        assert daemon in running.processes
    assert not is_there(daemon)


def test_a_daemon_ends_when_the_tests_are_killed(tmp_path: Path) -> None:
    code = "import sys, time, pathlib, kit.kept\n"
    code += "running = kit.kept.Kept(sys.argv[1:], pathlib.Path('log'))\ntime.sleep(1000)\n"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    tests = subprocess.Popen([sys.executable, "-c", code, *DAEMON], cwd=tmp_path, env=environment)
    daemon = daemon_of(tmp_path)
    tests.kill()
    assert tests.wait() == -signal.SIGKILL
    wait_for(lambda: not is_there(daemon))


def test_all_processes_stop_and_go_on_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def states() -> set[str]:
        return {Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()[0] for one in running.processes}

    monkeypatch.chdir(tmp_path)
    with kept(DAEMON, tmp_path / "log") as running:
        daemon_of(tmp_path)
        running.freeze()
        wait_for(lambda: states() == {"T"})
        running.thaw()
        wait_for(lambda: states() == {"S"})
        running.kill()
        assert not running.is_running and running.processes == []
