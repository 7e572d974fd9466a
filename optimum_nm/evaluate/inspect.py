"""What a packed checkpoint holds, tensor by tensor, and what it takes: measured in the file and by arithmetic."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config import INTEGER_DTYPES, LayerConfig
from ..nn.skeleton import open_checkpoint
from ..packing.checkpoint import PackedCheckpoint
from ..packing.packed_weight import TENSOR_NAMES
from .tables import format_table

VALUE_BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "int4": 4}
OUTLIER_BITS = {"float32": 32, "float16": 16}


@dataclass(frozen=True)
class LayerReport:
    """One packed linear.

    Attributes:
        tensor_bytes: bytes in the file of each of TENSOR_NAMES that the layer has.
        density: share of the weights that the format keeps, outliers included.
        bits_per_weight: all of `tensor_bytes` over the elements of the dense weight.
        formula: bits per weight by the formula of docs/format.md, which knows no row ends and no rounding up to bytes.
    """

    name: str
    out_features: int
    in_features: int
    pattern: str
    outliers: str | None
    weight_dtype: str
    tensor_bytes: dict[str, int]
    density: float
    bits_per_weight: float
    formula: float

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features

    @property
    def nbytes(self) -> int:
        return sum(self.tensor_bytes.values())


@dataclass(frozen=True)
class TensorReport:
    """A tensor that is stored as it is: an embedding, a norm, a bias, a linear that is excluded."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class Inspection:
    """Everything in a checkpoint's safetensors files; `str()` is a table.

    Attributes:
        file_bytes: of the safetensors files, their headers included.
        onnx_bytes: of model.onnx beside them; None without one.
    """

    folder: str
    layers: list[LayerReport]
    tensors: list[TensorReport]
    file_bytes: int
    onnx_bytes: int | None

    def totals(self) -> dict[str, Any]:
        """Sums over the checkpoint; bits per weight are averages over the packed weights, None without any."""
        weights = sum(layer.weights for layer in self.layers)
        packed = sum(layer.nbytes for layer in self.layers)
        other = sum(tensor.nbytes for tensor in self.tensors)
        by_tensor = {name: sum(layer.tensor_bytes.get(name, 0) for layer in self.layers) for name in TENSOR_NAMES}
        return {
            "packed_layers": len(self.layers),
            "packed_weights": weights,
            "packed_bytes": packed,
            "packed_bytes_by_tensor": {name: nbytes for name, nbytes in by_tensor.items() if nbytes},
            "other_bytes": other,
            "header_bytes": self.file_bytes - packed - other,
            "file_bytes": self.file_bytes,
            "onnx_bytes": self.onnx_bytes,
            "density": sum(layer.density * layer.weights for layer in self.layers) / weights if weights else None,
            "bits_per_weight": 8 * packed / weights if weights else None,
            "formula": sum(layer.formula * layer.weights for layer in self.layers) / weights if weights else None,
        }

    def to_dict(self) -> dict[str, Any]:
        return {
            "folder": self.folder,
            "layers": [asdict(layer) for layer in self.layers],
            "tensors": [asdict(tensor) for tensor in self.tensors],
            "totals": self.totals(),
        }

    def __str__(self) -> str:
        return "\n\n".join(part for part in (self._layer_table(), self._tensor_table(), self._total_lines()) if part)

    def _layer_table(self) -> str:
        header = ["packed linear", "out × in", "pattern", "outliers", "dtype", *TENSOR_NAMES, "bits/weight", "formula"]
        rows = [
            [
                layer.name,
                f"{layer.out_features} × {layer.in_features}",
                layer.pattern,
                layer.outliers or "-",
                layer.weight_dtype,
                *(str(layer.tensor_bytes.get(name, "-")) for name in TENSOR_NAMES),
                f"{layer.bits_per_weight:.3f}",
                f"{layer.formula:.3f}",
            ]
            for layer in self.layers
        ]
        return format_table(header, rows)

    def _tensor_table(self) -> str:
        rows = [
            [tensor.name, " × ".join(map(str, tensor.shape)), tensor.dtype, str(tensor.nbytes)]
            for tensor in self.tensors
        ]
        return format_table(["tensor stored as it is", "shape", "dtype", "bytes"], rows) if rows else ""

    def _total_lines(self) -> str:
        totals = self.totals()
        lines = [
            f"{totals['packed_layers']} packed linears, {totals['packed_weights']:,} weights: "
            f"{totals['packed_bytes']:,} bytes",
            f"{len(self.tensors)} other tensors: {totals['other_bytes']:,} bytes; "
            f"headers: {totals['header_bytes']:,}; in all {totals['file_bytes']:,}",
        ]
        if self.layers:
            parts = ", ".join(f"{name} {nbytes:,}" for name, nbytes in totals["packed_bytes_by_tensor"].items())
            lines[1:1] = [
                f"bytes of the packed linears: {parts}",
                f"bits per weight: {totals['bits_per_weight']:.3f} in the file, {totals['formula']:.3f} by the formula "
                f"of docs/format.md; density {totals['density']:.4f}",
            ]
        if self.onnx_bytes is not None:
            lines.append(f"model.onnx: {self.onnx_bytes:,} bytes")
        return "\n".join(lines)


def inspect_checkpoint(folder: str | Path) -> Inspection:
    """Describe a packed checkpoint from its configuration and headers alone; no weight is read.

    Raises:
        NMError: it is not a packed checkpoint, or is damaged.
    """
    checkpoint = open_checkpoint(folder)
    layers = [_layer_report(checkpoint, name) for name in checkpoint.layer_names()]
    packed = {f"{layer.name}.{tensor}" for layer in layers for tensor in layer.tensor_bytes}
    tensors = [
        TensorReport(name, location.shape, location.dtype, location.nbytes)
        for name, location in checkpoint.locations.items()
        if name not in packed
    ]
    files = {location.file for location in checkpoint.locations.values()}
    onnx_file = Path(folder) / "model.onnx"
    onnx_bytes = onnx_file.stat().st_size if onnx_file.is_file() else None
    return Inspection(str(folder), layers, tensors, sum(file.stat().st_size for file in files), onnx_bytes)


def formula_bits(config: LayerConfig, in_features: int) -> float:
    """Bits per weight as docs/format.md ("Size") has them for rows of a multiple of 256 columns."""
    pattern = config.pattern
    bits = VALUE_BITS[config.weight_dtype] * pattern.density
    if not pattern.is_dense:
        bits += 1 if config.positions == "bitmap" else pattern.code_bits / pattern.m
    if config.weight_dtype in INTEGER_DTYPES:
        bits += 16 / (in_features if config.group_size == -1 else config.group_size)
    if config.outliers is not None:
        bits += (OUTLIER_BITS[config.outlier_dtype] + 8) * config.outliers.k / config.outliers.block
    return bits


def _layer_report(checkpoint: PackedCheckpoint, name: str) -> LayerReport:
    config = checkpoint.check_layer(name)
    in_features, out_features = checkpoint.features[name]
    present = [tensor for tensor in TENSOR_NAMES if f"{name}.{tensor}" in checkpoint.locations]
    tensor_bytes = {tensor: checkpoint.locate(f"{name}.{tensor}").nbytes for tensor in present}
    outliers = 0 if config.outliers is None else config.outliers.per_row(in_features)
    kept = min(config.pattern.stored_values(in_features) + outliers, in_features)
    return LayerReport(
        name=name,
        out_features=out_features,
        in_features=in_features,
        pattern=str(config.pattern),
        outliers=None if config.outliers is None else str(config.outliers),
        weight_dtype=config.weight_dtype,
        tensor_bytes=tensor_bytes,
        density=kept / in_features,
        bits_per_weight=8 * sum(tensor_bytes.values()) / (in_features * out_features),
        formula=formula_bits(config, in_features),
    )
