"""Chains of matrix products as ONNX models, one for each way to multiply: what the kernel benchmark runs.

A chain has as many different weights as it takes to overflow the processor's caches, so that each is read from memory
as in a model. K×N with K ≠ N alternates with N×K. Weights are random but valid: 8:16 tensors are what docs/format.md
asks for. Chains that multiply by the same tensors share their files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper

from ..config import LayerConfig
from ..onnx.external_data import external_initializer
from ..onnx.operator import DOMAIN, OPERATOR, VERSION, node_attributes, packed_inputs
from ..packing.codes import pack_fields, unrank_masks
from ..packing.safetensors_files import TensorLocation
from ..packing.values import LARGEST, pack_integers
from ..patterns import NMPattern, OutlierPattern

PATTERN = NMPattern(8, 16)
OUTLIERS = OutlierPattern(16, 256)
GROUP_SIZE = 128
_MICROSOFT = "com.microsoft"
_PAGE = 4096
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Input:
    """A constant input of a kernel's node: which of RandomLayer's tensors, as what ONNX type and shape."""

    source: str
    element_type: int
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        bits = {TensorProto.FLOAT: 32, TensorProto.FLOAT16: 16, TensorProto.BFLOAT16: 16}.get(self.element_type, 8)
        return math.prod(self.shape) * bits // 8


@dataclass(frozen=True)
class Kernel:
    """One way to multiply activations by a weight.

    Attributes:
        rivals: the dense kernels that a user would run instead, of as many bits a value; none for the dense ones.
        node: operator, domain and attributes for a weight of (in_features, out_features).
        inputs: its constant inputs, in the operator's order.
    """

    name: str
    rivals: tuple[str, ...]
    node: Callable[[int, int], tuple[str, str, dict[str, Any]]]
    inputs: Callable[[int, int], dict[str, Input]]

    def layer_bytes(self, in_features: int, out_features: int) -> int:
        return sum(tensor.nbytes for tensor in self.inputs(in_features, out_features).values())

    def chain_length(self, in_features: int, out_features: int, chain_bytes: int) -> int:
        """Weights of a chain: at least `chain_bytes` of them, and two."""
        return max(2, -(-chain_bytes // self.layer_bytes(in_features, out_features)))


def kernels() -> dict[str, Kernel]:
    """Every kernel by its name, the dense ones of ONNX Runtime first."""
    dense = [_matmul(), _dynamic(), *(_nbits(bits, block) for bits, block in ((8, 128), (4, 128), (4, 32)))]
    rivals = {
        "int8": (dense[1].name, dense[2].name),
        "int4": (dense[3].name, dense[4].name),
    }
    packed = [
        _packed(dtype, positions, outliers, level, rivals.get(dtype, (dense[0].name,)))
        for dtype in ("float32", "float16", "bfloat16", "int8", "int4")
        for level in ((4, 0) if dtype in rivals else (0,))
        for positions in ("codes", "bitmap")
        for outliers in (None, OUTLIERS)
    ]
    return {kernel.name: kernel for kernel in (*dense, *packed)}


def write_chains(
    folder: Path, chosen: list[Kernel], in_features: int, out_features: int, chain_bytes: int
) -> dict[str, Path]:
    """An ONNX model `x [rows, K] → y` for each kernel, in `folder`, with its weights in files beside it."""
    lengths = {kernel.name: kernel.chain_length(in_features, out_features, chain_bytes) for kernel in chosen}
    shapes = [(in_features, out_features), (out_features, in_features)]
    sources = [
        RandomLayer(*shape, seed) for seed, shape in enumerate(shapes[: 1 if in_features == out_features else 2])
    ]
    copies: dict[tuple[int, str], int] = {}
    for kernel in chosen:
        for layer in range(lengths[kernel.name]):
            which, copy = layer % len(sources), layer // len(sources)
            for tensor in kernel.inputs(*shapes[which]).values():
                key = (which, tensor.source)
                if tensor.source:
                    copies[key] = max(copies.get(key, 0), copy + 1)
    locations = {
        (which, name): _write(folder / f"{in_features}x{out_features}-{which}-{name}.bin", sources[which], name, count)
        for (which, name), count in copies.items()
    }
    paths = {}
    for index, kernel in enumerate(chosen):
        nodes, tensors = [], []
        for layer in range(lengths[kernel.name]):
            which, copy = layer % len(sources), layer // len(sources)
            operator, domain, attributes = kernel.node(*shapes[which])
            names = []
            for name, tensor in kernel.inputs(*shapes[which]).items():
                names.append(f"layer{layer}.{name}")
                if not tensor.source:
                    tensors.append(helper.make_tensor(names[-1], tensor.element_type, (0,), b"", raw=True))
                    continue
                location = locations[which, tensor.source][copy]
                tensors.append(external_initializer(names[-1], location, tensor.element_type, tensor.shape))
            output = "y" if layer == lengths[kernel.name] - 1 else f"h{layer + 1}"
            inputs = [f"h{layer}" if layer else "x", *names]
            nodes.append(helper.make_node(operator, inputs, [output], f"layer{layer}", domain=domain, **attributes))
        last = shapes[(lengths[kernel.name] - 1) % len(sources)][1]
        paths[kernel.name] = folder / f"{in_features}x{out_features}-kernel{index}.onnx"
        onnx.save(_model(nodes, tensors, in_features, last), paths[kernel.name])
    return paths


def _model(nodes: list[onnx.NodeProto], tensors: list[TensorProto], inputs: int, outputs: int) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    x, y = (value(name, TensorProto.FLOAT, ["rows", size]) for name, size in (("x", inputs), ("y", outputs)))
    opsets = [helper.make_opsetid(*opset) for opset in (("", 17), (_MICROSOFT, 1), (DOMAIN, VERSION))]
    return helper.make_model(helper.make_graph(nodes, "chain", [x], [y], tensors), opset_imports=opsets, ir_version=8)


def _write(file: Path, source: RandomLayer, name: str, count: int) -> list[TensorLocation]:
    """`count` copies of a tensor in one file, each with its output rows in another order."""
    tensor, outputs_axis = source.tensor(name)
    stride = -(-tensor.nbytes // _PAGE) * _PAGE
    with file.open("wb") as stream:
        for copy in range(count):
            stream.seek(copy * stride)
            stream.write(np.roll(tensor, 37 * copy, axis=outputs_axis).tobytes())
        stream.truncate(count * stride)
    return [TensorLocation(file, copy * stride, tensor.nbytes, "U8", (tensor.nbytes,)) for copy in range(count)]


# ----------------------------------------------------------------------------------------------------------------------
# The kernels.


def _packed(
    dtype: str, positions: str, outliers: OutlierPattern | None, accuracy_level: int, rivals: tuple[str, ...]
) -> Kernel:
    config = LayerConfig(PATTERN, outliers, dtype, GROUP_SIZE, positions, "float16")
    sources = {
        "values": f"{dtype}.values",
        "positions": positions,
        "scales": f"{dtype}.scales",
        "outlier_values": "outlier_values",
        "outlier_positions": "outlier_positions",
    }

    def node(in_features: int, out_features: int) -> tuple[str, str, dict[str, Any]]:
        return OPERATOR, DOMAIN, node_attributes(in_features, out_features, config, accuracy_level)

    def inputs(in_features: int, out_features: int) -> dict[str, Input]:
        return {
            name: Input(sources[name] if 0 not in shape else "", element_type, shape)
            for name, (shape, element_type) in packed_inputs(in_features, out_features, config).items()
        }

    name = f"{PATTERN} {dtype} {positions}" + (f" + {outliers}" if outliers else "")
    if dtype in ("int8", "int4") and accuracy_level == 0:
        name += ", accuracy level 0"
    return Kernel(name, rivals, node, inputs)


def _matmul() -> Kernel:
    return Kernel(
        "MatMul float32",
        (),
        lambda k, n: ("MatMul", "", {}),
        lambda k, n: {"B": Input("dense.float32", TensorProto.FLOAT, (k, n))},
    )


def _dynamic() -> Kernel:
    return Kernel(
        "DynamicQuantizeMatMul int8",
        (),
        lambda k, n: ("DynamicQuantizeMatMul", _MICROSOFT, {}),
        lambda k, n: {
            "B": Input("dense.int8", TensorProto.INT8, (k, n)),
            "b_scale": Input("dense.int8.scales", TensorProto.FLOAT, (n,)),
        },
    )


def _nbits(bits: int, block: int) -> Kernel:
    def node(k: int, n: int) -> tuple[str, str, dict[str, Any]]:
        return "MatMulNBits", _MICROSOFT, {"K": k, "N": n, "bits": bits, "block_size": block, "accuracy_level": 4}

    def inputs(k: int, n: int) -> dict[str, Input]:
        blocks = -(-k // block)
        source = f"nbits.{bits}.{block}"
        return {
            "B": Input(source, TensorProto.UINT8, (n, blocks, block * bits // 8)),
            "scales": Input(f"{source}.scales", TensorProto.FLOAT, (n * blocks,)),
        }

    return Kernel(f"MatMulNBits {bits}-bit block {block}", (), node, inputs)


# ----------------------------------------------------------------------------------------------------------------------
# Random weights.


class RandomLayer:
    """Tensors of a random weight `[out_features, in_features]` in every form that a kernel reads.

    Products keep the variance of what they multiply, so that no chain overflows.
    """

    def __init__(self, in_features: int, out_features: int, seed: int = 0) -> None:
        self.in_features = in_features
        self.out_features = out_features
        self._random = np.random.default_rng(seed)

    def tensor(self, name: str) -> tuple[Array, int]:
        """The tensor that an Input names, and its axis of output features."""
        form, _, part = name.partition(".")
        if form == "dense":
            return self._dense(part)
        if form == "nbits":
            return self._nbits(part), 0
        if name == "codes":
            return pack_fields(self._ranks, PATTERN.code_bits), 0
        if name == "bitmap":
            return np.packbits(self._kept, axis=-1, bitorder="little"), 0
        if name == "outlier_positions":
            return (self._outlier_columns % OUTLIERS.block).astype(np.uint8), 0
        if name == "outlier_values":
            return self._normal(self._outlier_columns.shape, self._deviation).astype(np.float16), 0
        return (self._scales(form) if part == "scales" else self._values(form)), 0

    @property
    def _deviation(self) -> float:
        """Of base and outlier values."""
        return (self.in_features * (PATTERN.density + OUTLIERS.k / OUTLIERS.block)) ** -0.5

    def _normal(self, shape: tuple[int, ...], deviation: float) -> npt.NDArray[np.float32]:
        values = self._random.standard_normal(shape, dtype=np.float32)
        values *= np.float32(deviation)
        return values

    @cached_property
    def _ranks(self) -> npt.NDArray[np.int64]:
        shape = (self.out_features, PATTERN.groups(self.in_features))
        return self._random.integers(0, math.comb(PATTERN.m, PATTERN.n), shape)

    @cached_property
    def _kept(self) -> npt.NDArray[np.bool_]:
        masks = unrank_masks(np.arange(math.comb(PATTERN.m, PATTERN.n)), PATTERN)
        return masks[self._ranks].reshape(self.out_features, -1)

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
            return pack_integers(torch.from_numpy(q), dtype).numpy()
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
