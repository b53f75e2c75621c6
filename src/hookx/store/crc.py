"""CRC-32, by zlib-ng where it is installed, and else by zlib: the same checksums, some ten times as slowly."""

from __future__ import annotations

import itertools

try:
    from zlib_ng.zlib_ng import crc32, crc32_combine
except ModuleNotFoundError:  # A server without a network, say, which has torch and no wheel of zlib-ng.
    from zlib import crc32

    def crc32_combine(crc1: int, crc2: int, crc2_length: int, /) -> int:
        return combine(crc1, crc2, crc2_length)


__all__ = ["combine", "crc32", "crc32_combine"]

# A checksum is a polynomial over GF(2) modulo this one, its highest power in the lowest bit: RFC 1952, section 8.
_POLYNOMIAL = 0xEDB88320
_ONE, _X = 1 << 31, 1 << 30


def _times(one: int, other: int) -> int:
    """Multiply two polynomials modulo that of the CRC."""
    product = 0
    for power in range(32):
        if one & _ONE >> power:
            product ^= other
        other = other >> 1 ^ (_POLYNOMIAL if other & 1 else 0)
    return product


_X_TO_2_TO = list(itertools.accumulate(range(66), lambda power, _: _times(power, power), initial=_X))


def combine(first: int, second: int, second_bytes: int) -> int:
    """Return the CRC-32 of two strings of bytes, one after the other, from the CRC-32 of each.

    Bytes that follow multiply what stands before them by a power of x.

    Example:
        >>> import zlib
        >>> combine(zlib.crc32(b"activa"), zlib.crc32(b"tions"), 5) == zlib.crc32(b"activations")
        True
    """
    shift = _ONE
    for bit, power in enumerate(_X_TO_2_TO[3:]):  # A byte has 2^3 bits.
        if second_bytes >> bit & 1:
            shift = _times(shift, power)
    return _times(shift, first) ^ second
