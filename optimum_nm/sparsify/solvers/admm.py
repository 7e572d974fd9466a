"""ADMM with a gradually pruned mask."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...config import LayerConfig
from ..mask import best_masks, best_support
from .conjugate_gradients import conjugate_gradients
from .solution import Solution, normalized

DAMPING = 0.1
PENALTY = 1.0
ROUNDS = 20
GRADUAL_ROUNDS = 15


def admm(weight: Tensor, gram: Tensor, layer: LayerConfig) -> Solution:
    """Prune by alternating a least-squares step and a projection (Boža, 2401.02938), for any N:M and with outliers.

    For the first rounds the mask is chosen anew from the iterate, its size falling cubically to N of M; conjugate
    gradients finish the values.
    """
    matrix, scale = normalized(gram, DAMPING)
    eye = torch.eye(len(gram), dtype=matrix.dtype, device=gram.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix + PENALTY * eye)).float()
    matrix = matrix.float()
    target = weight * scale
    constant = target @ matrix
    current, dual = target, torch.zeros_like(target)
    for round_ in range(ROUNDS):
        scores = (current + dual).abs()
        if round_ < GRADUAL_ROUNDS - 1:
            left = (1 - (round_ + 1) / GRADUAL_ROUNDS) ** 3
            n = layer.pattern.n + round((layer.pattern.m - layer.pattern.n) * left)
            kept = best_support(scores, replace(layer, pattern=replace(layer.pattern, n=n))).to(weight.device)
        elif round_ == GRADUAL_ROUNDS - 1:
            mask, outlier_mask = best_masks(scores, layer)
            kept = (mask if outlier_mask is None else mask | outlier_mask).to(weight.device)
        pruned = (current + dual) * kept
        dual = dual + current - pruned
        current = (constant + PENALTY * (pruned - dual)) @ inverse
    current = conjugate_gradients(target, current * kept, kept, matrix)
    return Solution(current / scale, mask, outlier_mask)
