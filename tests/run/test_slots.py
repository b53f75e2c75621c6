"""Pixels in memory that is used again: they equal others, and nobody writes to them while the consumer has them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hookx.images.listing import ImageList, list_images
from hookx.run.lane import Batch
from hookx.run.slots import Piece, Slots, cut
from hookx.run.workers import batches
from kit.pictures import SMALL, copied, no_longer_than

COUNT = 40
BROKEN = (0, 5, 6, 7, 20, 21, 22, 23, 39)  # the first of a batch, a piece and more, a whole batch, the last


@pytest.fixture
def images(tmp_path: Path) -> ImageList:
    generator = torch.Generator().manual_seed(0)
    for number in range(COUNT):
        file = tmp_path / f"{number:02}.png"
        if number in BROKEN:
            file.write_bytes(b"not an image")
        else:
            levels = torch.randint(0, 256, (70, 80, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(levels.numpy()).save(file)
    return list_images([tmp_path])


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hookx.run.slots._MIN_IMAGES_IN_PIECE", 1)


def positions_of(batch_size: int) -> list[range]:
    return [range(start, min(start + batch_size, COUNT)) for start in range(0, COUNT, batch_size)]


def as_floats(image: Image.Image) -> Tensor:
    levels = np.array(image.resize((SMALL.crop_px, SMALL.crop_px)), dtype=np.float32)
    return torch.from_numpy(levels).permute(2, 0, 1)


def as_doubles(image: Image.Image) -> Tensor:
    return as_floats(image).double()  # Twice the room that was left for an image.


@pytest.mark.parametrize("transform", [None, as_floats, as_doubles])
@pytest.mark.parametrize("batch_size", [1, 4, 12, 40])
def test_pixels_in_slots_equal_those_that_this_process_decodes(
    images: ImageList, batch_size: int, transform: Callable[[Image.Image], Tensor] | None
) -> None:
    def decoded(workers: int) -> Iterator[tuple[Tensor | None, list[str], list[tuple[str, str]]]]:
        for batch in copied(batches(images, positions_of(batch_size), SMALL, workers=workers, transform=transform)):
            yield batch.pixels_NCHW, batch.keys, batch.failures

    with no_longer_than(60):
        for here, there in zip(decoded(0), decoded(3), strict=True):
            assert here[1:] == there[1:]
            assert (here[0] is None) == (there[0] is None)
            if here[0] is not None and there[0] is not None:
                assert torch.equal(here[0], there[0]) and here[0].stride() == there[0].stride()


def test_nobody_writes_to_the_pixels_of_a_batch_before_the_next_is_asked_for(images: ImageList) -> None:
    with no_longer_than(60):
        for batch in batches(images, positions_of(2), SMALL, workers=3):
            if batch.pixels_NCHW is not None:
                before = batch.pixels_NCHW.clone()
                time.sleep(0.02)  # The others decode as far ahead as they may.
                assert torch.equal(batch.pixels_NCHW, before)


def test_what_was_decoded_before_a_process_was_killed_is_still_there(images: ImageList, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    with Image.open(str(images.files[12])) as image:
        fatal = image.getpixel((0, 0))

    def die_once(image: Image.Image) -> Tensor:
        if image.getpixel((0, 0)) == fatal and not killed.exists():
            killed.touch()
            os._exit(1)
        return as_floats(image)

    def decoded(workers: int, transform: Callable[[Image.Image], Tensor]) -> list[Tensor]:
        some = copied(batches(images, positions_of(8), SMALL, workers=workers, transform=transform))
        return [batch.pixels_NCHW for batch in some if batch.pixels_NCHW is not None]

    with no_longer_than(60):
        whole, restarted = decoded(0, as_floats), decoded(3, die_once)
    assert killed.exists() and all(map(torch.equal, whole, restarted)) and len(whole) == len(restarted)


def test_every_position_is_in_one_piece_and_pieces_follow_their_batch() -> None:
    for batch_size in (1, 3, 16, 40):
        some = positions_of(batch_size)
        for whole in (False, True):
            pieces = cut(some, whole=whole)
            assert [position for piece in pieces for position in piece.positions] == list(range(COUNT))
            assert all(piece.positions.start == some[piece.batch].start + piece.first for piece in pieces)
            assert not whole or len(pieces) == len(some)


def test_a_process_waits_for_a_slot_that_is_in_use() -> None:
    slots, pieces = Slots(positions_of(1), 3, workers=1, device=torch.device("cpu")), cut(positions_of(1), whole=True)

    def is_free(piece: Piece) -> bool:
        waiting = threading.Thread(target=slots.wait_for, args=(piece,), daemon=True)
        waiting.start()
        waiting.join(timeout=0.1)
        return not waiting.is_alive()

    count = sum(map(is_free, pieces))
    assert 1 < count < len(pieces)
    lent = slots.lend(Batch(piece.positions) for piece in pieces)
    next(lent)
    assert not is_free(pieces[count])
    next(lent)
    assert is_free(pieces[count]) and not is_free(pieces[count + 1])
