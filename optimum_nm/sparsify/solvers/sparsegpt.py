"""SparseGPT: one sweep over the columns, each pruning error made up for by the columns to come."""

from __future__ import annotations

import torch
from torch import Tensor

from ...config import LayerConfig
from ..mask import best_masks, choose_masks
from .solution import Solution, damped

BLOCK = 128  # columns between updates of everything to the right; a multiple of every M
DAMPING = 0.01


def sparsegpt(weight: Tensor, gram: Tensor, layer: LayerConfig) -> Solution:
    """Prune by the optimal-brain-surgeon sweep of Frantar & Alistarh (2301.00774), for any N:M and with outliers.

    With U the upper Cholesky factor of (G + damping)⁻¹, the mask of every M columns is chosen when the sweep reaches
    them, by w²/U_jj² on the updated weights. Outliers are chosen beforehand by the same score on the original weights;
    they count against no group and take up errors like other survivors.

    Args:
        weight: float32 `[out_features, in_features]`.
        gram: G of the layer's inputs, `[in_features, in_features]`.
        layer: pattern and outliers.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(gram, DAMPING)))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    pivots = upper.diagonal()
    current = weight.clone()
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    _, outlier_mask = best_masks((weight / pivots).square(), layer)
    width, m = weight.shape[1], layer.pattern.m
    for start in range(0, width, BLOCK):
        end = min(start + BLOCK, width)
        errors = torch.zeros(len(weight), end - start, device=weight.device)
        for j in range(start, end):
            if j % m == 0:
                group = slice(j, min(j + m, width))
                scores = (current[:, group] / pivots[group]).square()
                taken = None if outlier_mask is None else outlier_mask[:, group]
                mask[:, group] = choose_masks(scores, layer, taken)[0]
                kept = mask[:, group] if taken is None else mask[:, group] | taken
                kept = kept.to(weight.device)
            pruned = current[:, j].masked_fill(~kept[:, j % m], 0.0)
            error = (current[:, j] - pruned) / pivots[j]
            current[:, j:end] -= error[:, None] * upper[j, j:end]
            errors[:, j - start] = error
        current[:, end:] -= errors @ upper[start:end, end:]
    solution = Solution(current, mask, outlier_mask)
    return Solution(current.masked_fill(~solution.kept, 0.0), mask, outlier_mask)
