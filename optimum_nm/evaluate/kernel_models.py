"""Chains of matrix products as ONNX models, one for each way to multiply: what the kernel benchmark runs.

A chain has as many different weights as it takes to overflow the processor's caches, so that each is read from memory
as in a model. K×N with K ≠ N alternates with N×K. Chains that multiply by the same tensors share their files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from ..config import LayerConfig
from ..onnx.external_data import external_initializer
from ..onnx.operator import DOMAIN, OPERATOR, VERSION, node_attributes, packed_inputs
from ..packing.safetensors_files import TensorLocation
from ..patterns import NMPattern, OutlierPattern
from .kernel_weights import GROUP_SIZE, OUTLIERS, RandomLayer

_MICROSOFT = "com.microsoft"
_PAGE = 4096
_BITS: dict[int, int] = {
    TensorProto.FLOAT: 32,
    TensorProto.FLOAT16: 16,
    TensorProto.BFLOAT16: 16,
    TensorProto.INT8: 8,
    TensorProto.UINT8: 8,
}


@dataclass(frozen=True)
class Input:
    """A constant input of a kernel's node: which of RandomLayer's tensors, as what ONNX type and shape."""

    source: str
    element_type: int
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _BITS[self.element_type] // 8


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


def kernels(pattern: NMPattern) -> dict[str, Kernel]:
    """Every kernel by its name, the dense ones of ONNX Runtime first, then those of a pattern."""
    dense = [_matmul(), _dynamic(), *(_nbits(bits, block) for bits, block in ((8, 128), (4, 128), (4, 32)))]
    rivals = {
        "int8": (dense[1].name, dense[2].name),
        "int4": (dense[3].name, dense[4].name),
    }
    packed = [
        _packed(pattern, dtype, positions, outliers, level, rivals.get(dtype, (dense[0].name,)))
        for dtype in ("float32", "float16", "bfloat16", "int8", "int4")
        for level in ((4, 0) if dtype in rivals else (0,))
        for positions in (("bitmap",) if pattern.is_dense else ("codes", "bitmap"))
        for outliers in ((None,) if pattern.is_dense else (None, OUTLIERS))
    ]
    return {kernel.name: kernel for kernel in (*dense, *packed)}


def write_chains(
    folder: Path, chosen: list[Kernel], pattern: NMPattern, in_features: int, out_features: int, chain_bytes: int
) -> dict[str, Path]:
    """An ONNX model `x [rows, K] → y` for each kernel, in `folder`, with its weights in files beside it.

    Args:
        pattern: that of the sparse ones among the kernels.
    """
    lengths = {kernel.name: kernel.chain_length(in_features, out_features, chain_bytes) for kernel in chosen}
    shapes = [(in_features, out_features), (out_features, in_features)]
    sources = [
        RandomLayer(*shape, pattern, seed)
        for seed, shape in enumerate(shapes[: 1 if in_features == out_features else 2])
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
    pattern: NMPattern,
    dtype: str,
    positions: str,
    outliers: OutlierPattern | None,
    accuracy_level: int,
    rivals: tuple[str, ...],
) -> Kernel:
    config = LayerConfig(pattern, outliers, dtype, GROUP_SIZE, positions, "float16")
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

    name = f"{pattern} {dtype}" + ("" if pattern.is_dense else f" {positions}") + (f" + {outliers}" if outliers else "")
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
