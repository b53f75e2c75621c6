"""How often values of a layer are not what a reader expects, by layer and kind."""

from __future__ import annotations

from collections.abc import Mapping

_SENTENCES = {
    "non_finite": "NaN or infinity in {address} of {count:,} images",
    "all_zero": "{address} is all zero for {count:,} images",
    "overflowed": "{count:,} values of {address} became infinite in the stored type",
    "flushed": "{count:,} values of {address} became zero in the stored type",
}
_OTHER = "{count:,} of {address} are of another kind"  # which a later version of hookx counted
KINDS = tuple(_SENTENCES)


class ValueCounts(dict[str, dict[str, int]]):
    """Counts by address and kind (see `KINDS`); what did not occur is absent.

    'non_finite' and 'all_zero' count images; 'overflowed' and 'flushed' count values that the stored type made
    infinite or zero.

    Example:
        >>> counts = ValueCounts({"conv1": {"all_zero": 2}})
        >>> counts.add({"conv1": {"all_zero": 1, "overflowed": 5000}})
        >>> print("; ".join(counts.sentences()))
        conv1 is all zero for 3 images; 5,000 values of conv1 became infinite in the stored type
    """

    def add(self, counts: Mapping[str, Mapping[str, int]]) -> None:
        for address, by_kind in counts.items():
            total = self.setdefault(address, {})
            for kind, count in by_kind.items():
                total[kind] = total.get(kind, 0) + count

    def sentences(self) -> list[str]:
        return [
            _SENTENCES.get(kind, _OTHER).format(count=count, address=address)
            for address, by_kind in self.items()
            for kind, count in by_kind.items()
        ]
