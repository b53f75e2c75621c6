"""A run may be computed in parts: by whichever processes, in any order, in any number of parts, the same bytes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import hookx
from hookx.cli.app import app
from hookx.errors import ImageError, OtherRunError, StoreError, UsageError
from hookx.images.listing import list_images
from hookx.images.mapped import map_list, write_list
from hookx.options import ExtractOptions
from hookx.run.parts import Part, Told, as_told, count_shared_cores, told_by
from hookx.run.prepare import prepare
from hookx.run.run import plan, run
from hookx.store.asides import aside_of, new_mark
from hookx.store.directory import RunDirectory, read_plan
from kit import warm
from kit.files import contents, files_opened
from kit.processes import environment_for
from kit.runs import wait_for

SETTINGS: dict[str, Any] = {"weights": "none", "shard_images": 2, "batch_size": 2, "workers": 0, "resize": 32}
SETTINGS |= {"crop": 32, "self_check": 1}
COMMAND = ["extract", "-m", "resnet18", "-l", "avgpool", "-w", "none", "--shard-images", "2", "-b", "2", "-j", "0"]
COMMAND += ["--resize", "32", "--crop", "32", "--self-check", "1"]


def compute(images: Path, out: Path, **options: Any) -> hookx.Summary:
    return hookx.extract("resnet18", "avgpool", images, out=out, **SETTINGS | options)


@pytest.fixture(scope="module")
def at_once(mixed_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run that one process has computed: nine images, four of them unreadable, in five shards."""
    out = tmp_path_factory.mktemp("at-once") / "features"
    assert compute(mixed_folder, out).failures == 4
    return out


# --- the law --------------------------------------------------------------------------------------------------------


@settings(max_examples=3)
@given(seed=st.integers(0, 1000))
def test_parts_in_any_order_and_any_number_make_the_bytes_of_one_process(
    seed: int, mixed_folder: Path, at_once: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out, choice = tmp_path_factory.mktemp("parts") / "features", random.Random(seed)
    rounds = 0
    while not (out / "index.csv").exists():
        count = choice.randint(1, 6)
        for number in choice.sample(range(count), choice.randint(1, count) if rounds < 3 else count):
            compute(mixed_folder, out, shard=f"{number}/{count}")
        rounds += 1
    assert contents(out) == contents(at_once)


@given(count=st.integers(1, 50), outer=st.integers(1, 8), shards=st.integers(0, 200))
def test_every_shard_is_of_exactly_one_part(count: int, outer: int, shards: int) -> None:
    parts = [Part(inner, count).within(Part(number, outer)) for number in range(outer) for inner in range(count)]
    assert sorted(number for part in parts for number in part.numbers(shards)) == list(range(shards))


def test_two_processes_compute_a_part_each_at_once_and_the_last_one_out_writes_the_index(
    mixed_folder: Path, at_once: Path, tmp_path: Path
) -> None:
    out = tmp_path / "features"
    command = [*warm.python("torch"), "-m", "hookx", *COMMAND, "-o", str(out), "--quiet", str(mixed_folder), "--shard"]
    processes = [subprocess.Popen([*command, part], stdout=subprocess.PIPE, text=True) for part in ("0/2", "1/2")]
    printed = [process.communicate(timeout=100)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert [[Path(line).name[:11] for line in lines] for lines in printed] == [
        ["shard-00000", "shard-00002", "shard-00004"],
        ["shard-00001", "shard-00003"],
    ]
    assert contents(out) == contents(at_once)


def test_a_part_whose_process_is_killed_is_computed_by_other_parts(
    mixed_folder: Path, at_once: Path, tmp_path: Path
) -> None:
    out = tmp_path / "features"
    code = (
        "import os, sys, test_parts\n"
        "def kill(done): os.kill(os.getpid(), 9)\n"
        "test_parts.compute(sys.argv[1], sys.argv[2], shard='1/2', progress=kill)\n"
    )
    environment = environment_for(__file__)
    killed = subprocess.run([sys.executable, "-c", code, str(mixed_folder), str(out)], env=environment, timeout=100)
    assert killed.returncode == -signal.SIGKILL
    assert any(name.endswith(".aside") for name in os.listdir(out))
    for shard in ("2/3", "0/3", "1/3"):
        compute(mixed_folder, out, shard=shard)
    assert contents(out) == contents(at_once)


# --- what a process is told -----------------------------------------------------------------------------------------

ARRAY = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "9"}
ENVIRONMENTS: list[tuple[dict[str, str], str | None, int, int]] = [  # variables -> part, place, neighbours
    ({}, None, 0, 1),
    ({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, "2/4", 0, 2),
    ({"RANK": "3", "WORLD_SIZE": "4"}, "3/4", 0, 1),
    ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, None, 0, 1),
    ({"RANK": "7"}, None, 0, 1),
    ({"WORLD_SIZE": "7"}, None, 0, 1),
    ({"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "6", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, "5/6", 1, 1),
    ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "3", "SLURM_LOCALID": "1"}, "1/3", 1, 1),
    (
        {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "2,1"},
        "2/3",
        0,
        1,
    ),
    (
        {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_TASKS_PER_NODE": "2(x3)", "SLURM_LOCALID": "1"},
        "1/6",
        1,
        2,
    ),
    # A script that sbatch runs, without srun: there is one of it, whatever the tasks of the job.
    ({"SLURM_JOB_ID": "4", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_NPROCS": "8"}, None, 0, 1),
    ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None, 0, 1),
    (ARRAY | {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "7"}, "3/8", 0, 1),
    (
        ARRAY
        | {"SLURM_ARRAY_TASK_ID": "8", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "8"}
        | {"SLURM_ARRAY_TASK_STEP": "1", "SLURM_ARRAY_TASK_COUNT": "8"},
        "7/8",
        0,
        1,
    ),
    (
        ARRAY
        | {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_MAX": "13"}
        | {"SLURM_ARRAY_TASK_STEP": "4", "SLURM_ARRAY_TASK_COUNT": "3"},
        "1/3",
        0,
        1,
    ),
    (ARRAY | {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "1"}, None, 0, 1),
    (  # An array of jobs, in each of which srun starts two tasks.
        ARRAY
        | {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "2"}
        | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1"},
        "3/6",
        1,
        1,
    ),
    (  # srun starts one torchrun on each of two nodes, whose ranks count both nodes.
        {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
        | {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
        "5/8",
        1,
        4,
    ),
]
WRONG_ENVIRONMENTS: list[tuple[dict[str, str], str]] = [
    (
        ARRAY
        | {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "9"}
        | {"SLURM_ARRAY_TASK_STEP": "1", "SLURM_ARRAY_TASK_COUNT": "3"},
        r"(?s)have gaps.*--shard \$SLURM_ARRAY_TASK_ID/10",
    ),
    ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK is 4 and WORLD_SIZE is 4, which is not a part"),
    ({"RANK": "one", "WORLD_SIZE": "4"}, "RANK must be a whole number, got 'one'"),
]


@pytest.mark.parametrize(("variables", "part", "place", "neighbours"), ENVIRONMENTS)
def test_a_process_is_told_its_part(
    variables: Mapping[str, str], part: str | None, place: int, neighbours: int
) -> None:
    told = told_by(variables)
    assert told == Told(Part.parse(part), told.variables, place, neighbours)
    assert (told.part is None) == (told.variables == ())


@pytest.mark.parametrize(("variables", "problem"), WRONG_ENVIRONMENTS)
def test_what_is_not_a_part_is_an_error_that_names_the_way_out(variables: Mapping[str, str], problem: str) -> None:
    with pytest.raises(UsageError, match=problem) as raised:
        told_by(variables)
    assert "--shard all" in str(raised.value)


def test_an_option_is_stronger_than_what_a_process_is_told() -> None:
    variables = {"RANK": "2", "WORLD_SIZE": "4"}
    options = ExtractOptions(model="resnet18", layers="fc", images="images")
    assert as_told(options, variables).shard == "2/4"
    for shard in ("all", "0/3"):
        assert as_told(ExtractOptions(**vars(options) | {"shard": shard}), variables).shard == shard
    assert as_told(options, {}) == options


@pytest.mark.parametrize(
    ("variables", "cores"),
    [
        ({}, 64),
        ({"LOCAL_WORLD_SIZE": "8"}, 8),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "3"}, 21),
        ({"LOCAL_WORLD_SIZE": "200"}, 1),
        ({"SLURM_JOB_ID": "1", "SLURM_CPUS_PER_TASK": "6"}, 6),
        ({"SLURM_JOB_ID": "1", "SLURM_CPUS_ON_NODE": "32", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, 8),
        ({"SLURM_JOB_ID": "1", "SLURM_CPUS_ON_NODE": "32"}, 32),
        ({"SLURM_CPUS_PER_TASK": "6"}, 64),
    ],
)
def test_cores_are_shared_with_the_other_processes_of_a_host(variables: Mapping[str, str], cores: int) -> None:
    assert count_shared_cores(64, variables) == cores


@pytest.mark.parametrize(
    ("shard", "problem"),
    [
        ("16/16", "the last of 16 is 15/16"),
        ("0/0", "at least 1 part"),
        ("3", "write it as in 3/16"),
        ("-1/4", "write it as in 3/16"),
        ("1/2/3", "write it as in 3/16"),
    ],
)
def test_a_wrong_part_is_an_error_before_anything_is_listed(shard: str, problem: str, tmp_path: Path) -> None:
    told = CliRunner().invoke(app, [*COMMAND, "--shard", shard, str(tmp_path / "absent")])
    assert isinstance(told.exception, UsageError) and f"invalid --shard '{shard}'" in str(told.exception)
    assert problem in str(told.exception)


# --- the commands ---------------------------------------------------------------------------------------------------


def run_command(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [*warm.python("torch"), "-m", "hookx", *arguments], capture_output=True, text=True, timeout=100
    )
    return done.returncode, done.stdout, done.stderr


def test_a_part_says_who_made_it_one_and_ends_with_0_whatever_it_could_not_read(
    mixed_folder: Path, at_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "features"
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        code, printed, said = run_command(*COMMAND, "-o", str(out), str(mixed_folder))
        assert code == 0 and f"part {rank}/2 of the shards, by RANK and WORLD_SIZE" in said
    assert "2 could not be read" in printed
    code, printed, _ = run_command("finish", str(out), "--json")
    assert code == 3 and json.loads(printed)["failures"] == 4
    assert contents(out) == contents(at_once)


def test_finish_names_the_parts_that_are_missing_with_the_commands_that_compute_them(
    mixed_folder: Path, at_once: Path, tmp_path: Path
) -> None:
    out = tmp_path / "features"
    compute(mixed_folder, out, shard="0/3")
    for parts, commands in ((None, 1), (3, 2), (5, 3)):
        with pytest.raises(StoreError, match=r"3 of 5 shards are missing \(1, 2, 4\)") as raised:
            hookx.finish(out, parts)
        assert str(raised.value).count("hookx extract") == commands
    assert not (out / "index.csv").exists()
    for line in str(raised.value).splitlines():
        if "hookx extract" in line:
            words = line.replace("IMAGES", str(mixed_folder)).split()[2:]
            assert run_command("extract", *words, "-b", "2", "--self-check", "1")[0] == 0
    assert hookx.finish(out).totals.failures == 4
    assert contents(out).keys() == contents(at_once).keys()


def test_finish_says_how_many_shards_each_kind_of_machine_has_made(mixed_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "features"
    for part, capability in (("0/2", {}), ("1/2", {"ATEN_CPU_CAPABILITY": "default"})):
        command = [sys.executable, "-m", "hookx", *COMMAND, "-o", str(out), "--shard", part, str(mixed_folder)]
        assert subprocess.run(command, env=os.environ | capability, timeout=100).returncode == 0
    here = torch.backends.cpu.get_cpu_capability()
    assert [(made["instructions"], shards) for made, shards in hookx.finish(out).made] == [(here, 3), ("DEFAULT", 2)]
    _, printed, _ = run_command("finish", str(out))
    assert f"3 shards: instructions {here}" in printed and "2 shards: instructions DEFAULT" in printed


def test_a_run_may_insist_on_the_kind_of_machine_that_began_it(mixed_folder: Path, tmp_path: Path) -> None:
    """Whether its first shard is there by then or not; nothing of the run changes."""
    here = torch.backends.cpu.get_cpu_capability()
    for out, shard in ((tmp_path / "begun", "4/5"), (tmp_path / "planned", None)):
        if shard:
            compute(mixed_folder, out, shard=shard)  # without insisting on anything
        else:
            options = SETTINGS | {"model": "resnet18", "layers": "avgpool", "images": mixed_folder, "out": out}
            plan(ExtractOptions(**options, same_hardware=True))
        before = contents(out)
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "hookx",
                *COMMAND,
                "-o",
                str(out),
                "--shard",
                "0/2",
                "--same-hardware",
                mixed_folder,
            ],
            env=os.environ | {"ATEN_CPU_CAPABILITY": "default"},
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 1 and f"instructions (there: {here}; here: DEFAULT)" in done.stderr
        assert "leave out --same-hardware" in done.stderr and contents(out) == before
        compute(mixed_folder, out, shard="0/2", same_hardware=True)


def test_status_tells_how_far_a_run_is_and_who_writes(mixed_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "features"
    plan(ExtractOptions(model="resnet18", layers="avgpool", images=mixed_folder, out=out, **SETTINGS))
    begun = hookx.status(out)
    assert (begun.shards_finished, begun.images_per_second, begun.seconds_ago) == (0, None, None)
    compute(mixed_folder, out, shard="0/2")
    aside_of(
        out / read_plan(out).shard_file(read_plan(out).shards[1]), new_mark()
    ).touch()  # as this process would write it
    found = hookx.status(out)
    assert (found.shards_finished, found.images_finished, found.is_finished) == (3, 5, False)
    [writer] = found.writers or ()
    assert (writer.process, writer.shards) == (os.getpid(), (1,)) and writer.seconds_ago < 60
    assert found.images_per_second is not None and found.seconds_left is not None
    assert found.seconds_left == pytest.approx(4 / found.images_per_second)
    code, printed, _ = run_command("status", str(out))
    assert code == 0 and "3 of 5 finished" in printed and f"process {os.getpid()}: 1; " in printed


def test_status_does_not_count_who_was_killed(mixed_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "features"
    compute(mixed_folder, out, shard="0/2")
    process = subprocess.Popen(["sleep", "0"])
    process.wait()
    mark = new_mark().replace(f"-{os.getpid()}.", f"-{process.pid}.")
    aside_of(out / read_plan(out).shard_file(read_plan(out).shards[1]), mark).touch()
    assert hookx.status(out).writers == ()


def test_plan_begins_a_run_and_computes_nothing(mixed_folder: Path, at_once: Path, tmp_path: Path) -> None:
    out = tmp_path / "features"
    code, printed, _ = run_command("plan", *COMMAND[1:], "-o", str(out), "--json", str(mixed_folder))
    assert code == 0 and json.loads(printed)["shards_pending"] == 5
    assert contents(out) == {"plan.json": (at_once / "plan.json").read_bytes()}


def test_parts_take_the_list_of_the_plan_and_look_at_no_file(
    mixed_folder: Path, at_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, out = tmp_path / "images", tmp_path / "features"
    shutil.copytree(mixed_folder, images, symlinks=True)
    code, _, _ = run_command("plan", *COMMAND[1:], "-o", str(out), "--with-list", str(images))
    assert code == 0 and (out / "images.list").exists()
    (images / "new.png").symlink_to("a.png")  # Not on the list.
    monkeypatch.chdir(tmp_path)
    for shard in ("1/2", "0/2"):
        with files_opened() as opened:
            compute(Path("images"), out, shard=shard)  # the same folder in other words
        assert not any("new.png" in file for file in opened)
    found = contents(out)
    assert found.pop("images.list") and found == contents(at_once)
    assert hookx.verify(out).problems == ()
    with pytest.raises(OtherRunError, match="numbers of images differ"):
        compute(tmp_path, out, shard="0/2")  # other sources
    shutil.copy(images / "a.png", images / "c-empty.png")
    (images / "new.png").unlink()
    assert compute(images, out, retry_failures=True).failures == 3


def test_a_list_that_was_cut_short_is_an_error(mixed_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "images.list"
    write_list(list_images([mixed_folder]), file)
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(ImageError, match="is not a list of images, or was cut short"):
        map_list(file)


def test_a_list_on_standard_input_is_not_written_again(tmp_path: Path) -> None:
    code, _, said = run_command("plan", *COMMAND[1:], "-o", str(tmp_path), "--with-list", "-")
    assert code == 2 and "name folders, or leave out --with-list" in said


def test_plan_chooses_for_a_device_that_is_elsewhere(mixed_folder: Path, tmp_path: Path) -> None:
    code, printed, _ = run_command(
        *("plan", "-m", "resnet18", "-w", "none", "-l", "layer1@mean23", "--for", "cuda"),
        *("-o", str(tmp_path), "--json", str(mixed_folder)),
    )
    described = json.loads(printed)
    assert code == 0 and (described["batch_size"], described["memory_format"]) == (128, "contiguous")


# --- many at once ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def held(path: Path, kind: Any) -> Iterator[None]:
    with RunDirectory(path, read_plan(path), lock=kind):
        yield


def test_parts_share_a_directory_that_a_whole_run_has_alone(mixed_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "features"
    compute(mixed_folder, out, shard="0/2")
    with held(out, "shared"):
        compute(mixed_folder, out, shard="0/2")
        with pytest.raises(StoreError, match=r"(?s)another hookx process.*--shard I/N"):
            compute(mixed_folder, out)
    with held(out, "alone"), pytest.raises(StoreError, match=r"another hookx process.*, and computes every shard"):
        compute(mixed_folder, out, shard="1/2")


def test_who_begins_a_run_chooses_for_all_who_began_at_the_same_time(mixed_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "features"
    options = ExtractOptions(
        **SETTINGS | {"model": "resnet18", "layers": "layer1", "images": mixed_folder, "out": out, "batch_size": "auto"}
    )
    insists = prepare(**vars(options) | {"shard": "0/2", "memory_format": "channels_last"})
    follows = prepare(**vars(options) | {"shard": "0/2"})
    assert (follows.plan.memory_format, follows.plan.batch_size) == ("channels_last", 4)
    begun = plan(options, chosen_for="cuda").plan
    assert (begun.memory_format, begun.batch_size) == ("contiguous", 128)
    assert run(follows).plan == begun
    with pytest.raises(OtherRunError, match="memory formats differ"):
        run(insists)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM])
def test_a_warned_part_stops_and_prints_the_command_that_goes_on(
    number: signal.Signals, mixed_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text(
        "import time, torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.pool = torch.nn.AdaptiveAvgPool2d(1)\n"
        "    def forward(self, x):\n"
        "        if x.device.type == 'cpu':\n"
        "            time.sleep(0.3)\n"
        "        return self.pool(x)\n"
    )
    out = tmp_path / "features"
    command = [sys.executable, "-m", "hookx", "extract", "-m", "python:slow:Net", "-l", "pool", "-o", str(out)]
    command += ["--shard-images", "1", "-b", "1", "-j", "0", "--crop", "32", "--resize", "32", "--shard", "0/2"]
    process = subprocess.Popen([*command, str(mixed_folder)], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list(out.glob("*.safetensors")) or process.poll() is not None, 60)
    time.sleep(0.1)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    assert "interrupted; finish it with the same command:" in said and "--shard 0/2" in said
