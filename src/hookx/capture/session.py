"""`Capture`: activations out of a user's own forward passes."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hookx.capture.hooks import Parts, Taps, dtype_name, reduce, tensors_given, tensors_in, watch_passes
from hookx.capture.runner import module_classes, modules_of, parameter_count
from hookx.errors import CaptureError, LayerError, NotCapturedError, UsageError, closest
from hookx.layers.address import Address
from hookx.layers.select import Selector, matched_paths, parse_selectors

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

    The model is hooked from construction until `remove()` or the end of the `with` block, and otherwise untouched. A
    pass begins when the model itself is called. As a mapping, a capture shows the last pass: address -> tensor, a copy
    made when the layer returned. A module that ran twice is listed as `relu:0` and `relu:1`, a tuple as `attention/0`.

    Args:
        model: the module whose `forward` you call.
        layers: addresses, globs, 'type:Conv2d' (one string with commas, or a sequence), modules of the model, or a
            mapping from your own names to any of these. More can be added later.
        keep: how many of the last passes to hold; None for all of them (see `history`).
        detach: False keeps the activations in the autograd graph.
        transform: applied to each tensor before it is kept.
        hook: a function `hook(module, inputs, output)` that chooses what to keep: the tensor it returns, or nothing if
            it returns None. What it returns never reaches the model.

    Raises:
        LayerError: a layer does not exist; the message names the closest ones.
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
        self._passes: deque[dict[Address, Tensor]] = deque(maxlen=keep)
        self._taps = Taps(self._on_enter, self._on_return)
        self._fastpath = True
        self._model_hooks = watch_passes(model, self._begin_pass, self._end_pass)
        try:
            self.add(layers, transform=transform, hook=hook)
        except BaseException:
            self.remove()
            raise

    def add(self, layers: Layers, *, transform: Transform | None = None, hook: Hook | None = None) -> Capture:
        """Capture more layers, with their own transform or hook; return the capture itself."""
        modules = modules_of(self.model)
        class_names = module_classes(self.model)
        paths = {id(module): path for path, module in reversed(modules.items())}
        if isinstance(layers, str | nn.Module):
            layers = [layers]
        named = layers.items() if isinstance(layers, Mapping) else ((None, layer) for layer in layers)
        for name, layer in named:
            if isinstance(layer, nn.Module):
                if id(layer) not in paths:
                    raise LayerError(f"this {type(layer).__name__} is not a module of the model")
                selectors = [Selector("path", Address(paths[id(layer)]), "")]
            else:
                selectors = parse_selectors(layer)
            for selector in selectors:
                for path in matched_paths([selector], class_names, "this model"):
                    if name is not None and (len(selectors) > 1 or selector.kind != "path"):
                        raise LayerError(f"'{name}' names one activation, but '{layer}' can match several layers")
                    address = dataclasses.replace(selector.address, path=name or path)
                    wish = _Wish(modules[path], address, transform, hook)
                    if wish not in self._wishes.setdefault(path, []):
                        self._wishes[path].append(wish)
                    self._taps.attach({path: modules[path]})
        return self

    def remove(self, name: str | None = None) -> None:
        """Stop capturing: everything, or one path or name. What was captured stays."""
        if name is None:
            self._taps.detach()
            for hook in self._model_hooks:
                hook.remove()
            self._wishes.clear()
            return
        path_or_name = Address.parse(name).path
        known = {wish.address.path for wishes in self._wishes.values() for wish in wishes}
        if path_or_name not in known:
            raise LayerError(f"'{name}' is not being captured; captured: {', '.join(known) or 'nothing'}")
        for path, wishes in list(self._wishes.items()):
            self._wishes[path] = [wish for wish in wishes if wish.address.path != path_or_name]
            if not self._wishes[path]:
                del self._wishes[path]
                self._taps.detach(path)

    def clear(self) -> None:
        """Forget what was captured, and keep capturing."""
        self._passes.clear()
        self._taps.begin_pass()

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    # --- reading

    @property
    def _last(self) -> dict[Address, Tensor]:
        return self._passes[-1] if self._passes else {}

    def __getitem__(self, address: str) -> Tensor:
        return _find(self._last, address)

    def __iter__(self) -> Iterator[str]:
        return map(str, _canonical(self._last))

    def __len__(self) -> int:
        return len(self._last)

    def history(self, address: str) -> list[Tensor]:
        """Return one activation from every pass held, oldest first."""
        return [_find(one_pass, address) for one_pass in self._passes]

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
        for path, wishes in self._wishes.items():
            calls = self._taps.calls[path]
            for wish in wishes:
                kept = ", ".join(
                    f"{key} {list(tensor.shape)} {dtype_name(tensor.dtype)} {tensor.device}"
                    for key, tensor in _canonical(self._last).items()
                    if (key.path, key.reduction) == (wish.address.path, wish.address.reduction)
                )
                state = f"{calls} call{'s' * (calls != 1)}: {kept or 'nothing kept'}" if calls else "has not run"
                rows.append((str(wish.address), type(wish.module).__name__, f"{parameter_count(wish.module):,}", state))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        model = f"{type(self.model).__name__}: {parameter_count(self.model):,} parameters"
        lines = [
            f"{name:{widths[0]}}  {kind:{widths[1]}}  {count:>{widths[2]}}  {state}"
            for name, kind, count, state in rows
        ]
        return "\n".join([f"{model}, {len(self._passes)} passes held", *lines])

    def __repr__(self) -> str:
        return f"Capture({type(self.model).__name__}: {', '.join(self) or 'nothing yet'})"

    # --- during a pass

    def _begin_pass(self) -> None:
        self._taps.begin_pass()
        self._passes.append({})
        self._fastpath = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)

    def _end_pass(self) -> None:
        torch.backends.mha.set_fastpath_enabled(self._fastpath)

    def _on_enter(self, path: str, call: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for wish in self._wishes.get(path, ()):
            if wish.address.is_input and wish.hook is None:
                self._keep(wish, call, tensors_given(args, kwargs))

    def _on_return(self, path: str, call: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        for wish in self._wishes.get(path, ()):
            if wish.hook is not None:
                self._keep(wish, call, tensors_in(wish.hook(wish.module, args, output)))
            elif not wish.address.is_input:
                self._keep(wish, call, tensors_in(output))

    def _keep(self, wish: _Wish, call: int, tensors: Iterable[tuple[Parts, Tensor]]) -> None:
        wanted = wish.address
        if wanted.call not in (None, call):
            return
        if not self._passes:
            self._passes.append({})  # The layer was called directly, outside any call of the model.
        for parts, tensor in tensors:
            if parts[: len(wanted.parts)] != wanted.parts:
                continue
            value = reduce(tensor.detach() if self._detach else tensor, wanted.reduction)
            if wish.transform is not None:
                value = wish.transform(value)
                if not isinstance(value, Tensor):
                    raise CaptureError(f"the transform of '{wanted}' returned a {type(value).__name__}, not a tensor")
            self._passes[-1][dataclasses.replace(wanted, call=call, parts=parts)] = value.clone()


def _canonical(one_pass: Mapping[Address, Tensor]) -> dict[Address, Tensor]:
    """Drop the call number of modules that ran once."""
    called_again = {(key.path, key.is_input) for key in one_pass if key.call}
    return {
        key if (key.path, key.is_input) in called_again else dataclasses.replace(key, call=None): tensor
        for key, tensor in one_pass.items()
    }


def _find(one_pass: Mapping[Address, Tensor], address: str) -> Tensor:
    wanted, stored = Address.parse(address), _canonical(one_pass)
    found = {**one_pass, **stored}  # 'relu:0' can be read where relu ran once.
    if wanted in found:
        return found[wanted]
    if not stored:
        raise NotCapturedError(f"cannot read '{address}': nothing has been captured yet; call the model first")
    same_path = [str(key) for key in stored if key.path == wanted.path]
    raise NotCapturedError(
        f"'{address}' was not captured; closest: {', '.join(same_path) or closest(address, map(str, stored))}"
    )
