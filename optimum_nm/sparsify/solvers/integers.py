"""Integer values for a given mask: rounding errors fed forward to the survivors, scales refitted to the levels."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...config import INTEGER_DTYPES, LayerConfig
from ...packing.values import as_scale, expand_scales, quantize, round_to_levels
from .solution import Solution, damped

BLOCK = 128  # columns between updates of the gradient everywhere else
DAMPING = 0.01
SWEEPS = {"int8": 1, "int4": 4}


def quantize_solution(weight: Tensor, solution: Solution, gram: Tensor, layer: LayerConfig) -> Solution:
    """Give the base of a solution integer values, by coordinate descent on tr[(W−Ŵ)G(W−Ŵ)ᵀ].

    The first sweep over the columns puts every survivor, given all errors so far, to the level nearest to its best
    value, columns to come being floats still (QuantEase, 2309.01885 §3, here on the support of each row); further
    sweeps choose levels again, and before each the scales are refitted by least squares. No step raises the error.

    Args:
        weight: W, float32 `[out_features, in_features]`.
        solution: the mask, and values to start from; outliers keep float values, which take up errors too.
        gram: G `[in_features, in_features]`.

    Returns:
        `solution` as it is if the layer stores floats; else with scales, and with values that are multiples of them.
    """
    if layer.weight_dtype not in INTEGER_DTYPES:
        return solution
    base = solution.mask.to(weight.device)
    start = solution.weight
    _, scales = quantize(
        start.masked_fill(~base, 0.0).cpu(), layer.weight_dtype, layer.group_size, gram.diagonal().cpu()
    )
    descent = _Descent(weight, start, base, solution.kept, damped(gram, DAMPING).float(), layer, scales)
    for sweep in range(SWEEPS[layer.weight_dtype]):
        if sweep:
            descent.refit_scales()
        descent.sweep()
    return replace(solution, weight=descent.current.t().contiguous(), scales=descent.scales.to("cpu", torch.float16))


class _Descent:
    """The weight in the making, column by column: `current` and the gradient are `[in_features, out_features]`."""

    def __init__(
        self,
        weight: Tensor,
        start: Tensor,
        base: Tensor,
        kept: Tensor,
        gram: Tensor,
        layer: LayerConfig,
        scales: Tensor,
    ) -> None:
        self.gram, self.layer = gram, layer
        self.base, self.kept = base.t().contiguous(), kept.t().contiguous()
        self.current = start.t().contiguous()
        self.scales = scales.to(weight.device, torch.float32)
        self.gradient = gram @ (weight.t() - self.current)

    def sweep(self) -> None:
        """Choose the level of every survivor once, in the order of the columns."""
        width = len(self.gram)
        scales = expand_scales(self.scales, width, self.layer.group_size).t().contiguous()
        curvature = self.gram.diagonal().tolist()
        for begin in range(0, width, BLOCK):
            block = slice(begin, min(begin + BLOCK, width))
            gradient, before = self.gradient[block].clone(), self.current[block].clone()
            for j in range(begin, block.stop):
                best = self.current[j] + gradient[j - begin] / curvature[j]
                level = round_to_levels(best, scales[j], self.layer.weight_dtype) * scales[j]
                chosen = torch.where(self.base[j], level, best.masked_fill_(~self.kept[j], 0.0))
                gradient.addr_(self.gram[block, j], chosen - self.current[j], alpha=-1)
                self.current[j] = chosen
            self.gradient.addmm_(self.gram[:, block], self.current[block] - before, alpha=-1)

    def refit_scales(self) -> None:
        """Move the scales of one group of columns after the other to where the error is least for the levels as are."""
        width = len(self.gram)
        size = width if self.layer.group_size == -1 else self.layer.group_size
        for group, begin in enumerate(range(0, width, size)):
            columns = slice(begin, min(begin + size, width))
            scale = self.scales[:, group]
            levels = (self.current[columns] / scale).masked_fill_(~self.base[columns], 0.0)
            slope = (levels * self.gradient[columns]).sum(dim=0)
            curvature = (levels * (self.gram[columns, columns] @ levels)).sum(dim=0)
            refitted = as_scale(scale + torch.where(curvature > 0, slope / curvature, 0.0))
            change = refitted - scale
            change = torch.where(change * (change * curvature - 2 * slope) < 0, change, 0.0)
            self.scales[:, group] += change
            self.current[columns] += change * levels
            self.gradient.addmm_(self.gram[:, columns], change * levels, alpha=-1)
