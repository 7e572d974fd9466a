"""The Cholesky factor of an inverse, out of products of matrices, which is what processors are fastest at."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...packing.row_blocks import row_blocks
from .solution import damped

_LEAF = 256  # rows of a matrix that LAPACK factors
_STRIP = 512  # rows of a triangle taken together: fewer would save products of zeros, but small ones are slow


class _NotPositiveDefinite(torch.linalg.LinAlgError):
    """For rounding."""


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """The upper triangular U with UᵀU = (G + damping · mean(diag G) · I)⁻¹, float32 `[in_features, in_features]`.

    Rounding in float32 disturbs the matrix about as much as summing it did; float64 is for one that float32 finds no
    factor of.
    """
    try:
        return _factor(damped(gram, damping, torch.float32))
    except _NotPositiveDefinite:
        return _factor(damped(gram, damping, torch.float64)).float()


def _factor(matrix: Tensor) -> Tensor:
    """U in the place of the matrix, of which what is right of the diagonal is read.

    By halves: A = VVᵀ with V = U⁻¹ upper triangular, so that the last half of A alone makes the last half of V. Where A
    is [[A₁, B], [Bᵀ, A₂]] and U₂ the factor for A₂, V's upper right is C = BU₂ᵀ, U₁ is the factor for A₁ − CCᵀ, and the
    upper right of U is −U₁CU₂.
    """
    if len(matrix) <= _LEAF:
        return matrix.copy_(_factor_at_once(matrix))
    half = len(matrix) // 2
    first, right, last = matrix[:half, :half], matrix[:half, half:], matrix[half:, half:]
    _factor(last)
    above = torch.empty_like(right)
    for strip in _strips(len(last)):
        torch.mm(right[:, strip.start :], last[strip, strip.start :].t(), out=above[:, strip])
    for strip in _strips(half):
        first[strip, strip.start :].addmm_(above[strip], above[strip.start :].t(), alpha=-1)
    _factor(first)
    for strip in _strips(len(last)):
        torch.mm(above[:, : strip.stop], last[: strip.stop, strip], out=right[:, strip])
    for strip in _strips(half):
        torch.mm(first[strip, strip.start :], right[strip.start :], out=above[strip])
    torch.neg(above, out=right)
    matrix[half:, :half] = 0.0
    return matrix


def _factor_at_once(matrix: Tensor) -> Tensor:
    """With rows and columns in the reverse order, U is the inverse of the lower Cholesky factor."""
    lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if failed:
        raise _NotPositiveDefinite
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1)


def _strips(rows: int) -> Iterator[slice]:
    return row_blocks(rows, 1, _STRIP)
