"""Which values of an image of more than 8 bits are black and white, and what there is to say about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

NARROW_SHARE = 0.25

RangeKind = Literal["narrow", "beyond"]


class RangeUse(NamedTuple):
    """How an image uses the range of its values, where that is worth a word.

    Args:
        kind: 'narrow': less than a quarter lies between its least and its greatest value; 'beyond': it has values
            outside, so that its least became black and its greatest white.
        low: its least value.
        high: its greatest value.
        black: where the range begins.
        white: where the range ends.
    """

    kind: RangeKind
    low: float
    high: float
    black: float
    white: float


class RangeCounts(dict[str, dict[str, Any]]):
    """How many images use their range in a way that is worth a word, by kind; what did not occur is absent.

    Each kind has the number of 'images'; the 'first' by key, with its values from 'low' to 'high' of a range
    from 'black' to 'white'; and the 'least' and 'greatest' value of all of them.

    Example:
        >>> counts = RangeCounts()
        >>> counts.add_image("a.tif", RangeUse("narrow", 12, 4003, 0, 65535))
        >>> counts.add_image("b.tif", RangeUse("narrow", 0, 900, 0, 65535))
        >>> for sentence in counts.sentences():
        ...     print(sentence)
        2 images use less than a quarter of their range (the first: a.tif, 12 to 4,003 of 65,535): --grey-range 0,4095 \
or minmax
    """

    def add_image(self, name: str | int, use: RangeUse) -> None:
        """Count an image, by its key or its position."""
        values = use._asdict()
        kind = values.pop("kind")
        self.add({kind: {"images": 1, "first": name, **values, "least": use.low, "greatest": use.high}})

    def add(self, counts: Mapping[str, Mapping[str, Any]]) -> None:
        """Add the counts of images whose keys lie behind those counted so far."""
        for kind, one in counts.items():
            if kind not in self:
                self[kind] = dict(one)
                continue
            total = self[kind]
            total["images"] += one["images"]
            total["least"] = min(total["least"], one["least"])
            total["greatest"] = max(total["greatest"], one["greatest"])

    def named(self, keys: Sequence[str]) -> RangeCounts:
        """Return the counts with keys in place of positions."""
        return RangeCounts({kind: {**one, "first": keys[one["first"]]} for kind, one in self.items()})

    def sentences(self) -> list[str]:
        """Write what there is to say, one sentence for each kind."""
        return [_SENTENCES[kind](one) for kind, one in self.items() if kind in _SENTENCES]


def are_range_counts(value: Any) -> bool:
    """Return whether a value from a file can be counts of ranges."""
    numbers = ("low", "high", "black", "white", "least", "greatest")
    return isinstance(value, dict) and all(
        isinstance(one, dict)
        and isinstance(one.get("images"), int)
        and isinstance(one.get("first"), str)
        and all(isinstance(one.get(name), int | float) for name in numbers)
        for one in value.values()
    )


_ONE = "image uses less than a quarter of its range"


def _describe_narrow(one: Mapping[str, Any]) -> str:
    use = "images use less than a quarter of their range" if one["images"] != 1 else _ONE
    whole = _number(one["white"]) if one["black"] == 0 else f"{_number(one['black'])} to {_number(one['white'])}"
    return f"{one['images']:,} {use} ({_first(one)} of {whole}): --grey-range {_suggest(one)}"


def _describe_beyond(one: Mapping[str, Any]) -> str:
    several = one["images"] != 1
    who = "images hold values" if several else "image holds values"
    whose = "their least is black and their greatest" if several else "its least is black and its greatest"
    outside = f"outside {_number(one['black'])} to {_number(one['white'])}"
    return (
        f"{one['images']:,} {who} {outside}, so {whose} white ({_first(one)}): --grey-range BLACK,WHITE sets one range "
        "for all"
    )


_SENTENCES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {"narrow": _describe_narrow, "beyond": _describe_beyond}


def _first(one: Mapping[str, Any]) -> str:
    the_first = "the first: " if one["images"] != 1 else ""
    return f"{the_first}{one['first']}, {_number(one['low'])} to {_number(one['high'])}"


def _suggest(one: Mapping[str, Any]) -> str:
    """Write the range that would hold the values of all images; whole numbers end where their bits do."""
    least, greatest = min(0, one["least"]), one["greatest"]
    if greatest <= least:
        return "minmax"
    if least == 0 and float(greatest).is_integer():
        greatest = 2 ** int(greatest).bit_length() - 1
    return f"{least:.6g},{greatest:.6g} or minmax"


def _number(value: float) -> str:
    return f"{int(value):,}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.6g}"
