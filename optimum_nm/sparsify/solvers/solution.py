"""What a solver returns, and how it prepares a Gram matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Solution:
    """A pruned weight.

    Attributes:
        weight: float32 `[out_features, in_features]`, zero outside the masks.
        mask: bool on the CPU, the base: at most N in a group.
        outlier_mask: bool on the CPU, disjoint from `mask`: k in a block; None without outliers.
        scales: float16 `[out_features, scale_count]` on the CPU, of which the base's values are whole multiples; None
            where packing is to choose them.
    """

    weight: Tensor
    mask: Tensor
    outlier_mask: Tensor | None
    scales: Tensor | None = None

    @property
    def kept(self) -> Tensor:
        """Bool `[out_features, in_features]`: base and outliers, on the device of the weight."""
        kept = self.mask if self.outlier_mask is None else self.mask | self.outlier_mask
        return kept.to(self.weight.device)


def damped(gram: Tensor, share: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """G + share · mean(diag G) · I, in memory of its own; the identity's share is 1 for inputs that are all zero."""
    return _damp(gram.to(dtype, copy=True), share)


def normalized(gram: Tensor, damping: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """G with a unit diagonal, damped, and the scale: columns of W times it are what goes with that G."""
    scale = gram.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    return _damp((gram / scale).div_(scale[:, None]).to(dtype), damping), scale


def _damp(gram: Tensor, share: float) -> Tensor:
    mean = gram.diagonal().mean()
    gram.diagonal().add_(share * mean if mean > 0 else torch.ones_like(mean))
    return gram
