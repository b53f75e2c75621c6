"""Attention as the models compute it, compared with what their own libraries return on request."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from hookx.capture.attention import attention_weights
from hookx.capture.runner import Runner
from hookx.capture.session import Capture
from hookx.models import load_model
from hookx.pictures.attention import find_attention


def pixels(side_px: int = 224) -> Tensor:
    return torch.randn(1, 3, side_px, side_px, generator=torch.Generator().manual_seed(0))


class Encoder(nn.Module):
    """A transformer over 16 patches, in whose attention nobody asks for the weights."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, 8, 4, stride=4)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
        self.head = nn.Linear(8, 10)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.cut(x).flatten(2)
        tokens = self.layer(tokens.transpose(1, 2) if self.batch_first else tokens.permute(2, 0, 1))
        return self.head(tokens.mean(1 if self.batch_first else 0)).softmax(-1)


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_of_multihead_attention_is_what_it_returns_when_it_is_asked(batch_first: bool) -> None:
    model = Encoder(batch_first).eval()
    [attention] = find_attention(Runner.of(model), pixels(16))
    with Capture(model, ["layer.self_attn/in"]) as capture, torch.no_grad():
        model(pixels(16))
    query, key, value = (capture[f"layer.self_attn/in/{number}"] for number in range(3))
    _, asked = model.layer.self_attn(query, key, value, need_weights=True, average_attn_weights=False)
    assert attention.path == "layer.self_attn" and attention.windows == 1
    assert torch.allclose(attention.weights_HQK, asked[0], atol=1e-6)
    assert torch.allclose(attention.weights_HQK.sum(-1), torch.ones(2, 16))


def test_attention_of_multihead_attention_is_what_its_weights_say() -> None:
    model = Encoder().eval()
    [attention] = find_attention(Runner.of(model), pixels(16))
    with Capture(model, ["layer.self_attn/in"]) as capture, torch.no_grad():
        model(pixels(16))
    projections = nn.functional.linear(
        capture["layer.self_attn/in/0"], model.layer.self_attn.in_proj_weight, model.layer.self_attn.in_proj_bias
    )
    query, key, _ = (part.unflatten(-1, (2, 4)).transpose(1, 2)[0] for part in projections.chunk(3, -1))
    assert torch.allclose(attention.weights_HQK, (query @ key.mT / 2).softmax(-1), atol=1e-6)


def test_attention_of_timm_is_what_its_dropout_is_given_when_nothing_is_fused() -> None:
    pytest.importorskip("timm")
    loaded = load_model("timm:vit_tiny_patch16_224", "none")
    fused = find_attention(Runner.of(loaded.module), pixels())
    unfused = copy.deepcopy(loaded.module)
    for module in unfused.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]
    with Capture(unfused, "blocks.*.attn.attn_drop/in") as capture, torch.no_grad():
        unfused(pixels())
    assert [attention.path for attention in fused] == [f"blocks.{number}.attn" for number in range(12)]
    for attention, dropped in zip(fused, capture.values(), strict=True):
        assert torch.allclose(attention.weights_HQK, dropped[0], atol=1e-5)
    for one, other in zip(fused, find_attention(Runner.of(unfused), pixels()), strict=True):
        assert one.path == other.path and torch.allclose(one.weights_HQK, other.weights_HQK, atol=1e-5)


def _forward(model: Any, pixels_NCHW: Tensor) -> Any:
    return model(pixel_values=pixels_NCHW)


def test_attention_of_transformers_is_what_it_returns_when_it_is_asked() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 24}
    config = transformers.ViTConfig(image_size=32, patch_size=8, **sizes)
    model = transformers.ViTModel(config).eval()
    eager = transformers.ViTModel._from_config(config, attn_implementation="eager").eval()
    eager.load_state_dict(model.state_dict())
    with torch.no_grad():
        asked = eager(pixel_values=pixels(32), output_attentions=True).attentions
    for one in (model, eager):
        found = find_attention(Runner.of(one, functools.partial(_forward, one)), pixels(32))
        assert len(found) == 2 and all("attention" in attention.path for attention in found)
        for attention, weights in zip(found, asked, strict=True):
            assert torch.allclose(attention.weights_HQK, weights[0], atol=1e-6)


@settings(max_examples=40)
@given(
    st.integers(1, 5),
    st.integers(1, 6),
    st.sampled_from(["none", "bool", "float", "causal"]),
    st.sampled_from([None, 0.3]),
    st.booleans(),
)
def test_the_weights_of_a_fused_attention_give_its_output(
    queries: int, keys: int, masked: str, scale: float | None, grouped: bool
) -> None:
    generator = torch.Generator().manual_seed(queries * 7 + keys)
    query = torch.randn(1, 4, queries, 8, generator=generator)
    key, value = (torch.randn(1, 2 if grouped else 4, keys, 8, generator=generator) for _ in range(2))
    arguments: dict[str, Any] = {"scale": scale, "enable_gqa": grouped, "is_causal": masked == "causal"}
    if masked in ("bool", "float"):
        mask = torch.rand(queries, keys, generator=generator) > 0.4
        mask[:, 0] = True
        arguments["attn_mask"] = mask if masked == "bool" else torch.where(mask, 0.5, -3.0)
    weights = attention_weights(query, key, value, **arguments)
    expanded = value.repeat_interleave(2, 1) if grouped else value
    expected = scaled_dot_product_attention(query, key, value, **arguments)
    assert torch.allclose(weights @ expanded, expected, atol=1e-5)


def test_attention_within_windows_says_how_many_there_are() -> None:
    found = find_attention(Runner.of(load_model("swin_t", "none").module), pixels())
    assert [attention.windows for attention in found[::4]] == [64, 4, 4]
    assert found[0].weights_HQK.shape == (64 * 3, 49, 49)


def test_a_softmax_that_is_a_module_belongs_to_the_one_that_calls_it() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.normalise = nn.Softmax(dim=-1)

        def forward(self, x: Tensor) -> Tensor:
            return self.normalise(x @ x.mT)

    [attention] = find_attention(Runner.of(nn.Sequential(Own())), pixels(8))
    assert attention.path == "0"


def test_the_softmax_of_a_classifier_or_of_a_segmentation_is_no_attention() -> None:
    classes_of_pixels = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Softmax(dim=1))
    classes = nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.Softmax(dim=-1))
    assert (
        find_attention(Runner.of(classes_of_pixels), pixels(8)) == find_attention(Runner.of(classes), pixels(8)) == []
    )


def test_a_model_sees_the_image_in_its_own_layout() -> None:
    layouts: list[bool] = []

    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            layouts.append(x.is_contiguous(memory_format=torch.channels_last))
            return (x @ x.mT).softmax(-1)

    for image in (pixels(8), pixels(8).contiguous(memory_format=torch.channels_last)):
        find_attention(Runner.of(Own()), image)
    assert layouts == [False, True]
