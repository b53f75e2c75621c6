"""The weights of attention, seen in the operations of a forward pass; the activations of the pass keep their bits.

Modules do not return them, and most compute them within `scaled_dot_product_attention`, which keeps them to itself:
those are computed again from its arguments. A softmax over the last of three or more dimensions gives its own result.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hookx.capture.tensors import Parts, Unusable
from hookx.layers.address import ATTENTION

Found = tuple[Parts, Tensor | Unusable]

_NONE = (
    "no softmax over tokens and no scaled_dot_product_attention runs in it. If it computes attention in a kernel of "
    "another library (flash-attn, xformers, flex_attention), build the model without that: in transformers, with "
    "attn_implementation='sdpa' or 'eager'"
)


class WatchAttention(TorchDispatchMode):
    """Watches the operations of a forward pass, and passes on the weights of attention."""

    def __init__(self, on_weights: Callable[[Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.on_weights = on_weights

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = operation(*args, **kwargs)
        name = operation.overloadpacket.__name__
        match name:
            case "softmax" | "_softmax" | "_safe_softmax":
                dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
                # The softmax of a classifier or of a segmentation has two dimensions, or another than the last.
                if output.ndim in (3, 4, 5) and dim in (-1, output.ndim - 1) and output.shape[-1] > 1:
                    self.on_weights(output.clone())  # A dropout may change it in place.
            case "scaled_dot_product_attention":
                self.on_weights(attention_weights(*args, **kwargs))
            case _ if name.startswith("_scaled_dot_product_") and "backward" not in name:
                self.on_weights(_weights_in_kernel(operation, args, kwargs))
        return output


def attention_weights(
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
    """Return the weights within `scaled_dot_product_attention`, as its documentation computes them.

    Half precision is computed in float32, as the kernels do, and rounded once.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False) if query.device.type != "meta" else contextlib.nullcontext():
        queries, keys = query.to(wide), key.to(wide)
        if enable_gqa:
            keys = keys.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        scores = queries @ keys.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None:
            is_bool = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -math.inf) if is_bool else scores + attn_mask
        return scores.softmax(-1).to(query.dtype)


def _weights_in_kernel(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the weights within a kernel that autograd calls in place of `scaled_dot_product_attention`."""
    names = [argument.name for argument in operation._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    mask = given.get("attn_mask", given.get("attn_bias"))
    causal, scale = bool(given.get("is_causal")), given.get("scale")
    is_grouped = given["query"].shape[-3] != given["key"].shape[-3]
    return attention_weights(
        given["query"], given["key"], given["value"], mask, 0.0, causal, scale=scale, enable_gqa=is_grouped
    )


class Attentions:
    """What attention the calls of some modules compute, from entering to returning.

    Args:
        paths: the modules; None gives each attention to the innermost module that is running, and to it alone.
    """

    def __init__(self, paths: Collection[str] | None) -> None:
        self._paths = paths
        self._open: dict[tuple[str, int], list[Tensor | None]] = {}

    def watch(self) -> contextlib.AbstractContextManager[object]:
        """Watch a pass for the length of the `with` block."""
        self._open = {}
        if self._paths is not None and not self._paths:
            return contextlib.nullcontext()
        return WatchAttention(self._on_weights)

    def enter(self, path: str, call: int, module: nn.Module | None = None) -> None:
        if self._paths is None:
            # A softmax that is a module belongs to the one that calls it.
            if not isinstance(module, nn.Softmax):
                self._open[path, call] = []
        elif path in self._paths:
            self._open[path, call] = []

    def leave(self, path: str, call: int) -> Iterator[Found]:
        """Yield the weights that a call has computed, or why there are none to take."""
        weights = self._open.pop((path, call), None)
        if weights is None or (self._paths is None and not weights):
            return
        if len(weights) > 1:
            several = f"it computes {len(weights)} attentions: name the layer of one of them, as list-layers shows them"
            yield (ATTENTION,), Unusable(several)
        elif weights and weights[0] is not None:
            yield (ATTENTION,), weights[0]
        else:
            yield (ATTENTION,), Unusable(_NONE)

    def _on_weights(self, weights: Tensor) -> None:
        running = list(self._open.values())
        for one in running[-1:] if self._paths is None else running:
            one.append(None if one else weights)  # Of several only the number counts.
