"""The stores of the tests keep a promise, or break it, as real ones do: who creates an object first keeps it."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from kit.s3 import Store, client, localbucket, moto, nanio, serve

pytestmark = pytest.mark.cluster

PART_BYTES = 5 << 20  # No part but the last may be smaller.


def create(store: Store, key: str, content: bytes) -> bool:
    """Put an object unless it is there; return whether it was this call."""
    try:
        client(store).put_object(Bucket=store.bucket, Key=key, Body=content, IfNoneMatch="*")
    except ClientError as error:
        assert error.response["ResponseMetadata"]["HTTPStatusCode"] in (409, 412)
        return False
    return True


@pytest.mark.parametrize("server", [moto, localbucket])
def test_one_of_many_who_create_an_object_at_once_does(server: Callable[[Path, int], list[str]]) -> None:
    with serve(server) as store:
        contents = [bytes([number]) * 1000 for number in range(8)]
        with ThreadPoolExecutor(8) as pool:
            created = list(pool.map(lambda content: create(store, "plan.json", content), contents))
        kept = client(store).get_object(Bucket=store.bucket, Key="plan.json")["Body"].read()
        assert created.count(True) == 1 and kept == contents[created.index(True)]


def test_a_server_that_ignores_the_condition_lets_everybody_create() -> None:
    with serve(nanio) as store:
        assert [create(store, "plan.json", content) for content in (b"one", b"two", b"three")] == [True] * 3
        assert client(store).get_object(Bucket=store.bucket, Key="plan.json")["Body"].read() == b"three"


@pytest.mark.parametrize(("server", "is_kept"), [(moto, True), (localbucket, True), (nanio, False)])
def test_obstore_creates_in_parts_on_servers_that_keep_the_first(
    server: Callable[[Path, int], list[str]], is_kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import obstore
    from obstore.exceptions import AlreadyExistsError
    from obstore.store import S3Store

    first, second = os.urandom(2 * PART_BYTES + 1), os.urandom(2 * PART_BYTES + 1)
    with serve(server) as store:
        for name, value in store.environment.items():
            if name.startswith("AWS_"):
                monkeypatch.setenv(name, value)
        objects = S3Store(store.bucket, client_options={"allow_http": True})
        for content in (first, second):
            is_first = content is first
            try:
                obstore.put(objects, "shard", content, mode="create", use_multipart=True, chunk_size=PART_BYTES)
                assert is_first or not is_kept
            except AlreadyExistsError:
                assert is_kept and not is_first
        assert bytes(obstore.get(objects, "shard").bytes()) == (first if is_kept else second)
