"""Random weights in every form that a kernel reads; N:M tensors are exactly what docs/format.md asks for."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..packing.codes import pack_fields, unrank_masks
from ..packing.values import LARGEST, pack_integers
from ..patterns import NMPattern, OutlierPattern

OUTLIERS = OutlierPattern(16, 256)
GROUP_SIZE = 128
Array = npt.NDArray[Any]


class RandomLayer:
    """Tensors of a random weight `[out_features, in_features]` in every form that a kernel reads.

    Products nearly keep the variance of what they multiply, so that no chain leaves the range of float32.
    """

    def __init__(self, in_features: int, out_features: int, pattern: NMPattern, seed: int = 0) -> None:
        self.in_features = in_features
        self.out_features = out_features
        self.pattern = pattern
        self._random = np.random.default_rng(seed)

    def tensor(self, name: str) -> tuple[Array, int]:
        """The tensor that an Input names, and its axis of output features."""
        form, _, part = name.partition(".")
        if form == "dense":
            return self._dense(part)
        if form == "nbits":
            return self._nbits(part), 0
        if name == "codes":
            return pack_fields(self._ranks, self.pattern.code_bits), 0
        if name == "bitmap":
            return np.packbits(self._kept, axis=-1, bitorder="little"), 0
        if name == "outlier_positions":
            return (self._outlier_columns % OUTLIERS.block).astype(np.uint8), 0
        if name == "outlier_values":
            return self._normal(self._outlier_columns.shape, self._deviation).astype(np.float16), 0
        return (self._scales(form) if part == "scales" else self._values(form)), 0

    @property
    def _deviation(self) -> float:
        """Of base and outlier values, halfway between what chains with and without outliers would keep.

        Of a thousand layers, either alone would lead the other out of the range of float32.
        """
        density = self.pattern.density
        with_outliers = density + OUTLIERS.k / OUTLIERS.block
        return (self.in_features * (density * with_outliers) ** 0.5) ** -0.5

    def _normal(self, shape: tuple[int, ...], deviation: float) -> npt.NDArray[np.float32]:
        values = self._random.standard_normal(shape, dtype=np.float32)
        values *= np.float32(deviation)
        return values

    @cached_property
    def _ranks(self) -> npt.NDArray[np.int64]:
        shape = (self.out_features, self.pattern.groups(self.in_features))
        return self._random.integers(0, math.comb(self.pattern.m, self.pattern.n), shape)

    @cached_property
    def _kept(self) -> npt.NDArray[np.bool_]:
        return unrank_masks(self._ranks, self.pattern).reshape(self.out_features, -1)

    @cached_property
    def _outlier_columns(self) -> npt.NDArray[np.int64]:
        """One at random in each of the equal parts of a block, as many as the block has outliers."""
        starts: list[int] = []
        for block in range(0, self.in_features, OUTLIERS.block):
            length = min(OUTLIERS.block, self.in_features - block)
            count = OUTLIERS.per_row(length)
            starts += [block + part * length // count for part in range(count)]
        widths = np.diff([*starts, self.in_features])
        return np.array(starts) + self._random.integers(0, widths, (self.out_features, len(starts)))

    @cached_property
    def _under_outliers(self) -> npt.NDArray[np.bool_]:
        """Stored values `[out_features, stored]` that must be zero."""
        outliers = np.zeros_like(self._kept)
        np.put_along_axis(outliers, self._outlier_columns, True, axis=1)
        return outliers[self._kept].reshape(self.out_features, -1)

    def _values(self, dtype: str) -> Array:
        shape = self._under_outliers.shape
        if dtype in ("int8", "int4"):
            largest = LARGEST[dtype]
            q = self._random.integers(-largest, largest + 1, shape, dtype=np.int16)
            q[self._under_outliers] = 0
            return pack_integers(torch.from_numpy(q), dtype, self.pattern).numpy()
        values = self._normal(shape, self._deviation)
        values[self._under_outliers] = 0
        return torch.from_numpy(values).to(getattr(torch, dtype)).view(torch.uint8).numpy()

    def _scales(self, dtype: str) -> Array:
        spread = LARGEST[dtype] / 3**0.5  # deviation of the integers
        shape = (self.out_features, -(-self.in_features // GROUP_SIZE))
        return (self._random.uniform(0.9, 1.1, shape) * self._deviation / spread).astype(np.float16)

    def _dense(self, part: str) -> tuple[Array, int]:
        shape = (self.in_features, self.out_features)
        if part == "float32":
            return self._normal(shape, self.in_features**-0.5), 1
        if part == "int8":  # seven bits: ONNX Runtime's AVX2 kernel saturates with eight
            return self._random.integers(-63, 64, shape, dtype=np.int8), 1
        return np.full(self.out_features, self.in_features**-0.5 / 36.7, np.float32), 0

    def _nbits(self, part: str) -> Array:
        bits, block = (int(number) for number in part.split(".")[:2])
        blocks = -(-self.in_features // block)
        if part.endswith("scales"):
            spread = (2 ** (bits - 1) - 1) / 3**0.5
            return np.full((self.out_features, blocks), self.in_features**-0.5 / spread, np.float32)
        q = self._random.integers(1, 2**bits, (self.out_features, blocks, block), dtype=np.uint8)
        return q if bits == 8 else q[..., ::2] | q[..., 1::2] << 4
