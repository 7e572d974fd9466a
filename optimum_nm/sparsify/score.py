"""How much each weight matters."""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = torch.finfo(torch.float32).tiny


def importance(weight: Tensor, input_norm: Tensor, score: str, exponent: float) -> Tensor:
    """Importance of every weight, at least 0.

    Args:
        weight: float32 `[out_features, in_features]`.
        input_norm: ‖X_j‖₂, `[in_features]`.
        score: "magnitude" |W|; "wanda" |W_ij|·‖X_j‖₂ (Sun et al., 2306.11695); "ria"
            (|W_ij|/Σ_i|W_ij| + |W_ij|/Σ_j|W_ij|)·‖X_j‖₂^a (Zhang et al., "Plug-and-Play", ICLR 2024).
        exponent: a of "ria".
    """
    magnitude = weight.abs()
    if score == "magnitude":
        return magnitude
    if score == "wanda":
        return magnitude * input_norm
    assert score == "ria"
    column_sum = magnitude.sum(dim=0, keepdim=True).clamp_min(_TINY)
    row_sum = magnitude.sum(dim=1, keepdim=True).clamp_min(_TINY)
    relative = magnitude / column_sum
    return relative.add_(magnitude.div_(row_sum)).mul_(input_norm.pow(exponent))
