"""Where the values of an activation lie is learnt from the model: nets whose places are known, by construction."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hookx.capture.runner import Runner
from hookx.capture.session import Capture
from hookx.errors import LayerError
from hookx.layers.address import Address
from hookx.models import load_model, skeleton
from hookx.pictures.places import LAYOUTS, Places, TokenGrid, find_token_grid, probe_places

SIDE_PX = 16


def places(model: nn.Module, side_px: int = SIDE_PX, layout: str = "") -> Places:
    runner = Runner.of(model.eval())
    return probe_places(runner, lambda: runner, side_px, layout)


def folded(model: nn.Module, address: str, side_px: int = SIDE_PX) -> Tensor:
    """Capture one activation, and fold it by what was learnt."""
    with Capture(model, [address]) as capture, torch.no_grad():
        model(torch.randn(1, 3, side_px, side_px, generator=torch.Generator().manual_seed(0)))
    activation = capture[address][0]
    return places(model, side_px).read(Address.parse(address), tuple(activation.shape)).maps(activation)


# --- maps ----------------------------------------------------------------------------------------------------------


class BothWays(nn.Module):
    """The same map twice: channels first and channels last. With 16 channels of 16 x 16, the shapes do not tell."""

    def __init__(self, takes_any_size: bool = True, channels: int = 16) -> None:
        super().__init__()
        self.first, self.last, self.linear = nn.Conv2d(3, channels, 1), nn.Identity(), nn.Linear(channels, 5)
        self.takes_any_size = takes_any_size

    def forward(self, x: Tensor) -> Tensor:
        assert self.takes_any_size or x.shape[2:] == (SIDE_PX, SIDE_PX)
        return self.linear(self.last(self.first(x).permute(0, 2, 3, 1))).mean((1, 2))


def test_the_dimension_that_follows_the_width_of_the_image_is_the_width_even_if_the_shapes_do_not_tell() -> None:
    model = BothWays()
    assert folded(model, "first").shape == (16, 16, 16)
    assert torch.equal(folded(model, "first"), folded(model, "last"))
    assert folded(model, "linear").shape == (5, 16, 16)


def test_where_a_model_takes_one_size_only_the_shapes_tell_and_if_they_do_not_that_is_said() -> None:
    reading = places(BothWays(takes_any_size=False, channels=5)).read
    assert reading(Address("first"), (5, 16, 16)).roles == LAYOUTS["nchw"]
    assert reading(Address("last"), (16, 16, 5)).roles == LAYOUTS["nhwc"]
    assert not reading(Address("last"), (16, 16, 5)).note
    ambiguous = places(BothWays(takes_any_size=False)).read(Address("last"), (16, 16, 16))
    assert ambiguous.roles == LAYOUTS["nchw"] and "--layout" in ambiguous.note


def test_what_a_user_says_of_the_layout_comes_first() -> None:
    model = BothWays(takes_any_size=False)
    assert places(model, layout="nhwc").read(Address("last"), (16, 16, 16)).roles == LAYOUTS["nhwc"]
    tokens = places(model, layout="tokens").read(Address("elsewhere"), (17, 8))
    assert tokens.grid == TokenGrid(4, 4, tuple(range(1, 17)))


def test_a_reduced_activation_keeps_the_meaning_of_the_dimensions_that_are_left() -> None:
    reading = places(BothWays()).read
    assert reading(Address.parse("last@mean12"), (16,)).roles == ("channel",)
    assert reading(Address.parse("last@mean3"), (16, 16)).roles == ("height", "width")
    assert reading(Address.parse("first@max1"), (16, 16)).on_photo
    assert reading(Address.parse("first@flatten"), (4096,)).roles == ("channel",)


def test_more_dimensions_than_a_picture_has_are_an_error() -> None:
    with pytest.raises(LayerError, match=r"linear has 4 dimensions per image \(N,2,3,4,5\); a picture shows at most 3"):
        places(BothWays()).read(Address("linear"), (2, 3, 4, 5))


def test_a_layer_with_more_dimensions_than_a_picture_has_can_be_reduced_to_one() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Unflatten(1, (2, 2)))
    reading = places(model).read(Address.parse("1@mean1"), (2, 16, 16))
    assert reading.roles == LAYOUTS["nchw"]


def test_a_model_returns_after_its_parts_and_a_part_after_what_it_holds() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), nn.ReLU())
    addresses = ["0/in", "0.0", "0.1/in", "0.1", "0", "1", "."]
    assert places(model).sort(sorted(addresses)) == addresses


# --- tokens --------------------------------------------------------------------------------------------------------


class Patches(nn.Module):
    """Cuts an image of 16 pixels into 4 x 4 patches, and puts them into a sequence in any order, among other tokens."""

    def __init__(self, order: list[int], kernel: int = 4, mix: bool = False, batch_first: bool = True) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, 6, kernel, stride=4, padding=(kernel - 4) // 2)
        self.others = nn.Parameter(torch.randn(1, len(order) - 16, 6))
        self.tokens, self.block = nn.Identity(), nn.TransformerEncoderLayer(6, 2, 8, batch_first=batch_first)
        self.order, self.mix, self.batch_first = order, mix, batch_first

    def forward(self, x: Tensor) -> Tensor:
        patches = self.cut(x).flatten(2).transpose(1, 2)
        patches = patches + patches.mean(1, keepdim=True) if self.mix else patches
        tokens = torch.cat([patches, self.others.expand(len(x), -1, -1)], 1)[:, self.order]
        return self.block(self.tokens(tokens if self.batch_first else tokens.transpose(0, 1))).mean(
            int(self.batch_first)
        )


@settings(max_examples=12)
@given(st.permutations(range(16 + 3)), st.sampled_from([4, 6]))
def test_folded_tokens_are_the_map_of_the_patch_embedding_whatever_their_order_and_company(
    order: list[int], kernel: int
) -> None:
    torch.manual_seed(0)
    model = Patches(order, kernel)
    assert torch.equal(folded(model, "tokens"), folded(model, "cut"))
    reading = places(model).read(Address("block"), (19, 6))
    assert reading.grid is not None
    assert reading.grid.without_place(19) == tuple(place for place, token in enumerate(order) if token >= 16)


def test_tokens_are_found_where_the_batch_comes_second() -> None:
    grid = places(Patches([16, *range(16)], batch_first=False)).grid(17)
    assert grid == TokenGrid(4, 4, tuple(range(1, 17)))


def test_tokens_that_are_mixed_before_they_are_seen_are_not_folded_unless_counting_tells() -> None:
    class_token_last = Patches([*range(16), 16], mix=True)
    reading = places(class_token_last).read(Address("tokens"), (17, 6))
    assert reading.grid is None and "not folded" in reading.note and not reading.on_photo
    class_token_last.num_prefix_tokens = 1  # type: ignore[assignment]
    reading = places(class_token_last).read(Address("tokens"), (17, 6))
    assert reading.grid == TokenGrid(4, 4, tuple(range(1, 17)))
    no_others = places(Patches(list(range(16)), mix=True)).read(Address("tokens"), (16, 6))
    assert no_others.grid == TokenGrid(4, 4, tuple(range(16)))


def test_tokens_by_tokens_are_no_map_of_the_image() -> None:
    class Looks(Patches):
        def __init__(self) -> None:
            super().__init__(list(range(17)))
            self.weights = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[3] == SIDE_PX  # one size only
            super().forward(x)
            return self.weights(x.new_ones(len(x), 2, 17, 17) * x.mean((1, 2, 3))[:, None, None, None])

    reading = places(Looks()).read(Address("weights"), (2, 17, 17))
    assert reading.roles == ("channel", "row", "column") and not reading.on_photo


def test_an_experiment_ends_before_the_first_attention() -> None:
    model = Patches(list(range(17)))
    reached: list[str] = []
    model.block.register_forward_pre_hook(lambda *_: reached.append("block"))
    assert find_token_grid(Runner.of(model), (SIDE_PX, SIDE_PX), 17, [(4, 4)]) is not None
    assert not reached


@pytest.mark.parametrize(
    ("name", "layer", "shape", "layout", "others"),
    [
        ("resnet18", "layer1", (64, 56, 56), "nchw", None),
        ("vgg11", "avgpool", (512, 7, 7), "nchw", None),  # it has 7 x 7 places for any size
        ("swin_t", "features.3", (28, 28, 192), "nhwc", None),
        ("convnext_tiny", "features.1.0.block.1", (56, 56, 96), "nhwc", None),
        ("vit_b_32", "encoder.layers.encoder_layer_3", (50, 768), "tokens", (0,)),
        ("timm:deit_tiny_distilled_patch16_224", "blocks.2", (198, 192), "tokens", (0, 1)),
        ("timm:swin_tiny_patch4_window7_224", "layers.1", (28, 28, 192), "nhwc", None),
        ("timm:vit_tiny_r_s16_p8_224", "blocks.0", (50, 192), "tokens", (0,)),  # mixed by its stem: counted
        ("timm:mixer_s32_224", "blocks.0.mlp_tokens", (512, 49), "turned", ()),
    ],
)
def test_real_models_of_each_kind_are_read_as_they_are_built(
    name: str, layer: str, shape: tuple[int, ...], layout: str, others: tuple[int, ...] | None
) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    bare = skeleton(name, "none")
    side_px = bare.preprocessing.crop_px

    @functools.cache
    def load() -> Runner:
        loaded = load_model(name, "none")
        return Runner.of(loaded.module, loaded.forward)

    found = probe_places(Runner.of(bare.module, bare.forward), load, side_px)
    reading = found.read(Address(layer), shape)
    assert found.square[Address(layer)].shape == shape and not reading.note
    assert reading.roles == LAYOUTS.get(layout, ("channel", "token"))
    assert reading.grid is None if others is None else reading.grid is not None
    if reading.grid is not None and others is not None:
        count = shape[reading.roles.index("token")]
        assert reading.grid.without_place(count) == others
        assert list(reading.grid.tokens) == sorted(reading.grid.tokens)


def test_a_model_of_transformers_with_tokens_before_and_behind_its_patches(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.YolosConfig(image_size=[64, 64], num_detection_tokens=5, **sizes)
    model = transformers.YolosModel(config).eval()
    forward: Callable[[Tensor], object] = lambda pixels_NCHW: model(pixel_values=pixels_NCHW)  # noqa: E731
    grid = find_token_grid(Runner.of(model, forward), (64, 64), 1 + 16 + 5, [(4, 4)])
    assert grid == TokenGrid(4, 4, tuple(range(1, 17)))
