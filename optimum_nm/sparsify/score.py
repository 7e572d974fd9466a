"""How much each weight matters."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packing.row_blocks import for_row_blocks, row_blocks

_TINY = torch.finfo(torch.float32).tiny


def importance(weight: Tensor, input_norm: Tensor, score: str, exponent: float, scale: Tensor | float = 1.0) -> Tensor:
    """Importance of every weight, at least 0: of W·scale for the inputs X / scale.

    Args:
        weight: float32 `[out_features, in_features]`.
        input_norm: ‖X_j‖₂, `[in_features]`.
        score: "magnitude" |W|; "wanda" |W_ij|·‖X_j‖₂ (Sun et al., 2306.11695); "ria"
            (|W_ij|/Σ_i|W_ij| + |W_ij|/Σ_j|W_ij|)·‖X_j‖₂^a (Zhang et al., "Plug-and-Play", ICLR 2024).
        exponent: a of "ria".
        scale: of the columns, `[in_features]`.
    """
    assert score in ("magnitude", "wanda", "ria")
    scores = torch.empty_like(weight)
    exponent = {"magnitude": 0.0, "wanda": 1.0, "ria": exponent}[score]
    factor = (input_norm / scale).pow(exponent)
    sums = [weight[rows].abs().sum(dim=0) for rows in row_blocks(*weight.shape)]
    column_sum = torch.stack(sums).sum(dim=0).clamp_min_(_TINY)

    def score_rows(rows: slice) -> None:
        magnitude = weight[rows].abs()
        part = torch.mul(magnitude, scale, out=scores[rows])
        if score == "ria":
            part.div_(part.sum(dim=1, keepdim=True).clamp_min_(_TINY))
            part.add_(magnitude.div_(column_sum))  # which is the same at every scale
        part.mul_(factor)

    for_row_blocks(score_rows, *weight.shape)
    return scores
