"""Some rows of a dense weight as packed tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import INTEGER_DTYPES, LayerConfig
from ..errors import NMError
from .codes import encode_positions
from .selection import pad_rows, select_kept, select_outliers
from .values import FLOAT_DTYPES, all_finite, pack_integers, quantize, to_float_bits


def pack_rows(
    weight: Tensor,
    config: LayerConfig,
    first_row: int,
    column_weight: Tensor | None,
    mask: Tensor | None = None,
    outlier_mask: Tensor | None = None,
    importance: Tensor | None = None,
    scales: Tensor | None = None,
) -> dict[str, Tensor]:
    """The packed tensors of some rows `[rows, in_features]`; as `PackedWeight.pack`.

    Args:
        first_row: the number of the first row, for errors.
    """
    weight = weight.detach().to("cpu", torch.float32).contiguous()
    if not all_finite(weight):
        raise NMError("weight has elements that are not finite; every element must be a finite number.")
    importance = weight.abs() if importance is None else importance.detach().float()
    rows, in_features = weight.shape
    tensors: dict[str, Tensor] = {}
    base = weight
    if config.outliers is not None:
        columns, used = select_outliers(importance, config.outliers, outlier_mask)
        values = torch.where(used, weight.gather(1, columns), 0.0)
        tensors["outlier_values"] = to_float_bits(values, FLOAT_DTYPES[config.outlier_dtype], "outlier")
        tensors["outlier_positions"] = (columns % config.outliers.block).to(torch.uint8)
        base = weight.scatter(1, columns, 0.0) if outlier_mask is None else weight.masked_fill(outlier_mask, 0.0)
        taken = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, columns, used)
        importance = importance.masked_fill(taken, -1.0)
    kept = None
    if not config.pattern.is_dense:
        kept = select_kept(importance, config.pattern, mask, first_row).view(rows, -1)
        base = base * (kept[:, :in_features] if mask is None else mask)
        groups = kept.view(rows, -1, config.pattern.m).numpy()
        tensors["positions"] = torch.from_numpy(encode_positions(groups, config.pattern, config.positions))

    def stored(dense: Tensor) -> Tensor:
        if kept is None:
            return dense
        padded = pad_rows(dense, kept.shape[1] - in_features)
        return torch.from_numpy(padded.numpy()[kept.numpy()]).view(rows, -1)  # numpy is the faster at this

    if config.weight_dtype in INTEGER_DTYPES:
        q, scales = quantize(base, config.weight_dtype, config.group_size, column_weight, scales)
        tensors["values"] = pack_integers(stored(q), config.weight_dtype, config.pattern)
        tensors["scales"] = scales.view(torch.int16)
    else:
        tensors["values"] = to_float_bits(stored(base), FLOAT_DTYPES[config.weight_dtype])
    return tensors
