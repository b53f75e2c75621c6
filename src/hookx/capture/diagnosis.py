"""Why the rows of an image move: random numbers, what ran before, the other images, their number, or its place."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from hookx.capture.agreement import Disagreement, disagreement, sizes_of_moves
from hookx.capture.compare import Batch, Comparison
from hookx.capture.passes import Key, Passes
from hookx.capture.state import ModuleState
from hookx.errors import CaptureError

_ALONE = "; one image at a time has none: --batch-size 1"
_NUDGES = 4
_MAX_NAMES = 3
_MAX_SUSPECTS = 30


def explain(passes: Passes, state: ModuleState) -> dict[Key, str]:
    """Return why the rows of tensors move; what only rounds is left out, and its rounding measured again.

    Each batch runs once more from the state that the model was loaded with.
    """
    return _Diagnosis(passes, state).explain()


class _Diagnosis:
    def __init__(self, passes: Passes, state: ModuleState) -> None:
        self.passes, self.state = passes, state
        self.failed = passes.failed()

    def explain(self) -> dict[Key, str]:
        reasons: dict[Key, str] = {}

        def explained(keys: Collection[Key], reason: str) -> None:
            reasons.update(dict.fromkeys(keys, reason))
            self.failed -= set(keys)

        changed = bool(self.passes.changed)
        alone = self.passes.batches[0]
        random = self._moved_afresh(alone)
        # Two passes of a GPU can differ by rounding.
        random = {key: moved for key, moved in random.items() if not self._comparison(key).accept(moved.by)}
        self.failed = {key for key in self.failed if self._comparison(key).has_failed}
        explained(
            random,
            "it differs between two passes of one image from one state of the model: by random numbers, or by "
            "something outside the model's buffers and attributes",
        )
        if not changed:
            explained(
                {key for key in self.failed if self._comparison(key).batch_dim is None},
                "it depends on the images but has no batch dimension",
            )
        self._accept_rounding()
        self._accept_noise()
        by_history = set()
        if changed:
            batches = enumerate(self.passes.batches)
            afresh = {number: self._moved_afresh(batch) for number, batch in batches if number}
            by_history = {
                key
                for key in self.failed
                if any((key in moved) != (number in self._comparison(key).moved) for number, moved in afresh.items())
            }
            by_history |= self._moved_by_what_ran_before()
        for key, names in self._find_what_carries(by_history).items():
            explained([key], f"its rows depend on what ran before, through {names}")
        for key, reason in self._explain_within_batch().items():
            explained([key], reason)
        return reasons

    def _comparison(self, key: Key) -> Comparison:
        return self.passes.comparisons[key]

    def _moved(self, batch: Batch) -> dict[Key, Disagreement]:
        """Run a batch; return the tensors whose row of the followed image is not the one of the first pass."""
        found: dict[Key, Disagreement] = {}
        unseen = set(self.failed)

        def look(key: Key, tensor: Tensor) -> None:
            if key in self.failed:
                unseen.discard(key)
                moved = self._comparison(key).compare(tensor, batch)
                if moved is not None:
                    found[key] = moved

        try:
            self.passes.run(batch, look)
        except CaptureError:  # It ran before, from another state.
            unseen = set(self.failed)
        return found | {key: Disagreement(float("inf"), 0, 0) for key in unseen}

    def _moved_afresh(self, batch: Batch) -> dict[Key, Disagreement]:
        if not self.failed:
            return {}
        self.state.restore()
        return self._moved(batch)

    def _accept_rounding(self) -> None:
        """Measure rounding in batches as large as those in which a row moved, of copies of the followed image."""
        sizes = {
            len(self.passes.batches[number])
            for key in self.failed
            for number, moved in self._comparison(key).moved.items()
            if moved.by < float("inf")
        }
        found: dict[Key, float] = {}
        for size in sorted(sizes - {1}):
            copies = self.passes.batches[0].pixels_NCHW.expand(size, -1, -1, -1)
            batch = Batch(copies, tuple(range(size)), calibrates=True)

            def look(key: Key, tensor: Tensor, batch: Batch = batch) -> None:
                if key in self.failed:
                    rounding = self._comparison(key).rounding_of(tensor, batch)
                    found[key] = max(found.get(key, 0.0), rounding)

            self.state.restore()
            try:
                self.passes.run(batch, look)
            except CaptureError:
                continue
        self.failed = {key for key in self.failed if not self._comparison(key).accept(found.get(key, 0.0))}

    def _accept_noise(self) -> None:
        """Measure how far the image's own last bits move its rows, with nothing beside it."""
        noise: dict[Key, list[tuple[float, float]]] = {key: [] for key in self.failed}

        def look(key: Key, tensor: Tensor) -> None:
            if key in noise and tensor.shape == self._comparison(key).alone.shape:
                noise[key].append(sizes_of_moves(self._comparison(key).alone, tensor))

        for pixels_NCHW in self._nudge() if noise else ():
            self.state.restore()
            with contextlib.suppress(CaptureError):
                self.passes.run(Batch(pixels_NCHW, (0,)), look)
        self.failed = {
            key for key in self.failed if not (noise[key] and self._comparison(key).accept_noise(noise[key]))
        }

    def _nudge(self) -> Iterator[Tensor]:
        """Yield the followed image with pixels that are a little larger or smaller, by what the arithmetic rounds."""
        image = self.passes.batches[0].pixels_NCHW
        eps = 2 * max(torch.finfo(dtype).eps for dtype in (torch.float32, *self.passes.coarsest))
        generator = torch.Generator().manual_seed(0)
        for number in range(_NUDGES):
            signs = torch.randint(0, 2, image.shape, generator=generator).to(image) * 2 - 1
            if number < 2:
                signs = torch.full_like(image, (1, -1)[number])
            yield image + eps * signs * image.abs().clamp(min=1)

    def _moved_by_what_ran_before(self) -> set[Key]:
        """Return what moves in the first batch once the last one has run before it."""
        if not self.failed:
            return set()
        self._moved_afresh(self._last_of_others())
        return set(self._moved(self.passes.batches[0]))

    def _last_of_others(self) -> Batch:
        """Return the last batch that had other images."""
        return next(batch for batch in reversed(self.passes.batches) if batch is not self.passes.batches[0])

    def _find_what_carries(self, keys: Collection[Key]) -> dict[Key, str]:
        """Name what carries values from pass to pass: put back alone, it puts the rows right."""
        if not keys:
            return {}
        passes, state = self.passes, self.state
        culprits: dict[Key, str] = dict.fromkeys(keys, _list_names([], sorted(passes.changed)))
        unsettled = set(keys)
        for history in ([self._last_of_others()], passes.batches[1:-1]):
            state.restore()
            for batch in history:
                self._moved(batch)
            suspects = state.changed()
            after = ModuleState.of(passes.runner.module, passes.runner.forward)
            moved = set(self._moved(passes.batches[0])) & unsettled
            names: dict[Key, list[str]] = {key: [] for key in moved}
            for name in suspects[:_MAX_SUSPECTS] if moved else ():
                after.restore()
                state.restore([name])
                for key in moved - self._moved(passes.batches[0]).keys():
                    names[key].append(name)
            culprits |= {key: _list_names(found, suspects) for key, found in names.items()}
            unsettled -= moved
        return culprits

    def _explain_within_batch(self) -> dict[Key, str]:
        """Find out whether it is the place, the number or the values of other images that moves a row."""
        if not self.failed:
            return {}
        rows: dict[tuple[Key, int, int], Tensor] = {}
        for number, batch in enumerate(self.passes.batches):

            def look(key: Key, tensor: Tensor, number: int = number, batch: Batch = batch) -> None:
                comparison = self._comparison(key) if key in self.failed else None
                if comparison is not None and comparison.fits(tensor, batch):
                    for place in batch.places:
                        rows[key, number, place] = comparison.row(tensor, len(batch), place).clone()

            if number in (1, 2, 3):
                self.state.restore()
                self.passes.run(batch, look)

        def same(key: Key, one: tuple[int, int], other: tuple[int, int]) -> bool:
            found = [rows.get((key, *where)) for where in (one, other)]
            if found[0] is None or found[1] is None:
                return False
            return disagreement(found[0], found[1], self._comparison(key).rounding) is None

        reasons = {}
        for key in self.failed:
            comparison = self._comparison(key)
            moved = set(comparison.moved)
            unusual = {self.passes.batches[number].what for number in moved}
            if comparison.batch_dim is None:
                reasons[key] = "it depends on the images but has no batch dimension"
            elif moved == {number for number in moved if self.passes.batches[number].what} and len(unusual) == 1:
                reasons[key] = (
                    "an image's values depend on the other images of its batch: the probe saw it beside images "
                    f"{unusual.pop()}, and not beside others{_ALONE}"
                )
            elif 1 in moved and comparison.rows > 1:
                reasons[key] = (
                    f"the {comparison.rows} rows of an image cannot be found among those of a batch, or depend on the "
                    "other images"
                )
            elif 2 not in moved and 1 in moved and same(key, (1, 1), (3, 1)):
                reasons[key] = f"an image's values depend on its place in the batch{_ALONE}"
            elif 1 in moved and same(key, (1, 0), (1, 1)) and same(key, (1, 0), (2, 0)):
                reasons[key] = f"an image's values depend on the number of images in its batch{_ALONE}"
            else:
                reasons[key] = f"an image's values depend on the other images of its batch{_ALONE}"
        return reasons


def _list_names(names: list[str], suspects: list[str]) -> str:
    """List what carries values; what else changes may belong to it, such as the scale that a flag guards."""
    if not suspects:
        return "something outside the model's buffers and attributes"
    others = [name for name in suspects if name not in names]
    if not names:
        return _enumerate(others)
    return _enumerate(names) + (f" (passes also change {_enumerate(others)})" if others else "")


def _enumerate(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more
