"""Variance correction: one factor a row that gives a pruned layer the spread it had (2507.03052, free of training)."""

from __future__ import annotations

import torch
from torch import Tensor


def variance_correction(weight: Tensor, pruned: Tensor, kind: str, gram: Tensor | None) -> Tensor:
    """Factors `[out_features, 1]` by which every survivor of a row, outliers included, is multiplied.

    Args:
        weight: W, float32 `[out_features, in_features]`.
        pruned: Ŵ, the same with zeros.
        kind: "row" sqrt(Var(W_r)/Var(Ŵ_r)), zeros counted; "tensor" the same over the whole weight; "output"
            sqrt(w G wᵀ / ŵ G ŵᵀ), which gives each output the second moment it had; "least-squares"
            ŵ G wᵀ / ŵ G ŵᵀ, which minimises the layer error.
        gram: G `[in_features, in_features]`, for the last two.

    A row whose survivors are all zero, or never see an input, keeps the factor 1.
    """
    if kind in ("row", "tensor"):
        dims = (1,) if kind == "row" else (0, 1)
        before = weight.var(dim=dims, correction=0, keepdim=True)
        after = pruned.var(dim=dims, correction=0, keepdim=True)
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
