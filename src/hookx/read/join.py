"""Two runs joined by their keys."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace

import numpy as np

from hookx.keys import Keys
from hookx.read.activations import Positions
from hookx.read.features import Features, _without


@dataclass(frozen=True)
class Join:
    """Two runs, of both the images that they share: row n of one is row n of the other.

    Attributes:
        left, right: the runs, as `hookx.open` gives them, with the rows in common.
        only_left, only_right: keys that have a row in one of them alone; `right.failures` may say why.
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
    """Bring the rows of two runs into one order, by their keys. No activation is read.

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
    in_left, in_right = _common(left.keys, right.keys)
    return Join(
        left=_narrowed(left, in_left),
        right=_narrowed(right, in_right),
        only_left=_without(left.keys, in_left),
        only_right=_without(right.keys, in_right),
    )


def _common(left: Keys, right: Keys) -> tuple[Positions, Positions]:
    """Return where the keys that are in both are in each."""
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


def _narrowed(features: Features, positions: Positions) -> Features:
    rows = features.rows
    keys = Keys.pack(map(rows.keys.encoded, positions.tolist()))
    chosen = positions if rows.chosen is None else rows.chosen[positions]
    return Features(features.path, features.plan, replace(rows, keys=keys, chosen=chosen))
