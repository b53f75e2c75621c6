"""Files as they are found: state dicts in every wrapping, pickled modules, exported programs, and hostile ones."""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import hashlib
import json
import os
import pathlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export.unflatten import InterpreterModule
from torchvision.models import get_model

from hookx import Capture
from hookx.capture.probe import example_images, probe
from hookx.capture.rows import RowCapture
from hookx.capture.runner import Runner, module_classes
from hookx.errors import HookxError, ModelError
from hookx.layers.select import Layer, parse_selectors, select
from hookx.models import LoadedModel, ModelOptions, load_model, skeleton
from hookx.models.checkpoints import Weights, kind_of, read_weights
from hookx.models.fitting import modules_of, without_prefix
from hookx.models.torchvision import Torchvision

NET = "shufflenet_v2_x0_5"  # small, with batch norm, its classifier called fc
State = dict[str, Tensor]


@lru_cache(maxsize=4)
def state_of(seed: int = 1, classes: int = 1000, name: str = NET) -> State:
    torch.manual_seed(seed)
    return dict(get_model(name, weights=None, num_classes=classes).state_dict())


def load(file: Path, ref: str = NET, **options: Any) -> LoadedModel:
    return load_model(ref, str(file), ModelOptions(**options))


def saved(content: object, file: Path, **how: Any) -> Path:
    torch.save(content, file, **how)
    return file


def error_of(file: Path, ref: str = NET, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load(file, ref, **options)
    return str(caught.value)


def model_error_of(file: Path, weights: str = "default", **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(str(file), weights, ModelOptions(**options))
    with pytest.raises(ModelError) as again:
        skeleton(str(file), weights, ModelOptions(**options))
    assert str(again.value) == str(caught.value)
    return str(caught.value)


def sha256_of(file: Path) -> str:
    return f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"


def has(model: LoadedModel, state: Mapping[str, Tensor]) -> bool:
    loaded = model.module.state_dict()
    return loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)


def under(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


# --- nested --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry",
    ["state_dict", "model", "model_state_dict", "net", "model_ema", "state_dict_ema", "teacher", "student", "resnet"],
)
def test_a_state_dict_is_found_under_the_name_it_was_saved_by(entry: str, tmp_path: Path) -> None:
    file = saved({"epoch": 3, entry: state_of(), "optimizer": {"state": {}, "param_groups": [{}]}}, tmp_path / "w.pth")
    model = load(file)
    assert has(model, state_of())
    assert model.weights == f"{sha256_of(file)} ({entry})"
    assert model.notes == (f"weights in w.pth: taken from '{entry}'",)


def test_a_plain_state_dict_needs_no_word(tmp_path: Path) -> None:
    file = saved(state_of(), tmp_path / "w.pth")
    assert load(file).notes == () and load(file).weights == sha256_of(file)


def test_a_state_dict_two_entries_deep_is_found(tmp_path: Path) -> None:
    model = load(saved({"model": {"state_dict": state_of(), "epoch": 1}}, tmp_path / "w.pth"))
    assert has(model, state_of()) and model.notes == ("weights in w.pth: taken from 'model.state_dict'",)


def test_the_ordinary_weights_are_taken_and_their_moving_average_is_mentioned(tmp_path: Path) -> None:
    file = saved({"state_dict_ema": state_of(2), "state_dict": state_of(1)}, tmp_path / "w.pth.tar")
    model = load(file)
    assert has(model, state_of(1))
    assert model.notes[1] == (
        "w.pth.tar also holds 'state_dict_ema' (a moving average); to load it: --weights-key state_dict_ema"
    )
    averaged = load(file, weights_key="state_dict_ema")
    assert has(averaged, state_of(2)) and averaged.weights == f"{sha256_of(file)} (state_dict_ema)"
    assert averaged.weights != model.weights


@pytest.mark.parametrize("names", [("teacher", "student"), ("model_ema", "teacher"), ("generator", "discriminator")])
def test_of_two_equal_sets_of_weights_none_is_chosen(names: tuple[str, str], tmp_path: Path) -> None:
    file = saved({names[0]: state_of(1), names[1]: state_of(2), "epoch": 1}, tmp_path / "w.pth")
    assert error_of(file) == (
        f"'{file}' holds several sets of weights: {names[0]}, {names[1]}\n  choose one: --weights-key {names[0]}"
    )
    assert has(load(file, weights_key=names[1]), state_of(2))


def test_a_key_goes_through_entries_and_then_through_the_names_of_tensors(tmp_path: Path) -> None:
    both = under("module.encoder_q.", state_of(1)) | under("module.encoder_k.", state_of(2))
    file = saved({"run": {"state.dict": both}, "epoch": 1}, tmp_path / "w.pth")
    model = load(file, weights_key="run.state.dict.module.encoder_k")
    assert has(model, state_of(2))
    assert has(load(file, weights_key="run.state.dict.module.encoder_q"), state_of(1))


def test_a_key_that_is_not_there_is_an_error_with_the_closest(tmp_path: Path) -> None:
    file = saved({"state_dict": state_of(), "epoch": 3}, tmp_path / "w.pth")
    message = error_of(file, weights_key="state_dcit")
    assert message == f"'{file}' has no entry 'state_dcit'; closest: state_dict\n  its entries: state_dict, epoch"
    assert "entry 'epoch' of" in error_of(file, weights_key="epoch")


def test_what_is_no_tensor_among_the_tensors_is_left_out_and_said(tmp_path: Path) -> None:
    model = load(saved({"state_dict": state_of() | {"metric.steps": 5}}, tmp_path / "w.pth"))
    assert has(model, state_of())
    assert model.notes == ("weights in w.pth: taken from 'state_dict'; left out metric.steps (not tensors)",)


# --- formats -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".pth.tar", ".ckpt", ".bin", ".weights"])
@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saved_is_read_in_both_its_formats_whatever_the_suffix(
    suffix: str, zipped: bool, tmp_path: Path
) -> None:
    file = saved({"state_dict": state_of()}, tmp_path / f"w{suffix}", _use_new_zipfile_serialization=zipped)
    assert zipfile.is_zipfile(file) == zipped
    assert has(load(file), state_of())


def test_tensors_on_a_device_that_is_not_there_are_read_onto_the_cpu(tmp_path: Path) -> None:
    file = saved(state_of(), tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    content = file.read_bytes()
    assert content.count(b"\x03\x00\x00\x00cpu") == 1  # The device of every storage, by reference.
    file.write_bytes(content.replace(b"\x03\x00\x00\x00cpu", b"\x06\x00\x00\x00cuda:7"))
    assert has(load(file), state_of())


class AttributeDict(dict[str, Any]):
    pass


# The checkpoint names the class that Lightning's settings have; it is not installed here, and is not needed.
AttributeDict.__module__, AttributeDict.__qualname__ = "pytorch_lightning.utilities.parsing", "AttributeDict"


def test_a_lightning_checkpoint_is_read_with_its_settings_unread(tmp_path: Path) -> None:
    file = saved(
        {
            "epoch": 3,
            "pytorch-lightning_version": "2.5.0",
            "state_dict": under("model.", state_of()) | {"criterion.weight": torch.ones(3)},
            "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5), "dirpath": pathlib.Path("runs")}},
            "hyper_parameters": {
                "args": argparse.Namespace(lr=0.1, betas=(0.9, 0.99)),
                "accuracy": np.float64(0.5),
                "means": np.arange(3.0),
                "by_class": collections.defaultdict(list, {"cat": [1, 2]}),
            },
        },
        tmp_path / "epoch=3.ckpt",
    )
    model = load(file)
    assert has(model, state_of())
    assert model.notes == (
        "weights in epoch=3.ckpt: taken from 'state_dict'; prefix 'model.' removed; "
        "left out 1 tensor under 'criterion'",
    )
    assert model.weights == f"{sha256_of(file)} (state_dict; without model.; left out criterion)"


def test_a_class_that_is_stood_in_for_is_neither_imported_nor_called(tmp_path: Path) -> None:
    # By hand, since neither library is installed: hyper_parameters = omegaconf...DictConfig.__new__(), with a state.
    content = pickle.dumps({"state_dict": 1, "hyper_parameters": 2}, protocol=2)
    settings = b"comegaconf.dictconfig\nDictConfig\n)\x81}q\x50X\x01\x00\x00\x00aK\x01sb"
    file = saved({"state_dict": state_of(), "hyper_parameters": 22}, tmp_path / "w.ckpt")
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in records if name.endswith("data.pkl"))
    assert content and b"K\x16" in records[name]
    records[name] = records[name].replace(b"K\x16", settings)
    with zipfile.ZipFile(file, "w") as archive:
        for record, data in records.items():
            archive.writestr(record, data)
    assert has(load(file), state_of())


def shards(folder: Path, state: State, kind: str = "model.safetensors") -> Path:
    names = list(state)
    stem, suffix = kind.split(".")
    parts = {f"{stem}-0000{n}-of-00002.{suffix}": names[n - 1 :: 2] for n in (1, 2)}
    for file, keys in parts.items():
        part = {key: state[key] for key in keys}
        save_file(part, folder / file) if suffix == "safetensors" else torch.save(part, folder / file)
    index = folder / f"{kind}.index.json"
    weight_map = {key: file for file, keys in parts.items() for key in keys}
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_shards_are_read_through_their_index_and_all_of_them_are_in_the_digest(kind: str, tmp_path: Path) -> None:
    index = shards(tmp_path, under("encoder.", state_of()), kind)
    model = load(index)
    assert has(model, state_of())
    assert model.weights.startswith("sha256:") and model.weights.endswith(" (without encoder.)")
    shards(tmp_path, under("encoder.", state_of(2)), kind)
    assert load(index).weights != model.weights


@pytest.mark.parametrize("place", ["../outside.safetensors", "{absolute}", "sub/outside.safetensors", "..", ""])
def test_an_index_reaches_no_file_outside_its_own_folder(place: str, tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside.safetensors", tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for file in (outside, folder / "sub" / outside.name):
        save_file(state_of(), file)
    place = place.format(absolute=outside)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(state_of(), place)}))
    assert error_of(index) == f"'{index}' names '{place}' as a shard; shards must be files beside their index"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 10_000])
def test_a_malformed_index_is_an_error_that_names_it(text: str, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    assert error_of(index).startswith(f"'{index}' is not an index of shards: ")


def test_shards_that_are_not_what_their_index_says_are_an_error(tmp_path: Path) -> None:
    index = shards(tmp_path, state_of())
    save_file({"other": torch.ones(1)}, tmp_path / "model-00002-of-00002.safetensors")
    assert "model-00002-of-00002.safetensors' does not hold the tensors that" in error_of(index)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert "there is no weights file" in error_of(index)


# --- prefixes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix",
    [
        *("module.", "_orig_mod.", "model.", "backbone.", "encoder."),
        *("module._orig_mod.", "_orig_mod.module.", "module.backbone.", "model.encoder.", "module.model._orig_mod."),
    ],
)
def test_the_prefix_of_a_wrapper_comes_off(prefix: str, tmp_path: Path) -> None:
    file = saved(under(prefix, state_of()), tmp_path / "w.pth")
    model = load(file)
    assert has(model, state_of())
    compiled = "_orig_mod." * ("_orig_mod." in prefix)
    taken = compiled + prefix.replace("_orig_mod.", "")
    assert model.notes == (f"weights in w.pth: prefix '{taken}' removed",)
    assert model.weights == f"{sha256_of(file)} (without {taken})"


def test_a_module_that_was_compiled_inside_another_fits(tmp_path: Path) -> None:
    state = {name.replace("stage2.", "stage2._orig_mod."): tensor for name, tensor in state_of().items()}
    assert has(load(saved(state, tmp_path / "w.pth")), state_of())


NAMES = st.text("abcdefghij_", min_size=1, max_size=6)


@given(
    own=st.sets(st.lists(NAMES, min_size=1, max_size=4).map(".".join), min_size=1, max_size=12),
    wrapper=st.lists(st.sampled_from(["module", "model", "backbone", "encoder", "net"]), max_size=3),
)
def test_names_without_their_prefix_are_the_names_of_the_model(own: set[str], wrapper: list[str]) -> None:
    prefix = "".join(f"{name}." for name in wrapper)
    weights = Weights(Path("w.pt"), under(prefix, dict.fromkeys(own, torch.ones(1))))
    found = without_prefix(weights, own, "net")
    assert found.state.keys() == own and found.prefix == prefix and not found.left_out


def test_what_stands_beside_the_prefix_is_left_out_as_a_whole_and_said(tmp_path: Path) -> None:
    beside = {"module.projector.0.weight": torch.ones(2), "module.projector.2.weight": torch.ones(2)}
    file = saved({"model": under("module.backbone.", state_of()) | beside | {"queue": torch.ones(1)}}, tmp_path / "w")
    model = load(file)
    assert has(model, state_of())
    assert model.notes == (
        "weights in w: taken from 'model'; prefix 'module.backbone.' removed; "
        "left out 2 tensors under 'module.projector'; left out 1 tensor under 'queue'",
    )


def test_a_tensor_under_the_prefix_that_the_model_has_not_is_an_error(tmp_path: Path) -> None:
    state = under("backbone.", state_of() | {"fc_projector.weight": torch.ones(2)})
    assert "unexpected (1): fc_projector.weight" in error_of(saved(state, tmp_path / "w.pth"))


def test_a_tensor_beside_no_prefix_is_an_error(tmp_path: Path) -> None:
    state = state_of() | {"projector.weight": torch.ones(2)}
    assert "unexpected (1): projector.weight" in error_of(saved(state, tmp_path / "w.pth"))


def test_a_classifier_beside_the_backbone_is_not_taken_for_the_models_own(tmp_path: Path) -> None:
    state = {("" if name.startswith("fc.") else "backbone.") + name: tensor for name, tensor in state_of().items()}
    file = saved({"state_dict": state}, tmp_path / "w.pth")
    message = error_of(file)
    assert f"'{file}' has fc.weight outside 'backbone.', which holds the other tensors of {NET}; it may" in message
    assert message.endswith("--weights-key state_dict.backbone --allow-missing fc")
    model = load(file, weights_key="state_dict.backbone", allow_missing=("fc",))
    assert model.random_paths == ("fc",)


def test_of_two_networks_under_two_prefixes_none_is_chosen(tmp_path: Path) -> None:
    both = under("module.encoder_q.", state_of(1)) | under("module.encoder_k.", state_of(2))
    file = saved({"state_dict": both}, tmp_path / "w.pth")
    message = error_of(file)
    assert f"holds the tensors of {NET} 2 times: under module.encoder_q., module.encoder_k." in message
    assert message.endswith("choose one: --weights-key state_dict.module.encoder_q")
    assert has(load(file, weights_key="state_dict.module.encoder_k"), state_of(2))


def test_the_names_of_another_architecture_are_left_as_they_are(tmp_path: Path) -> None:
    file = saved(under("module.", state_of(name="squeezenet1_1")), tmp_path / "w.pth")
    assert "unexpected (52): module.features.0.weight, " in error_of(file)


def test_a_few_names_in_common_make_no_prefix(tmp_path: Path) -> None:
    others = under("other.", {f"layer{n}.weight": torch.ones(1) for n in range(5)})
    decoder = {f"decoder.fc.{name}": state_of()[f"fc.{name}"] for name in ("weight", "bias")}
    file = saved({"state_dict": others | decoder}, tmp_path / "w.pth")
    message = error_of(file, allow_missing=("**",))
    assert message.endswith("unexpected (7): other.layer0.weight, other.layer1.weight, other.layer2.weight, ...")


# --- what fits -----------------------------------------------------------------------------------------------------


def test_a_misspelt_name_is_an_error_with_the_closest_one(tmp_path: Path) -> None:
    state = {name.replace("fc.weight", "fc.wieght"): tensor for name, tensor in state_of().items()}
    file = saved(state, tmp_path / "w.pth")
    assert error_of(file).splitlines() == [
        f"'{file}' does not fit {NET}",
        "  missing (1): fc.weight",
        "  unexpected (1): fc.wieght (closest: fc.weight)",
    ]


def test_what_may_be_missing_stays_random_and_is_named(tmp_path: Path) -> None:
    headless = {name: tensor for name, tensor in state_of(1).items() if not name.startswith("fc.")}
    file = saved(headless, tmp_path / "w.pth")
    assert error_of(file).splitlines()[1:] == [
        "  missing (2): fc.weight, fc.bias",
        "  to leave them random: --allow-missing fc",
    ]
    for pattern in ("fc", "fc.*", "f*", "fc.weight,fc.bias"):
        model = load(file, allow_missing=(pattern,), seed=7)
        assert model.random_paths == ("fc",)
        assert has(model, headless | {name: state_of(7)[name] for name in ("fc.weight", "fc.bias")})
        assert model.notes == ("random (seed 7), because w.pth lacks them: fc",)
        assert model.weights == f"{sha256_of(file)}; random (seed 7): fc"
    assert "missing (1): fc.bias" in error_of(file, allow_missing=("fc.weight",))
    with pytest.raises(HookxError, match="--allow-missing 'fx' matches nothing in shufflenet_v2_x0_5; closest: fc"):
        load(file, allow_missing=("fx",))


def test_a_tensor_of_the_model_itself_is_held_by_a_dot() -> None:
    assert modules_of(["fc.weight", "fc.bias", "cls_token"]) == ("fc", ".")


def test_what_may_be_missing_and_is_there_is_taken(tmp_path: Path) -> None:
    model = load(saved(state_of(), tmp_path / "w.pth"), allow_missing=("fc", "conv1.**"))
    assert has(model, state_of()) and model.random_paths == () and model.notes == ()


def test_a_file_of_another_architecture_than_it_names_says_so(tmp_path: Path) -> None:
    file = saved({"arch": "squeezenet1_1", "state_dict": state_of(name="squeezenet1_1")}, tmp_path / "w.pth")
    assert error_of(file).endswith("\n  the file names the architecture squeezenet1_1")


def test_position_embeddings_of_another_size_are_an_error_and_are_not_resized(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in get_model("vit_b_16", image_size=384).state_dict().items()}
    one = torch.zeros(1)  # A storage of one number: the shapes are all that counts here.
    weights = Weights(Path("w.pt"), {name: one.expand(shape) for name, shape in shapes.items()})
    file = saved(dict(weights.state), tmp_path / "w.pth")
    _, fitted = Torchvision().find("vit_b_16", "").fit(dataclasses.replace(weights, file=file))
    assert fitted.variant == {}
    assert "other shape (1): encoder.pos_embedding (1, 577, 768) instead of (1, 197, 768)" in error_of(file, "vit_b_16")


def test_numbers_of_another_type_are_said(tmp_path: Path) -> None:
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state_of().items()}
    model = load(saved(halves, tmp_path / "w.pth"))
    assert model.notes == ("weights in w.pth: float16 in the file, float32 in the model",)
    assert torch.equal(model.module.state_dict()["fc.weight"], halves["fc.weight"].float())


def test_published_densenets_with_their_old_names_fit(tmp_path: Path) -> None:
    state = state_of(name="densenet121")
    old = {name.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): tensor for name, tensor in state.items()}
    assert old.keys() != state.keys()
    assert has(load(saved(old, tmp_path / "w.pth"), "densenet121"), state)


# --- the number of classes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [NET, "squeezenet1_1", "mobilenet_v3_small"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_classifier_is_built_for_the_classes_in_the_file_and_it_is_said(
    name: str, prefix: str, tmp_path: Path
) -> None:
    state = state_of(classes=7, name=name)
    file = saved(under(prefix, state), tmp_path / "w.pth")
    model = load(file, name)
    assert has(model, state)
    assert model.forward(torch.rand(2, 3, 64, 64)).shape == (2, 7)
    assert model.notes[-1] == f"{name} is built for 7 classes, as the classifier in w.pth is"
    bones = skeleton(name, str(file))
    assert bones.forward(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 7)


FAMILIES = [
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t"),
    *("mnasnet0_5", "mobilenet_v2", "regnet_y_400mf", "resnet18", "resnext50_32x4d", "swin_t", "vgg11", "vit_b_16"),
    *("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"),
    *("fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn", "ssdlite320_mobilenet_v3_large"),
    *("fcos_resnet50_fpn", "ssd300_vgg16"),
]


@pytest.mark.filterwarnings("ignore:The default weight initialization")
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_built_for_the_classes_in_a_file(name: str) -> None:
    variant: dict[str, Any] = {"num_classes": 5}
    model = Torchvision().find(name, "")
    bare = dataclasses.replace(model, variant=variant).build_bare().state_dict()
    weights, fitted = model.fit(Weights(Path(__file__), under("module.", bare)))
    assert fitted.variant == variant and weights.state.keys() == bare.keys()


def test_another_width_is_not_taken_for_another_number_of_classes(tmp_path: Path) -> None:
    file = saved(state_of(name="shufflenet_v2_x1_0"), tmp_path / "w.pth")
    assert "other shape (" in error_of(file)


def test_half_a_classifier_of_other_classes_is_an_error(tmp_path: Path) -> None:
    file = saved(state_of() | {"fc.weight": torch.ones(7, 1024)}, tmp_path / "w.pth")
    assert error_of(file).endswith("\n  other shape (1): fc.weight (7, 1024) instead of (1000, 1024)")


def test_a_classifier_and_more_of_another_shape_is_an_error_that_lists_both(tmp_path: Path) -> None:
    file = saved(state_of(classes=7) | {"conv1.1.bias": torch.ones(7)}, tmp_path / "w.pth")
    assert "other shape (3): conv1.1.bias (7,) instead of (24,), fc.weight (7, 1024) instead of" in error_of(file)


def test_quantized_weights_fit_their_quantized_model(tmp_path: Path) -> None:
    expected = load_model("quantized_shufflenet_v2_x0_5", "none", ModelOptions(seed=1)).module
    file = saved(under("module.", expected.state_dict()), tmp_path / "w.pth")
    model = load(file, "quantized_shufflenet_v2_x0_5")
    pixels_NCHW = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(model.forward(pixels_NCHW), expected(pixels_NCHW))


# --- a file as the model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_names_its_architecture_is_enough(zipped: bool, tmp_path: Path) -> None:
    content = {
        "epoch": 90,
        "arch": NET,
        "state_dict": under("module.", state_of(classes=10)),
        "best_acc1": torch.tensor(69.7),
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
        "scheduler": {"last_epoch": 90},
    }
    file = saved(content, tmp_path / "checkpoint.pth.tar", _use_new_zipfile_serialization=zipped)
    model = load_model(str(file))
    assert has(model, state_of(classes=10))
    assert model.name == NET and model.weights == f"{sha256_of(file)} (state_dict; without module.)"
    assert model.notes == (
        f"checkpoint.pth.tar says that its architecture is {NET}, taken to be torchvision's",
        "weights in checkpoint.pth.tar: taken from 'state_dict'; prefix 'module.' removed",
        f"{NET} is built for 10 classes, as the classifier in checkpoint.pth.tar is",
    )
    bones = skeleton(str(file))
    assert {tensor.device.type for tensor in bones.module.state_dict().values()} == {"meta"}
    assert bones.preprocessing == model.preprocessing
    assert module_classes(bones.module) == module_classes(model.module)


def test_a_checkpoint_that_names_no_architecture_is_an_error_that_says_how_to(tmp_path: Path) -> None:
    file = saved({"state_dict": state_of()}, tmp_path / "w.pth")
    assert model_error_of(file) == (
        f"'{file}' holds weights and names no architecture (an entry 'arch')\n  name it: --model NAME --weights {file}"
    )
    file = saved({"arch": "mynet", "state_dict": state_of()}, tmp_path / "w.pth")
    assert model_error_of(file).endswith(
        f"names 'mynet', which torchvision does not have\n  name it: --model timm:mynet --weights {file}"
    )
    save_file(state_of(), tmp_path / "w.safetensors")
    assert "names no architecture" in model_error_of(tmp_path / "w.safetensors")


def test_a_file_as_the_model_takes_no_other_weights(tmp_path: Path) -> None:
    file = saved({"arch": NET, "state_dict": state_of()}, tmp_path / "w.pth")
    for weights in ("none", "IMAGENET1K_V1", str(file)):
        assert f"'{file}' holds its own weights; --weights {weights} asks" in model_error_of(file, weights)


def test_a_missing_file_as_the_model_is_an_error_that_names_it(tmp_path: Path) -> None:
    assert f"there is no model file '{tmp_path / 'w.pth'}'" in model_error_of(tmp_path / "w.pth")


def test_a_name_of_the_zoo_is_that_model_even_where_a_file_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(NET).write_text("a file")
    assert load_model(NET, "none").name == NET


# --- pickled modules -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_module_is_refused_with_the_global_that_was_blocked(zipped: bool, tmp_path: Path) -> None:
    module = get_model(NET, weights=None)
    file = saved(module, tmp_path / "model.pth", _use_new_zipfile_serialization=zipped)
    for message in (error_of(file), model_error_of(file)):
        assert "could run code (blocked: torchvision.models.shufflenetv2.ShuffleNetV2)\n" in message
        assert message.endswith("or, if you trust its author to run any code as you: --trust-checkpoint")


@pytest.mark.parametrize("wrap", [lambda module: module, nn.DataParallel, lambda module: {"model": module, "epoch": 1}])
def test_a_trusted_pickled_module_is_the_model(wrap: Callable[[nn.Module], object], tmp_path: Path) -> None:
    torch.manual_seed(1)
    file = saved(wrap(get_model(NET, weights=None)), tmp_path / "model.pth")
    model = load_model(str(file), options=ModelOptions(trust_checkpoint=True))
    assert has(model, state_of())
    assert not any(part.training for part in model.module.modules())
    assert model.weights.startswith(sha256_of(file)) and model.name == "model.pth"
    assert model.notes == (
        "model.pth was allowed to run code while it was read (--trust-checkpoint)",
        "model.pth does not say how to prepare images; assumed ImageNet's default: resize 256 (bilinear), crop 224, "
        "mean 0.485,0.456,0.406, std 0.229,0.224,0.225",
    )
    assert module_classes(skeleton(str(file), options=ModelOptions(trust_checkpoint=True)).module) == module_classes(
        get_model(NET, weights=None)
    )
    as_weights = load(file, trust_checkpoint=True)
    assert has(as_weights, state_of()) and as_weights.notes[-1] == model.notes[0]


def test_trust_is_said_only_where_it_was_needed(tmp_path: Path) -> None:
    assert load(saved(state_of(), tmp_path / "w.pth"), trust_checkpoint=True).notes == ()


# --- hostile files -------------------------------------------------------------------------------------------------


class RunsCode:
    """What is pickled is a call that makes a folder, which reading the pickle repeats."""

    def __init__(self, traces: Path) -> None:
        self.traces = traces

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.traces),)


def hostile_module(traces: Path) -> nn.Module:
    module = nn.Linear(2, 2)
    vars(module)["hook"] = RunsCode(traces)
    return module


HOSTILE: dict[str, Callable[[RunsCode], object]] = {
    "the whole file": lambda code: code,
    "a tensor of a plain state dict": lambda code: {"fc.weight": code},
    "a tensor of a nested one": lambda code: {"state_dict": {"fc.weight": code}},
    "beside whole weights": lambda code: {"arch": NET, "state_dict": state_of(), "optimizer": code},
    "the architecture": lambda code: {"arch": code, "state_dict": state_of()},
    "a module": lambda code: hostile_module(code.traces),
    "inside what is stood in for": lambda code: {"state_dict": state_of(), "args": argparse.Namespace(lr=code)},
}


@pytest.mark.parametrize("place", HOSTILE)
@pytest.mark.parametrize("name", ["w.pt", "checkpoint.pth.tar"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_built_to_run_code_is_refused_on_every_way_in_and_runs_none(
    place: str, name: str, zipped: bool, tmp_path: Path
) -> None:
    traces = tmp_path / "traces"
    file = saved(HOSTILE[place](RunsCode(traces)), tmp_path / name, _use_new_zipfile_serialization=zipped)
    for message in (error_of(file), error_of(file, weights_key="state_dict"), model_error_of(file)):
        assert "reading it could run code (blocked: " in message and "--trust-checkpoint" in message
    with pytest.raises(ModelError, match="blocked: "):
        skeleton(NET, str(file))
    assert not traces.exists()
    torch.load(file, weights_only=False)
    assert traces.exists()  # It would have worked.


@pytest.mark.parametrize("module", ["os", "posix", "sys", "builtins", "subprocess"])
def test_a_dangerous_function_is_named_as_what_was_blocked(module: str, tmp_path: Path) -> None:
    file = saved({"fc.weight": 22}, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    content = file.read_bytes()
    assert content.count(b"K\x16") == 1
    file.write_bytes(content.replace(b"K\x16", f"c{module}\ngetattr\n".encode()))
    assert "getattr)" in error_of(file)


def test_a_pickle_in_a_shard_runs_no_code(tmp_path: Path) -> None:
    index, traces = shards(tmp_path, state_of(), "pytorch_model.bin"), tmp_path / "traces"
    saved({"fc.weight": RunsCode(traces)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    assert "reading it could run code" in error_of(index)
    assert not traces.exists()


def test_a_pickle_that_is_called_safetensors_runs_no_code(tmp_path: Path) -> None:
    traces = tmp_path / "traces"
    file = saved({"fc.weight": RunsCode(traces)}, tmp_path / "w.safetensors")
    assert error_of(file).startswith(f"cannot read weights from '{file}': ")
    assert error_of(file, trust_checkpoint=True).startswith(f"cannot read weights from '{file}': ")
    assert not traces.exists()


def test_a_safe_reading_stays_safe_in_an_environment_that_asks_for_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    traces = tmp_path / "traces"
    assert "could run code" in error_of(saved({"fc.weight": RunsCode(traces)}, tmp_path / "w.pt"))
    assert not traces.exists()


def test_what_hookx_stands_in_for_stays_blocked_elsewhere(tmp_path: Path) -> None:
    file = saved({"state_dict": state_of(), "args": argparse.Namespace()}, tmp_path / "w.pt")
    before = set(torch.serialization.get_safe_globals())
    load(file)
    assert set(torch.serialization.get_safe_globals()) == before


@cache
def scripted() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated.
        return torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_torchscript_is_refused_because_its_interpreter_calls_no_hooks(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.jit.save(scripted(), str(file))
    for message in (error_of(file), error_of(file, trust_checkpoint=True), model_error_of(file)):
        assert (
            "is a TorchScript archive, which hookx does not read: TorchScript's interpreter calls no hooks" in message
        )
    module = torch.jit.load(str(file))
    with pytest.raises(RuntimeError, match="not supported on ScriptModules"):
        module.get_submodule("0").register_forward_hook(lambda *_: None)


def test_a_torchscript_archive_built_to_run_code_is_not_opened(tmp_path: Path) -> None:
    traces = tmp_path / "traces"
    file = saved(RunsCode(traces), tmp_path / "model.pt")
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(f"{archive.namelist()[0].split('/')[0]}/constants.pkl", pickle.dumps(RunsCode(traces)))
    for trust in (False, True):
        assert "TorchScript" in error_of(file, trust_checkpoint=trust)
        assert "TorchScript" in model_error_of(file, trust_checkpoint=trust)
    assert not traces.exists()


# --- exported programs ---------------------------------------------------------------------------------------------


class Small(nn.Module):
    """In-place operations, a module that runs three times, a block inside a block, a module that does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.mix = nn.Conv2d(8, 8, 1)
        self.act = nn.ReLU(inplace=True)
        self.nothing = nn.Identity()
        self.drop = nn.Dropout()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.mix(self.act(self.mix(self.stem(x))) + 1))
        x = self.act(self.nothing(x) - 1)
        return self.head(self.drop(x.mean((2, 3))))


ANY_NUMBER = ({0: torch.export.Dim("N")},)


def exported(module: nn.Module, file: Path, *shapes: tuple[int, ...], dynamic: Any = ANY_NUMBER) -> Path:
    inputs = tuple(torch.rand(shape) for shape in shapes or [(4, 3, 32, 32)])
    torch.export.save(torch.export.export(module, inputs, dynamic_shapes=dynamic), str(file))
    return file


@pytest.fixture(scope="module")
def small() -> Small:
    torch.manual_seed(0)
    module = Small()
    module(torch.rand(8, 3, 32, 32))  # The statistics of batch norm are no longer 0 and 1.
    return module.eval()


@pytest.fixture(scope="module")
def program(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(small, tmp_path_factory.mktemp("exported") / "small.pt2")


programs_tell_classes = pytest.mark.skipif(
    not hasattr(InterpreterModule, "type_name"),
    reason="this torch does not keep the classes of modules in exported programs",
)


def load_trusted(file: Path) -> LoadedModel:
    return load_model(str(file), options=ModelOptions(trust_checkpoint=True))


@programs_tell_classes
def test_an_exported_program_has_the_paths_the_classes_and_the_calls_of_its_model(small: Small, program: Path) -> None:
    model = load_trusted(program).module
    # What computes nothing leaves no trace in a program but its name.
    assert module_classes(model) == module_classes(small) | {"nothing": "Module"}

    def described(layers: list[Layer]) -> list[tuple[str, str, list[str]]]:
        return [
            (layer.path, layer.class_name, [call.outputs[0].shape_text for call in layer.calls])
            for layer in layers
            if layer.path != "nothing"
        ]

    images_NCHW = example_images(Runner.of(small), 32)
    assert described(probe(Runner.of(model), images_NCHW)) == described(probe(Runner.of(small), images_NCHW))


def test_an_exported_programs_layers_are_those_of_the_model_bit_for_bit(small: Small, program: Path) -> None:
    model = load_trusted(program)
    pixels_NCHW = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    selectors = [path for path in module_classes(small) if path != "nothing"]
    with Capture(small, selectors) as expected:
        small(pixels_NCHW)
    with Capture(model.module, selectors) as capture:
        model.forward(pixels_NCHW)
    assert capture.keys() == expected.keys() and len(capture) > 10
    for address in expected:
        assert torch.equal(capture[address], expected[address]), address


@programs_tell_classes
def test_a_run_captures_rows_of_an_exported_program_also_of_one_image(small: Small, program: Path) -> None:
    model = load_trusted(program)
    runner = Runner.of(model.module)
    probed = probe(runner, example_images(runner, 32))
    targets = select(parse_selectors("stem.1,act,type:Linear"), probed, model.name).targets
    pixels_NCHW = torch.rand(3, 3, 32, 32)
    rows = {str(target.address): torch.empty(3, *target.shape) for target in targets}
    assert list(rows) == ["stem.1", "act:0", "act:1", "act:2", "head"]
    with RowCapture(runner, targets) as capture:
        for start, stop in ((0, 2), (2, 3)):
            capture.run(pixels_NCHW[start:stop], {address: tensor[start:stop] for address, tensor in rows.items()})
    with torch.inference_mode():
        assert torch.equal(rows["head"][:2], small(pixels_NCHW[:2]))
        assert torch.equal(rows["head"][2:], small(pixels_NCHW[2:]))
        assert torch.equal(rows["stem.1"][:2], small.stem[:2](pixels_NCHW[:2]))


@programs_tell_classes
def test_an_exported_model_of_the_zoo_gives_its_activations_bit_for_bit(tmp_path: Path) -> None:
    expected = load_model("resnet18", "none").module
    model = load_trusted(exported(expected, tmp_path / "resnet18.pt2", (2, 3, 64, 64)))
    assert module_classes(model.module) == module_classes(expected)
    pixels_NCHW = torch.rand(3, 3, 64, 64)
    with Capture(expected, "**") as of_model, Capture(model.module, "**") as of_program:
        expected(pixels_NCHW), model.forward(pixels_NCHW)
    assert of_program.keys() == of_model.keys()
    assert all(torch.equal(of_program[address], of_model[address]) for address in of_model)


def test_an_exported_program_is_prepared_for_at_the_size_of_its_example_and_it_is_said(program: Path) -> None:
    model = load_trusted(program)
    assert model.preprocessing.crop_px == 32 and model.preprocessing.resize_px == 37
    assert model.weights == sha256_of(program) and model.name == "small.pt2"
    assert any("assumed ImageNet's default at the size of its example input: resize 37" in n for n in model.notes)
    assert any("nn.Identity" in note for note in model.notes)


def test_images_of_any_size_get_that_of_the_example(small: Small, tmp_path: Path) -> None:
    side = torch.export.Dim.DYNAMIC
    file = exported(small, tmp_path / "m.pt2", (4, 3, 48, 48), dynamic=({0: side, 2: side, 3: side},))
    model = load_trusted(file)
    assert model.preprocessing.crop_px == 48
    for count in (1, 2, 5):
        pixels_NCHW = torch.rand(count, 3, 48, 48)
        with torch.inference_mode():
            assert torch.equal(model.forward(pixels_NCHW), small(pixels_NCHW))


def test_a_limit_on_the_batch_is_said(small: Small, tmp_path: Path) -> None:
    file = exported(small, tmp_path / "m.pt2", dynamic=({0: torch.export.Dim("N", max=16)},))
    assert load_trusted(file).notes[-1] == "m.pt2 takes at most 16 images at once; choose no larger --batch-size"


class Sum(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


@pytest.mark.parametrize(
    ("build", "shapes", "dynamic", "says"),
    [
        (Small, [(2, 3, 8, 8)], None, "takes batches of exactly 2 images\n  export it with torch.export.export("),
        (Small, [(1, 3, 8, 8)], None, "takes batches of exactly 1 image\n"),
        (Small, [(4, 3, 8, 8)], ({0: torch.export.Dim("N", min=4)},), "takes batches of 4 to any number of images\n"),
        (Sum, [(4, 3, 8, 8)] * 2, ({0: torch.export.Dim("N")},) * 2, "takes 2 inputs; hookx gives one batch of images"),
        (nn.ReLU, [(4, 3)], ANY_NUMBER, "hookx gives torch.float32 (N, 3, height, width)"),
        (nn.ReLU, [(4, 1, 8, 8)], ANY_NUMBER, "takes images with 1 channels, 8 x 8; hookx gives RGB images"),
    ],
)
def test_a_program_for_anything_but_batches_of_images_is_an_error_that_says_what_it_takes(
    build: Callable[[], nn.Module], shapes: list[tuple[int, ...]], dynamic: Any, says: str, tmp_path: Path
) -> None:
    file = exported(build().eval(), tmp_path / "m.pt2", *shapes, dynamic=dynamic)
    assert f"'{file}' {says}" in model_error_of(file, trust_checkpoint=True) or says in model_error_of(
        file, trust_checkpoint=True
    )


@programs_tell_classes
@pytest.mark.parametrize("layer", [nn.Dropout, nn.BatchNorm2d])
def test_a_program_exported_in_training_mode_is_an_error(layer: Any, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), layer() if layer is nn.Dropout else layer(4)).train()
    file = exported(module, tmp_path / "m.pt2")
    assert f"'{file}' was exported in training mode (aten." in model_error_of(file, trust_checkpoint=True)
    load_trusted(exported(module.eval(), file))


def test_an_exported_program_is_not_opened_unless_it_is_trusted(program: Path) -> None:
    message = model_error_of(program)
    assert f"'{program}' is an exported program, and reading it can run code: torch.export.load unpickles" in message
    assert message.endswith("--trust-checkpoint")


def test_an_exported_program_built_to_run_code_is_refused_and_runs_none(program: Path, tmp_path: Path) -> None:
    traces = tmp_path / "traces"
    evil = saved(RunsCode(traces), tmp_path / "evil")
    file = tmp_path / "hostile.pt2"
    with zipfile.ZipFile(program) as original, zipfile.ZipFile(file, "w") as hostile:
        for name in original.namelist():
            content = original.read(name)
            # The example inputs are unpickled without the safe reader, in every version of the format.
            is_pickled = name.endswith((".pt", "sample_inputs.pt", "example_inputs.pt"))
            hostile.writestr(name, evil.read_bytes() if is_pickled else content)
    assert "reading it can run code" in model_error_of(file)
    assert "is an exported program" in error_of(file)
    with pytest.raises(ModelError, match="is an exported program"):
        skeleton(NET, str(file))
    assert not traces.exists()
    with pytest.raises(ModelError):
        load_trusted(file)
    assert traces.exists()  # It would have worked.


def test_a_damaged_exported_program_is_an_error_that_names_it(program: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.pt2"
    with zipfile.ZipFile(program) as original, zipfile.ZipFile(file, "w") as damaged:
        for name in original.namelist():
            damaged.writestr(name, b"{}" if name.endswith(".json") else original.read(name))
    assert f"cannot read the exported program '{file}': " in model_error_of(file, trust_checkpoint=True)
    file.write_bytes(program.read_bytes()[:1000])
    assert f"cannot read weights from '{file}': " in model_error_of(file, trust_checkpoint=True)


def test_an_exported_program_is_no_file_of_weights(program: Path) -> None:
    assert f"pass it as --model {program}" in error_of(program, trust_checkpoint=True)
    assert kind_of(program) == "exported program"


def test_what_a_skeleton_reads_of_a_file_is_what_is_in_it(tmp_path: Path) -> None:
    for zipped in (True, False):
        file = saved({"state_dict": state_of()}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
        shapes = read_weights(str(file), shapes_only=True).state
        assert {name: tensor.shape for name, tensor in shapes.items()} == {
            name: tensor.shape for name, tensor in state_of().items()
        }


# --- archives that claim more than they hold -----------------------------------------------------------------------


def zipped_again(file: Path, change: Callable[[zipfile.ZipFile], None] = lambda _: None) -> Path:
    """Compress what `torch.save` has stored, and change the archive's directory before it is written."""
    again = file.with_stem("again")
    with zipfile.ZipFile(file) as stored, zipfile.ZipFile(again, "w", zipfile.ZIP_DEFLATED) as compressed:
        for name in stored.namelist():
            compressed.writestr(name, stored.read(name))
        change(compressed)
    return again


def test_a_checkpoint_that_was_compressed_afterwards_is_read(tmp_path: Path) -> None:
    file = saved(state_of(), tmp_path / "weights.pt")
    state = read_weights(str(zipped_again(file))).state
    assert all(torch.equal(state[name], tensor) for name, tensor in state_of().items())


def test_an_archive_that_unpacks_to_far_more_than_its_size_is_refused(tmp_path: Path) -> None:
    def add_zeros(archive: zipfile.ZipFile) -> None:
        archive.writestr("weights/data/999", bytes(200 * 2**20))

    file = zipped_again(saved({"fc.bias": torch.zeros(3)}, tmp_path / "weights.pt"), add_zeros)
    assert re.search(r"would unpack from \d{3},\d{3} bytes to 209,\d{3},\d{3}, as no checkpoint does\n", error_of(file))
    with pytest.raises(ModelError, match="would unpack from"):
        load_model(str(file), "default")


def test_an_archive_whose_entries_share_one_piece_of_the_file_is_refused(tmp_path: Path) -> None:
    def share(archive: zipfile.ZipFile) -> None:
        largest = max(archive.filelist, key=lambda entry: entry.compress_size)
        for number in range(50):
            entry = copy.copy(largest)
            entry.filename = f"weights/data/{1000 + number}"
            archive.filelist.append(entry)

    file = zipped_again(saved(state_of(), tmp_path / "weights.pt"), share)
    assert "its directory claims" in error_of(file)


def test_an_archive_that_claims_more_than_it_stores_is_refused(tmp_path: Path) -> None:
    def lie(archive: zipfile.ZipFile) -> None:
        archive.filelist[0].file_size = 2**40

    assert "would unpack from" in error_of(zipped_again(saved(state_of(), tmp_path / "weights.pt"), lie))


def test_entries_that_refer_to_each_other_again_and_again_are_searched_in_no_time(tmp_path: Path) -> None:
    inner: dict[str, Any] = {}
    for _ in range(30):
        inner = dict.fromkeys(("model", "state_dict", "net", "ema"), inner)
    assert "is not a state dict" in error_of(saved(inner, tmp_path / "weights.pt"))
