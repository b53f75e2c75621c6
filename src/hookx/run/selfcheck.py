"""The run's check of itself: images computed again in other company, before the shard with their rows is published.

What is checked follows from the plan, and never from who computes it: the record of a shard says how many of its rows
were, and has to be the same for every process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hookx.capture.second_look import Moved, Rows, SecondLook
from hookx.errors import CaptureError
from hookx.plan import Plan

# A check costs the forward passes of 3 images, so that this is 0.6 % of a run; a smaller run pays more, and less than a
# second. Long runs do not need more checks in proportion.
_IMAGES_PER_CHECK, _MAX_CHECKS = 500, 32
_SMALL_RUN_IMAGES, _CHECKS_OF_SMALL_RUN = 1000, 4
_IMAGES_PER_REPETITION = 256  # in one process


def choose_batches(plan: Plan, asked: int | str) -> frozenset[int]:
    """Return the first positions of the batches to check, the first batch and others at equal distances.

    Args:
        asked: how many; 'auto' for as many as cost less than 1 % of a run of 1,000 images or more; or 'off'.

    Example:
        >>> from hookx.plan import IMAGENET, LayerSpec
        >>> plan = Plan("resnet18", "", (LayerSpec("avgpool", (512, 1, 1), "float32"),), IMAGENET, "fp32", "contiguous",
        ...             image_count=5000, images_sha256="", images_per_shard=2000, batch_size=16)
        >>> sorted(choose_batches(plan, 3)), len(choose_batches(plan, "auto")), choose_batches(plan, "off")
        ([0, 1664, 3328], 10, frozenset())
    """
    if asked == "off":
        return frozenset()
    if asked != "auto":
        count = int(asked)
    elif plan.image_count < _SMALL_RUN_IMAGES:
        count = _CHECKS_OF_SMALL_RUN
    else:
        count = min(plan.image_count // _IMAGES_PER_CHECK, _MAX_CHECKS)
    in_a_shard = math.ceil(plan.images_per_shard / plan.batch_size)  # but the last
    batches = (len(plan.shards) - 1) * in_a_shard + math.ceil(len(plan.shards[-1]) / plan.batch_size)
    count = min(count, batches)
    starts = set()
    for number in (place * batches // count for place in range(count)):
        shard, batch = divmod(number, in_a_shard)
        starts.add(shard * plan.images_per_shard + batch * plan.batch_size)
    return frozenset(starts)


@dataclass(frozen=True)
class _Image:
    """An image of the run, and what is stored for it."""

    key: str
    pixels_CHW: Tensor
    rows: Rows  # (*shape) each
    images_together: int  # in the pass that its rows come from
    batch_NCHW: Tensor | None  # all of them, if they are still there
    place: int  # among them


class SelfCheck:
    """Checks the batches of one process.

    In a batch at one of the chosen positions, the last image and the brightest are computed again, together with the
    oldest one, which is the first that this process computed. In the first of all batches one more image is computed
    again, alone, and so is the oldest at the end of the process's work. The last image is where a batch runs out of
    room, and the brightest is the one most likely to be treated in a way that random images are not.

    Where every image is stored from a pass of its own, no row can depend on companions, and all these passes have one
    image.

    Args:
        starts: the first positions of the batches to check; see `choose_batches`.
        keys: the keys of all images of the run, for errors.
        to_input: makes a model's input, on its device, of decoded pixels.
    """

    def __init__(
        self,
        look: SecondLook,
        plan: Plan,
        starts: frozenset[int],
        keys: Sequence[str],
        to_input: Callable[[Tensor], Tensor],
    ) -> None:
        self._look, self._plan, self._starts, self._keys, self._to_input = look, plan, starts, keys, to_input
        self._oldest: _Image | None = None
        self._images_since = 0  # computed by this process since the oldest image was, for the first time or again

    def needs(self, positions: range, images: int) -> bool:
        """Return whether `check` is to see a batch with this many readable images, once its rows are complete."""
        self._images_since += images
        return self._oldest is None or positions.start in self._starts

    def check(
        self,
        positions: range,
        readable: Sequence[int],
        pixels_NCHW: Tensor,
        rows: Rows,
        parts: Sequence[range],
        images_at_once: int,
    ) -> int:
        """Check a batch whose rows are complete; return how many of them were computed again.

        Args:
            positions: the whole batch.
            readable: the positions of the images that could be read.
            pixels_NCHW: what was decoded, untouched by the model.
            rows: what is about to be stored.
            parts: which images went through the model together.
            images_at_once: how many may.

        Raises:
            CaptureError: a row depends on other images, or on what ran before it.
        """

        def image_at(number: int) -> _Image:
            part = next(part for part in parts if number in part)
            return _Image(
                key=self._keys[readable[number]],
                pixels_CHW=pixels_NCHW[number],
                rows={address: of_batch[number] for address, of_batch in rows.items()},
                images_together=len(part),
                batch_NCHW=pixels_NCHW[part.start : part.stop],
                place=number - part.start,
            )

        others = [] if self._oldest is None else [self._oldest]
        if self._oldest is None:
            self._oldest = _detach(image_at(0))
        if positions.start not in self._starts:
            return 0
        last = len(readable) - 1
        brightest = self._find_brightest(pixels_NCHW[:last]) if last else 0  # of those but the last, if there are any
        together = [image_at(last), *others, *([image_at(brightest)] if last else [])]
        for start in range(0, len(together), images_at_once):
            self._compute_again(together[start : start + images_at_once])
        checked = {last, brightest}
        if others:
            self._images_since = 0
        if positions.start == min(self._starts):
            alone = min(set(range(len(readable))) - checked, default=last)
            self._compute_again([image_at(alone)])
            checked.add(alone)
        return len(checked)

    def finish(self) -> None:
        """Compute the oldest image again, unless it was lately; raise `CaptureError` if its rows are others by now."""
        is_small_run = self._plan.image_count < _SMALL_RUN_IMAGES
        if self._oldest is not None and self._images_since >= (1 if is_small_run else _IMAGES_PER_REPETITION):
            self._compute_again([self._oldest])

    def _find_brightest(self, pixels_NCHW: Tensor) -> int:
        # Beside a GPU, every core decodes images.
        pixels_NCHW = pixels_NCHW.to(self._look.device, non_blocking=True)
        return int(pixels_NCHW.flatten(1).mean(1, dtype=torch.float32).argmax())

    def _compute_again(self, images: list[_Image]) -> None:
        input_NCHW = self._to_input(torch.stack([image.pixels_CHW for image in images]))
        rows = self._look.compute(input_NCHW)
        again = [{address: of_batch[number] for address, of_batch in rows.items()} for number in range(len(images))]
        # If the oldest image alone moves, it is not for its companions.
        oldest_last = sorted(
            zip(images, input_NCHW, again, strict=True), key=lambda of_image: of_image[0].batch_NCHW is None
        )
        for image, input_CHW, its_rows in oldest_last:
            together = image.images_together, len(images)
            if moved := self._look.find_moved(image.rows, its_rows, input_CHW, together):
                raise self._explain(image, moved, len(images) - 1)

    def _explain(self, image: _Image, moved: list[Moved], companions: int) -> CaptureError:
        """Find out why rows move: the same batch, computed once more, tells companions from what ran before."""
        is_repeatable = False
        if image.batch_NCHW is not None:
            input_NCHW = self._to_input(image.batch_NCHW)
            rows = self._look.compute(input_NCHW)
            repeated = {address: of_batch[image.place] for address, of_batch in rows.items()}
            together = image.images_together, image.images_together
            changed = self._look.find_moved(image.rows, repeated, input_NCHW[image.place], together)
            is_repeatable, moved = not changed, changed or moved
        more = f", and so {'does' if len(moved) == 2 else 'do'} {len(moved) - 1:,} more" if len(moved) > 1 else ""
        layer = f"'{moved[0].address}' of '{image.key}'"
        if is_repeatable:
            beside = f"beside {companions:,} other{'s' if companions > 1 else ''}" if companions else "alone"
            problem = f"depends on the other images of its batch{more}: computed again {beside}, {moved[0]}"
            steps = ["batches of one image have no others: --batch-size 1", "or name earlier layers"]
        else:
            problem = f"depends on what ran before it{more}: computed again, {moved[0]}"
            kept = "keeps something from one pass to the next, or draws random numbers, where hookx cannot reset it"
            steps = [f"the model {kept}", "name earlier layers, or change the model"]
        steps[-1] += "; --self-check off stores such rows all the same"
        if len(self._plan.shards) > 1:
            steps.append("shards that are published already may hold such rows, too: choose another --out")
        return CaptureError(f"{layer} {problem}", *steps)


def _detach(image: _Image) -> _Image:
    """Copy an image and its rows out of the memory of its batch, which will be used again."""
    rows = {address: row.clone() for address, row in image.rows.items()}
    return replace(image, pixels_CHW=image.pixels_CHW.clone(), rows=rows, batch_NCHW=None)
