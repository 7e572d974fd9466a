"""Positions of kept columns as bit fields: masks, their enumerative rank, and packing fields into bytes.

A mask row is a bool array `[..., m]`. Its rank is its place among all masks with as many bits, in ascending order of
the mask read as an integer with column 0 as the lowest bit; with kept columns c₀ < c₁ < … that is Σᵢ C(cᵢ, i+1)
(combinatorial number system, Knuth TAOCP 4A, 7.2.1.3).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import comb, gcd
from typing import Any

import numpy as np
import numpy.typing as npt

from ..patterns import NMPattern

_UINT8 = npt.NDArray[np.uint8]
_INT32 = npt.NDArray[np.int32]
_BOOL = npt.NDArray[np.bool_]
_LARGEST_LISTED = 16  # group width up to which masks are looked up; 16:32 has 601 million, which are computed


@lru_cache
def _binomials(m: int) -> _INT32:
    """C(c, i) for c in 0…m (rows) and i in 0…m (columns)."""
    return np.array([[comb(c, i) for i in range(m + 1)] for c in range(m + 1)], dtype=np.int32)


@lru_cache
def _listed_masks(pattern: NMPattern) -> _BOOL:
    """All masks in the order of their ranks."""
    return _compute_masks(np.arange(comb(pattern.m, pattern.n), dtype=np.int32), pattern)


@lru_cache
def _listed_ranks(pattern: NMPattern) -> _INT32:
    """Rank of each mask, by the mask as an integer; 0 for integers with another number of bits."""
    masks = _as_integers(_listed_masks(pattern))
    ranks = np.zeros(1 << pattern.m, dtype=np.int32)
    ranks[masks] = np.arange(len(masks))
    return ranks


def _as_integers(mask: _BOOL) -> npt.NDArray[Any]:
    """Masks `[..., m]`, m at most 16, as integers `[...]` with column 0 as the lowest bit."""
    packed = np.packbits(mask, axis=-1, bitorder="little")
    return packed.view(f"<u{packed.shape[-1]}")[..., 0]


def rank_masks(mask: _BOOL, pattern: NMPattern) -> _INT32:
    """Ranks `[...]` of masks `[..., m]` that have exactly n bits set."""
    if pattern.m <= _LARGEST_LISTED:
        return _listed_ranks(pattern)[_as_integers(mask)]
    ranks = np.zeros(mask.shape[:-1], dtype=np.int32)
    kept_up_to = np.zeros(mask.shape[:-1], dtype=np.uint8)
    for column, binomials in enumerate(_binomials(pattern.m)[: pattern.m]):
        kept = mask[..., column]
        kept_up_to += kept
        ranks += np.where(kept, binomials[kept_up_to], 0)
    return ranks


def unrank_masks(ranks: npt.NDArray[np.integer[Any]], pattern: NMPattern) -> _BOOL:
    """Masks `[..., m]` of ranks `[...]`, each below C(m, n)."""
    if pattern.m <= _LARGEST_LISTED:
        return _listed_masks(pattern)[ranks]
    return _compute_masks(ranks, pattern)


def _compute_masks(ranks: npt.NDArray[np.integer[Any]], pattern: NMPattern) -> _BOOL:
    mask = np.zeros((*ranks.shape, pattern.m), dtype=np.bool_)
    rest = ranks.astype(np.int32)
    binomials = _binomials(pattern.m)
    for i in range(pattern.n, 0, -1):
        column = np.searchsorted(binomials[:, i], rest, side="right") - 1
        np.put_along_axis(mask, column[..., None], True, axis=-1)
        rest -= binomials[column, i]
    return mask


def pack_fields(fields: npt.NDArray[np.integer[Any]], bits: int) -> _UINT8:
    """Concatenate `bits`-wide fields `[rows, count]`, lowest bit first, into bytes `[rows, ⌈count·bits/8⌉]`."""
    rows, count = fields.shape
    period, width = _period(bits)
    periods = -(-count // period)
    parts = np.pad(fields, ((0, 0), (0, periods * period - count))).reshape(rows, periods, period)
    packed = np.zeros((rows, periods, width), dtype=np.uint8)
    for field, byte, shift in _overlaps(bits):
        part = parts[..., field]
        packed[..., byte] |= (part << shift if shift >= 0 else part >> -shift).astype(np.uint8)
    return packed.reshape(rows, -1)[:, : -(-count * bits // 8)]


def unpack_fields(packed: _UINT8, bits: int, count: int) -> _INT32:
    """The inverse of `pack_fields`; `bits` is at most 30."""
    rows = len(packed)
    period, width = _period(bits)
    periods = -(-count // period)
    parts = np.pad(packed, ((0, 0), (0, periods * width - packed.shape[1]))).reshape(rows, periods, width)
    fields = np.zeros((rows, periods, period), dtype=np.int32)
    for field, byte, shift in _overlaps(bits):
        part = parts[..., byte].astype(np.int32)
        fields[..., field] |= part >> shift if shift >= 0 else part << -shift
    fields &= (1 << bits) - 1
    return fields.reshape(rows, -1)[:, :count]


def _period(bits: int) -> tuple[int, int]:
    """After how many fields, and bytes, fields begin at the first bit of a byte again."""
    period = 8 // gcd(bits, 8)
    return period, period * bits // 8


def _overlaps(bits: int) -> Iterator[tuple[int, int, int]]:
    """Field, byte and, if it is not negative, the bit of the byte at which the field begins; else the negative of the
    bit of the field at which the byte begins: for all that have bits in common within a period."""
    for field in range(_period(bits)[0]):
        first, end = field * bits, (field + 1) * bits
        for byte in range(first // 8, -(-end // 8)):
            yield field, byte, first - 8 * byte


def encode_positions(mask: _BOOL, pattern: NMPattern, positions: str) -> _UINT8:
    """Bytes `[rows, …]` of group masks `[rows, groups, m]` with exactly n bits set each."""
    if positions == "bitmap":
        return np.packbits(mask.reshape(len(mask), -1), axis=-1, bitorder="little")
    return pack_fields(rank_masks(mask, pattern), pattern.code_bits)


def decode_positions(packed: _UINT8, pattern: NMPattern, positions: str, groups: int, first_row: int = 0) -> _BOOL:
    """The inverse of `encode_positions`.

    Args:
        first_row: the number of the first row, for errors.

    Raises:
        ValueError: a group has not n bits set, a code is not below C(m, n), or a bit behind the last field is set.
    """
    bits = pattern.m if positions == "bitmap" else pattern.code_bits
    spare = np.unpackbits(packed[:, groups * bits // 8 :], axis=-1, bitorder="little")[:, groups * bits % 8 :]
    if spare.any():
        raise ValueError("has bits set behind the last group of a row")
    if positions == "bitmap":
        bitmap = np.unpackbits(packed, axis=-1, count=groups * pattern.m, bitorder="little")
        mask = bitmap.reshape(len(packed), groups, pattern.m).view(np.bool_)
        wrong = np.argwhere(mask.sum(axis=-1) != pattern.n)
        if len(wrong):
            row, group = wrong[0]
            raise ValueError(
                f"marks {mask[row, group].sum()} columns in row {first_row + row}, group {group}; "
                f"{pattern} marks {pattern.n}"
            )
        return mask
    ranks = unpack_fields(packed, pattern.code_bits, groups)
    count = comb(pattern.m, pattern.n)
    if len(wrong := np.argwhere(ranks >= count)):
        row, group = wrong[0]
        raise ValueError(
            f"has code {ranks[row, group]} in row {first_row + row}, group {group}; {pattern} codes are below {count}"
        )
    return unrank_masks(ranks, pattern)
