"""Models of Hugging Face: small random ones, saved and loaded by the real path, from folders and from a hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from hookx.capture.runner import Runner
from hookx.errors import ModelError, UsageError
from hookx.launch.extract import extract
from hookx.models import ModelOptions, list_models, load_model, skeleton
from hookx.read.features import open_features
from kit import warm
from kit.hub import COMMIT, broken_hub, hub
from kit.second_route import captured_of

transformers = pytest.importorskip("transformers", reason="the extra transformers is not installed")
from huggingface_hub import constants  # noqa: E402

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
STAGES = {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}
SIDE_PX = 56


def _dinov2() -> Any:
    sizes = {name: TINY[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    return transformers.Dinov2Model(transformers.Dinov2Config(**sizes, image_size=56, patch_size=14))


def _clip() -> Any:
    text = {**TINY, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**TINY, "image_size": 56, "patch_size": 14}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


MODELS: dict[str, Callable[[], Any]] = {
    "dinov2": _dinov2,
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**TINY, image_size=56, patch_size=14)),
    "convnext": lambda: transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**STAGES)),
    "resnet": lambda: transformers.ResNetModel(transformers.ResNetConfig(embedding_size=8, **STAGES)),
    "swin": lambda: transformers.SwinModel(
        transformers.SwinConfig(
            embed_dim=16, depths=[1, 1], num_heads=[2, 2], image_size=56, patch_size=2, window_size=7
        )
    ),
    "clip": _clip,
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**TINY, vocab_size=99)),
}


def save(folder: Path, name: str, *, processor: bool = True) -> str:
    torch.manual_seed(3)
    MODELS[name]().save_pretrained(folder)
    if processor:
        sizes = {"size": {"shortest_edge": 64}, "crop_size": {"height": SIDE_PX, "width": SIDE_PX}}
        transformers.BitImageProcessor(**sizes).save_pretrained(folder)
    return f"hf:{folder}"


@pytest.fixture(scope="module")
def refs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {name: save(tmp_path_factory.mktemp(name), name) for name in MODELS}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache of the hub, and a hub that nobody answers for."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "cache"


def error_of(ref: str, weights: str = "default", **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(ref, weights, ModelOptions(**options))
    return str(caught.value)


def copy_of(ref: str, folder: Path) -> Path:
    return Path(shutil.copytree(ref.removeprefix("hf:"), folder / "copy"))


# --- exact ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dinov2", "vit", "convnext", "resnet", "swin", "clip"])
def test_every_activation_is_what_its_layer_returned(name: str, refs: dict[str, str]) -> None:
    loaded = load_model(refs[name])
    rows = captured_of(loaded)
    assert len(rows) > 30
    if name == "dinov2":
        assert rows["encoder/last_hidden_state"].shape == (2, 17, 32)
        assert {"./last_hidden_state", "./pooler_output", "encoder.layer.0.mlp.fc1"} <= rows.keys()
    bare = skeleton(refs[name])
    assert {parameter.device.type for parameter in bare.module.parameters()} == {"meta"}
    assert [path for path, _ in bare.module.named_modules()] == [path for path, _ in loaded.module.named_modules()]
    assert bare.preprocessing == loaded.preprocessing and bare.preprocessing.crop_px == SIDE_PX


def test_the_model_is_the_one_that_was_saved_with_all_its_weights(refs: dict[str, str]) -> None:
    loaded = load_model(refs["vit"])
    own = transformers.ViTForImageClassification.from_pretrained(refs["vit"].removeprefix("hf:")).eval()
    assert type(loaded.module) is type(own) and not loaded.module.training
    pixels_NCHW = torch.randn(2, 3, SIDE_PX, SIDE_PX, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(loaded.forward(pixels_NCHW).logits, own(pixel_values=pixels_NCHW).logits)


def test_attention_weights_are_parts_where_they_are_asked_for(refs: dict[str, str]) -> None:
    options = ModelOptions(model_args={"attn_implementation": "eager"})
    loaded = load_model(refs["dinov2"], options=options)
    assert loaded.weights.endswith(" (attn_implementation=eager)")
    maps = [row for address, row in captured_of(loaded).items() if row.shape[1:] == (2, 17, 17)]
    assert len(maps) >= 2 and torch.allclose(maps[0].sum(-1), torch.ones(2, 2, 17))


# --- weights -------------------------------------------------------------------------------------------------------


def test_no_weights_are_transformers_own_after_the_seed(refs: dict[str, str]) -> None:
    loaded = load_model(refs["vit"], "none", ModelOptions(seed=3))
    torch.manual_seed(3)
    expected = MODELS["vit"]().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.module.state_dict().items())
    assert loaded.weights == "random (seed 3)"


def test_a_folder_s_weights_are_named_by_their_digest(refs: dict[str, str], tmp_path: Path) -> None:
    folder = copy_of(refs["dinov2"], tmp_path)
    before = load_model(f"hf:{folder}").weights
    assert before == load_model(refs["dinov2"]).weights and before.startswith("sha256:")
    state = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"})
    assert load_model(f"hf:{folder}").weights != before


def test_shards_of_weights_are_read_and_named_together(refs: dict[str, str], tmp_path: Path) -> None:
    model = transformers.Dinov2Model.from_pretrained(refs["dinov2"].removeprefix("hf:"))
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded, whole = load_model(f"hf:{tmp_path}"), load_model(refs["dinov2"])
    own = whole.module.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in loaded.module.state_dict().items())
    assert loaded.weights.startswith("sha256:") and loaded.weights != whole.weights


def test_weights_that_are_missing_are_never_random_in_silence(refs: dict[str, str], tmp_path: Path) -> None:
    folder = copy_of(refs["vit"], tmp_path)
    state = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in state.items() if "classifier" not in n}, folder / "model.safetensors", {"format": "pt"})
    message = error_of(f"hf:{folder}")
    assert f"the weights of hf:{folder} do not fill ViTForImageClassification\n" in message
    assert "missing (2): classifier.bias, classifier.weight" in message and "--allow-missing classifier" in message
    loaded = load_model(f"hf:{folder}", options=ModelOptions(allow_missing=("classifier",)))
    assert loaded.random_paths == ("classifier",) and loaded.weights.endswith("; random (seed 0): classifier")
    again = load_model(f"hf:{folder}", options=ModelOptions(allow_missing=("classifier",)))
    assert torch.equal(
        loaded.module.get_parameter("classifier.weight"), again.module.get_parameter("classifier.weight")
    )


def test_half_precision_in_the_file_is_computed_in_single_and_said(tmp_path: Path) -> None:
    MODELS["dinov2"]().half().save_pretrained(tmp_path)
    loaded = load_model(f"hf:{tmp_path}")
    assert {parameter.dtype for parameter in loaded.module.parameters()} == {torch.float32}
    assert f"hf:{tmp_path}: float16 in the file, float32 in the model" in loaded.notes


def test_a_file_of_weights_is_loaded_into_the_configuration(refs: dict[str, str], tmp_path: Path) -> None:
    state = load_model(refs["dinov2"], "none", ModelOptions(seed=9)).module.state_dict()
    save_file({f"model.{name}": tensor.contiguous() for name, tensor in state.items()}, tmp_path / "w.safetensors")
    loaded = load_model(refs["dinov2"], str(tmp_path / "w.safetensors"))
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.module.state_dict().items())
    assert "without model." in loaded.weights


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_is_read_without_running_its_code(refs: dict[str, str], tmp_path: Path) -> None:
    folder, mark = copy_of(refs["dinov2"], tmp_path), tmp_path / "it ran"
    state: dict[str, Any] = dict(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert torch.equal(load_model(f"hf:{folder}").module.get_parameter("layernorm.weight"), state["layernorm.weight"])
    torch.save({**state, "extra": Malicious(mark)}, folder / "pytorch_model.bin")
    assert "cannot be loaded as Dinov2Model" in error_of(f"hf:{folder}")
    assert not mark.exists()


# --- images --------------------------------------------------------------------------------------------------------


def test_images_are_prepared_by_the_model_s_own_processor(refs: dict[str, str], photos: Path) -> None:
    loaded = load_model(refs["dinov2"])
    processor = transformers.AutoImageProcessor.from_pretrained(refs["dinov2"].removeprefix("hf:"))
    custom = loaded.preprocessing.custom
    assert custom.startswith("BitImageProcessor") and json.loads(custom.partition(": ")[2])["size"] == {
        "shortest_edge": 64
    }
    for file in sorted(photos.rglob("*.jpg"))[:3]:
        with Image.open(file) as image:
            rgb = image.convert("RGB")
            expected: Tensor = processor(images=rgb, return_tensors="pt")["pixel_values"][0]
            assert loaded.transform is not None and torch.equal(loaded.transform(rgb), expected)


def test_a_run_stores_what_the_processor_and_the_model_give_for_every_image(
    refs: dict[str, str], thumbnails: Path, tmp_path: Path
) -> None:
    layers = ["encoder/last_hidden_state", "./pooler_output"]
    extract(refs["dinov2"], layers, thumbnails, out=tmp_path / "out", batch_size=8, workers=2)
    features, loaded = open_features(tmp_path / "out"), load_model(refs["dinov2"])
    assert loaded.transform is not None
    pixels = []
    for key in features.keys_of_rows[:8]:
        with Image.open(thumbnails / key) as image:
            pixels.append(loaded.transform(image.convert("RGB")))
    expected = Runner.of(loaded.module, loaded.forward).run(torch.stack(pixels)).pooler_output
    assert torch.equal(features["./pooler_output"][0:8], expected)
    with pytest.raises(UsageError):
        extract(refs["dinov2"], layers, thumbnails, out=tmp_path / "other", resize=70)


def test_without_a_processor_what_is_assumed_is_said(tmp_path: Path) -> None:
    loaded = load_model(save(tmp_path, "vit", processor=False))
    assert loaded.transform is None and loaded.preprocessing.crop_px == 56
    assert f"hf:{tmp_path} has no image processor: assumed ImageNet's mean and std" in loaded.notes[0]


def test_a_processor_whose_images_have_several_shapes_is_refused(tmp_path: Path) -> None:
    ref = save(tmp_path, "vit", processor=False)
    transformers.DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(tmp_path)
    message = error_of(ref)
    assert message == "DetrImageProcessor returns images of 64 x 85 and 106 x 64 pixels; a batch needs a single size"
    given = ModelOptions(transform="python:torchvision.models:ResNet18_Weights.DEFAULT.transforms")
    assert load_model(ref, options=given).preprocessing.resize_px == 256


# --- what is not a model of images ------------------------------------------------------------------------------------


def test_of_a_model_of_images_and_texts_it_is_the_vision_tower_and_that_is_said(refs: dict[str, str]) -> None:
    loaded = load_model(refs["clip"])
    assert type(loaded.module).__name__ == "CLIPVisionModel"
    used = f"{refs['clip']} takes images and texts; used its vision tower, CLIPVisionModel"
    assert loaded.notes[0] == f"{used}; its image embedding is the layer image_embeds"
    assert "text_model (" in loaded.notes[1] and "logit_scale (1 tensor)" in loaded.notes[1]
    tower = transformers.CLIPVisionModel.from_pretrained(refs["clip"].removeprefix("hf:"))
    loaded_parameters = dict(loaded.module.named_parameters())
    assert all(torch.equal(parameter, loaded_parameters[name]) for name, parameter in tower.named_parameters())


def test_a_model_of_texts_is_refused(refs: dict[str, str]) -> None:
    assert "(BertModel) takes input_ids; hookx gives a model images only" in error_of(refs["bert"])
    with pytest.raises(ModelError, match="takes input_ids"):
        skeleton(refs["bert"])


def test_folders_that_hold_no_model_are_errors(refs: dict[str, str], tmp_path: Path) -> None:
    assert error_of("hf:./no-such-folder") == (
        "there is no folder 'no-such-folder'\n  name a folder that model.save_pretrained(...) wrote"
    )
    assert f"there is no config.json in '{tmp_path}'" in error_of(f"hf:{tmp_path}")
    folder = copy_of(refs["vit"], tmp_path)
    (folder / "model.safetensors").unlink()
    assert f"there are no weights in '{folder}': none of model.safetensors, " in error_of(f"hf:{folder}")
    shutil.copy(folder / "config.json", folder / "model.safetensors")
    assert "cannot be loaded as ViTForImageClassification: " in error_of(f"hf:{folder}")
    (folder / "config.json").write_text('{"model_type": "unheard_of"}')
    message = error_of(f"hf:{folder}")
    assert f"transformers {transformers.__version__} does not know the model hf:{folder}: " in message
    (folder / "config.json").write_text("{")
    assert "does not know the model" in error_of(f"hf:{folder}")
    # Code of the repository's own is never run, and nobody is asked whether it should be.
    (folder / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}')
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'it ran')!r}, 'w')")
    assert "--model path/to/file.py:factory" in error_of(f"hf:{folder}") and not (tmp_path / "it ran").exists()


def test_other_weights_and_arguments_than_there_are_are_errors(refs: dict[str, str]) -> None:
    assert "has no weights 'IMAGENET1K_V1'; it has: default\n" in error_of(refs["vit"], "IMAGENET1K_V1")
    assert "takes no argument 'width'; closest: attn_implementation" in error_of(refs["vit"], model_args={"width": "1"})
    with pytest.raises(ModelError, match="cannot be listed: only torchvision, timm and open_clip have a list"):
        list_models("hf:*")


# --- the hub -------------------------------------------------------------------------------------------------------


def test_a_model_of_the_hub_is_named_by_its_commit_and_taken_from_the_cache_afterwards(
    refs: dict[str, str], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(refs["dinov2"].removeprefix("hf:"), tmp_path / "hub" / "somebody" / "dinov2-tiny")
    with hub(tmp_path / "hub", monkeypatch):
        bare = skeleton("hf:somebody/dinov2-tiny")
        assert not list(cache.rglob("model.safetensors"))  # The layers are known without the weights.
        first = load_model("hf:somebody/dinov2-tiny")
    assert first.weights == f"hf:somebody/dinov2-tiny@{COMMIT}" and first.transform is not None
    assert bare.preprocessing == first.preprocessing == load_model(refs["dinov2"]).preprocessing
    for ref in ("hf:somebody/dinov2-tiny", f"hf:somebody/dinov2-tiny@{COMMIT}"):
        again = load_model(ref)  # There is no hub any more.
        own = again.module.state_dict()
        assert again.weights == first.weights
        assert all(torch.equal(tensor, own[name]) for name, tensor in first.module.state_dict().items())


def test_names_that_the_hub_does_not_know_are_errors(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hub" / "somebody" / "empty").mkdir(parents=True)
    (tmp_path / "hub" / "somebody" / "empty" / "README.md").touch()
    with hub(tmp_path / "hub", monkeypatch):
        message = error_of("hf:facebook/dinov3-smal")
        assert "the Hugging Face hub has no repository 'facebook/dinov3-smal', or it is private\n" in message
        assert "its authors ask you to accept their terms first\n" in error_of("hf:somebody/gated")
        assert "the repository somebody/empty has none of the files config.json" in error_of("hf:somebody/empty")
    assert "'a/b/c' is not a valid repository name on the Hugging Face hub" in error_of("hf:a/b/c")


def test_without_a_network_the_error_comes_after_one_attempt_and_says_what_will_do(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with broken_hub(monkeypatch) as requested:
        message = error_of("hf:facebook/dinov2-small")
    assert len(requested) == 1  # The hub's own library retries for 23 seconds and more.
    assert message.startswith(
        "config.json for hf:facebook/dinov2-small is not in the cache and could not be downloaded: "
    )
    assert message.endswith("use a folder that save_pretrained wrote: --model hf:./folder")


def test_without_transformers_the_error_names_the_extra() -> None:
    program = (
        "import sys; sys.modules['transformers'] = None; sys.argv = ['hookx', 'list-layers', 'hf:owner/name']\n"
        "from hookx.cli import main; main()"
    )
    done = subprocess.run([*warm.python("torch"), "-c", program], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        "error: models of Hugging Face need transformers, which is not installed\n"
        "  install it as an extra of hookx: pip install 'hookx-vision[transformers]'\n"
    )
