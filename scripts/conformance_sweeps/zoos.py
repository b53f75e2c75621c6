"""Small models with random weights from other libraries, for `scripts/conformance.py`: factories for hookx.

hookx list-layers scripts/conformance_sweeps/zoos.py:transformers_model --model-arg name=swin
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import nn

SIDE_PX = 64
LARGER_PX = {"pan.resnet18": 128, "dpt.tu-vit_tiny_patch16_224": 224, "timm_vit": 224}  # for models that need more


class MissingPackageError(Exception):
    """The library of a zoo is not installed."""


def library(module: str, package: str) -> Any:
    """Import a zoo's library.

    Raises:
        MissingPackageError: it is not installed, or lacks a package itself.
    """
    try:
        found: ModuleType = import_module(module)
    except ModuleNotFoundError as error:
        lacking = package if error.name == module else f"{package} and {error.name}"
        raise MissingPackageError(f"these models need {lacking}: pip install {lacking.replace(' and ', ' ')}") from None
    return found


# --- transformers -----------------------------------------------------------------------------------------------------

_VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
_VIT |= {"image_size": SIDE_PX, "patch_size": 16}
_SWIN = {
    "image_size": SIDE_PX,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
_STAGES = {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1]}
_CONVNEXT = {**_STAGES, "image_size": SIDE_PX}
_RESNET = {**_STAGES, "embedding_size": 16, "layer_type": "basic"}
_PYRAMID = {"hidden_sizes": [16, 32, 40, 48], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 5, 8]}

# The type of a configuration -> its small form.
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "aimv2_vision_model": _VIT,
    "beit": {**_VIT, "use_relative_position_bias": True},
    "bit": {**_STAGES, "embedding_size": 16, "num_groups": 4},
    "clip_vision_model": _VIT,
    "convnext": _CONVNEXT,
    "convnextv2": _CONVNEXT,
    "cvt": {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 2, 3]},
    "data2vec-vision": {**_VIT, "use_relative_position_bias": True},
    "deit": _VIT,
    "dinov2": _VIT,
    "dinov2_with_registers": {**_VIT, "num_register_tokens": 2},
    "dinov3_convnext": _CONVNEXT,
    "dinov3_vit": {**_VIT, "num_register_tokens": 2},
    "efficientnet": {"image_size": SIDE_PX, "width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320},
    "focalnet": {
        "image_size": SIDE_PX,
        "embed_dim": 16,
        "depths": [1, 1],
        "focal_levels": [2, 2],
        "focal_windows": [3, 3],
    },
    "glpn": {**_PYRAMID, "num_encoder_blocks": 4},
    "hgnet_v2": {},
    "hiera": {"image_size": [SIDE_PX, SIDE_PX], "embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2]},
    "ijepa": _VIT,
    "levit": {
        "image_size": SIDE_PX,
        "hidden_sizes": [16, 24, 32],
        "num_attention_heads": [1, 2, 2],
        "depths": [1, 1, 1],
    },
    "mobilenet_v1": {"image_size": SIDE_PX, "depth_multiplier": 0.25},
    "mobilenet_v2": {"image_size": SIDE_PX, "depth_multiplier": 0.35},
    "mobilevit": {"image_size": SIDE_PX, "hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 40]},
    "mobilevitv2": {"image_size": SIDE_PX, "width_multiplier": 0.5},
    "poolformer": {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1]},
    "pvt": {**_PYRAMID, "image_size": SIDE_PX, "num_attention_heads": [1, 2, 4, 8]},
    "pvt_v2": {**_PYRAMID, "image_size": SIDE_PX, "num_attention_heads": [1, 2, 4, 8]},
    "regnet": {**_STAGES, "embedding_size": 16, "groups_width": 8},
    "resnet": _RESNET,
    "sam_vision_model": {**_VIT, "output_channels": 16, "mlp_dim": 48, "global_attn_indexes": [1], "window_size": 2},
    "segformer": {**_PYRAMID, "num_encoder_blocks": 4},
    "siglip_vision_model": _VIT,
    "swiftformer": {"embed_dims": [16, 24, 32, 40], "depths": [1, 1, 1, 1]},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "textnet": {},
    "vit": _VIT,
    "vit_mae": _VIT,  # masks patches at random: refused
    "vit_msn": _VIT,
    "vitdet": {**_VIT, "num_attention_heads": 2, "window_size": 2, "window_block_indices": [0]},
    "yolos": {**_VIT, "image_size": [SIDE_PX, SIDE_PX], "num_detection_tokens": 5},
}


def transformers_model(name: str = "vit") -> nn.Module:
    """Build one of transformers' vision models, by the type of its configuration."""
    transformers = library("transformers", "transformers")
    model: nn.Module = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(name, **TRANSFORMERS[name]))
    return model


# --- segmentation-models-pytorch --------------------------------------------------------------------------------------

_ARCHITECTURES = ("unet", "unetplusplus", "manet", "linknet", "fpn", "pspnet", "pan", "deeplabv3", "deeplabv3plus")
_ENCODERS = """
    mobilenet_v2 efficientnet-b0 densenet121 vgg11_bn timm-regnetx_002 mit_b0 mobileone_s0 resnext50_32x4d se_resnet50
    dpn68 tu-convnext_atto tu-resnest14d
""".split()
SEGMENTATION_MODELS = (
    *(f"{name}.resnet18" for name in (*_ARCHITECTURES, "upernet", "segformer")),
    "dpt.tu-vit_tiny_patch16_224",
    *(f"unet.{encoder}" for encoder in _ENCODERS),
)


def segmentation_model(name: str = "unet.resnet18") -> nn.Module:
    """Build a model of segmentation-models-pytorch: ARCHITECTURE.ENCODER."""
    package = library("segmentation_models_pytorch", "segmentation-models-pytorch")
    architecture, _, encoder = name.partition(".")
    model: nn.Module = package.create_model(architecture, encoder, encoder_weights=None)
    return model


# --- open_clip --------------------------------------------------------------------------------------------------------

_TOWER = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 16, "image_size": SIDE_PX}
_RESNET_TOWER = {"layers": [1, 1, 1, 1], "width": 16, "image_size": SIDE_PX}
_TEXT = {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 2, "layers": 1}

# A name of our own -> the configuration of the vision tower.
OPEN_CLIP: dict[str, dict[str, Any]] = {
    "vit": _TOWER,
    "vit_average": {**_TOWER, "pool_type": "avg", "final_ln_after_pool": True},
    "vit_tokens": {**_TOWER, "output_tokens": True},
    "vit_attentional": {**_TOWER, "attentional_pool": True, "attn_pooler_heads": 4},
    "vit_sincos": {**_TOWER, "pos_embed_type": "sin_cos_2d", "no_ln_pre": True},
    "vit_layer_scale": {**_TOWER, "ls_init_value": 0.1},
    "resnet": _RESNET_TOWER,
    "timm_convnext": {"timm_model_name": "convnext_atto", "timm_proj": "linear", "image_size": SIDE_PX},
    "timm_vit": {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "map", "timm_proj": "", "image_size": 224},
    "timm_resnet": {"timm_model_name": "resnet10t", "timm_pool": "abs_attn", "timm_proj": "mlp", "image_size": SIDE_PX},
    "whole": _TOWER,
    "coca": {**_TOWER, "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True},
}


def open_clip_model(name: str = "vit") -> nn.Module:
    """Build a vision tower of open_clip; 'whole' is the model around it, which gets no text."""
    open_clip = library("open_clip", "open_clip_torch")
    model: nn.Module = open_clip.CLIP(32, dict(OPEN_CLIP[name]), dict(_TEXT))
    visual = model.visual
    assert isinstance(visual, nn.Module)
    return model if name == "whole" else visual


@dataclass(frozen=True)
class Zoo:
    """The small models of a library."""

    factory: Callable[..., nn.Module]  # in this file
    names: tuple[str, ...]
    module: str
    package: str

    def check_installed(self) -> None:
        """Raise `MissingPackageError` unless the library can be imported."""
        library(self.module, self.package)


ZOOS = {
    "transformers": Zoo(transformers_model, tuple(TRANSFORMERS), "transformers", "transformers"),
    "segmentation-models": Zoo(
        segmentation_model, SEGMENTATION_MODELS, "segmentation_models_pytorch", "segmentation-models-pytorch"
    ),
    "open-clip": Zoo(open_clip_model, tuple(OPEN_CLIP), "open_clip", "open_clip_torch"),
}
