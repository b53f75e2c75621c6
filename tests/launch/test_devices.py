"""`--devices` computes a run by several processes: one command, the same bytes, whoever dies on the way."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import hookx
from hookx.errors import HookxError, ImageError, LayerError, UsageError
from hookx.launch.devices import devices_of, workers_each
from hookx.options import ExtractOptions
from kit import warm
from kit.files import contents
from kit.runs import wait_for

NETS = '''
import os, signal, time
import torch

class Slow(torch.nn.Module):
    """Takes a while for each pass; dies at an image that is all white, where DEADLY is set."""
    def __init__(self):
        super().__init__()
        self.pool = torch.nn.AdaptiveAvgPool2d(1)
    def forward(self, x):
        if x.device.type == "cpu":
            time.sleep(float(os.environ.get("PASS_SECONDS", "0")))
        if "DEADLY" in os.environ and x.device.type == "cpu" and bool((x > 2).flatten(1).all(1).any()):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.pool(x)
'''
SETTINGS = ["-l", "pool", "--shard-images", "2", "-b", "2", "-j", "0", "--resize", "32", "--crop", "32"]
SETTINGS += ["--mean", "0,0,0", "--std", "0.3,0.3,0.3", "--self-check", "1"]


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("nets") / "nets.py"
    file.write_text(NETS)
    return f"python:{file}:Slow"


@pytest.fixture(scope="module")
def at_once(nets: str, mixed_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run that one process has computed: nine images, four of them unreadable, in five shards."""
    out = tmp_path_factory.mktemp("at-once") / "features"
    command = [*warm.python("torch"), "-m", "hookx", "extract", "-m", nets, *SETTINGS, "-o", str(out)]
    assert subprocess.run([*command, str(mixed_folder)], timeout=100).returncode == 3
    return out


def command_of(nets: str, out: Path, *arguments: str, devices: str = "cpu*2") -> list[str]:
    return [*sys_python(), "extract", "-m", nets, *SETTINGS, "-o", str(out), "--devices", devices, *arguments]


def sys_python() -> list[str]:
    return [sys.executable, "-m", "hookx"]


def run_command(
    nets: str, out: Path, *arguments: str, variables: dict[str, str] | None = None, stdin: str | None = None
) -> tuple[int, str, str]:
    done = subprocess.run(
        command_of(nets, out, *arguments),
        env=os.environ | (variables or {}),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=200,
    )
    return done.returncode, done.stdout, done.stderr


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    with_lines = []
    for child in psutil.Process(process.pid).children():
        try:
            if "hookx.launch.worker" in child.cmdline():
                with_lines.append(child)
        except psutil.Error:
            continue
    return with_lines


@contextmanager
def started(nets: str, out: Path, images: Path, seconds: float, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Start a slow run, and end all of it with the block."""
    environment = os.environ | {"PASS_SECONDS": str(seconds)}
    process = subprocess.Popen(
        command_of(nets, out, *arguments, str(images)), env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_two_processes_make_the_bytes_of_one_in_one_run_with_one_summary(
    nets: str, mixed_folder: Path, at_once: Path, tmp_path: Path
) -> None:
    out = tmp_path / "features"
    code, printed, said = run_command(nets, out, "--json", str(mixed_folder))
    summary = json.loads(printed)
    assert code == 3 and (summary["images"], summary["failures"], summary["shards_computed"]) == (5, 4, 5)
    assert said.count("cannot read") == 4 and contents(out) == contents(at_once)
    code, printed, _ = run_command(nets, out, "--quiet", str(mixed_folder))
    assert code == 3 and len(printed.splitlines()) == 5  # Finished, and said to be.


@pytest.mark.cluster
def test_a_list_on_standard_input_and_a_part_are_shared_out_too(
    nets: str, mixed_folder: Path, at_once: Path, tmp_path: Path
) -> None:
    out = tmp_path / "features"
    code, _, said = run_command(nets, out, "--shard", "1/2", str(mixed_folder))
    assert code == 0 and "part 1 of 2: 2 of 5 shards, 2 to compute" in said
    code, _, _ = run_command(nets, out, "--shard", "0/2", str(mixed_folder))
    assert code == 0 and contents(out) == contents(at_once)
    listed = "\n".join(str(file) for file in sorted(mixed_folder.iterdir()))
    code, printed, _ = run_command(nets, tmp_path / "listed", "--json", "-", stdin=listed)
    assert code == 3 and json.loads(printed)["images"] == 5


def test_python_takes_devices_too(nets: str, mixed_folder: Path, at_once: Path, tmp_path: Path) -> None:
    out, done = tmp_path / "features", list[int]()
    settings: dict[str, Any] = {"shard_images": 2, "batch_size": 2, "workers": 0, "resize": 32, "crop": 32}
    settings |= {"mean": (0, 0, 0), "std": (0.3, 0.3, 0.3), "self_check": 1}
    summary = hookx.extract(nets, "pool", mixed_folder, out=out, devices="cpu*2", progress=done.append, **settings)
    assert (summary.images, summary.failures, sum(done)) == (5, 4, 9)
    assert contents(out) == contents(at_once)


@pytest.mark.cluster
def test_failures_are_tried_again_by_all(nets: str, mixed_folder: Path, tmp_path: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "features"
    shutil.copytree(mixed_folder, images, symlinks=True)
    assert run_command(nets, out, str(images))[0] == 3
    shutil.copy(images / "a.png", images / "c-empty.png")
    code, printed, _ = run_command(nets, out, "--retry-failures", "--json", str(images))
    assert code == 3 and json.loads(printed)["failures"] == 3
    assert hookx.verify(out).problems == ()


# --- who dies -------------------------------------------------------------------------------------------------------


def test_workers_that_are_killed_while_they_compute_change_no_byte(
    nets: str, mixed_folder: Path, at_once: Path, tmp_path: Path
) -> None:
    out, killed = tmp_path / "features", set[int]()
    with started(nets, out, mixed_folder, 1) as process:
        for finished in (1, 2):  # Each time that there is one more shard, whoever is there.
            while len(list(out.glob("*.safetensors"))) < finished and process.poll() is None:
                time.sleep(0.05)
            for worker in workers_of(process)[:1]:
                worker.kill()
                killed.add(worker.pid)
        said = process.communicate(timeout=100)[1]
    assert process.returncode == 3 and len(killed) == 2
    assert "ended unexpectedly (SIGKILL); it is started again" in said
    assert contents(out) == contents(at_once)


@pytest.mark.cluster
def test_a_shard_that_kills_every_worker_is_left_out_and_said(nets: str, photos: Path, tmp_path: Path) -> None:
    from PIL import Image

    images, out = tmp_path / "images", tmp_path / "features"
    images.mkdir()
    for number in range(6):
        white = number == 3
        Image.new("RGB", (40, 40), (255, 255, 255) if white else (9, 9, 9)).save(images / f"{number}.png")
    code, _, said = run_command(nets, out, str(images), variables={"DEADLY": "1"})
    assert code == 1 and "error: 1 shards are missing (1): every worker that computed one of them crashed" in said
    assert "Traceback" not in said
    assert sorted(file.name[:11] for file in out.glob("*.safetensors")) == ["shard-00000", "shard-00002"]
    assert run_command(nets, out, str(images))[0] == 0


@pytest.mark.cluster
def test_a_worker_that_cannot_live_ends_the_run_with_an_error(nets: str, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "dies.py").write_text("import os\ndef make():\n    os._exit(9)\n")
    code, _, said = run_command(f"python:{tmp_path}/dies.py:make", tmp_path / "features", str(photos))
    assert code == 1 and "ended unexpectedly 3 times, the last by exit code 9" in said and "Traceback" not in said


def test_an_error_of_one_worker_is_that_of_the_run(nets: str, mixed_folder: Path, tmp_path: Path) -> None:
    code, _, said = run_command(nets, tmp_path / "features", "--strict", str(mixed_folder))
    assert code == 1 and "error: cannot read '" in said and "leave out --strict" in said
    with pytest.raises(LayerError, match="no layer matches 'pol'"):
        hookx.extract(nets, "pol", mixed_folder, out=tmp_path / "none", devices="cpu*2")
    assert not (tmp_path / "none").exists()
    with pytest.raises(ImageError, match="no such file or folder"):
        hookx.extract(nets, "pool", tmp_path / "absent", out=tmp_path / "none", devices="cpu*2")


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(one, marks=pytest.mark.cluster) for one in (signal.SIGINT, signal.SIGKILL))],
)
def test_a_run_that_is_ended_leaves_no_worker_and_goes_on_to_the_same_bytes(
    number: signal.Signals, nets: str, mixed_folder: Path, at_once: Path, tmp_path: Path
) -> None:
    out = tmp_path / "features"
    with started(nets, out, mixed_folder, 1) as process:
        wait_for(lambda: list(out.glob("*.safetensors")) or process.poll() is not None, 100)
        workers = workers_of(process)
        assert workers
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    wait_for(lambda: not any(worker.is_running() and worker.status() != "zombie" for worker in workers))
    if number != signal.SIGKILL:
        assert "interrupted; finish it with the same command" in said
        assert not [name for name in os.listdir(out) if name.endswith(".aside")]
    assert run_command(nets, out, str(mixed_folder))[0] == 3
    assert contents(out) == contents(at_once)


# --- which devices --------------------------------------------------------------------------------------------------

NEEDED: dict[str, Any] = {"model": "resnet18", "layers": "fc", "images": "images"}


@pytest.mark.parametrize(
    ("devices", "problem"),
    [
        ("cpu*0", "there must be at least 1"),
        ("all", "no GPU that torch can use"),
        ("9", "no GPU that torch can use"),
        ("cpu", "no GPU that torch can use"),
    ],
)
def test_a_device_that_is_absent_is_an_error_that_shows_what_to_write(devices: str, problem: str) -> None:
    if devices != "cpu*0" and torch.accelerator.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UsageError, match=f"invalid --devices '{re.escape(devices)}': .*{problem}") as raised:
        devices_of(ExtractOptions(**NEEDED, devices=devices))
    assert "cpu*" in str(raised.value)


def test_devices_and_device_exclude_each_other_and_so_do_devices_and_torchrun() -> None:
    with pytest.raises(UsageError, match="--device and --devices exclude each other"):
        devices_of(ExtractOptions(**NEEDED, devices="cpu*2", device="cpu"))
    with pytest.raises(UsageError, match="so does torchrun"):
        devices_of(ExtractOptions(**NEEDED, devices="cpu*2"), {"LOCAL_WORLD_SIZE": "2"})


def test_cores_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    options = ExtractOptions(**NEEDED, devices="cpu*4")
    assert workers_each(options, devices_of(options)) in (4, 1)  # 1 where the quota of a container says so
    options = ExtractOptions(**NEEDED, devices="cpu*4", workers=3)
    assert workers_each(options, devices_of(options)) == 3


def test_an_error_comes_back_as_what_it_was() -> None:
    from hookx.errors import ShardError
    from hookx.launch.messages import error_from_json, error_to_json

    for error in (ImageError("cannot read 'a'", "try again"), ShardError(Path("shard"), "is damaged")):
        again = error_from_json(error_to_json(error))
        assert str(again) == str(error) and isinstance(again, HookxError) and again.exit_code == error.exit_code
