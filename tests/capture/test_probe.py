"""The probe: what it learns of a layer, on networks of which each is a trap, and on every architecture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import get_model, get_model_builder, get_model_weights

from hookx.capture.probe import example_images, probe
from hookx.capture.runner import Runner, module_classes
from hookx.errors import LayerError
from hookx.layers.select import Layer, parse_selectors, select
from hookx.models import list_models, skeleton
from kit import nets
from kit.nets import captured_rows, images, targets_of


def by_path(layers: Sequence[Layer]) -> dict[str, Layer]:
    return {layer.path: layer for layer in layers}


def test_a_batch_dimension_that_is_not_the_first_is_moved_to_the_front() -> None:
    net, pixels = nets.BatchSecond().eval(), images(3)
    [target] = targets_of(net, "tokens")
    assert target.tensor.shape_text == "64,N,5" and target.shape == (64, 5)
    expected = net.tokens(pixels.flatten(2).permute(2, 0, 1)).movedim(1, 0)
    assert torch.equal(captured_rows(net, "tokens", pixels)["tokens"], expected)


def test_rows_of_an_image_are_found_side_by_side_and_in_turn() -> None:
    net, pixels = nets.Windows().eval(), images(3)
    whole = captured_rows(net, "by_image,by_window", pixels)
    for layer in ("by_image", "by_window"):
        assert whole[layer].shape == (3, 16, 4)
        one_by_one = torch.cat([captured_rows(net, layer, pixels[i : i + 1])[layer] for i in range(3)])
        assert torch.allclose(whole[layer], one_by_one)
    assert [target.tensor.groups_per_image for target in targets_of(net, "by_image,by_window")] == [1, 16]


def test_a_layer_that_mixes_the_images_of_a_batch_is_refused() -> None:
    with pytest.raises(LayerError, match="depend on the other images of its batch"):
        targets_of(nets.MixesBatch().eval(), "norm")


def test_constants_are_left_out_of_globs_and_refused_by_name() -> None:
    net = nets.Constant().eval()
    selection = select(parse_selectors("*"), probe(Runner.of(net), images()), "net")
    assert [str(target.address) for target in selection.targets] == ["body"]
    assert "constant" in selection.left_out["bias"]
    with pytest.raises(LayerError, match=r"'bias' is constant \(4,3\): it does not depend on the image"):
        targets_of(net, "bias")


def test_a_layer_that_is_never_called_is_named_with_the_reason() -> None:
    net = nets.NeverCalled().eval()
    layers = by_path(probe(Runner.of(net), images()))
    assert not layers["spare"].calls and not layers["attention.out_proj"].calls
    with pytest.raises(LayerError, match=r"never called in a forward pass\n  \(nn.MultiheadAttention uses its weights"):
        targets_of(net, "attention.out_proj")


def test_a_module_with_two_names_answers_to_both_and_globs_take_it_once() -> None:
    net, pixels = nets.SavedTwice().eval(), images()
    layers = by_path(probe(Runner.of(net), pixels))
    assert layers["second"].same_as == "first" and len(layers["first"].calls) == 2
    assert list(captured_rows(net, "*", pixels)) == ["first:0", "first:1"]
    rows = captured_rows(net, "second:1", pixels)
    assert torch.equal(rows["second:1"], net(pixels))


def test_layers_come_in_the_order_of_execution() -> None:
    assert [layer.path for layer in probe(Runner.of(nets.NeverCalled().eval()), images())] == [
        *(".", "spare", "embed", "attention", "attention.out_proj")
    ]


def test_the_transformer_fast_path_hides_nothing() -> None:
    encoder = nn.TransformerEncoderLayer(4, 2, batch_first=True).eval()
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(2), nn.Linear(64, 4), encoder)
    before = torch.backends.mha.get_fastpath_enabled()
    assert by_path(probe(Runner.of(net), images()))["3.linear1"].calls
    assert torch.backends.mha.get_fastpath_enabled() is before


def classification_models() -> Iterator[Any]:
    """Name all of them; those that are not the smallest of their family are slow."""
    names = sorted((name for name, kind in list_models().items() if kind == "classification"), key=parameters_of)
    families = set()
    for name in names:
        family = get_model_builder(name).__module__
        yield pytest.param(name, marks=[pytest.mark.slow] if family in families else [])
        families.add(family)


def parameters_of(name: str) -> int:
    weights: Any = get_model_weights(name)
    return int(weights.DEFAULT.meta["num_params"])


@pytest.mark.parametrize("name", list(classification_models()))
def test_every_classification_model_is_probed_without_memory(name: str) -> None:
    bare = skeleton(name)
    assert all(parameter.is_meta for parameter in bare.module.parameters())
    runner = Runner.of(bare.module)
    layers = by_path(probe(runner, example_images(runner, bare.preprocessing.crop_px)))
    assert layers.keys() == module_classes(bare.module).keys()
    assert layers["."].calls[0].outputs[0].shape_text == "N,1000"


def test_a_skeleton_shows_the_calls_and_shapes_of_the_real_model() -> None:
    bare, real = skeleton("shufflenet_v2_x0_5").module, get_model("shufflenet_v2_x0_5", weights=None).eval()
    shapes, ran = (probe(runner, example_images(runner, 224)) for runner in (Runner.of(bare), Runner.of(real)))
    assert shapes == ran


@pytest.mark.parametrize("name", ["fcn_resnet50", "quantized_shufflenet_v2_x0_5", "ssdlite320_mobilenet_v3_large"])
def test_models_for_other_tasks_are_probed_as_far_as_rows_are_images(name: str) -> None:
    bare = skeleton(name)
    runner = Runner.of(bare.module, bare.forward)
    layers = by_path(probe(runner, example_images(runner, bare.preprocessing.crop_px)))
    returned = [tensor for layer in layers.values() for call in layer.calls for tensor in call.outputs]
    assert len(returned) > 100 and all(tensor.batch_dim == 0 for tensor in returned)


def test_a_module_that_is_called_once_an_image_is_refused_and_no_other() -> None:
    class OneByOne(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.head(image) for image in self.body(x).split(1)])

    net = OneByOne().eval()
    assert [str(target.address) for target in targets_of(net, "body,.")] == ["body", "."]
    with pytest.raises(LayerError, match="its module is called once for 1 image and twice for 2"):
        targets_of(net, "head")


def test_layers_before_random_numbers_are_stored_and_those_after_them_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(0.5))
    assert len(targets_of(net.eval(), "0,1")) == 2
    assert len(targets_of(net.train(), "0,1/in")) == 2
    with pytest.raises(LayerError, match="draws random numbers"):
        targets_of(net.train(), "1")
