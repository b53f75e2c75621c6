"""Copies of tensors that lie on the path of gradients, between the layer that made the tensor and whatever uses it."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes

from hookx.capture.tensors import replace_tensors


def compute_aside() -> contextlib.AbstractContextManager[object]:
    """Hide operations of hookx from activation checkpointing, and from whoever else watches the model's own.

    Checkpointing counts the tensors that are saved for backward, or remembers results by their order, and expects the
    same from the pass in backward, where nothing is captured.
    """
    stack = contextlib.ExitStack()
    if torch._C._len_torch_dispatch_stack():
        stack.enter_context(_disable_current_modes())
    if torch.is_grad_enabled():
        with contextlib.suppress(RuntimeError):  # torch.func allows no such hooks, and so no checkpointing either.
            stack.enter_context(saved_tensors_hooks(_as_it_is, _as_it_is))
    return stack


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class _GoOn(Function):
    """A tensor as it is, the very object, whose gradient goes to a copy of it and through the copy to its origin."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, copied: Tensor) -> Tensor:
        ctx.mark_dirty(tensor)  # Autograd takes this for an in-place operation, and puts it at the tensor's end.
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _tangent_of_copy: Tensor) -> Tensor:
        return tangent.mul_(1)  # PyTorch checks that it was changed in place, as the tensor was.


class _GoOnAsAlias(Function):
    """Another tensor with the same memory, whose gradient goes to the copy."""

    @staticmethod
    def forward(ctx: Any, copied: Tensor, boxed: list[Tensor]) -> Tensor:
        return boxed[0].detach()  # It shares the count of in-place operations, which autograd's checks need.

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None

    @staticmethod
    def jvp(ctx: Any, tangent_of_copy: Tensor, _boxed: None) -> Tensor:
        return tangent_of_copy.clone()


class AttachedCopies:
    """Copies of the tensors that one call of a layer got or returned, put on the path of their gradients.

    The model goes on with the same tensor object, and so with the same memory: whatever it does in place happens as if
    nothing was captured, and never reaches the copy. Autograd cannot do that to leaves and views. They go on as an
    alias, which the layer's output or its arguments must hold in their place (see `put_aliases_in`). The memory is the
    same, but autograd does not know: if the model changes the alias in place and then reads the original, the gradient
    of the original lacks that change.

    Example:
        >>> weight = torch.ones(3, requires_grad=True)
        >>> maps, copies = weight * 2, AttachedCopies()
        >>> copied = copies.of(maps)
        >>> loss = (maps.relu_() * 5).sum()
        >>> torch.autograd.grad(loss, copied)
        (tensor([5., 5., 5.]),)
    """

    def __init__(self) -> None:
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}  # by the id of the original, which is kept alive
        self._aliases: dict[int, Tensor] = {}

    def of(self, tensor: Tensor) -> Tensor:
        """Return the copy of a tensor, always the same one."""
        if id(tensor) not in self._copies:
            copied = tensor.clone()
            self._copies[id(tensor)] = tensor, copied
            if not copied.requires_grad or torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state():
                pass  # There is no path, or none that a function of ours can be put on.
            elif tensor.is_leaf or tensor._is_view():
                self._aliases[id(tensor)] = _GoOnAsAlias.apply(copied, [tensor])
            else:
                # The values stay the same, so what autograd saved of the tensor before is still valid.
                with _unsafe_preserve_version_counter(tensor):
                    _GoOn.apply(tensor, copied)
        return self._copies[id(tensor)][1]

    def put_aliases_in(self, value: Any) -> Any:
        """Return a value with aliases in place of their originals, or None if there are none in it."""
        replaced = replace_tensors(value, self._aliases) if self._aliases else value
        return None if replaced is value else replaced
