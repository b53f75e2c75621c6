"""Places in object stores: what an address may be, what is never printed, and the process that talks to stores."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hookx.errors import UsageError
from hookx.store.location import absolute, location_of
from hookx.store.objects import helper
from hookx.store.objects import path as path_module
from hookx.store.objects.bucket import without_secrets
from hookx.store.objects.helper import ObjectStoreError
from hookx.store.objects.path import ObjectFile, ObjectPath
from kit.kept import descendants_of
from kit.processes import environment_for
from kit.runs import wait_for

NOWHERE = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "key-of-nobody", "AWS_REGION": "us-east-1"}
NOWHERE |= {"AWS_SECRET_ACCESS_KEY": "a-secret-of-the-tests", "AWS_EC2_METADATA_DISABLED": "true"}


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectPath]:
    """Return a place in a store where nobody answers."""
    for name, value in NOWHERE.items():
        monkeypatch.setenv(name, value)
    helper._end()  # What was started before has other variables.
    yield ObjectPath.parse("s3://bucket/run")
    helper._end()


def test_an_address_is_used_as_a_path_is() -> None:
    run = location_of("s3://bucket/some/run//")
    assert isinstance(run, ObjectPath) and str(run) == "s3://bucket/some/run" and location_of(run) is run
    assert (run / "plan.json").name == "plan.json" and (run / "plan.json").parent == run == absolute(run)
    assert location_of("features/s3:") == Path("features/s3:") and location_of(Path("a//b")) == Path("a/b")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://", "names no bucket"),
        ("s3://bucket", "names no place of its own in the bucket"),
        ("s3://bucket//run", "names no place of its own"),
        ("s3://bucket/a/../b", "names no place of its own"),
        ("s3://bucket/a\nb", "names no place of its own"),
        ("s3://key:secret-of-mine@bucket/run", "credentials and options do not belong into a URL"),
        ("az://bucket/run?sig=secret-of-mine", "credentials and options do not belong into a URL"),
        ("gs://bucket/run#secret-of-mine", "credentials and options do not belong into a URL"),
        ("ftp://host/run", "cannot use 'ftp://'"),
        ("file:///run", "cannot use 'file://'"),
    ],
)
def test_an_address_that_hookx_cannot_use_is_refused_and_no_secret_repeated(url: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as raised:
        location_of(url)
    assert "secret-of-mine" not in str(raised.value)


@pytest.mark.parametrize(("scheme", "package"), [("s3", "boto3"), ("gs", "obstore"), ("az", "obstore")])
def test_a_package_that_is_missing_is_named_with_its_extra(
    scheme: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=rf"{scheme}:// needs {package}\n  .*'hookx-vision\[{scheme}\]'"):
        ObjectPath.parse(f"{scheme}://bucket/run").names()


def test_secrets_of_variables_and_of_urls_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "sv=2024&sig=abcdef")
    text = "PUT https://store/run?sv=2024&sig=abcdef failed\n with 'sv=2024&sig=abcdef'"
    assert without_secrets(text) == "PUT https://store/run failed with '***'"


def test_a_store_that_does_not_answer_is_an_error_within_seconds_without_its_key(nowhere: ObjectPath) -> None:
    began = time.monotonic()
    for call in (nowhere.names, nowhere.size_bytes, nowhere.exists, nowhere.keeps_the_first, nowhere.remove):
        with pytest.raises(ObjectStoreError, match=r"Could not connect.*127\.0\.0\.1:9") as raised:
            call()
        assert "a-secret" not in str(raised.value)
    assert time.monotonic() - began < 60


def test_a_process_that_was_killed_is_started_again(nowhere: ObjectPath) -> None:
    for _ in range(2):
        with pytest.raises(ObjectStoreError, match="Could not connect"):
            nowhere.names()
        assert helper._running is not None
        running = helper._running._running
        running.kill()
        with pytest.raises(ObjectStoreError, match="has ended"):
            nowhere.names()


def test_a_forked_process_starts_one_of_its_own_and_leaves_its_parents_alone(nowhere: ObjectPath) -> None:
    with pytest.raises(ObjectStoreError, match="Could not connect"):
        nowhere.names()
    process = os.fork()
    if process == 0:
        try:
            nowhere.names()
        except ObjectStoreError as error:
            os._exit(0 if "Could not connect" in str(error) else 2)
        os._exit(1)
    assert os.waitpid(process, 0)[1] == 0
    with pytest.raises(ObjectStoreError, match="Could not connect"):
        nowhere.names()


ASK = "import sys, time\nfrom hookx.store.objects.path import ObjectPath\n"
ASK += "try: ObjectPath.parse('s3://bucket/run').names()\nexcept OSError: print('asked', flush=True)\ntime.sleep(100)"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_what_talks_to_the_store_ends_with_the_process_that_started_it(number: signal.Signals) -> None:
    environment = environment_for(__file__, dict(os.environ)) | NOWHERE
    command = [sys.executable, "-c", ASK]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as asking:
        assert asking.stdout is not None and asking.stdout.readline() == b"asked\n"
        children = descendants_of(asking.pid)
        assert len(children) == 1
        asking.send_signal(number)
        asking.wait(20)
    wait_for(lambda: not Path(f"/proc/{children[0]}").exists(), 20)


def test_ranges_of_an_object_fill_memory_and_short_ones_cost_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    content, requests = os.urandom(3_000_000), []

    def read(path: ObjectPath, ranges: list[tuple[int, int]]) -> memoryview:
        requests.append(ranges)
        return memoryview(b"".join(content[start:stop] for start, stop in ranges))

    monkeypatch.setattr(ObjectPath, "read", read)
    monkeypatch.setattr(ObjectPath, "size_bytes", lambda path: len(content))
    monkeypatch.setattr(path_module, "_AT_ONCE_BYTES", 700_000)
    file = ObjectFile(ObjectPath.parse("s3://bucket/run/shard"))
    wanted = [(0, 8), (8, 5000), (100_000, 300_000), (2_999_990, 10), (5, 2_000_000), (7, 0)]
    for at, length in wanted[:2]:
        piece = bytearray(length)
        file.read([(at, memoryview(piece))])
        assert piece == content[at : at + length]
    assert len(requests) == 1, "the beginning of an object is fetched once"
    pieces = [bytearray(length) for _, length in wanted]
    file.read([(at, memoryview(piece)) for (at, _), piece in zip(wanted, pieces, strict=True)])
    assert [bytes(piece) for piece in pieces] == [content[at : at + length] for at, length in wanted]
    assert all(sum(stop - start for start, stop in ranges) <= 700_000 for ranges in requests)
    with pytest.raises(EOFError):
        file.read([(2_999_995, memoryview(bytearray(6)))])
