"""An option is written once, and means the same on the command line, in a variable, in a file and in Python."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from torchvision.transforms import InterpolationMode
from typer.main import get_command
from typer.testing import CliRunner

import hookx
from hookx import options as written
from hookx.capture.arithmetic import PRECISIONS
from hookx.capture.runner import MEMORY_FORMATS
from hookx.check.recompute import recompute
from hookx.cli.app import COMMANDS, app
from hookx.cli.options import Command, key_of, variable_of
from hookx.errors import HookxError, UsageError
from hookx.models import ModelOptions
from hookx.options import CallOptions, ExtractOptions
from hookx.options.option import Option, Options, options_of
from hookx.pictures.contents import REDUCTIONS
from hookx.pictures.places import LAYOUTS
from hookx.plan import DTYPES
from hookx.run.prepare import prepare

SOURCE = Path(hookx.__file__).parents[1]
NEEDED: dict[str, Any] = {"model": "resnet18", "layers": "conv1", "images": "images"}


def said(*arguments: str, variables: dict[str, str] | None = None) -> ExtractOptions:
    """Return what a command with the options of `hookx extract` is told by a command line and an environment."""
    told: list[ExtractOptions] = []

    def extract(options: ExtractOptions, call: CallOptions) -> None:
        told.append(options)

    extract.__annotations__ = {"options": ExtractOptions, "call": CallOptions}
    alone = typer.Typer(rich_markup_mode=None)
    Command("extract", extract, ()).add_to(alone)
    result = CliRunner().invoke(alone, list(arguments), env=variables)
    if isinstance(result.exception, HookxError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return told[0]


def through_a_flag(option: Option, text: str, _folder: Path) -> ExtractOptions:
    flag = [f"{option.flag}={text}"] if bool not in option.types else [option.flag] * (text == "true")
    required = ["--model", "m"] if option.name != "model" else []
    return said(*required, *flag, "images")


def through_a_variable(option: Option, text: str, _folder: Path) -> ExtractOptions:
    return said("images", variables={"HOOKX_MODEL": "m", variable_of(option): text})


def through_a_file(option: Option, text: str, folder: Path) -> ExtractOptions:
    """Write a number as a number, and everything else as a text."""
    is_literal = text == "true" or (re.fullmatch(r"-?[\d.]+", text) and not option.is_repeated)
    value = text if is_literal else f'"{text}"'
    model = 'model = "m"\n' if option.name != "model" else ""
    (folder / "run.toml").write_text(f"{model}{key_of(option)} = {value}\n")
    return said("--config", str(folder / "run.toml"), "images")


WAYS = [through_a_flag, through_a_variable, through_a_file]
VALUES: dict[str, tuple[str, Any]] = {  # an option of extract -> a text, and the value that it means
    "model": ("resnet18", "resnet18"),
    "layers": ("conv1,fc", ["conv1,fc"]),
    "weights": ("none", "none"),
    "exclude": ("fc", ["fc"]),
    "out": ("elsewhere", "elsewhere"),
    "scratch": ("/fast", "/fast"),
    "dtype": ("fp64", "fp64"),
    "max_shard_size": ("2MiB", 2 * 2**20),
    "shard_images": ("7", 7),
    "batch_size": ("3", 3),
    "workers": ("0", 0),
    "self_check": ("off", "off"),
    "memory_format": ("channels_last", "channels_last"),
    "shard": ("3/16", "3/16"),
    "devices": ("cpu*2", "cpu*2"),
    "same_hardware": ("true", True),
    "launcher": ("ray", "ray"),
    "tasks": ("64", 64),
    "at_once": ("16", 16),
    "sbatch": ("--gpus=1 -p a100", "--gpus=1 -p a100"),
    "ray_address": ("auto", "auto"),
    "gpus_per_worker": ("0.5", 0.5),
    "root": ("photos", "photos"),
    "path_column": ("file", "file"),
    "key_column": ("id", "id"),
    "columns": ("label,split", ("label", "split")),
    "label": ("parent", "parent"),
    "reuse": ("old", ("old",)),
    "append": ("true", True),
    "limit": ("100", 100),
    "sample": ("50", 50),
    "strict": ("true", True),
    "decode_timeout": ("1.5", 1.5),
    "retry_for": ("2.5", 2.5),
    "on_io_error": ("fail", "fail"),
    "retry_failures": ("true", True),
    "device": ("cuda:1", "cuda:1"),
    "precision": ("bf16", "bf16"),
    "resize": ("64", 64),
    "crop": ("32", 32),
    "mean": ("0.1,0.2,0.3", (0.1, 0.2, 0.3)),
    "std": ("1,2,3", (1.0, 2.0, 3.0)),
    "interpolation": ("lanczos", "lanczos"),
    "size": ("256x128", (256, 128)),
    "resize_positions": ("true", True),
    "fit": ("squash", "squash"),
    "grey_range": ("0,4095", "0,4095"),
    "exif": ("apply", "apply"),
    "decode": ("fast", "fast"),
    "seed": ("5", 5),
    "weights_key": ("model_ema", "model_ema"),
    "allow_missing": ("fc.*", ("fc.*",)),
    "ignore_unexpected": ("neck.*", ("neck.*",)),
    "trust_checkpoint": ("true", True),
    "model_args": ("width=2", {"width": "2"}),
    "transform": ("python:a.b:c", "python:a.b:c"),
    "loader": ("scan.py:read", "scan.py:read"),
    "suffix": (".dcm,.npy", (".dcm", ".npy")),
}


def test_every_option_of_extract_is_tried_below() -> None:
    assert {name for name, option in options_of(ExtractOptions).items() if option.flags} == set(VALUES)
    without = {name for name, option in options_of(ExtractOptions).items() if option.flags and not option.variable}
    assert without == {"trust_checkpoint"}
    assert not any(option.variable for option in options_of(CallOptions).values())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", list(VALUES))
def test_an_option_of_extract_comes_from_a_flag_a_variable_or_a_file(
    name: str, way: Callable[[Option, str, Path], ExtractOptions], tmp_path: Path
) -> None:
    text, value = VALUES[name]
    if way is through_a_variable and name == "trust_checkpoint":
        value = False
    found = getattr(way(options_of(ExtractOptions)[name], text, tmp_path), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("name", list(VALUES))
def test_python_takes_the_value_and_what_it_takes_is_taken_again(name: str) -> None:
    _, value = VALUES[name]
    made = ExtractOptions(**NEEDED | {name: value})
    assert getattr(made, name) == value
    assert ExtractOptions(**vars(made)) == made


WRONG = [
    ("shard_images", "0", "--shard-images must be at least 1, got 0"),
    ("shard_images", "70000", "--shard-images must be at most 65,536, got 70,000"),
    ("shard_images", "1.5", "--shard-images must be a whole number, got '1.5'"),
    ("batch_size", "eight", "--batch-size must be a whole number or auto, got 'eight'"),
    ("batch_size", "-3", "--batch-size must be at least 1, got -3"),
    ("self_check", "some", "--self-check must be a whole number, auto or off, got 'some'"),
    ("self_check", "0", "--self-check must be at least 1, got 0"),
    ("workers", "-1", "--workers must be at least 0, got -1"),
    ("resize", "0", "--resize must be at least 1, got 0"),
    ("decode_timeout", "-0.5", "--decode-timeout must be at least 0, got -0.5"),
    ("decode_timeout", "nan", "--decode-timeout must be at least 0, got nan"),
    ("precision", "fp8", "invalid --precision 'fp8': choose fp32, tf32, bf16, fp16"),
    ("exif", "rotate", "invalid --exif 'rotate': choose ignore, apply"),
    ("mean", "0.5;0.5", "invalid --mean '0.5;0.5': give a number for each channel, as in 0.485,0.456,0.406"),
    ("size", "12x", "invalid --size '12x': give a number of pixels, as in 518, or height x width, as in 256x128"),
    ("size", "0x64", "invalid --size '0x64': a side has 1 to 65,536 pixels"),
    ("fit", "stretch", "invalid --fit 'stretch': choose crop, squash, pad"),
    ("std", "0,1,1", "invalid --std '0,1,1': no deviation can be 0"),
    ("max_shard_size", "much", "invalid --max-shard-size 'much': write it as in 512MiB, 2GB or 4096"),
    ("model_args", "width", "invalid --model-arg 'width': write key=value, as in width=2"),
]


@pytest.mark.parametrize(("name", "text", "error"), WRONG)
def test_a_wrong_value_is_the_same_error_wherever_it_comes_from(
    name: str, text: str, error: str, tmp_path: Path
) -> None:
    option = options_of(ExtractOptions)[name]
    for way in WAYS:
        with pytest.raises(UsageError) as raised:
            way(option, text, tmp_path)
        origin = {through_a_variable: f"the variable {variable_of(option)}", through_a_file: "the configuration file"}
        hint = f"\n  it comes from {origin[way]}" if way in origin else ""
        assert str(raised.value) == error + hint and raised.value.exit_code == 2
    for call in (ExtractOptions, prepare, hookx.extract):
        with pytest.raises(UsageError) as raised:
            call(**NEEDED | {name: [text] if option.is_repeated else text})
        assert str(raised.value) == error


@pytest.mark.parametrize("command", [command for command in COMMANDS if "trust_checkpoint" in command.options])
def test_no_variable_makes_a_command_run_the_code_of_a_checkpoint(command: Command) -> None:
    parameters = get_command(app).commands[command.name].params  # type: ignore[attr-defined]
    assert [parameter.envvar for parameter in parameters if parameter.name == "trust_checkpoint"] == [None]


def test_a_switch_in_a_file_is_true_or_false(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('strict = "no"\n')
    with pytest.raises(UsageError, match="--strict must be true or false, got 'no'"):
        said("--config", str(tmp_path / "run.toml"), "images")
    with pytest.raises(UsageError, match="--strict must be true or false, got 'no'"):
        ExtractOptions(**NEEDED | {"strict": "no"})


def test_the_long_name_of_a_type_is_the_short_one() -> None:
    assert [said("-m", "m", "--dtype", long, "images").dtype for long in written.DTYPE_NAMES.values()] == list(
        written.DTYPE_NAMES
    )


def test_options_do_not_change() -> None:
    with pytest.raises(AttributeError):
        ModelOptions().seed = 1  # type: ignore[misc]


# --- vocabularies ---------------------------------------------------------------------------------------------------


def test_what_can_be_chosen_is_what_there_is() -> None:
    assert typing.get_args(written.Precision) == tuple(PRECISIONS)
    assert typing.get_args(written.MemoryFormat) == tuple(MEMORY_FORMATS)
    assert typing.get_args(written.Dtype) == tuple(written.DTYPE_NAMES)
    assert set(written.DTYPE_NAMES.values()) <= set(DTYPES)
    assert typing.get_args(written.ChannelReduction) == tuple(REDUCTIONS)
    assert typing.get_args(written.Layout) == tuple(LAYOUTS)
    assert set(typing.get_args(written.Interpolation)) == {mode.value for mode in InterpolationMode}


CLASSES = [kind for kind in vars(written).values() if inspect.isclass(kind) and issubclass(kind, Options)]


@pytest.mark.parametrize("group", CLASSES)
def test_an_option_can_be_given_its_default_and_says_what_it_is(group: type[Options]) -> None:
    for name, option in options_of(group).items():
        assert option.help and option.sentence.endswith(".") and "{" not in option.sentence, name
        if option.default is not ... and option.synopsis:
            option.read(option.default)
        if option.default_text and option.synopsis and not option.is_repeated:
            assert option.read(option.default_text) == option.read(
                option.absent if option.default is ... else option.default
            )


# --- help -----------------------------------------------------------------------------------------------------------


def help_of(command: str, columns: int = 80) -> str:
    return CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": str(columns)}).stdout


def test_the_help_of_extract_has_titled_sections_with_the_common_options_first() -> None:
    text = help_of("extract")
    sections = re.findall(r"^(\w[\w ]*):\n((?:  .*\n)+)", text, re.MULTILINE)
    flags = {title: re.findall(r"^  (?:-\w, )?--([\w-]+)", body, re.MULTILINE) for title, body in sections}
    assert list(flags) == [
        "Arguments",
        "Model",
        "Layers",
        "Output",
        "Compute",
        "Images",
        "Many workers",
        "Preprocessing",
        "Your own models and checkpoints",
        "Options",
    ]
    assert [flags[title][0] for title in ("Model", "Layers", "Output", "Compute")] == [
        "model",
        "layers",
        "out",
        "batch-size",
    ]
    assert sum(map(len, flags.values())) == len(VALUES) + len(options_of(CallOptions)) + 1  # --help
    assert "fp64" in " ".join(text.split())


@pytest.mark.parametrize("command", [command.name for command in COMMANDS])
def test_help_is_plain_and_fits_into_80_columns(command: str) -> None:
    above, _, _ = help_of(command).partition("Examples:")
    assert above.isascii() and max(map(len, above.splitlines())) <= 80
    assert not re.search(r"<\w|list\[", above)


def test_every_flag_is_written_in_the_options_alone() -> None:
    for command in COMMANDS:
        flags = {flag for option in command.options.values() for flag in option.flags}
        parameters = get_command(app).commands[command.name].params  # type: ignore[attr-defined]
        assert {flag for parameter in parameters for flag in parameter.opts if flag[0] == "-"} == flags


# --- Python ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [hookx.extract, hookx.visualize, hookx.visualize_run, hookx.recompute, prepare])
def test_help_in_python_names_every_option_and_what_it_does(function: Any) -> None:
    signature = inspect.signature(function)
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    for name in signature.parameters:
        assert re.search(rf"^        {name}: \S", function.__doc__, re.MULTILINE), name


def test_the_signature_of_extract_begins_with_what_is_given_by_position() -> None:
    parameters = inspect.signature(hookx.extract).parameters
    assert list(parameters)[:4] == ["model", "layers", "images", "weights"]
    assert parameters["shard_images"].default == 4096 and parameters["model"].default is inspect.Parameter.empty
    assert set(parameters) == set(options_of(ExtractOptions))


RIGHT = """
import hookx
from pathlib import Path
hookx.extract("resnet18", "conv1", "images")
hookx.extract(
    model="resnet18", layers=["conv1"], images=[Path("images")], out=Path("o"), weights="none", exclude="fc", seed=1,
    weights_key="k", allow_missing=["fc.*"], trust_checkpoint=True, model_args={"a": "b"}, transform="python:a:b",
    batch_size=4, device="cpu", workers=2, decode_timeout=1, precision="bf16", memory_format="auto", dtype="fp64",
    decode="fast", resize=8, crop=8, mean=[0.1, 0.2, 0.3], std="1,1,1", interpolation="bicubic", exif="apply",
    max_shard_size=2**20, shard_images=5, strict=True, progress=print,
)
hookx.visualize(["resnet18", "vgg11"], ["conv1", "features.0"], "cat.jpg", reduce="norm", top=3, decode="fast")
hookx.visualize_run("features", ["cat.jpg"], "conv1", images="images", layout="nchw")
hookx.recompute("features", 3, "images", model="resnet18", allow_missing=("fc",), device="cuda", seed=1)
"""
FIRST = 'hookx.extract("resnet18", "conv1", "images"'
WRONG_CALLS = {
    f"{FIRST}, batchsize=4)": 'Unexpected keyword argument "batchsize" for "extract"',
    f'{FIRST}, seed="x")': 'Argument "seed" to "extract" has incompatible type "str"; expected "int"',
    f'{FIRST}, exif="turn")': 'Argument "exif" to "extract" has incompatible type',
    'hookx.extract("resnet18", "conv1")': 'Missing positional argument "images" in call to "extract"',
    'hookx.visualize("vgg11", "", "x", decode="nvjpeg")': 'Argument "decode" to "visualize" has incompatible type',
    'hookx.visualize_run("features", attention=True)': 'Unexpected keyword argument "attention" for "visualize_run"',
    'hookx.recompute("features", "3", "images")': 'Argument 2 to "recompute" has incompatible type "str"',
}


def test_a_type_checker_takes_what_is_right_and_refuses_what_is_wrong(tmp_path: Path) -> None:
    wrong = RIGHT.splitlines() + list(WRONG_CALLS)
    (tmp_path / "calls.py").write_text("\n".join(wrong) + "\n")
    # Only what the signatures are made of is read; all of torch would take a minute.
    (tmp_path / "mypy.ini").write_text(
        f"[mypy]\nstrict = true\nmypy_path = {SOURCE}\ncache_dir = {tmp_path}/cache\nfollow_imports = skip\n"
        "[mypy-hookx,hookx.errors,hookx.options.*,hookx.launch.extract,hookx.pictures.models,hookx.pictures.runs,hookx.check.recompute]\n"
        "follow_imports = silent\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "calls.py"]
    checked = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    errors = [line for line in checked.stdout.splitlines() if ": error: " in line]
    assert len(errors) == len(WRONG_CALLS), checked.stdout
    for number, (error, said) in enumerate(zip(errors, WRONG_CALLS.values(), strict=True), len(RIGHT.splitlines()) + 1):
        assert error.startswith(f"calls.py:{number}: ") and said in error, error


def test_recompute_still_takes_its_model_options_as_one_value_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(DeprecationWarning, match=r"recompute\(options=...\) is deprecated"), pytest.raises(HookxError):
        recompute(tmp_path, 1, "images", options=ModelOptions())


def test_visualize_decodes_as_it_is_told(photos: Path, tmp_path: Path) -> None:
    jpeg, small = str(photos / "animals" / "chelsea.jpg"), ["--resize", "32", "--crop", "32", "--weights", "none"]
    drawn = set()
    for way in ("exact", "fast"):
        command = ["visualize", "-m", "resnet18", "-l", "conv1", *small, "--decode", way, "-o", str(tmp_path), jpeg]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.exception
        drawn.add((tmp_path / "conv1.png").read_bytes())
    assert len(drawn) == 2
    error = CliRunner().invoke(app, ["visualize", "--decode", "nvjpeg", jpeg]).exception
    assert isinstance(error, UsageError) and str(error) == "invalid --decode 'nvjpeg': choose exact, fast"
