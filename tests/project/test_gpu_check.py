"""scripts/gpu-check on a CPU: its steps on tiny settings, its time, its table, and steps that crash or hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"
SCRIPT = SCRIPTS / "gpu-check"


@pytest.fixture(scope="module", autouse=True)
def scripts_can_be_imported() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        yield


@pytest.fixture(scope="module")
def command() -> Any:
    return import_module("gpu_check.command")


@pytest.fixture(scope="module")
def speed() -> Any:
    return import_module("gpu_check.speed")


@pytest.fixture(scope="module")
def runs() -> Any:
    return import_module("gpu_check.runs")


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run everything")
def test_without_a_gpu_it_says_what_it_would_prove_and_exits_with_0() -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert first.startswith("no GPU that torch ")
    step = import_module("gpu_check.step")
    assert [line.split()[0] for line in rest if line] == [step.name for step in step.STEPS]


def test_a_step_that_does_not_exist_is_an_error_that_lists_the_steps() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--only", "copies,speeds"], capture_output=True, text=True)
    assert done.returncode == 2 and "invalid --only 'speeds': choose tests, determinism, " in done.stderr


def test_steps_run_on_a_cpu_into_a_table_and_a_file_and_leave_nothing_behind(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    done = subprocess.run(
        [
            *(sys.executable, SCRIPT, "--device", "cpu", "--quick", "--only", "copies,memory"),
            *("--json", figures, "--scratch", scratch),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "copies       proved" in done.stdout and "memory       not reached" in done.stdout
    document = json.loads(figures.read_text())
    copies, memory = sorted(document["steps"], key=lambda step: step["name"])
    assert (copies["outcome"], copies["figures"]["compared"], copies["figures"]["wrong"]) == ("proved", 24, 0)
    assert (memory["outcome"], memory["figure"]) == ("not reached", "needs a GPU")
    assert document["machine"]["torch"] == torch.__version__
    assert not list(scratch.iterdir())


def test_the_environment_of_the_steps_is_this_checkout_without_the_users_settings(
    command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOKX_BATCH_SIZE", "3")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    variables = command.environment()
    assert "HOOKX_BATCH_SIZE" not in variables
    assert variables["PYTHONPATH"].split(os.pathsep) == [str(SCRIPTS.parent / "src"), str(SCRIPTS), "/somewhere"]


# --- steps that go wrong ---------------------------------------------------------------------------------------------

STEPS = """
    import os, subprocess, sys, time

    def fine(settings, report):
        report.figure = "all of it"

    def disproved(settings, report):
        report.problems.append("3 rows differ")

    def partly(settings, report):
        report.left_out.append("vgg11")

    def raises(settings, report):
        print("about to raise")
        raise ValueError("no such card")

    def crashes(settings, report):
        report.figure = "half of it"
        report.save()
        os.abort()

    def leaves(settings, report):
        sys.exit(0)

    def hangs(settings, report):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        report.figure = str(child.pid)
        report.save()
        time.sleep(600)
"""


@pytest.fixture
def check(command: Any, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that runs steps of the test's own module, and returns their outcomes by name."""
    (tmp_path / "steps.py").write_text(dedent(STEPS))

    def run(*names: str, seconds: float = 60, proofs: float = 60, **changes: Any) -> dict[str, Any]:
        steps = [import_module("gpu_check.step").Step(name, "it", "steps", 1, 1, 0, 60) for name in names]
        steps = [changes[step.name](step) if step.name in changes else step for step in steps]
        found: dict[str, Any] = {}
        variables = command.environment()
        variables["PYTHONPATH"] += os.pathsep + str(tmp_path)
        now = time.monotonic()
        folder = tmp_path / "folder"
        command.Check(
            "cpu", False, folder, tmp_path, variables, now + seconds, now + proofs,
            lambda outcome: found.update({outcome.name: outcome}),
        ).run(steps)  # fmt: skip
        assert not any(path.is_file() for path in folder.rglob("*"))
        return found

    return run


def test_steps_that_fail_crash_or_leave_do_not_end_the_others(check: Callable[..., dict[str, Any]]) -> None:
    found = check("disproved", "raises", "crashes", "leaves", "partly", "fine")
    outcomes = {name: outcome.outcome for name, outcome in found.items()}
    assert outcomes == {
        **dict.fromkeys(("disproved", "raises", "crashes", "leaves"), "FAILED"),
        **{"partly": "not reached", "fine": "proved"},
    }
    assert found["fine"].figure == "all of it" and found["partly"].left_out == ["vgg11"]
    assert found["disproved"].problems == ["3 rows differ"]
    assert found["raises"].last_lines[-1] == "ValueError: no such card"
    assert found["crashes"].figure == "half of it" and found["crashes"].problems == ["exit code -6"]
    assert found["leaves"].problems == ["exit code 0"]


def test_a_step_that_hangs_is_killed_with_its_children_and_what_it_found_is_kept(
    check: Callable[..., dict[str, Any]],
) -> None:
    found = check("hangs", "fine", hangs=lambda step: replace(step, most_seconds=2))
    assert found["hangs"].outcome == "FAILED" and found["hangs"].problems == ["not done after 2 s"]
    assert found["fine"].outcome == "proved"
    state = Path(f"/proc/{found['hangs'].figure}/stat")
    deadline = time.monotonic() + 20
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_step_that_is_stopped_before_its_time_is_over_is_not_called_disproved(
    check: Callable[..., dict[str, Any]],
) -> None:
    found = check("hangs", seconds=2)
    assert (found["hangs"].outcome, found["hangs"].problems) == ("not reached", [])
    assert found["hangs"].figure.isdigit() and found["hangs"].left_out[0].endswith(" of at most 60 s")


def test_a_step_for_which_no_time_is_left_is_not_begun(check: Callable[..., dict[str, Any]]) -> None:
    found = check("fine", "partly", seconds=30, partly=lambda step: replace(step, least_seconds=31))
    assert found["fine"].outcome == "proved"
    assert (found["partly"].outcome, found["partly"].figure) == ("not reached", "no time was left for it")


def test_the_proofs_end_where_the_time_of_the_benchmark_begins(check: Callable[..., dict[str, Any]]) -> None:
    def in_last_group(step: Any) -> Any:
        return replace(step, name="speed", module="speedy", group=2, least_seconds=20)

    found = check(
        "fine", "partly", seconds=60, proofs=10,
        fine=lambda step: replace(step, least_seconds=11), partly=in_last_group,
    )  # fmt: skip
    assert found["fine"].figure == "no time was left for it", "it would take from the time of the benchmark"
    assert found["speed"].problems, "it was begun; its module does not exist"


def test_only_what_fits_on_the_cores_runs_side_by_side(
    command: Any, check: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    running: list[int] = []
    start = command.Check._start

    def counted(self: Any, step: Any, seconds: float) -> Any:
        one = start(self, step, seconds)
        alive.append(one)
        running.append(sum(other.process.poll() is None for other in alive))
        return one

    alive: list[Any] = []
    monkeypatch.setattr(command, "CORES", 4)
    monkeypatch.setattr(command.Check, "_start", counted)
    twice = lambda step: replace(step, processes=2)  # noqa: E731
    check("fine", "partly", "disproved", fine=twice, partly=twice, disproved=twice)
    assert len(running) == 3 and max(running) <= 2


# --- the report ------------------------------------------------------------------------------------------------------


def test_the_report_fits_into_the_end_of_a_log_and_ends_with_the_table(
    command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = command.Outcome(
        "conformance", "it", "FAILED", "f" * 500, 1.0, ["p" * 900] * 30, ["l" * 900] * 9, ["d" * 160] * 200, {},
        ["o" * 300] * 12,
    )  # fmt: skip
    machine = {"gpu": "", "torch": "2", "torchvision": "0", "pillow": "1", "python": "3", "cores": 2, "cpu": "c"}
    machine |= {"memory bytes": 2**30, "disk bytes per second": 1e9}
    command.print_report([outcome, command.Outcome("speed", "it", "proved")], machine, 12)
    printed = capsys.readouterr().out
    assert len(printed) <= 10_000 and printed.rstrip().endswith("1 proved, 1 FAILED, 0 not reached, in 12 s")
    assert "and 25 more" in printed


# --- bytes and figures -----------------------------------------------------------------------------------------------


def test_one_byte_or_one_file_that_differs_is_found(runs: Any, tmp_path: Path) -> None:
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        for name in ("shard-0.safetensors", "index.csv"):
            (tmp_path / folder / name).write_bytes(b"some bytes")
    one, other = tmp_path / "one", tmp_path / "other"
    assert runs.differing_files(one, other) == []
    (other / "shard-0.safetensors").write_bytes(b"some bytez")
    (one / "failures.csv").touch()
    assert runs.differing_files(one, other) == ["failures.csv", "shard-0.safetensors"]


def test_the_bound_is_the_slowest_part_and_nvjpeg_takes_the_place_of_pillow(speed: Any) -> None:
    row = speed.Row("resnet18", "avgpool", "fp32", has_nvjpeg=True)
    row.limits = {"decode": 3000.0, "forward": 4000.0, "write": 1e6, "copy": 1e6, "nvjpeg": 9000.0}
    assert row.bound_by("hookx") == "decode" and row.bound_by("nvjpeg") == "forward"


def test_goals_are_met_or_missed_by_what_was_measured(speed: Any) -> None:
    row = speed.Row("resnet18", "conv1,avgpool", "fp32", has_nvjpeg=True)
    row.steady = {"hookx": {1: 100.0, 2: 900.0, 3: 300.0}, "hand-written": {1: 50.0, 3: 60.0}, "nvjpeg": {1: 150.0}}
    row.busy = {"hookx": [{"reading": 0.5, "model": 0.8}, {"reading": 0.4, "model": 0.96}]}
    goals = {what: (measured, least) for what, measured, least in speed.goals_of([row])}
    assert goals == {
        "resnet18 conv1,avgpool fp32: busy share of the slowest part (model)": (pytest.approx(0.88), 0.9),
        "resnet18 conv1,avgpool fp32: hookx/hand-written": (pytest.approx(3.5), 3.0),
        "resnet18 conv1,avgpool fp32: nvjpeg/Pillow": (pytest.approx(1.5), 2.0),
    }


# --- the same device on both routes ----------------------------------------------------------------------------------


def test_conformance_in_bf16_is_exact_and_another_precision_is_found_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    conformance = import_module("conformance")
    row = conformance.check("squeezenet1_1", precision="bf16")
    assert row.wrong == row.missed == 0 and row.compared == row.calls
    monkeypatch.setitem(conformance.AUTOCAST, "bf16", None)
    assert conformance.check("squeezenet1_1", precision="bf16").wrong > 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_the_same_bits_are_equal_with_nan_and_nothing_else_is(dtype: torch.dtype) -> None:
    differ = import_module("conformance").differ
    values = torch.tensor([0.0, 1.0, float("nan")] if dtype.is_floating_point else [0, 1, 1]).to(dtype)
    assert not differ(values, values.clone())
    assert differ(values, values.flip(0)) and differ(values, values[:2]) and differ(values, values.to(torch.float64))


# --- all steps that a CPU can take -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_step_that_needs_no_gpu_runs_on_a_cpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--device", "cpu", "--quick", "--json", tmp_path / "figures.json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = {step["name"]: step["outcome"] for step in json.loads((tmp_path / "figures.json").read_text())["steps"]}
    unreached = {"late_error", "memory", "tests"}
    assert outcomes == {name: "not reached" if name in unreached else "proved" for name in outcomes}
