"""ADMM with a gradually pruned mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ...config import LayerConfig
from ...memory import release_freed_memory
from ...packing.row_blocks import row_blocks
from ..mask import best_masks, best_support
from ..products import LEAST_WIDTH, product_with
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
    release_freed_memory()
    matrix, scale = normalized(gram, DAMPING, torch.float32)
    by_matrix, by_inverse = product_with(matrix), product_with(_inverse(matrix))
    parts = []
    for rows in row_blocks(len(weight), len(gram), ELEMENTS_AT_ONCE):
        release_freed_memory()
        target = weight[rows] * scale
        current, mask, outlier_mask = _choose_rows(target, target @ matrix, by_inverse, layer)
        kept = (mask if outlier_mask is None else mask | outlier_mask).to(weight.device)
        parts.append((conjugate_gradients(target, current * kept, kept, matrix, by_matrix), mask, outlier_mask))
    values, masks, outlier_masks = zip(*parts, strict=True)
    outlier_mask = None if layer.outliers is None else torch.cat(outlier_masks)
    return Solution(torch.cat(values) / scale, torch.cat(masks), outlier_mask)


def _inverse(matrix: Tensor) -> Tensor:
    """That of matrix + PENALTY · I, which is far from singular: float32 will do where float64 takes time and memory."""
    inverse = matrix.to(torch.float64 if len(matrix) < LEAST_WIDTH else torch.float32, copy=True)
    inverse.diagonal().add_(PENALTY)
    torch.linalg.cholesky(inverse, out=inverse)
    return torch.cholesky_inverse(inverse, out=inverse).float()


def _choose_rows(
    target: Tensor, constant: Tensor, by_inverse: Callable[[Tensor], Tensor], layer: LayerConfig
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The last iterate, base and outliers of some rows of the weight, which are independent of the others."""
    current, dual = target, torch.zeros_like(target)
    for round_ in range(1, ROUNDS):
        current = current + dual
        kept = best_support(current.abs(), _less_pruned(layer, round_)).to(current.device)
        pruned = current * kept
        dual = current - pruned
        current = by_inverse(torch.sub(pruned, dual).mul_(PENALTY).add_(constant))
    current = current + dual
    return current, *best_masks(current.abs(), layer)


def _less_pruned(layer: LayerConfig, round_: int) -> LayerConfig:
    """The layer with more than N of M."""
    n, m = layer.pattern.n, layer.pattern.m
    return replace(layer, pattern=replace(layer.pattern, n=n + round((m - n) * (1 - round_ / ROUNDS) ** 3)))
