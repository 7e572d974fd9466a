"""Choosing columns: the n most important of every group, the k most important of every block."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NMError
from ..patterns import NMPattern, OutlierPattern

_FILLER = -2.0  # below any importance (≥ 0) and below a column already taken as an outlier (-1)


def select_kept(importance: Tensor, pattern: NMPattern, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mark n of every m columns.

    Args:
        importance: `[rows, in_features]`, at least 0, or -1 where a column is already kept as an outlier.
        mask: bool `[rows, in_features]`, what must be marked; importance is then not used.

    Returns:
        Masks, bool `[rows, groups, m]` with exactly n set, and the marked columns `[rows, groups·n]`, ascending. Groups
        with fewer than n real candidates mark outliers' columns, then columns past the end.

    Raises:
        NMError: `mask` marks more than n columns of a group.
    """
    rows, in_features = importance.shape
    groups = pattern.groups(in_features)
    ranking = importance if mask is None else mask.to("cpu", torch.float32)
    ranking = torch.nn.functional.pad(ranking, (0, groups * pattern.m - in_features), value=_FILLER)
    ranking = ranking.view(rows, groups, pattern.m)
    if mask is not None:
        marked = (ranking > 0).sum(dim=-1)
        if (marked > pattern.n).any():
            row, group = (marked > pattern.n).nonzero()[0].tolist()
            raise NMError(
                f"mask keeps {marked[row, group]} of {pattern.m} in row {row}, columns {group * pattern.m} and on; "
                f"{pattern} keeps at most {pattern.n}."
            )
    order = ranking.argsort(dim=-1, descending=True, stable=True)[..., : pattern.n]
    kept = torch.zeros(ranking.shape, dtype=torch.bool).scatter_(-1, order, True)
    columns = order.sort(dim=-1).values + torch.arange(groups).view(1, -1, 1) * pattern.m
    return kept, columns.view(rows, -1)


def select_outliers(
    importance: Tensor, outliers: OutlierPattern, outlier_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k most important columns of every block of a row.

    Args:
        importance: `[rows, in_features]`, at least 0.
        outlier_mask: bool `[rows, in_features]`, what must be chosen; importance is then not used.

    Returns:
        Columns `[rows, per_row]`, ascending, and bool `[rows, per_row]`: False for a slot that holds no outlier because
        the mask marks fewer than k.

    Raises:
        NMError: `outlier_mask` marks more than fit in a block.
    """
    rows, in_features = importance.shape
    ranking = importance if outlier_mask is None else outlier_mask.to("cpu", torch.float32)
    full = in_features // outliers.block
    cut = full * outliers.block
    blocks = [(ranking[:, :cut].view(rows, full, outliers.block), outliers.k)]
    if cut < in_features:
        blocks.append((ranking[:, cut:].unsqueeze(1), outliers.tail_count(in_features)))
    all_columns, start = [], 0
    for block, count in blocks:
        if outlier_mask is not None and ((block > 0).sum(dim=-1) > count).any():
            raise NMError(f"outlier_mask marks more columns than the {count} that a block of {block.shape[-1]} keeps.")
        order = block.argsort(dim=-1, descending=True, stable=True)[..., :count].sort(dim=-1).values
        offsets = torch.arange(block.shape[1]).view(1, -1, 1) * outliers.block + start
        all_columns.append((order + offsets).view(rows, -1))
        start += block.shape[1] * outliers.block
    columns = torch.cat(all_columns, dim=1)
    used = torch.ones_like(columns, dtype=torch.bool) if outlier_mask is None else outlier_mask.cpu().gather(1, columns)
    return columns, used
