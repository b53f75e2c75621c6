"""Reductions as addresses write them: each text has one meaning, and shapes say what values have."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hookx.capture.reduce import reduce
from hookx.errors import AddressError
from hookx.layers.address import Address
from hookx.layers.reductions import Patches, Reduction

PATCHES = Patches(2, 3, (1, 2, 3, 4, 5, 6), 7)
FIT: dict[str, list[tuple[int, ...]]] = {
    "flatten": [(4,), (5, 6), (3, 4, 4)],
    "mean1": [(4,), (5, 6)],
    "max23": [(3, 4, 4)],
    "cls": [(7, 5)],
    "patches": [(7, 5)],
    "patchmean": [(7, 5)],
    "cls+patchmean": [(7, 5)],
    "grid": [(7, 5)],
    "tokens1-": [(7, 5)],
    "tokens2-3": [(7, 5)],
    "tokens0": [(7, 5)],
    "channels0-2": [(4,), (7, 5), (3, 4, 4)],
    "channels1": [(4,), (7, 5), (3, 4, 4)],
    "gem": [(3, 4, 4)],
    "gem12": [(4, 4, 3)],
    "pool2": [(3, 4, 4), (3, 5, 7)],
    "l2": [(4,), (7, 5)],
    "project3": [(4,), (7, 5), (3, 4, 4)],
    "patches@channels0-2@mean1@l2": [(7, 5)],
    "patches@grid": [(7, 5)],
    "grid@pool2@flatten@project5@l2": [(7, 5)],
}


@pytest.mark.parametrize("text", FIT)
def test_the_shape_of_a_reduction_is_that_of_its_values(text: str) -> None:
    address = Address.parse(f"layer@{text}")
    assert address.reduction is not None and str(address) == f"layer@{text}"
    for shape in FIT[text]:
        values = reduce(torch.rand(2, *shape), address, PATCHES)
        assert tuple(values.shape) == (2, *address.reduction.shape(shape, PATCHES))


@pytest.mark.parametrize(
    ("text", "canonical"),
    [("mean32", "mean23"), ("gem23", "gem"), ("gem32", "gem"), ("channels3-3", "channels3"), ("tokens2-2", "tokens2")],
)
def test_a_reduction_has_one_spelling(text: str, canonical: str) -> None:
    assert str(Reduction.parse(text)) == canonical and Reduction.parse(text) == Reduction.parse(canonical)


@given(
    st.lists(st.sampled_from(["mean23", "l2", "flatten", "patches", "channels0-63", "tokens5-", "gem12"]), min_size=1)
)
def test_a_chain_is_read_as_it_is_written(steps: list[str]) -> None:
    assert str(Reduction.parse("@".join(steps))) == "@".join(steps)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("mean23@", "'@' is not a reduction"),
        ("mean-1", "'@mean-1' is not a reduction"),
        ("pool", "'@pool' is not a reduction: write @pool7"),
        ("pool0", "'@pool0' makes nothing"),
        ("project0", "'@project0' makes nothing"),
        ("channels", "'@channels' is not a reduction: write @channels0-63"),
        ("channels5-2", "'@channels5-2' ends before it begins: write @channels2-5"),
        ("tokens", "'@tokens' is not a reduction: write @tokens1-"),
        ("gem0", "cannot reduce dimension 0"),
        ("l22", "'@l22' is not a reduction"),
        ("patches2", "'@patches2' is not a reduction: patches takes no dimensions"),
        ("patchmean+cls", "'@patchmean+cls' is not a reduction; closest: "),
    ],
)
def test_what_is_no_reduction_is_refused(text: str, error: str) -> None:
    with pytest.raises(AddressError) as raised:
        Address.parse(f"layer@{text}")
    assert error in str(raised.value)


@pytest.mark.parametrize(
    ("text", "shape", "error"),
    [
        ("patches", (3, 4, 4), "takes tokens"),
        ("patchmean", (7,), "takes tokens"),
        ("l2", (3, 4, 4), "l2 takes a vector"),
        ("gem", (7, 5), "gem takes maps"),
        ("gem", (7, 7, 768), "looks like N,height,width,channels"),
        ("pool2", (7, 7, 768), "looks like N,height,width,channels"),
        ("channels0-3", (7, 7, 768), "looks like N,height,width,channels"),
        ("pool9", (3, 4, 4), "a map of 4 x 4 has no 9 x 9"),
        ("channels3-5", (4,), "it has 4 channels, 0 to 3"),
        ("tokens7-", (7, 5), "it has 7 tokens, 0 to 6"),
        ("project99", (7, 5), "it has 35 numbers"),
        ("mean1@mean1@mean1", (7, 5), "dimension 1 does not exist"),
    ],
)
def test_what_does_not_fit_a_shape_says_why(text: str, shape: tuple[int, ...], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Reduction.parse(text).shape(shape, PATCHES)


def test_what_needs_places_is_not_computed_without() -> None:
    for text in ("patches", "patchmean", "cls+patchmean", "grid"):
        with pytest.raises(ValueError, match="which of its 7 tokens stand for places"):
            Reduction.parse(text).shape((7, 5))
    assert Reduction.parse("cls").shape((7, 5)) == (5,)


def test_token_0_is_no_class_token_if_it_stands_for_a_place() -> None:
    without = Patches(2, 3, (0, 1, 2, 3, 4, 5), 6)
    with pytest.raises(ValueError, match="token 0 stands for a place of the image; all of them are"):
        Reduction.parse("cls").shape((6, 5), without)
    last = Patches(2, 3, (0, 1, 2, 3, 4, 5), 7)
    with pytest.raises(ValueError, match="those that are none: 6"):
        Reduction.parse("cls").shape((7, 5), last)
    with pytest.raises(ValueError, match="there is no class token"):
        Reduction.parse("cls+patchmean").shape((7, 5), last)
