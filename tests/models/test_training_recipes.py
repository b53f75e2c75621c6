"""Checkpoints as public training recipes leave them, with what only the training needs beside the network."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import get_model

from hookx.errors import ModelError
from hookx.models import LoadedModel, ModelOptions, load_model

NET = "shufflenet_v2_x0_5"
State = dict[str, Tensor]


def state_of(seed: int = 1) -> State:
    torch.manual_seed(seed)
    return dict(get_model(NET, weights=None).state_dict())


def body_of(seed: int = 1) -> State:
    return {name: tensor for name, tensor in state_of(seed).items() if not name.startswith("fc.")}


def under(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def head(*names: str) -> State:
    return {name: torch.ones(4) for name in names}


def load(content: object, folder: Path, ref: str = NET, **options: Any) -> LoadedModel:
    torch.save(content, folder / "w.pth")
    return load_model(ref, str(folder / "w.pth"), ModelOptions(**options))


def error_of(content: object, folder: Path, ref: str = NET, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load(content, folder, ref, **options)
    return str(caught.value)


def has(model: LoadedModel, state: Mapping[str, Tensor]) -> bool:
    loaded = model.module.state_dict()
    return all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def moco(encoder: Mapping[str, Tensor], momentum: Mapping[str, Tensor]) -> dict[str, Any]:
    mlp = head("fc.0.weight", "fc.2.weight")
    both = under("module.encoder_q.", {**encoder, **mlp}) | under("module.encoder_k.", {**momentum, **mlp})
    return {"arch": "resnet50", "epoch": 199, "state_dict": both | head("module.queue", "module.queue_ptr")}


def moco_3(encoder: Mapping[str, Tensor], momentum: Mapping[str, Tensor]) -> dict[str, Any]:
    mlp = head("fc.0.weight", "fc.1.running_mean")
    both = under("module.base_encoder.", {**encoder, **mlp}) | under("module.momentum_encoder.", {**momentum, **mlp})
    return {"arch": "resnet50", "state_dict": both | head("module.predictor.0.weight")}


def byol(encoder: Mapping[str, Tensor], momentum: Mapping[str, Tensor]) -> dict[str, Any]:
    online = under("online_network.encoder.", encoder) | head("online_network.projection.net.0.weight")
    target = under("target_network.encoder.", momentum) | head("target_network.projection.net.0.weight")
    return online | target | head("predictor.net.0.weight")


def dino(encoder: Mapping[str, Tensor], momentum: Mapping[str, Tensor]) -> dict[str, Any]:
    mlp = head("head.mlp.0.weight", "head.last_layer.weight_g")
    return {
        "student": under("module.", under("backbone.", momentum) | mlp),
        "teacher": under("backbone.", encoder) | mlp,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 3,
        "dino_loss": head("center"),
    }


def ibot(encoder: Mapping[str, Tensor], momentum: Mapping[str, Tensor]) -> dict[str, Any]:
    content = dino(encoder, momentum)
    content["ibot_loss"] = {**content.pop("dino_loss"), **head("center2")}
    return content


def dino_2(encoder: Mapping[str, Tensor], momentum: Mapping[str, Tensor]) -> dict[str, Any]:
    mlp = head("dino_head.mlp.0.weight")
    teacher, student = under("backbone.", encoder) | mlp, under("backbone.", momentum) | mlp
    return {
        "model": under("student.", student) | under("teacher.", teacher) | head("dino_loss.center"),
        "iteration": 1,
    }


def moving_average(encoder: Mapping[str, Tensor], momentum: Mapping[str, Tensor]) -> dict[str, Any]:
    return under("model.", momentum) | under("ema_model.module.", encoder) | head("initted", "step")


TWO_NETWORKS = {
    "MoCo 2": (moco, "state_dict.module.encoder_q"),
    "MoCo 3": (moco_3, "state_dict.module.base_encoder"),
    "BYOL": (byol, "online_network.encoder"),
    "DINO": (dino, "teacher"),
    "iBOT": (ibot, "teacher"),
    "DINOv2": (dino_2, "model.teacher.backbone"),
    "moving average": (moving_average, "ema_model.module"),
}


@pytest.mark.parametrize("recipe", TWO_NETWORKS)
def test_of_the_networks_of_a_recipe_the_one_that_is_used_is_proposed_and_never_a_loss(
    recipe: str, tmp_path: Path
) -> None:
    make, key = TWO_NETWORKS[recipe]
    message = error_of(make(body_of(1), body_of(2)), tmp_path, allow_missing=("fc",))
    assert message.endswith(f"choose one: --weights-key {key}") and "loss" not in message
    model = load(
        make(body_of(1), body_of(2)), tmp_path, weights_key=key, allow_missing=("fc",), ignore_unexpected=("**",)
    )
    assert has(model, body_of(1)) and model.random_paths == ("fc",)


@pytest.mark.parametrize("recipe", TWO_NETWORKS)
def test_it_is_taken_if_the_user_leaves_out_whatever_is_unexpected(recipe: str, tmp_path: Path) -> None:
    make, _ = TWO_NETWORKS[recipe]
    for encoder, momentum in ((1, 2), (2, 1)):
        content = make(body_of(encoder), body_of(momentum))
        assert has(load(content, tmp_path, allow_missing=("fc",), ignore_unexpected=("*",)), body_of(encoder))


def test_of_two_networks_the_one_that_the_user_does_not_leave_out_is_taken(tmp_path: Path) -> None:
    content = moco(body_of(1), body_of(2))
    options: dict[str, Any] = {"allow_missing": ("fc",)}
    kept = load(content, tmp_path, ignore_unexpected=("module.encoder_q,fc.*",), **options)
    assert has(kept, body_of(2)) and "without module.encoder_k." in kept.weights
    student = load(dino(body_of(1), body_of(2)), tmp_path, ignore_unexpected=("teacher",), **options)
    assert has(student, body_of(2))
    assert any("also holds 'teacher'" in note for note in student.notes)


def test_of_two_networks_that_no_recipe_names_none_is_taken_even_then(tmp_path: Path) -> None:
    both = under("left.", body_of(1)) | under("right.", body_of(2))
    message = error_of(both, tmp_path, allow_missing=("fc",), ignore_unexpected=("*",))
    assert "2 times: under left., right." in message


def swav() -> State:
    return under("module.", body_of() | head("projection_head.0.weight", "projection_head.3.bias", "prototypes.weight"))


def test_what_the_model_has_no_place_for_is_left_out_on_request_and_said(tmp_path: Path) -> None:
    message = error_of(swav(), tmp_path)
    assert message.splitlines()[1:] == [
        "  missing (2): fc.weight, fc.bias",
        "  unexpected (3): projection_head.0.weight, projection_head.3.bias, prototypes.weight",
        "  to leave what is missing random: --allow-missing fc",
        "  to leave out what is unexpected: --ignore-unexpected projection_head,prototypes",
    ]
    model = load(swav(), tmp_path, allow_missing=("fc",), ignore_unexpected=("prototypes,projection_head",))
    assert has(model, body_of())
    assert model.notes == (
        "weights in w.pth: prefix 'module.' removed",
        f"left out 3 tensors that {NET} does not have (--ignore-unexpected): projection_head.0.weight, "
        "projection_head.3.bias, prototypes.weight",
        "random (seed 0), because w.pth lacks them: fc",
    )
    digest = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()
    assert model.weights == (
        f"sha256:{digest} (without module.; ignoring projection_head, prototypes); random (seed 0): fc"
    )


@pytest.mark.parametrize("pattern", ["module.prototypes", "prototypes", "proto*", "**.weight,module.*"])
def test_a_pattern_matches_the_names_in_the_file_and_those_without_their_prefix(pattern: str, tmp_path: Path) -> None:
    state = under("module.", state_of() | head("prototypes.weight"))
    assert has(load(state, tmp_path, ignore_unexpected=(pattern,)), state_of())


def test_a_pattern_that_matches_nothing_unexpected_is_an_error(tmp_path: Path) -> None:
    for pattern in ("prototype", "fc", "conv1.*"):
        message = error_of(swav(), tmp_path, allow_missing=("fc",), ignore_unexpected=("pro*", pattern))
        assert f"--ignore-unexpected '{pattern}' matches no unexpected tensor of '{tmp_path / 'w.pth'}'" in message
    assert "all of them have a place in the model" in error_of(state_of(), tmp_path, ignore_unexpected=("*",))


def test_what_is_missing_stays_an_error_whatever_is_left_out(tmp_path: Path) -> None:
    assert "missing (2): fc.weight, fc.bias" in error_of(swav(), tmp_path, ignore_unexpected=("**",))
    other = {name + "_": tensor for name, tensor in state_of().items()}
    message = error_of(other, tmp_path, allow_missing=("**",), ignore_unexpected=("**",))
    assert message.startswith("--ignore-unexpected leaves nothing of")


def test_tensors_of_another_shape_stay_an_error(tmp_path: Path) -> None:
    state = state_of() | {"conv5.1.bias": torch.ones(3)} | head("prototypes.weight")
    assert "other shape (1): conv5.1.bias" in error_of(state, tmp_path, ignore_unexpected=("**",))


def test_the_counters_of_a_profiler_are_left_out_by_one_pattern(tmp_path: Path) -> None:
    torch.manual_seed(1)
    net = get_model(NET, weights=None)
    for module in net.modules():  # As thop does.
        module.register_buffer("total_ops", torch.zeros(1, dtype=torch.float64))
        module.register_buffer("total_params", torch.zeros(1, dtype=torch.float64))
    state = nn.DataParallel(net).state_dict()
    message = error_of(state, tmp_path)
    proposal = message.partition("--ignore-unexpected ")[2].strip("'")
    assert proposal == "**.total_ops,**.total_params"
    assert has(load(state, tmp_path, ignore_unexpected=(proposal,)), state_of())


def test_wrappers_within_wrappers_and_a_loss_beside_them_come_off(tmp_path: Path) -> None:
    wrapped = under("model._orig_mod.module.", state_of()) | head("criterion.weight", "ema.decay")
    model = load({"state_dict": wrapped, "epoch": 1}, tmp_path)
    assert has(model, state_of())
    assert "left out 1 tensor under 'criterion'" in model.notes[0]


def test_what_could_be_part_of_the_model_is_left_out_only_on_request(tmp_path: Path) -> None:
    state = under("module.backbone.", body_of()) | {"module.fc.weight": torch.ones(2)}
    assert "it may or may not belong to fc" in error_of(state, tmp_path, allow_missing=("fc",))
    model = load(state, tmp_path, allow_missing=("fc",), ignore_unexpected=("module.fc",))
    assert has(model, body_of()) and model.random_paths == ("fc",)


def test_an_option_about_tensors_of_a_file_needs_a_file() -> None:
    for ref in (NET, "python:torchvision.models:squeezenet1_1"):
        with pytest.raises(ModelError, match="--ignore-unexpected fc is about the tensors of a weights file"):
            load_model(ref, "none", ModelOptions(ignore_unexpected=("fc",)))


def test_the_factory_of_a_user_leaves_out_tensors_too(tmp_path: Path) -> None:
    ref = f"python:torchvision.models:{NET}"
    model = load(swav(), tmp_path, ref, allow_missing=("fc",), ignore_unexpected=("*",))
    assert has(model, body_of()) and "ignoring *" in model.weights


# --- files for timm ------------------------------------------------------------------------------------------------


def vit_of(name: str, seed: int = 1, **arguments: Any) -> nn.Module:
    timm = pytest.importorskip("timm", reason="the extra timm is not installed")
    torch.manual_seed(seed)
    module: nn.Module = timm.create_model(name, depth=4, **arguments)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def load_vit(content: object, folder: Path, name: str, **options: Any) -> LoadedModel:
    arguments = {"depth": "4", **options.pop("model_args", {})}
    return load(content, folder, f"timm:{name}", model_args=arguments, **options)


def chunked(state: Mapping[str, Tensor]) -> State:
    def rename(name: str) -> str:
        first, *rest = name.split(".")
        return ".".join([first, str(int(rest[0]) // 2), *rest]) if first == "blocks" else name

    return {rename(name): tensor for name, tensor in state.items()}


def test_masked_autoencoders_are_read_without_their_decoder(tmp_path: Path) -> None:
    net = vit_of("vit_tiny_patch16_224", num_classes=0)
    decoder = head("decoder_embed.weight", "decoder_pos_embed", "decoder_blocks.0.norm1.weight", "decoder_pred.bias")
    content = {"model": {**net.state_dict(), **decoder, "mask_token": torch.zeros(1, 1, 192)}, "scaler": {}}
    model = load_vit(
        content,
        tmp_path,
        "vit_tiny_patch16_224",
        model_args={"num_classes": "0"},
        ignore_unexpected=("decoder_*,mask_token",),
    )
    assert has(model, net.state_dict())


@pytest.mark.parametrize("wrap", ["", "teacher.backbone.", "module."])
def test_dinov2_is_read_in_chunks_and_with_its_own_names_for_registers(wrap: str, tmp_path: Path) -> None:
    name = "vit_small_patch14_reg4_dinov2"
    net = vit_of(name, img_size=56)
    state = chunked(net.state_dict())
    state["register_tokens"] = state.pop("reg_token")
    # The published file has a position of the class token, and timm has added it to the token.
    token = torch.zeros(1, 1, 384)
    state["pos_embed"] = torch.cat((token, state["pos_embed"]), 1)
    state["mask_token"] = torch.zeros(1, 384)
    model = load_vit(under(wrap, state), tmp_path, name, model_args={"img_size": "56"})
    assert has(model, net.state_dict())
    assert any("joined the chunks of blocks" in note for note in model.notes)
    converted = next(note for note in model.notes if "converted by timm's own function" in note)
    assert "mask_token" in converted


def test_dinov3_is_read_under_its_own_names(tmp_path: Path) -> None:
    name = "vit_small_patch16_dinov3_qkvb"
    net = vit_of(name)
    state: State = {}
    for key, tensor in net.state_dict().items():
        key = key.replace("reg_token", "storage_tokens").replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        if key.endswith("q_bias"):
            value = net.state_dict()[key.replace("q_bias", "v_bias")]
            state[key.replace("q_bias", "qkv.bias")] = torch.cat((tensor, torch.zeros_like(tensor), value))
            state[key.replace("q_bias", "qkv.bias_mask")] = torch.ones(3 * len(tensor))
        elif not key.endswith(("v_bias", "k_bias")):
            state[key] = tensor
    state |= {"mask_token": torch.zeros(1, 384), "rope_embed.periods": torch.ones(16)}
    model = load_vit(state, tmp_path, name)
    assert has(model, net.state_dict())
    dropped = next(note for note in model.notes if "converted by timm's own function" in note)
    assert "dropped or divided (10): mask_token, rope_embed.periods, " in dropped


def test_a_file_for_another_size_is_resized_as_timm_does_and_it_is_said(tmp_path: Path) -> None:
    small, large = vit_of("vit_tiny_patch16_224", img_size=64), vit_of("vit_tiny_patch16_224", img_size=96)
    from timm.models.vision_transformer import checkpoint_filter_fn

    expected = checkpoint_filter_fn(dict(small.state_dict()), large)
    model = load_vit(dict(small.state_dict()), tmp_path, "vit_tiny_patch16_224", model_args={"img_size": "96"})
    assert has(model, expected)
    assert any("resized (1): pos_embed from (1, 17, 192) to (1, 37, 192)" in note for note in model.notes)


def test_a_file_that_fits_timms_model_is_not_converted(tmp_path: Path) -> None:
    net = vit_of("vit_tiny_patch16_224")
    model = load_vit(dict(net.state_dict()), tmp_path, "vit_tiny_patch16_224")
    assert has(model, net.state_dict()) and model.notes == ()
