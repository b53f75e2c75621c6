"""Which tokens stand for places of the image: proved for what attends, and for nothing else."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from hookx.capture.patches import prove_patches
from hookx.capture.probe import example_images, probe
from hookx.capture.runner import Runner
from hookx.layers.reductions import Patches

timm = pytest.importorskip("timm")


def proved(model: nn.Module, path: str, size_px: tuple[int, int] = (64, 64)) -> Patches | None:
    runner = Runner.of(model.eval())
    images_NCHW = nn.functional.interpolate(example_images(runner, 64), size_px)
    [layer] = prove_patches(runner, images_NCHW, probe(runner, images_NCHW, paths=[path]))
    return layer.calls[0].outputs[0].patches


def grid(height: int, width: int, before: int = 0) -> Patches:
    count = height * width
    return Patches(height, width, tuple(range(before, before + count)), before + count)


@pytest.mark.parametrize(
    ("name", "options", "path", "expected"),
    [
        ("vit_tiny_patch16_224", {}, "blocks.0", grid(4, 4, before=1)),
        ("vit_tiny_patch16_224", {}, "norm", grid(4, 4, before=1)),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, "blocks.11", grid(4, 4)),
        ("vit_small_patch16_dinov3", {}, "blocks.11", grid(4, 4, before=5)),
        ("deit_tiny_distilled_patch16_224", {}, "blocks.11", grid(4, 4, before=2)),
        ("vit_base_patch16_siglip_224", {"depth": 2}, "blocks.1", grid(4, 4)),
        ("beit_base_patch16_224", {"depth": 2}, "blocks.1", grid(4, 4, before=1)),
        ("swin_tiny_patch4_window7_224", {"window_size": 2}, "layers.1", grid(8, 8)),
    ],
)
def test_the_patches_of_transformers_are_proved(
    name: str, options: dict[str, object], path: str, expected: Patches
) -> None:
    model = timm.create_model(name, img_size=64, **options)
    assert proved(model, path) == expected


def test_the_grid_of_an_image_that_is_not_square_is_not_square() -> None:
    assert proved(timm.create_model("vit_tiny_patch16_224", img_size=(64, 96)), "norm", (64, 96)) == grid(
        4, 6, before=1
    )


def test_tokens_in_another_order_are_put_row_by_row() -> None:
    patches = proved(timm.create_model("hiera_tiny_224", img_size=64), "blocks.0")
    assert patches is not None and (patches.height, patches.width) == (16, 16)
    assert sorted(patches.tokens) == list(range(256)) and list(patches.tokens) != list(range(256))


def test_models_of_transformers_and_torchvision_are_proved_as_well() -> None:
    transformers = pytest.importorskip("transformers")
    small = {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 3, "image_size": 64, "patch_size": 16}
    for attention in ("eager", "sdpa"):
        config = transformers.Dinov2WithRegistersConfig(**small, attn_implementation=attention)
        assert proved(transformers.Dinov2WithRegistersModel(config), "layernorm") == grid(4, 4, before=5)
    from torchvision.models import vit_b_32

    assert proved(vit_b_32(image_size=64), "encoder.ln") == grid(2, 2, before=1)


class Sequence(nn.Module):
    """A transformer of one block, and what is done to its tokens before and after it."""

    def __init__(self, before: nn.Module | None = None, after: nn.Module | None = None, tokens: int = 16) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 24, 16, 16)
        self.places = nn.Parameter(torch.randn(1, tokens, 24))
        self.before, self.after = before or nn.Identity(), after or nn.Identity()
        self.block = nn.TransformerEncoderLayer(24, 2, 48, batch_first=True)

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        tokens = self.before(self.embed(pixels_NCHW).flatten(2).mT)
        return self.after(self.block(tokens + self.places))


class Put(nn.Module):
    """Puts tokens that stand for nothing before or behind the others."""

    def __init__(self, before: int, behind: int) -> None:
        super().__init__()
        self.before, self.behind = (nn.Parameter(torch.randn(1, count, 24)) for count in (before, behind))

    def forward(self, tokens: Tensor) -> Tensor:
        count = len(tokens)
        return torch.cat([self.before.expand(count, -1, -1), tokens, self.behind.expand(count, -1, -1)], 1)


class Index(nn.Module):
    """Reorders, drops or repeats tokens."""

    def __init__(self, *tokens: int) -> None:
        super().__init__()
        self.tokens = list(tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, self.tokens]


class Mix(nn.Module):
    """Mixes tokens, without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(16, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.mix(tokens.mT).mT


def test_tokens_that_stand_for_nothing_may_be_anywhere() -> None:
    for before, behind in itertools.product((0, 1, 3), (0, 1, 2)):
        patches = proved(Sequence(Put(before, behind), tokens=16 + before + behind), "block")
        assert patches is not None and patches.tokens == tuple(range(before, before + 16))
        assert len(patches.others) == before + behind


def test_each_layer_is_proved_by_itself() -> None:
    order = [5, 3, 0, 15, *(number for number in range(16) if number not in (0, 3, 5, 15))]
    shuffled = Sequence(after=Index(*order))
    assert proved(shuffled, "block") == grid(4, 4)
    patches = proved(shuffled, "after")
    assert patches is not None and [order[token] for token in patches.tokens] == list(range(16))


@pytest.mark.parametrize(
    "after",
    [Mix(), Index(*range(15), 14), Index(*range(15)), Index(*range(16), 3)],
    ids=["mixed", "one twice in place of another", "one dropped", "one repeated"],
)
def test_nothing_is_proved_of_tokens_that_do_not_each_follow_one_patch(after: nn.Module) -> None:
    model = Sequence(after=after)
    assert proved(model, "after") is None and proved(model, "block") == grid(4, 4)


def test_models_that_mix_without_attention_are_not_proved() -> None:
    assert proved(timm.create_model("mixer_s32_224", img_size=64), "blocks.3") is None


def test_the_proof_leaves_the_model_as_it_was() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=64).eval()
    before, pixels_NCHW = {name: value.clone() for name, value in model.state_dict().items()}, torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        expected = model(pixels_NCHW)
        proved(model, "norm")
        assert torch.equal(model(pixels_NCHW), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
