"""The image embedding of models of images and texts: transformers' own `get_image_features`, bit for bit."""

from __future__ import annotations

import re
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
from hookx.errors import LayerError, ModelError
from hookx.launch.extract import extract
from hookx.models import LoadedModel, ModelOptions, load_model, skeleton
from hookx.plan import Plan
from hookx.read.features import open_features
from kit import warm
from kit.second_route import captured_of

transformers = pytest.importorskip("transformers", reason="the extra transformers is not installed")

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VISION = {**TINY, "image_size": 56, "patch_size": 14}
TEXT = {**TINY, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PROJECTED = {"text_config": TEXT, "vision_config": VISION, "projection_dim": 16}
OPT = {"model_type": "opt", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 64}
GROUPS = {
    **{"image_size": 56, "patch_size": 14, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64},
    **{"depths": [2, 2, 2], "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 4]},
}
SIDE_PX = 56

FAMILIES: dict[str, Callable[[], Any]] = {
    "CLIP": lambda: transformers.CLIPModel(transformers.CLIPConfig(**PROJECTED)),
    "SigLIP": lambda: transformers.SiglipModel(transformers.SiglipConfig(text_config=TEXT, vision_config=VISION)),
    "ChineseCLIP": lambda: transformers.ChineseCLIPModel(transformers.ChineseCLIPConfig(**PROJECTED)),
    "AltCLIP": lambda: transformers.AltCLIPModel(
        transformers.AltCLIPConfig(**PROJECTED | {"text_config": {**TEXT, "project_dim": 32}})
    ),
    "BLIP": lambda: transformers.BlipModel(transformers.BlipConfig(**PROJECTED)),
    "BLIP-2": lambda: transformers.Blip2Model(
        transformers.Blip2Config(
            vision_config=VISION,
            qformer_config={**TEXT, "encoder_hidden_size": 32},
            text_config={**OPT, "vocab_size": 99, "word_embed_proj_dim": 32},
        )
    ),
    "ALIGN": lambda: transformers.AlignModel(
        transformers.AlignConfig(text_config=TEXT, vision_config={"image_size": SIDE_PX})
    ),
    "GroupViT": lambda: transformers.GroupViTModel(
        transformers.GroupViTConfig(**PROJECTED | {"vision_config": GROUPS})
    ),
    "FLAVA": lambda: transformers.FlavaModel(
        transformers.FlavaConfig(image_config=VISION, text_config=TEXT, multimodal_config=TINY, projection_dim=16)
    ),
}


def save(folder: Path, model: Any, *, processor: bool = True) -> str:
    model.save_pretrained(folder)
    if processor:
        sizes = {"size": {"shortest_edge": 64}, "crop_size": {"height": SIDE_PX, "width": SIDE_PX}}
        transformers.CLIPImageProcessor(**sizes).save_pretrained(folder)
    return f"hf:{folder}"


def made(name: str) -> Any:
    torch.manual_seed(3)
    return FAMILIES[name]().eval()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("clip"), made("CLIP"))


def embedding_of(loaded: LoadedModel, pixels_NCHW: Tensor) -> Tensor:
    module: Any = loaded.module
    with torch.inference_mode():
        return module.image_embeds(module(pixel_values=pixels_NCHW))


def own_embedding_of(model: Any, pixels_NCHW: Tensor) -> Tensor:
    with torch.inference_mode():
        returned = model.get_image_features(pixel_values=pixels_NCHW)
    return returned if isinstance(returned, Tensor) else returned.pooler_output


def noise(count: int = 2) -> Tensor:
    return torch.randn(count, 3, SIDE_PX, SIDE_PX, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_layer_image_embeds_is_the_model_s_own_image_embedding(name: str, tmp_path: Path) -> None:
    model = made(name)
    ref = save(tmp_path, model)
    loaded, bare = load_model(ref), skeleton(ref)
    expected = own_embedding_of(model, noise())
    assert torch.equal(embedding_of(loaded, noise()), expected) and expected.std() > 0
    assert loaded.notes[0].endswith("; its image embedding is the layer image_embeds")
    assert [path for path, _ in bare.module.named_modules()] == [path for path, _ in loaded.module.named_modules()]
    # A file of the whole model's weights holds the projection, too.
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    assert torch.equal(embedding_of(load_model(ref, str(tmp_path / "whole.pt")), noise()), expected)


def test_every_layer_of_the_tower_has_the_address_and_the_values_that_it_has_alone(clip: str) -> None:
    loaded = load_model(clip)
    tower = transformers.CLIPVisionModel.from_pretrained(clip.removeprefix("hf:")).eval()
    paths = [path for path, _ in loaded.module.named_modules()]
    behind = ["image_embeds", "image_embeds.visual_projection"]
    assert paths == [path for path, _ in tower.named_modules()] + behind
    rows, own = captured_of(loaded), captured_of(LoadedModel(**vars(loaded) | {"module": tower, "forward": tower}))
    assert own.keys() | {*behind, "image_embeds/in"} >= rows.keys() >= own.keys() - {"./in"}
    assert rows["image_embeds"].shape[1:] == (16,)
    assert all(torch.equal(rows[address], tensor) for address, tensor in own.items() if address in rows)


def test_a_run_stores_the_embedding_and_a_run_of_the_tower_keeps_its_fingerprint(
    clip: str, thumbnails: Path, tmp_path: Path
) -> None:
    paths = [path for path, _ in skeleton(clip).module.named_modules()]
    layers = ["./pooler_output", next(path for path in paths if path.endswith("encoder.layers.0.mlp"))]
    extract(clip, layers, thumbnails, out=tmp_path / "tower", batch_size=4, workers=1)
    before = Plan.from_json((tmp_path / "tower" / "plan.json").read_text())
    assert "image_embeds" not in before.to_json().partition('"notes"')[0]
    assert [layer.address for layer in before.layers] == layers

    extract(clip, "image_embeds", thumbnails, out=tmp_path / "out", batch_size=4, workers=1)
    features = open_features(tmp_path / "out")
    assert features.plan.layers[0].shape == (16,) and features.plan.weights == before.weights
    processor = transformers.AutoImageProcessor.from_pretrained(clip.removeprefix("hf:"))
    pixels = []
    for key in features.keys_of_rows[:4]:
        with Image.open(thumbnails / key) as image:
            pixels.append(processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0])
    model = transformers.CLIPModel.from_pretrained(clip.removeprefix("hf:")).eval()
    expected = Runner.of(model, lambda batch: own_embedding_of(model, batch)).run(torch.stack(pixels))
    assert torch.equal(features["image_embeds"][0:4], expected)


def test_list_layers_shows_the_embedding_behind_the_tower(clip: str) -> None:
    done = subprocess.run([*warm.python("torch"), "-m", "hookx", "list-layers", clip], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.match(r"image_embeds +ImageEmbeds +N,16 +512 ", lines[-2])
    assert re.match(r"image_embeds\.visual_projection +Linear +N,16 +512 ", lines[-1])


def test_the_weights_of_the_texts_are_never_loaded(clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[str] = []
    model_class = transformers.CLIPModel
    load = model_class.from_pretrained.__func__

    def watch(cls: Any, *arguments: Any, **keywords: Any) -> Any:
        found = load(cls, *arguments, **keywords)
        kept.extend(found[0].state_dict())
        return found

    monkeypatch.setattr(model_class, "from_pretrained", classmethod(watch))
    loaded = load_model(clip)
    assert kept == ["visual_projection.weight"]
    assert "text_model (36 tensors)" in loaded.notes[1] and "visual_projection" not in loaded.notes[1]


def test_random_weights_are_the_same_for_a_seed_and_those_of_the_tower_are_transformers_own(clip: str) -> None:
    one, two = (load_model(clip, "none", ModelOptions(seed=5)).module.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    torch.manual_seed(5)
    own = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)).state_dict()
    assert all(torch.equal(one[name], tensor) for name, tensor in own.items())
    assert one["image_embeds.visual_projection.weight"].std() > 0


def test_a_tower_alone_says_that_it_has_no_projection(tmp_path: Path, thumbnails: Path) -> None:
    torch.manual_seed(3)
    tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION))
    ref = save(tmp_path, tower)
    loaded = load_model(ref)
    note = f"{ref} is the vision tower of a CLIPModel alone: it has no projection, so no image_embeds"
    assert loaded.notes == (note,) and not hasattr(loaded.module, "image_embeds")
    with pytest.raises(LayerError) as caught:
        extract(ref, "image_embeds", thumbnails, out=tmp_path / "out")
    assert str(caught.value).startswith(f"no layer matches 'image_embeds' in {ref}") and str(caught.value).endswith(
        note
    )


def test_a_tower_that_needs_no_projection_has_the_embedding(tmp_path: Path) -> None:
    torch.manual_seed(3)
    tower = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION)).eval()
    loaded = load_model(save(tmp_path, tower))
    with torch.inference_mode():
        assert torch.equal(embedding_of(loaded, noise()), tower(pixel_values=noise()).pooler_output)


def test_weights_without_the_projection_give_the_tower_and_say_so(clip: str, tmp_path: Path) -> None:
    model = made("CLIP")
    ref = save(tmp_path, model)
    state = load_file(tmp_path / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = load_model(ref)
    assert not hasattr(loaded.module, "image_embeds")
    lacks = f"the weights of {ref} lack image_embeds.visual_projection.weight, so there is no image_embeds"
    assert lacks in loaded.notes
    tower = transformers.CLIPVisionModel.from_pretrained(tmp_path)
    save_file(dict(tower.state_dict()), tmp_path / "tower.safetensors")
    of_file = load_model(clip, str(tmp_path / "tower.safetensors"))
    assert not hasattr(of_file.module, "image_embeds")
    assert "tower.safetensors holds the vision tower without the projection: no image_embeds" in of_file.notes


def test_a_tower_that_takes_patches_of_many_shapes_is_refused(tmp_path: Path) -> None:
    vision = {**TINY, "patch_size": 14, "num_patches": 16}
    model = transformers.Siglip2Model(transformers.Siglip2Config(text_config=TEXT, vision_config=vision))
    ref = save(tmp_path, model)
    with pytest.raises(ModelError, match=r"takes patches of images of many shapes \(Siglip2VisionConfig, NaFlex\)"):
        skeleton(ref)
