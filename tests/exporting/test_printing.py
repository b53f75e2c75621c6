"""One activation on standard output: as text, JSON and bytes it is the one that is stored."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner, Result

import hookx
from hookx.cli.app import app
from hookx.errors import HookxError, UsageError
from hookx.exporting.printing import Activation, to_json, to_text
from hookx.plan import DTYPES
from hookx.store.format import bytes_of
from kit import warm

LAYERS = "conv1,avgpool,layer1.0.relu,layer4@mean23"


@pytest.fixture(scope="module")
def run(mixed_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a run of five rows and four failures."""
    out = tmp_path_factory.mktemp("run") / "features"
    hookx.extract("resnet18", LAYERS, mixed_folder, weights="none", resize=32, crop=32, shard_images=4, out=out)
    return out


def cat(run: Path, layer: str, key: str, *options: str) -> Result:
    return CliRunner().invoke(app, ["cat", str(run), "--layer", layer, "--image", key, *options])


def error_of(result: Result) -> str:
    assert isinstance(result.exception, HookxError), result
    return str(result.exception)


def text_of(values: Tensor) -> str:
    return b"".join(to_text(values)).decode()


def document_of(values: Tensor) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(
        b"".join(to_json(Activation("a.jpg", "conv1", values))), parse_constant=pytest.fail
    )
    return document


# --- the values ----------------------------------------------------------------------------------------------------


@st.composite
def activations(draw: st.DrawFn) -> Tensor:
    """Draw a tensor of any stored type and shape, of any bits."""
    dtype: torch.dtype = getattr(torch, draw(st.sampled_from(sorted(DTYPES))))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    width = dtype.itemsize
    data = draw(st.binary(min_size=math.prod(shape) * width, max_size=math.prod(shape) * width))
    if not data:
        return torch.empty(shape, dtype=dtype)
    if dtype == torch.bool:
        data = bytes(byte % 2 for byte in data)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


def numpy_of(values: Tensor) -> np.ndarray[Any, Any]:
    """Return a tensor as numpy has it: bfloat16 and float8, which it does not have, as float32."""
    has_it = values.dtype not in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    return (values if has_it else values.float()).numpy()


def assert_same(read: np.ndarray[Any, Any], values: Tensor) -> None:
    """Compare what was read with a tensor: type, shape, and every number, where -0.0 differs from 0.0."""
    expected = numpy_of(values)
    assert (read.dtype, read.shape) == (expected.dtype, expected.shape)
    assert list(map(repr, read.flat)) == list(map(repr, expected.flat))


@given(activations())
@example(torch.tensor([0.1, -0.0, 1e-45, 3e38, math.nan, math.inf, -math.inf]))
@example(torch.tensor([True, False]))
def test_the_text_gives_every_number_again(values: Tensor) -> None:
    dtype = numpy_of(values).dtype
    numbers = [int(text) if dtype.kind == "b" else dtype.type(text) for text in text_of(values).split()]
    assert_same(np.array(numbers, dtype=dtype).reshape(values.shape), values)


@given(activations())
@example(torch.tensor([[0.1, -0.0], [math.nan, -math.inf]]))
def test_the_json_is_valid_and_gives_every_number_again_with_its_shape_and_type(values: Tensor) -> None:
    document = document_of(values)
    assert (document["key"], document["layer"]) == ("a.jpg", "conv1")
    assert document["shape"] == list(values.shape)
    assert document["dtype"] == str(values.dtype).removeprefix("torch.")
    dtype = numpy_of(values).dtype
    read = np.array(document["values"], dtype=np.float32 if dtype.kind == "c" else dtype)
    if values.numel():
        assert_same(read.view(dtype).reshape(read.shape[: values.ndim]), values)
    else:
        assert not read.size


@given(activations())
def test_the_bytes_are_those_of_the_tensor(values: Tensor) -> None:
    assert bytes_of(values) == values.flatten().view(torch.uint8).numpy().tobytes()


def test_a_number_is_the_shortest_that_gives_its_own_type_again() -> None:
    assert text_of(torch.tensor([0.1, 1 / 3])) == "0.1\n0.33333334\n"
    assert text_of(torch.tensor([0.1, 1 / 3]).half()) == "0.1\n0.3333\n"
    assert text_of(torch.tensor([0.1, 1 / 3]).double().float().double()) == "0.10000000149011612\n0.3333333432674408\n"


def test_json_writes_what_it_has_no_number_for_as_text_that_python_and_javascript_read() -> None:
    values = document_of(torch.tensor([1.5, math.nan, math.inf, -math.inf]))["values"]
    assert values == [1.5, "NaN", "Infinity", "-Infinity"]
    assert list(map(float, values))[2:] == [math.inf, -math.inf]
    assert document_of(torch.tensor([True, False]))["values"] == [True, False]
    assert document_of(torch.tensor([1 + 2j]))["values"] == [[1, 2]]


def test_numpy_reads_the_text_and_the_blank_lines_do_not_disturb_it() -> None:
    values = torch.randn(3, 4, 5)
    read = np.loadtxt(text_of(values).splitlines(), dtype=np.float32)
    assert read.shape == (12, 5)
    assert_same(read.reshape(values.shape), values)


def test_a_long_vector_is_written_in_pieces_that_fit_together() -> None:
    values = torch.randn(10_000)
    assert_same(np.array(document_of(values)["values"], dtype=np.float32), values)


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((), "0\n"),
        ((3,), "0\n1\n2\n"),
        ((3, 1, 1), "0\n1\n2\n"),
        ((2, 3), "0 1 2\n3 4 5\n"),
        ((2, 1, 3), "0 1 2\n3 4 5\n"),
        ((2, 2, 2), "0 1\n2 3\n\n4 5\n6 7\n"),
        ((2, 1, 2, 2), "0 1\n2 3\n\n4 5\n6 7\n"),
        ((0, 2), ""),
    ],
)
def test_a_vector_is_a_number_a_line_and_maps_are_rows_with_blank_lines_between(
    shape: tuple[int, ...], text: str
) -> None:
    assert text_of(torch.arange(math.prod(shape)).reshape(shape)) == text


@pytest.mark.parametrize("shape", [(16, 128, 128), (256 * 1024,), (1024, 256)])
def test_printing_a_large_map_takes_the_memory_of_a_few_rows(shape: tuple[int, ...]) -> None:
    activation = Activation("a.jpg", "conv1", torch.randn(shape))
    for pieces in (to_text(activation.values), to_json(activation)):
        tracemalloc.start()
        written = sum(map(len, pieces))
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert written > 2 * 2**20 and peak_bytes < 2**20


# --- the command ---------------------------------------------------------------------------------------------------


def test_cat_prints_the_row_of_the_image_whatever_the_shard(run: Path) -> None:
    features = hookx.open(run)
    for row, key in enumerate(features.keys_of_rows):
        printed = cat(run, "avgpool", key)
        assert printed.exit_code == 0 and printed.stderr == ""
        assert_same(np.array(printed.stdout.split(), dtype=np.float32).reshape(512, 1, 1), features["avgpool"][row])
        document = json.loads(cat(run, "conv1", key, "--json").stdout)
        assert (document["key"], document["layer"], document["shape"]) == (key, "conv1", [64, 16, 16])
        assert_same(np.array(document["values"], dtype=np.float32), features["conv1"][row])
        raw = np.frombuffer(cat(run, "conv1", key, "--raw").stdout_bytes, dtype="<f4")
        assert_same(raw.reshape(64, 16, 16), features["conv1"][row])


def test_a_layer_can_be_spelt_as_in_python(run: Path) -> None:
    assert cat(run, "layer1[0].relu:1", "a.png").stdout == cat(run, "layer1.0.relu:1", "a.png").stdout != ""
    assert len(cat(run, "layer4@mean23", "a.png").stdout.splitlines()) == 512


def test_what_the_run_does_not_hold_is_an_error_with_the_closest(run: Path) -> None:
    assert error_of(cat(run, "avgpol", "a.png")) == (
        f"{run}/ does not hold 'avgpol'; closest: avgpool\n  all: hookx inspect {run}/"
    )
    assert "closest: layer1.0.relu:1, layer1.0.relu:0\n" in error_of(cat(run, "layer1.0.relu", "a.png"))
    assert error_of(cat(run, "avgpool", "A.png")).startswith(f"{run}/ does not hold 'A.png'; closest: ")
    assert error_of(cat(run, "avgpool", "zz.png")).startswith(f"{run}/ does not hold 'zz.png'; closest: ")


def test_an_image_that_could_not_be_read_is_an_error_with_the_reason(run: Path) -> None:
    reason = hookx.open(run).failures["c-empty.png"]
    assert error_of(cat(run, "avgpool", "c-empty.png")) == (f"'c-empty.png' could not be read: {reason}")


def test_of_an_unfinished_run_cat_prints_what_is_there_and_says_why_the_rest_is_not(run: Path, tmp_path: Path) -> None:
    for file in run.iterdir():
        if file.name not in ("index.csv", "failures.csv", "shard-00000-of-00003.safetensors"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert cat(tmp_path, "avgpool", "i.png").stdout == cat(run, "avgpool", "i.png").stdout
    assert error_of(cat(tmp_path, "avgpool", "a.png")).endswith(
        "\n  the run is not finished: the same hookx extract command resumes it"
    )


def test_two_forms_at_once_are_an_error_of_usage(run: Path) -> None:
    assert isinstance(cat(run, "avgpool", "a.png", "--raw", "--json").exception, UsageError)


BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def command(run: Path, layer: str, *options: str) -> list[str]:
    return [*warm.python("torch"), "-m", "hookx", "cat", str(run), "-l", layer, "-i", "a.png", *options]


def test_bytes_are_not_sent_to_a_terminal(run: Path) -> None:
    master, slave = os.openpty()
    process = subprocess.run(
        command(run, "conv1", "--raw"), stdout=slave, stderr=subprocess.PIPE, text=True, timeout=100
    )
    os.close(slave)
    os.close(master)
    assert process.returncode == 2
    assert process.stderr == (
        "error: --raw writes bytes, and standard output is a terminal\n  send them to a file: > FILE\n"
    )


@pytest.mark.parametrize("option", ["", "--json", "--raw"])
def test_a_reader_that_has_seen_enough_ends_cat_without_a_word(run: Path, option: str) -> None:
    line = f"{shlex.join(command(run, 'conv1', *option.split()))} | head -c 20"
    process = subprocess.run(line, shell=True, capture_output=True, timeout=100)
    assert len(process.stdout) == 20 and process.stderr == b""


def test_a_reader_that_is_gone_before_a_short_answer_is_written_hears_nothing_either(run: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    process = subprocess.run(
        command(run, "avgpool"), stdout=write_end, stderr=subprocess.PIPE, env=BUFFERED, timeout=100
    )
    os.close(write_end)
    assert process.returncode == 0 and process.stderr == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("layer", ["avgpool", "conv1"])
def test_a_disk_that_is_full_is_an_error_and_not_a_shorter_file(run: Path, layer: str) -> None:
    with open("/dev/full", "wb") as full:
        process = subprocess.run(
            command(run, layer, "--raw"), stdout=full, stderr=subprocess.PIPE, text=True, env=BUFFERED, timeout=100
        )
    assert process.returncode == 1
    assert process.stderr == "error: cannot write to standard output: No space left on device\n"
