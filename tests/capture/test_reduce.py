"""What reductions compute, each against a second route."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hookx.capture.reduce import Reducer, projection, reduce
from hookx.layers.address import Address
from hookx.layers.reductions import Patches

PATCHES = Patches(2, 3, (6, 5, 4, 3, 2, 1), 7)  # from the last to the first


def reduced(tensor: Tensor, text: str, patches: Patches | None = PATCHES) -> Tensor:
    return reduce(tensor, Address.parse(f"layer@{text}"), patches)


@pytest.fixture
def tokens_NTC() -> Tensor:
    return torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def maps_NCHW() -> Tensor:
    return torch.randn(3, 8, 6, 6, generator=torch.Generator().manual_seed(0))


def test_tokens_of_places_are_taken_row_by_row(tokens_NTC: Tensor) -> None:
    placed = tokens_NTC[:, [6, 5, 4, 3, 2, 1]]
    assert torch.equal(reduced(tokens_NTC, "patches"), placed)
    assert torch.equal(reduced(tokens_NTC, "patchmean"), placed.mean(1))
    assert torch.equal(reduced(tokens_NTC, "cls+patchmean"), torch.cat([tokens_NTC[:, 0], placed.mean(1)], 1))
    grid = reduced(tokens_NTC, "grid")
    assert all(
        torch.equal(grid[:, :, row, column], placed[:, 3 * row + column]) for row in (0, 1) for column in (0, 1, 2)
    )


def test_a_map_with_channels_last_is_folded_to_channels_first() -> None:
    maps_NHWC = torch.randn(2, 2, 3, 5)
    assert torch.equal(reduced(maps_NHWC, "grid", Patches(2, 3, tuple(range(6)), 6)), maps_NHWC.permute(0, 3, 1, 2))


def test_slices_take_both_ends(tokens_NTC: Tensor, maps_NCHW: Tensor) -> None:
    assert torch.equal(reduced(tokens_NTC, "tokens5-"), tokens_NTC[:, 5:])
    assert torch.equal(reduced(tokens_NTC, "tokens1-4"), tokens_NTC[:, 1:5])
    assert torch.equal(reduced(tokens_NTC, "channels2-3"), tokens_NTC[..., 2:4])
    assert torch.equal(reduced(maps_NCHW, "channels2-3"), maps_NCHW[:, 2:4])


def test_gem_pool_and_l2_are_those_of_the_literature(maps_NCHW: Tensor) -> None:
    pooled = functional.avg_pool2d(maps_NCHW.clamp(min=1e-6) ** 3, 6)[..., 0, 0] ** (1 / 3)
    assert torch.allclose(reduced(maps_NCHW, "gem"), pooled, rtol=1e-6)
    assert torch.allclose(reduced(maps_NCHW.permute(0, 2, 3, 1), "gem12"), pooled, rtol=1e-5)
    assert torch.allclose(reduced(maps_NCHW, "pool3"), functional.avg_pool2d(maps_NCHW, 2), atol=1e-6)
    vectors = reduced(maps_NCHW, "gem@l2")
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3)) and torch.allclose(
        vectors * pooled.norm(dim=1, keepdim=True), pooled
    )
    assert torch.equal(reduced(torch.zeros(2, 4), "l2"), torch.zeros(2, 4))


@pytest.mark.parametrize("text", ["gem", "mean23@l2", "flatten@project16", "pool3"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_full_and_stays_half(text: str, dtype: torch.dtype) -> None:
    maps_NCHW = 300 * torch.rand(2, 8, 6, 6).to(dtype)  # The cube of 300 exceeds float16.
    values = reduced(maps_NCHW, text)
    assert values.dtype == dtype and values.isfinite().all()
    assert torch.allclose(values.float(), reduced(maps_NCHW.float(), text), rtol=1e-2, atol=1e-2)


def test_whole_numbers_become_floats() -> None:
    assert reduced(torch.ones(2, 8, dtype=torch.uint8), "l2").dtype == torch.float32
    assert reduced(torch.ones(2, 8, dtype=torch.bool), "project4").dtype == torch.float32


# --- random projections --------------------------------------------------------------------------------------------


def matrix(name: str, count: int, groups: int) -> Tensor:
    """Write a projection out as a matrix, from its definition."""
    order, signs = projection(name, count)
    dense = torch.zeros(groups, count)
    size, larger = divmod(count, groups)
    place = 0
    for group in range(groups):
        for _ in range(size + (group < larger)):
            dense[group, order[place]] = float(signs[place])
            place += 1
    return dense


@pytest.mark.parametrize("count", [16, 17, 31, 32, 100])
def test_a_projection_is_a_matrix_with_one_entry_for_each_number(count: int) -> None:
    values = torch.randn(3, count)
    dense = matrix("layer@project16", count, 16)
    assert (dense.abs().sum(0) == 1).all() and dense.abs().sum(1).max() - dense.abs().sum(1).min() <= 1
    assert torch.allclose(reduced(values, "project16"), values @ dense.T, atol=1e-5)


def test_distances_are_kept_within_the_stated_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(60, 20_000, generator=generator).abs() ** 2  # heavy tails, as activations have
    projected = reduced(vectors, "project512")
    exact, kept = torch.cdist(vectors, vectors), torch.cdist(projected, projected)
    pairs = torch.triu_indices(60, 60, 1)
    errors = (kept**2 / exact**2 - 1)[pairs[0], pairs[1]]
    assert errors.std() <= 1.1 * (2 / 512) ** 0.5 and abs(float(errors.mean())) < 0.02


def test_a_projection_does_not_depend_on_the_layout_of_memory() -> None:
    maps_NCHW = torch.randn(2, 8, 6, 6)
    same = reduced(maps_NCHW.contiguous(memory_format=torch.channels_last), "project20")
    assert torch.allclose(same, reduced(maps_NCHW, "project20"), atol=1e-5)


def test_each_layer_has_a_projection_of_its_own_whatever_ran_before() -> None:
    values, reducer = torch.randn(2, 100), Reducer()
    one = reducer.reduce(values, Address.parse("a@project10"))
    other = reducer.reduce(values, Address.parse("b@project10"))
    assert not torch.equal(one, other)
    assert torch.equal(one, reducer.reduce(values, Address.parse("a@project10")))


def test_another_process_makes_the_same_bits() -> None:
    script = "import hashlib; from hookx.capture.reduce import projection\n"
    script += "order, signs = projection('layer4@project64', 25088)\n"
    script += "print(hashlib.sha256(order.astype('<i8').tobytes() + signs.astype('<f4').tobytes()).hexdigest())"
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    # The same everywhere, in every version: rows of different runs are compared with each other.
    assert there == "ddd2eeb9d640693a9d0b3e04ef102a063fccd8f960198d19ea9f56000a4656f4"
    order, signs = projection("layer4@project64", 25088)
    assert np.array_equal(np.sort(order), np.arange(25088)) and set(np.unique(signs)) == {-1, 1}
