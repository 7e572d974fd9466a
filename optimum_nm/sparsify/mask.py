"""Which weights stay: structured outliers first, then N of every M of the rest."""

from __future__ import annotations

from dataclasses import replace
from functools import singledispatch

import torch
from torch import Tensor

from ..config import LayerConfig
from ..packing.row_blocks import for_row_blocks
from ..packing.selection import select_kept, select_outliers
from ..patterns import NMPattern, OutlierPattern


@singledispatch
def base_mask(pattern: NMPattern, scores: Tensor) -> Tensor:
    """The weights of highest score that a pattern keeps; another kind of pattern registers its own rule.

    Args:
        scores: `[rows, columns]`, at least 0, or -1 for what must not be chosen.
    """
    if pattern.is_dense:
        return scores >= 0
    mask = torch.empty(scores.shape, dtype=torch.bool)

    def choose(rows: slice) -> None:
        part = scores[rows]
        kept = select_kept(part, pattern).view(len(part), -1)
        mask[rows] = kept[:, : scores.shape[1]] & (part >= 0)

    for_row_blocks(choose, *scores.shape)
    return mask


@singledispatch
def outliers_mask(outliers: OutlierPattern, scores: Tensor) -> Tensor:
    """The outliers of highest score; as `base_mask`, but what must not be chosen is where nothing else is left."""
    mask = torch.zeros(scores.shape, dtype=torch.bool)

    def choose(rows: slice) -> None:
        mask[rows].scatter_(1, *select_outliers(scores[rows], outliers))

    for_row_blocks(choose, *scores.shape)
    return mask


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
        outlier_mask = outliers_mask(layer.outliers, scores)
    if outlier_mask is not None:
        scores = scores.masked_fill(outlier_mask, -1.0)
    return base_mask(layer.pattern, scores), outlier_mask


def best_support(scores: Tensor, layer: LayerConfig) -> Tensor:
    """The weights of greatest total score that the pattern and the outliers together can hold.

    A group that holds some outliers keeps N more: choosing N of every group first and the k of every block among what
    is left puts the outliers where the groups are fullest. `choose_masks`, which follows the paper, lets the largest
    weights be outliers, though many would have been kept anyway.

    Returns:
        Bool `[out_features, in_features]` on the CPU: base and outliers.
    """
    scores = scores.to("cpu", torch.float32)
    kept, _ = choose_masks(scores, replace(layer, outliers=None))
    if layer.outliers is None:
        return kept
    return kept | outliers_mask(layer.outliers, scores.masked_fill(kept, -1.0))


def best_masks(scores: Tensor, layer: LayerConfig) -> tuple[Tensor, Tensor | None]:
    """`best_support` as base and outliers, these being the largest of each group; returns what `choose_masks` does.

    Where a group can lie in two blocks, or a block has fewer than k weights beyond N of a group, by `choose_masks`.
    """
    scores = scores.to("cpu", torch.float32)
    kept = best_support(scores, layer)
    if layer.outliers is None:
        return kept, None
    (rows, width), (n, m) = scores.shape, (layer.pattern.n, layer.pattern.m)
    groups = torch.nn.functional.pad(scores.masked_fill(~kept, -1.0), (0, -width % m), value=-1.0).view(rows, -1, m)
    surplus = (groups >= 0).sum(dim=-1, keepdim=True) - n
    ranks = groups.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    outlier_mask = (ranks < surplus).view(rows, -1)[:, :width]
    if layer.outliers.block % m or outlier_mask.sum() < rows * layer.outliers.per_row(width):
        return choose_masks(scores, layer)
    return kept & ~outlier_mask, outlier_mask
