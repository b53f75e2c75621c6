"""The passes that a capture holds: where each begins and ends, in each thread, and what it gave."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType

import torch
from torch import Tensor

from hookx.layers.address import Address

_numbers = itertools.count()


@dataclass(eq=False)
class Pass:
    """One call of a model, or of a part of it by itself, with all the calls of layers within."""

    path: str  # of the module that was called; the model is '.'
    number: int = field(default_factory=lambda: next(_numbers))  # in the order in which passes begin
    calls: Counter[str] = field(default_factory=Counter)  # path -> how often it ran
    activations: dict[Address, Tensor] = field(default_factory=dict)
    untaken: dict[Address, str] = field(default_factory=dict)  # why a part of what ran was not taken
    has_gradients: bool = field(default_factory=torch.is_grad_enabled)  # when it begins

    def why_untaken(self, wanted: Address) -> list[str]:
        """Return why a layer that ran gave nothing under an address; empty if it gave something, or did not run."""

        def layer_of(address: Address) -> Address:
            return dataclasses.replace(address, call=None, parts=())

        reasons = {
            reason: None
            for key, reason in self.untaken.items()
            if layer_of(key) == layer_of(wanted)
            and wanted.call in (None, key.call)
            and key.parts == wanted.parts[: len(key.parts)]
        }
        return list(reasons)


@dataclass(eq=False, frozen=True)
class _OpenCall:
    """A call that has begun. It is over once its frame is no longer on the stack of its thread, however it ended."""

    path: str
    number: int  # among the calls of this path in its pass
    frame: FrameType


class _SlowPath:
    """PyTorch's transformer fast path is off for the whole process until the last of these is released.

    It computes an encoder layer without calling its submodules.
    """

    _lock = threading.RLock()  # A garbage collection may release one while its thread makes another.
    _held = 0
    _was_fast = True

    def __init__(self) -> None:
        self._is_held = True
        with _SlowPath._lock:
            if not _SlowPath._held:
                _SlowPath._was_fast = torch.backends.mha.get_fastpath_enabled()
            _SlowPath._held += 1
            torch.backends.mha.set_fastpath_enabled(False)

    def release(self) -> None:
        with _SlowPath._lock:
            if self._is_held:
                self._is_held = False
                _SlowPath._held -= 1
                if not _SlowPath._held:
                    torch.backends.mha.set_fastpath_enabled(_SlowPath._was_fast)

    def __del__(self) -> None:
        self.release()


class _Running(threading.local):
    """What runs in one thread."""

    def __init__(self) -> None:
        self.calls: list[_OpenCall] = []
        self.one_pass: Pass | None = None
        self.slow_path: _SlowPath | None = None
        self.is_muted = False

    def end_calls_not_on(self, frame: FrameType) -> None:
        """End calls that ended unnoticed: by a `KeyboardInterrupt`, say, or because they were unhooked meanwhile."""
        while self.calls and not is_on_stack(self.calls[-1].frame, frame):
            self.calls.pop()
        self.end_pass_if_over()

    def end_pass_if_over(self) -> None:
        if not self.calls and self.slow_path:
            self.slow_path.release()
            self.slow_path = self.one_pass = None


class _Own(threading.local):
    """What one thread has run: the last pass of the model, and since then the last of each part."""

    def __init__(self) -> None:
        self.of_model: Pass | None = None
        self.of_parts: dict[str, Pass] = {}  # by path


class Passes:
    """The last `keep` passes of a model, and since the last of them, the last `keep` of each part called by itself.

    The outermost call in a thread begins a pass, and the calls within belong to it.
    """

    def __init__(self, keep: int | None) -> None:
        self.keep = keep
        self._lock = threading.RLock()
        self._of_model: deque[Pass] = deque(maxlen=keep)
        self._of_parts: dict[str, deque[Pass]] = {}
        self._running, self._own = _Running(), _Own()

    # --- during a pass

    def enter(self, path: str, frame: FrameType) -> tuple[Pass, int] | None:
        """Begin a call, and a pass if no call is running; return the pass and which call of this path it is."""
        running = self._running
        if running.is_muted:
            return None
        running.end_calls_not_on(frame)
        if running.one_pass is None:
            running.one_pass, running.slow_path = self._begin(path), _SlowPath()
        call = running.one_pass.calls[path]
        running.one_pass.calls[path] += 1
        running.calls.append(_OpenCall(path, call, frame))
        return running.one_pass, call

    def leave(self, path: str, frame: FrameType) -> tuple[Pass, int] | None:
        """End the call that began in this frame, and its pass with the outermost; None if it failed or never began."""
        running = self._running
        if running.is_muted:
            return None
        running.end_calls_not_on(frame)
        # A module with two paths has two calls in one frame.
        for index in reversed(range(len(running.calls))):
            call = running.calls[index]
            if call.frame is not frame:
                break
            if call.path == path:
                assert running.one_pass is not None
                ended = running.one_pass, call.number
                del running.calls[index]
                running.end_pass_if_over()
                return ended
        return None

    @contextlib.contextmanager
    def mute(self) -> Iterator[None]:
        """Take no calls into account, in this thread, for the length of the `with` block."""
        self._running.is_muted, was_muted = True, self._running.is_muted
        try:
            yield
        finally:
            self._running.is_muted = was_muted

    def _begin(self, path: str) -> Pass:
        one_pass = Pass(path)
        self._hold(one_pass)
        return one_pass

    def _hold(self, one_pass: Pass) -> None:
        own, path = self._own, one_pass.path
        with self._lock:
            if path == ".":
                self._of_model.append(one_pass)
                self._of_parts.clear()
                own.of_model, own.of_parts = one_pass, {}
            else:
                self._of_parts.setdefault(path, deque(maxlen=self.keep)).append(one_pass)
                own.of_parts[path] = one_pass

    # --- after it

    def held(self) -> list[Pass]:
        """Return every pass held, of all threads, oldest first."""
        with self._lock:
            held = [*self._of_model, *itertools.chain.from_iterable(self._of_parts.values())]
        return sorted(held, key=lambda one_pass: one_pass.number)

    def last(self) -> Pass:
        """Return the last pass of this thread, or of all if this one has run none, with the parts called since."""
        self._running.end_calls_not_on(sys._getframe())
        of_model, of_parts = self._own.of_model, list(self._own.of_parts.values())
        if not of_model and not of_parts:
            held = self.held()
            of_model = next((one_pass for one_pass in reversed(held) if one_pass.path == "."), None)
            since = of_model.number if of_model else -1
            of_parts = list({p.path: p for p in held if p.path != "." and p.number > since}.values())
        last = Pass(".", -1)
        for one_pass in [*([of_model] if of_model else []), *sorted(of_parts, key=lambda part: part.number)]:
            again = {key.path for key in one_pass.activations}
            last.activations = {key: value for key, value in last.activations.items() if key.path not in again}
            last.activations.update(one_pass.activations)
            last.untaken = {key: value for key, value in last.untaken.items() if key.path not in one_pass.calls}
            last.untaken.update(one_pass.untaken)
            last.calls = Counter({**last.calls, **one_pass.calls})
        return last

    def clear(self) -> None:
        """Forget what was captured; a pass that is running in this thread goes on, numbering its calls anew."""
        with self._lock:
            self._of_model.clear()
            self._of_parts.clear()
            self._own = _Own()
        self._running.end_calls_not_on(sys._getframe())
        if one_pass := self._running.one_pass:
            one_pass.activations.clear()
            one_pass.untaken.clear()
            one_pass.calls.clear()
            self._hold(one_pass)

    def stop(self) -> None:
        """End the passes that are running, in all threads."""
        self._running = _Running()


def is_on_stack(wanted: FrameType, frame: FrameType | None) -> bool:
    while frame is not None:
        if frame is wanted:
            return True
        frame = frame.f_back
    return False
