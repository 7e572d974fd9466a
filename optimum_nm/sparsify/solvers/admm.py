"""ADMM with a gradually pruned mask."""

from __future__ import annotations

import torch
from torch import Tensor

from ...config import LayerConfig
from ...packing.selection import select_outliers
from ...patterns import NMPattern
from ..mask import choose_masks
from .conjugate_gradients import conjugate_gradients
from .solution import Solution, damped

DAMPING = 0.1
PENALTY = 1.0
ROUNDS = 20
GRADUAL_ROUNDS = 15


def admm(weight: Tensor, gram: Tensor, layer: LayerConfig) -> Solution:
    """Prune by alternating a least-squares step and a projection (Boža, 2401.02938), for any N:M and with outliers.

    For the first rounds the mask is chosen anew from the iterate, its size falling cubically to N of M; conjugate
    gradients finish the values.
    """
    scale = gram.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    matrix = damped(gram / scale.outer(scale), DAMPING)
    eye = torch.eye(len(gram), dtype=matrix.dtype, device=gram.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix + PENALTY * eye)).float()
    matrix = matrix.float()
    target = weight * scale
    constant = target @ matrix
    outlier_mask = None
    if layer.outliers is not None:
        columns, used = select_outliers(target.abs().cpu(), layer.outliers)
        outlier_mask = torch.zeros(weight.shape, dtype=torch.bool).scatter_(1, columns, used)
    current, dual = target, torch.zeros_like(target)
    for round_ in range(ROUNDS):
        if round_ < GRADUAL_ROUNDS:
            left = (1 - (round_ + 1) / GRADUAL_ROUNDS) ** 3
            n = layer.pattern.n + round((layer.pattern.m - layer.pattern.n) * left)
            step = LayerConfig(**(vars(layer) | {"pattern": NMPattern(n, layer.pattern.m)}))
            mask, _ = choose_masks((current + dual).abs(), step, outlier_mask)
            kept = (mask if outlier_mask is None else mask | outlier_mask).to(weight.device)
        pruned = (current + dual) * kept
        dual = dual + current - pruned
        current = (constant + PENALTY * (pruned - dual)) @ inverse
    current = conjugate_gradients(target, current * kept, kept, matrix)
    return Solution(current / scale, mask, outlier_mask)
