"""What a solver is asked and what it answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...config import LayerConfig

_SMALLEST_SCALE = 1e-4  # relative to the largest: inputs that calibration (almost) never sees rank last


@dataclass(frozen=True)
class SolverProblem:
    """One linear layer `Y = X Wᵀ` to prune; all tensors on one device, which computes.

    Attributes:
        weight: W, float32 `[out_features, in_features]`.
        gram: G = XᵀX summed over the calibration tokens, float32 `[in_features, in_features]`; zero if there were none.
        importance: the score, `[out_features, in_features]`, at least 0.
        mask: bool `[out_features, in_features]`, the base that the score chooses; at most N in a group.
        outlier_mask: bool, the outliers that the score chooses, none of which is in `mask`; None without outliers.
        layer: pattern, outliers and the stored type.
    """

    weight: Tensor
    gram: Tensor
    importance: Tensor
    mask: Tensor
    outlier_mask: Tensor | None
    layer: LayerConfig

    @property
    def kept(self) -> Tensor:
        """The score's base and outliers together."""
        return self.mask if self.outlier_mask is None else self.mask | self.outlier_mask

    def error(self, weight: Tensor) -> float:
        """The layer error tr[(W−Ŵ) G (W−Ŵ)ᵀ] of an approximation Ŵ."""
        change = self.weight - weight
        return ((change @ self.gram) * change).sum().item()


@dataclass(frozen=True)
class SolverSolution:
    """A pruned layer.

    Attributes:
        weight: Ŵ, float32 `[out_features, in_features]`, zero outside the masks. For integer types every base element
            is exactly `scale · q`.
        mask: bool, the base; at most N in a group.
        outlier_mask: bool, at most k in a block, disjoint from `mask`; None without outliers.
        scales: for integer types the float16 scales that `weight` was rounded with, `[out_features, scale_count]`, to
            be packed as they are; None when packing shall fit them.
    """

    weight: Tensor
    mask: Tensor
    outlier_mask: Tensor | None
    scales: Tensor | None = None


@dataclass(frozen=True)
class NormalEquations:
    """The problem in inputs of unit norm: minimise tr[(W−Ŵ) H (W−Ŵ)ᵀ] with H = D⁻¹GD⁻¹ + λI and columns scaled by D.

    λ (`damping`, relative to a diagonal of ones) draws every weight to its dense value: it makes H regular when there
    are few tokens or unused inputs, and keeps the solution from fitting the calibration text too closely.

    Attributes:
        matrix: H, float32 `[in_features, in_features]`.
        scale: D's diagonal, `[in_features]`; positive.
        target: W·D.
    """

    matrix: Tensor
    scale: Tensor
    target: Tensor

    @classmethod
    def of(cls, problem: SolverProblem, damping: float) -> NormalEquations:
        scale = problem.gram.diagonal().clamp_min(0.0).sqrt()
        scale = scale.clamp_min(_SMALLEST_SCALE * scale.max()) if scale.max() > 0 else torch.ones_like(scale)
        matrix = problem.gram / scale / scale[:, None]
        matrix.diagonal().add_(damping)
        return cls(matrix, scale, problem.weight * scale)

    def inverse(self, shift: float) -> Tensor:
        """(H + shift·I)⁻¹ in float32, from a float64 factorisation."""
        shifted = self.matrix.double()
        shifted.diagonal().add_(shift)
        return torch.cholesky_inverse(torch.linalg.cholesky(shifted)).float()
