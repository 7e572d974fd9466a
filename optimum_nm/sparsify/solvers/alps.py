"""ALPS: the splitting of ADMM with a penalty that grows as the support settles."""

from __future__ import annotations

import torch
from torch import Tensor

from ...config import LayerConfig
from ..mask import best_masks, best_support
from .conjugate_gradients import conjugate_gradients
from .solution import Solution, normalized

DAMPING = 0.1
FIRST_PENALTY = 0.1
# Growth of the penalty by the share of the survivors that changed since it last grew, and when it may grow.
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
ROUNDS_PER_PENALTY = 3
ROUNDS = 300


def alps(weight: Tensor, gram: Tensor, layer: LayerConfig) -> Solution:
    """Prune by operator splitting (Meng et al., 2406.07831, Algorithm 1), for any N:M and with outliers.

    Rounds of a least-squares step, whose system one eigendecomposition solves for every penalty, and of a projection
    onto what the pattern holds; the slower the penalty grows, the freer the support is to change. It ends when the
    support has stopped changing; conjugate gradients finish the values.
    """
    matrix, scale = normalized(gram, DAMPING)
    eigenvalues, vectors = (part.float() for part in torch.linalg.eigh(matrix))
    matrix = matrix.float()
    target = weight * scale
    constant = target @ matrix
    pruned, dual = target, torch.zeros_like(target)
    settled, penalty = torch.zeros(weight.shape, dtype=torch.bool), FIRST_PENALTY
    for round_ in range(ROUNDS):
        if round_ % ROUNDS_PER_PENALTY == 0:
            inverse = (vectors / (eigenvalues + penalty)) @ vectors.t()
        current = (constant - dual + penalty * pruned) @ inverse
        proposed = current + dual / penalty
        kept = best_support(proposed.abs(), layer)
        pruned = proposed.masked_fill(~kept.to(weight.device), 0.0)
        dual = dual + penalty * (current - pruned)
        if round_ % ROUNDS_PER_PENALTY == ROUNDS_PER_PENALTY - 1:
            changed = ((kept ^ settled).sum() / kept.sum()).item()
            if not changed:
                break
            penalty *= next(growth for least, growth in GROWTH if changed > least)
            settled = kept
    mask, outlier_mask = best_masks(proposed.abs(), layer)
    kept = (mask if outlier_mask is None else mask | outlier_mask).to(weight.device)
    current = conjugate_gradients(target, pruned * kept, kept, matrix)
    return Solution(current / scale, mask, outlier_mask)
