"""Stored values: float bits, and symmetric integers with one float16 scale per row and column group."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NMError
from ..patterns import NMPattern

FLOAT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BIT_VIEWS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
LARGEST = {"int8": 127, "int4": 7}  # of positive q; the negative side reaches one further
OFFSET = {"int8": 128, "int4": 8}  # stored is q + offset
_CLIP_RATIOS = tuple(1 - 0.025 * step for step in range(13))  # 1 … 0.7
_SMALLEST_SCALE = 2.0**-24  # smallest positive float16


def to_float_bits(values: Tensor, dtype: torch.dtype, name: str = "weight") -> Tensor:
    """Round finite values to `dtype` and view the bits as integers; NMError when one overflows."""
    rounded = values.to(dtype)
    if not all_finite(rounded):
        worst = values.abs().max().item()
        raise NMError(f"{name} reaches {worst:g}, which {str(dtype).removeprefix('torch.')} cannot hold; use float32.")
    return rounded.contiguous().view(BIT_VIEWS[dtype])


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite, from two reductions, which take a tenth of the time of a mask."""
    if not tensor.numel():
        return True
    least, most = tensor.aminmax()
    return bool(least.isfinite() and most.isfinite())


def scale_count(in_features: int, group_size: int) -> int:
    """Scales per row."""
    return 1 if group_size == -1 else -(-in_features // group_size)


def expand_scales(scales: Tensor, in_features: int, group_size: int) -> Tensor:
    """Scales `[rows, scale_count]` repeated to one per column `[rows, in_features]`."""
    width = in_features if group_size == -1 else group_size
    return scales.repeat_interleave(width, dim=1)[:, :in_features]


def quantize(
    weight: Tensor,
    dtype: str,
    group_size: int,
    column_weight: Tensor | None = None,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Integers `q` (int16 `[rows, in_features]`) and float16 scales `[rows, scale_count]` of a float32 weight.

    int8 scales are absmax/127. int4 scales minimise Σⱼ h_j (w_j − s·q_j)² over a clip of absmax to 0.7…1 times
    itself, mapped to 7, or of the largest element to −8 (then the scale takes that element's opposite sign, which uses
    all sixteen levels); h is `column_weight`, one for all columns when None. Scales that are given stay as they are.

    Raises:
        NMError: the given scales have another shape, or are not finite and different from zero.
    """
    rows, in_features = weight.shape
    width = in_features if group_size == -1 else group_size
    count = scale_count(in_features, group_size)
    groups = torch.nn.functional.pad(weight, (0, count * width - in_features)).view(rows, count, width)
    if scales is not None:
        if scales.shape != (rows, count) or not torch.isfinite(scales.half()).all() or (scales.half() == 0).any():
            raise NMError(
                f"scales are {tuple(scales.shape)}; finite ones of shape {(rows, count)}, none 0, are needed."
            )
        group_scales = scales.to("cpu", torch.float16).float().unsqueeze(-1)
    else:
        group_scales = _choose_scales(groups, dtype, column_weight)
    q = round_to_levels(groups, group_scales, dtype)
    return q.view(rows, -1)[:, :in_features].to(torch.int16), group_scales.squeeze(-1).to(torch.float16)


def _choose_scales(groups: Tensor, dtype: str, column_weight: Tensor | None) -> Tensor:
    """Scales `[rows, count, 1]` of `[rows, count, width]`."""
    absmax, where = groups.abs().max(dim=-1, keepdim=True)
    if dtype == "int8":
        return as_scale(absmax / 127)
    _, count, width = groups.shape
    importance = torch.ones(1) if column_weight is None else column_weight.to(groups.dtype).cpu()
    if column_weight is not None:
        importance = torch.nn.functional.pad(importance, (0, count * width - len(importance))).view(1, count, width)
    signed = groups.gather(-1, where)
    candidates = [base * ratio for ratio in _CLIP_RATIOS for base in (absmax / 7, signed / -8)]
    return _best_scales(groups, candidates, importance, dtype)


def as_scale(scale: Tensor) -> Tensor:
    """Round to float16, keeping the sign and never reaching zero or infinity."""
    limited = scale.abs().clamp(_SMALLEST_SCALE, torch.finfo(torch.float16).max)
    return torch.where(scale < 0, -limited, limited).to(torch.float16).to(torch.float32)


def round_to_levels(groups: Tensor, scales: Tensor, dtype: str) -> Tensor:
    """The integers nearest to values over their scales, as floats."""
    return (groups / scales).round_().clamp_(-OFFSET[dtype], LARGEST[dtype])


def _best_scales(groups: Tensor, candidates: list[Tensor], importance: Tensor, dtype: str) -> Tensor:
    best_scale, best_error = None, None
    for candidate in candidates:
        scale = as_scale(candidate)
        residual = groups - scale * round_to_levels(groups, scale, dtype)
        error = (residual.square_() * importance).sum(dim=-1, keepdim=True)
        if best_scale is None or best_error is None:
            best_scale, best_error = scale, error
        else:
            better = error < best_error
            best_scale, best_error = torch.where(better, scale, best_scale), torch.where(better, error, best_error)
    assert best_scale is not None
    return best_scale


def int4_chunk(pattern: NMPattern) -> int:
    """Values whose low halves of bytes precede their high halves: those of 128 columns; 64 where all are kept."""
    return 64 if pattern.is_dense else 128 // pattern.m * pattern.n


def pack_integers(q: Tensor, dtype: str, pattern: NMPattern) -> Tensor:
    """Offset-binary bytes of integers `[rows, count]`; int4 two a byte, in chunks (docs/format.md)."""
    stored = (q.to(torch.int16) + OFFSET[dtype]).to(torch.uint8)
    if dtype == "int8":
        return stored
    count, size = stored.shape[1], int4_chunk(pattern)
    full = count // size * size
    parts = []
    for chunk in (stored[:, :full].reshape(len(stored), -1, size), stored[:, full:].unsqueeze(1)):
        if chunk.shape[-1] % 2:
            chunk = torch.nn.functional.pad(chunk, (0, 1), value=OFFSET[dtype])
        low, high = chunk.split(chunk.shape[-1] // 2, dim=-1) if chunk.shape[-1] else (chunk, chunk)
        parts.append((low | high << 4).reshape(len(stored), -1))
    return torch.cat(parts, dim=1)


def unpack_integers(packed: Tensor, dtype: str, count: int, pattern: NMPattern) -> Tensor:
    """The inverse of `pack_integers`: int16 `[rows, count]`."""
    if dtype == "int4":
        rows, size = len(packed), int4_chunk(pattern)
        full = count // size * size
        chunks = packed[:, : full // 2].reshape(rows, -1, size // 2)
        tail = packed[:, full // 2 :].unsqueeze(1)
        packed = torch.cat([torch.cat([c & 15, c >> 4], dim=-1).reshape(rows, -1) for c in (chunks, tail)], dim=1)
    return packed[:, :count].to(torch.int16) - OFFSET[dtype]
