"""Unstructured sparsity, as a baseline to hold patterns against: no format here stores it.

A baseline is solved by the same solvers on the same statistics, only that the weights of a layer compete with all
others of it; then it is kept dense.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..config import LayerConfig, NMConfig
from ..patterns import NMPattern, OutlierPattern
from ..sparsify.layer import LayerSolver, solve_layer
from ..sparsify.mask import base_mask, outliers_mask
from ..sparsify.solvers import Solution
from ..sparsify.statistics import InputStatistics

SWEEP = 128  # columns that SparseGPT's sweep compares at a time, as its authors do


class Unstructured(NMPattern):
    """The share n/m of a layer's weights, wherever they are; a solver that goes by groups compares m columns."""

    def __post_init__(self) -> None:
        """Nothing to check: no group of m is ever stored."""


class UnstructuredOutliers(OutlierPattern):
    """As many outliers in a layer as k of every block make, wherever they are."""


@base_mask.register
def _highest_share(pattern: Unstructured, scores: Tensor) -> Tensor:
    return _highest(scores, round(scores.numel() * pattern.density))


@outliers_mask.register
def _highest_outliers(outliers: UnstructuredOutliers, scores: Tensor) -> Tensor:
    return _highest(scores, len(scores) * outliers.per_row(scores.shape[1]))


def _highest(scores: Tensor, count: int) -> Tensor:
    """Bool, of the shape of `scores`; nothing below 0 is chosen."""
    chosen = torch.zeros(scores.numel(), dtype=torch.bool)
    chosen[scores.flatten().topk(count).indices] = True
    return chosen.view(scores.shape) & (scores >= 0)


def stored_dense(config: NMConfig) -> NMConfig:
    """`config` for a model whose layers hold whatever zeros they have as dense float16."""
    return replace(config, pattern="16:16", outliers=None, weight_dtype="float16", target_bits=None)


def unstructured_solver(config: NMConfig, kind: str) -> LayerSolver:
    """In place of `solve_layer` for a model stored as `stored_dense(config)` says.

    Args:
        config: with the pattern and the outliers to hold against.
        kind: "weights", the density of the pattern anywhere in a layer, with outliers none are told apart;
            "outliers", the base N:M, its outliers anywhere in a layer.
    """
    base, outliers = NMPattern.parse(config.pattern), OutlierPattern.parse(config.outliers)
    dense = stored_dense(config).layer("")

    def solve(
        weight: Tensor, statistics: InputStatistics, layer: LayerConfig, _: NMConfig, equalized: bool
    ) -> Solution:
        if layer != dense:  # an override
            return solve_layer(weight, statistics, layer, config, equalized)
        if kind == "weights":
            share = base.density + (0 if outliers is None else outliers.k / outliers.block)
            layer = replace(layer, pattern=Unstructured(round(share * SWEEP), SWEEP))
        else:
            assert outliers is not None
            layer = replace(layer, pattern=base, outliers=UnstructuredOutliers(outliers.k, outliers.block))
        solution = solve_layer(weight, statistics, layer, config, equalized)
        return Solution(solution.weight, solution.kept.cpu(), None)

    return solve
