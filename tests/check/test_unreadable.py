"""A file that cannot be read now is never called damaged, and nothing advises to remove it."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hookx
from hookx.check.inspect import inspect
from hookx.check.verify import verify
from hookx.errors import HookxError, ShardError, StoreError, UnreadableError
from hookx.run.prepare import prepare
from hookx.store.directory import RunDirectory, begun_plan, check_resumable, finished_shards, read_plan
from kit.faults import Fault, Faults
from kit.processes import environment_for
from kit.runs import MAPS, plan_of
from kit.writing import write

PLAN = plan_of(MAPS, 6, 3)
SHARD = PLAN.shard_file(PLAN.shards[1])

READERS = """
import itertools, json, sys
from pathlib import Path
import hookx
from hookx.check.inspect import inspect
from hookx.check.verify import verify
from hookx.errors import HookxError
from hookx.exporting import export
from hookx.exporting.printing import read_activation
from hookx.store.directory import check_resumable, finished_shards
from test_unreadable import PLAN

def problems(path):
    return "; ".join(f"{problem.file} {problem.what}" for problem in verify(path).problems)

def resume(path):
    check_resumable(path, PLAN)
    finished_shards(path, PLAN)

readers = {
    "verify": problems,
    "resume": resume,
    "inspect": lambda path: inspect(path, statistics=True),
    "open": lambda path: hookx.open(path)["layer1"][:],
    "map": lambda path: list(hookx.open(path)["layer1"].shards()),
    "dataset": lambda path: hookx.open(path).dataset("layer1")[5],
    "export": lambda path: export(path, "layer1", path / "a.npy"),
    "cat": lambda path: read_activation(path, "layer1", "0005"),
}
for folder in map(Path, sys.argv[1:]):
    reader = readers[folder.name.split("-")[0]]
    try:
        said = reader(folder)
        print(json.dumps([folder.name, said if isinstance(said, str) else ""]))
    except HookxError as error:
        print(json.dumps([folder.name, str(error)]))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "features"
    write(path, PLAN, 3)
    return path


def read_under(faults: dict[str, Fault], folder: Path, run: Path) -> dict[str, str]:
    """Read copies of a run, each with its fault, by the reader that its name begins with; return what was said."""
    for name in faults:
        shutil.copytree(run, folder / name)
    all_faults = Faults(*faults.values())
    environment = environment_for(__file__, all_faults.environment)
    command = [sys.executable, "-c", READERS, *(str(folder / name) for name in faults)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended.stderr
    return dict(map(json.loads, ended.stdout.splitlines()))


@pytest.mark.parametrize("file", ["shard-00001", "plan.json"])
def test_what_the_system_refuses_to_read_is_said_with_the_reason_and_is_not_damage(
    tmp_path: Path, run: Path, file: str
) -> None:
    readers = ("verify", "resume", "inspect", "open", "map", "dataset", "export", "cat")
    errors = ("EMFILE", "EACCES", "EIO", "ESTALE", "ENOMEM", "ETIMEDOUT")
    faults = {
        f"{reader}-{error}": Fault("read" if error == "EIO" else "open", error, path=f"{reader}-{error}/{file}")
        for reader, error in itertools.product(readers, errors)
    }
    for name, said in read_under(faults, tmp_path, run).items():
        assert "cannot read" in said or "cannot be read" in said, (name, said)
        assert os.strerror(getattr(errno, name.split("-")[1])) in said, (name, said)
        assert "damaged" not in said and "remove" not in said, (name, said)


def test_a_second_look_at_a_shard_that_the_system_refuses_is_not_damage_either(tmp_path: Path, run: Path) -> None:
    refused = [("open", "EMFILE", 2), ("read", "EIO", 3), ("open", "ENFILE", 2)]
    of_readers = dict.fromkeys(("verify", "resume", "inspect"), refused)
    of_readers["map"] = [*refused[:1], ("mmap", "ENOMEM", 1), ("mmap", "ENODEV", 2), ("mmap", "EAGAIN", 1)]
    faults = {
        (name := f"{reader}-{call}-{error}-{first}"): Fault(call, error, first, path=f"{name}/shard")
        for reader, all_refused in of_readers.items()
        for call, error, first in all_refused
    }
    for name, said in read_under(faults, tmp_path, run).items():
        assert "cannot read" in said or "cannot be read" in said, (name, said)
        assert "damaged" not in said and "remove" not in said, (name, said)


def test_verify_counts_what_cannot_be_read_by_itself_and_exits_with_1(run: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(run, tmp_path / "features"))
    faults = Faults(Fault("open", "EACCES", path=SHARD))
    command = [sys.executable, "-m", "hookx", "verify", "--json", str(path)]
    ended = subprocess.run(command, env=os.environ | faults.environment, capture_output=True, text=True)
    document = json.loads(ended.stdout)
    assert (ended.returncode, document["shards_whole"], document["shards_unreadable"]) == (1, 1, 1)
    assert {"file": SHARD, "what": "cannot be read: Permission denied"} in document["problems"]


def test_a_shard_that_was_read_and_is_cut_or_altered_is_damaged(run: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(run, tmp_path / "features"))
    whole = (path / SHARD).read_bytes()
    for damaged in (whole[:-1], whole[:100], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        (path / SHARD).write_bytes(damaged)
        found = verify(path)
        assert (found.shards_whole, found.shards_unreadable) == (1, 0)
        assert "is damaged" in found.problems[0].what
    (path / SHARD).write_bytes(whole[:-1])
    with pytest.raises(ShardError, match=r"is damaged: .*\n  remove it, and run the same command again"):
        finished_shards(path, PLAN)


# --- folders, pipes and links of our names -------------------------------------------------------------------------

NAMES = ("plan.json", "index.csv", "failures.csv", SHARD)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["a folder", "a pipe", "a link to nothing", "a socket"])
def test_what_is_not_a_file_but_has_the_name_of_one_is_named_and_left_alone(
    run: Path, tmp_path: Path, name: str, kind: str
) -> None:
    path = Path(shutil.copytree(run, tmp_path / "r"))
    (path / name).unlink(missing_ok=True)
    if kind == "a folder":
        (path / name).mkdir()
        (path / name / "mine").touch()
    elif kind == "a pipe":
        os.mkfifo(path / name)
    elif kind == "a socket":
        os.mknod(path / name, 0o600 | 0o140000)
    else:
        (path / name).symlink_to("nowhere")

    def resume() -> None:
        check_resumable(path, PLAN)
        finished_shards(path, PLAN)

    with pytest.raises(UnreadableError, match=f"cannot read .*{name}: it is {kind}\n  move it away"):
        resume()
    with pytest.raises(UnreadableError, match=f"it is {kind}"), RunDirectory(path, PLAN):
        finished_shards(path, PLAN)
    assert name in {problem.file for problem in verify(path).problems}
    if name in ("plan.json", SHARD):
        for read in (hookx.open, inspect):
            with pytest.raises(UnreadableError, match=f"it is {kind}"):
                read(path)
    assert os.path.lexists(path / name) and (kind != "a folder" or (path / name / "mine").exists())


@pytest.mark.parametrize("out", ["n" * 300, "a/" + "n" * 256, "file", "file/below", "nowhere/below"])
def test_a_name_that_cannot_be_an_output_directory_is_an_error_at_once(
    tmp_path: Path, thumbnails: Path, out: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to("absent")
    with pytest.raises(StoreError, match=r"(cannot use .* as the output directory: |is a file, not a directory)"):
        job = prepare("resnet18", "avgpool", thumbnails, weights="none", out=tmp_path / out)
        RunDirectory(job.out, job.plan).__enter__()
    with pytest.raises(HookxError):
        read_plan(tmp_path / out)
    with pytest.raises(HookxError):
        hookx.open(tmp_path / out)
    with pytest.raises(HookxError):
        verify(tmp_path / out)


def test_a_directory_that_cannot_be_listed_is_not_an_empty_one(run: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(run, tmp_path / "features"))
    code = "import sys, pathlib, hookx.store.directory as d; d.begun_plan(pathlib.Path(sys.argv[1]))"
    faults = Faults(Fault("opendir", "EACCES", path="features"))
    command = [sys.executable, "-c", code, str(path)]
    ended = subprocess.run(command, env=os.environ | faults.environment, capture_output=True, text=True)
    assert f"cannot use {path} as the output directory: Permission denied" in ended.stderr
    assert begun_plan(path) is not None and begun_plan(tmp_path / "absent") is None
