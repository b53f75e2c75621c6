"""The capture of a run: copy activations inside the hooks into preallocated rows, and count their remarkable values."""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hookx.capture.attention import Attentions
from hookx.capture.compare import split_by_image
from hookx.capture.copies import Copies, has_streams
from hookx.capture.failures import is_out_of_memory, report_broken_device
from hookx.capture.hooks import Taps
from hookx.capture.reduce import Reducer, reduce
from hookx.capture.runner import ForwardIsDone, Runner, modules_of
from hookx.capture.state import Settled
from hookx.capture.tensors import Parts, computable, dtype_name, tensors_given, tensors_in
from hookx.errors import CaptureError, HookxError, LayerError, one_line
from hookx.layers.address import Address
from hookx.layers.select import Target
from hookx.plan import ValueCounts


def stored_dtype(target: Target) -> str:
    """Return a target's dtype after its reduction; raise `LayerError` if it cannot be reduced."""
    try:
        example = torch.empty((2, *target.tensor.shape), dtype=getattr(torch, target.tensor.dtype), device="meta")
        return dtype_name(reduce(example, target.address, target.tensor.patches).dtype)
    except RuntimeError as error:
        raise LayerError(f"'{target.address}' cannot be computed from {target.tensor.dtype}: {error}") from None


class RowCapture:
    """Run batches, leave the targets' activations in rows of preallocated buffers, and stop each pass after the last.

    The modules are hooked while the `with` block lasts; at its end, what the passes changed in the model is put back as
    far as `settled` knows of it. On the CPU nothing is allocated.

    Raises:
        CaptureError: a pass differs from what the probe saw: another shape or dtype, a call more or less.
    """

    def __init__(self, runner: Runner, targets: Sequence[Target], settled: Settled | None = None) -> None:
        self.runner, self._settled = runner, settled or Settled()
        self.passes = 0  # run so far; on an accelerator their copies may still be under way
        self._copies = Copies(runner.device) if has_streams(runner.device) else None
        self._counter, self._reducer = _ValueCounter(), Reducer()
        self._targets: dict[tuple[str, int, bool], dict[Parts, list[Target]]] = {}
        for target in targets:
            address = target.address
            event = (address.path, address.call or 0, address.is_input)
            self._targets.setdefault(event, {}).setdefault(address.parts, []).append(target)
        modules = modules_of(runner.module)
        self._calls = {target.address.path: target.calls for target in targets}
        self._modules = {path: modules[path] for path in self._calls}
        attended = {target.address.path for target in targets if target.address.is_attention}
        self._attentions = Attentions(attended)
        self._taps = Taps(self._on_enter, self._on_return)
        self._rows: Mapping[str, Tensor] = {}
        self._remaining: set[tuple[str, int, bool]] = set()

    def __enter__(self) -> RowCapture:
        self._taps.attach(self._modules)
        return self

    def __exit__(self, *_: object) -> None:
        self._taps.detach()
        self._settled.end()

    def run(self, pixels_NCHW: Tensor, rows: Mapping[str, Tensor], *, counted: bool = True) -> None:
        """Run one batch; `rows` holds for each address a tensor (images in the batch, *shape) to write into.

        The pixels are on the runner's device. On an accelerator the rows are complete only after `wait`. What is not
        `counted` is left out of `take_counts`.
        """
        self._rows, self._remaining = rows, set(self._targets)
        self._counter.begin_pass()
        if self._copies is not None:
            self._copies.begin_pass()
        self._taps.begin_pass()
        self._attentions.begin_pass()
        self._settled.begin_pass()
        try:
            with report_broken_device(), contextlib.suppress(ForwardIsDone), self._attentions.watch():
                self.runner.run(pixels_NCHW)
        except Exception as error:  # A model can raise anything.
            if isinstance(error, HookxError | MemoryError) or is_out_of_memory(error):
                raise
            count = len(pixels_NCHW)
            images = "an image alone" if count == 1 else f"a batch of {count:,} images"
            raise CaptureError(
                f"the model fails on {images}: {type(error).__name__}: {one_line(error)}",
                "it took the batches of the probe, so look at what it expects of pixels or of their number",
            ) from error
        if self._remaining:
            missing = next(iter(self._targets[min(self._remaining)].values()))[0].address
            raise CaptureError(f"'{missing}' did not run in this batch, though it did in the probe")
        if self._copies is not None:
            self._copies.end_pass()
        if counted:
            self._counter.end_pass()
        self.passes += 1

    def wait(self, passes: int | None = None) -> None:
        """Wait until the rows of the first `passes` passes, by default all, are complete."""
        if self._copies is not None:
            with report_broken_device():
                self._copies.wait(self.passes if passes is None else passes)

    def wait_for_all(self) -> bool:
        """Wait until a device works on no pass any more, not even one that failed; return whether it had worked."""
        if self._copies is None:
            return False
        with report_broken_device():
            return self._copies.wait_for_all()

    def count(self, address: str, rows: Tensor) -> None:
        """Count what is remarkable in rows that no pass has computed here."""
        if rows.is_floating_point() or rows.is_complex():
            values = computable(rows) if rows.is_floating_point() else _real_numbers(rows)
            self._counter.begin_pass()
            self._counter.add(address, values, values)
            self._counter.end_pass()

    def take_counts(self) -> ValueCounts:
        """Return what was remarkable in the values since the last call."""
        return self._counter.take()

    @property
    def gpu_seconds(self) -> float:
        """How long a GPU computed; `run` returns before it is done."""
        return self._copies.model_seconds if self._copies else 0.0

    @property
    def gpu_copying_seconds(self) -> float:
        return self._copies.copying_seconds if self._copies else 0.0

    def _on_enter(self, path: str, call: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if call >= self._calls[path]:
            raise CaptureError(
                f"'{Address(path)}' ran more often in this batch than in the probe ({self._calls[path]})"
            )
        self._attentions.enter(path, call)
        if (path, call, True) in self._targets:
            self._take((path, call, True), tensors_given(args, kwargs))

    def _on_return(self, path: str, call: int, _args: Any, _kwargs: Any, output: Any) -> None:
        if (path, call, False) in self._targets:
            attended = [(parts, one) for parts, one in self._attentions.leave(path, call) if isinstance(one, Tensor)]
            self._take((path, call, False), [*tensors_in(output), *attended])

    def _take(self, event: tuple[str, int, bool], tensors: Iterable[tuple[Parts, Tensor]]) -> None:
        found = dict(tensors)
        for parts, targets in self._targets[event].items():
            for target in targets:
                if parts not in found:
                    raise CaptureError(f"'{target.address}' is missing in this batch, though the probe saw it")
                self._store(target, found[parts])
        self._remaining.discard(event)
        if not self._remaining and self._settled.stops:
            raise ForwardIsDone

    def _store(self, target: Target, tensor: Tensor) -> None:
        info, rows = target.tensor, self._rows[str(target.address)]
        assert info.batch_dim is not None
        expected = list(info.shape)
        if info.rows_per_image > 1:
            expected[info.batch_dim] *= len(rows)
        else:
            expected.insert(info.batch_dim, len(rows))
        if list(tensor.shape) != expected or dtype_name(tensor.dtype) != info.dtype:
            raise CaptureError(
                f"'{target.address}' is {dtype_name(tensor.dtype)} {list(tensor.shape)} in this batch; "
                f"the probe saw {info.dtype} {expected}"
            )
        value = self._reducer.reduce(split_by_image(tensor, info, len(rows)), target.address, info.patches)
        if value.is_floating_point():
            stored = value.to(rows.dtype)
            self._counter.add(str(target.address), computable(value), computable(stored))
            value = stored
        elif value.dtype != rows.dtype:  # complex numbers, in a type that a file can hold
            stored = value.to(rows.dtype)
            self._counter.add(str(target.address), *map(_real_numbers, (value, stored)))
            value = stored
        # This copy is the snapshot: whatever overwrites `tensor` later in the pass cannot reach it.
        if self._copies is not None:
            is_live = value.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
            self._copies.copy(rows, value, is_live=is_live)
        else:
            _copy(rows, value)


def _real_numbers(numbers: Tensor) -> Tensor:
    return torch.view_as_real(computable(numbers))


def _copy(rows: Tensor, value: Tensor) -> None:
    """Copy an activation on the CPU into contiguous rows of the same dtype."""
    if value.ndim == 4 and not value.is_contiguous() and value.is_contiguous(memory_format=torch.channels_last):
        # Each image is a (pixels, channels) matrix to transpose, which torch does in blocks that fit the cache.
        for row_CHW, value_CHW in zip(rows, value, strict=True):
            row_CHW.flatten(1).copy_(value_CHW.permute(1, 2, 0).flatten(0, 1).t())
    else:
        rows.copy_(value)


class _ValueCounter:
    """Collects `ValueCounts` over many passes, on the device of the values."""

    def __init__(self) -> None:
        self._counts: defaultdict[tuple[str, str], list[Tensor]] = defaultdict(list)
        self._extremes: defaultdict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)  # highest and lowest values
        self._of_pass: list[Callable[[], None]] = []

    def begin_pass(self) -> None:
        """Drop the counts of a pass that did not end: a batch that fails is run again in parts."""
        self._of_pass = []

    def end_pass(self) -> None:
        for keep in self._of_pass:
            keep()

    def add(self, address: str, value: Tensor, stored: Tensor) -> None:
        """Count in one batch of floating-point activations, as returned and as stored."""
        # NaN, infinity and a lone non-zero all survive into the extremes of an image.
        per_image = value.unsqueeze(1) if value.ndim == 1 else value
        if not per_image.shape[1:].numel():
            return
        dims = tuple(range(1, per_image.ndim))
        extremes = per_image.amax(dims), per_image.amin(dims)
        # A pass starts as few operations as it can; what the extremes tell is found out at the end.
        self._of_pass.append(functools.partial(self._extremes[address].append, extremes))
        if torch.finfo(stored.dtype).bits < torch.finfo(value.dtype).bits:
            found = {"overflowed": stored.isinf() & ~value.isinf(), "flushed": (stored == 0) & (value != 0)}
            for kind, where in found.items():
                self._of_pass.append(functools.partial(self._counts[address, kind].append, where.sum()))

    def take(self) -> ValueCounts:
        """Return the counts since the last call."""
        for address, extremes in self._extremes.items():
            if extremes:
                high, low = (torch.cat(of_passes) for of_passes in zip(*extremes, strict=True))
                self._counts[address, "non_finite"].append((~(high.isfinite() & low.isfinite())).sum())
                self._counts[address, "all_zero"].append(((high == 0) & (low == 0)).sum())
        counts = ValueCounts()
        # Reading a count waits for the device.
        for (address, kind), numbers in self._counts.items():
            if count := sum(map(int, numbers)):
                counts.add({address: {kind: count}})
        self._counts.clear()
        self._extremes.clear()
        return counts
