"""Attention as data: `path@attention`, compared with what the libraries return on request."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from hookx.capture.probe import probe
from hookx.capture.rows import RowCapture, stored_dtype
from hookx.capture.runner import Runner
from hookx.cli import app
from hookx.errors import AddressError, LayerError
from hookx.layers.address import Address
from hookx.layers.select import attention_paths, parse_selectors, select
from hookx.models import load_model

ROUNDING = 1e-6  # of weights that are computed again from queries and keys, in float32


def pixels(count: int = 3, side_px: int = 32) -> Tensor:
    return torch.randn(count, 3, side_px, side_px, generator=torch.Generator().manual_seed(0))


def rows_of(runner: Runner, layers: str, images: Tensor) -> dict[str, Tensor]:
    """Return the rows that a run stores, by address."""
    selectors = parse_selectors(layers)
    classes = {path or ".": type(module).__name__ for path, module in runner.module.named_modules()}
    paths = [path for selector in selectors for path in selector.paths(classes)]
    probed = probe(runner, images[:3], paths=paths, attention=attention_paths(selectors, classes))
    targets = select(selectors, probed, "net").targets
    rows = {
        str(one.address): torch.empty((len(images), *one.shape), dtype=getattr(torch, stored_dtype(one)))
        for one in targets
    }
    with RowCapture(runner, targets) as capture:
        capture.run(images, rows)
    return rows


class Encoder(nn.Module):
    """A transformer layer over 16 patches."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, 8, 8, stride=8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.cut(x).flatten(2)
        return self.layer(tokens.transpose(1, 2) if self.batch_first else tokens.permute(2, 0, 1))


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_of_multihead_attention_is_what_it_returns_when_asked(batch_first: bool) -> None:
    net, images = Encoder(batch_first).eval(), pixels()
    path = "layer.self_attn"
    rows = rows_of(Runner.of(net), f"{path}@attention,layer@attention,{path}@attention@mean1,{path}/in/0", images)
    given = rows[f"{path}/in/0"] if batch_first else rows[f"{path}/in/0"].transpose(0, 1)
    with torch.no_grad():
        _, asked = net.layer.self_attn(given, given, given, need_weights=True, average_attn_weights=False)
    found = rows[f"{path}@attention"]
    assert found.shape == (3, 2, 16, 16)
    assert torch.allclose(found, asked, rtol=0, atol=ROUNDING)
    assert torch.allclose(found.sum(-1), torch.ones(3, 2, 16), rtol=0, atol=ROUNDING)
    assert torch.equal(rows["layer@attention"], found)  # the one attention within it
    assert torch.equal(rows[f"{path}@attention@mean1"], found.mean(1))


def timm_model(**arguments: Any) -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, **arguments).eval()


@pytest.mark.parametrize("arguments", [{}, {"qk_norm": True}, {"reg_tokens": 2}])
def test_attention_of_timm_is_what_its_dropout_is_given_when_nothing_is_fused(arguments: dict[str, Any]) -> None:
    fused, images = timm_model(**arguments), pixels()
    plain = copy.deepcopy(fused)
    for module in plain.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]
    asked = ",".join(f"blocks.{n}.attn@attention,blocks.{n}.attn.attn_drop/in" for n in range(3))
    own = rows_of(Runner.of(plain), asked, images)
    found = rows_of(Runner.of(fused), "blocks.*.attn@attention", images)
    for number in range(3):
        weights = own[f"blocks.{number}.attn@attention"]
        assert torch.equal(weights, own[f"blocks.{number}.attn.attn_drop/in"])  # the same bits
        assert torch.allclose(found[f"blocks.{number}.attn@attention"], weights, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "BeitModel", "CLIPVisionModel"])
def test_attention_of_transformers_is_what_it_returns_when_asked(kind: str, implementation: str) -> None:
    transformers = pytest.importorskip("transformers")
    name = kind.removesuffix("Model")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 24}
    config = getattr(transformers, f"{name.removesuffix('Model')}Config")(image_size=32, patch_size=8, **sizes)
    build = getattr(transformers, f"{name}Model")._from_config
    torch.manual_seed(0)
    net = build(config, attn_implementation=implementation).eval()
    eager = build(copy.deepcopy(config), attn_implementation="eager").eval()
    eager.load_state_dict(net.state_dict())
    with torch.no_grad():
        asked = eager(pixel_values=pixels(), output_attentions=True).attentions
    runner = Runner.of(net, functools.partial(_forward, net))
    own = [
        str(address)
        for layer in probe(runner, pixels(), attention=None)
        for address in layer.addresses(of_attention=True)
    ]
    assert len(own) == 2
    rows = rows_of(runner, ",".join(own), pixels())
    for found, weights in zip(rows.values(), asked, strict=True):
        if implementation == "eager":
            assert torch.equal(found, weights)
        assert torch.allclose(found, weights, rtol=0, atol=ROUNDING)


def _forward(net: Any, pixels_NCHW: Tensor) -> Any:
    return net(pixel_values=pixels_NCHW)


# --- windows -------------------------------------------------------------------------------------------------------


def places_in_windows(side: int, window: int, shift: int) -> Tensor:
    """Return for each window and each of its tokens the place in the map, row by row; as docs/guides/layers.md says."""
    places = torch.arange(side * side).reshape(side, side).roll((-shift, -shift), (0, 1))
    windows = places.unflatten(0, (-1, window)).unflatten(2, (-1, window))  # window row, row, window column, column
    return windows.transpose(1, 2).flatten(0, 1).flatten(1)


@pytest.mark.parametrize("name", ["swin_t", "timm:swin_tiny_patch4_window7_224"])
@pytest.mark.parametrize("shifted", [False, True])
def test_windows_of_swin_are_mapped_back_to_their_places(name: str, shifted: bool) -> None:
    loaded = load_model(name, "none")
    net, images = loaded.module, pixels(3, 224)
    is_timm = name.startswith("timm")
    path = f"layers.1.blocks.{int(shifted)}.attn" if is_timm else f"features.3.{int(shifted)}.attn"
    block = path.removesuffix(".attn")
    rows = rows_of(Runner.of(net), f"{path}@attention,{block}.norm1", images)
    weights, tokens = rows[f"{path}@attention"], rows[f"{block}.norm1"].flatten(1, -2)
    side, window, shift = 28, 7, 3 if shifted else 0
    assert weights.shape == (3, 16, 6, 49, 49)
    assert torch.allclose(weights.sum(-1), torch.ones(3, 16, 6, 49), rtol=0, atol=2 * ROUNDING)

    attention: Any = net.get_submodule(path)
    places = places_in_windows(side, window, shift)
    with torch.no_grad():
        query, key, _ = attention.qkv(tokens).unflatten(-1, (3, 6, 32)).unbind(2)
        bias = attention._get_rel_pos_bias() if is_timm else attention.get_relative_position_bias()
        scores = torch.einsum("nwqhd,nwkhd->nwhqk", query[:, places], key[:, places]) * 32**-0.5 + bias
        if shifted:  # Tokens that the shift brought together from opposite sides do not see each other.
            rolled = torch.arange(side).roll(-shift)
            part = (torch.arange(side) >= side - window).long() + (torch.arange(side) >= side - shift).long()
            region = torch.empty(side, dtype=torch.long)
            region[rolled] = part
            region_of = region[places // side] * 3 + region[places % side]
            scores = scores + torch.where(region_of[:, :, None] == region_of[:, None], 0.0, -100.0)[None, :, None]
    assert torch.allclose(weights, scores.softmax(-1), rtol=0, atol=2 * ROUNDING)


# --- laws ----------------------------------------------------------------------------------------------------------


def test_attention_leaves_the_bits_of_the_activations_beside_it() -> None:
    for net, layer in ((timm_model(), "blocks.2.attn"), (Encoder().eval(), "layer"), (Encoder(False).eval(), "layer")):
        alone = rows_of(Runner.of(net), "**", pixels())
        beside = rows_of(Runner.of(net), f"**,{layer}@attention", pixels())
        assert len(beside) == len(alone) + 1
        assert all(torch.equal(beside[address], value) for address, value in alone.items())


def test_the_attention_of_an_image_is_the_same_alone_and_in_company() -> None:
    net, images = timm_model(), pixels(5)
    together = rows_of(Runner.of(net), "blocks.1.attn@attention", images)["blocks.1.attn@attention"]
    with RowCapture(Runner.of(net), _targets(net, "blocks.1.attn@attention")) as capture:
        for number in (4, 0, 2):
            alone = {"blocks.1.attn@attention": torch.empty((1, *together.shape[1:]))}
            capture.run(images[number : number + 1], alone)
            assert torch.allclose(alone["blocks.1.attn@attention"][0], together[number], rtol=0, atol=ROUNDING)


def _targets(net: nn.Module, layer: str) -> Any:
    selectors = parse_selectors(layer)
    probed = probe(Runner.of(net), pixels(), attention=[selectors[0].address.path])
    return select(selectors, probed, "net").targets


def test_a_layer_whose_attention_mixes_images_is_refused() -> None:
    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            tokens = x.flatten(2).mean(0, keepdim=True).expand(len(x), -1, -1)
            return self.inner((tokens @ tokens.mT).softmax(-1))

    with pytest.raises(LayerError, match=r"'.@attention' \(N,3,3\) cannot be split by image"):
        rows_of(Runner.of(Mixes().eval()), ".@attention", pixels())


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (".@attention", "'.@attention' cannot be captured: it computes 3 attentions: name the layer of one of them"),
        ("blocks.0.mlp@attention", "no softmax over tokens and no scaled_dot_product_attention runs in it"),
        ("blocks.0.attn@attention@mean", "mean over which dimensions"),
        ("head_drop@attention", "no softmax over tokens"),
    ],
)
def test_a_layer_without_one_attention_says_why(layer: str, message: str) -> None:
    with pytest.raises(LayerError, match=message):
        rows_of(Runner.of(timm_model()), layer, pixels())


def test_a_softmax_in_a_module_of_its_own_belongs_to_the_one_that_calls_it() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.normalise = nn.Softmax(dim=-1)
            self.drop = nn.Dropout(0.5, inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.normalise(x @ x.mT).mul_(0)  # What comes later does not reach the weights.

    net = nn.Sequential(Own()).eval()
    layers = {
        layer.path: layer.addresses(of_attention=True) for layer in probe(Runner.of(net), pixels(), attention=None)
    }
    assert [path for path, found in layers.items() if found] == ["0"]
    rows = rows_of(Runner.of(net), "0@attention", pixels())
    assert torch.equal(rows["0@attention"], (pixels() @ pixels().mT).softmax(-1))


def test_an_address_of_attention_is_read_as_it_is_written() -> None:
    for text in ("blocks.11.attn@attention", "blocks.11.attn:1@attention@mean1", ".@attention"):
        assert str(Address.parse(text)) == text and Address.parse(text).is_attention
    assert not Address.parse("attn/attention").is_attention
    for text in ("attn/0@attention", "attn/in@attention"):
        with pytest.raises(AddressError, match="@attention belongs to a layer"):
            Address.parse(text)


def test_list_layers_says_where_attention_is() -> None:
    arguments = ["list-layers", "timm:vit_tiny_patch16_224", "--filter", "blocks.11", "--json"]
    layers = json.loads(CliRunner().invoke(app, arguments).stdout)
    attention = {layer["path"]: layer["attention"] for layer in layers}
    [found] = attention.pop("blocks.11.attn")
    assert found["address"] == "blocks.11.attn@attention" and found["shape"] == [None, 3, 197, 197]
    assert not any(attention.values())
