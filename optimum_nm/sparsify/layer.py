"""One linear layer: choosing what stays, with which values, and packing it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from ..config import LayerConfig, NMConfig
from ..errors import NMError
from ..packing.packed_weight import PackedWeight
from .correct import variance_correction
from .equalize import equalization_scale
from .mask import choose_masks
from .score import importance
from .solvers import SOLVERS, Solution, quantize_solution, swap_weights
from .statistics import InputStatistics
from .summary import LayerSummary

_GRAM_CORRECTIONS = ("output", "least-squares")


# The signature of `solve_layer`, which callers of the pipeline may replace.
LayerSolver: TypeAlias = Callable[[Tensor, InputStatistics, LayerConfig, NMConfig, bool], Solution]


def needs_gram(config: NMConfig) -> bool:
    """Whether `solve_layer` needs the Gram matrix of the inputs."""
    return config.solver in SOLVERS or config.swaps > 0 or config.variance_correction in _GRAM_CORRECTIONS


def whole_block_at_once(config: NMConfig) -> bool:
    """Whether the layers of a block are changed together, so that the statistics of all are needed at one time."""
    return config.finetune is not None or (config.equalization is not None and config.equalization_mode == "fold")


def solve_layer(
    weight: Tensor, statistics: InputStatistics, layer: LayerConfig, config: NMConfig, equalized: bool
) -> Solution:
    """Prune one weight; the values are floats whatever the layer stores.

    Args:
        weight: float32 `[out_features, in_features]`.
        equalized: weight and statistics are already equalized (fold), so the score takes them as they are.
    """
    if not statistics.tokens:  # an expert that calibration never reached: there is nothing to go by but the weight
        mask, outlier_mask = choose_masks(weight.abs(), layer)
        kept = mask if outlier_mask is None else mask | outlier_mask
        return Solution(weight * kept.to(weight.device), mask, outlier_mask)
    if config.solver == "mask":
        return _masked(weight, statistics, layer, config, equalized)
    if layer.pattern.is_dense and layer.outliers is None:
        return Solution(weight, torch.ones(weight.shape, dtype=torch.bool), None)  # nothing to choose
    assert statistics.gram is not None
    solution = SOLVERS[config.solver](weight, statistics.gram, layer)
    if config.swaps:
        solution = swap_weights(weight, solution, statistics.gram, layer, config.swaps, refit=True)
    return solution


def give_integers(
    weight: Tensor, solution: Solution, statistics: InputStatistics, layer: LayerConfig, config: NMConfig
) -> Solution:
    """The solution with integer values near `weight` on the layer's inputs, where integers are stored.

    With the solver "mask" packing rounds, and this returns the solution as it is.
    """
    if config.solver == "mask":
        return solution
    assert statistics.gram is not None
    return quantize_solution(weight, solution, statistics.gram, layer)


def pack_layer(
    name: str, weight: Tensor, solution: Solution, statistics: InputStatistics, layer: LayerConfig
) -> tuple[PackedWeight, LayerSummary]:
    """Pack what one weight became.

    Args:
        name: full module name.
        weight: the dense one, float32 `[out_features, in_features]`.

    Raises:
        NMError: naming the layer, a value does not fit the type it is stored in.
    """
    try:
        packed = PackedWeight.from_config(
            solution.weight,
            layer,
            mask=solution.mask,
            outlier_mask=solution.outlier_mask,
            column_weight=statistics.square_sum.cpu(),
            scales=solution.scales,
        )
    except NMError as error:
        raise NMError(f"{name}: {error}") from None
    change = weight - packed.unpack().to(weight.device)
    total = statistics.energy(weight)
    summary = LayerSummary(
        name=name,
        shape=(weight.shape[0], weight.shape[1]),
        density=solution.kept.float().mean().item(),
        relative_error=statistics.energy(change) / total if total else 0.0,
        bits_per_weight=packed.bits_per_weight,
        calibration_tokens=statistics.tokens,
    )
    return packed, summary


def _masked(
    weight: Tensor, statistics: InputStatistics, layer: LayerConfig, config: NMConfig, equalized: bool
) -> Solution:
    """Choose by score and keep the survivors, up to the variance correction."""
    scale = torch.ones_like(statistics.absolute_max)
    if config.equalization is not None and not equalized:
        scale = equalization_scale(statistics.absolute_max, weight.abs().amax(dim=0), config.equalization)
    scores = importance(weight * scale, statistics.norm / scale, config.score, config.score_exponent)
    mask, outlier_mask = choose_masks(scores, layer)
    kept = mask if outlier_mask is None else mask | outlier_mask
    solution = Solution(weight * kept.to(weight.device), mask, outlier_mask)
    if config.swaps:
        assert statistics.gram is not None
        solution = swap_weights(weight, solution, statistics.gram, layer, config.swaps, refit=False)
    if config.variance_correction is None or layer.pattern.is_dense:
        return solution
    # The Gram matrix is that of the inputs as they are.
    statistics_scale = 1.0 if config.variance_correction in _GRAM_CORRECTIONS else scale
    factor = variance_correction(
        weight * statistics_scale, solution.weight * statistics_scale, config.variance_correction, statistics.gram
    )
    return replace(solution, weight=solution.weight * factor)
