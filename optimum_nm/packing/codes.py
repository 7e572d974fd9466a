"""Positions of kept columns as bit fields: masks, their enumerative rank, and packing fields into bytes.

A mask row is a bool array `[..., m]`. Its rank is its place among all masks with as many bits, in ascending order of
the mask read as an integer with column 0 as the lowest bit; with kept columns c₀ < c₁ < … that is Σᵢ C(cᵢ, i+1)
(combinatorial number system, Knuth TAOCP 4A, 7.2.1.3).
"""

from __future__ import annotations

from functools import lru_cache
from math import comb

import numpy as np
import numpy.typing as npt

from ..patterns import NMPattern

_UINT8 = npt.NDArray[np.uint8]
_INT64 = npt.NDArray[np.int64]
_BOOL = npt.NDArray[np.bool_]


@lru_cache
def _binomials(m: int) -> _INT64:
    """C(c, i) for c in 0…m (rows) and i in 0…m (columns)."""
    return np.array([[comb(c, i) for i in range(m + 1)] for c in range(m + 1)], dtype=np.int64)


def rank_masks(mask: _BOOL, pattern: NMPattern) -> _INT64:
    """Ranks `[...]` of masks `[..., m]` that have exactly n bits set."""
    ranks = np.zeros(mask.shape[:-1], dtype=np.int64)
    kept_up_to = np.zeros(mask.shape[:-1], dtype=np.uint8)
    for column, binomials in enumerate(_binomials(pattern.m)[: pattern.m]):
        kept = mask[..., column]
        kept_up_to += kept
        ranks += np.where(kept, binomials[kept_up_to], 0)
    return ranks


def unrank_masks(ranks: _INT64, pattern: NMPattern) -> _BOOL:
    """Masks `[..., m]` of ranks `[...]`, each below C(m, n)."""
    mask = np.zeros((*ranks.shape, pattern.m), dtype=np.bool_)
    rest = ranks.astype(np.int64, copy=True)
    binomials = _binomials(pattern.m)
    for i in range(pattern.n, 0, -1):
        column = np.searchsorted(binomials[:, i], rest, side="right") - 1
        np.put_along_axis(mask, column[..., None], True, axis=-1)
        rest -= binomials[column, i]
    return mask


def pack_fields(fields: _INT64, bits: int) -> _UINT8:
    """Concatenate `bits`-wide fields `[rows, count]`, lowest bit first, into bytes `[rows, ⌈count·bits/8⌉]`."""
    as_bits = np.empty((*fields.shape, bits), dtype=np.uint8)
    for bit in range(bits):
        as_bits[..., bit] = (fields >> bit) & 1
    return np.packbits(as_bits.reshape(len(fields), -1), axis=-1, bitorder="little")


def unpack_fields(packed: _UINT8, bits: int, count: int) -> _INT64:
    """The inverse of `pack_fields`."""
    as_bits = np.unpackbits(packed, axis=-1, count=count * bits, bitorder="little")
    return as_bits.reshape(len(packed), count, bits) @ (1 << np.arange(bits, dtype=np.int64))


def encode_positions(mask: _BOOL, pattern: NMPattern, positions: str) -> _UINT8:
    """Bytes `[rows, …]` of group masks `[rows, groups, m]` with exactly n bits set each."""
    if positions == "bitmap":
        return np.packbits(mask.reshape(len(mask), -1), axis=-1, bitorder="little")
    return pack_fields(rank_masks(mask, pattern), pattern.code_bits)


def decode_positions(packed: _UINT8, pattern: NMPattern, positions: str, groups: int) -> _BOOL:
    """The inverse of `encode_positions`.

    Raises:
        ValueError: a group has not n bits set, a code is not below C(m, n), or a bit behind the last field is set.
    """
    bits = pattern.m if positions == "bitmap" else pattern.code_bits
    spare = np.unpackbits(packed, axis=-1, bitorder="little")[:, groups * bits :]
    if spare.any():
        raise ValueError("has bits set behind the last group of a row")
    if positions == "bitmap":
        bitmap = np.unpackbits(packed, axis=-1, count=groups * pattern.m, bitorder="little")
        mask = bitmap.reshape(len(packed), groups, pattern.m).astype(np.bool_)
        wrong = np.argwhere(mask.sum(axis=-1) != pattern.n)
        if len(wrong):
            row, group = wrong[0]
            raise ValueError(
                f"marks {mask[row, group].sum()} columns in row {row}, group {group}; {pattern} marks {pattern.n}"
            )
        return mask
    ranks = unpack_fields(packed, pattern.code_bits, groups)
    count = comb(pattern.m, pattern.n)
    wrong = np.argwhere(ranks >= count)
    if len(wrong):
        row, group = wrong[0]
        raise ValueError(f"has code {ranks[row, group]} in row {row}, group {group}; {pattern} codes are below {count}")
    return unrank_masks(ranks, pattern)
