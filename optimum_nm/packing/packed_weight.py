"""PackedWeight: one N:M sparse weight in the packed format of docs/format.md."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config import INTEGER_DTYPES, LayerConfig, NMConfig
from ..errors import NMError
from ..patterns import NMPattern, OutlierPattern
from .codes import decode_positions
from .pack_rows import pack_rows
from .row_blocks import for_row_blocks, row_blocks
from .values import BIT_VIEWS, FLOAT_DTYPES, expand_scales, scale_count, unpack_integers

PACKED_AT_ONCE = 1 << 17  # elements of a weight, of which each thread has a dozen intermediate results
TENSOR_NAMES = ("values", "positions", "scales", "outlier_values", "outlier_positions")


def packed_shapes(
    in_features: int, out_features: int, config: LayerConfig
) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
    """Shape and dtype of each tensor that a packed `[out_features, in_features]` weight has, in TENSOR_NAMES order."""
    pattern, outliers = config.pattern, config.outliers
    count = pattern.stored_values(in_features)
    if config.weight_dtype in INTEGER_DTYPES:
        values = ((count + 1) // 2 if config.weight_dtype == "int4" else count, torch.uint8)
    else:
        values = (count, BIT_VIEWS[FLOAT_DTYPES[config.weight_dtype]])
    columns = {"values": values}
    if not pattern.is_dense:
        bits = pattern.m if config.positions == "bitmap" else pattern.code_bits
        columns["positions"] = ((pattern.groups(in_features) * bits + 7) // 8, torch.uint8)
    if config.weight_dtype in INTEGER_DTYPES:
        columns["scales"] = (scale_count(in_features, config.group_size), torch.int16)
    if outliers is not None:
        count = outliers.per_row(in_features)
        columns["outlier_values"] = (count, BIT_VIEWS[FLOAT_DTYPES[config.outlier_dtype]])
        columns["outlier_positions"] = (count, torch.uint8)
    return {name: ((out_features, width), dtype) for name, (width, dtype) in columns.items()}


@dataclass
class PackedWeight:
    """A weight `[out_features, in_features]` as the tensors of docs/format.md, keyed by TENSOR_NAMES, on the CPU."""

    in_features: int
    out_features: int
    config: LayerConfig
    tensors: dict[str, Tensor] = field(repr=False)

    @classmethod
    def pack(
        cls,
        weight: Tensor,
        pattern: str | NMPattern = "8:16",
        outliers: str | OutlierPattern | None = None,
        dtype: str = "float16",
        group_size: int | str = 128,
        positions: str | None = None,
        outlier_dtype: str = "float16",
        *,
        mask: Tensor | None = None,
        outlier_mask: Tensor | None = None,
        importance: Tensor | None = None,
        column_weight: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> PackedWeight:
        """Pack `weight`, keeping what is already N:M sparse exactly and otherwise the most important elements.

        Args:
            weight: `[out_features, in_features]`, any floating dtype.
            pattern, outliers, group_size, positions, outlier_dtype: as in NMConfig.
            dtype: of the stored values, NMConfig's `weight_dtype`.
            mask: bool `[out_features, in_features]`, the elements of the base; at most N in a group.
            outlier_mask: bool, the elements kept as outliers; at most k in a block.
            importance: `[out_features, in_features]`, decides where no mask is given; |weight| by default.
            column_weight: `[in_features]`, weights of the squared error in the int4 scale search (the Gram diagonal).
            scales: `[out_features, scale_count]`, of the integer dtypes, where they are chosen already.

        Raises:
            NMError: an option is out of range, the weight is not a finite matrix, a mask does not fit the pattern, or
                a value does not fit the dtype.
        """
        config = NMConfig(
            pattern=str(pattern),
            outliers=None if outliers is None else str(outliers),
            weight_dtype=dtype,
            group_size=group_size,
            positions=positions,
            outlier_dtype=outlier_dtype,
            exclude=[],
        ).layer("")
        assert config is not None
        return cls.from_config(
            weight,
            config,
            mask=mask,
            outlier_mask=outlier_mask,
            importance=importance,
            column_weight=column_weight,
            scales=scales,
        )

    @classmethod
    def from_config(
        cls,
        weight: Tensor,
        config: LayerConfig,
        *,
        mask: Tensor | None = None,
        outlier_mask: Tensor | None = None,
        importance: Tensor | None = None,
        column_weight: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> PackedWeight:
        """As `pack`, with the options of a LayerConfig."""
        if weight.ndim != 2 or 0 in weight.shape or not weight.is_floating_point():
            raise NMError(
                f"weight is a {weight.dtype} of shape {tuple(weight.shape)}; a non-empty float matrix is needed."
            )
        out_features, in_features = weight.shape
        by_row = {"mask": mask, "outlier_mask": outlier_mask, "importance": importance, "scales": scales}
        given = {name: tensor for name, tensor in by_row.items() if tensor is not None}
        for name, tensor in given.items():
            if len(tensor) != out_features:
                raise NMError(f"{name} has {len(tensor)} rows; the weight has {out_features}.")
        shapes = packed_shapes(in_features, out_features, config)
        tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}

        def pack(rows: slice) -> None:
            of_rows = {name: tensor[rows].cpu() for name, tensor in given.items()}
            packed = pack_rows(weight[rows], config, rows.start, column_weight, **of_rows)
            for name, tensor in tensors.items():
                tensor[rows] = packed[name]

        if config.weight_dtype == "int4":  # the search for scales keeps all threads busy by itself
            for rows in row_blocks(out_features, in_features):
                pack(rows)
        else:
            for_row_blocks(pack, out_features, in_features, PACKED_AT_ONCE)
        return cls(in_features, out_features, config, tensors)

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense `[out_features, in_features]` weight, exactly the values the kernel multiplies by."""
        weight = torch.empty(self.out_features, self.in_features, dtype=dtype)

        def unpack(rows: slice) -> None:
            weight[rows] = self.rows(rows)._unpack_at_once()

        for_row_blocks(unpack, self.out_features, self.in_features)
        return weight

    def row_blocks(self) -> Iterator[tuple[slice, PackedWeight]]:
        """Some rows at a time, and which."""
        for rows in row_blocks(self.out_features, self.in_features):
            yield rows, self.rows(rows)

    def rows(self, rows: slice) -> PackedWeight:
        """Some rows, whose tensors share memory with these."""
        tensors = {name: tensor[rows] for name, tensor in self.tensors.items()}
        return PackedWeight(self.in_features, len(range(self.out_features)[rows]), self.config, tensors)

    def _unpack_at_once(self) -> Tensor:
        weight = self._expand(self._base_values())
        if self.config.weight_dtype in INTEGER_DTYPES:
            scales = self.tensors["scales"].view(torch.float16).float()
            weight *= expand_scales(scales, self.in_features, self.config.group_size)
        if self.config.outliers is not None:
            bits = self.tensors["outlier_values"].view(FLOAT_DTYPES[self.config.outlier_dtype])
            weight.scatter_add_(1, self._outlier_columns(), bits.float())
        return weight

    def mask(self) -> Tensor:
        """Bool `[out_features, in_features]`: the columns marked in the base."""
        if self.config.pattern.is_dense:
            return torch.ones(self.out_features, self.in_features, dtype=torch.bool)
        return self._group_masks().view(self.out_features, -1)[:, : self.in_features]

    def outlier_mask(self) -> Tensor:
        """Bool `[out_features, in_features]`: the columns of the outliers."""
        mask = torch.zeros(self.out_features, self.in_features, dtype=torch.bool)
        return mask if self.config.outliers is None else mask.scatter_(1, self._outlier_columns(), True)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / (self.in_features * self.out_features)

    def validate(self, name: str = "weight") -> None:
        """Raise NMError unless the tensors are exactly what docs/format.md asks for."""
        for problem in self.problems(name):
            raise NMError(problem)

    def problems(self, name: str = "weight") -> Iterator[str]:
        """One sentence for each thing in which the tensors, called `name`.…, are not what docs/format.md asks for."""
        misfits = list(self._misfits(name))
        yield from misfits
        if misfits:
            return
        if "scales" in self.tensors and not self.tensors["scales"].view(torch.float16).isfinite().all():
            yield f"{name}.scales has elements that are not finite; every scale must be a finite number."
        padded: list[bool] = []

        def check(rows: slice) -> None:
            padded.append(self.rows(rows)._has_values_past_the_row(rows.start))

        try:
            for_row_blocks(check, self.out_features, self.in_features)
        except ValueError as error:
            yield f"{name}.positions {error}."
            return
        if any(padded):
            yield f"{name}.values is not zero at a marked column past the {self.in_features} of a row; it must be."
        if (outliers := self.config.outliers) is not None:
            yield from dict.fromkeys(
                problem for _, part in self.row_blocks() for problem in part._outlier_problems(name, outliers)
            )

    def _misfits(self, name: str) -> Iterator[str]:
        expected = packed_shapes(self.in_features, self.out_features, self.config)
        for missing in expected.keys() - self.tensors.keys():
            yield f"{name}.{missing} is missing; a {self.config.pattern} weight stored as this one has it."
        for tensor_name, tensor in self.tensors.items():
            shape, dtype = expected.get(tensor_name, (None, None))
            if shape != tuple(tensor.shape) or dtype != tensor.dtype:
                found, wanted = f"{tensor.dtype} {tuple(tensor.shape)}", f"{dtype} {shape}"
                yield f"{name}.{tensor_name} is {found}; the configuration asks for {wanted}."

    def _outlier_problems(self, name: str, outliers: OutlierPattern) -> Iterator[str]:
        positions = self.tensors["outlier_positions"].long()
        block = torch.arange(positions.shape[1]) // outliers.k
        ends = ((block + 1) * outliers.block).clamp(max=self.in_features)
        columns = self._outlier_columns()
        if ((columns.diff(dim=1) <= 0) & (block.diff() == 0)).any():
            yield f"{name}.outlier_positions does not ascend strictly within a block of {outliers.block}."
        if (positions >= outliers.block).any() or (columns >= ends).any():
            yield f"{name}.outlier_positions points past its block of {outliers.block} or the end of the row."
            return
        used = self.tensors["outlier_values"].view(FLOAT_DTYPES[self.config.outlier_dtype]) != 0
        base = self._expand(self._base_values())
        if (used & (base.gather(1, columns) != 0)).any():
            yield f"{name}.values is not zero at the column of an outlier; it must be."

    def _base_values(self) -> Tensor:
        """Stored values `[out_features, stored]` in float32, before scales."""
        values = self.tensors["values"]
        if self.config.weight_dtype in INTEGER_DTYPES:
            pattern = self.config.pattern
            count = pattern.stored_values(self.in_features)
            return unpack_integers(values, self.config.weight_dtype, count, pattern).float()
        return values.view(FLOAT_DTYPES[self.config.weight_dtype]).float()

    def _expand(self, values: Tensor) -> Tensor:
        """Values at their columns `[out_features, in_features]`, zeros between them."""
        if self.config.pattern.is_dense:
            return values.clone()
        masks = self._group_masks().view(self.out_features, -1)
        return torch.zeros(masks.shape).masked_scatter_(masks, values)[:, : self.in_features]

    def _has_values_past_the_row(self, first_row: int) -> bool:
        """Whether a column is marked behind the last of a row, and its value not zero.

        Args:
            first_row: the number of the first row, for errors.

        Raises:
            ValueError: the positions are not those of masks.
        """
        pattern = self.config.pattern
        if pattern.is_dense:
            return False
        last_group = self._group_masks(first_row)[:, -1]
        inside = self.in_features - (pattern.groups(self.in_features) - 1) * pattern.m
        if inside == pattern.m:
            return False
        values = self._base_values()[:, -pattern.n :]
        return bool(torch.zeros(last_group.shape).masked_scatter_(last_group, values)[:, inside:].any())

    def _group_masks(self, first_row: int = 0) -> Tensor:
        pattern, positions = self.config.pattern, self.config.positions
        packed = self.tensors["positions"].numpy()
        groups = pattern.groups(self.in_features)
        return torch.from_numpy(decode_positions(packed, pattern, positions, groups, first_row))

    def _outlier_columns(self) -> Tensor:
        assert self.config.outliers is not None
        positions = self.tensors["outlier_positions"].long()
        return positions + torch.arange(positions.shape[1]) // self.config.outliers.k * self.config.outliers.block
