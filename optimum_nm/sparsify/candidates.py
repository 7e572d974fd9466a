"""The ways in which one layer can be stored, and the output error of each, on a sample of the layer's rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..config import LayerConfig
from ..packing.packed_weight import packed_shapes
from ..patterns import NMPattern, OutlierPattern
from .mask import best_masks, best_support
from .solvers import Solution, conjugate_gradients, quantize_solution
from .solvers.solution import damped

ROWS = 16
DAMPING = 0.1
ROUNDS = 4  # of conjugate gradients after every step of a path
OUTLIERS = (None, OutlierPattern(4, 256), OutlierPattern(8, 256), OutlierPattern(16, 256))
WEIGHT_DTYPES = ("int4", "int8", "float16")


def sampled_rows(out_features: int) -> Tensor:
    """Indices of at most ROWS rows, evenly spaced, so that every attention head has its share."""
    return torch.linspace(0, out_features - 1, min(ROWS, out_features)).round().long()


def packed_bytes(shape: Sequence[int], layer: LayerConfig) -> int:
    """Bytes of all packed tensors of a weight of shape (out_features, in_features)."""
    shapes = packed_shapes(shape[1], shape[0], layer)
    return sum(rows * width * dtype.itemsize for (rows, width), dtype in shapes.values())


def candidates(layer: LayerConfig) -> list[LayerConfig]:
    """N of the layer's M, for N from a quarter of M to M, with each of OUTLIERS and WEIGHT_DTYPES."""
    return [
        replace(layer, pattern=pattern, outliers=outliers, weight_dtype=dtype)
        for outliers in OUTLIERS
        for dtype in WEIGHT_DTYPES
        for pattern in _patterns(layer.pattern.m)
    ]


def candidate_errors(weight: Tensor, gram: Tensor, layer: LayerConfig) -> Iterator[tuple[LayerConfig, Tensor]]:
    """Each of `candidates` with the output errors that it leaves in the rows given, `[rows]`.

    For each of OUTLIERS the rows are pruned from N = M down, a little at a time, and the survivors refitted after each
    step: one walk gives every N at about the quality of `admm`. Integers come from coordinate descent, all at once.

    Args:
        weight: float32 `[rows, in_features]`.
        gram: G of the layer's inputs.
    """
    walks = [step for outliers in OUTLIERS for step in _walk(weight, gram, replace(layer, outliers=outliers))]
    solutions = [solution for _, solution in walks]
    nothing = torch.zeros(weight.shape, dtype=torch.bool)
    stacked = Solution(
        torch.cat([solution.weight for solution in solutions]),
        torch.cat([solution.mask for solution in solutions]),
        torch.cat([nothing if solution.outlier_mask is None else solution.outlier_mask for solution in solutions]),
    )
    dense = weight.repeat(len(walks), 1)
    for dtype in WEIGHT_DTYPES:
        stored = replace(layer, weight_dtype=dtype)
        change = dense - quantize_solution(dense, stacked, gram, stored).weight
        errors = ((change @ gram) * change).sum(dim=1).view(len(walks), -1)
        for (pruned, _), error in zip(walks, errors, strict=True):
            yield replace(pruned, weight_dtype=dtype), error


def _patterns(m: int) -> list[NMPattern]:
    """From N = M down."""
    return [NMPattern(n, m) for n in range(m, m // 4 - 1, -max(1, m // 16))]


def _walk(weight: Tensor, gram: Tensor, layer: LayerConfig) -> Iterator[tuple[LayerConfig, Solution]]:
    """From N = M down, with the outliers of `layer`."""
    scale = gram.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    matrix = damped(gram / scale.outer(scale), DAMPING).float()
    target = weight * scale
    current = target
    for pattern in _patterns(layer.pattern.m):
        step = replace(layer, pattern=pattern)
        if not pattern.is_dense:
            kept = best_support(current.abs(), step).to(weight.device)
            current = conjugate_gradients(target, current * kept, kept, matrix, rounds=ROUNDS)
        yield step, Solution(current / scale, *best_masks(current.abs(), step))
