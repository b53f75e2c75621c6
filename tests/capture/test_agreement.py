"""When two computations of one image agree: what rounding may change in a row, and what it may not."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hookx.capture.agreement import (
    ELEMENTS_PER_STEP,
    Disagreement,
    disagreement,
    is_unsteady,
    max_rounding,
    rounding_between,
)

HALVES = [torch.float16, torch.bfloat16]
FLOATS = [torch.float64, torch.float32, *HALVES]
FLOATS_OF_8_BITS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
INTEGERS = [torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32, torch.uint32, torch.int64, torch.uint64]
COMPLEX = [torch.complex64, torch.complex128]
DTYPES = [*FLOATS, *FLOATS_OF_8_BITS, *INTEGERS, torch.bool, *COMPLEX]

finite = st.floats(-1e4, 1e4, allow_subnormal=False)
values = st.lists(finite, min_size=1, max_size=30)
anything = st.lists(st.floats(width=32), max_size=30)


def random_row(dtype: torch.dtype, *shape: int) -> Tensor:
    """Return values that any type can hold."""
    row = torch.randint(1, 100, shape, generator=torch.Generator().manual_seed(0)).float()
    return row.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (7,), (2, 3, 4)], ids=str)
def test_a_row_agrees_with_its_copy_in_every_type_and_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    row = random_row(dtype, *shape)
    assert rounding_between(row, row.clone()) == 0
    assert disagreement(row, row.clone(), rounding=0) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounding", [0, 1e-6])
def test_one_element_of_another_value_disagrees_in_every_type(dtype: torch.dtype, rounding: float) -> None:
    row = torch.full((4, 5), 64).to(dtype)
    changed = torch.full((4, 5), 64)
    changed[2, 3] = 0
    found = disagreement(row, changed.to(dtype), rounding)
    largest = 1 if dtype == torch.bool else 64
    assert found == Disagreement(largest / float(largest), 1, 40 if dtype in COMPLEX else 20)
    assert rounding_between(row, changed.to(dtype)) == 1


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.bool], ids=str)
def test_integers_and_booleans_are_equal_whatever_the_rounding(dtype: torch.dtype) -> None:
    row = torch.zeros(100, dtype=torch.int64)
    row[0] = 1
    assert disagreement(row.to(dtype), torch.zeros(100).to(dtype), rounding=1) is not None


def test_large_integers_that_are_one_float_are_two_integers() -> None:
    row = torch.tensor([2**60, 5])
    assert disagreement(row, row + 1, rounding=1) is not None
    assert rounding_between(row, row + 1) > 0


@given(anything)
def test_nan_and_infinity_agree_with_themselves_and_with_nothing_else(numbers: list[float]) -> None:
    row = torch.tensor(numbers, dtype=torch.float32)
    assert disagreement(row, row.clone(), 0) is None
    for other in (math.nan, math.inf, -math.inf):
        changed = row.clone()
        changed[:1] = other
        found = disagreement(row, changed, rounding=1)
        is_same = not numbers or numbers[0] == other or (math.isnan(numbers[0]) and math.isnan(other))
        assert (found is None) == is_same
        assert is_same or (found is not None and math.isinf(found.by) and math.isinf(rounding_between(row, changed)))


@given(values, st.integers(0, 29), st.floats(1e-7, 1e-3))
def test_an_element_may_move_by_a_few_times_the_measured_rounding(
    numbers: list[float], place: int, rounding: float
) -> None:
    row = torch.tensor(numbers, dtype=torch.float64)
    largest = float(row.abs().max())
    if largest < 1e-3:
        return
    place %= len(numbers)
    for times, agrees in ((1, True), (100, False)):
        moved = row.clone()
        moved[place] += times * rounding * largest * (1 if row[place] < 0 else -1)  # so that the largest stays
        if abs(float(moved[place])) <= largest:
            assert (disagreement(row, moved, rounding) is None) == (agrees or times * rounding < 2e-6)


@given(values, st.floats(1e-3, 1e3))
def test_the_rule_does_not_depend_on_the_scale_of_a_row(numbers: list[float], factor: float) -> None:
    row = torch.tensor(numbers, dtype=torch.float64)
    moved = row * (1 - 1e-4)
    if float(row.abs().max()) < 1e-3:
        return
    assert math.isclose(rounding_between(row, moved), rounding_between(row * factor, moved * factor), rel_tol=1e-6)
    assert disagreement(row, moved, 0) is not None
    assert disagreement(row * factor, moved * factor, 0) is not None
    assert disagreement(row * factor, moved * factor, 1e-4) is None


@given(values)
def test_both_directions_give_one_answer(numbers: list[float]) -> None:
    row = torch.tensor(numbers)
    other = row.flip(0) * 0.999
    assert rounding_between(row, other) == rounding_between(other, row)
    assert disagreement(row, other, 1e-5) == disagreement(other, row, 1e-5)


@pytest.mark.parametrize("dtype", [*HALVES, *FLOATS_OF_8_BITS], ids=str)
def test_two_neighbours_in_a_narrow_type_agree(dtype: torch.dtype) -> None:
    bits = torch.int16 if dtype in HALVES else torch.int8
    row = torch.linspace(0.1, 2, 200).to(dtype)
    neighbours, two_apart = ((row.view(bits) + steps).view(dtype) for steps in (1, 2))
    assert disagreement(row, neighbours, 0) is None
    assert disagreement(row, two_apart, 0) is not None


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sums_in_another_order_agree_in_float32_and_wider(dtype: torch.dtype) -> None:
    terms = torch.randn(500, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    row = torch.stack(list(terms)).sum(0) if dtype in HALVES else sum(terms)
    again = terms.flip(0).sum(0) if dtype in HALVES else sum(terms.flip(0))
    assert isinstance(row, Tensor) and isinstance(again, Tensor)
    assert disagreement(row, again, rounding_between(row, again)) is None
    if dtype not in HALVES:
        assert disagreement(row, again, 0) is None


def test_another_shape_or_type_disagrees_in_everything() -> None:
    row = torch.ones(4)
    assert disagreement(row, torch.ones(5), 1) == Disagreement(math.inf, 4, 4)
    assert disagreement(row, torch.ones(4, dtype=torch.float64), 1) == Disagreement(math.inf, 4, 4)


# --- step-like rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signs", [(-1.0, 1.0), (-1.0, 0.0, 1.0), (0.0, 1.0)], ids=str)
def test_one_sign_in_ten_thousand_may_change(signs: tuple[float, ...]) -> None:
    row = torch.tensor(signs)[torch.arange(3 * ELEMENTS_PER_STEP) % len(signs)]
    other = {-1.0: 1.0, 0.0: 1.0, 1.0: signs[0]}
    for changes, agrees in ((3, True), (4, False)):
        changed = row.clone()
        for place in range(changes):
            changed[place] = other[float(row[place])]
        assert (disagreement(row, changed, 0) is None) == agrees
    small, changed = row[: ELEMENTS_PER_STEP - 1], row[: ELEMENTS_PER_STEP - 1].clone()
    changed[0] = other[float(row[0])]
    assert disagreement(small, changed, 0) is not None


def test_a_quantised_value_may_move_to_the_next_one_but_no_further() -> None:
    row = (torch.arange(ELEMENTS_PER_STEP) % 200) / 200
    changed = row.clone()
    changed[50] += 1 / 200
    assert disagreement(row, changed, 0) is None
    changed[50] += 1 / 200
    assert disagreement(row, changed, 0) is not None


def test_values_without_steps_may_not_jump() -> None:
    row = torch.linspace(-1, 1, 10 * ELEMENTS_PER_STEP)
    changed = row.clone()
    changed[50] = 0.5
    assert disagreement(row, changed, 0) is not None


# --- rows that an image's own last bits move -----------------------------------------------------------------------


def flip(row: Tensor, places: slice) -> Tensor:
    flipped = row.clone()
    flipped[places] = 1 - flipped[places]
    return flipped


def test_elements_on_the_edge_of_a_step_may_take_it_where_a_nudge_of_the_image_takes_it_too() -> None:
    mask = (torch.arange(1000) % 3 > 0).to(torch.uint8)
    again, nudged = flip(mask, slice(0, 2)), [mask, flip(mask, slice(500, 501))]
    assert disagreement(mask, again, 0) is not None
    assert is_unsteady(mask, again, mask, nudged)
    assert not is_unsteady(mask, flip(mask, slice(0, 200)), mask, nudged)  # Far too many of them.
    assert not is_unsteady(mask, again, mask, [mask, mask])  # The image alone is steady.


def test_noise_that_a_layer_amplifies_is_told_from_a_dependence_of_another_size() -> None:
    row = torch.linspace(-1, 1, 100)
    noise = torch.randn(4, 100, generator=torch.Generator().manual_seed(0)) * 1e-3
    nudged = list(row + noise[:3])
    assert is_unsteady(row, row + noise[3], row, nudged)
    assert not is_unsteady(row, row + 0.1, row, nudged)
    assert not is_unsteady(row, flip(row, slice(0, 1)), row, nudged)


def test_one_element_that_overflows_does_not_excuse_the_others() -> None:
    row = torch.ones(100)
    overflowed = row.clone()
    overflowed[3] = math.inf
    assert is_unsteady(row, overflowed, row, [overflowed])
    assert not is_unsteady(row, -overflowed, row, [overflowed])


def test_what_can_be_believed_to_be_rounding_depends_on_the_coarsest_arithmetic() -> None:
    single, half = max_rounding(torch.float32, torch.float64, torch.int64), max_rounding(torch.float32, torch.bfloat16)
    assert single < max_rounding(torch.float32, tf32=True) < half == max_rounding(torch.float16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_on_a_gpu_are_compared_as_on_the_host(dtype: torch.dtype) -> None:
    row = random_row(dtype, 10)
    changed = row.clone()
    changed[3:4] = torch.zeros(1).to(dtype)
    for one, other in ((row, changed), (row, row.clone())):
        on_gpu = one.cuda(), other.cuda()
        assert disagreement(*on_gpu, 1e-6) == disagreement(one, other, 1e-6)
        assert rounding_between(*on_gpu) == rounding_between(one, other)
