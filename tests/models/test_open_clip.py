"""open_clip's models: the tower is `encode_image`, the preprocessing open_clip's own, the weights from the hub."""

from __future__ import annotations

import json
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from hookx.capture.runner import Runner
from hookx.errors import ModelError
from hookx.launch.extract import extract
from hookx.models import ModelOptions, list_models, load_model, may_run_code, skeleton, weights_of
from hookx.plan import Plan
from hookx.read.features import open_features
from kit import warm
from kit.hub import broken_hub, hub
from kit.second_route import captured_of, input_of

open_clip = pytest.importorskip("open_clip", reason="the extra open_clip is not installed")
from huggingface_hub import constants  # noqa: E402

# Architectures of the library's own code, small enough for a test: what each stands for -> its configuration.
TEXT = {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16}
SIGLIP = {**TEXT, "hf_tokenizer_name": "", "no_causal_mask": True, "pool_type": "last", "proj_bias": True}
TIMM = {"image_size": 64, "timm_proj": "linear", "timm_pool": "avg"}
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny-ViT": {"embed_dim": 24, "vision_cfg": VIT, "text_cfg": TEXT},
    "tiny-ViT-quickgelu": {"embed_dim": 24, "quick_gelu": True, "vision_cfg": VIT, "text_cfg": TEXT},
    "tiny-SigLIP": {
        "embed_dim": 32,
        "custom_text": True,
        "init_logit_bias": -10,
        "vision_cfg": {**VIT, "no_ln_pre": True, "pool_type": "tok"},
        "text_cfg": SIGLIP,
    },
    "tiny-CoCa": {
        "embed_dim": 32,
        "custom_text": True,
        "vision_cfg": {**VIT, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 2, "layers": 1},
    },
    "tiny-ResNet": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
        "text_cfg": TEXT,
    },
    "tiny-ConvNeXt": {
        "embed_dim": 24,
        "vision_cfg": {**TIMM, "timm_model_name": "convnext_atto", "timm_pool": "", "timm_drop": 0.0},
        "text_cfg": TEXT,
    },
    "tiny-EVA": {
        "embed_dim": 24,
        "custom_text": True,
        "vision_cfg": {"image_size": 224, "timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token"},
        "text_cfg": TEXT,
    },
}
TAGS = {"big_b1k": {}, "squashed": {"resize_mode": "squash", "interpolation": "bilinear", "mean": (0.5,) * 3}}
OPENAI = {"mean": open_clip.constants.OPENAI_DATASET_MEAN, "std": open_clip.constants.OPENAI_DATASET_STD}


@pytest.fixture(autouse=True)
def architectures(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Register the small architectures, with published weights in repositories of a hub, while a test lasts."""
    folder = tmp_path_factory.mktemp("configs")
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
        published = {
            tag: {"url": "", "hf_hub": f"somebody/{name}-{tag}/", "interpolation": "bicubic", **OPENAI, **more}
            for tag, more in TAGS.items()
        }
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, published)
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [*open_clip.factory._MODEL_CONFIG_PATHS, folder])
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    open_clip.factory._rescan_model_configs()
    yield


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache of the hub, and a hub that nobody answers for."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "cache"


def whole(name: str, seed: int = 3, **arguments: Any) -> Any:
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return open_clip.create_model(name, **arguments).eval()


def encode(model: Any, pixels_NCHW: Tensor) -> Tensor:
    with torch.inference_mode():
        return model.encode_image(pixels_NCHW, normalize=False)


def run(loaded: Any, pixels_NCHW: Tensor) -> Tensor:
    with torch.inference_mode():
        output = loaded.forward(pixels_NCHW)
    return output[0] if isinstance(output, tuple) else output


def noise(height: int = 64, width: int = 64) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def error_of(ref: str, weights: str = "default", **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(ref, weights, ModelOptions(**options))
    return str(caught.value)


# --- exact ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_the_output_of_a_tower_with_the_weights_of_a_file_is_encode_image(name: str, tmp_path: Path) -> None:
    model = whole(name)
    torch.save({"epoch": 1, "state_dict": {f"module.{n}": t for n, t in model.state_dict().items()}}, tmp_path / "w.pt")
    loaded = load_model(f"open_clip:{name}", str(tmp_path / "w.pt"))
    pixels_NCHW = noise(*loaded.preprocessing.size_px)
    assert torch.equal(run(loaded, pixels_NCHW), encode(model, pixels_NCHW))
    assert loaded.weights.startswith("sha256:") and not loaded.module.training
    bare = skeleton(f"open_clip:{name}", str(tmp_path / "w.pt"))
    assert {parameter.device.type for parameter in bare.module.parameters()} == {"meta"}
    assert [path for path, _ in bare.module.named_modules()] == [path for path, _ in loaded.module.named_modules()]


@pytest.mark.parametrize("name", ["tiny-ViT", "tiny-CoCa", "tiny-ConvNeXt"])
def test_every_activation_is_what_its_layer_returned(name: str) -> None:
    rows = captured_of(load_model(f"open_clip:{name}", "none"))
    assert len(rows) > 20
    assert rows["./0" if name == "tiny-CoCa" else "."].shape[1:] == (CONFIGS[name]["embed_dim"],)


@pytest.mark.parametrize("name", ["tiny-ViT", "tiny-SigLIP", "tiny-ResNet", "tiny-EVA"])
def test_no_weights_are_open_clips_own_after_the_seed(name: str) -> None:
    loaded = load_model(f"open_clip:{name}", "none", ModelOptions(seed=7))
    own = whole(name, 7).visual.state_dict()
    assert all(torch.equal(tensor, own[key]) for key, tensor in loaded.module.state_dict().items())
    assert loaded.weights == "random (seed 7)"


# --- preprocessing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("size", [None, 96])
def test_the_preprocessing_of_a_tag_is_open_clips_own_bit_for_bit(tag: str, size: int | None, photos: Path) -> None:
    bare = skeleton("open_clip:tiny-ViT", tag, ModelOptions(size=size))
    config = {**open_clip.get_pretrained_cfg("tiny-ViT", tag), "size": size or 64}
    own = open_clip.transform.merge_preprocess_dict(open_clip.transform.PreprocessCfg(), config)
    transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**own), is_train=False)
    assert bare.transform is None and bare.preprocessing.fit == ("squash" if tag == "squashed" else "crop")
    for file in sorted(photos.rglob("*.jpg"))[:3]:
        with Image.open(file) as image:
            assert torch.equal(input_of(file, bare.preprocessing), transform(image.convert("RGB")))


@pytest.mark.parametrize("name", ["tiny-ViT", "tiny-EVA"])
@pytest.mark.parametrize("size", [(96, 96), (112, 56)])
def test_at_another_size_a_tower_is_what_open_clip_makes_of_the_weights(
    name: str, size: tuple[int, int], tmp_path: Path
) -> None:
    size = (112, 168) if name == "tiny-EVA" else size if size[0] == size[1] else (96, 48)
    torch.save(whole(name).state_dict(), tmp_path / "w.pt")
    model = whole(name, pretrained=str(tmp_path / "w.pt"), force_image_size=size)
    if name == "tiny-EVA" and not hasattr(model.visual, "set_input_size"):
        pytest.skip("this open_clip leaves towers of timm at their own size")
    loaded = load_model(f"open_clip:{name}", str(tmp_path / "w.pt"), ModelOptions(size=size))
    assert loaded.preprocessing.size_px == size and loaded.preprocessing.size == f"{size[0]}x{size[1]}"
    assert torch.equal(run(loaded, noise(*size)), encode(model, noise(*size)))


# --- weights of the hub --------------------------------------------------------------------------------------------


def test_published_weights_come_from_the_hub_and_afterwards_from_the_cache(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thumbnails: Path
) -> None:
    ref, model = "open_clip:tiny-ViT/big_b1k", whole("tiny-ViT")
    folder = tmp_path / "hub" / "somebody" / "tiny-ViT-big_b1k"
    folder.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    assert weights_of(ref) == [("big_b1k", False)]
    with hub(tmp_path / "hub", monkeypatch):
        loaded = load_model(ref)
    assert loaded.weights == ref == loaded.name and weights_of(ref) == [("big_b1k", True)]
    assert torch.equal(run(loaded, noise()), encode(model, noise()))
    assert loaded.notes[0].startswith(f"left out of the weights of {ref}: ") and "token_embedding" in loaded.notes[0]
    # There is no hub any more.
    extract("open_clip:tiny-ViT", ".", thumbnails, weights="big_b1k", out=tmp_path / "out", batch_size=4, workers=1)
    plan = Plan.from_json((tmp_path / "out" / "plan.json").read_text())
    assert plan.model == plan.weights == ref and f"--model {ref} --layers ." in plan.command("out")
    features = open_features(tmp_path / "out")
    pixels = torch.stack([input_of(thumbnails / key, loaded.preprocessing) for key in features.keys_of_rows[:4]])
    expected = Runner.of(model, lambda batch: model.encode_image(batch)).run(pixels)
    assert torch.equal(features["."][0:4], expected)


def test_without_a_network_the_error_comes_after_one_attempt_and_says_what_will_do(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with broken_hub(monkeypatch) as requested:
        message = error_of("open_clip:tiny-ViT/big_b1k")
    assert len(requested) == 1
    assert message.startswith(
        "open_clip_model.safetensors for open_clip:tiny-ViT/big_b1k is not in the cache and could not "
    )
    assert message.endswith("use a file: --weights weights.safetensors    or random weights: --weights none")


def test_weights_trained_with_another_activation_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = {**open_clip.get_pretrained_cfg("tiny-ViT", "big_b1k"), "quick_gelu": True}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED["tiny-ViT"], "big_b1k", trained)
    assert skeleton("open_clip:tiny-ViT/big_b1k").notes == (
        "the weights big_b1k of open_clip:tiny-ViT were trained with QuickGELU, which it does not use: "
        "open_clip:tiny-ViT-quickgelu/big_b1k does",
    )
    assert skeleton("open_clip:tiny-ViT/squashed").notes == ()


# --- names ---------------------------------------------------------------------------------------------------------


def test_its_models_are_listed_with_their_tags_where_a_slash_asks_for_them() -> None:
    assert list_models("open_clip:ViT-B-32*")["open_clip:ViT-B-32"] == "open_clip"
    assert "open_clip:ViT-B-32/laion2b_s34b_b79k" in list_models("open_clip:ViT-B-32/*")
    assert [tag for tag, _ in weights_of("open_clip:tiny-ViT")] == list(TAGS)
    with pytest.raises(ModelError, match="no model of open_clip matches 'ViT-B-33'; closest: ViT-B-32"):
        list_models("open_clip:ViT-B-33")
    assert not may_run_code("open_clip:ViT-B-32/openai")


def test_a_name_that_does_not_exist_is_an_error_with_the_closest() -> None:
    message = error_of("open_clip:ViT-B-23")
    assert f"open_clip {open_clip.__version__} has no model 'ViT-B-23'; closest: open_clip:ViT-B-32" in message
    assert message.endswith("list them all: hookx list-models 'open_clip:*'")
    assert "open_clip:ViT-B-32 has no weights 'laion2b_s34b'; closest: laion2b" in error_of(
        "open_clip:ViT-B-32/laion2b_s34b"
    )
    assert "open_clip:tiny-ViT has no weights 'big'; it has: big_b1k, squashed\n" in error_of(
        "open_clip:tiny-ViT", "big"
    )
    assert "and --weights names squashed" in error_of("open_clip:tiny-ViT/big_b1k", "squashed")
    several = error_of("open_clip:tiny-ViT")
    assert "open_clip:tiny-ViT has several weights, and none is the default: big_b1k, squashed\n" in several
    assert "name one: --model open_clip:tiny-ViT/squashed" in several
    assert "has no published weights for open_clip:ViT-H-16" in error_of("open_clip:ViT-H-16")


def test_without_open_clip_the_error_names_the_extra() -> None:
    program = (
        "import sys; sys.modules['open_clip'] = None; sys.argv = ['hookx', 'list-layers', 'open_clip:ViT-B-32']\n"
        "from hookx.cli import main; main()"
    )
    done = subprocess.run([*warm.python("torch"), "-c", program], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        "error: models of open_clip need open_clip, which is not installed\n"
        "  install it as an extra of hookx: pip install 'hookx-vision[open_clip]'\n"
    )


def test_a_shell_completes_names_tags_and_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hookx.cli import completion

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "open_clip:tiny-ViT" in completion.models("open_clip:ti")
    assert list(completion.weights("open_clip:tiny-ViT", "")) == ["default", "none", *TAGS]
    assert "transformer.resblocks.1" in set(completion.layers("open_clip:tiny-ViT/big_b1k", "transformer.resblocks."))


def test_weights_that_are_not_on_the_hub_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = {**open_clip.get_pretrained_cfg("tiny-ViT", "big_b1k"), "hf_hub": "", "url": "https://host.test/w.pt"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED["tiny-ViT"], "big_b1k", elsewhere)
    assert weights_of("open_clip:tiny-ViT/big_b1k") == [("big_b1k", False)]
    message = error_of("open_clip:tiny-ViT/big_b1k")
    assert "has no file on the Hugging Face hub for open_clip:tiny-ViT/big_b1k\n" in message
