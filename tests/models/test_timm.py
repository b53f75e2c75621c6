"""timm's models: every activation exact, timm's own preprocessing bit for bit, weights from the cache, from a file."""

from __future__ import annotations

import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from hookx.errors import ModelError
from hookx.models import ModelOptions, list_models, load_model, skeleton, weights_of
from hookx.models.hub import tensors_only
from kit import warm
from kit.hub import broken_hub, hub
from kit.second_route import captured_of, input_of

timm = pytest.importorskip("timm", reason="the extra timm is not installed")
from huggingface_hub import constants  # noqa: E402

SMALL = "timm:resnet10t.c3_in1k"
REPOSITORY = "models--timm--resnet10t.c3_in1k"


def state_of(seed: int, **arguments: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return dict(timm.create_model("resnet10t", **arguments).state_dict())


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def error_of(ref: str, weights: str = "none", **model_args: str) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(ref, weights, ModelOptions(model_args=model_args))
    return str(caught.value)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache of the hub, and a hub that nobody answers for."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "cache"


def snapshot(cache: Path) -> Path:
    """Lay out a repository in a cache as the hub's own library does."""
    folder = cache / REPOSITORY / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    (cache / REPOSITORY / "refs").mkdir()
    (cache / REPOSITORY / "refs" / "main").write_text("a" * 40)
    return folder


# --- exact ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet10t", None),  # convolutions, in-place ReLUs
        ("convnext_atto", None),  # NHWC inside the blocks
        ("vit_tiny_patch16_224", "64"),  # tokens
        ("swin_tiny_patch4_window7_224", "56"),  # windows, NHWC between the stages
        ("coatnet_pico_rw_224", "64"),  # convolutions and attention
        ("vit_medium_patch16_gap_256", "64"),  # no class token
        ("vit_base_patch32_siglip_256", "64"),  # attention pooling
    ],
)
def test_every_activation_of_a_family_is_what_its_layer_returned(name: str, size: str | None) -> None:
    options = ModelOptions(model_args={"img_size": size} if size else {})
    loaded = load_model(f"timm:{name}", "none", options)
    rows = captured_of(loaded, side_px=int(size or 64))
    assert len(rows) > 50
    bare = skeleton(f"timm:{name}", "none", options)
    assert {parameter.device.type for parameter in bare.module.parameters()} == {"meta"}
    assert [path for path, _ in bare.module.named_modules()] == [path for path, _ in loaded.module.named_modules()]
    assert bare.preprocessing == loaded.preprocessing


def test_the_conformance_script_covers_families_of_timm() -> None:
    script = Path(__file__).parents[2] / "scripts" / "conformance.py"
    command = [*warm.python("torch"), str(script), "--kind", "timm", "lcnet_035", "mobilevit_xxs"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 models" in done.stdout and "hookx: 0 wrong and 0 missed of " in done.stdout


# --- preprocessing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "mobilenetv3_small_050", "tf_efficientnet_b0"])
def test_the_preprocessing_is_timms_own_bit_for_bit(name: str, photos: Path) -> None:
    loaded = skeleton(f"timm:{name}", "none")
    config = timm.data.resolve_model_data_config(timm.create_model(name))
    transform = timm.data.create_transform(**config, is_training=False)
    assert loaded.transform is None and loaded.preprocessing.custom == ""
    for file in sorted(photos.rglob("*.jpg"))[:3]:
        with Image.open(file) as image:
            expected = transform(image.convert("RGB"))
        assert torch.equal(input_of(file, loaded.preprocessing), expected)


def test_what_a_plan_cannot_say_is_timms_own_transform_with_its_configuration_in_the_plan(photos: Path) -> None:
    loaded = skeleton("timm:coat_lite_medium_384.in1k", "none")
    config = timm.data.resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg("coat_lite_medium_384").to_dict())
    assert config["crop_mode"] == "squash" and loaded.preprocessing.crop_px == 384
    assert loaded.preprocessing.custom.startswith('timm.data.create_transform: {"crop_mode": "squash", "crop_pct": 1.0')
    with Image.open(photos / "animals" / "chelsea.jpg") as image:
        expected = timm.data.create_transform(**config, is_training=False)(image.convert("RGB"))
        assert loaded.transform is not None and torch.equal(loaded.transform(image.convert("RGB")), expected)


def test_a_size_of_ones_own_is_the_size_of_the_images() -> None:
    loaded = skeleton("timm:vit_tiny_patch16_224", "none", ModelOptions(model_args={"img_size": "96"}))
    assert loaded.preprocessing.crop_px == 96


# --- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 7])
def test_no_weights_are_timms_own_after_the_seed(seed: int) -> None:
    loaded = load_model("timm:resnet10t", "none", ModelOptions(seed=seed))
    assert equal(dict(loaded.module.state_dict()), state_of(seed))
    assert loaded.weights == f"random (seed {seed})" and not loaded.module.training


def test_arguments_stand_beside_the_weights_because_they_decide_the_numbers() -> None:
    options = ModelOptions(model_args={"num_classes": "3", "global_pool": "max"})
    loaded = load_model("timm:resnet10t", "none", options)
    assert loaded.weights == "random (seed 0) (global_pool=max, num_classes=3)"
    assert loaded.forward(torch.zeros(2, 3, 64, 64)).shape == (2, 3)


@pytest.mark.parametrize(("ref", "weights"), [("timm:resnet10t", "default"), (SMALL, "default"), (SMALL, "c3_in1k")])
def test_weights_in_the_cache_are_taken_without_a_network(ref: str, weights: str, cache: Path) -> None:
    assert weights_of(ref) == [("c3_in1k", False)]
    save_file(state_of(5), snapshot(cache) / "model.safetensors")
    loaded = load_model(ref, weights)
    assert equal(dict(loaded.module.state_dict()), state_of(5))
    assert loaded.weights == SMALL and weights_of(ref) == [("c3_in1k", True)]


def test_published_weights_serve_another_size_and_no_classifier_but_not_other_classes(cache: Path) -> None:
    save_file(state_of(5), snapshot(cache) / "model.safetensors")
    bare = load_model(SMALL, options=ModelOptions(model_args={"num_classes": "0"}))
    assert bare.forward(torch.zeros(1, 3, 64, 64)).shape == (1, 512)
    message = error_of(SMALL, "default", num_classes="10")
    assert f"the weights of {SMALL} are for 1000 classes, not 10\n" in message and "--weights FILE" in message


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_in_the_cache_does_not_run_its_code(cache: Path, tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    file = snapshot(cache) / "pytorch_model.bin"
    torch.save({**state_of(5), "extra": Malicious(mark)}, file)
    assert f"weights for {SMALL} could not be loaded" in error_of(SMALL, "default")
    file.write_bytes(pickle.dumps(Malicious(mark)))
    error_of(SMALL, "default")
    assert not mark.exists()


def test_a_library_that_would_read_pickles_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    before = dict(os.environ)
    torch.save(Malicious(tmp_path / "it ran"), tmp_path / "w.bin")
    with tensors_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "w.bin", weights_only=False)
    assert not (tmp_path / "it ran").exists() and dict(os.environ) == before


def test_weights_that_are_neither_in_the_cache_nor_available_are_an_error_after_one_attempt(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with broken_hub(monkeypatch) as requested:
        message = error_of(SMALL, "default")
    assert len(requested) == 1  # The hub's own library retries for 46 seconds.
    assert message.startswith(f"weights for {SMALL} are not in the cache and could not be downloaded: ")
    assert "use a file: --weights weights.safetensors    or random weights: --weights none" in message


def test_weights_are_downloaded_from_the_hub_once(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "hookx")
    repository = tmp_path / "hub" / "timm" / "resnet10t.c3_in1k"
    repository.mkdir(parents=True)
    save_file(state_of(5), repository / "model.safetensors")
    with hub(tmp_path / "hub", monkeypatch):
        assert equal(dict(load_model(SMALL).module.state_dict()), state_of(5))
        assert "downloading model.safetensors of timm/resnet10t.c3_in1k" in caplog.text
    assert equal(dict(load_model(SMALL).module.state_dict()), state_of(5))  # There is no hub any more.


def test_a_file_of_weights_fills_a_model_also_for_other_classes(tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    save_file({f"module.{name}": tensor for name, tensor in state_of(3, num_classes=7).items()}, file)
    loaded = load_model("timm:resnet10t", str(file))
    assert equal(dict(loaded.module.state_dict()), state_of(3, num_classes=7))
    assert loaded.weights.startswith("sha256:") and any("7 classes" in note for note in loaded.notes)
    assert skeleton("timm:resnet10t", str(file)).module.get_submodule("fc").out_features == 7
    save_file({name: tensor for name, tensor in state_of(3).items() if name != "fc.bias"}, file)
    assert "missing (1): fc.bias" in error_of("timm:resnet10t", str(file))


# --- names ---------------------------------------------------------------------------------------------------------


def test_models_are_listed_by_a_glob_with_tags_where_it_has_a_dot() -> None:
    assert list(list_models("timm:vit_tiny*")) == [f"timm:{name}" for name in timm.list_models("vit_tiny*")]
    assert list_models("timm:resnet10t.*") == {SMALL: "timm"}
    assert len(list_models("timm:*")) == len(timm.list_models())
    with pytest.raises(ModelError, match=r"no model of timm matches 'resnet81\*'; closest: resnet18"):
        list_models("timm:resnet81*")
    assert weights_of("timm:resnet18")[0][0] == timm.get_pretrained_cfg("resnet18").tag


def test_unknown_names_are_errors_with_the_names_there_are() -> None:
    message = error_of("timm:resnet81")
    assert "has no model 'resnet81'; closest: timm:resnet18, timm:" in message
    assert "list them all: hookx list-models 'timm:*'" in message
    assert "timm:resnet10t has no weights 'foo'; it has: c3_in1k\n" in error_of("timm:resnet10t.foo")
    message = error_of("timm:resnet18", "IMAGENET1K_V1")
    assert "timm:resnet18 has no weights 'IMAGENET1K_V1'; it has: a1_in1k, a2_in1k, " in message
    assert error_of("timm:resnet18.a1_in1k", "a2_in1k").endswith("name them in one place")
    untrained = next(name for name in timm.list_models("resnet*") if not timm.list_pretrained(f"{name}.*"))
    assert f"timm has no published weights for timm:{untrained}\n" in error_of(f"timm:{untrained}", "default")


def test_arguments_that_do_not_fit_are_errors() -> None:
    assert "cannot be built with widht=3: " in error_of("timm:resnet10t", widht="3")
    assert "choose the weights of timm:resnet10t.c3_in1k with --weights" in error_of(
        "timm:resnet10t", pretrained="true"
    )
    assert "features_only=True: hookx takes the whole model" in error_of("timm:resnet10t", features_only="true")
    assert "write the number of channels, as in in_chans=13" in error_of("timm:resnet10t", in_chans="many")


def test_without_timm_the_error_names_the_extra() -> None:
    program = (
        "import sys; sys.modules['timm'] = None; sys.argv = ['hookx', 'list-layers', 'timm:resnet18']\n"
        "from hookx.cli import main; main()"
    )
    done = subprocess.run([*warm.python("torch"), "-c", program], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        "error: models of timm need timm, which is not installed\n"
        "  install it as an extra of hookx: pip install 'hookx-vision[timm]'\n"
    )
