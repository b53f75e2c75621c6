"""Attention maps: the weights with which a model's tokens attend to each other, taken from its own forward pass.

This works for any module (`nn.MultiheadAttention`, timm's, transformers', or your own): in the end each calls PyTorch's
`softmax`, or `scaled_dot_product_attention`, which does not return its weights; those are computed again from its
arguments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hookx.capture.attention import WatchAttention
from hookx.capture.hooks import Taps, tap
from hookx.capture.runner import Runner, modules_of
from hookx.capture.state import ModuleState


@dataclass(frozen=True)
class Attention:
    """One attention of a forward pass: the weights of all heads; each row is a query, whose weights sum to 1.

    Where tokens attend within windows of the image, the heads of the first window come first, then those of the second.
    """

    path: str
    weights_HQK: Tensor  # heads, queries, keys
    windows: int = 1


def find_attention(runner: Runner, pixels_NCHW: Tensor) -> list[Attention]:
    """Return every attention of one image's forward pass, in the order of execution, with the module that computes it.

    Example:
        >>> layer = nn.TransformerEncoderLayer(d_model=8, nhead=2, batch_first=True).eval()
        >>> [attention] = find_attention(Runner.of(layer), torch.rand(1, 5, 8))
        >>> attention.path, attention.weights_HQK.shape
        ('self_attn', torch.Size([2, 5, 5]))
    """
    assert len(pixels_NCHW) == 1, "with one image, the dimensions before queries and keys are windows and heads"
    running: list[str] = []  # the modules that were entered and have not returned
    found: list[Attention] = []
    modules = modules_of(runner.module)

    def on_weights(weights: Tensor) -> None:
        path = running[-1] if running else "."
        if isinstance(modules[path], nn.Softmax) and len(running) > 1:
            path = running[-2]
        windows = math.prod(weights.shape[:-3])
        found.append(Attention(path, weights.reshape(-1, *weights.shape[-2:]), windows))

    def on_return(*_: Any) -> None:
        running.pop()

    taps = Taps(lambda path, *_: running.append(path), on_return)
    # Keep the layout of the image: the model rounds differently in another one.
    is_channels_last = pixels_NCHW.is_contiguous(memory_format=torch.channels_last)
    runner = replace(runner, memory_format="channels_last" if is_channels_last else "contiguous")
    state = ModuleState.of(runner.module, runner.forward).inside()
    try:
        with tap(modules, taps), WatchAttention(on_weights):
            runner.run(pixels_NCHW)
    finally:
        state.restore()
    return found
