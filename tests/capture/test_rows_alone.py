"""A row is what the model returns for its image alone: models for which that does not hold are refused by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hookx.capture.probe import example_images, probe
from hookx.capture.rows import RowCapture, stored_dtype
from hookx.capture.runner import Runner
from hookx.capture.state import ModuleState
from hookx.errors import LayerError
from hookx.layers.select import Target, parse_selectors, select
from kit import traps
from kit.traps import DEPENDENT_ON_NUMBER, DEPENDENT_ON_OTHERS, DEPENDENT_ON_PLACE, HARMLESS, RANDOM, REMEMBERING

Build = Callable[[], nn.Module]


def find(net: nn.Module, layers: str, batch_size: int | None = None) -> list[Target]:
    runner = Runner.of(net.eval())
    layers_found = probe(runner, example_images(runner, 16), batch_size=batch_size)
    return select(parse_selectors(layers), layers_found, "net").targets


def rows_of(net: nn.Module, targets: list[Target], pixels_NCHW: Tensor) -> dict[str, Tensor]:
    rows = {
        str(target.address): torch.empty((len(pixels_NCHW), *target.shape), dtype=getattr(torch, stored_dtype(target)))
        for target in targets
    }
    with RowCapture(Runner.of(net), targets) as capture:
        capture.run(pixels_NCHW, rows)
    return rows


def named(nets: Mapping[str, Any], *more: Any) -> list[Any]:
    return [pytest.param(net, *more, id=what) for what, net in nets.items()]


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        *named(DEPENDENT_ON_OTHERS, "depend on the other images of its batch|has no batch dimension"),
        *named(DEPENDENT_ON_PLACE, "depend on its place in the batch"),
        *named(DEPENDENT_ON_NUMBER, "depend on the number of images"),
    ],
)
def test_rows_that_depend_on_their_batch_are_refused_and_layers_before_them_are_not(build: Build, reason: str) -> None:
    assert len(find(build(), "conv,head/in")) == 3
    with pytest.raises(LayerError, match=reason):
        find(build(), "head")


@pytest.mark.parametrize("build", named(DEPENDENT_ON_OTHERS | DEPENDENT_ON_PLACE | DEPENDENT_ON_NUMBER))
def test_nothing_is_refused_for_its_batch_where_every_batch_has_one_image(build: Build) -> None:
    net, pixels_NCHW = build(), torch.randn(1, 3, 16, 16)
    [target] = find(net, "head", batch_size=1)
    with torch.inference_mode():
        expected = net(pixels_NCHW)
    [row] = rows_of(net, [target], pixels_NCHW).values()
    torch.testing.assert_close(row.flatten(), expected.flatten(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("build", named(RANDOM))
def test_rows_with_random_numbers_are_refused_and_layers_before_them_are_not(build: Build) -> None:
    for batch_size in (None, 1):
        assert len(find(build(), "conv,head/in", batch_size)) == 3
        with pytest.raises(LayerError, match="random numbers"):
            find(build(), "head", batch_size)


@pytest.mark.parametrize(("build", "carrier"), [pytest.param(*net, id=what) for what, net in REMEMBERING.items()])
@pytest.mark.parametrize("batch_size", [None, 1])
def test_rows_that_depend_on_what_ran_before_are_refused_by_the_name_of_what_carries_it(
    build: Build, carrier: str, batch_size: int | None
) -> None:
    assert len(find(build(), "conv,head/in", batch_size)) == 3
    with pytest.raises(LayerError, match=carrier):
        find(build(), ".", batch_size)


@pytest.mark.parametrize("build", named(HARMLESS))
def test_what_is_right_is_stored_whatever_it_keeps_or_refuses(build: Build) -> None:
    net, pixels_NCHW = build(), 0.5 * torch.randn(4, 3, 16, 16)
    targets = find(net, "*,.")
    whole = rows_of(net, targets, pixels_NCHW)
    assert "." in {target.address.path for target in targets}
    for image in range(4):
        alone = rows_of(net, targets, pixels_NCHW[image : image + 1])
        for address, row in alone.items():
            torch.testing.assert_close(row[0], whole[address][image], equal_nan=True)


STATEFUL = {what: build for what, (build, _) in REMEMBERING.items() if what != "what no search finds"}


@pytest.mark.parametrize("build", named(STATEFUL | HARMLESS | DEPENDENT_ON_OTHERS))
@pytest.mark.parametrize("batch_size", [None, 1])
def test_the_probe_leaves_the_model_as_it_was(build: Build, batch_size: int | None) -> None:
    net = build().eval()
    state, before = ModuleState.of(net), {name: value.clone() for name, value in net.state_dict().items()}
    offset, seen, calls = traps.OfItsClass.offset, len(traps.LAST_SEEN), traps.CALLS
    runner = Runner.of(net)
    probe(runner, example_images(runner, 16), batch_size=batch_size)
    assert state.changed() == []
    after = net.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert (traps.OfItsClass.offset, len(traps.LAST_SEEN), traps.CALLS) == (offset, seen, calls)
