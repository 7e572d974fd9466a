"""Which weights stay: structured outliers first, then N of every M of the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import LayerConfig
from ..packing.selection import select_kept, select_outliers


def choose_masks(
    scores: Tensor, layer: LayerConfig, outlier_mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Choose by score, ties to the lower column.

    Args:
        scores: `[out_features, in_features]`, at least 0.
        outlier_mask: the outliers, if they are chosen already.

    Returns:
        Bool `[out_features, in_features]` on the CPU: the base, at most N in a group, and the outliers, k in a block
        (None without). No weight is in both: outliers do not count against N (2507.03052 §3).
    """
    scores = scores.to("cpu", torch.float32)
    if layer.outliers is not None and outlier_mask is None:
        columns, used = select_outliers(scores, layer.outliers)
        outlier_mask = torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, columns, used)
    if outlier_mask is not None:
        scores = scores.masked_fill(outlier_mask, -1.0)
    if layer.pattern.is_dense:
        return scores >= 0, outlier_mask
    kept, _ = select_kept(scores, layer.pattern)
    return kept.view(len(scores), -1)[:, : scores.shape[1]] & (scores >= 0), outlier_mask
