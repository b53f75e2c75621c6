"""--size and --fit: a model at another size is what its own library makes of it, with that library's pixels."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models as zoo
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

from hookx.errors import CaptureError, ModelError, UsageError
from hookx.models import LoadedModel, ModelOptions, load_model, skeleton
from hookx.models.preprocessing import sides_px
from hookx.models.processors import _as_preprocessing
from hookx.options import Fit
from hookx.run.prepare import prepare
from kit.second_route import input_of

timm = pytest.importorskip("timm", reason="the extra timm is not installed")
transformers = pytest.importorskip("transformers", reason="the extra transformers is not installed")
from huggingface_hub import constants  # noqa: E402


def noise(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def run(loaded: LoadedModel, pixels_NCHW: Tensor) -> Tensor:
    with torch.inference_mode():
        output = loaded.forward(pixels_NCHW)
    return output if isinstance(output, Tensor) else output.last_hidden_state


def error_of(ref: str, weights: str = "none", **options: Any) -> str:
    with pytest.raises((ModelError, UsageError)) as caught:
        load_model(ref, weights, ModelOptions(**options))
    return str(caught.value)


def file_of(folder: Path, module: nn.Module) -> str:
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, folder / "w.safetensors")
    return str(folder / "w.safetensors")


# --- timm ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lay out random weights of a timm model in a cache of the hub, where its published ones would be."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")

    def put(name: str) -> Path:
        torch.manual_seed(5)
        repository = tmp_path / "cache" / f"models--timm--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("a" * 40)
        folder = repository / "snapshots" / ("a" * 40)
        folder.mkdir(parents=True)
        state = timm.create_model(name.partition(".")[0]).state_dict()
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "model.safetensors")
        return folder / "model.safetensors"

    return put


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", (96, 96)),
        ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", (128, 64)),
        ("deit3_small_patch16_224.fb_in1k", (160, 96)),
        ("swin_tiny_patch4_window7_224.ms_in1k", (256, 192)),
        ("xcit_nano_12_p16_224.fb_in1k", (96, 64)),
        ("resnet10t.c3_in1k", (96, 64)),
    ],
)
def test_a_model_of_timm_at_a_size_is_timms_own_with_resized_position_embeddings(
    name: str, size: tuple[int, int], published: Any
) -> None:
    file = published(name)
    loaded = load_model(f"timm:{name}", options=ModelOptions(size=size))
    arguments = {} if name.startswith("resnet") else {"img_size": size}
    overlay = {"file": str(file), "custom_load": False}
    own = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments).eval()
    with torch.inference_mode():
        assert torch.equal(run(loaded, noise(*size)), own(noise(*size)))
    assert loaded.preprocessing.size_px == size and loaded.preprocessing.size == f"{size[0]}x{size[1]}"
    assert loaded.weights == f"timm:{name}"  # The size stands in the plan's preprocessing.


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "coat_lite_medium_384.in1k"])
@pytest.mark.parametrize("size", [(320, 320), (256, 128)])
def test_the_preprocessing_at_a_size_is_timms_own_bit_for_bit(name: str, size: tuple[int, int], photos: Path) -> None:
    bare = skeleton(f"timm:{name}", "none", ModelOptions(size=size))
    config = timm.get_pretrained_cfg(name).to_dict()
    own = timm.data.resolve_data_config({"input_size": (3, *size)}, pretrained_cfg=config)
    transform = timm.data.create_transform(**own, is_training=False)
    assert bare.preprocessing.size_px == size
    for file in sorted(photos.rglob("*.jpg"))[:2]:
        with Image.open(file) as image:
            expected = transform(image.convert("RGB"))
            made = bare.transform(image.convert("RGB")) if bare.transform else input_of(file, bare.preprocessing)
        assert torch.equal(made, expected)


def test_a_fit_takes_the_place_of_timms_crop_mode(photos: Path) -> None:
    bare = skeleton("timm:coat_lite_medium_384.in1k", "none", ModelOptions(fit="crop"))
    config = timm.get_pretrained_cfg("coat_lite_medium_384.in1k").to_dict()
    own = timm.data.resolve_data_config({"crop_mode": "center"}, pretrained_cfg=config)
    transform = timm.data.create_transform(**own, is_training=False)
    file = photos / "animals" / "chelsea.jpg"
    with Image.open(file) as image:
        assert bare.transform is None and torch.equal(input_of(file, bare.preprocessing), transform(image))
    assert str(skeleton("timm:coat_lite_medium_384.in1k", "none", ModelOptions(fit="pad")).preprocessing).startswith(
        "resize within 384 x 384 (bicubic), pad with the mean"
    )


def test_the_own_size_of_a_model_changes_nothing() -> None:
    for ref in ("timm:vit_tiny_patch16_224", "resnet18", "vit_b_32"):
        for options in (ModelOptions(size=224), ModelOptions(size="224x224", fit="crop")):
            assert skeleton(ref, "none", options).preprocessing == skeleton(ref, "none").preprocessing


def test_a_size_and_an_argument_that_differ_are_refused() -> None:
    message = error_of("timm:vit_tiny_patch16_224", size=96, model_args={"img_size": "128"})
    assert ": --size 96x96 and --model-arg img_size=128 differ\n  give one of them" in message
    same = ModelOptions(size=96, model_args={"img_size": "96"})
    assert load_model("timm:vit_tiny_patch16_224", "none", same).preprocessing.size_px == (96, 96)
    dynamic = ModelOptions(size=(96, 64), model_args={"dynamic_img_size": "true"})
    module: Any = load_model("timm:vit_tiny_patch16_224", "none", dynamic).module
    assert module.patch_embed.img_size == (224, 224) and module(noise(96, 64)).shape == (2, 1000)


def test_a_size_that_a_model_of_timm_cannot_have_is_an_error() -> None:
    message = error_of("timm:nest_tiny", size=(256, 128))
    assert message.startswith("timm:nest_tiny cannot be built with img_size=(256, 128): ")
    assert message.endswith("\n  try another --size")


# --- torchvision -----------------------------------------------------------------------------------------------------


def small_vit(side_px: int, seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    return VisionTransformer(side_px, 32, 12, 12, 768, 3072).eval()  # vit_b_32


@pytest.mark.parametrize(("ref", "size"), [("resnet18", (96, 64)), ("squeezenet1_1", (80, 80)), ("swin_t", (96, 64))])
def test_a_model_of_torchvision_that_takes_any_size_is_the_same_model(ref: str, size: tuple[int, int]) -> None:
    loaded = load_model(ref, "none", ModelOptions(size=size))
    torch.manual_seed(0)
    own = zoo.get_model(ref).eval()
    with torch.inference_mode():
        assert torch.equal(run(loaded, noise(*size)), own(noise(*size)))
    assert loaded.preprocessing.size_px == size
    native = skeleton(ref, "none").preprocessing
    share = native.resize_px / native.crop_px
    assert loaded.preprocessing.covered_px == (round(size[0] * share), round(size[1] * share))


def test_the_position_embeddings_of_a_vision_transformer_are_resized_on_request(tmp_path: Path) -> None:
    file = file_of(tmp_path, small_vit(224))
    message = error_of("vit_b_32", file, size=96)
    assert message == (
        "the weights of vit_b_32 have position embeddings for images of 224x224, not 96x96\n"
        "  resize them, as torchvision's interpolate_embeddings does: --resize-positions"
    )
    loaded = load_model("vit_b_32", file, ModelOptions(size=96, resize_positions=True))
    own = small_vit(96)
    own.load_state_dict(interpolate_embeddings(96, 32, small_vit(224).state_dict()))
    with torch.inference_mode():
        assert torch.equal(run(loaded, noise(96, 96)), own(noise(96, 96)))
    assert "vit_b_32: position embeddings resized from 49 to 9 patches" in loaded.notes
    bare = skeleton("vit_b_32", file, ModelOptions(size=96, resize_positions=True))
    assert bare.module.get_parameter("encoder.pos_embedding").shape == (1, 10, 768)


def test_published_weights_of_a_vision_transformer_are_resized_too(monkeypatch: pytest.MonkeyPatch) -> None:
    entry: Any = zoo.ViT_B_32_Weights.IMAGENET1K_V1
    state = small_vit(224, seed=4).state_dict()
    monkeypatch.setattr(type(entry), "get_state_dict", lambda *_, **__: dict(state))  # It would download them.
    assert "--resize-positions" in error_of("vit_b_32", "default", size=96)
    assert "or take weights for that size: --weights IMAGENET1K_SWAG_E2E_V1" in error_of(
        "vit_b_16", "default", size=384
    )
    loaded = load_model("vit_b_32", "default", ModelOptions(size=96, resize_positions=True))
    own = small_vit(96)
    own.load_state_dict(interpolate_embeddings(96, 32, small_vit(224, seed=4).state_dict()))
    with torch.inference_mode():
        assert torch.equal(run(loaded, noise(96, 96)), own(noise(96, 96)))
    assert loaded.weights == "ViT_B_32_Weights.IMAGENET1K_V1"


def test_weights_that_already_have_the_size_need_no_request(tmp_path: Path) -> None:
    file = file_of(tmp_path, small_vit(96))
    loaded = load_model("vit_b_32", file, ModelOptions(size=96))
    with torch.inference_mode():
        assert torch.equal(run(loaded, noise(96, 96)), small_vit(96)(noise(96, 96)))


@pytest.mark.parametrize(
    ("ref", "size", "expected"),
    [
        ("vit_b_32", (96, 64), "vit_b_32 takes square images, not 96x64\n  try a model of timm"),
        ("vit_b_32", 100, "vit_b_32 cannot be built for images of 100x100: Input shape indivisible by patch size!\n"),
        ("maxvit_t", 300, "maxvit_t cannot be built for images of 300x300: Input size (75, 75) of block 0 is not"),
        ("ssdlite320_mobilenet_v3_large", 96, "ssdlite320_mobilenet_v3_large resizes images itself, so --size cannot"),
    ],
)
def test_a_size_that_a_model_of_torchvision_cannot_have_is_an_error(ref: str, size: Any, expected: str) -> None:
    assert error_of(ref, size=size).startswith(expected)


def test_maxvit_is_built_for_the_size() -> None:
    loaded = load_model("maxvit_t", "none", ModelOptions(size=448))
    torch.manual_seed(0)
    own = zoo.maxvit_t(input_size=(448, 448)).eval()
    with torch.inference_mode():
        assert torch.equal(run(loaded, noise(448, 448)[:1]), own(noise(448, 448)[:1]))


def test_a_model_that_fails_at_a_size_says_what_to_do(thumbnails: Path, tmp_path: Path) -> None:
    with pytest.raises(CaptureError) as caught:
        prepare("inception_v3", "fc", thumbnails, weights="none", size=32, out=tmp_path / "out")
    assert "the model fails on a batch of images" in str(caught.value)
    assert str(caught.value).endswith("inception_v3 may not take images of 32x32: try another --size, or leave it out")


# --- transformers ----------------------------------------------------------------------------------------------------

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VISION = {**TINY, "image_size": 56, "patch_size": 14}
SQUASHING = {"size": {"height": 56, "width": 56}}
CROPPING = {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}}


def save_vit(folder: Path, **sizes: Any) -> str:
    torch.manual_seed(3)
    transformers.ViTModel(transformers.ViTConfig(**VISION)).save_pretrained(folder)
    kind = transformers.CLIPImageProcessor if "crop_size" in sizes else transformers.ViTImageProcessor
    kind(**sizes).save_pretrained(folder)
    return f"hf:{folder}"


@pytest.mark.parametrize("size", [(112, 112), (84, 42)])
def test_a_model_of_transformers_at_a_size_is_its_own_call_with_interpolated_positions(
    size: tuple[int, int], tmp_path: Path
) -> None:
    ref = save_vit(tmp_path, **SQUASHING)
    loaded = load_model(ref, options=ModelOptions(size=size))
    own = transformers.ViTModel.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        expected = own(pixel_values=noise(*size), interpolate_pos_encoding=True).last_hidden_state
    assert torch.equal(run(loaded, noise(*size)), expected)
    assert loaded.preprocessing.size_px == size and loaded.preprocessing.size == f"{size[0]}x{size[1]}"
    assert loaded.weights == load_model(ref).weights


def test_the_image_embedding_at_a_size_is_transformers_own(tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = transformers.CLIPConfig(text_config=TINY, vision_config=VISION, projection_dim=16)
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    loaded = load_model(f"hf:{tmp_path}", options=ModelOptions(size=(84, 112)))
    found: list[Tensor] = []
    module: Any = loaded.module
    module.image_embeds.register_forward_hook(lambda _module, _inputs, output: found.append(output))
    with torch.inference_mode():
        loaded.forward(noise(84, 112))
        own = model.get_image_features(pixel_values=noise(84, 112), interpolate_pos_encoding=True)
    assert torch.equal(found[0], own if isinstance(own, Tensor) else own.pooler_output)


@pytest.mark.parametrize(
    ("sizes", "size", "changed"),
    [
        (SQUASHING, (84, 42), {"size": {"height": 84, "width": 42}}),
        (CROPPING, (112, 112), {"size": {"shortest_edge": 128}, "crop_size": {"height": 112, "width": 112}}),
    ],
)
def test_the_pixels_at_a_size_are_the_processor_s_own(
    sizes: dict[str, Any], size: tuple[int, int], changed: dict[str, Any], tmp_path: Path, photos: Path
) -> None:
    bare = skeleton(save_vit(tmp_path, **sizes), options=ModelOptions(size=size))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    with Image.open(photos / "animals" / "chelsea.jpg") as image:
        expected = processor(images=image, return_tensors="pt", **changed)["pixel_values"][0]
        assert bare.transform is not None and torch.equal(bare.transform(image), expected)
    assert bare.preprocessing.custom and bare.preprocessing.size_px == size


@pytest.mark.parametrize(("sizes", "own_fit"), [(SQUASHING, "squash"), (CROPPING, "crop")])
def test_a_fit_that_is_not_the_processor_s_is_made_by_hookx_with_its_numbers(
    sizes: dict[str, Any], own_fit: Fit, tmp_path: Path
) -> None:
    ref = save_vit(tmp_path, **sizes)
    assert skeleton(ref, options=ModelOptions(fit=own_fit)).preprocessing == skeleton(ref).preprocessing
    settings = transformers.AutoImageProcessor.from_pretrained(tmp_path).to_dict()
    others: set[Fit] = {"crop", "squash", "pad"}
    for fit in others - {own_fit}:
        prepared = skeleton(ref, options=ModelOptions(fit=fit)).preprocessing
        assert prepared.custom == "" and prepared.fit == fit and prepared.size_px == (56, 56)
        assert prepared.mean == tuple(settings["image_mean"]) and prepared.std == tuple(settings["image_std"])
        assert prepared.interpolation == ("bicubic" if own_fit == "crop" else "bilinear")
    tall = skeleton(ref, options=ModelOptions(size=(84, 42), fit="crop")).preprocessing
    assert str(tall).startswith("resize to cover " + ("96 x 48" if own_fit == "crop" else "84 x 42"))


# --- other sources ---------------------------------------------------------------------------------------------------


def test_a_model_of_one_s_own_gets_the_size_and_an_input_that_is_not_square(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1))\n"
        "    net.image_size = (40, 24)\n"
        "    return net\n"
    )
    ref = f"{tmp_path / 'net.py'}:make"
    assert str(load_model(ref).preprocessing).startswith("resize to cover 46 x 27 (bilinear), crop 40 x 24, ")
    sized = load_model(ref, options=ModelOptions(size=32, fit="squash")).preprocessing
    assert str(sized).startswith("squash to 32 x 32 (bilinear), ") and sized.size == "32x32"


def test_a_transform_of_one_s_own_decides_the_size(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "from torchvision.transforms.functional import pil_to_tensor\n"
        "def prepare():\n"
        "    return lambda image: pil_to_tensor(image.resize((24, 40))).float()\n"
    )
    transform = f"{tmp_path / 'net.py'}:prepare"
    loaded = load_model("resnet18", "none", ModelOptions(transform=transform))
    assert loaded.preprocessing.size_px == (40, 24)
    for options in ({"size": 64}, {"fit": "pad"}):
        message = error_of("resnet18", transform=transform, **options)
        flag = f"--{next(iter(options))}"
        assert f", which {flag} cannot change\n  leave out {flag}, or replace it with --transform" in message


def test_an_exported_program_that_is_not_square_is_taken(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1)).eval()
    program = torch.export.export(net, (torch.randn(2, 3, 40, 24),), dynamic_shapes=({0: torch.export.Dim("N")},))
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = load_model(str(tmp_path / "net.pt2"), options=ModelOptions(trust_checkpoint=True))
    assert loaded.preprocessing.size_px == (40, 24)


def test_sizes_are_read_however_a_library_writes_them() -> None:
    assert sides_px([3, 1024, 768], "net") == (1024, 768) == sides_px({"height": 1024, "width": 768}, "net")
    with pytest.raises(ModelError, match="net takes images of 0 pixels"):
        sides_px(0, "net")


# --- what contradicts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"size": 96, "crop": 64}, "--size 96x96 and --crop 64 both set the size of the input\n"),
        (
            {"size": (96, 64), "resize": 120},
            "--resize 120 is for square inputs, and this one is 96 x 64, height x width\n",
        ),
        ({"fit": "squash", "resize": 120}, "--resize 120 has no meaning for images that --fit squash brings to the "),
        ({"fit": "pad", "crop": 64}, "--crop 64 has no meaning for images that --fit pad brings to the input's size\n"),
        ({"size": 128, "resize": 96}, "--size 128 is larger than --resize 96\n  give both: --resize 256 --size 224"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(
    options: dict[str, Any], expected: str, thumbnails: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        prepare("resnet18", "fc", thumbnails, weights="none", out=tmp_path / "out", **options)
    assert str(caught.value).startswith(expected)
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.mark.parametrize(
    ("kind", "settings", "own_fit"),
    [
        ("CLIPImageProcessor", CROPPING, "crop"),
        ("SiglipImageProcessor", SQUASHING, "squash"),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 56}, "crop_pct": 0.875}, "crop"),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}, "crop_pct": 0.875}, "squash"),
    ],
)
def test_what_hookx_makes_in_place_of_a_processor_is_its_pixels_up_to_rounding(
    kind: str, settings: dict[str, Any], own_fit: str, photos: Path
) -> None:
    processor = getattr(transformers, kind)(**settings)
    plain, fit = _as_preprocessing(processor.to_dict())
    assert plain is not None and plain.fit == fit == own_fit
    file = photos / "animals" / "chelsea.jpg"
    with Image.open(file) as image:
        own = processor(images=image, return_tensors="pt")["pixel_values"][0]
    # Its tensors are resized in other steps than Pillow's images: by a level or two of 255.
    assert (input_of(file, plain) - own).abs().max() < 3 / 255 / min(plain.std)


def test_a_processor_that_does_more_is_not_imitated(tmp_path: Path) -> None:
    ref = save_vit(tmp_path, **SQUASHING)
    flipped = transformers.MobileViTImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56})
    twice = transformers.EfficientNetImageProcessor(size={"height": 56, "width": 56})
    for processor in (flipped, twice):
        assert _as_preprocessing(processor.to_dict()) == (None, "")
    flipped.save_pretrained(tmp_path)
    message = error_of(ref, "none", fit="pad")
    assert message.startswith("MobileViTImageProcessor does more than resize, crop and normalize images, so --fit pad ")
