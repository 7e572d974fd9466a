"""One linear layer: score, masks, correction, packing."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import LayerConfig, NMConfig
from ..errors import NMError
from ..packing.packed_weight import PackedWeight
from .correct import variance_correction
from .equalize import equalization_scale
from .mask import choose_masks
from .score import importance
from .statistics import InputStatistics
from .summary import LayerSummary

GRAM_CORRECTIONS = ("output", "least-squares")


def sparsify_layer(
    name: str, weight: Tensor, statistics: InputStatistics, layer: LayerConfig, config: NMConfig, equalized: bool
) -> tuple[PackedWeight, LayerSummary]:
    """Prune and pack one weight.

    Args:
        name: full module name.
        weight: float32 `[out_features, in_features]`.
        equalized: weight and statistics are already equalized (fold), so the score takes them as they are.

    Raises:
        NMError: naming the layer, a value does not fit the type it is stored in.
    """
    scale = torch.ones_like(statistics.absolute_max)
    if config.equalization is not None and not equalized:
        scale = equalization_scale(statistics.absolute_max, weight.abs().amax(dim=0), config.equalization)
    scores = importance(weight * scale, statistics.norm / scale, config.score, config.score_exponent)
    mask, outlier_mask = choose_masks(scores, layer)
    kept = mask if outlier_mask is None else mask | outlier_mask
    pruned = weight * kept.to(weight.device)
    if config.variance_correction is not None and not layer.pattern.is_dense:
        statistic_scale = 1.0 if config.variance_correction in GRAM_CORRECTIONS else scale
        pruned *= variance_correction(
            weight * statistic_scale, pruned * statistic_scale, config.variance_correction, statistics.gram
        )
    try:
        packed = PackedWeight.from_config(
            pruned, layer, mask=mask, outlier_mask=outlier_mask, column_weight=statistics.square_sum.cpu()
        )
    except NMError as error:
        raise NMError(f"{name}: {error}") from None
    change = weight - packed.unpack().to(weight.device)
    total = statistics.energy(weight)
    summary = LayerSummary(
        name=name,
        shape=(weight.shape[0], weight.shape[1]),
        density=kept.float().mean().item(),
        relative_error=statistics.energy(change) / total if total else 0.0,
        bits_per_weight=packed.bits_per_weight,
    )
    return packed, summary
