"""SparseGPT: one sweep over the columns, each pruning error made up for by the columns to come."""

from __future__ import annotations

import torch
from torch import Tensor

from ...config import LayerConfig
from ..mask import best_masks, choose_masks
from .inverse_factor import inverse_factor
from .solution import Solution

BLOCK = 128  # columns between updates of everything behind them; a multiple of every M
DAMPING = 0.01


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
    upper = inverse_factor(gram, DAMPING)
    pivots = upper.diagonal()
    outlier_mask = None if layer.outliers is None else best_masks((weight / pivots).square(), layer)[1]
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    current = weight.clone()
    width, m = weight.shape[1], layer.pattern.m
    for start in range(0, width, BLOCK):
        end = min(start + BLOCK, width)
        # Columns of the weight are rows here. What is contiguous already torch transposes three times as fast.
        block = current[:, start:end].contiguous().t().contiguous()
        errors = torch.empty_like(block)
        for begin in range(start, end, m):
            columns = slice(begin, min(begin + m, end))
            group = slice(begin - start, columns.stop - start)
            scores = (block[group] / pivots[columns, None]).square_().t().contiguous()
            taken = None if outlier_mask is None else outlier_mask[:, columns]
            chosen = choose_masks(scores, layer, taken)[0]
            mask[:, columns] = chosen
            kept = (chosen if taken is None else chosen | taken).t().contiguous().to(weight.device)
            _prune_columns(block[group], kept, upper[columns, columns], errors[group])
            block[group.stop :].addmm_(upper[columns, columns.stop : end].t(), errors[group], alpha=-1)
        current[:, start:end] = block.t()
        current[:, end:].addmm_(errors.t(), upper[start:end, end:], alpha=-1)
    return Solution(current, mask, outlier_mask)


def _prune_columns(columns: Tensor, kept: Tensor, upper: Tensor, errors: Tensor) -> None:
    """Let each of a group's columns `[m, out_features]` pass on what it loses to those behind it, in place.

    Args:
        kept: bool `[m, out_features]`.
        upper: of the group, `[m, m]`.
        errors: `[m, out_features]`, where each column's error over its pivot is put.
    """
    shares = kept.logical_not() / upper.diagonal()[:, None]
    for j in range(len(columns)):
        torch.mul(columns[j], shares[j], out=errors[j])
        columns[j + 1 :].addr_(upper[j, j + 1 :], errors[j], alpha=-1)
    columns.mul_(kept).add_(0.0)  # which makes 0 of −0
