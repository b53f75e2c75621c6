"""The weights of attention, seen in the functions that a pass calls; the activations of the pass keep their bits.

Modules do not return them, and most compute them within `scaled_dot_product_attention`, which keeps them to itself:
those are computed again from its arguments. A softmax over the last of three or more dimensions gives its own result.
"""

from __future__ import annotations

import contextlib
import math
import threading
import types
from collections.abc import Callable, Collection, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from hookx.capture.held import is_on_stack
from hookx.capture.tensors import Parts, Unusable
from hookx.layers.address import ATTENTION

Found = tuple[Parts, Tensor | Unusable]

_NONE = (
    "no softmax over tokens and no scaled_dot_product_attention runs in it. If it computes attention in a kernel of "
    "another library (flash-attn, xformers, flex_attention), build the model without that: in transformers, with "
    "attn_implementation='sdpa' or 'eager'"
)


class WatchAttention(TorchFunctionMode):
    """Watches the functions that a forward pass calls, and passes on the weights of attention.

    Each function runs as it would. A `TorchDispatchMode` sees more, but changes bits: `linear` of an input that is not
    contiguous rounds differently under one.
    """

    def __init__(self, on_weights: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.on_weights = on_weights

    # Compiled, it would be compiled anew for each function that it sees.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __torch_function__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        match getattr(function, "__name__", "").partition(".")[0]:
            case "softmax" | "_softmax" | "_safe_softmax":
                output = function(*args, **kwargs)
                self._see_softmax(output, kwargs.get("dim", args[1] if len(args) > 1 else None))
                return output
            case "scaled_dot_product_attention":
                self.on_weights(attention_weights(*args, **kwargs))
            case "multi_head_attention_forward":
                return self._look_into_multihead(function)(*args, **kwargs)
        return function(*args, **kwargs)

    def _see_softmax(self, output: Tensor, dim: int | None) -> None:
        # The softmax of a classifier or of a segmentation has two dimensions, or another than the last.
        if output.ndim in (3, 4, 5) and dim in (-1, output.ndim - 1) and output.shape[-1] > 1:
            self.on_weights(output.clone())  # A dropout may change it in place.

    def _look_into_multihead(self, function: Any) -> Callable[..., Any]:
        """Return the same function, whose calls within are watched: a mode sees the whole only."""

        def watched(name: str) -> Callable[..., Any]:
            inner = function.__globals__[name]
            return lambda *args, **kwargs: self.__torch_function__(inner, (), args, kwargs)

        names = {name: watched(name) for name in ("softmax", "scaled_dot_product_attention")}
        # Another mode around this one sees the calls within as well, where it would be given the whole again.
        names["has_torch_function"] = lambda _: False
        copied = types.FunctionType(function.__code__, {**function.__globals__, **names}, closure=function.__closure__)
        copied.__defaults__, copied.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
        return copied


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
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch._C.DisableTorchFunction())  # Another mode must not see this softmax.
        if query.device.type != "meta":
            stack.enter_context(torch.autocast(query.device.type, enabled=False))
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


class Attentions:
    """What attention the calls of some modules compute, from entering to returning.

    Args:
        paths: the modules; None gives each attention to the innermost module that is running, and to it alone.
    """

    def __init__(self, paths: Collection[str] | None) -> None:
        self._paths = paths
        self._open: dict[tuple[str, int], list[Tensor | None]] = {}

    def begin_pass(self) -> None:
        """Forget the calls of a pass that failed."""
        self._open = {}

    def watch(self) -> contextlib.AbstractContextManager[object]:
        """Watch a pass for the length of the `with` block."""
        if self._paths is not None and not self._paths:
            return contextlib.nullcontext()
        return WatchAttention(self.see)

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

    def leave_all(self) -> Iterator[Found]:
        for path, call in list(self._open):
            yield from self.leave(path, call)

    def see(self, weights: Tensor) -> None:
        running = list(self._open.values())
        for one in running[-1:] if self._paths is None else running:
            one.append(None if one else weights)  # Where there are several, only their number counts.


class AttentionOfCalls(threading.local):
    """The attention within calls of a capture's own layers, each from entering to returning, in each thread."""

    def __init__(self) -> None:
        self._open: list[tuple[str, FrameType, Attentions]] = []
        self._watching: WatchAttention | None = None

    def enter(self, path: str, call: int, frame: FrameType) -> None:
        self.end_calls_not_on(frame)
        attentions = Attentions({path})
        attentions.enter(path, call)
        self._open.append((path, frame, attentions))
        if self._watching is None:
            self._watching = WatchAttention(self._on_weights)
            self._watching.__enter__()  # type: ignore[no-untyped-call]

    def leave(self, path: str, frame: FrameType) -> list[Found]:
        """Return what the call that began in this frame has computed."""
        self.end_calls_not_on(frame)
        for index in reversed(range(len(self._open))):
            if self._open[index][:2] == (path, frame):
                attentions = self._open.pop(index)[2]
                self._stop_if_over()
                return list(attentions.leave_all())
        return []

    def end_calls_not_on(self, frame: FrameType) -> None:
        """End calls that ended unnoticed, as by a `KeyboardInterrupt`."""
        while self._open and not is_on_stack(self._open[-1][1], frame):
            self._open.pop()
        self._stop_if_over()

    def _stop_if_over(self) -> None:
        # After an interruption another mode may lie above this one, until whoever put it there takes it off.
        if not self._open and self._watching is not None and _get_current_function_mode() is self._watching:
            self._watching.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._watching = None

    def _on_weights(self, weights: Tensor) -> None:
        for _, _, attentions in self._open:
            attentions.see(weights)
