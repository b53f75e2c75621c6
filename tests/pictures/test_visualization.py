"""From images, or from a run, to pictures in a directory: the same activations, whichever way they come."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner, Result

import hookx
from hookx.cli.app import app
from hookx.errors import HookxError, ImageError, LayerError, NotStoredError, StoreError, UsageError
from hookx.launch.extract import extract
from hookx.options import LookOptions
from hookx.pictures.attention import Attention
from hookx.pictures.contents import Look, ShownImage, ShownLayer, choose, show_activation, show_attention
from hookx.pictures.gallery import draw, name_file, name_image_folders
from hookx.pictures.models import pair, visualize
from hookx.pictures.places import LAYOUTS, Reading, TokenGrid
from hookx.pictures.runs import visualize_run
from kit import warm

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {"weights": "none", "resize": 32, "crop": 32}
OPTIONS = ["-w", "none", "--resize", "32", "--crop", "32"]

# Custom models, as small as possible: one with maps, and one with tokens after a class token.
OWN_MODELS = """
import torch
from torch import nn

def net():
    relu = nn.ReLU(inplace=True)
    maps = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), relu, nn.Conv2d(6, 4, 1), relu)
    return nn.Sequential(maps, nn.Flatten(), nn.Linear(1024, 20))

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.cut = nn.Conv2d(3, 8, 8, stride=8)
        self.start = nn.Parameter(torch.zeros(1, 1, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x):
        tokens = torch.cat([self.start.expand(len(x), -1, -1), self.cut(x).flatten(2).transpose(1, 2)], 1)
        return self.block(tokens)[:, 0]

def tokens():
    return Tokens()
"""


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the default --out, maps/, from meaning a directory of whoever runs the tests; there are models in it."""
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN_MODELS)


@pytest.fixture
def picture(thumbnails: Path) -> Path:
    return thumbnails / "animals" / "chelsea-0.png"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["visualize", *map(str, arguments)])


def files_in(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def caption_of(file: Path) -> str:
    with Image.open(file) as image:
        return str(image.info["Description"])


def nchw(values: Tensor) -> ShownLayer:
    return show_activation("layer", values, Reading(LAYOUTS["nchw"]))


def maps_in(shown: ShownLayer) -> Any:
    assert shown.content.are_maps
    return shown.content.values


# --- which channels ------------------------------------------------------------------------------------------------


def test_the_strongest_channels_come_first_and_what_is_not_finite_has_no_strength() -> None:
    values = torch.zeros(5, 2, 2)
    values[0], values[1, 0, 0], values[2], values[3] = 1, -9, 3, torch.tensor(float("inf"))
    maps, sentence = choose(nchw(values), Look(LookOptions(top=4)))
    assert maps.numbers == (1, 2, 0, 3) and sentence == "the 4 strongest of 5 channels of 2 × 2"
    of_some, sentence = choose(nchw(values), Look(LookOptions(channels="0,2-3", top=2)))
    assert of_some.numbers == (2, 0) and sentence == "the 2 strongest of 3 of 5 channels of 2 × 2: 0, 2, 3"
    assert choose(nchw(values), Look(LookOptions(top=99)))[0].numbers == (1, 2, 0, 3, 4)


def test_channels_keep_their_numbers_and_the_order_in_which_they_are_asked_for() -> None:
    values = torch.arange(10.0).reshape(10, 1, 1).expand(10, 2, 2)
    maps, sentence = choose(nchw(values), Look(LookOptions(channels="7,1-3")))
    assert maps.are_maps and maps.numbers == (7, 1, 2, 3) and maps.values[:, 0, 0].tolist() == [7, 1, 2, 3]
    assert sentence == "4 of 10 channels of 2 × 2: 7, 1-3"
    with pytest.raises(UsageError, match=r"--channels 10: layer has 10 channels \(0-9\)"):
        choose(nchw(values), Look(LookOptions(channels="10")))


@pytest.mark.parametrize(
    ("reduce", "expected"),
    [
        ("mean", lambda values: values.mean(0)),
        ("max", lambda values: values.amax(0)),
        ("norm", lambda values: torch.linalg.vector_norm(values, dim=0)),
    ],
)
def test_a_reduction_is_what_torch_computes_over_the_channels(reduce: Any, expected: Any) -> None:
    values = torch.randn(6, 4, 4, generator=torch.Generator().manual_seed(0))
    maps, sentence = choose(nchw(values), Look(LookOptions(reduce=reduce)))
    assert maps.are_maps and np.allclose(maps.values, expected(values)[None].numpy())
    assert sentence == f"{reduce} of 6 channels of 4 × 4"


def test_more_than_a_picture_shows_is_an_error_that_says_how_to_choose() -> None:
    with pytest.raises(HookxError, match=r"layer has 5,000 channels; a picture shows at most 4,096\n.*--top 256"):
        choose(nchw(torch.zeros(5000, 2, 2)), Look(LookOptions()))
    assert choose(nchw(torch.zeros(5000, 2, 2)), Look(LookOptions(top=3)))[0].numbers == (0, 1, 2)


@pytest.mark.parametrize(
    ("look", "said"),
    [
        ({"channels": "3-1"}, "invalid --channels '3-1': expected numbers and ranges"),
        ({"channels": "a"}, "invalid --channels 'a': expected numbers and ranges"),
        ({"top": 0}, "--top must be at least 1, got 0"),
        ({"reduce": "median"}, "invalid --reduce 'median'"),
        ({"layout": "hwc"}, "invalid --layout 'hwc'"),
        ({"colormap": "viridus"}, "invalid --colormap 'viridus'; closest: viridis"),
    ],
)
def test_a_look_that_cannot_be_meant_is_an_error_of_usage(look: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        Look(LookOptions(**look))


# --- what is shown of an activation --------------------------------------------------------------------------------


def test_channels_last_are_shown_as_channels_first_are() -> None:
    values = torch.randn(5, 4, 4)
    first, last = nchw(values), show_activation("layer", values.permute(1, 2, 0), Reading(LAYOUTS["nhwc"]))
    assert np.array_equal(maps_in(first), maps_in(last))
    assert (first.what, first.shape, last.shape) == (last.what, (5, 4, 4), (4, 4, 5))


@pytest.mark.parametrize("shape", [(7,), (7, 1, 1), ()])
def test_values_without_places_are_a_vector(shape: tuple[int, ...]) -> None:
    roles = LAYOUTS["nchw"] if len(shape) == 3 else ("channel",)
    shown = show_activation("layer", torch.ones(shape), Reading(roles))
    assert shown.content.values.ndim == 1 and len(shown.content.values) == max(1, *shape, 1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "int64", "uint8", "bool", "complex64"])
def test_an_activation_of_any_type_is_shown(dtype: str) -> None:
    values = torch.tensor([[[3, 0], [4, 1]]] * 2).to(getattr(torch, dtype))
    shown = nchw(values)
    assert maps_in(shown)[0, 1, 0] == (1 if dtype == "bool" else 4)
    assert ("magnitudes" in shown.note) == (dtype == "complex64")


def test_heads_look_from_the_class_token_if_there_is_one_and_otherwise_from_all_tokens() -> None:
    weights = torch.randn(3, 5, 5).softmax(-1)
    with_class = show_attention(Attention("attn", weights), TokenGrid(2, 2, (1, 2, 3, 4)))
    assert np.allclose(maps_in(with_class), weights[:, 0, 1:].reshape(3, 2, 2))
    assert with_class.what == "heads, from token 0 (no patch) to 2 × 2 patches"
    without = show_attention(Attention("attn", weights[:, 1:, 1:]), TokenGrid(2, 2, (0, 1, 2, 3)))
    assert np.allclose(maps_in(without), weights[:, 1:, 1:].mean(1).reshape(3, 2, 2))
    windows = show_attention(Attention("attn", weights, windows=3), TokenGrid(2, 2, (1, 2, 3, 4)))
    assert np.allclose(maps_in(windows), weights) and "within 3 windows" in windows.note


# --- models and layers ---------------------------------------------------------------------------------------------


def test_each_model_has_the_layers_in_its_place_or_all_have_the_same() -> None:
    def asked(*arguments: Any) -> list[tuple[str, str, list[str]]]:
        return [(name, weights, [one.text for one in found]) for name, weights, found in pair(*arguments)]

    assert asked("resnet18", "none", ["conv1", "fc,bn1"]) == [("resnet18", "none", ["conv1", "fc", "bn1"])]
    assert asked(["a", "b"], ["none"], ["conv1,fc"]) == [("a", "none", ["conv1", "fc"]), ("b", "none", ["conv1", "fc"])]
    assert asked(["a", "b"], ["x", "y"], ["conv1", "fc"]) == [("a", "x", ["conv1"]), ("b", "y", ["fc"])]
    with pytest.raises(UsageError, match="--layers is given 2 times for 3 models"):
        pair(["a", "b", "c"], "none", ["conv1", "fc"])
    with pytest.raises(UsageError, match="--weights is given 3 times for 2 models"):
        pair(["a", "b"], ["x", "y", "z"], "fc")
    with pytest.raises(UsageError, match="no layer of resnet18 is named"):
        pair("resnet18", "none", [])
    with pytest.raises(UsageError, match="no model is named"):
        pair([], "none", ["fc"])


# --- files ---------------------------------------------------------------------------------------------------------


def test_one_image_and_one_model_give_a_picture_a_layer_and_an_overview(picture: Path) -> None:
    found = hookx.visualize("own.py:net", "2,0.1,0.0", picture, **SMALL)
    assert files_in(Path("maps")) == ["0.0.png", "0.1:0.png", "0.1:1.png", "2.png", "overview.png"]
    # In the order of a forward pass, whatever the order of the selectors.
    assert [one.layer for one in found.pictures] == ["0.0", "0.1:0", "0.1:1", "2", ""]
    assert re.fullmatch(
        r"0\.0; own\.py:net, weights random \(seed 0\), .*; N,6,16,16: 6 channels of 16 × 16; "
        "chelsea-0.png, 32 × 32 pixels as the model saw them",
        caption_of(Path("maps/0.0.png")),
    )


def test_several_images_and_models_have_folders_and_the_overview_a_row_for_each(thumbnails: Path) -> None:
    images = [thumbnails / "sky" / "hubble-0.png", thumbnails / "things" / "coffee-0.png"]
    models, layers = ["own.py:net", "own.py:net", "own.py:tokens"], ["0.0", "2", "cut"]
    found = visualize(models, layers, images, out="o", **SMALL)
    assert files_in(Path("o")) == [
        "coffee-0/own.py:net-2/2.png",
        "coffee-0/own.py:net/0.0.png",
        "coffee-0/own.py:tokens/cut.png",
        "hubble-0/own.py:net-2/2.png",
        "hubble-0/own.py:net/0.0.png",
        "hubble-0/own.py:tokens/cut.png",
        "overview.png",
    ]
    assert found.pictures[-1].shows == "6 rows, 1 layer"


def test_the_rows_of_many_images_go_on_in_a_second_overview(tmp_path: Path) -> None:
    layer = show_activation("2", torch.arange(20.0), Reading(("channel",)))
    images = [f"{number}.png" for number in range(13)]
    shown = [ShownImage(image, "net", "random", None, "", [layer]) for image in images]
    found = draw(shown, Look(LookOptions(out=tmp_path)), images=images, models=["net"])
    overviews = [(Path(one.file).name, one.shows) for one in found.pictures if not one.layer]
    assert overviews == [("overview.png", "12 rows, 1 layer"), ("overview-2.png", "1 row, 1 layer")]
    assert "overview-2.png" in files_in(tmp_path)


def test_images_of_one_name_and_keys_that_lead_elsewhere_have_folders_of_their_own_within_the_directory() -> None:
    folders = name_image_folders(["a/cat.png", "a/cat.jpg", "dog.png", "../../up.png", "/etc/passwd"])
    assert folders == {
        "a/cat.png": "a/cat.png",
        "a/cat.jpg": "a/cat.jpg",
        "dog.png": "dog",
        "../../up.png": "up",
        "/etc/passwd": "etc/passwd",
    }


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("layer1.0.relu:1", "layer1.0.relu:1"),
        (".", "output"),
        ("./out", "output,out"),
        ("timm:vit_tiny_patch16_224", "timm:vit_tiny_patch16_224"),
        ("a\\b\n", "a_b_"),
    ],
)
def test_a_file_is_named_like_its_layer_without_what_a_path_cannot_hold(text: str, name: str) -> None:
    assert name_file(text) == name


def test_names_too_long_for_a_file_are_cut_and_stay_distinct() -> None:
    assert len(name_file("a" * 300)) == 209 and name_file("a" * 300) != name_file("a" * 301)


def test_a_picture_of_hookx_is_replaced_and_a_file_of_somebody_else_is_not(picture: Path) -> None:
    visualize("own.py:net", "2", picture, **SMALL)
    before = caption_of(Path("maps/2.png"))
    visualize("own.py:net", "2", picture, seed=1, **SMALL)
    assert "seed 1" in caption_of(Path("maps/2.png")) and "seed 0" in before
    shutil.copy(picture, "maps/2.png")
    with pytest.raises(StoreError, match=r"maps/2\.png exists and was not drawn by hookx"):
        visualize("own.py:net", "2", picture, **SMALL)
    assert Path("maps/2.png").read_bytes() == picture.read_bytes()
    assert not [name for name in files_in(Path("maps")) if name.startswith(".")]
    with pytest.raises(StoreError, match=r"cannot write maps/2\.png/2\.png: "):
        visualize("own.py:net", "2", picture, out="maps/2.png", **SMALL)


def test_ways_of_looking_do_not_replace_each_other(picture: Path) -> None:
    for reduce in ("", "mean"):
        visualize("own.py:net", "0.0", picture, reduce=reduce, **SMALL)
    assert files_in(Path("maps")) == ["0.0-mean.png", "0.0.png", "overview-mean.png", "overview.png"]


# --- two routes to one picture -------------------------------------------------------------------------------------


def test_stored_activations_draw_the_same_picture_as_the_model(thumbnails: Path) -> None:
    layers, key = "conv1,layer4,layer2@mean1,avgpool", "animals/chelsea-0.png"
    extract("resnet18", layers, thumbnails / "animals", out="f", batch_size=1, workers=0, device="cpu", **SMALL)
    by_model = visualize("resnet18", layers, thumbnails / key, out="by-model", device="cpu", **SMALL)
    by_run = visualize_run("f", ["chelsea-0.png"], out="by-run", images=thumbnails / "animals")
    assert [one.layer for one in by_model.pictures] == ["conv1", "layer2@mean1", "layer4", "avgpool", ""]
    for one, other in zip(by_model.pictures, by_run.pictures, strict=True):
        assert Path(one.file).read_bytes() == Path(other.file).read_bytes()
    without_input = visualize_run("f", ["chelsea-0.png"], "conv?", out="bare")
    assert [one.layer for one in without_input.pictures] == ["conv1", ""]


def test_tokens_of_a_run_are_folded_as_the_model_folds_them(picture: Path) -> None:
    layer = "encoder.layers.encoder_layer_0.mlp@max2"
    extract("vit_b_32", layer, picture, out="features", weights="none", workers=0, device="cpu")
    by_run = visualize_run("features")
    assert by_run.pictures[0].shows == "map of 7 × 7 patches, without token 0 of 50 (no patch)"


def test_of_a_run_of_ones_own_model_no_code_is_run_and_the_layout_can_be_said(picture: Path) -> None:
    extract("own.py:tokens", "cut,block", picture, out="features", workers=0, **SMALL)
    Path("own.py").write_text("raise SystemExit('this code was run')")
    result = run("features")
    assert result.exit_code == 0, result.exception
    assert (
        "own.py:tokens is not built again, because that could run code; the layout of its layers is inferred"
        in result.stderr
    )
    assert re.search(r"^maps/cut.png +8 channels of 4 × 4$", result.stdout, re.MULTILINE)
    assert re.search(r"^maps/block.png +matrix of 17 × 8$", result.stdout, re.MULTILINE)
    assert "block: not folded" in result.stderr
    said = run("features", "--layout", "tokens")
    assert re.search(r"^maps/block.png +8 channels of 4 × 4 patches, without token 0 of 17", said.stdout, re.MULTILINE)


def test_what_a_run_does_not_hold_is_an_error_with_the_closest(mixed_folder: Path) -> None:
    extract("own.py:net", "0.0,2", mixed_folder, out="features", workers=0, **SMALL)
    with pytest.raises(UsageError, match=r"features/ holds 5 images\n.*--image KEY, one of: a.png, d.png"):
        visualize_run("features")
    with pytest.raises(NotStoredError, match=r"'c-empty.png' could not be read: .*empty"):
        visualize_run("features", ["c-empty.png"])
    with pytest.raises(NotStoredError, match=r"features/ does not hold 'b.png'; closest: "):
        visualize_run("features", ["b.png"])
    with pytest.raises(NotStoredError, match=r"features/ does not hold '0.3'; closest: 0.0"):
        visualize_run("features", ["a.png"], "0.3")
    with pytest.raises(ImageError, match=r"--images does not contain 'a.png'; closest: d.png"):
        visualize_run("features", ["a.png"], images=mixed_folder / "d.png")
    assert not Path("maps").exists()


# --- attention -----------------------------------------------------------------------------------------------------


def test_attention_is_drawn_a_picture_a_module_and_layers_narrow_them_down(picture: Path) -> None:
    found = visualize("own.py:tokens", [], picture, attention=True, **SMALL)
    assert [(one.file, one.shows) for one in found.pictures] == [
        ("maps/block.self_attn-attention.png", "2 heads, from token 0 (no patch) to 4 × 4 patches"),
        ("maps/overview-attention.png", "1 row, 1 layer"),
    ]
    assert len(visualize("own.py:tokens", "block", picture, attention=True, **SMALL).pictures) == 2
    with pytest.raises(LayerError, match=r"there is no attention in cut; closest: block.self_attn"):
        visualize("own.py:tokens", "cut", picture, attention=True, **SMALL)
    with pytest.raises(HookxError, match=r"--attention: own\.py:net has no attention"):
        visualize("own.py:net", [], picture, attention=True, **SMALL)


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_in_a_pipe_prints_the_pictures_and_what_they_show(picture: Path) -> None:
    command = ["-m", "hookx", "visualize", "-m", "own.py:net", "-l", "0.0,2", *OPTIONS, str(picture)]
    process = subprocess.run([*warm.python("torch"), *command], capture_output=True, text=True, timeout=100)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines() == [
        "maps/0.0.png       6 channels of 16 × 16",
        "maps/2.png         20 values",
        "maps/overview.png  1 row, 2 layers",
    ]
    assert process.stderr.startswith("weights: random (seed 0)")


def test_quiet_prints_paths_only_and_json_one_document(picture: Path) -> None:
    quiet = run("-m", "own.py:net", "-l", "2", *OPTIONS, picture, "-o", "o", "-q", "--top", "10")
    assert quiet.stdout.splitlines() == ["o/2.png", "o/overview.png"] and quiet.stderr == ""
    document = json.loads(run("-m", "own.py:net", "-l", "2", *OPTIONS, picture, "--channels", "0-9", "--json").stdout)
    of_picture = {"image": "chelsea-0.png", "model": "own.py:net", "layer": "2"}
    assert document == {
        "out": "maps",
        "pictures": [
            {"file": "maps/2.png", **of_picture, "shows": "10 of 20 values: 0-9"},
            {"file": "maps/overview.png", **dict.fromkeys(of_picture), "shows": "1 row, 1 layer"},
        ],
        "failures": {},
    }


def test_images_that_cannot_be_read_are_named_and_the_others_drawn(mixed_folder: Path) -> None:
    result = run("-m", "own.py:net", "-l", "2", *OPTIONS, mixed_folder)
    assert result.exit_code == 3
    assert re.search(r"^warning: cannot read 'c-empty.png': the file is empty$", result.stderr, re.MULTILINE)
    assert sum("/2.png" in line for line in result.stdout.splitlines()) == 5
    nothing = run("-m", "own.py:net", "-l", "2", *OPTIONS, mixed_folder / "c-empty.png", "-o", "nothing")
    assert isinstance(nothing.exception, ImageError) and not Path("nothing").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no images are named"),
        (["cat.jpg", "--image", "cat.jpg"], "--image, --images and --root need a run"),
        (["features", "-m", "resnet18"], "features is a run, whose model does not run again"),
        (["features", "--attention"], "features is a run, whose model does not run again"),
        (["cat.jpg", "-m", "resnet18", "-l", "conv1", "--top", "0"], "--top must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_meant_is_an_error_of_usage(arguments: list[str], said: str) -> None:
    Path("features").mkdir()
    Path("features/plan.json").touch()
    error = run(*arguments).exception
    assert isinstance(error, UsageError) and said in str(error) and error.exit_code == 2


def test_help_and_errors_of_usage_do_not_wait_for_torch_or_matplotlib() -> None:
    for arguments in (["visualize", "--help"], ["visualize"]):
        command = [sys.executable, "-X", "importtime", "-m", "hookx", *arguments]
        process = subprocess.run(command, capture_output=True, text=True, timeout=100)
        imported = set(re.findall(r"^import time:.*\| +(\S+)$", process.stderr, re.MULTILINE))
        assert "hookx.cli" in imported and not imported & {"torch", "matplotlib"}
