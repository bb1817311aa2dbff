"""CRC-32 of a section that is written in stretches, in any order.

Source: Mark Adler's crc32_combine, zlib 1.2.12, crc32.c: appending n zero bytes multiplies a checksum, as a polynomial over
GF(2), by x^(8n) modulo the CRC's polynomial.
"""

from __future__ import annotations

from functools import lru_cache

_POLYNOMIAL = 0xEDB88320  # reflected: bit 31 is x^0
_ONE = 1 << 31
_X8 = _ONE >> 8


def combine(first: int, second: int, num_bytes: int) -> int:
    """The CRC-32 of two stretches one behind the other, from each one's own; `num_bytes` is the length of the second.

    >>> import zlib
    >>> combine(zlib.crc32(b"far"), zlib.crc32(b"cast"), 4) == zlib.crc32(b"farcast")
    True
    """
    return _times(_zeros(num_bytes), first) ^ second


@lru_cache(maxsize=256)
def _zeros(num_bytes: int) -> int:
    """x^(8 num_bytes) by squaring."""
    product, square = _ONE, _X8
    while num_bytes:
        if num_bytes & 1:
            product = _times(product, square)
        square = _times(square, square)
        num_bytes >>= 1
    return product


def _times(a: int, b: int) -> int:
    """The product of two polynomials modulo the CRC's."""
    product = 0
    bit = _ONE
    while bit:
        if a & bit:
            product ^= b
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1
        bit >>= 1
    return product
