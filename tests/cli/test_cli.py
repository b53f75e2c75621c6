"""The command as a process: data on stdout, talk on stderr, one exit code, and a run that no signal can spoil."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from typer.testing import CliRunner, Result

import hookx
from hookx.cli.app import app
from hookx.errors import HookxError, LayerError, ModelError, StoreError, UsageError
from kit import warm

HOOKX = [*warm.python("torch"), "-m", "hookx"]
COLD_HOOKX = [sys.executable, "-m", "hookx"]  # with signals
SMALL = shlex.split("--model resnet18 --weights none --resize 32 --crop 32")
LAYERS = ["--layers", "conv1,layer1,avgpool"]


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the default --out, features/, from meaning a directory of whoever runs the tests."""
    monkeypatch.chdir(tmp_path)


def hookx_process(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*HOOKX, *map(str, arguments)], capture_output=True, text=True, timeout=100, **options)


def in_this_process(*arguments: str | Path, stdin: bytes | None = None) -> Result:
    """Run the command without the seconds that a new process spends on importing torch."""
    return CliRunner().invoke(app, list(map(str, arguments)), input=stdin)


def dry_run(*arguments: str | Path, stdin: bytes | None = None) -> dict[str, Any]:
    result = in_this_process("extract", *SMALL, *arguments, "--dry-run", "--json", stdin=stdin)
    assert result.exit_code == 0, result.exception
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def error_of(result: Result) -> HookxError:
    assert isinstance(result.exception, HookxError), result
    return result.exception


def files_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def assert_plain(text: str) -> None:
    """Check that a text holds neither escape codes nor bars nor the lines of boxes."""
    assert not re.search(r"[\x1b\r\u2500-\u259f]", text), text
    assert "%|" not in text and "it/s" not in text and "image/s" not in text


# --- answers without torch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["extract", "--help"], 0),
        (["extract", "images"], 2),
        (["extract", "--no-such-option"], 2),
    ],
)
def test_help_and_errors_of_usage_do_not_wait_for_torch(arguments: list[str], exit_code: int) -> None:
    process = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "hookx", *arguments], capture_output=True, text=True, timeout=100
    )
    imported = re.findall(r"^import time:.*\| +(\S+)$", process.stderr, re.MULTILINE)
    assert process.returncode == exit_code
    assert "hookx.cli" in imported and "torch" not in imported and "torchvision" not in imported


def test_version_names_what_hookx_stands_on_and_the_cuda_that_is_here() -> None:
    lines = in_this_process("--version").stdout.splitlines()
    shown = {name: value.strip() for name, _, value in (line.partition(" ") for line in lines)}
    assert list(shown)[:4] == ["hookx", "python", "torch", "torchvision"] and list(shown)[-1] == "CUDA"
    assert shown["torch"] == torch.__version__ or torch.__version__.startswith(f"{shown['torch']}+")
    assert shown["torchvision"].partition("+")[0] == torchvision.__version__.partition("+")[0]
    if torch.version.cuda is None:
        assert shown["CUDA"] == "not in this torch"
    elif not torch.cuda.is_available():
        assert shown["CUDA"] == f"{torch.version.cuda}, no device here"
    else:
        names = ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
        assert re.fullmatch(rf"{torch.version.cuda}, driver \d+\.\d+: {re.escape(names)}", shown["CUDA"])


def test_importing_hookx_does_not_import_torch_and_its_names_are_there() -> None:
    code = (
        "import sys, hookx; assert 'torch' not in sys.modules; assert {'open', 'extract', 'Capture'} <= set(dir(hookx))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_names_the_commands_and_the_exit_codes() -> None:
    for arguments in (["--help"], ["extract", "--help"]):
        text = " ".join(in_this_process(*arguments).stdout.split())
        for code in ("0 done", "1 error", "2 usage", "3 done, but", "130 interrupted", "143 terminated"):
            assert code in text


# --- one run, looked at from all sides -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """A finished run over the mixed folder, and the process that made it."""

    process: subprocess.CompletedProcess[str]
    out: Path
    command: list[str]


@pytest.fixture(scope="module")
def ran(mixed_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    out = tmp_path_factory.mktemp("ran") / "features"
    command = ["extract", *SMALL, *LAYERS, "--shard-images", "4", "--out", str(out), str(mixed_folder)]
    return Ran(hookx_process(*command), out, command)


def test_a_run_with_unreadable_images_is_done_and_exits_with_3(ran: Ran) -> None:
    assert ran.process.returncode == 3
    features = hookx.open(ran.out)
    assert (len(features.keys_of_rows), len(features.failures)) == (5, 4)


def test_in_a_pipe_stdout_is_the_summary_and_stderr_the_talk_both_plain(ran: Ran) -> None:
    out, err = ran.process.stdout, ran.process.stderr
    assert_plain(out)
    assert_plain(err)
    assert re.search(r"^conv1 +5,64,16,16 +float32 ", out, re.MULTILINE)
    assert re.search(r"^images +5 stored, 4 could not be read", out, re.MULTILINE)
    assert "weights: random (seed 0)\n" in err and "weights: random (seed 0)\n" not in out
    for name in ("b-text.jpg", "c-empty.png", "f-cut.png", "h-dangling.png"):
        assert re.search(rf"^warning: cannot read '{name}': \w+", err, re.MULTILINE)
        assert name not in out


def test_json_is_one_document_on_stdout_and_running_again_finds_everything_done(ran: Ran) -> None:
    before = files_of(ran.out)
    result = in_this_process(*ran.command, "--json")
    summary = json.loads(result.stdout)
    assert result.exit_code == 3
    assert (summary["images"], summary["failures"], summary["shards"], summary["shards_computed"]) == (5, 4, 3, 0)
    assert [layer["address"] for layer in summary["layers"]] == ["conv1", "layer1", "avgpool"]
    assert summary["layers"][0]["shape"] == [5, 64, 16, 16]
    assert files_of(ran.out) == before


def test_quiet_prints_the_paths_of_the_shards_and_nothing_else(ran: Ran) -> None:
    result = in_this_process(*ran.command, "--quiet")
    assert result.exit_code == 3 and result.stderr == ""
    assert result.stdout.splitlines() == [
        str(ran.out / f"shard-0000{number}-of-00003.safetensors") for number in range(3)
    ]


def test_another_run_in_the_same_directory_is_an_error_that_says_what_differs(ran: Ran) -> None:
    error = error_of(in_this_process(*ran.command, "--layers", "fc"))
    assert isinstance(error, StoreError)
    assert str(error) == (
        f"{ran.out}/ holds another run: layers differ (there: conv1, layer1, avgpool; "
        "asked: conv1, layer1, avgpool, fc); choose another --out\n"
        "  to add what is new, and compute only that: the same command with --append\n"
        f"  to copy its rows into another run: --reuse {ran.out}/ with another --out"
    )


def test_a_dry_run_shows_what_would_be_written_and_writes_nothing(thumbnails: Path, tmp_path: Path) -> None:
    result = in_this_process("extract", *SMALL, *LAYERS, "--out", tmp_path / "o", "--dry-run", thumbnails)
    assert result.exit_code == 0 and "nothing was written" in result.stdout
    document = dry_run(*LAYERS, "--out", tmp_path / "o", thumbnails)
    per_image = 4 * (64 * 16 * 16 + 64 * 8 * 8 + 512)
    assert (document["dry_run"], document["images"], document["bytes_to_write"]) == (True, 24, 24 * per_image)
    assert list(tmp_path.iterdir()) == []


# --- where paths and settings come from ----------------------------------------------------------------------------


def test_paths_come_from_stdin_a_line_each_and_keep_their_place_in_the_tree(
    thumbnails: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(thumbnails)
    command = ["extract", *SMALL, "-l", "fc", "-o", str(tmp_path / "o"), "-"]
    assert in_this_process(*command, stdin=b"things/rocket-0.png\r\n./sky/hubble-1.png\n").exit_code == 0
    assert hookx.open(tmp_path / "o").keys_of_rows == ["sky/hubble-1.png", "things/rocket-0.png"]


def test_paths_with_line_breaks_come_from_stdin_with_nul_between_them(thumbnails: Path, tmp_path: Path) -> None:
    odd = tmp_path / "two\nlines.png"
    shutil.copy(thumbnails / "sky" / "hubble-0.png", odd)
    stdin = b"\0".join(os.fsencode(file) for file in (odd, thumbnails / "sky" / "hubble-1.png"))
    assert dry_run("-l", "fc", "-0", stdin=stdin)["images"] == 2
    assert dry_run("-l", "fc", "-0", "-", stdin=stdin)["images"] == 2


def test_a_flag_beats_a_variable_which_beats_the_configuration_which_beats_the_default(
    thumbnails: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "run.toml"
    config.write_text('batch-size = 5\nlayers = ["conv1", "fc"]\nout = "from-config"\n')

    def chosen(*arguments: str | Path) -> tuple[Any, ...]:
        document = dry_run(*arguments, thumbnails)
        return document["batch_size"], document["out"], [layer["address"] for layer in document["layers"]]

    assert chosen("-l", "avgpool") == (4, "features", ["avgpool"])
    assert chosen("--config", config) == (5, "from-config", ["conv1", "fc"])
    monkeypatch.setenv("HOOKX_BATCH_SIZE", "6")
    monkeypatch.setenv("HOOKX_LAYERS", "bn1,relu")
    assert chosen("--config", config) == (6, "from-config", ["bn1", "relu"])
    assert chosen("--config", config, "-b", "7", "-l", "fc", "-o", "o") == (7, "o", ["fc"])


def test_a_configuration_holds_a_whole_run_in_the_types_of_toml(thumbnails: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(
        f'images = ["{thumbnails}"]\nmodel = "resnet18"\nweights = "none"\nlayers = "conv1"\nresize = 32\ncrop = 32\n'
        "mean = [0.1, 0.2, 0.3]\nstrict = true\njson = true\ndry-run = true\n"
    )
    document = json.loads(in_this_process("extract", "--config", config).stdout)
    assert document["images"] == 24 and document["preprocessing"]["mean"] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('modle = "resnet18"', "there is no option 'modle'; closest: model"),
        ("batch_size = 3", "there is no option 'batch_size'; closest: batch-size"),
        ('config = "other.toml"', "there is no option 'config'"),
        ("model = ", "cannot read the configuration"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_an_error_of_usage(tmp_path: Path, text: str, said: str) -> None:
    config = tmp_path / "run.toml"
    config.write_text(text + "\n")
    error = error_of(in_this_process("extract", "--config", config))
    assert isinstance(error, UsageError) and error.exit_code == 2
    assert str(config) in str(error) and said in str(error)


# --- lists ---------------------------------------------------------------------------------------------------------


def test_list_layers_in_a_pipe_is_a_plain_line_a_layer_in_the_order_of_execution() -> None:
    process = hookx_process("list-layers", "resnet18")
    lines = [line.split() for line in process.stdout.splitlines()]
    assert_plain(process.stdout)
    assert process.returncode == 0 and process.stderr == ""
    assert lines[1] == ["conv1", "Conv2d", "N,64,112,112", "9,408", "1"]
    assert ["layer1.0.relu", "ReLU", "N,64,56,56", "0", "2"] in lines
    order = [line[0] for line in lines]
    assert order.index("layer2.0.conv2") < order.index("layer2.0.downsample") < order.index("fc")


def test_list_layers_as_json_is_one_document_with_a_null_for_the_batch() -> None:
    layers = json.loads(in_this_process("list-layers", "resnet18", "--json").stdout)
    by_path = {layer["path"]: layer for layer in layers}
    assert len(by_path) == len(layers) == 68
    assert by_path["layer1.0.relu"]["calls"] == 2
    assert by_path["conv1"]["outputs"][0]["shape"] == [None, 64, 112, 112]
    assert by_path["conv1"]["parameters"] == 9408


def test_list_models_takes_a_glob_and_prints_a_name_a_line() -> None:
    names = [line.split()[0] for line in in_this_process("list-models", "resnet1*").stdout.splitlines()]
    assert names == ["resnet101", "resnet152", "resnet18"]
    assert set(names) < set(json.loads(in_this_process("list-models", "--json", "resnet*").stdout))
    error = error_of(in_this_process("list-models", "resnt18"))
    assert "no model matches 'resnt18'; closest: resnet18" in str(error)


# --- errors --------------------------------------------------------------------------------------------------------


def test_a_misspelt_layer_is_one_error_with_the_closest_names_and_the_next_step(
    thumbnails: Path, tmp_path: Path
) -> None:
    process = hookx_process("extract", *SMALL, "-l", "layer1.1.con1", "-o", tmp_path / "o", thumbnails)
    assert (process.returncode, process.stdout) == (1, "")
    assert re.fullmatch(
        r"error: no layer matches 'layer1\.1\.con1' in resnet18; closest: layer1\.1\.conv1, layer1\..*\n"
        r"  list them all: hookx list-layers resnet18\n",
        process.stderr,
    )
    assert list(tmp_path.iterdir()) == []


def test_weights_that_cannot_be_downloaded_are_an_error_that_names_the_ways_out(
    thumbnails: Path, tmp_path: Path
) -> None:
    nowhere = "http://127.0.0.1:9"  # A proxy that refuses at once, whether or not this machine has a network.
    command = ["extract", "-m", "resnet18", "-l", "fc", "-o", str(tmp_path / "o"), str(thumbnails)]
    process = hookx_process(
        *command,
        env={**os.environ, "TORCH_HOME": str(tmp_path / "cache"), "https_proxy": nowhere, "HTTPS_PROXY": nowhere},
    )
    assert (process.returncode, process.stdout) == (1, "")
    assert re.search(
        r"^error: weights for resnet18 \(IMAGENET1K_V1\) are not in the cache and could not be downloaded: .+\n"
        r"  use a file: --weights resnet18.safetensors    or random weights: --weights none\n",
        process.stderr,
        re.MULTILINE,
    )
    assert "Traceback" not in process.stderr and not (tmp_path / "o").exists()


def test_a_module_that_is_never_called_is_an_error_that_says_why(photos: Path, tmp_path: Path) -> None:
    layer = "encoder.layers.encoder_layer_0.self_attention.out_proj"
    error = error_of(
        in_this_process("extract", "-m", "vit_b_16", "-w", "none", "-l", layer, "-o", tmp_path / "o", photos)
    )
    assert isinstance(error, LayerError)
    assert str(error) == (
        f"'{layer}' is never called in a forward pass\n"
        "  (nn.MultiheadAttention uses its weights directly); the enclosing module can be captured"
    )


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (["-m", "resnet81"], ModelError, "no model is called 'resnet81'; closest: resnet18"),
        (["-w", "IMAGENET1K_V9"], ModelError, "resnet18 has no weights 'IMAGENET1K_V9'; it has: IMAGENET1K_V1"),
        (["-d", "cuda:99"], UsageError, "invalid --device 'cuda:99': this machine has cpu"),
        (
            ["--mean", "0.5;0.5;0.5"],
            UsageError,
            "invalid --mean '0.5;0.5;0.5': give a number for each channel, as in 0.485,0.456,0.406",
        ),
        (
            ["--max-shard-size", "12 apples"],
            UsageError,
            "invalid --max-shard-size '12 apples': write it as in 512MiB, 2GB or 4096",
        ),
        (["-l", "conv1@mean"], LayerError, "for this shape: @mean23 if the channels are dimension 1"),
    ],
)
def test_a_wrong_value_is_named_with_what_would_be_right(
    thumbnails: Path, tmp_path: Path, arguments: list[str], error: type[HookxError], said: str
) -> None:
    found = error_of(in_this_process("extract", *SMALL, "-l", "fc", "-o", tmp_path / "o", *arguments, thumbnails))
    assert isinstance(found, error) and said in str(found)
    assert list(tmp_path.iterdir()) == []


def test_without_a_model_or_images_the_error_of_usage_says_what_to_add() -> None:
    process = hookx_process("extract", "images")
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith("error: no model is named\n  as in --model resnet18")
    assert "no images are named" in str(error_of(in_this_process("extract", "--model", "resnet18")))


def test_a_name_cannot_act_on_the_terminal_that_shows_it() -> None:
    process = hookx_process("extract", "-m", "resnet18", "--config", "\x1b[31mred.toml")
    assert process.returncode == 2
    assert "\x1b" not in process.stderr and r"\x1b[31mred.toml" in process.stderr


# What is printed is handed over in pieces or, if it is short, at the very end; this variable hides the difference.
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.mark.parametrize("arguments", [["list-layers", "vit_b_16"], ["list-models", "resnet18"], ["--version"], ["-h"]])
def test_a_reader_that_closes_the_pipe_early_gets_no_traceback(arguments: list[str]) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    process = subprocess.run(
        [*HOOKX, *arguments], stdout=write_end, stderr=subprocess.PIPE, text=True, env=BUFFERED, timeout=100
    )
    os.close(write_end)
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_an_answer_that_does_not_fit_on_the_disk_is_an_error() -> None:
    with open("/dev/full", "wb") as full:
        process = subprocess.run(
            [*HOOKX, "--version"], stdout=full, stderr=subprocess.PIPE, text=True, env=BUFFERED, timeout=100
        )
    assert process.returncode == 1
    assert process.stderr == "error: cannot write to standard output: No space left on device\n"


def test_no_stream_that_is_closed_or_full_keeps_a_run_from_being_stored(
    uninterrupted: Uninterrupted, tmp_path: Path
) -> None:
    for number, (streams, expected) in enumerate(
        {"2>/dev/full": 0, "<&- >&- 2>&-": 0, "2>&- | true; exit ${PIPESTATUS[0]}": 0, ">/dev/full 2>&-": 1}.items()
    ):
        out = tmp_path / str(number)
        command = shlex.join([*COLD_HOOKX, *uninterrupted.command(out)])
        ended = subprocess.run(["bash", "-c", f"{command} {streams}"], capture_output=True, text=True, timeout=100)
        assert (ended.returncode, ended.stderr) == (expected, ""), streams
        assert files_of(out) == uninterrupted.files, streams


def test_a_list_on_a_standard_input_that_is_closed_is_an_error() -> None:
    command = shlex.join([*COLD_HOOKX, "extract", *SMALL, *LAYERS, "-"])
    ended = subprocess.run(["bash", "-c", f"{command} <&-"], capture_output=True, text=True, timeout=100)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: cannot read the list: standard input is closed\n")


def test_names_that_an_encoding_lacks_are_escaped() -> None:
    code = "import sys; from hookx.cli.streams import keep_streams; keep_streams(); print('é'); sys.stdout.flush()"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=100)
    assert (ended.stdout, ended.stderr) == ("\\xe9\n", "")


# --- what the system refuses ---------------------------------------------------------------------------------------


def test_a_system_that_has_no_file_locks_is_named_when_hookx_is_imported() -> None:
    code = "import sys; sys.modules['fcntl'] = None; sys.path_importer_cache.clear(); import hookx"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert ended.stderr.splitlines()[-1].startswith("ImportError: hookx needs Linux")


def test_a_working_directory_that_is_gone_is_an_error(tmp_path: Path) -> None:
    command = shlex.join([*COLD_HOOKX, "list-layers", "resnet18"])
    ended = subprocess.run(
        ["bash", "-c", f"mkdir gone && cd gone && rmdir ../gone && {command}"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.returncode == 1 and ended.stderr.startswith("error: the working directory is gone")


@pytest.mark.parametrize(
    ("limit", "value", "advice"), [(resource.RLIMIT_NOFILE, 16, "ulimit -n"), (resource.RLIMIT_AS, 2**29, "memory")]
)
def test_what_the_system_refuses_is_an_error_with_advice(
    limit: int, value: int, advice: str, uninterrupted: Uninterrupted, tmp_path: Path
) -> None:
    ended = subprocess.run(
        [*COLD_HOOKX, *uninterrupted.command(tmp_path / "out"), "--retry-for", "0.2", "-j", "4"],
        capture_output=True,
        text=True,
        timeout=100,
        preexec_fn=lambda: resource.setrlimit(limit, (value, value)),
    )
    assert ended.returncode == 1, ended.stderr
    assert "error: " in ended.stderr and advice in ended.stderr and "Traceback" not in ended.stderr


# --- on a terminal -------------------------------------------------------------------------------------------------


class Terminal:
    """A pseudo-terminal 100 columns wide, and what was written to it."""

    def __init__(self) -> None:
        self._master, self.slave = pty.openpty()
        termios.tcsetwinsize(self.slave, (40, 100))
        self._written = bytearray()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        try:
            while piece := os.read(self._master, 4096):
                self._written += piece
        except OSError:  # Linux says so when the last writer has closed the other end.
            pass

    def close(self) -> str:
        os.close(self.slave)
        self._reader.join()
        os.close(self._master)
        return self._written.decode()


def test_a_terminal_shows_a_bar_on_stderr_and_a_table_on_stdout(thumbnails: Path, tmp_path: Path) -> None:
    stdout, stderr = Terminal(), Terminal()
    done = subprocess.run(
        [*HOOKX, "extract", *SMALL, *LAYERS, "-o", tmp_path / "o", thumbnails],
        stdout=stdout.slave,
        stderr=stderr.slave,
        env={**os.environ, "TERM": "xterm", "NO_COLOR": "1"},
        timeout=100,
    )
    table, talk = stdout.close(), stderr.close()
    assert done.returncode == 0, talk
    assert not re.search(r"\x1b\[[0-9;]*3\dm", table)  # NO_COLOR: bold, but no colours
    table = re.sub(r"\x1b\[[0-9;]*m", "", table)
    assert re.search(r"layer +shape +type +size", table) and "─" in table
    assert "24/24" not in table
    assert re.search(r"100%\|█+\| 24/24", talk)
    assert "layer1" not in talk


# --- signals -------------------------------------------------------------------------------------------------------

# One image a shard, so that there are many moments between and within shards; and each of them takes a while.
FINE_CUTS = ["--shard-images", "1", "--batch-size", "1", "--resize", "160", "--crop", "160"]


@dataclass(frozen=True)
class Uninterrupted:
    """The files of a run that nothing interrupted, and the command that makes them in another directory."""

    files: dict[str, bytes]
    command: Callable[[Path], list[str]]


@pytest.fixture(scope="module")
def uninterrupted(thumbnails: Path, tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    out = tmp_path_factory.mktemp("uninterrupted") / "features"

    def command(out: Path) -> list[str]:
        return ["extract", *SMALL, *LAYERS, *FINE_CUTS, "--out", str(out), str(thumbnails)]

    result = in_this_process(*command(out))
    assert result.exit_code == 0, result.exception
    return Uninterrupted(files_of(out), command)


def shards_in(out: Path) -> list[Path]:
    return list(out.glob("shard-*.safetensors"))


def start_and_wait_for_shards(command: list[str], out: Path, count: int) -> subprocess.Popen[str]:
    """Start a command as the leader of a new process group; return when `count` shards are there."""
    process = subprocess.Popen(
        [*COLD_HOOKX, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 100
    while len(shards_in(out)) < count:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.003)
    return process


def group_has_ended(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def test_signals_end_a_run_with_128_and_their_number_and_the_command_that_resumes_it(
    uninterrupted: Uninterrupted, tmp_path: Path
) -> None:
    out = tmp_path / "features"
    command = uninterrupted.command(out)
    for number, count in ((signal.SIGINT, 2), (signal.SIGTERM, 6), (signal.SIGHUP, 10), (signal.SIGUSR1, 14)):
        process = start_and_wait_for_shards(command, out, count)
        if number != signal.SIGTERM:
            os.killpg(process.pid, number)  # Terminals and schedulers send theirs to the decoding processes, too.
        else:
            process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 128 + number and stdout == ""
        assert stderr.splitlines()[-1] == shlex.join(["hookx", *command])
        assert "Traceback" not in stderr
        assert count <= len(shards_in(out)) < 24
        assert not list(out.glob(".*")) and not (out / "index.csv").exists()
        deadline = time.monotonic() + 20
        while not group_has_ended(process.pid):
            assert time.monotonic() < deadline, "a decoding process stayed behind"
            time.sleep(0.01)
    resume = shlex.split(stderr.splitlines()[-1])[1:]
    assert in_this_process(*resume).exit_code == 0
    assert files_of(out) == uninterrupted.files


def test_signals_that_were_ignored_at_the_start_stay_ignored(uninterrupted: Uninterrupted, tmp_path: Path) -> None:
    out = tmp_path / "features"
    command = shlex.join([*COLD_HOOKX, *uninterrupted.command(out)])
    # As nohup does, and a script for what it runs with `&`.
    with subprocess.Popen(["bash", "-c", f"trap '' HUP INT; exec {command}"], start_new_session=True) as process:
        while not shards_in(out):
            assert process.poll() is None
            time.sleep(0.01)
        for number in (signal.SIGHUP, signal.SIGINT):
            os.killpg(process.pid, number)
    assert process.returncode == 0 and files_of(out) == uninterrupted.files


@pytest.mark.parametrize("seconds_between", [0.0, 0.02])
def test_a_second_signal_leaves_no_process_and_loses_no_shard(
    seconds_between: float, uninterrupted: Uninterrupted, tmp_path: Path
) -> None:
    out = tmp_path / "features"
    process = start_and_wait_for_shards(uninterrupted.command(out), out, 3)
    process.send_signal(signal.SIGUSR1)
    time.sleep(seconds_between)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode in (138, 143, -signal.SIGTERM) and "Traceback" not in stderr, stderr
    deadline = time.monotonic() + 20
    while not group_has_ended(process.pid):
        assert time.monotonic() < deadline, "a decoding process stayed behind"
        time.sleep(0.01)
    assert in_this_process(*uninterrupted.command(out)).exit_code == 0
    assert files_of(out) == uninterrupted.files


def test_a_signal_that_is_swallowed_by_an_import_still_ends_the_command_with_130() -> None:
    code = """
import os, signal, sys

class Interrupts:
    def find_spec(self, name, *_):
        if name == "hookx.cli.reports":
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except BaseException:
                raise RuntimeError("a module is half made")

sys.meta_path.insert(0, Interrupts())
sys.argv = ["hookx", "extract", "--model", "resnet18", "images"]
from hookx.cli import main
main()
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert process.returncode == 130
    assert process.stderr.splitlines()[-1] == "hookx extract --model resnet18 images"
    assert "Traceback" not in process.stderr


def test_a_run_killed_again_and_again_ends_byte_for_byte_as_one_that_was_not(
    uninterrupted: Uninterrupted, tmp_path: Path
) -> None:
    out = tmp_path / "features"
    command = uninterrupted.command(out)
    for count, delay_seconds in ((1, 0.0), (7, 0.004), (14, 0.009)):
        with start_and_wait_for_shards(command, out, count) as process:
            time.sleep(delay_seconds)
            process.kill()
        assert process.returncode == -signal.SIGKILL
        there = files_of(out)
        assert "index.csv" not in there and count <= len(shards_in(out)) < 24
        assert all(uninterrupted.files[name] == there[name] for name in there if not name.startswith("."))
    assert in_this_process(*command).exit_code == 0
    assert files_of(out) == uninterrupted.files
