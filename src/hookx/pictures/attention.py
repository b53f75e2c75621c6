"""Attention maps: the weights with which a model's tokens look at each other, taken out of its own forward pass.

No model's code is known here. Whatever the module (`nn.MultiheadAttention`, timm's, transformers', one's own), in the
end it calls PyTorch's `softmax`, or `scaled_dot_product_attention`, which keeps its weights to itself; those are
computed again from what it was given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hookx.capture.hooks import Taps, tap
from hookx.capture.modules import modules_of
from hookx.capture.runner import Runner


@dataclass(frozen=True)
class Attention:
    """One attention of a forward pass: the weights of all heads, each row a query whose weights sum to 1.

    Where tokens attend within windows of the image, the heads of the first window come first, then those of the second.
    """

    path: str
    weights_HQK: Tensor  # heads, queries, keys
    windows: int = 1


def attention_of(runner: Runner, pixels_NCHW: Tensor) -> list[Attention]:
    """Return every attention of a forward pass of one image, in the order of execution; a model without has none.

    Args:
        runner: holds the model; the path of an attention is that of the module in which it is computed.
        pixels_NCHW: one image, on the model's device.

    Example:
        >>> layer = nn.TransformerEncoderLayer(d_model=8, nhead=2, batch_first=True).eval()
        >>> [attention] = attention_of(Runner.of(layer), torch.rand(1, 5, 8))
        >>> attention.path, attention.weights_HQK.shape
        ('self_attn', torch.Size([2, 5, 5]))
    """
    assert len(pixels_NCHW) == 1, "with one image, what comes before queries and keys are heads and windows"
    running: list[str] = []  # the modules that have been entered and have not returned
    found: list[Attention] = []
    modules = modules_of(runner.module)

    def on_weights(weights: Tensor) -> None:
        path = running[-1] if running else "."
        if isinstance(modules[path], nn.Softmax) and len(running) > 1:
            path = running[-2]
        windows = math.prod(weights.shape[:-3])  # The batch is one image: what is more is a window of it.
        found.append(Attention(path, weights.reshape(-1, *weights.shape[-2:]).clone(), windows))

    def on_return(*_: Any) -> None:
        running.pop()

    taps = Taps(lambda path, *_: running.append(path), on_return)
    with tap(modules, taps), _Watch(on_weights):
        runner.run(pixels_NCHW)
    return found


class _Watch(TorchDispatchMode):
    """Sees the operations of a pass, beneath all modules, and hands the weights of attention over."""

    def __init__(self, on_weights: Callable[[Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.on_weights = on_weights

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = operation(*args, **kwargs)
        match operation.overloadpacket.__name__:
            case "softmax" | "_softmax" | "_safe_softmax":
                dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
                if _is_attention(output, dim):
                    self.on_weights(output)
            case "scaled_dot_product_attention":
                self.on_weights(_weights(*args, **kwargs))
        return output


def _is_attention(weights: Tensor, dim: Any) -> bool:
    """Tell attention, over the last of three or more dimensions, from the softmax of a classifier or a segmentation."""
    return weights.ndim in (3, 4, 5) and dim in (-1, weights.ndim - 1) and weights.shape[-1] > 1


def _weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return the weights inside of `scaled_dot_product_attention`, as its documentation computes them."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1)
