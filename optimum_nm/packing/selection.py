"""Choosing columns: the n most important of every group, the k most important of every block."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import NMError
from ..patterns import NMPattern, OutlierPattern

_FILLER = -2.0  # below any importance (≥ 0) and below a column already taken as an outlier (-1)


def select_kept(importance: Tensor, pattern: NMPattern, mask: Tensor | None = None, first_row: int = 0) -> Tensor:
    """Mark n of every m columns.

    Args:
        importance: `[rows, in_features]`, at least 0, or -1 where a column is already kept as an outlier.
        mask: bool `[rows, in_features]`, what must be marked; importance is then not used.
        first_row: the number of the first row, for errors.

    Returns:
        Masks, bool `[rows, groups, m]` with exactly n set, ties going to the lower column. Groups with fewer than n
        real candidates mark outliers' columns, then columns past the end.

    Raises:
        NMError: `mask` marks more than n columns of a group.
    """
    rows, in_features = importance.shape
    groups = pattern.groups(in_features)
    past = groups * pattern.m - in_features
    if mask is None:
        ranking = pad_rows(importance, past, _FILLER).view(rows, groups, pattern.m)
        return _largest(ranking, pattern.n)
    kept = pad_rows(mask.cpu(), past).view(rows, groups, pattern.m)
    marked = torch.from_numpy(kept.numpy().sum(axis=-1, dtype=np.uint8))
    if (marked > pattern.n).any():
        row, group = (marked > pattern.n).nonzero()[0].tolist()
        raise NMError(
            f"mask keeps {marked[row, group]} of {pattern.m} in row {first_row + row}, columns {group * pattern.m} and "
            f"on; {pattern} keeps at most {pattern.n}."
        )
    unfilled = marked < pattern.n
    if unfilled.any():
        inside = (torch.arange(groups * pattern.m).view(1, groups, pattern.m) < in_features).expand_as(kept)
        kept = kept.clone()
        kept[unfilled] = _largest(kept[unfilled].float() + inside[unfilled], pattern.n)
    return kept


def pad_rows(matrix: Tensor, columns: int, value: float = 0.0) -> Tensor:
    """With so many columns more; the matrix itself with none, which torch's `pad` would copy."""
    return torch.nn.functional.pad(matrix, (0, columns), value=value) if columns else matrix


def _largest(ranking: Tensor, n: int) -> Tensor:
    """Bool `[..., m]`: the n largest along the last dimension of a float32 tensor, ties going to the lower index."""
    values = ranking.numpy()
    smallest = np.partition(values, -n, axis=-1)[..., -n, None]
    kept = values >= smallest
    if np.count_nonzero(kept) > n * smallest.size:
        crowded = kept.sum(axis=-1, dtype=np.uint16) > n
        tied, least = values[crowded], smallest[crowded]
        above = tied > least
        places = n - above.sum(axis=-1, keepdims=True)
        ties = tied == least
        kept[crowded] = above | (ties & (ties.cumsum(axis=-1) <= places))
    return torch.from_numpy(kept)


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
        chosen = _largest(block, count).view(rows, -1)
        all_columns.append(chosen.nonzero()[:, 1].view(rows, -1) + start)
        start += chosen.shape[1]
    columns = torch.cat(all_columns, dim=1)
    used = torch.ones_like(columns, dtype=torch.bool) if outlier_mask is None else outlier_mask.cpu().gather(1, columns)
    return columns, used
