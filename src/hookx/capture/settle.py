"""Settle how the passes of a run follow one another: whether each may stop early, and what is put back before it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from hookx.capture.agreement import disagreement
from hookx.capture.rows import RowCapture, stored_dtype
from hookx.capture.runner import Runner
from hookx.capture.state import ModuleState, Settled
from hookx.layers.select import Target

log = logging.getLogger("hookx")


def settle(runner: Runner, targets: Sequence[Target], images_NCHW: Tensor) -> Settled:
    """Find out what passes change in a model, and whether a stopped pass is the same pass.

    What a pass changes again and again, such as a counter or a kept attention map, or what it would have cleared at its
    end, is put back before each pass. What the first pass leaves for the others, such as a table of positions, stays:
    the probe has shown that no row depends on it. So does what passes keep outside the model, in globals and in
    variables of functions. A stopped pass that follows a stopped pass of another image is compared with a full pass; if
    its rows differ, the passes of the run go on to their end.

    Args:
        runner: how to take a batch through the model.
        targets: all that a run captures.
        images_NCHW: at least two images.
    """
    if not targets:
        return Settled()
    one_NCHW, other_NCHW = images_NCHW[:1], images_NCHW[1:2]
    state = ModuleState.of(runner.module, runner.forward)
    inside = state.inside()
    full = Settled(stops=False)
    try:
        whole = _rows(runner, targets, full, one_NCHW)
        changed = set(inside.changed())
        changing: set[str] = set()
        if changed:
            after_one = ModuleState.of(runner.module, runner.forward).inside().narrow(changed)
            _rows(runner, targets, full, other_NCHW)
            changing = set(after_one.changed())
            state.restore()
        _rows(runner, targets, Settled(), other_NCHW)
        left_by_stop = set(inside.changed())
        put_back = changing | (left_by_stop - (changed - changing))
        state.restore(put_back)
        rows = _rows(runner, targets, Settled(), one_NCHW)
        differing = _differing(targets, whole, rows)
        if differing is not None:
            state.restore()
            again = _rows(runner, targets, full, one_NCHW)
            if _differing(targets, whole, again) is not None:  # Two full passes differ as well: by rounding.
                differing = _differing(targets, whole, rows, exactly=False)
    finally:
        state.restore()
    if differing is not None:
        log.info("passes run to their end: stopping after the last layer changes '%s' in later passes", differing)
        put_back = changing
    return Settled(
        stops=differing is None,
        changing=tuple(sorted(put_back)),
        before_pass=inside.narrow(put_back),
        before_run=inside.lighten(changed | changing | left_by_stop),
    )


def _rows(runner: Runner, targets: Sequence[Target], settled: Settled, *images_NCHW: Tensor) -> dict[str, Tensor]:
    """Run passes of one image each; return the rows of the last."""
    rows = {
        str(target.address): torch.empty((1, *target.shape), dtype=getattr(torch, stored_dtype(target)))
        for target in targets
    }
    with RowCapture(runner, targets, settled) as capture:
        for image_NCHW in images_NCHW:
            capture.run(image_NCHW.clone(), rows)  # A model may write to what it is given.
        capture.wait()
    return rows


def _differing(
    targets: Sequence[Target], one: dict[str, Tensor], other: dict[str, Tensor], *, exactly: bool = True
) -> str | None:
    """Return the address of a target whose rows differ; None if all are the same."""
    for target in targets:
        address = str(target.address)
        rounding = 0.0 if exactly else target.tensor.rounding
        if exactly and not _same_bits(one[address], other[address]):
            return address
        if not exactly and disagreement(one[address], other[address], rounding) is not None:
            return address
    return None


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return not one.numel() or torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))
