"""Models and their weights: random, from a file, from the cache; their preprocessing; their skeletons."""

from __future__ import annotations

import hashlib
import os
import resource
import sys
import urllib.request
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights

from hookx import Capture
from hookx.errors import ModelError
from hookx.models import ModelOptions, list_models, load_model, skeleton
from hookx.models.names import distribution_of
from hookx.models.torchvision import Torchvision
from kit.second_route import input_of

PHOTOGRAPHS = [Path(__file__).parents[2] / "images" / name for name in ("animals/chelsea.jpg", "people/camera.jpg")]
pytestmark = pytest.mark.filterwarnings("ignore:The default weight initialization")

CLASSIFIERS = [name for name, kind in list_models().items() if kind == "classification"]
SMALL = ["squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5", "resnet18", "regnet_y_400mf", "mnasnet0_5"]


@lru_cache(maxsize=2)
def random_state(name: str, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return dict(get_model(name, weights=None).state_dict())


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def write(file: Path, state: dict[str, Tensor]) -> str:
    save_file(state, file) if file.suffix == ".safetensors" else torch.save(state, file)
    return str(file)


def error_of(ref: str, weights: object = "default") -> str:
    with pytest.raises(ModelError) as caught:
        load_model(ref, str(weights))
    return str(caught.value)


# --- random weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("seed", [0, 7])
def test_no_weights_are_torchvisions_own_after_the_seed(name: str, seed: int) -> None:
    torch.rand(3)  # What was drawn before does not matter.
    model = load_model(name, "none", ModelOptions(seed=seed))
    assert equal(dict(model.module.state_dict()), random_state(name, seed))
    assert model.weights == f"random (seed {seed})"


def test_a_model_is_in_eval_mode_on_the_cpu() -> None:
    module = load_model("resnet18", "none").module
    assert not any(part.training for part in module.modules())
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}


@pytest.mark.parametrize(
    ("ref", "distribution"),
    [("resnet18", "torchvision"), ("timm:resnet18", "timm"), ("hf:./folder", "transformers"), ("w.pt", "torchvision")],
)
def test_a_model_comes_from_the_distribution_of_its_zoo(ref: str, distribution: str) -> None:
    assert distribution_of(ref) == distribution


def test_every_model_of_torchvision_is_listed_with_its_kind() -> None:
    assert list(list_models()) == sorted(torchvision.models.list_models())
    assert sorted(torchvision.models.list_models(module=torchvision.models)) == CLASSIFIERS


@pytest.mark.parametrize(("kind", "takes"), [("video", "video clips"), ("optical flow", "pairs of video frames")])
def test_a_model_that_takes_no_still_images_is_refused_with_what_it_takes(kind: str, takes: str) -> None:
    refused = [name for name in list_models() if list_models()[name] == kind]
    assert refused
    for name in refused:
        assert error_of(name, "none") == f"{name} takes {takes}; hookx reads still images"


@pytest.mark.parametrize(("name", "message"), [("resnet81", "closest: resnet18"), ("ResNet18", "closest: resnet18")])
def test_an_unknown_model_is_an_error_with_the_closest_names(name: str, message: str) -> None:
    assert f"no model is called '{name}'; " in error_of(name) and message in error_of(name)
    with pytest.raises(ModelError, match=message):
        skeleton(name)


def test_an_unknown_weights_name_is_an_error_with_those_there_are() -> None:
    message = error_of("mobilenet_v2", "IMAGENET1K_V3")
    assert "mobilenet_v2 has no weights 'IMAGENET1K_V3'; it has: IMAGENET1K_V1, IMAGENET1K_V2\n" in message
    assert "also: default, none (random), or a file (.safetensors, .pt, .pth)" in message
    with pytest.raises(ModelError, match="it has: IMAGENET1K_V1, IMAGENET1K_V2"):
        skeleton("mobilenet_v2", "ResNet18_Weights.IMAGENET1K_V1")


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".PTH"])
def test_a_state_dict_file_gives_the_tensors_that_are_in_it(suffix: str, tmp_path: Path) -> None:
    state = random_state("mnasnet0_5", 1)
    file = write(tmp_path / f"weights{suffix}", state)
    model = load_model("mnasnet0_5", file)  # Its modules ask for the version of their format.
    assert equal(dict(model.module.state_dict()), state)
    assert model.weights == f"sha256:{hashlib.sha256(Path(file).read_bytes()).hexdigest()}"


def test_weights_with_or_without_auxiliary_classifiers_give_a_model_with_or_without_them(tmp_path: Path) -> None:
    whole = random_state("googlenet", 1)
    for state in (whole, {key: tensor for key, tensor in whole.items() if not key.startswith("aux")}):
        assert equal(dict(load_model("googlenet", write(tmp_path / "w.pt", state)).module.state_dict()), state)


def test_old_weights_without_batch_norms_step_counters_fit(tmp_path: Path) -> None:
    state = {key: tensor for key, tensor in random_state("mnasnet0_5", 1).items() if "num_batches" not in key}
    loaded = load_model("mnasnet0_5", write(tmp_path / "w.pt", state)).module.state_dict()
    assert equal({key: loaded[key] for key in state}, state)


def test_keys_and_shapes_that_do_not_fit_are_listed_by_kind(tmp_path: Path) -> None:
    state = random_state("resnet18", 1)
    file = write(
        tmp_path / "w.pt",
        {f"new.{n}": torch.ones(1) for n in range(5)}
        | {"fc.weight": state["fc.weight"][:10]}
        | {key: tensor for key, tensor in state.items() if not key.startswith(("fc.", "layer1.0.bn1."))},
    )
    problem, missing, unexpected, other_shape = error_of("resnet18", file).splitlines()
    assert problem == f"'{file}' does not fit resnet18"
    assert missing == "  missing (5): layer1.0.bn1.weight, layer1.0.bn1.bias, layer1.0.bn1.running_mean, ..."
    assert unexpected == "  unexpected (5): new.0, new.1, new.2, ..."
    assert other_shape == "  other shape (1): fc.weight (10, 512) instead of (1000, 512)"


class RunsCode:
    """What is pickled is a call of `open`, which reading the pickle repeats."""

    def __init__(self, traces: Path) -> None:
        self.traces = traces

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.traces), "w")


def test_a_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    traces, file = tmp_path / "traces", tmp_path / "w.pt"
    torch.save({"fc.weight": RunsCode(traces)}, file)
    assert "holds more than tensors, and reading it could run code" in error_of("resnet18", file)
    assert not traces.exists()


def test_a_pickled_module_is_refused_with_the_way_to_save_its_weights(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "w.pt")
    message = error_of("resnet18", tmp_path / "w.pt")
    assert "reading it could run code" in message and "torch.save(model.state_dict(), 'weights.pt')" in message


@pytest.mark.parametrize(
    ("content", "is_shown"),
    [
        ({"settings": {"width": 3}, "epoch": 3}, "keys: settings, epoch"),
        ([torch.ones(1)], "list"),
        (torch.ones(1), "Tensor"),
        ({0: torch.ones(1)}, "keys: 0"),
        ({}, "keys: "),
    ],
)
def test_a_file_that_holds_no_state_dict_is_an_error_that_says_what_it_holds(
    content: object, is_shown: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "w.pt")
    assert f"is not a state dict (name -> tensor); found {is_shown}\n" in error_of("resnet18", tmp_path / "w.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("damage", [lambda _: b"", lambda whole: whole[:200], lambda whole: b"no weights" + whole])
def test_a_damaged_file_is_an_error_that_names_it(
    suffix: str, damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    file = tmp_path / f"w{suffix}"
    write(file, {"fc.weight": torch.ones(100, 100)})
    file.write_bytes(damage(file.read_bytes()))
    assert error_of("resnet18", file).startswith(f"cannot read weights from '{file}': ")


@pytest.mark.parametrize("weights", ["missing.pt", "missing/weights", "missing.safetensors"])
def test_a_missing_file_is_an_error_that_names_it(weights: str) -> None:
    assert error_of("resnet18", weights) == f"there is no weights file '{weights}'"


# --- published weights ---------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give the folder of an empty cache, on a machine without a network."""
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setenv("TORCH_HOME", str(tmp_path))
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            patch.setenv(name, "http://127.0.0.1:9")  # Nothing listens on the discard port.
        for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
            patch.delenv(name, raising=False)
        urllib.request.install_opener(urllib.request.build_opener())  # It reads the proxies once.
        yield folder
    urllib.request.install_opener(urllib.request.build_opener())


def file_name(name: str, weights: str = "DEFAULT") -> str:
    return str(get_model_weights(name)[weights].url.rsplit("/", 1)[1])


def test_weights_that_can_neither_be_found_nor_downloaded_are_an_error_with_the_ways_out(
    cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    message = error_of("resnet18")
    assert message.startswith(
        "weights for resnet18 (IMAGENET1K_V1) are not in the cache and could not be downloaded: <urlopen error"
    )
    assert "use a file: --weights resnet18.safetensors    or random weights: --weights none" in message
    assert f"or put {file_name('resnet18')} into {cache}" in message
    assert capfd.readouterr() == ("", "")  # torch.hub announces a download, and stdout is for data.


@pytest.mark.parametrize("weights", ["default", "IMAGENET1K_V1", "MobileNet_V2_Weights.IMAGENET1K_V1"])
def test_cached_weights_are_used_under_every_name_they_have(weights: str, cache: Path) -> None:
    state = random_state("mobilenet_v2", 1)
    enum_name = "DEFAULT" if weights == "default" else "IMAGENET1K_V1"
    write(cache / file_name("mobilenet_v2", enum_name), state)
    model = load_model("mobilenet_v2", weights)
    # Nor is it the published file: torch.hub compares the digest after a download only.
    assert equal(dict(model.module.state_dict()), state)
    assert model.weights == str(get_model_weights("mobilenet_v2")[enum_name])


def test_cached_weights_give_the_model_that_torchvision_gives(cache: Path) -> None:
    # This one rescales its input if it is built for published weights, and only then.
    write(cache / file_name("googlenet"), random_state("googlenet", 1))
    pixels_NCHW = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model, expected = load_model("googlenet"), get_model("googlenet", weights="DEFAULT").eval()
    with Capture(model.module, "conv1") as capture, Capture(expected, "conv1") as expected_capture:
        model.forward(pixels_NCHW), expected(pixels_NCHW)
    assert torch.equal(capture["conv1"], expected_capture["conv1"])


@pytest.mark.parametrize("content", [b"", b"no weights", None])
def test_a_cached_file_that_cannot_be_used_is_an_error_that_says_to_remove_it(
    content: bytes | None, cache: Path
) -> None:
    file = cache / file_name("resnet18")
    write(file, {"fc.weight": torch.ones(3)}) if content is None else file.write_bytes(content)
    message = error_of("resnet18")
    assert message.startswith("the cached weights for resnet18 (IMAGENET1K_V1) cannot be used: ")
    assert message.endswith(f"remove {file} and run again")


# --- preprocessing -------------------------------------------------------------------------------------------------

PRESETS = {
    f"{preset} {preset.antialias}": (name, weights.name)
    for name in CLASSIFIERS
    for weights in get_model_weights(name)
    for preset in [weights.transforms()]
}


@pytest.mark.parametrize(("name", "weights"), PRESETS.values())
def test_a_photograph_is_preprocessed_as_the_weights_ask_for_bit_for_bit(name: str, weights: str) -> None:
    transforms = get_model_weights(name)[weights].transforms()
    preprocessing = skeleton(name, weights).preprocessing
    for photograph in PHOTOGRAPHS:
        with Image.open(photograph) as image:
            expected = transforms(image.convert("RGB"))
        assert torch.equal(input_of(photograph, preprocessing), expected)


@pytest.mark.parametrize("weights", ["none", "file"])
def test_the_preprocessing_of_other_weights_is_that_of_the_default_ones(weights: str, tmp_path: Path) -> None:
    if weights == "file":
        weights = write(tmp_path / "w.pt", random_state("mobilenet_v3_small", 1))
    assert load_model("mobilenet_v3_small", weights).preprocessing == skeleton("mobilenet_v3_small").preprocessing


# --- skeletons -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SMALL, "vit_b_16", "swin_v2_t", "googlenet"])
def test_a_skeleton_has_the_modules_and_shapes_of_the_real_model(name: str) -> None:
    bones, body = skeleton(name, "none").module, load_model(name, "none").module
    described = [
        [(key, tensor.shape, tensor.dtype) for key, tensor in module.state_dict().items()] for module in (bones, body)
    ]
    assert described[0] == described[1]
    classes = [[(path, type(part)) for path, part in module.named_modules()] for module in (bones, body)]
    assert classes[0] == classes[1]
    assert not any(part.training for part in bones.modules())


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
@pytest.mark.parametrize("name", ["regnet_y_128gf", "vit_h_14"])
def test_the_largest_models_are_built_without_their_memory(name: str) -> None:
    before_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    module = skeleton(name).module
    grown_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before_bytes
    tensors = [*module.parameters(), *module.buffers()]
    assert all(tensor.is_meta for tensor in tensors)
    assert grown_bytes < 0.02 * sum(tensor.nbytes for tensor in tensors)


def test_a_skeleton_needs_neither_a_weights_file_nor_a_network(cache: Path) -> None:
    assert skeleton("resnet18", "missing.pt").preprocessing == skeleton("resnet18").preprocessing
    assert os.listdir(cache) == []


def test_a_vision_transformer_is_built_for_the_images_of_its_weights() -> None:
    for weights, side_px in (("IMAGENET1K_V1", 224), ("IMAGENET1K_SWAG_E2E_V1", 384)):
        bones = skeleton("vit_b_16", weights)
        assert bones.preprocessing.crop_px == side_px
        assert bones.forward(torch.empty(2, 3, side_px, side_px, device="meta")).shape == (2, 1000)


@pytest.mark.parametrize("name", ["googlenet", "resnet50"])
def test_a_file_of_published_weights_is_recognised_by_its_hash(name: str) -> None:
    model = Torchvision().find(name, "default")
    for entry in get_model_weights(name):
        beginning = entry.url.rsplit("-", 1)[1].split(".")[0]
        assert model.recognize(beginning.ljust(64, "0")) is entry
    assert model.recognize("0" * 64) is None


def test_an_image_transform_inside_the_model_is_off_for_a_file_of_unknown_weights(tmp_path: Path) -> None:
    file = write(tmp_path / "googlenet.pt", random_state("googlenet", 1))
    module: Any = load_model("googlenet", file).module
    assert module.transform_input is False
