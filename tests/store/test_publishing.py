"""Shards, plans and exports are right and whole on file systems without locks, without links, and with errors."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hookx.errors import StoreError
from hookx.store.asides import aside_of, new_mark, remove_left_overs
from hookx.store.directory import RunDirectory
from hookx.store.files import made_whole, write_whole
from kit.faults import Fault, Faults
from kit.files import contents
from kit.processes import environment_for
from kit.runs import MAPS, plan_of
from kit.writing import write

PLAN = plan_of(MAPS, 12, 3)
UNREADABLE = (4, 5, 11)

# Under the library each of these writes a run into its own directory; all share one process, because starting costs.
SCRIPT = """
import json, sys
from collections.abc import Iterator
from pathlib import Path
from hookx.errors import HookxError
from kit.writing import write
from test_publishing import PLAN, UNREADABLE
workers, *folders = sys.argv[1:]
for folder in map(Path, folders):
    for attempt in range(2):
        try:
            write(folder, PLAN, 2, UNREADABLE, workers=int(workers))
            print(json.dumps([folder.name, attempt, ""]))
        except HookxError as error:
            print(json.dumps([folder.name, attempt, str(error)]))
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    write(path, PLAN, 2, UNREADABLE)
    return contents(path)


def write_under(faults: dict[str, list[Fault]], folder: Path, workers: int) -> tuple[dict[tuple[str, int], str], str]:
    """Write every run twice, each with its faults; return the errors of each attempt, and the warnings."""
    all_faults = Faults(*(fault for some in faults.values() for fault in some))
    command = [sys.executable, "-c", SCRIPT, str(workers), *(str(folder / name) for name in faults)]
    environment = environment_for(__file__, all_faults.environment)
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended.stderr
    counted = zip(all_faults.rules, all_faults.counts, strict=True)
    assert not [fault for fault, count in counted if count < fault.first]
    answers = (json.loads(line) for line in ended.stdout.splitlines())
    return {(name, attempt): error for name, attempt, error in answers}, ended.stderr


def test_a_file_system_without_links_locks_or_flushes_of_folders_takes_a_run_as_any_other(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    faults: dict[str, list[Fault]] = {}
    for name in ("EPERM", "ENOTSUP", "ENOSYS", "EMLINK", "EXDEV"):
        faults[f"link-{name}"] = [Fault("link", name, path=f"link-{name}/")]
    for name in ("EINVAL", "ENOTSUP", "EBADF", "ENOSYS"):
        faults[f"fsync-{name}"] = [Fault("fsync", name, path=f"fsync-{name}$")]
    for name in ("ENOSYS", "ENOLCK", "EOPNOTSUPP", "EINVAL", "EBADF", "lie"):
        faults[f"flock-{name}"] = [Fault("flock", name, path=f"flock-{name}$")]
    faults["interrupted"] = [Fault(call, "EINTR", 2, 2, "interrupted/") for call in ("link", "rename", "write", "open")]
    faults["answer-lost"] = [Fault("link", "done EIO", path="lost/"), Fault("rename", "done ESTALE", path="lost/")]
    faults["answer-repeated"] = [Fault("link", "done EEXIST", path="repeated/")]
    faults["unlisted"] = [Fault("open", "EACCES", 2, 8, path="unlisted$")]  # when it is to be flushed
    errors, warnings = write_under(faults, tmp_path, workers=2)
    assert not any(errors.values()), errors
    for name in faults:
        assert contents(tmp_path / name) == undisturbed, name
    assert warnings.count("this file system cannot lock") == 10  # once for each attempt; who lies is believed


def test_an_error_of_the_disk_is_said_leaves_no_half_shard_and_the_same_call_ends_in_the_same_bytes(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    faults = {
        f"{call}-{error}-{first}": [Fault(call, error, first, first, f"{call}-{error}-{first}/.shard")]
        for call, error, first in [
            *(("fsync", error, first) for error in ("EIO", "ENOSPC") for first in (1, 4)),
            *(("write", error, first) for error in ("EIO", "ENOSPC", "EDQUOT", "EROFS", "ESTALE") for first in (1, 9)),
            *(("open", error, first) for error in ("EROFS", "EMFILE", "EIO") for first in (1, 3)),
            ("ftruncate", "EIO", 2),
        ]
    }
    for error in ("EIO", "ENOSPC", "EROFS", "ESTALE"):
        faults[f"link-{error}"] = [Fault("link", error, 2, 2, f"link-{error}/shard")]
    faults["folder"] = [Fault("fsync", "EIO", 2, 2, "folder$")]
    faults["plan"] = [Fault("link", "EIO", 1, 1, "plan/plan.json")]
    faults["index"] = [Fault("rename", "ENOSPC", 1, 1, "index/index.csv")]
    errors, _ = write_under(faults, tmp_path, workers=0)
    for name in faults:
        assert errors[name, 0].startswith("cannot "), (name, errors[name, 0])
        assert "run the same command again: it resumes" in errors[name, 0]
        assert errors[name, 1] == "", name
        assert contents(tmp_path / name) == undisturbed, name


# --- two writers at once -------------------------------------------------------------------------------------------

TOGETHER = """
import multiprocessing, sys
from collections.abc import Iterator
from pathlib import Path
from kit.writing import write
from test_publishing import PLAN, UNREADABLE
fork = multiprocessing.get_context("fork")
for number in range(8):
    runs = [
        fork.Process(target=write, args=(Path(sys.argv[1], str(number)), PLAN, 2, UNREADABLE), kwargs={"workers": 2})
        for _ in range(2)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join(60)
    print(*(run.exitcode for run in runs))
"""


def test_two_runs_of_one_plan_at_once_end_with_the_right_bytes_where_a_lock_does_nothing(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    faults = Faults(Fault("flock", "lie"))
    environment = environment_for(__file__, faults.environment)
    command = [sys.executable, "-c", TOGETHER, str(tmp_path)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.stdout.split() == ["0"] * 16, ended.stderr
    for number in range(8):
        assert contents(tmp_path / str(number)) == undisturbed


def test_the_first_plan_wins_and_a_second_of_another_run_is_refused(tmp_path: Path) -> None:
    other = plan_of(MAPS, 12, 4)
    barrier = multiprocessing.get_context("fork").Barrier(2)
    answers = multiprocessing.get_context("fork").SimpleQueue()

    def begin(number: int) -> None:
        path = tmp_path / str(number)
        for plan in (PLAN, other):
            if os.fork() == 0:
                directory = RunDirectory(path, plan)
                directory._lock = lambda: None  # type: ignore[method-assign]
                barrier.wait()
                try:
                    with directory:
                        answers.put(plan.fingerprint)
                except StoreError as error:
                    answers.put(str(error))
                os._exit(0)

    for number in range(20):
        begin(number)
        both = {answers.get(), answers.get()}
        winner = json.loads((tmp_path / str(number) / "plan.json").read_text())["fingerprint"]
        assert winner in both
        (refused,) = both - {winner}
        assert "holds another run: images per shard differ" in refused
        os.wait(), os.wait()


def test_of_two_exports_to_one_name_the_first_wins_and_the_second_says_so(tmp_path: Path) -> None:
    target = tmp_path / "fc.npy"
    one = made_whole(target)
    aside = one.__enter__()
    with pytest.raises(StoreError, match="another hookx process is writing"):
        made_whole(target).__enter__()
    aside.write_bytes(b"first")
    aside.with_name("fc.keys.csv").write_bytes(b"first")
    (tmp_path / "fc.npy").write_bytes(b"second")  # As by another host, whose processes nobody sees here.
    with pytest.raises(StoreError, match="already exists"):
        one.__exit__(None, None, None)
    assert contents(tmp_path) == {"fc.npy": b"second"}


# --- what is left aside --------------------------------------------------------------------------------------------


def test_what_is_aside_is_removed_if_its_process_is_gone_and_not_while_it_runs(tmp_path: Path) -> None:
    mine = new_mark()
    host, process = mine.split("-")[:2]
    number, start = process.split(".")
    gone = subprocess.Popen(["true"])
    gone.wait()
    kept = [mine, f"other.0badcafe-{gone.pid}.1-0badcafe"]
    removed = [f"{host}-{gone.pid}.{start}-0badcafe", f"{host}-{number}.{int(start) + 1}-0badcafe"]
    for mark in kept + removed:
        aside_of(tmp_path / "shard", mark).touch()
    (tmp_path / ".shard.aside").touch()  # by a version that had a lock
    (tmp_path / ".folder.aside").mkdir()
    yesterday = aside_of(tmp_path / "shard", "other.0badcafe-1.1-00000000")
    yesterday.touch()
    os.utime(yesterday, (time.time() - 25 * 3600,) * 2)
    remove_left_overs(tmp_path)
    names = {aside_of(tmp_path / "shard", mark).name for mark in kept}
    assert {file.name for file in tmp_path.iterdir()} == names | {".folder.aside"}


def test_a_name_as_long_as_the_file_system_takes_can_be_written_aside(tmp_path: Path) -> None:
    for name in ("n" * 255, "ä" * 127):
        write_whole(tmp_path / name, [b"all of it"])
        with made_whole(tmp_path / f"{name[:-4]}.npy") as aside:
            aside.write_bytes(b"all of it")
    assert set(contents(tmp_path).values()) == {b"all of it"} and len(list(tmp_path.iterdir())) == 4


def test_who_writes_a_file_again_removes_what_a_killed_process_left_of_it(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    host = new_mark().split("-")[0]
    left = [aside_of(tmp_path / name, f"{host}-{gone.pid}.1-0badcafe") for name in ("a.png", "b.png")]
    for file in left:
        file.touch()
    write_whole(tmp_path / "a.png", [b"whole"])
    assert {file.name for file in tmp_path.iterdir()} == {"a.png", left[1].name}


def test_a_file_that_another_has_taken_the_place_of_is_not_published(tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"mine"
        (aside,) = tmp_path.iterdir()
        aside.unlink()
        aside.write_bytes(b"of somebody else")

    for replace in (True, False):
        with pytest.raises(StoreError, match="was replaced by another file while hookx was writing it"):
            write_whole(tmp_path / "index.csv", chunks(), replace=replace)
        assert list(tmp_path.iterdir()) == []
