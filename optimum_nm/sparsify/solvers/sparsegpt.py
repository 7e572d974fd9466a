"""SparseGPT: one sweep over the columns, each pruning error made up for by the columns to come."""

from __future__ import annotations

import torch
from torch import Tensor

from ...config import LayerConfig
from ..mask import best_masks, choose_masks
from .solution import Solution, damped

BLOCK = 128  # columns between updates of everything behind them; a multiple of every M
DAMPING = 0.01
_LEAF = 256  # rows of a triangle that is inverted by substitution


def sparsegpt(weight: Tensor, gram: Tensor, layer: LayerConfig) -> Solution:
    """Prune by the optimal-brain-surgeon sweep of Frantar & Alistarh (2301.00774), for any N:M and with outliers.

    With U the upper Cholesky factor of (G + damping)⁻¹, the mask of every M columns is chosen when the sweep reaches
    them, by w²/U_jj² on the updated weights. Outliers are chosen beforehand by the same score on the original weights;
    they count against no group and take up errors like other survivors.

    An error reaches the rest of its group at once, the rest of its block when the group is done, and what is behind the
    block when that is done, so that nearly all of the work is products of matrices.

    Args:
        weight: float32 `[out_features, in_features]`.
        gram: G of the layer's inputs, `[in_features, in_features]`.
        layer: pattern and outliers.
    """
    upper = inverse_factor(damped(gram, DAMPING, torch.float32))
    pivots = upper.diagonal()
    outlier_mask = None if layer.outliers is None else best_masks((weight / pivots).square(), layer)[1]
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    current = weight.t().contiguous()  # columns of the weight are rows here
    width, m = weight.shape[1], layer.pattern.m
    for start in range(0, width, BLOCK):
        end = min(start + BLOCK, width)
        errors = torch.empty_like(current[start:end])
        for begin in range(start, end, m):
            group = slice(begin, min(begin + m, end))
            scores = (current[group] / pivots[group, None]).square().t().contiguous()
            taken = None if outlier_mask is None else outlier_mask[:, group]
            mask[:, group] = choose_masks(scores, layer, taken)[0]
            kept = mask[:, group] if taken is None else mask[:, group] | taken
            group_errors = errors[begin - start : group.stop - start]
            _prune_columns(current[group], kept.t().to(weight.device), upper[group, group], group_errors)
            current[group.stop : end].addmm_(upper[group, group.stop : end].t(), group_errors, alpha=-1)
        current[end:].addmm_(upper[start:end, end:].t(), errors, alpha=-1)
    solution = Solution(current.t().contiguous(), mask, outlier_mask)
    return Solution(solution.weight.masked_fill_(~solution.kept, 0.0), mask, outlier_mask)


def _prune_columns(columns: Tensor, kept: Tensor, upper: Tensor, errors: Tensor) -> None:
    """Let each of a group's columns `[m, out_features]` pass on what it loses to those behind it, in place.

    Args:
        kept: bool `[m, out_features]`.
        upper: of the group, `[m, m]`.
        errors: `[m, out_features]`, where each column's error over its pivot is put.
    """
    for j, pivot in enumerate(upper.diagonal().tolist()):
        errors[j] = columns[j].masked_fill(kept[j], 0.0) / pivot
        columns[j + 1 :].addr_(upper[j, j + 1 :], errors[j], alpha=-1)


def inverse_factor(matrix: Tensor) -> Tensor:
    """The upper triangular U with UᵀU = matrix⁻¹, float32.

    With the order of rows and columns reversed, it is the inverse of the lower Cholesky factor. Rounding in float32
    disturbs the matrix about as much as summing it did; float64 is for one that float32 finds no factor of.
    """
    reversed_ = matrix.flip(0, 1)
    lower, failed = torch.linalg.cholesky_ex(reversed_)
    if failed:
        lower = torch.linalg.cholesky(reversed_.double())
    del reversed_
    return _inverse_of_lower(lower).flip(0, 1).float()


def _inverse_of_lower(lower: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix, by halves: [[A, 0], [B, C]]⁻¹ = [[A⁻¹, 0], [−C⁻¹BA⁻¹, C⁻¹]]."""
    size = len(lower)
    if size <= _LEAF:
        eye = torch.eye(size, dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, eye, upper=False)
    half = size // 2
    inverse = torch.zeros_like(lower)
    inverse[:half, :half] = _inverse_of_lower(lower[:half, :half])
    inverse[half:, half:] = _inverse_of_lower(lower[half:, half:])
    below = torch.linalg.solve_triangular(lower[half:, half:], -lower[half:, :half], upper=False)
    inverse[half:, :half] = torch.linalg.solve_triangular(lower[:half, :half], below, upper=False, left=False)
    return inverse
