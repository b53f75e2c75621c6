"""Runs in object stores end in the bytes of a run on the disk, whatever happens on the way; and are read from there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kit.between import between
from kit.files import contents
from kit.kept import kept
from kit.ray_cluster import ray_cluster
from kit.runs import wait_for
from kit.s3 import Store, client, localbucket, moto, nanio, serve
from kit.whole_runs import SHARDS, extract, hookx, variables

pytestmark = pytest.mark.cluster
Server = Callable[[Path, int], list[str]]
RUN = "s3://features/run"


@pytest.fixture(scope="module", params=[moto, localbucket, nanio])
def of_any_kind(request: pytest.FixtureRequest) -> Iterator[Store]:
    with serve(request.param) as store:
        yield store


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with serve(moto) as running:
        yield running


@pytest.fixture(autouse=True)
def emptied(request: pytest.FixtureRequest) -> None:
    for name in {"store", "of_any_kind"} & set(request.fixturenames):
        found: Store = request.getfixturevalue(name)
        for key in names(found, ""):
            client(found).delete_object(Bucket=found.bucket, Key=key)


def names(store: Store, prefix: str = "run/") -> list[str]:
    """Return the objects below a prefix, by the rest of their keys."""
    listed = client(store).list_objects_v2(Bucket=store.bucket, Prefix=prefix).get("Contents", [])
    return [str(one["Key"]).removeprefix(prefix) for one in listed]


def objects(store: Store) -> dict[str, bytes]:
    """Return the objects of the run, which nobody is writing."""
    one = client(store)
    return {name: one.get_object(Bucket=store.bucket, Key=f"run/{name}")["Body"].read() for name in names(store)}


def is_finished_in_part(store: Store, shards: int) -> bool:
    return sum(name.startswith("shard-") for name in names(store)) >= shards


def call(store: Store, *arguments: str, **others: str) -> subprocess.CompletedProcess[str]:
    environment = variables(store.environment, **others)
    return subprocess.run(hookx(*arguments), env=environment, capture_output=True, text=True, timeout=120)


def in_store(pictures: Path, *options: str) -> list[str]:
    return [*extract(pictures, Path("."), *options)[:-1], "-o", RUN, str(pictures)]


def test_a_run_in_any_store_is_the_run_on_the_disk(pictures: Path, at_once: Path, of_any_kind: Store) -> None:
    done = call(of_any_kind, *in_store(pictures))
    assert done.returncode == 3, done.stderr
    assert objects(of_any_kind) == contents(at_once)
    again = call(of_any_kind, *in_store(pictures), "--json")
    assert json.loads(again.stdout)["shards_computed"] == 0 and objects(of_any_kind) == contents(at_once)
    assert call(of_any_kind, "verify", RUN).returncode == 0


@pytest.mark.parametrize(("server", "is_said"), [(moto, False), (localbucket, False), (nanio, True)])
def test_a_store_that_does_not_keep_the_first_is_found_and_said_once(
    pictures: Path, server: Server, is_said: bool
) -> None:
    with serve(server) as store:
        done = call(store, *in_store(pictures))
        assert done.stderr.count("this store replaces what it was asked to create only") == is_said
        assert not [key for key in objects(store) if "probe" in key]


def test_parts_and_devices_share_a_run(pictures: Path, at_once: Path, store: Store) -> None:
    for part in ("2/3", "0/3"):
        assert call(store, *in_store(pictures, "--shard", part)).returncode == 0
    unfinished = call(store, "finish", RUN, "--parts", "3")
    assert unfinished.returncode == 1 and f"--out {RUN}/" in unfinished.stderr and "--shard 1/3" in unfinished.stderr
    state = json.loads(call(store, "status", RUN, "--json").stdout)
    assert (state["shards_finished"], state["writers"], state["is_finished"]) == (5, None, False)
    assert call(store, *in_store(pictures, "--devices", "cpu*2")).returncode == 3
    assert objects(store) == contents(at_once)
    assert call(store, "finish", RUN).returncode == 3
    assert "is finished" in call(store, "status", RUN).stdout


def test_two_who_compute_everything_at_once_end_in_the_same_bytes(
    pictures: Path, at_once: Path, of_any_kind: Store
) -> None:
    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(lambda _: call(of_any_kind, *in_store(pictures)).returncode, range(2)))
    assert codes == [3, 3] and objects(of_any_kind) == contents(at_once)


def test_a_list_that_was_planned_is_read_from_the_store(pictures: Path, at_once: Path, store: Store) -> None:
    without = [word for word in in_store(pictures)[1:] if word]
    assert call(store, "plan", "--with-list", *without).returncode == 0
    done = call(store, *in_store(pictures))
    assert f"images: as {RUN}/images.list lists them" in done.stderr
    found = objects(store)
    del found["images.list"]
    assert found == contents(at_once)


@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_is_killed_again_and_again_loses_nothing(
    pictures: Path, at_once: Path, store: Store, tmp_path: Path, seed: int
) -> None:
    environment = variables(store.environment, SLOW_SECONDS="0.05")
    command = hookx(*in_store(pictures, "--scratch", str(tmp_path)))
    for count in range(1, 4):
        with kept(command, tmp_path / "log", environment) as running:
            wait_for(lambda: is_finished_in_part(store, count * 2), 60)  # noqa: B023
            time.sleep(0.03 * seed)
            running.kill()
        published = {name: one for name, one in objects(store).items() if name in contents(at_once)}
        assert published.items() <= contents(at_once).items(), "no shard is half there"
    assert call(store, *in_store(pictures, "--scratch", str(tmp_path))).returncode == 3
    found = {name: content for name, content in objects(store).items() if not name.endswith(".aside")}
    assert found == contents(at_once)
    assert not list(tmp_path.glob(".*")), "what the killed have left on this machine is removed"


def test_a_signal_stops_a_run_that_goes_on_later(pictures: Path, at_once: Path, store: Store) -> None:
    environment = variables(store.environment, SLOW_SECONDS="0.1")
    with subprocess.Popen(hookx(*in_store(pictures)), env=environment, stderr=subprocess.PIPE, text=True) as running:
        wait_for(lambda: is_finished_in_part(store, 2), 60)
        running.send_signal(signal.SIGTERM)
        _, said = running.communicate(timeout=60)
    assert running.returncode == 143 and "finish it with the same command" in said
    assert not [name for name in os.listdir(tempfile.gettempdir()) if name.startswith(".hookx-scratch")]
    assert call(store, *in_store(pictures)).returncode == 3 and objects(store) == contents(at_once)


def test_a_store_that_is_busy_for_a_while_costs_time_only(pictures: Path, at_once: Path, store: Store) -> None:
    with between(store) as way:
        command, environment = hookx(*in_store(pictures)), variables(way.store.environment, SLOW_SECONDS="0.05")
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as running:
            wait_for(lambda: is_finished_in_part(store, 2), 60)
            way.busy_for = 8
            _, said = running.communicate(timeout=120)
        assert running.returncode == 3 and way.busy_for == 0, said
    assert objects(store) == contents(at_once)


def test_a_store_that_is_busy_from_the_start_is_waited_for(pictures: Path, at_once: Path, store: Store) -> None:
    with between(store) as way:
        way.busy_for = 10  # more than the attempts that are made where nobody answers
        done = call(way.store, *in_store(pictures))
        assert done.returncode == 3 and way.busy_for == 0, done.stderr
    assert objects(store) == contents(at_once)


LARGE = "import sys; from pathlib import Path; from hookx.store.objects.path import ObjectPath\n"
LARGE += "file, url = Path(sys.argv[1]), ObjectPath.parse(sys.argv[2])\n"
LARGE += "print(url.put(file, replace=False), url.put(file, replace=False))"


@pytest.mark.parametrize("lost", ["POST uploadId=", "PUT partNumber=2", "POST uploads"])
def test_a_large_object_whose_answers_are_lost_is_whole(store: Store, tmp_path: Path, lost: str) -> None:
    content = os.urandom(40 * 2**20)
    (tmp_path / "large").write_bytes(content)
    with between(store) as way:
        way.lose_answers_of.append(lost)
        command = [sys.executable, "-c", LARGE, str(tmp_path / "large"), f"{RUN}/large"]
        done = subprocess.run(command, env=variables(way.store.environment), capture_output=True, text=True)
        assert way.lost, "the answer was lost"
        assert done.stdout.split()[1:] == ["False"], done.stderr
    assert objects(store) == {"large": content}


def test_an_upload_that_is_not_complete_is_in_no_listing_and_is_given_up() -> None:
    with serve(nanio) as store:  # moto does not know when an upload was begun.
        check_given_up(store)


def check_given_up(store: Store) -> None:
    one = client(store).create_multipart_upload(Bucket=store.bucket, Key="run/shard-00000")
    client(store).upload_part(
        Bucket=store.bucket, Key="run/shard-00000", UploadId=one["UploadId"], PartNumber=1, Body=bytes(2**20)
    )
    other = client(store).create_multipart_upload(Bucket=store.bucket, Key="runs/shard-00000")
    assert objects(store) == {}
    give_up = "from hookx.store.objects.path import ObjectPath\n"
    give_up += f"print([ObjectPath.parse('{RUN}').abandon_uploads(age) for age in (3600, 0, 0)])"
    done = subprocess.run([sys.executable, "-c", give_up], env=variables(store.environment), capture_output=True)
    assert done.stdout.strip() == b"[0, 1, 0]", done.stderr
    left = client(store).list_multipart_uploads(Bucket=store.bucket)["Uploads"]
    assert [upload["UploadId"] for upload in left] == [other["UploadId"]], "those of other runs stay"


READ = """
import json, sys
import torch
import hookx
from torch.utils.data import DataLoader

there, here = hookx.open(sys.argv[1]), hookx.open(sys.argv[2])
assert list(there.keys) == list(here.keys) and there.failures == here.failures
for address in here:
    one, other = there[address], here[address]
    key = one.keys[3]
    assert torch.equal(one[:], other[:]) and torch.equal(one[[5, 2, 5, -1]], other[[5, 2, 5, -1]])
    assert torch.equal(one.of(key), other.of(key)) and torch.equal(one.torch(), other.torch())
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one.shards(), other.shards(), strict=True))
    for method in ("fork", "spawn"):
        found = [DataLoader(run.dataset(address), batch_size=3, num_workers=2, multiprocessing_context=method)
                 for run in (there, here)]
        assert all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(*found, strict=True))
both = hookx.join(there, here)
assert len(both.keys) == len(here.keys) and not both.only_left
print("the same")
"""


def test_python_reads_a_run_from_a_store_as_from_the_disk_in_forked_processes_too(
    pictures: Path, at_once: Path, of_any_kind: Store, tmp_path: Path
) -> None:
    call(of_any_kind, *in_store(pictures))
    (tmp_path / "read.py").write_text(f"if __name__ == '__main__':\n{READ.replace(chr(10), chr(10) + '    ')}")
    command = [sys.executable, str(tmp_path / "read.py"), RUN, str(at_once)]
    environment = variables(of_any_kind.environment)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.stdout == "the same\n", done.stderr


def test_commands_read_a_run_from_a_store_as_from_the_disk(
    pictures: Path, at_once: Path, store: Store, tmp_path: Path
) -> None:
    call(store, *in_store(pictures))
    key = next(csv_line.split(",")[0] for csv_line in (at_once / "index.csv").read_text().splitlines()[1:])
    for arguments in (["cat", "-l", "conv", "-i", key], ["inspect", "--stats"], ["verify"]):
        name, *rest = arguments
        there, here = call(store, name, RUN, *rest), call(store, name, str(at_once), *rest)
        assert there.returncode == 0 and there.stdout == here.stdout.replace(str(at_once), RUN), there.stderr
    for run, file in ((RUN, "there.npy"), (str(at_once), "here.npy")):
        assert call(store, "export", run, "-l", "conv", "--to", str(tmp_path / file)).returncode == 0
    assert (tmp_path / "there.npy").read_bytes() == (tmp_path / "here.npy").read_bytes()
    assert call(store, "visualize", RUN, "--image", key, "-l", "conv", "-o", str(tmp_path / "maps")).returncode == 0
    assert list((tmp_path / "maps").rglob("*.png"))


def test_one_row_costs_neither_other_shards_nor_the_rest_of_its_own(store: Store, tmp_path: Path) -> None:
    command = ["extract", "-m", "resnet18", "-w", "none", "-l", "conv1,avgpool", "-b", "2", "--shard-images", "4"]
    assert call(store, *command, "-o", RUN, "images").returncode == 0
    whole = sum(map(len, objects(store).values()))
    with between(store) as way:
        assert call(way.store, "cat", RUN, "-l", "avgpool", "-i", "people/astronaut.jpg").returncode == 0
        assert way.bytes_down < whole / 20
        assert any("GET" in request and "shard-00000" in request for request in way.requests)
        assert not [request for request in way.requests if "shard-00001" in request]


def test_verify_names_objects_that_are_damaged_or_missing(pictures: Path, store: Store) -> None:
    call(store, *in_store(pictures))
    name = next(iter(objects(store)))
    shards = [name for name in objects(store) if name.startswith("shard-")]
    assert len(shards) == SHARDS and name == "failures.csv"
    content = bytearray(objects(store)[shards[1]])
    content[-1] ^= 1
    client(store).put_object(Bucket=store.bucket, Key=f"run/{shards[1]}", Body=bytes(content))
    client(store).put_object(Bucket=store.bucket, Key=f"run/{shards[2]}", Body=bytes(content[:100]))
    client(store).delete_object(Bucket=store.bucket, Key=f"run/{shards[3]}")
    found = json.loads(call(store, "verify", RUN, "--json").stdout)
    wrong = {problem["file"]: problem["what"] for problem in found["problems"]}
    assert "does not match the checksum" in wrong[shards[1]] and "is damaged" in wrong[shards[2]]
    assert wrong[shards[3]] == "is missing"
    assert call(store, "cat", RUN, "-l", "conv", "-i", "none.png").returncode == 1


def test_what_is_wrong_with_a_store_is_said_at_once_and_no_secret_with_it(
    pictures: Path, store: Store, tmp_path: Path
) -> None:
    command, file = in_store(pictures), tmp_path / "file"
    file.touch()
    none = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "")
    nowhere = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_SECRET_ACCESS_KEY": "extremely-secret"}
    empty = {**none, "HOME": str(tmp_path), "AWS_EC2_METADATA_DISABLED": "true"}
    cases: list[tuple[list[str], dict[str, str], str, str]] = [
        ([*command[:-2], "s3://absent/run", command[-1]], {}, "there is no bucket 'absent'", "choose another --out"),
        (command, nowhere, "Could not connect to the endpoint", "choose another --out"),
        (command, empty, "there are no credentials", "aws configure"),
        ([*command[:-2], "s3://u:pass@bucket/run", command[-1]], {}, "do not belong into a URL", "s3://BUCKET/RUN"),
        ([*command[:-2], "ftp://bucket/run", command[-1]], {}, "cannot use 'ftp://'", "s3://, gs://, az://"),
        ([*command[:-2], "s3://features", command[-1]], {}, "names no place of its own", "s3://features/RUN"),
        (["verify", "s3://features/absent"], {}, "cannot read plan.json", "there is none"),
        (["inspect", "s3://absent/run"], {}, "there is no bucket 'absent'", ""),
        (["export", RUN, "-l", "conv", "--to", "s3://features/x.npy"], {}, "only runs lie in object stores", ""),
        ([*command, "--scratch", str(file)], {}, f"cannot build shards in {file}", "--scratch DIR"),
    ]
    for arguments, others, what, then in cases:
        began = time.monotonic()
        done = call(store, *arguments, **others)
        said = done.stdout + done.stderr
        assert done.returncode in (1, 2) and what in said and then in said, (arguments, said)
        assert "Traceback" not in said and "extremely-secret" not in said and "pass@" not in said, said
        assert time.monotonic() - began < 30
    assert objects(store) == {}


def test_a_store_that_may_not_be_written_is_refused_before_the_first_image(pictures: Path) -> None:
    with serve(nanio) as store:
        done = call(store, *in_store(pictures), AWS_SECRET_ACCESS_KEY="not-the-secret-of-this-server")
        assert done.returncode == 1 and "SignatureDoesNotMatch" in done.stderr, done.stderr
        assert "not-the-secret-of-this-server" not in done.stderr


def test_failures_that_were_mended_take_the_place_of_what_is_there(
    pictures: Path, store: Store, thumbnails: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, file in enumerate(sorted(thumbnails.rglob("*.png"))[:6]):
        (folder / f"{number}.png").write_bytes(file.read_bytes())
    whole = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(b"")
    assert call(store, *in_store(folder)).returncode == 3
    assert "failures.csv" in objects(store)
    (folder / "3.png").write_bytes(whole)
    assert call(store, *in_store(folder, "--retry-failures")).returncode == 0
    assert "failures.csv" not in objects(store)
    assert call(store, "verify", RUN).returncode == 0


def test_nodes_of_ray_write_to_a_store_and_take_the_list_from_there(
    pictures: Path, at_once: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables(store.environment).items():
        monkeypatch.setenv(name, value)
    with ray_cluster() as cluster:
        command = in_store(pictures, "--launcher", "ray", "--ray-address", cluster.address)
        environment = cluster.environment | store.environment
        done = subprocess.run(hookx(*command), env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 3, done.stderr
    assert objects(store) == contents(at_once), "the list is removed at the end"


def test_an_array_of_slurm_gets_the_address_and_its_scripts_lie_here(
    pictures: Path, store: Store, tmp_path: Path
) -> None:
    command = in_store(pictures, "--launcher", "slurm", "--tasks", "2", "--dry-run")
    done = subprocess.run(
        hookx(*command), env=variables(store.environment), cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and f"--out={RUN} " in done.stdout and f"finish {RUN} --parts 2" in done.stdout
    assert f"--output={tmp_path}/run.slurm/" in done.stdout and not list(tmp_path.iterdir())
