"""What somebody else made can lie, and cannot do harm: one error, no code, no file outside, no memory, no terminal."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import re
import resource
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from typer.testing import CliRunner, Result

import hookx
from hookx.check.inspect import inspect
from hookx.check.verify import verify
from hookx.cli.app import app
from hookx.errors import HookxError, StoreError
from hookx.plan import LayerSpec, Plan, Preprocessing, ValueCounts
from hookx.store.directory import RunDirectory, read_plan
from hookx.store.files import write_whole
from hookx.store.record import ShardRecord
from hookx.store.writer import ShardWriter
from kit.shards import publish

PLAN = Plan(
    model="net",
    weights="none",
    layers=(LayerSpec("conv1", (3,), "float32"),),
    preprocessing=Preprocessing(256, 224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear"),
    precision="fp32",
    memory_format="contiguous",
    image_count=2,
    images_sha256="0" * 64,
    images_per_shard=2,
    batch_size=2,
)
SHARD = PLAN.shard_file(PLAN.shards[0])
RECORD = ShardRecord(["a", "b"], sizes_bytes=[1, 2])
TENSORS = {"conv1": torch.zeros(2, 3)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a directory with a plan, in which to put a shard."""
    with RunDirectory(tmp_path / "features", PLAN):
        pass
    return tmp_path / "features"


def put_metadata(path: Path, **changes: str | None) -> None:
    """Write a shard with changed metadata, and with checksums that fit them."""
    record = ShardRecord(**{**RECORD.__dict__, "checksums": {"conv1": 0}})
    metadata = {**record.to_metadata(PLAN, PLAN.shards[0]), **changes}
    kept = {name: text for name, text in metadata.items() if text is not None and name != "checksum"}
    # The checksum of a record is a CRC-32 of the others; anybody can compute it.

    kept["checksum"] = str(zlib.crc32(json.dumps(dict(sorted(kept.items()))).encode()))
    write_whole(path / SHARD, [save(TENSORS, kept)])


def write(directory: RunDirectory, record: ShardRecord) -> None:
    """Write the first shard as a run does."""
    positions = range(len(record.keys))
    with ShardWriter(directory, directory.plan.shards, len(positions), lambda _: record) as writer:
        writer.rows(positions, len(positions))
        writer.publish(record, [writer.write(positions)])
        writer.finish()


def put_bytes(path: Path, header: bytes, data: bytes = b"", claims: int | None = None) -> None:
    (path / SHARD).write_bytes(struct.pack("<Q", len(header) if claims is None else claims) + header + data)


def is_refused_by_every_reader(path: Path) -> str:
    """Check that every reader ends with one error that names the shard; return what `verify` says about it."""
    for read in (hookx.open, inspect):
        with pytest.raises(StoreError, match=re.escape(SHARD)):
            read(path)
    problems = {problem.file: problem.what for problem in verify(path).problems}
    assert set(problems) == {SHARD}
    return problems[SHARD]


def run_command(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exception is None or isinstance(result.exception, HookxError | SystemExit), result.exception
    return result


def plan_json(**changes: Any) -> str:
    """Return the text of a plan with any changes, and the fingerprint that fits them."""
    document = {**PLAN.identity, **changes}
    fingerprint = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    return json.dumps({"fingerprint": fingerprint, **document, "chosen": {"batch_size": 2}})


# --- the plan ------------------------------------------------------------------------------------------------------


def layer(**changes: Any) -> list[dict[str, Any]]:
    return [{"address": "conv1", "shape": [3], "dtype": "float32", **changes}]


def pixels(**changes: Any) -> dict[str, Any]:
    return {**PLAN.identity["preprocessing"], **changes}


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "9" * 100_000,
        '{"format": "hookx 1", "image_count": ' + "9" * 100_000 + "}",
        plan_json(layers=layer() + layer()),
        plan_json(layers=layer(address="__metadata__")),
        plan_json(layers=layer(shape=[2**62, 2**62, 0])),
        plan_json(layers=layer(shape=[2**41])),
        plan_json(layers=layer(shape=[1] * 100)),
        plan_json(layers=layer(shape=[-1])),
        plan_json(layers=layer(dtype="object")),
        plan_json(layers=layer(address=["a"], shape="12")),
        plan_json(layers={"a": 1}),
        plan_json(layers=None),
        plan_json(image_count=10**30),
        plan_json(image_count=2**62, images_per_shard=1),
        plan_json(images_per_shard=0),
        plan_json(preprocessing=pixels(crop_px=10**9)),
        plan_json(preprocessing=pixels(resize_px=-5)),
        plan_json(preprocessing=pixels(mean="abc")),
        plan_json(preprocessing=pixels(mean=[float("inf")] * 3)),
        plan_json(preprocessing=[1, 2]),
        plan_json(preprocessing=pixels(mean=[{}])),
        "\0",
        '"\ud800"',
    ],
    ids=range(25),
)
def test_a_plan_that_no_run_can_have_is_one_error(path: Path, text: str) -> None:
    (path / "plan.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    for read in (read_plan, hookx.open, inspect):
        with pytest.raises(StoreError, match=r"plan\.json"):
            read(path)
    assert [problem.file for problem in verify(path).problems] == ["plan.json"]
    with pytest.raises(StoreError, match=r"plan\.json"), RunDirectory(path, PLAN):
        pass


def test_a_plan_of_any_length_is_not_read_to_its_end(path: Path) -> None:
    with open(path / "plan.json", "wb") as file:
        file.truncate(2**40)  # A hole: it takes no room on the disk.
    with pytest.raises(StoreError, match=r"plan.json is longer than 16,777,216 bytes"):
        read_plan(path)


@pytest.mark.parametrize("name", ["plan.json", SHARD, "index.csv"])
def test_a_pipe_or_a_device_in_place_of_a_file_does_not_hang(path: Path, name: str) -> None:
    put_metadata(path)
    for make in (os.mkfifo, lambda file: os.symlink("/dev/zero", file)):
        (path / name).unlink(missing_ok=True)
        make(path / name)
        assert name in {problem.file for problem in verify(path).problems} | {note.file for note in verify(path).notes}
        if name != "index.csv":
            with pytest.raises(StoreError, match=r"it is a (pipe|device)"):
                hookx.open(path)


def test_a_plan_that_promises_a_million_million_shards_costs_nothing(path: Path) -> None:
    (path / "plan.json").write_text(plan_json(image_count=10**12, images_per_shard=1))
    problem = verify(path).problems[0]
    assert problem.file == "shard-00000-of-1000000000000.safetensors"
    assert "(1,000,000,000,000 shards)" in problem.what
    assert inspect(path).shards_finished == 0


# --- shards --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "claims"),
    [
        (b"{}", 2**63),
        (b"{}", 2**64 - 1),
        (b"{}", 2**40),
        (b"{}", 99_999_999),
        (b"[" * 100_000, None),
        (b'{"conv1":' * 1000, None),
        (b'{"conv1":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}', None),
        (b'{"conv1":{"dtype":"F32","shape":[2,3],"data_offsets":[0,1099511627776]}}', None),
        (b'{"conv1":{"dtype":"F32","shape":[2,3],"data_offsets":[24,0]}}', None),
        (b'{"conv1":{"dtype":"F32","shape":[-2,3],"data_offsets":[0,24]}}', None),
        (b'{"conv1":{"dtype":"OBJ","shape":[2,3],"data_offsets":[0,24]}}', None),
        (b'{"__metadata__":{"keys":["a"]}}', None),
        (b'{"__metadata__":null}', None),
        (b"\xff\xfe{}", None),
        (b"", None),
    ],
)
def test_a_crafted_header_is_one_error(path: Path, header: bytes, claims: int | None) -> None:
    put_bytes(path, header, bytes(24), claims)
    assert re.match("is damaged: |belongs to another run", is_refused_by_every_reader(path))


def test_a_header_of_very_many_tensors_is_not_turned_into_python_objects(path: Path) -> None:
    entries = ",".join(f'"{number}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for number in range(200_000))
    metadata = json.dumps({"fingerprint": PLAN.fingerprint, "checksum": "0", "shard": "0"})
    put_bytes(path, f'{{"__metadata__":{metadata},{entries}}}'.encode())
    assert "was altered" in is_refused_by_every_reader(path)


@pytest.mark.parametrize(
    "changes",
    [
        *({name: None} for name in RECORD.to_metadata(PLAN, PLAN.shards[0]) if name not in ("checksum", "format")),
        {"keys": "[" * 100_000},
        {"keys": '{"a": 1, "b": 2}'},
        {"keys": '["a", 7]'},
        {"keys": '["a"]'},
        {"keys": '["a", "\\ud800"]'},
        {"keys": "9" * 10_000},
        {"failures": '[["a"]]'},
        {"failures": '["ab"]'},
        {"failures": "{}"},
        {"rotations_ignored": '"many"'},
        {"rotations_ignored": "1e400"},
        {"counts": "[]"},
        {"counts": '{"conv1": 3}'},
        {"counts": '{"conv1": {"all_zero": "x"}}'},
        {"made": "[]"},
        {"checksums": '{"conv1": "0"}'},
        {"sizes_bytes": '["1", "2"]'},
        {"shard": "1"},
        {"shard": "\x1b[2J"},
        {"fingerprint": "0" * 64},
    ],
    ids=range(29),
)
def test_a_record_that_is_none_is_one_error_though_its_checksum_fits(
    path: Path, changes: dict[str, str | None]
) -> None:
    put_metadata(path)
    hookx.open(path)  # What refuses it below is the change.
    put_metadata(path, **changes)
    is_refused_by_every_reader(path)


def test_a_record_that_counts_what_this_version_does_not_know_is_shown(path: Path) -> None:
    put_metadata(path, counts='{"{conv1.__class__}": {"{count.real}": 3}}', made='{"device": [[]], "\\u001b": null}')
    result = run_command("inspect", path)
    assert result.exit_code == 0 and "3 of {conv1.__class__} are of another kind" in result.stdout
    assert "\x1b" not in result.stdout


def test_two_names_of_one_shard_do_not_make_its_rows_appear_twice(path: Path) -> None:
    put_metadata(path)
    (path / "shard-0-of-00001.safetensors").write_bytes((path / SHARD).read_bytes())
    assert hookx.open(path).keys_of_rows == ["a", "b"]
    assert {problem.file for problem in verify(path).problems} >= {"shard-0-of-00001.safetensors"}


def test_a_pickle_in_place_of_any_file_is_not_loaded(path: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    put_metadata(path)
    for name in ("index.csv", SHARD, "plan.json"):
        (path / name).write_bytes(pickle.dumps(Bomb()))
        assert name in {problem.file for problem in verify(path).problems} | {note.file for note in verify(path).notes}
    torch.save(Bomb(), path / SHARD)
    assert not verify(path).is_whole
    assert not (tmp_path / "exploded").exists()


def test_a_header_is_refused_before_memory_is_taken_for_it(path: Path, tmp_path: Path) -> None:
    lists = b"[" + b"[]," * 30_000_000 + b"[]]"  # 90 MB of JSON are 2.1 GB of empty lists.

    def read_with_little_memory() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 400 * 2**20,) * 2)
        problems = [problem.what for problem in verify(path).problems]
        (tmp_path / "said").write_text("\n".join(problems))

    header = b'{"__metadata__":{"fingerprint":"' + PLAN.fingerprint.encode() + b'","keys":"' + lists + b'"}}'
    put_bytes(path, header)
    process = multiprocessing.get_context("fork").Process(target=read_with_little_memory)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert (tmp_path / "said").read_text() == f"is damaged: its header claims {len(header):,} bytes"


def test_a_header_that_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    plan = replace(PLAN, image_count=1)
    with RunDirectory(tmp_path, plan) as directory:
        record = ShardRecord(["x" * 40_000_000])
        with pytest.raises(StoreError, match=r"take 40,\d+,\d+ of at most 33,554,432 bytes\n.*--shard-images"):
            write(directory, record)
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


# --- outside the directory -----------------------------------------------------------------------------------------


def test_a_link_in_the_directory_is_replaced_and_never_written_through(tmp_path: Path) -> None:
    outside, path = tmp_path / "outside", tmp_path / "features"
    path.mkdir()
    names = ("index.csv", SHARD, f".{SHARD}.aside", ".index.csv.aside", ".plan.json.aside")
    for name in names:
        (tmp_path / f"outside-{name}").write_text("precious")
        (path / name).symlink_to(tmp_path / f"outside-{name}")
    (path / SHARD).unlink()
    with RunDirectory(path, PLAN) as directory:
        (path / SHARD).symlink_to(tmp_path / f"outside-{SHARD}")
        write(directory, RECORD)
        directory.publish_index()
    assert all((tmp_path / f"outside-{name}").read_text() == "precious" for name in names)
    assert not any(file.is_symlink() for file in path.iterdir()) and not outside.exists()
    assert hookx.open(path).keys_of_rows == ["a", "b"]


def test_a_folder_in_place_of_a_leaving_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".mine.aside").mkdir()
    with RunDirectory(tmp_path, PLAN):
        pass
    assert (tmp_path / ".mine.aside").is_dir()


HOSTILE_NAMES = [
    "../../escaped",
    "/etc/passwd",
    "a\0b",
    "..",
    ".",
    "a/../../b",
    "\x1b]0;title\x07",
    "x\nresult  is whole",
]


def test_names_that_are_paths_are_names_and_no_file_is_made_or_read_through_them(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "features"
    layers = tuple(LayerSpec(name, (1,), "float32") for name in HOSTILE_NAMES)
    plan = replace(PLAN, layers=layers, image_count=len(HOSTILE_NAMES), images_per_shard=100)
    keys = sorted(HOSTILE_NAMES)
    with RunDirectory(path, plan) as directory:
        tensors = {name: torch.zeros(len(keys), 1) for name in HOSTILE_NAMES}
        publish(directory, plan.shards[0], tensors, ShardRecord(keys, sizes_bytes=[0] * len(keys)))
        directory.publish_index()
    verify(path)
    inspect(path, statistics=True)
    features = hookx.open(path)
    assert features.keys_of_rows == keys and list(features) == HOSTILE_NAMES
    assert {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()} == {
        f"deep/features/{name}" for name in ("plan.json", "index.csv", "shards.csv", plan.shard_file(plan.shards[0]))
    }


# --- the terminal --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [("inspect", "--stats"), ("verify",), ("inspect", "--json"), ("verify", "--json")]
)
def test_no_name_acts_on_a_terminal_or_begins_a_line_of_its_own(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    evil = "\x1b[2J\x9b31m\r\b\u202egpj\n  and all is well\nresult  all is well"
    plan = replace(
        PLAN,
        model=evil,
        weights=evil,
        precision=evil,
        memory_format=evil,
        layers=(LayerSpec(evil, (3,), "float32"),),
        preprocessing=replace(PLAN.preprocessing, interpolation=evil),
    )
    path = tmp_path / "features"
    record = ShardRecord(
        [evil, evil], made={evil: evil}, counts=ValueCounts({evil: {"all_zero": 1, evil: 2}}), sizes_bytes=[1]
    )
    with RunDirectory(path, plan) as directory:
        publish(directory, plan.shards[0], {evil: torch.zeros(2, 3)}, record)
        directory.publish_index()
    (path / evil).touch()
    (path / f"shard-{evil}.safetensors").touch()
    result = run_command(*arguments, path)
    text = result.stdout + result.stderr
    assert "all is well" in text
    assert all(char.isprintable() or char == "\n" for char in text)
    assert not any(re.match(r"result  all is well|  and", line) for line in text.splitlines())


def test_an_error_that_quotes_a_name_cannot_act_on_a_terminal_either(path: Path) -> None:
    from hookx.cli.streams import printable

    (path / SHARD).write_text("")
    path = path.rename(path.parent / "\x1b[2J\nerror: gone")
    with pytest.raises(StoreError) as caught:
        hookx.open(path)
    text = printable(str(caught.value))
    assert "gone" in text and "\x1b" not in text and "\nerror" not in text
    assert text.endswith("\n  remove it, and run the same command again")
