"""Checksums are those of zlib, whichever library computes them."""

from __future__ import annotations

import subprocess
import sys
import zlib

from hypothesis import given
from hypothesis import strategies as st

from hookx.store import crc

BYTES = st.binary(max_size=2_000)


@given(BYTES, BYTES)
def test_two_checksums_combine_to_that_of_both_strings(first: bytes, second: bytes) -> None:
    expected = zlib.crc32(first + second)
    assert crc.combine(zlib.crc32(first), zlib.crc32(second), len(second)) == expected
    assert crc.crc32_combine(crc.crc32(first), crc.crc32(second), len(second)) == expected


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**50))
def test_a_second_string_of_any_length_combines_as_zlib_ng_combines_it(first: int, second: int, length: int) -> None:
    assert crc.combine(first, second, length) == crc.crc32_combine(first, second, length)


def test_a_server_without_zlib_ng_computes_the_same_checksums() -> None:
    program = """
import sys, zlib
sys.modules["zlib_ng"] = None  # As an import finds a package that is not installed.
sys.modules["zlib_ng.zlib_ng"] = None
from hookx.store import crc
assert crc.crc32 is zlib.crc32
print(crc.crc32_combine(crc.crc32(b"activa"), crc.crc32(b"tions"), 5) == zlib.crc32(b"activations"))
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert finished.stdout == "True\n", finished.stderr
