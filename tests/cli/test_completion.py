"""What a shell is told when it asks how a command line could go on."""

from __future__ import annotations

import contextlib
import csv
import os
import pty
import re
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torchvision
from typer.main import get_command

import hookx
from hookx.cli import completion
from hookx.cli.app import app
from kit import warm

LAYERS = "conv1,avgpool,layer1.0.relu,layer4@mean23"
# As the command that is installed: a shell looks for the variable that has its name.
HOOKX = "import sys; sys.argv = ['hookx']; from hookx.cli import main; main()"


@pytest.fixture(scope="module")
def home(thumbnails: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a working directory with a run in features/, and a cache that knows the layers of resnet18."""
    home = tmp_path_factory.mktemp("home")
    with contextlib.chdir(home):
        hookx.extract("resnet18", LAYERS, thumbnails, weights="none", resize=32, crop=32)
    assert bash(home, "hookx extract -m resnet18 -l av") == ["avgpool"]
    return home


def answer(home: Path, code: str = HOOKX, **variables: str) -> subprocess.CompletedProcess[str]:
    process = subprocess.run(
        [*warm.python("command"), "-c", code],
        cwd=home,
        env={**os.environ, "XDG_CACHE_HOME": str(home / "cache"), **variables},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert process.stderr == ""  # It would be written into the line that is being typed.
    return process


def bash_variables(line: str) -> dict[str, str]:
    """Cut a line as readline does: at spaces, and around what its COMP_WORDBREAKS holds, if it is in no quotes."""
    words = [
        piece
        for word in line.split(" ")
        for piece in ([word] if word[:1] in ("'", '"') else re.split(r"([:=@]+)", word))
        if piece or not word
    ]
    return {"_HOOKX_COMPLETE": "complete_bash", "COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}


def bash(home: Path, line: str) -> list[str]:
    """Return what bash would be told behind a line."""
    return answer(home, **bash_variables(line)).stdout.split()


# --- what is offered -----------------------------------------------------------------------------------------------


def test_the_names_of_models_are_those_of_torchvision_which_is_not_imported(home: Path) -> None:
    assert sorted(completion.models("")) == sorted(torchvision.models.list_models())
    assert bash(home, "hookx extract --model resnet1") == bash(home, "hookx list-layers resnet1")
    assert sorted(bash(home, "hookx extract -m resnet1")) == ["resnet101", "resnet152", "resnet18"]


@pytest.mark.parametrize(
    "line",
    [
        "hookx extract -m vit",
        "hookx extract -m resnet18 -l lay",
        "hookx extract -m resnet18 -w ",
        "hookx cat features -l ",
        "hookx cat features -i ",
    ],
)
def test_no_answer_imports_torch_twice(home: Path, line: str) -> None:
    code = HOOKX.replace("; main()", "; import atexit; atexit.register(lambda: print('torch' in sys.modules)); main()")
    *offered, has_torch = answer(home, code, **bash_variables(line)).stdout.split()
    assert offered and has_torch == "False"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("", ". conv1 bn1 relu maxpool layer1 layer1.0 layer1.1"),
        ("layer1.0.con", "layer1.0.conv1 layer1.0.conv2"),
        ("conv1,layer1.0.con", "conv1,layer1.0.conv1 conv1,layer1.0.conv2"),
        ("layer1.0.conv1,layer1.0.con", "layer1.0.conv1,layer1.0.conv2"),
        ("'layer*.0.con", "layer*.0.conv1 layer*.0.conv2"),
        ("layer*.0.con", r"layer\*.0.conv1 layer\*.0.conv2"),
        ("'**.down", "**.downsample"),
        ("type:B", "BatchNorm2d BasicBlock"),
        ("conv1,type:Conv", "Conv2d"),
        ("'type:Conv", "type:Conv2d"),
        ("nothing", ""),
        ("layer1[0].con", ""),
    ],
)
def test_the_last_selector_of_a_list_is_completed_one_name_further(home: Path, typed: str, offered: str) -> None:
    for option in ("-l ", "--layers ", "--exclude "):
        assert bash(home, f"hookx extract --model resnet18 {option}{typed}")[:8] == offered.split()
    if ":" not in typed and "'" not in typed:
        assert bash(home, f"hookx extract --model=resnet18 --layers={typed}")[:8] == offered.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("hookx cat features/ -l ", "conv1 avgpool layer1.0.relu:0 layer1.0.relu:1 layer4@mean23"),
        ("hookx cat -l av", "avgpool"),
        ("hookx cat features/ --layer layer1.0.re", "layer1.0.relu:0 layer1.0.relu:1"),
        ("hookx cat features/ --layer layer1.0.relu:", "0 1"),  # What bash replaces begins behind the colon,
        ("hookx cat features/ --layer layer4@", "@mean23"),  # but with the '@'.
        ("hookx cat features/ --layer layer4@me", "@mean23"),
        ("hookx cat features/ --layer=layer1.0.relu:", "0 1"),
        ("hookx cat features/ --layer 'layer4@me", "layer4@mean23"),
        ("hookx cat features/ --image sky/hubble-", "sky/hubble-0.png sky/hubble-1.png sky/hubble-2.png"),
        ("hookx cat features/ --json -l conv1 -i sky/hubble-1", "sky/hubble-1.png"),
        ("hookx extract -m resnet18 -w ", "default none IMAGENET1K_V1"),
        ("hookx list-layers resnet18 -w I", "IMAGENET1K_V1"),
        ("hookx list-layers resnet18 --type Conv2d,Lin", "Conv2d,Linear"),
        ("hookx list-layers resnet18 --filter avg", "avgpool"),
        ("hookx list-models googl", "googlenet"),
        ("hookx verify features --device c", "cpu cuda"),
        ("hookx extract --precision b", "bf16"),
        ("hookx extract --dtype f", "fp64 fp32 fp16"),
        ("hookx extract --exif a", "apply"),
        ("hookx extract --memory-format c", "contiguous channels_last"),
        ("hookx visualize -m vgg11 -m resnet18 -l av", "avgpool"),
        ("hookx visualize features -l conv1,av", "conv1,avgpool"),
        ("hookx visualize features --image sky/hubble-2", "sky/hubble-2.png"),
        ("hookx visualize --reduce m", "mean max"),
        ("hookx ver", "verify"),
        ("hookx extract --batch", "--batch-size"),
    ],
)
def test_what_fits_is_offered_and_nothing_else(home: Path, line: str, offered: str) -> None:
    assert bash(home, line) == offered.split()


def test_the_model_can_come_from_a_variable_or_a_configuration(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "run.toml").write_text('model = "resnet18"\n')
    assert bash(home, "hookx extract --config run.toml -l avg") == ["avgpool"]
    monkeypatch.setenv("HOOKX_MODEL", "resnet18")
    assert bash(home, "hookx extract -l avg") == ["avgpool"]


OPTIONS = {"--model", "--layers", "--exclude", "--weights", "--device", "--precision", "--dtype", "--layer", "--image"}


@pytest.mark.parametrize("command", list(get_command(app).commands))  # type: ignore[attr-defined]
def test_every_command_completes_the_options_that_are_named_alike(home: Path, command: str) -> None:
    parameters: list[Any] = get_command(app).commands[command].params  # type: ignore[attr-defined]
    names = {name for parameter in parameters for name in parameter.opts}
    for option in sorted(OPTIONS & names - ({"--weights"} if command == "verify" else set())):  # There it is a file.
        model = "" if option == "--model" or "--model" not in names else "--model resnet18 "
        assert bash(home, f"hookx {command} {model}{option} "), option


def test_names_with_spaces_reach_the_command_line_as_one_word(tmp_path: Path) -> None:
    index(tmp_path / "features", ["two words (1).jpg", "two\nlines.jpg"])
    assert answer(tmp_path, **bash_variables("hookx cat -i two")).stdout == "two\\ words\\ \\(1\\).jpg\n"
    assert answer(tmp_path, **bash_variables("hookx cat -i 'two")).stdout == "two words (1).jpg\n"


def index(run: Path, keys: list[str]) -> None:
    run.mkdir()
    with open(run / "index.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("key", "shard", "row"), *((key, "s", 0) for key in keys)])


def test_of_very_many_images_the_first_and_the_last_are_offered(tmp_path: Path) -> None:
    keys = [f"a/{number:05}.jpg" for number in range(5000)] + ["zebra.jpg"]
    index(tmp_path / "features", keys)
    offered = list(completion.keys(tmp_path / "features", ""))
    assert len(offered) == 1001 and offered == [*keys[:1000], "zebra.jpg"]
    offered = list(completion.keys(tmp_path / "features", "a/"))
    assert offered == [*keys[:1000], keys[4999]]  # So what bash adds, which is what all have in common, is right.


# --- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "hookx extract -l ",
        "hookx extract -m resnt18 -l ",
        "hookx extract -m nowhere.pt -l ",
        "hookx extract -m hf:nobody/nothing -l ",
        "hookx extract -m raft_small -l ",
        "hookx extract -m resnet18 -l layer*[.",
        "hookx extract --config nowhere.toml -l ",
        "hookx cat nowhere -l ",
        "hookx cat nowhere -i ",
        "hookx cat damaged -l ",
        "hookx cat damaged -i ",
    ],
)
def test_where_nothing_can_be_known_nothing_is_said(home: Path, line: str) -> None:
    (home / "damaged").mkdir(exist_ok=True)
    (home / "damaged" / "plan.json").write_text("{")
    (home / "damaged" / "index.csv").write_bytes(b"")
    assert bash(home, line) == []


def test_completing_runs_no_code_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "trap.py").write_text("open('sprung', 'w')\n")
    for model in ("python:trap:factory", "trap.py:factory", "'python:trap:factory"):
        assert bash(tmp_path, f"hookx extract -m {model} -l ") == []
    assert not (tmp_path / "sprung").exists()


def test_a_cache_that_is_damaged_or_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert "MaxPool2d" in completion.classes("alexnet", "Max")
    [remembered] = (tmp_path / "cache").rglob("alexnet.json")
    remembered.write_text("{")
    assert "MaxPool2d" in completion.classes("alexnet", "Max")
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").touch()
    assert "MaxPool2d" in completion.classes("alexnet", "Max")


def test_asking_for_the_version_in_the_line_does_not_answer_with_it(home: Path) -> None:
    assert "cat" in bash(home, "hookx --version ") and "0.1.0" not in bash(home, "hookx --version ")


# --- shells --------------------------------------------------------------------------------------------------------


def test_zsh_and_fish_are_answered_in_their_own_ways(home: Path) -> None:
    line = "hookx cat features -l layer1.0.relu:"
    zsh = answer(home, _HOOKX_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS=line)
    assert zsh.stdout == '_arguments \'*: :(("layer1.0.relu\\\\:0"\n"layer1.0.relu\\\\:1"))\'\n'
    fish = {"_HOOKX_COMPLETE": "complete_fish", "_TYPER_COMPLETE_ARGS": line}
    assert answer(home, **fish, _TYPER_COMPLETE_FISH_ACTION="get-args").stdout.split() == [
        "layer1.0.relu:0",
        "layer1.0.relu:1",
    ]
    assert answer(home, **fish, _TYPER_COMPLETE_FISH_ACTION="is-args").returncode == 0
    fish["_TYPER_COMPLETE_ARGS"] = "hookx extract "
    assert answer(home, **fish, _TYPER_COMPLETE_FISH_ACTION="is-args").returncode == 1  # It offers files, then.


class Bash:
    """An interactive bash at a terminal, in which the completion of hookx is set up."""

    def __init__(self, home: Path) -> None:
        self._process, self._terminal = pty.fork()
        if self._process == 0:
            os.chdir(home)
            os.environ |= {
                "PATH": warm.path("command"),
                "XDG_CACHE_HOME": f"{home}/cache",
                "TERM": "dumb",
                "PS1": "",
            }
            os.execlp("bash", "bash", "--norc", "--noprofile", "-i")
        self._send("bind 'set enable-bracketed-paste off'; PS1=; eval \"$(_HOOKX_COMPLETE=source_bash hookx)\"\n")
        self.line_after("")

    def line_after(self, keys: str) -> str:
        """Type keys, and return the arguments that the line then has."""
        self._send(keys + "\x01printf 'ar%s' 'gs:'; printf '[%s]' \x05; echo ' end'\n")
        return self._read_until(" end\r\n").rpartition("args:")[2].removesuffix(" end\r\n")

    def _send(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def _read_until(self, end: str) -> str:
        text, deadline = "", time.monotonic() + 60
        while not text.endswith(end):
            assert time.monotonic() < deadline, text
            if select.select([self._terminal], [], [], 1)[0]:
                text += os.read(self._terminal, 4096).decode()
        return text

    def close(self) -> None:
        os.close(self._terminal)
        os.waitpid(self._process, 0)


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
def test_in_a_real_bash_the_tabulator_key_completes(home: Path) -> None:
    bash = Bash(home)
    try:
        for typed, completed in {
            "hookx extract -m goog\t": "[hookx][extract][-m][googlenet]",
            "hookx extract -m resnet18 -l avg\t": "[hookx][extract][-m][resnet18][-l][avgpool]",
            "hookx extract -m resnet18 -l conv1,max\t": "[hookx][extract][-m][resnet18][-l][conv1,maxpool]",
            "hookx extract -m resnet18 --layers=avg\t": "[hookx][extract][-m][resnet18][--layers=avgpool]",
            "hookx extract -m resnet18 -l layer*.0.down\t": "[hookx][extract][-m][resnet18][-l][layer*.0.downsample]",
            "hookx extract -m resnet18 -l type:Lin\t": "[hookx][extract][-m][resnet18][-l][type:Linear]",
            "hookx cat -l layer1.0.re\t1": "[hookx][cat][-l][layer1.0.relu:1]",
            "hookx cat -l layer4@\t": "[hookx][cat][-l][layer4@mean23]",
            "hookx cat -l 'layer4@\t": "[hookx][cat][-l][layer4@mean23]",
            "hookx cat feat\t -i sky/hub\t2\t": "[hookx][cat][features/][-i][sky/hubble-2.png]",
        }.items():
            assert bash.line_after(typed) == completed
    finally:
        bash.close()
