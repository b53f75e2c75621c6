"""Activations, as the layers return them: for a run, and out of your own forward passes.

A copy is made inside the hook, at the moment the layer returns: nothing that runs later (an in-place ReLU, a second
call of the same module) can reach it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hookx.errors import CaptureError, LayerError, NotCapturedError, UsageError
from hookx.hooks import (
    MEMORY_FORMATS,
    ForwardIsDone,
    Parts,
    Taps,
    batch_first,
    dtype_name,
    inference,
    modules_of,
    parameter_count,
    reduce,
    shares_memory,
    tensors_given,
    tensors_in,
)
from hookx.layers import Address, Selector, Target, closest, matched_paths, parse_selectors

# --- for a run -----------------------------------------------------------------------------------------------------


def stored_dtype(target: Target) -> str:
    """Return the type that a target has after its reduction; `LayerError` if it cannot be reduced."""
    try:
        example = torch.empty((2, *target.tensor.shape), dtype=getattr(torch, target.tensor.dtype), device="meta")
        return dtype_name(reduce(example, target.address.reduction).dtype)
    except RuntimeError as error:
        raise LayerError(f"'{target.address}' cannot be computed from {target.tensor.dtype}: {error}") from None


class RowCapture:
    """Forward passes that leave the targets' activations in rows of preallocated buffers, and stop after the last.

    Hooks are on the model while the `with` block lasts. Memory: nothing but what the caller hands in.

    Raises:
        CaptureError: a pass differs from what the probe saw: another shape or type, a call more or less.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        *,
        device: torch.device,
        precision: str,
        memory_format: str = "contiguous",
        forward: Callable[[Tensor], Any] | None = None,
    ) -> None:
        self.device, self.precision, self.memory_format = device, precision, memory_format
        self._forward = model if forward is None else forward
        self._copies = _GPUCopies(device) if device.type == "cuda" else None
        self._tallies: dict[str, dict[str, list[Tensor]]] = {}
        self._targets: dict[tuple[str, int, bool], dict[Parts, list[Target]]] = {}
        for target in targets:
            address = target.address
            event = (address.path, address.call or 0, address.is_input)
            self._targets.setdefault(event, {}).setdefault(address.parts, []).append(target)
        modules = modules_of(model)
        self._calls = {target.address.path: target.calls for target in targets}
        self._modules = {path: modules[path] for path in self._calls}
        self._taps = Taps(self._on_enter, self._on_return)
        self._rows: Mapping[str, Tensor] = {}
        self._remaining: set[tuple[str, int, bool]] = set()
        self._tallies_of_pass: list[tuple[str, str, Tensor]] = []
        self.passes = 0  # that have run so far; on a GPU their copies may still be on their way

    def __enter__(self) -> RowCapture:
        for path, module in self._modules.items():
            self._taps.attach(path, module)
        return self

    def __exit__(self, *_: object) -> None:
        self._taps.detach_all()

    def run(self, pixels_NCHW: Tensor, rows: Mapping[str, Tensor]) -> None:
        """Run one batch; `rows` holds for every address a tensor (images of the batch, *shape) to write into.

        The pixels are on the device already. On a GPU the rows are there only after `wait`.
        """
        pixels_NCHW = pixels_NCHW.contiguous(memory_format=MEMORY_FORMATS[self.memory_format])
        self._rows, self._remaining = rows, set(self._targets)
        self._tallies_of_pass = []
        if self._copies is not None:
            self._copies.begin_pass()
        self._taps.begin_pass()
        with inference(self.device, self.precision), contextlib.suppress(ForwardIsDone):
            self._forward(pixels_NCHW)
        if self._remaining:
            missing = next(iter(self._targets[min(self._remaining)].values()))[0].address
            raise CaptureError(f"'{missing}' did not run in this batch, though the probe saw it")
        if self._copies is not None:
            self._copies.end_pass()
        self.passes += 1
        for address, what, tally in self._tallies_of_pass:  # Only now: a pass that failed is run again in parts.
            self._tallies.setdefault(address, {}).setdefault(what, []).append(tally)

    def wait(self, passes: int | None = None) -> None:
        """Wait until the rows of the first so many passes are there, or of all."""
        if self._copies is not None:
            self._copies.wait(self.passes if passes is None else passes)

    @property
    def gpu_seconds(self) -> float:
        """How long the passes took on a GPU, which the process that asks for them does not notice."""
        return self._copies.model_seconds if self._copies else 0.0

    @property
    def gpu_copying_seconds(self) -> float:
        return self._copies.copying_seconds if self._copies else 0.0

    def _on_enter(self, path: str, call: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if call >= self._calls[path]:
            raise CaptureError(
                f"'{Address(path)}' ran more often in this batch than in the probe ({self._calls[path]})"
            )
        if (path, call, True) in self._targets:
            self._take((path, call, True), tensors_given(args, kwargs))

    def _on_return(self, path: str, call: int, _args: Any, _kwargs: Any, output: Any) -> None:
        if (path, call, False) in self._targets:
            self._take((path, call, False), tensors_in(output))

    def _take(self, event: tuple[str, int, bool], tensors: Iterable[tuple[Parts, Tensor]]) -> None:
        found = dict(tensors)
        for parts, targets in self._targets[event].items():
            for target in targets:
                if parts not in found:
                    raise CaptureError(f"'{target.address}' is missing in this batch, though the probe saw it")
                self._store(target, found[parts])
        self._remaining.discard(event)
        if not self._remaining:
            raise ForwardIsDone

    def take_counts(self) -> dict[str, dict[str, int]]:
        """Return what was remarkable in the values since the last call, by address; what did not occur is left out.

        'non_finite' and 'all_zero' count images, 'overflowed' and 'flushed' values that the stored type made infinite
        or zero.
        """
        counts = {
            address: {what: count for what, tallies in by_what.items() if (count := sum(map(int, tallies)))}
            for address, by_what in self._tallies.items()
        }
        self._tallies.clear()
        return {address: by_what for address, by_what in counts.items() if by_what}

    def _tally(self, address: str, value: Tensor, stored: Tensor) -> None:
        # The extremes of each image tell both: NaN and infinity survive them, and so does a lone non-zero.
        per_image = value.unsqueeze(1) if value.ndim == 1 else value
        if not per_image.shape[1:].numel():
            return
        dims = tuple(range(1, per_image.ndim))
        high, low = per_image.amax(dims), per_image.amin(dims)
        found = {"non_finite": ~(high.isfinite() & low.isfinite()), "all_zero": (high == 0) & (low == 0)}
        if torch.finfo(stored.dtype).bits < torch.finfo(value.dtype).bits:
            found["overflowed"] = stored.isinf() & ~value.isinf()
            found["flushed"] = (stored == 0) & (value != 0)
        # Sums that are read at the end of a shard only, so that a GPU need not be waited for.
        self._tallies_of_pass += [(address, what, where.sum()) for what, where in found.items()]

    def _store(self, target: Target, tensor: Tensor) -> None:
        info, rows = target.tensor, self._rows[str(target.address)]
        expected = list(info.shape)
        if info.rows_per_image > 1:
            expected[0] *= len(rows)
        else:
            assert info.batch_dim is not None
            expected.insert(info.batch_dim, len(rows))
        if list(tensor.shape) != expected or dtype_name(tensor.dtype) != info.dtype:
            raise CaptureError(
                f"'{target.address}' is {dtype_name(tensor.dtype)} {list(tensor.shape)} in this batch; "
                f"the probe saw {info.dtype} {expected}"
            )
        value = reduce(batch_first(tensor, info), target.address.reduction)
        if value.is_floating_point():
            stored = value.to(rows.dtype)
            self._tally(str(target.address), value, stored)
            value = stored
        # This copy is the snapshot, to which nothing that overwrites `tensor` later in the pass can reach.
        if self._copies is not None:
            self._copies.copy(rows, value, is_live=shares_memory(value, tensor))
        else:
            _copy(rows, value)


def _copy(rows: Tensor, value: Tensor) -> None:
    """Copy an activation on the CPU into contiguous rows of the same type."""
    if value.ndim == 4 and not value.is_contiguous() and value.is_contiguous(memory_format=torch.channels_last):
        # One image is a matrix (pixels, channels) to transpose, which torch does in blocks that fit the cache.
        for row_CHW, value_CHW in zip(rows, value, strict=True):
            row_CHW.flatten(1).copy_(value_CHW.permute(1, 2, 0).flatten(0, 1).t())
    else:
        rows.copy_(value)


class _GPUCopies:
    """Copies from a GPU to pinned memory, on a stream of their own, beside the passes that follow.

    A live activation is first copied on the GPU, in the order of the pass: an in-place operation after it then cannot
    reach what is still on its way. Those copies take memory until somebody waits for their pass.
    """

    def __init__(self, device: torch.device) -> None:
        self.model_seconds = self.copying_seconds = 0.0
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._begin = self._now()
        self._copies: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._passes: deque[tuple[torch.cuda.Event, torch.cuda.Event, list[Any]]] = deque()
        self._finished = 0

    def begin_pass(self) -> None:
        self._begin, self._copies = self._now(), []

    def copy(self, rows: Tensor, value: Tensor, *, is_live: bool) -> None:
        snapshot = value.clone(memory_format=torch.contiguous_format) if is_live else value.contiguous()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            begin = self._now()
            rows.copy_(snapshot, non_blocking=True)
            self._copies.append((begin, self._now()))
        snapshot.record_stream(self._stream)  # Its memory is not given to others before it has been copied.

    def end_pass(self) -> None:
        self._passes.append((self._begin, self._now(), self._copies))

    def wait(self, passes: int) -> None:
        while self._finished < passes:
            self._finish_oldest()
            self._finished += 1

    def _finish_oldest(self) -> None:
        begin, end, copies = self._passes.popleft()
        end.synchronize()
        self.model_seconds += begin.elapsed_time(end) / 1000
        for begin, end in copies:
            end.synchronize()
            self.copying_seconds += begin.elapsed_time(end) / 1000

    def _now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


# --- out of your own forward passes --------------------------------------------------------------------------------


Transform = Callable[[Tensor], Tensor]
Hook = Callable[[nn.Module, tuple[Any, ...], Any], Tensor | None]


@dataclasses.dataclass(frozen=True)
class _Wish:
    """What to keep of one module: `address` holds the name in place of the path, and what follows it."""

    module: nn.Module
    address: Address
    transform: Transform | None
    hook: Hook | None


class Capture(Mapping[str, Tensor]):
    """Take activations out of your own forward passes, of any module, on any device, in any mode.

    Hooks are on the model from construction until `remove()`, or until the `with` block ends; the model is otherwise
    untouched. A pass begins when the model itself is called. As a mapping, a capture shows the last pass: address ->
    tensor, a copy made when the layer returned. A module that ran twice is there as `relu:0` and `relu:1`, a tuple as
    `attention/0`.

    Args:
        model: the module whose `forward` you call.
        layers: addresses, globs, 'type:Conv2d' (one string with commas, or a sequence), modules of the model, or a
            mapping from names of your own to any of these. More can be added later.
        keep: how many passes to hold, the last ones; None for all of them (see `history`).
        detach: False keeps the activations in the autograd graph.
        transform: applied to each tensor before it is kept.
        hook: `hook(module, inputs, output)` runs instead; the tensor it returns is kept, None keeps nothing. What it
            returns never reaches the model.

    Raises:
        LayerError: a layer does not exist (with the closest names).
        NotCapturedError: (on reading; a KeyError) the layer has not run, or has run more than once.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)).eval()
        >>> with Capture(model, ["0", "1@mean23"]) as capture:
        ...     _ = model(torch.rand(2, 3, 8, 8))
        >>> capture["0"].shape, capture["1@mean23"].shape
        (torch.Size([2, 4, 6, 6]), torch.Size([2, 4]))
        >>> with Capture(model, "1") as capture:
        ...     _ = model(torch.randn(2, 3, 8, 8))
        >>> bool((capture["1"] < 0).any())  # the in-place ReLU has not reached it
        True

        Names of your own, a transform, and the last three passes:

        >>> with Capture(model, {"maps": model[0]}, keep=3, transform=lambda maps: maps.amax((2, 3))) as capture:
        ...     for _ in range(5):
        ...         _ = model(torch.rand(2, 3, 8, 8))
        >>> [tuple(maps.shape) for maps in capture.history("maps")]
        [(2, 4), (2, 4), (2, 4)]
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str | nn.Module | Iterable[str | nn.Module] | Mapping[str, str | nn.Module] = (),
        *,
        keep: int | None = 1,
        detach: bool = True,
        transform: Transform | None = None,
        hook: Hook | None = None,
    ) -> None:
        if keep is not None and keep < 1:
            raise UsageError(f"keep is {keep}; it is the number of passes to hold, 1 or more, or None for all")
        self.model = model
        self._detach = detach
        self._wishes: dict[str, list[_Wish]] = {}
        self._passes: deque[dict[Address, Tensor]] = deque(maxlen=keep)
        self._taps = Taps(self._on_enter, self._on_return)
        self._fastpath = True
        self._model_hooks = [
            model.register_forward_pre_hook(self._begin_pass, prepend=True),
            model.register_forward_hook(self._end_pass, always_call=True),
        ]
        try:
            self.add(layers, transform=transform, hook=hook)
        except BaseException:
            self.remove()
            raise

    def add(
        self,
        layers: str | nn.Module | Iterable[str | nn.Module] | Mapping[str, str | nn.Module],
        *,
        transform: Transform | None = None,
        hook: Hook | None = None,
    ) -> Capture:
        """Capture more layers, with a transform or a hook of their own; returns the capture itself.

        Example:
            >>> model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
            >>> capture = Capture(model).add("0").add("1", transform=torch.sigmoid)
            >>> _ = model(torch.rand(5, 3))
            >>> list(capture)
            ['0', '1']
        """
        modules = modules_of(self.model)
        class_names = {path: type(module).__name__ for path, module in modules.items()}
        paths = {id(module): path for path, module in reversed(modules.items())}
        named: Iterable[tuple[str | None, str | nn.Module]]
        if isinstance(layers, Mapping):
            named = layers.items()
        else:
            named = [(None, layer) for layer in ([layers] if isinstance(layers, str | nn.Module) else layers)]
        for name, layer in named:
            if isinstance(layer, nn.Module):
                if id(layer) not in paths:
                    raise LayerError(f"the {type(layer).__name__} to capture is not a module of this model")
                selectors = [Selector("path", Address(paths[id(layer)]), "")]
            else:
                selectors = parse_selectors(layer)
            for selector in selectors:
                for path in matched_paths([selector], class_names, "this model"):
                    if name is not None and (len(selectors) > 1 or selector.kind != "path"):
                        raise LayerError(f"'{name}' is one name, and '{layer}' can be several layers")
                    address = dataclasses.replace(selector.address, path=name or path)
                    wish = _Wish(modules[path], address, transform, hook)
                    if wish not in self._wishes.setdefault(path, []):
                        self._wishes[path].append(wish)
                    self._taps.attach(path, modules[path])
        return self

    def remove(self, name: str | None = None) -> None:
        """Take all hooks off the model, or those of one path or name; what was captured stays."""
        if name is None:
            self._taps.detach_all()
            for hook in self._model_hooks:
                hook.remove()
            self._wishes.clear()
            return
        path_or_name = Address.parse(name).path
        known = {wish.address.path for wishes in self._wishes.values() for wish in wishes}
        if path_or_name not in known:
            raise LayerError(f"'{name}' is not being captured; there is: {', '.join(known) or 'nothing'}")
        for path, wishes in list(self._wishes.items()):
            self._wishes[path] = [wish for wish in wishes if wish.address.path != path_or_name]
            if not self._wishes[path]:
                del self._wishes[path]
                self._taps.detach(path)

    def clear(self) -> None:
        """Forget what was captured; the hooks stay."""
        self._passes.clear()
        self._taps.begin_pass()

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    # --- reading

    def __getitem__(self, address: str) -> Tensor:
        return _find(self._passes[-1] if self._passes else {}, address)

    def __iter__(self) -> Iterator[str]:
        return map(str, _canonical(self._passes[-1]) if self._passes else ())

    def __len__(self) -> int:
        return len(self._passes[-1]) if self._passes else 0

    def history(self, address: str) -> list[Tensor]:
        """Return one activation of every pass that is held, the oldest first."""
        return [_find(one_pass, address) for one_pass in self._passes]

    def summary(self) -> str:
        """Describe the model and, for each layer: class, parameters, calls, and what the last pass kept.

        Example:
            >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
            >>> capture = Capture(model, "0,1")
            >>> print(capture.summary())
            Sequential: 16 parameters, 0 passes held
            0  Linear  16  has not run
            1  ReLU     0  has not run
        """
        last = _canonical(self._passes[-1]) if self._passes else {}
        rows = []
        for path, wishes in self._wishes.items():
            calls = self._taps.calls[path]
            for wish in wishes:
                kept = [
                    f"{key} {list(tensor.shape)} {dtype_name(tensor.dtype)} {tensor.device}"
                    for key, tensor in last.items()
                    if key.path == wish.address.path and key.reduction == wish.address.reduction
                ]
                times = f"{calls} call{'s' * (calls != 1)}: {', '.join(kept) or 'nothing kept'}"
                state = times if calls else "has not run"
                rows.append((str(wish.address), type(wish.module).__name__, f"{parameter_count(wish.module):,}", state))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            f"{name:{widths[0]}}  {kind:{widths[1]}}  {count:>{widths[2]}}  {state}"
            for name, kind, count, state in rows
        ]
        total = (
            f"{type(self.model).__name__}: {parameter_count(self.model):,} parameters, {len(self._passes)} passes held"
        )
        return "\n".join([total, *lines])

    def __repr__(self) -> str:
        return f"Capture({type(self.model).__name__}: {', '.join(self) or 'nothing yet'})"

    # --- during a pass

    def _begin_pass(self, _module: nn.Module, _args: Any) -> None:
        self._taps.begin_pass()
        self._passes.append({})
        self._fastpath = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)

    def _end_pass(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        torch.backends.mha.set_fastpath_enabled(self._fastpath)

    def _on_enter(self, path: str, call: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for wish in self._wishes.get(path, ()):
            if wish.address.is_input and wish.hook is None:
                self._keep(wish, call, tensors_given(args, kwargs))

    def _on_return(self, path: str, call: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        for wish in self._wishes.get(path, ()):
            if wish.hook is not None:
                result = wish.hook(wish.module, args, output)
                self._keep(wish, call, tensors_in(result))
            elif not wish.address.is_input:
                self._keep(wish, call, tensors_in(output))

    def _keep(self, wish: _Wish, call: int, tensors: Iterable[tuple[Parts, Tensor]]) -> None:
        wanted = wish.address
        if wanted.call not in (None, call):
            return
        if not self._passes:
            self._passes.append({})  # A layer was called by itself, outside of any call of the model.
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
    """Drop the number of a call that was its module's only one."""
    called_again = {(key.path, key.is_input) for key in one_pass if key.call}
    return {
        key if (key.path, key.is_input) in called_again else dataclasses.replace(key, call=None): tensor
        for key, tensor in one_pass.items()
    }


def _find(one_pass: Mapping[Address, Tensor], address: str) -> Tensor:
    wanted, stored = Address.parse(address), _canonical(one_pass)
    if wanted in stored:
        return stored[wanted]
    if wanted in one_pass:
        return one_pass[wanted]  # relu:0 of a relu that ran once
    if not stored:
        raise NotCapturedError(f"'{address}': nothing has been captured yet; call the model")
    beneath = [str(key) for key in stored if key.path == wanted.path]
    there = ", ".join(beneath) or closest(address, map(str, stored))
    raise NotCapturedError(f"'{address}' was not captured; there is {there}")
