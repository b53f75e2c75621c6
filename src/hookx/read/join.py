"""Join two runs by their keys."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace

import numpy as np

from hookx.keys import Keys
from hookx.read.activations import Positions
from hookx.read.features import Features


@dataclass(frozen=True)
class Join:
    """Two runs, reduced to the images they share: row n of one and row n of the other belong to the same image.

    Attributes:
        left, right: the runs, as `hookx.open` returns them, with only the common rows.
        only_left, only_right: keys that have a row in only one of them; the other's `failures` may say why.
    """

    left: Features
    right: Features
    only_left: Keys
    only_right: Keys

    @property
    def keys(self) -> Keys:
        """The image key of every row, in order."""
        return self.left.keys


def join(left: Features, right: Features) -> Join:
    """Match the rows of two runs by their keys, without reading any activation.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import hookx
        >>> with TemporaryDirectory() as out:
        ...     for model in ("resnet18", "squeezenet1_1"):
        ...         _ = hookx.extract(model, "type:AdaptiveAvgPool2d", "images", weights="none", out=f"{out}/{model}")
        ...     both = hookx.join(hookx.open(f"{out}/resnet18"), hookx.open(f"{out}/squeezenet1_1"))
        ...     rows = both.left["avgpool"][:2].flatten(1), both.right["classifier.3"][:2].flatten(1)
        >>> len(both.keys), len(both.only_left), [tuple(some.shape) for some in rows]
        (8, 0, [(2, 512), (2, 1000)])
    """
    in_left, in_right = _match(left.keys, right.keys)
    return Join(
        left=_narrow(left, in_left),
        right=_narrow(right, in_right),
        only_left=_without(left.keys, in_left),
        only_right=_without(right.keys, in_right),
    )


def _match(left: Keys, right: Keys) -> tuple[Positions, Positions]:
    """Return the positions of the common keys in each run."""
    in_left, in_right = array("q"), array("q")
    here = there = 0
    while here < len(left) and there < len(right):
        one, other = left.encoded(here), right.encoded(there)
        if one == other:
            in_left.append(here)
            in_right.append(there)
        here += one <= other
        there += other <= one
    return np.array(in_left), np.array(in_right)


def _narrow(features: Features, positions: Positions) -> Features:
    rows = features.rows
    keys = Keys.pack(map(rows.keys.encoded, positions.tolist()))
    chosen = positions if rows.chosen is None else rows.chosen[positions]
    return Features(features.path, features.plan, replace(rows, keys=keys, chosen=chosen))


def _without(keys: Keys, positions: Positions) -> Keys:
    others = np.ones(len(keys), dtype=bool)
    others[positions] = False
    return Keys.pack(map(keys.encoded, np.flatnonzero(others).tolist()))
