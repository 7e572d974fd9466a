"""Projections onto an N:M pattern with outliers: which elements stay when all are ranked by one number."""

from __future__ import annotations

import torch
from torch import Tensor

from ...packing.selection import select_outliers
from ...patterns import NMPattern
from .problem import SolverProblem


def largest_of_groups(ranking: Tensor, n: int, m: int) -> Tensor:
    """Bool `[rows, in_features]`: the `n` largest of every `m` columns; the last group may be shorter."""
    rows, in_features = ranking.shape
    padded = torch.nn.functional.pad(ranking, (0, -in_features % m), value=-torch.inf).view(rows, -1, m)
    kept = torch.zeros(padded.shape, dtype=torch.bool, device=ranking.device)
    kept.scatter_(-1, padded.topk(n, dim=-1, sorted=False).indices, True)
    return kept.view(rows, -1)[:, :in_features]


class Support:
    """The supports that a layer's pattern and outliers allow.

    Args:
        problem: whose outlier mask, if `fixed_outliers`, every support contains.
        fixed_outliers: keep the score's outliers; otherwise any k of a block, which is the larger choice: the best
            support is then N of every group and, of what is left, the k largest of every block.
    """

    def __init__(self, problem: SolverProblem, fixed_outliers: bool) -> None:
        self._pattern: NMPattern = problem.layer.pattern
        self._outliers = problem.layer.outliers
        self._fixed = problem.outlier_mask if fixed_outliers else None

    def project(self, values: Tensor, n: int | None = None) -> Tensor:
        """Bool `[rows, in_features]`, the allowed support that holds the most of Σ values²; `n` stands in for N."""
        ranking = values.abs()
        if self._fixed is not None:
            ranking = ranking.masked_fill(self._fixed, -1.0)
        kept = largest_of_groups(ranking, self._pattern.n if n is None else n, self._pattern.m)
        if self._fixed is not None:
            return kept | self._fixed
        if self._outliers is not None:
            columns, _ = select_outliers(ranking.masked_fill(kept, -1.0), self._outliers)
            kept = kept.scatter(1, columns, True)
        return kept

    def split(self, kept: Tensor, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Base and outliers of a support: of a group with more than N elements, the largest are the outliers.

        Where blocks are not made of whole groups, the smallest are, so that no block gets too many.
        """
        if self._fixed is not None:
            return kept & ~self._fixed, self._fixed
        if self._outliers is None:
            return kept, None
        n, m = self._pattern.n, self._pattern.m
        ranking = values.abs().masked_fill(~kept, -1.0)
        if self._outliers.block % m:
            base = largest_of_groups(ranking, n, m) & kept
        else:
            # The n-th smallest element kept bounds the base: pruned ones are moved to the far end of the order.
            base = largest_of_groups((-ranking).masked_fill(~kept, -torch.inf), n, m) & kept
        return base, kept & ~base
