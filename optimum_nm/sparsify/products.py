"""Products that need not be exact, as fast as the processor makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

# Narrower layers take little time, and come out alike on every processor.
LEAST_WIDTH = 2048
LEAST_WEIGHTS = 1 << 20  # trained together


def product_with(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    """The function X ↦ X @ matrix, for steps of which the next one makes up for errors.

    Where the processor multiplies tiles of bfloat16 (AMX, five times as fast as float32), what is off the diagonal of a
    wide one goes that way. The diagonal, which has most of the result, stays float32: the error of X @ matrix is then
    below 2⁻⁷ of what the other columns contribute.

    Args:
        matrix: symmetric, float32 `[in_features, in_features]`; it must not change while the function is in use.
    """
    if len(matrix) < LEAST_WIDTH or matrix.device.type != "cpu" or not _multiplies_bfloat16():
        return matrix.__rmatmul__
    diagonal = matrix.diagonal().clone()
    others = matrix.to(torch.bfloat16)
    others.diagonal().zero_()
    return lambda inputs: torch.addcmul((inputs.to(torch.bfloat16) @ others).float(), inputs, diagonal)


@contextmanager
def rounded_products(weights: int) -> Iterator[None]:
    """Inside, products of float32 matrices round their factors to bfloat16, and sum in float32, where the processor
    multiplies tiles of these (AMX, more than twice as fast, conversions included).

    For training, whose gradients differ by more from batch to batch.

    Args:
        weights: how many are trained; with fewer than LEAST_WEIGHTS products stay float32.
    """
    products = getattr(torch.backends.mkldnn, "matmul", None)
    settable = hasattr(products, "fp32_precision")
    if products is None or not settable or weights < LEAST_WEIGHTS or not _multiplies_bfloat16():
        yield
        return
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before


@cache
def _multiplies_bfloat16() -> bool:
    """False too where torch is too old to tell."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16", False))
