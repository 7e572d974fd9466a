"""Variance correction: one factor a row that gives a pruned layer the spread it had (2507.03052, free of training)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packing.row_blocks import for_row_blocks


def variance_correction(
    weight: Tensor, pruned: Tensor, kind: str, gram: Tensor | None, scale: Tensor | float = 1.0
) -> Tensor:
    """Factors `[out_features, 1]` by which every survivor of a row, outliers included, is multiplied.

    Args:
        weight: W, float32 `[out_features, in_features]`.
        pruned: Ŵ, the same with zeros.
        kind: "row" sqrt(Var(W_r)/Var(Ŵ_r)), zeros counted; "tensor" the same over the whole weight; "output"
            sqrt(w G wᵀ / ŵ G ŵᵀ), which gives each output the second moment it had; "least-squares"
            ŵ G wᵀ / ŵ G ŵᵀ, which minimises the layer error.
        gram: G `[in_features, in_features]`, for the last two.
        scale: of the columns `[in_features]` of both weights, for the first two.

    A row whose survivors are all zero, or never see an input, keeps the factor 1.
    """
    if kind in ("row", "tensor"):
        before, after = (_variances(values, scale, kind) for values in (weight, pruned))
        return _ratio(before, after).sqrt().expand(len(weight), 1)
    assert gram is not None
    projected = pruned @ gram
    after = (projected * pruned).sum(dim=1, keepdim=True)
    if kind == "least-squares":
        return _ratio((projected * weight).sum(dim=1, keepdim=True), after)
    return _ratio(((weight @ gram) * weight).sum(dim=1, keepdim=True), after).sqrt()


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    usable = (denominator > 0) & (numerator > 0)
    return torch.where(usable, numerator / torch.where(usable, denominator, 1.0), 1.0)


def _variances(weight: Tensor, scale: Tensor | float, kind: str) -> Tensor:
    """Of the rows `[out_features, 1]`, or of the whole weight `[1, 1]`, its columns times scale."""
    means = torch.empty(len(weight), 1, device=weight.device)
    variances = torch.empty_like(means)

    def measure(rows: slice) -> None:
        part = weight[rows] * scale
        torch.mean(part, dim=1, keepdim=True, out=means[rows])
        torch.mean(part.sub_(means[rows]).square_(), dim=1, keepdim=True, out=variances[rows])

    for_row_blocks(measure, *weight.shape)
    return variances if kind == "row" else variances.mean(dim=0, keepdim=True) + means.var(dim=0, correction=0)
