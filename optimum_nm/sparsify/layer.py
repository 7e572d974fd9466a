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
from ..packing.row_blocks import for_row_blocks
from .correct import variance_correction
from .equalize import equalization_scale
from .mask import choose_masks
from .score import importance
from .solvers import SOLVERS, Solution, quantize_solution, swap_weights
from .statistics import InputStatistics
from .summary import LayerSummary

MEASURED_OUTPUTS = 256  # of a layer tell its error: all would take as long as a solver's sweep
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
        return Solution(_kept(weight, mask, outlier_mask, torch.empty_like(weight)), mask, outlier_mask)
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
    measured = slice(None, None, max(1, len(weight) // MEASURED_OUTPUTS))
    change = packed.rows(measured).unpack().to(weight.device).sub_(weight[measured])
    total = statistics.energy(weight[measured])
    summary = LayerSummary(
        name=name,
        shape=(weight.shape[0], weight.shape[1]),
        density=torch.count_nonzero(solution.kept).item() / weight.numel(),
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
    scores = importance(weight, statistics.norm, config.score, config.score_exponent, scale)
    mask, outlier_mask = choose_masks(scores, layer)
    solution = Solution(_kept(weight, mask, outlier_mask, scores), mask, outlier_mask)
    if config.swaps:
        assert statistics.gram is not None
        solution = swap_weights(weight, solution, statistics.gram, layer, config.swaps, refit=False)
    if config.variance_correction is None or layer.pattern.is_dense:
        return solution
    if config.variance_correction in _GRAM_CORRECTIONS:
        scale = torch.ones_like(scale)  # the Gram matrix is that of the inputs as they are
    factor = variance_correction(weight, solution.weight, config.variance_correction, statistics.gram, scale)
    return replace(solution, weight=solution.weight.mul_(factor))


def _kept(weight: Tensor, mask: Tensor, outlier_mask: Tensor | None, values: Tensor) -> Tensor:
    """`values`, in which the weights of the masks are put, and zeros."""

    def keep(rows: slice) -> None:
        kept = mask[rows] if outlier_mask is None else mask[rows] | outlier_mask[rows]
        torch.mul(weight[rows], kept.to(weight.device), out=values[rows])

    for_row_blocks(keep, *weight.shape)
    return values
