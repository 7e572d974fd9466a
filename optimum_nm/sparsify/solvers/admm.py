"""ADMM with a gradually pruned mask."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...config import LayerConfig
from ...packing.row_blocks import row_blocks
from ..mask import best_masks, best_support
from .conjugate_gradients import conjugate_gradients
from .solution import Solution, normalized

DAMPING = 0.1
PENALTY = 1.0
ROUNDS = 15
# Float32 elements of the rows solved together: matrices of 32 MB and more are memory from the system each time, page by
# page, and with few rows a product spends its time on fetching the inverse.
ELEMENTS_AT_ONCE = 7 << 20


def admm(weight: Tensor, gram: Tensor, layer: LayerConfig) -> Solution:
    """Prune by alternating a least-squares step and a projection (Boža, 2401.02938), for any N:M and with outliers.

    In each round the mask is chosen anew from the iterate, its size falling cubically to N of M; conjugate gradients
    finish the values.
    """
    matrix, scale = normalized(gram, DAMPING)
    eye = torch.eye(len(gram), dtype=matrix.dtype, device=gram.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix + PENALTY * eye)).float()
    matrix = matrix.float()
    parts = [
        _solve_rows(weight[rows] * scale, matrix, inverse, layer)
        for rows in row_blocks(*weight.shape, ELEMENTS_AT_ONCE)
    ]
    values, masks, outlier_masks = zip(*parts, strict=True)
    outlier_mask = None if layer.outliers is None else torch.cat(outlier_masks)
    return Solution(torch.cat(values) / scale, torch.cat(masks), outlier_mask)


def _solve_rows(
    target: Tensor, matrix: Tensor, inverse: Tensor, layer: LayerConfig
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Values, base and outliers of some rows of the weight, which are independent of the others."""
    constant = target @ matrix
    current, dual = target, torch.zeros_like(target)
    for round_ in range(1, ROUNDS):
        current = current + dual
        kept = best_support(current.abs(), _less_pruned(layer, round_)).to(current.device)
        pruned = current * kept
        dual = current - pruned
        current = torch.sub(pruned, dual).mul_(PENALTY).add_(constant) @ inverse
    current += dual
    mask, outlier_mask = best_masks(current.abs(), layer)
    kept = (mask if outlier_mask is None else mask | outlier_mask).to(current.device)
    return conjugate_gradients(target, current * kept, kept, matrix), mask, outlier_mask


def _less_pruned(layer: LayerConfig, round_: int) -> LayerConfig:
    """The layer with more than N of M."""
    n, m = layer.pattern.n, layer.pattern.m
    return replace(layer, pattern=replace(layer.pattern, n=n + round((m - n) * (1 - round_ / ROUNDS) ** 3)))
