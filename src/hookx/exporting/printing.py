"""One activation of a run as text, JSON or bytes, for `hookx cat`; one row of numbers at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hookx.errors import NotStoredError
from hookx.layers.address import Address
from hookx.read.activations import NOT_IN_NUMPY
from hookx.read.features import open_features

_NUMBERS_PER_PIECE = 4096


@dataclass(frozen=True)
class Activation:
    """What one layer returned for one image."""

    key: str
    layer: str
    values: Tensor


def read_activation(run: str | os.PathLike[str], layer: str, key: str) -> Activation:
    """Read one activation of a run, finished or not.

    Raises:
        NotStoredError: the run does not hold the layer or the image; the message names the closest, or says why not.
    """
    features = open_features(run, partial=True)
    address = str(Address.parse(layer))
    if address not in features:
        raise NotStoredError.of(f"{features.path}/", layer, features, f"all: hookx inspect {features.path}/")
    try:
        return Activation(key, address, features[address].of(key))
    except NotStoredError as error:
        is_finished = len(features.keys) + len(features.failures) == features.plan.image_count
        if is_finished or key in features.failures:
            raise
        next_step = "the run is not finished: the same hookx extract command resumes it"
        raise NotStoredError(str(error), next_step) from None


def to_text(values: Tensor) -> Iterator[bytes]:
    r"""Yield text: one number per line for a vector, one row per line for a matrix, blank lines between matrices.

    Dimensions of length 1 are ignored. Each number is the shortest text that reads back as the same bits.

    Example:
        >>> print(b"".join(to_text(torch.tensor([[[0.1, 2.0]], [[3.0, -0.0]]]))).decode(), end="")
        0.1 2.0
        3.0 -0.0
    """
    numbers = _to_numpy(values.to(torch.uint8) if values.dtype == torch.bool else values)
    sides = [side for side in numbers.shape if side != 1]
    if len(sides) < 2 or not numbers.size:
        yield from (f"{number!s}\n".encode() for number in numbers.flat)  # !s: in its own type, not as a double.
        return
    for number, matrix in enumerate(numbers.reshape(-1, *sides[-2:])):
        yield b"\n" if number else b""
        yield from (" ".join(map(str, row)).encode() + b"\n" for row in matrix)


def to_json(activation: Activation) -> Iterator[bytes]:
    """Yield one JSON document: key, layer, shape, dtype and nested values.

    JSON has no NaN or infinity, so they become the strings "NaN", "Infinity" and "-Infinity", which Python's `float`
    and JavaScript's `Number` read. A complex value becomes a list of two numbers.
    """
    values = activation.values
    dtype = str(values.dtype).removeprefix("torch.")
    about = {"key": activation.key, "layer": activation.layer, "shape": list(values.shape), "dtype": dtype}
    yield json.dumps(about).encode().removesuffix(b"}") + b', "values": '
    yield from _nest(_to_numpy(torch.view_as_real(values) if values.is_complex() else values))
    yield b"}\n"


def _to_numpy(values: Tensor) -> NDArray[Any]:
    lacking = str(values.dtype).removeprefix("torch.") in NOT_IN_NUMPY
    return (values.float() if lacking else values).numpy()  # float32 holds the same numbers.


def _nest(numbers: NDArray[Any]) -> Iterator[bytes]:
    if numbers.ndim == 0:
        yield _json_number(numbers[()]).encode()
        return
    yield b"["
    if numbers.ndim == 1:
        for start in range(0, len(numbers), _NUMBERS_PER_PIECE):
            some = numbers[start : start + _NUMBERS_PER_PIECE]
            plain = numbers.dtype != bool and np.isfinite(some).all()
            yield (", " * (start > 0) + ", ".join(map(str if plain else _json_number, some))).encode()
    else:
        for position, part in enumerate(numbers):
            yield b",\n" if position else b""
            yield from _nest(part)
    yield b"]"


def _json_number(number: Any) -> str:
    if number.dtype == bool:
        return "true" if number else "false"
    if np.isfinite(number):
        return str(number)
    return '"NaN"' if np.isnan(number) else '"Infinity"' if number > 0 else '"-Infinity"'
