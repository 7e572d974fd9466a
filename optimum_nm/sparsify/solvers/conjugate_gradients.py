"""The best values for a given mask."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_gradients(
    weight: Tensor,
    start: Tensor,
    kept: Tensor,
    gram: Tensor,
    by_gram: Callable[[Tensor], Tensor] | None = None,
    rounds: int = 8,
) -> Tensor:
    """Lower tr[(W−Ŵ)G(W−Ŵ)ᵀ] over the values of Ŵ at `kept`, all rows at once (Meng et al., ALPS, 2406.07831 §3.3).

    Args:
        weight: W, float32 `[out_features, in_features]`.
        start: Ŵ to begin from, zero outside `kept`.
        kept: bool, the support of every row, which stays.
        gram: G `[in_features, in_features]`.
        by_gram: X ↦ X @ G for the directions, if it need not be exact (`product_with`).

    Returns:
        Ŵ after `rounds` rounds; its error in each row is at most that of `start`.
    """
    current = start.clone()
    residual = ((weight - current) @ gram).masked_fill(~kept, 0.0)
    direction = residual.clone()
    energy = residual.square().sum(dim=1, keepdim=True)
    for _ in range(rounds):
        image = (direction @ gram if by_gram is None else by_gram(direction)).masked_fill(~kept, 0.0)
        curvature = (direction * image).sum(dim=1, keepdim=True)
        step = torch.where(curvature > 0, energy / curvature.clamp_min(torch.finfo(curvature.dtype).tiny), 0.0)
        current += step * direction
        residual -= step * image
        new_energy = residual.square().sum(dim=1, keepdim=True)
        growth = torch.where(energy > 0, new_energy / energy.clamp_min(torch.finfo(energy.dtype).tiny), 0.0)
        direction = residual + growth * direction
        energy = new_energy
    return current
