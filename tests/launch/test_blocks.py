"""Shards are handed out in blocks: each to somebody, again if that one died, and not without end."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from hookx.launch.blocks import Blocks

rates = st.one_of(st.none(), st.floats(1e-6, 1e6))


@given(shards=st.integers(0, 3000), workers=st.integers(1, 40), rate=rates, seed=st.integers(0, 99))
def test_every_shard_is_handed_out_and_one_that_came_back_again(
    shards: int, workers: int, rate: float | None, seed: int
) -> None:
    blocks, chance, computed = Blocks(range(shards)), random.Random(seed), list[int]()
    in_hand: list[list[int]] = []
    while blocks or in_hand:
        if blocks and len(in_hand) < workers:
            in_hand.append(blocks.take(workers, rate))
            assert in_hand[-1]
            continue
        block = in_hand.pop(chance.randrange(len(in_hand)))
        finished = chance.randint(0, len(block)) if chance.random() < 0.1 else len(block)
        computed += block[:finished]
        assert not blocks.take_back(block[finished:], died=False)
    assert sorted(computed) == list(range(shards))


@given(shards=st.integers(1, 3000), workers=st.integers(1, 40), rate=st.floats(1e-3, 1e3))
def test_a_block_takes_no_longer_than_five_minutes_and_leaves_work_for_the_others(
    shards: int, workers: int, rate: float
) -> None:
    blocks = Blocks(range(shards))
    size = len(blocks.take(workers, rate))
    assert 1 <= size <= max(1, 300 * rate) and (size - 1) * workers < shards


@given(shards=st.integers(2, 300), deadly=st.sets(st.integers(0, 299), max_size=5), workers=st.integers(1, 8))
def test_a_shard_at_which_workers_die_is_found_and_left_out_and_all_others_are_computed(
    shards: int, deadly: set[int], workers: int
) -> None:
    blocks, computed, deaths = Blocks(range(shards)), list[int](), 0
    while blocks:
        block = blocks.take(workers, 1.0)
        bad = next((place for place, number in enumerate(block) if number in deadly), None)
        computed += block[:bad]
        if bad is not None:
            deaths += 1
            blocks.take_back(block[bad:], died=True)
    assert sorted(blocks.given_up) == sorted(number for number in deadly if number < shards)
    assert sorted(computed) == [number for number in range(shards) if number not in deadly]
    assert deaths <= 3 * len(deadly)
