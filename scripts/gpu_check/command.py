"""Run the steps of scripts/gpu-check side by side, each as long as it may take, and print what they found.

This process never imports torch: what only a GPU can break must not break it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_check.step import CORES, STEPS, Step

SCRIPTS = Path(__file__).resolve().parents[1]
ROOT = SCRIPTS.parent

# Modules by the name of their package, where the two differ. zlib-ng is left out: hookx does without it.
REQUIRED = {
    **{name: name for name in ("matplotlib", "numpy", "rich", "safetensors", "torch", "torchvision", "tqdm", "typer")},
    **{"PIL": "pillow", "timm": "timm", "pytest": "pytest", "xdist": "pytest-xdist", "hypothesis": "hypothesis"},
}
SHARE_OF_SPEED = 0.4
LEAST_FREE_BYTES = 8 * 10**9
PHOTOGRAPHS = 1024
LAST_LINES = 12
SECONDS_OF_QUICK = 5  # without which a quick step is not begun
MAX_PROBLEMS = 5  # shown of one step; the JSON has all
MAX_CHARACTERS = 9_500  # of what is printed at the end

PROVED, FAILED, NOT_REACHED = "proved", "FAILED", "not reached"


@dataclass
class Outcome:
    """What became of a step."""

    name: str
    proves: str
    outcome: str = NOT_REACHED
    figure: str = ""
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    last_lines: list[str] = field(default_factory=list)


@dataclass
class Running:
    """A step whose process has been started."""

    step: Step
    process: subprocess.Popen[bytes]
    folder: Path
    start: float
    seconds: float  # that it may take

    def kill(self) -> None:
        """Kill the process and all that it has started."""
        if self.process.returncode is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def has_ended(self) -> bool:
        return self.process.poll() is not None or time.monotonic() - self.start > self.seconds

    def conclude(self) -> Outcome:
        """Read what the step has found, whether or not it came to its end."""
        hangs = self.process.poll() is None
        self.kill()
        outcome = Outcome(self.step.name, self.step.proves, seconds=round(time.monotonic() - self.start, 1))
        try:
            found = json.loads((self.folder / "result.json").read_text())
        except (OSError, ValueError):
            found = {}
        is_done = bool(found.pop("is_done", False))
        for name, value in found.items():
            setattr(outcome, name, value)
        if hangs and self.seconds < self.step.most_seconds:
            # It may have been on its way: this call had no time for all of it.
            outcome.left_out.append(f"stopped after {self.seconds:.0f} of at most {self.step.most_seconds} s")
        elif hangs:
            outcome.problems.append(f"not done after {self.seconds:.0f} s")
        elif self.process.returncode or not is_done:
            outcome.problems.append(f"exit code {self.process.returncode}")
        if hangs or self.process.returncode or not is_done:
            text = (self.folder / "output.txt").read_text(errors="replace")
            outcome.last_lines = [line[:300] for line in text.splitlines() if line.strip()][-LAST_LINES:]
        if outcome.problems:
            outcome.outcome = FAILED
        elif not outcome.left_out:
            outcome.outcome = PROVED
        return outcome


# --- before the first step -----------------------------------------------------------------------------------------


def missing_packages() -> list[str]:
    return [package for module, package in REQUIRED.items() if find_spec(module) is None]


def environment() -> dict[str, str]:
    """Return the environment of all steps: this checkout's hookx, and none of the user's settings for it."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("HOOKX_")}
    paths = [str(ROOT / "src"), str(SCRIPTS), *filter(None, [variables.get("PYTHONPATH")])]
    return variables | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def describe_machine(folder: Path, variables: dict[str, str]) -> dict[str, Any]:
    """Describe the machine, in a process of its own."""
    command = [sys.executable, "-m", "gpu_check.machine", str(folder)]
    done = subprocess.run(command, text=True, capture_output=True, env=variables, check=False)
    if done.returncode:
        raise SystemExit(f"error: hookx cannot be imported here: {done.stderr.strip().splitlines()[-1]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def make_photographs(folder: Path, count: int) -> Path:
    """Make JPEGs of about 500 x 375 pixels, with all cores."""
    from benchmark import make_images

    folder.mkdir()
    parts = min(CORES, count)
    parted = [folder.with_name(f"part-{number}") for number in range(parts)]
    for part in parted:
        part.mkdir()
    with ProcessPoolExecutor(parts) as pool:
        made = pool.map(make_images, parted, [-(-count // parts)] * parts, range(parts))
        for number, file in enumerate(file for files in made for file in files):
            file.rename(folder / f"{number:06}.jpg")
    for part in parted:
        part.rmdir()
    return folder


# --- the steps -----------------------------------------------------------------------------------------------------


@dataclass
class Check:
    """All steps of one call, and what they need."""

    device: str
    quick: bool
    folder: Path
    photographs: Path
    variables: dict[str, str]
    deadline: float  # by time.monotonic()
    proofs_deadline: float  # when the benchmark begins at the latest
    on_outcome: Callable[[Outcome], None]

    def run(self, steps: Sequence[Step]) -> None:
        """Run the groups one after the other, and the steps of a group side by side."""
        for group in sorted({step.group for step in steps}):
            later = [step for step in steps if step.group > group]
            is_last = not any(step.name == "speed" for step in later)
            deadline = self.deadline if is_last else self.proofs_deadline
            # Groups between this one and the benchmark need their time, too.
            deadline -= sum(step.least_seconds for step in later if step.name != "speed")
            self._run_group([step for step in steps if step.group == group], deadline)

    def _run_group(self, steps: Sequence[Step], deadline: float) -> None:
        waiting, running = list(steps), list[Running]()
        try:
            while waiting or running:
                busy = sum(one.step.processes for one in running)
                for step in list(waiting):
                    if running and busy + step.processes > CORES:
                        continue
                    waiting.remove(step)
                    seconds = min(float(step.most_seconds), deadline - time.monotonic())
                    if seconds < (SECONDS_OF_QUICK if self.quick else step.least_seconds):
                        self.on_outcome(Outcome(step.name, step.proves, figure="no time was left for it"))
                        continue
                    running.append(self._start(step, seconds))
                    busy += step.processes
                ended = [one for one in running if one.has_ended()]
                for one in ended:
                    running.remove(one)
                    self.on_outcome(one.conclude())
                    shutil.rmtree(one.folder, ignore_errors=True)
                if not ended:
                    time.sleep(0.05)
        finally:
            for one in running:
                one.kill()

    def _start(self, step: Step, seconds: float) -> Running:
        folder = self.folder / step.name
        scratch = folder / "scratch"
        scratch.mkdir(parents=True)
        function = f"{step.module}:{step.name}"
        command = [sys.executable, "-m", "gpu_check.step", function, "--device", self.device]
        command += ["--seconds", f"{seconds - 3:.1f}", "--scratch", str(scratch)]
        command += ["--photographs", str(self.photographs), "--result", str(folder / "result.json")]
        with open(folder / "output.txt", "wb") as output:
            process = subprocess.Popen(
                [*command, *["--quick"] * self.quick],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Steps side by side share the cores; threads of all of them that wait for each other would take long.
                env=self.variables | ({"OMP_NUM_THREADS": "1"} if step.processes < CORES else {}),
                start_new_session=True,  # So that it can be killed with all that it has started.
            )
        return Running(step, process, folder, time.monotonic(), seconds)


# --- what is printed -----------------------------------------------------------------------------------------------


def machine_text(machine: dict[str, Any]) -> str:
    gpu = machine["gpu"] or "no GPU"
    if machine["gpu"]:
        gpu += f", compute capability {machine['capability']}, {machine['gpu bytes'] / 2**30:.0f} GiB"
        gpu += f", driver {machine['driver']}, CUDA {machine['cuda']}, cuDNN {machine['cudnn']}"
    return (
        f"{gpu}; torch {machine['torch']}, torchvision {machine['torchvision']}, Pillow {machine['pillow']}, "
        f"Python {machine['python']}; {machine['cores']} cores ({machine['cpu']}), "
        f"{machine['memory bytes'] / 2**30:.0f} GiB, disk {machine['disk bytes per second'] / 1e6:,.0f} MB/s"
    )


def table_of(outcomes: Sequence[Outcome]) -> str:
    """Format the outcomes, with the reasons of what failed."""
    lines = [f"{'step':12} {'outcome':11} {'seconds':>7}  figure"]
    for one in outcomes:
        lines.append(f"{one.name:12} {one.outcome:11} {one.seconds:7.1f}  {one.figure or one.proves}"[:220])
        lines += [f"    {problem[:240]}" for problem in one.problems[:MAX_PROBLEMS]]
        if len(one.problems) > MAX_PROBLEMS:
            lines.append(f"    and {len(one.problems) - MAX_PROBLEMS} more")
        lines += [f"    left out: {what[:160]}" for what in one.left_out[:2]]
        lines += [f"    | {line[:160]}" for line in one.last_lines]
    return "\n".join(lines)


def print_report(outcomes: Sequence[Outcome], machine: dict[str, Any], seconds: float) -> None:
    """Print the details and, last, the table, together no longer than what a log shows."""
    counts = {word: sum(one.outcome == word for one in outcomes) for word in (PROVED, FAILED, NOT_REACHED)}
    verdict = ", ".join(f"{count} {word}" for word, count in counts.items())
    end = f"{machine_text(machine)}\n\n{table_of(outcomes)}\n\n{verdict}, in {seconds:.0f} s"
    details = "\n".join(line for one in outcomes for line in one.lines)
    print("\n" + (details[: max(0, MAX_CHARACTERS - len(end))] + "\n\n" if details else "") + end, flush=True)


# --- the command ---------------------------------------------------------------------------------------------------


def main(description: str) -> int:
    """Run the steps named on the command line."""
    started = time.monotonic()
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(prog="scripts/gpu-check", description=description.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="time for everything (default: 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE, after every step")
    parser.add_argument("--only", metavar="STEP,...", help=f"some of {', '.join(names)}")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where images and outputs go (default: TMPDIR)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: check the steps themselves")
    parser.add_argument("--quick", action="store_true", help="as little as means something")
    arguments = parser.parse_args()
    wanted = arguments.only.split(",") if arguments.only else names
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"invalid --only '{unknown[0]}': choose {', '.join(names)}")
    if missing := missing_packages():
        raise SystemExit(f"error: not installed: {', '.join(missing)}\n  pip install {' '.join(missing)}")
    place = arguments.scratch or Path(tempfile.gettempdir())
    if not place.is_dir():
        raise SystemExit(f"error: --scratch {place} is not a folder")
    steps = [step for step in STEPS if step.name in wanted]
    # Exit as after Ctrl-C: end the steps that run and remove gigabytes of output.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="hookx-gpu-check-", dir=place, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        variables = environment()
        machine = describe_machine(folder, variables)
        if arguments.device == "cuda" and not machine["gpu"]:
            print(f"no GPU that torch {machine['torch']} can use: nothing was run; on one, this would prove:\n")
            print("\n".join(f"{step.name:12} {step.proves}" for step in steps))
            return 0
        on_gpu = arguments.device == "cuda"
        if on_gpu and not arguments.quick and (free := shutil.disk_usage(folder).free) < LEAST_FREE_BYTES:
            raise SystemExit(
                f"error: {place} has {free:,} bytes free, and {LEAST_FREE_BYTES:,} are needed\n"
                "  name another folder: --scratch DIR"
            )
        print(machine_text(machine), flush=True)
        outcomes: list[Outcome] = []

        def note(outcome: Outcome) -> None:
            outcomes.append(outcome)
            print(f"{outcome.name}: {outcome.outcome}, {outcome.seconds:.0f} s: {outcome.figure}", flush=True)
            write_json(arguments.json, machine, outcomes, started)

        if not on_gpu:
            for step in [step for step in steps if step.needs_gpu]:
                note(Outcome(step.name, step.proves, figure="needs a GPU"))
            steps = [step for step in steps if not step.needs_gpu]
        photographs = make_photographs(folder / "photographs", 16 if arguments.quick else PHOTOGRAPHS)
        seconds = 60 * arguments.minutes
        share = SHARE_OF_SPEED if any(step.name == "speed" for step in steps) else 0.0
        check = Check(
            arguments.device,
            arguments.quick,
            folder,
            photographs,
            variables,
            started + seconds - 5,
            started + seconds * (1 - share),
            note,
        )
        check.run(steps)
    outcomes.sort(key=lambda outcome: names.index(outcome.name))
    print_report(outcomes, machine, time.monotonic() - started)
    return int(any(outcome.outcome == FAILED for outcome in outcomes))


def write_json(file: Path | None, machine: dict[str, Any], outcomes: Sequence[Outcome], started: float) -> None:
    """Write everything that is known so far; a reader never sees half of it."""
    if file is None:
        return
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine,
        "seconds": round(time.monotonic() - started, 1),
        "steps": [asdict(outcome) for outcome in outcomes],
    }
    aside = file.with_name(f"{file.name}.aside")
    aside.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(aside, file)


def commit() -> str:
    """Return the commit of this checkout; empty where there is no git."""
    try:
        command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        return subprocess.run(command, text=True, capture_output=True, check=False).stdout.strip()
    except OSError:
        return ""
