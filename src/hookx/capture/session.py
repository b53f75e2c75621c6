"""`Capture`: activations out of a user's own forward passes."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from hookx.capture.attention import AttentionOfCalls
from hookx.capture.gradients import AttachedCopies, compute_aside
from hookx.capture.held import Pass, Passes
from hookx.capture.hidden import AFTER_COMPILED_CALLS, describe_compiled_calls, describe_no_tensor, match_visible
from hookx.capture.hooks import Watch
from hookx.capture.reduce import reduce
from hookx.capture.runner import modules_of, parameter_count
from hookx.capture.tensors import Parts, Unusable, dtype_name, look_into, look_into_arguments
from hookx.errors import CaptureError, LayerError, NotCapturedError, UsageError, closest
from hookx.layers.address import Address
from hookx.layers.reductions import OF_PLACES
from hookx.layers.select import Selector, parse_selectors

log = logging.getLogger("hookx")

Transform = Callable[[Tensor], Tensor]
Hook = Callable[[nn.Module, tuple[Any, ...], Any], Tensor | None]
Layers = str | nn.Module | Iterable[str | nn.Module] | Mapping[str, str | nn.Module]


@dataclasses.dataclass(frozen=True)
class _Wish:
    """What to keep of one module; the path of `address` is the module's path or the name that the user gave it."""

    module: nn.Module
    address: Address
    transform: Transform | None
    hook: Hook | None


class Capture(Mapping[str, Tensor]):
    """Take activations out of your own forward passes, of any module, on any device, in any mode.

    The model is hooked from construction until `remove()`, the end of the `with` block, or the last reference to the
    capture, and otherwise untouched. As a mapping, a capture shows the last pass: address -> tensor, a copy made when
    the layer returned. A module that ran twice is listed as `relu:0` and `relu:1`, a tuple as `attention/0`.

    A pass is a call of the model, with all calls within it, its own included. A part of the model that is called by
    itself makes a pass of that part: until the model is called again, its last call is shown in place of what the part
    gave before. Passes of several threads do not mix, and a thread that has run the model reads its own last pass.
    A pass that fails shows what ran before the error.

    A capture takes what a layer gave when the capture's hook ran, and PyTorch runs hooks in the order of registration:
    changes by earlier hooks are in it, changes by later ones are not. It takes nothing while autograd runs backward,
    where activation checkpointing computes layers again; nothing from copies of the model, by `copy.deepcopy` or by
    pickle; and nothing that a transform or a hook of the capture calls. Code that torch.compile makes after the capture
    stops at each captured layer, and its tensors are taken; code that was compiled before calls no hooks.

    Args:
        model: the module whose `forward` you call.
        layers: addresses, globs, 'type:Conv2d' (one string with commas, or a sequence), modules of the model, or a
            mapping from your own names to any of these. More can be added later.
        keep: how many of the last passes to hold, of the model and of each part; None for all (see `history`).
        detach: False keeps the activations in the autograd graph, between the layer and what follows: the gradient of
            a later result with respect to an activation is the gradient at that layer. Reductions and transforms are
            computed aside; differentiate through them.
        transform: applied to each tensor before it is kept.
        hook: a function `hook(module, inputs, output)` that chooses what to keep: the tensor it returns, or nothing if
            it returns None. What it returns never reaches the model.

    Raises:
        LayerError: a layer does not exist; the message names the closest ones. Or it runs within compiled code.
        NotCapturedError: (on reading; a KeyError) the layer has not run, or has run more than once.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)).eval()
        >>> with Capture(model, ["0", "1@mean23"]) as capture:
        ...     _ = model(torch.rand(2, 3, 8, 8))
        >>> capture["0"].shape, capture["1@mean23"].shape
        (torch.Size([2, 4, 6, 6]), torch.Size([2, 4]))

        Your own names, a transform, and the last three passes:

        >>> with Capture(model, {"maps": model[0]}, keep=3, transform=lambda maps: maps.amax((2, 3))) as capture:
        ...     for _ in range(5):
        ...         _ = model(torch.rand(2, 3, 8, 8))
        >>> [tuple(maps.shape) for maps in capture.history("maps")]
        [(2, 4), (2, 4), (2, 4)]
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers = (),
        *,
        keep: int | None = 1,
        detach: bool = True,
        transform: Transform | None = None,
        hook: Hook | None = None,
    ) -> None:
        if keep is not None and keep < 1:
            raise UsageError(f"keep must be at least 1, or None to hold every pass, got {keep}")
        self.model = model
        self._detach = detach
        self._wishes: dict[str, list[_Wish]] = {}
        self._passes = Passes(keep)
        self._watch, self._attention = Watch(self._on_enter, self._on_return), AttentionOfCalls()
        self._has_warned, self._asked = False, set[str]()
        try:
            self.add(layers, transform=transform, hook=hook)
        except BaseException:
            self.remove()
            raise

    def add(self, layers: Layers, *, transform: Transform | None = None, hook: Hook | None = None) -> Capture:
        """Capture more layers, with their own transform or hook; return the capture itself."""
        modules = modules_of(self.model)
        paths = {id(module): path for path, module in reversed(modules.items())}
        if isinstance(layers, str | nn.Module):
            layers = [layers]
        named = layers.items() if isinstance(layers, Mapping) else ((None, layer) for layer in layers)
        for name, layer in named:
            if not self._detach and any(one.address.is_attention for one in _selectors_in(layer)):
                raise UsageError(
                    f"'{layer}' has no gradients with detach=False: the weights of attention are computed aside",
                    "capture it with detach=True",
                )
            if isinstance(layer, nn.Module):
                if id(layer) not in paths:
                    raise LayerError(f"this {type(layer).__name__} is not a module of the model")
                selectors = [Selector("path", Address(paths[id(layer)]), "")]
            else:
                selectors = _selectors_in(layer)
            for selector in selectors:
                for path in match_visible(selector, self.model, modules):
                    if name is not None and (len(selectors) > 1 or selector.kind != "path"):
                        raise LayerError(f"'{name}' names one activation, but '{layer}' can match several layers")
                    address = dataclasses.replace(selector.address, path=name or path)
                    _refuse_places(address)
                    wish = _Wish(modules[path], address, transform, hook)
                    self._asked.add(address.path)
                    if wish not in self._wishes.setdefault(path, []):
                        self._wishes[path].append(wish)
        self._watch.set(self._watched(modules))
        return self

    def _watched(self, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """Return the layers to capture, and the modules around them, whose calls tell where a pass begins and ends."""
        paths = {"."}
        for path in self._wishes:
            names = path.split(".") if path != "." else []
            paths.update(".".join(names[:length]) for length in range(1, len(names) + 1))
        return {path: module for path, module in modules.items() if path in paths}

    def remove(self, name: str | None = None) -> None:
        """Stop capturing: everything, or one path or name. What was captured stays."""
        if name is None:
            self._watch.set({})
            self._attention.end_calls_not_on(sys._getframe())
            self._wishes.clear()
            self._passes.stop()
            return
        path_or_name = Address.parse(name).path
        known = {wish.address.path for wishes in self._wishes.values() for wish in wishes}
        if path_or_name not in known:
            raise LayerError(f"'{name}' is not being captured; captured: {', '.join(known) or 'nothing'}")
        for path, wishes in list(self._wishes.items()):
            self._wishes[path] = [wish for wish in wishes if wish.address.path != path_or_name]
            if not self._wishes[path]:
                del self._wishes[path]
        self._watch.set(self._watched(modules_of(self.model)))

    def clear(self) -> None:
        """Forget what was captured, and keep capturing."""
        self._passes.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "keep": self._passes.keep, "detach": self._detach}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The copy of a model that holds its capture, which captures nothing until layers are added to it.
        self.model, self._detach, self._wishes = state["model"], state["detach"], {}
        self._passes, self._watch = Passes(state["keep"]), Watch(self._on_enter, self._on_return)
        self._attention, self._has_warned, self._asked = AttentionOfCalls(), False, set()

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    # --- reading

    @property
    def _last(self) -> dict[Address, Tensor]:
        return self._passes.last().activations

    def __getitem__(self, address: str) -> Tensor:
        return self._find(self._passes.last(), address)

    def __iter__(self) -> Iterator[str]:
        return map(str, _canonical(self._last))

    def __len__(self) -> int:
        return len(self._last)

    def history(self, address: str) -> list[Tensor]:
        """Return one activation from every pass held, oldest first, of all threads."""
        path = Address.parse(address).path
        found = [
            self._find(one_pass, address)
            for one_pass in self._passes.held()
            if one_pass.path == "." or any(key.path == path for key in [*one_pass.activations, *one_pass.untaken])
        ]
        return found[-(self._passes.keep or 0) :]

    def _find(self, one_pass: Pass, address: str) -> Tensor:
        wanted, stored = Address.parse(address), _canonical(one_pass.activations)
        found = {**one_pass.activations, **stored}  # 'relu:0' can be read where relu ran once.
        if wanted in found:
            return found[wanted]
        if reasons := one_pass.why_untaken(wanted):
            raise NotCapturedError(f"'{address}' was not captured: {'; '.join(reasons)}")
        has_run = any(key.path == wanted.path for key in stored) or wanted.path not in self._asked
        if not has_run or not stored:
            compiled = describe_compiled_calls()
            if not self._passes.held():
                after = ("; call the model first",) if not compiled else (compiled, AFTER_COMPILED_CALLS)
                raise NotCapturedError(f"cannot read '{address}': nothing has been captured yet{after[0]}", *after[1:])
            if compiled or not stored:
                steps = [AFTER_COMPILED_CALLS] if compiled else []
                raise NotCapturedError(f"cannot read '{address}': it has not run in the last pass{compiled}", *steps)
        same_path = [str(key) for key in stored if key.path == wanted.path]
        raise NotCapturedError(
            f"'{address}' was not captured; closest: {', '.join(same_path) or closest(address, map(str, stored))}"
        )

    def summary(self) -> str:
        """Describe the model and each layer: class, parameters, calls, and what the last pass kept.

        Example:
            >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
            >>> capture = Capture(model, "0,1")
            >>> print(capture.summary())
            Sequential: 16 parameters, 0 passes held
            0  Linear  16  has not run
            1  ReLU     0  has not run
        """
        rows = []
        last = self._passes.last()
        for path, wishes in self._wishes.items():
            calls = last.calls[path]
            for wish in wishes:
                kept = ", ".join(
                    f"{key} {list(tensor.shape)} {dtype_name(tensor.dtype)} {tensor.device}"
                    for key, tensor in _canonical(last.activations).items()
                    if (key.path, key.reduction) == (wish.address.path, wish.address.reduction)
                )
                kept = kept or "; ".join(["nothing kept", *last.why_untaken(wish.address)])
                state = f"{calls} call{'s' * (calls != 1)}: {kept}" if calls else "has not run"
                rows.append((str(wish.address), type(wish.module).__name__, f"{parameter_count(wish.module):,}", state))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        model = f"{type(self.model).__name__}: {parameter_count(self.model):,} parameters"
        lines = [
            f"{name:{widths[0]}}  {kind:{widths[1]}}  {count:>{widths[2]}}  {state}"
            for name, kind, count, state in rows
        ]
        return "\n".join([f"{model}, {len(self._passes.held())} passes held", *lines])

    def __repr__(self) -> str:
        return f"Capture({type(self.model).__name__}: {', '.join(self) or 'nothing yet'})"

    # --- during a pass

    def _on_enter(
        self, path: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType
    ) -> tuple[Any, Any] | None:
        begun, copies = self._passes.enter(path, frame), AttachedCopies()
        if begun is None:
            return None
        if any(wish.address.is_attention for wish in self._wishes.get(path, ())):
            self._attention.enter(path, begun[1], frame)
        for wish in self._wishes.get(path, ()):
            if wish.address.is_input and wish.hook is None:
                self._keep(wish, begun, look_into_arguments(args, kwargs), copies, (*args, *kwargs.values()))
        return copies.put_aliases_in((args, kwargs))

    def _on_return(
        self, path: str, module: nn.Module, args: tuple[Any, ...], _kwargs: Any, frame: FrameType, output: Any
    ) -> Any:
        attended = self._attention.leave(path, frame)
        ended, copies = self._passes.leave(path, frame), AttachedCopies()
        if ended is None:
            return None
        for wish in self._wishes.get(path, ()):
            if wish.hook is not None:
                with self._passes.mute():
                    chosen = wish.hook(module, args, output)
                self._keep(wish, ended, look_into(chosen), copies, chosen)
            elif wish.address.is_attention:
                self._keep(wish, ended, attended, copies, output)
            elif not wish.address.is_input:
                self._keep(wish, ended, look_into(output), copies, output)
        return copies.put_aliases_in(output)

    def _keep(
        self,
        wish: _Wish,
        place: tuple[Pass, int],
        found: Iterable[tuple[Parts, Tensor | Unusable]],
        copies: AttachedCopies,
        value: Any,
    ) -> None:
        wanted, (one_pass, call) = wish.address, place
        if wanted.call not in (None, call):
            return
        unusable, has_tensor = [], False
        for parts, one in found:
            if parts[: len(wanted.parts)] != wanted.parts:
                continue
            address = dataclasses.replace(wanted, call=call, parts=parts)
            if isinstance(one, Unusable):
                one_pass.untaken[address] = one.reason
                unusable.append(one)
            else:
                self._warn_of_no_gradient(wish, one_pass, one)
                one_pass.activations[address], has_tensor = self._value_of(wish, one, copies), True
        if not has_tensor and not wanted.parts:
            verb = "was given" if wanted.is_input else "returned" if wish.hook is None else "has a hook that returned"
            address = dataclasses.replace(wanted, call=call)
            one_pass.untaken[address] = describe_no_tensor(value, unusable, verb)

    def _warn_of_no_gradient(self, wish: _Wish, one_pass: Pass, tensor: Tensor) -> None:
        """Warn once that an attached activation has no gradient, though the pass has."""
        if self._detach or self._has_warned or not one_pass.has_gradients or torch.is_grad_enabled():
            return
        if tensor.is_floating_point():
            self._has_warned = True
            log.warning(
                "'%s' runs without gradients, in torch.no_grad or in activation checkpointing with use_reentrant=True: "
                "its activation has none; use_reentrant=False keeps them",
                wish.address,
            )

    def _value_of(self, wish: _Wish, tensor: Tensor, copies: AttachedCopies) -> Tensor:
        with compute_aside():
            copied = tensor.detach() if self._detach else copies.of(tensor)
            value = reduce(copied, wish.address)
            if wish.transform is not None:
                with self._passes.mute():
                    value = wish.transform(value.clone())  # It may work in place.
            if not isinstance(value, Tensor):
                raise CaptureError(f"the transform of '{wish.address}' returned a {type(value).__name__}, not a tensor")
            return value if value is copied and not self._detach else value.clone()


def _selectors_in(layer: str | nn.Module) -> list[Selector]:
    return [] if isinstance(layer, nn.Module) else parse_selectors(layer)


def _refuse_places(address: Address) -> None:
    """Raise if a reduction needs to know which tokens stand for places: a run proves that, and a capture cannot."""
    first = None if address.reduction is None else address.reduction.steps[0].name
    if first in OF_PLACES and first != "cls":
        raise LayerError(
            f"cannot capture '{address}': which tokens stand for places of the image is proved by a run, not here",
            f"name them, as in {dataclasses.replace(address, reduction=None)}@tokens1-",
        )


def _canonical(one_pass: Mapping[Address, Tensor]) -> dict[Address, Tensor]:
    """Drop the call number of modules that ran once."""
    called_again = {(key.path, key.is_input) for key in one_pass if key.call}
    return {
        key if (key.path, key.is_input) in called_again else dataclasses.replace(key, call=None): tensor
        for key, tensor in one_pass.items()
    }
