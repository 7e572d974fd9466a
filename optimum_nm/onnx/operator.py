"""The operators MatMulNM and SwiGLU (docs/operator.md): names, attributes, element types, nodes and ONNX schemas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
from onnx import TensorProto, defs, helper

from ..config import LayerConfig
from ..packing.packed_weight import packed_shapes

DOMAIN = "optimum.nm"
OPERATOR = "MatMulNM"
SWIGLU = "SwiGLU"
VERSION = 1
INPUT_NAMES = ("A", "values", "positions", "scales", "outlier_values", "outlier_positions", "bias")
ATTRIBUTE_TYPES = {
    "K": int,
    "N": int,
    "n": int,
    "m": int,
    "dtype": str,
    "positions": str,
    "group_size": int,
    "outlier_k": int,
    "outlier_block": int,
    "accuracy_level": int,
}
_ELEMENT_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int8": TensorProto.UINT8,
    "int4": TensorProto.UINT8,
}


def node_attributes(
    in_features: int, out_features: int, config: LayerConfig, accuracy_level: int = 0
) -> dict[str, int | str]:
    """Attributes of the node that multiplies by a packed `[out_features, in_features]` weight."""
    return {
        "K": in_features,
        "N": out_features,
        "n": config.pattern.n,
        "m": config.pattern.m,
        "dtype": config.weight_dtype,
        "positions": config.positions,
        "group_size": config.group_size,
        "outlier_k": 0 if config.outliers is None else config.outliers.k,
        "outlier_block": 0 if config.outliers is None else config.outliers.block,
        "accuracy_level": accuracy_level,
    }


def packed_inputs(
    in_features: int, out_features: int, config: LayerConfig
) -> dict[str, tuple[tuple[int, ...], TensorProto.DataType]]:
    """ONNX shape and element type of the inputs values … outlier_positions; the bytes are the checkpoint's own.

    A tensor that the weight has not is an empty one, shape `(0,)`: ONNX Runtime cannot skip an input in the middle.
    """
    types = {
        "values": _ELEMENT_TYPES[config.weight_dtype],
        "positions": TensorProto.UINT8,
        "scales": TensorProto.FLOAT16,
        "outlier_values": _ELEMENT_TYPES[config.outlier_dtype],
        "outlier_positions": TensorProto.UINT8,
    }
    present = packed_shapes(in_features, out_features, config)
    return {name: (present[name][0] if name in present else (0,), element) for name, element in types.items()}


def matmul_nm_node(
    inputs: Sequence[str],
    output: str,
    in_features: int,
    out_features: int,
    config: LayerConfig,
    accuracy_level: int = 0,
    name: str | None = None,
) -> onnx.NodeProto:
    """A MatMulNM node. `inputs` names all seven of INPUT_NAMES: the fallback function needs each, empty or not."""
    if len(inputs) != len(INPUT_NAMES):
        raise ValueError(f"{len(inputs)} inputs are given; MatMulNM nodes are written with {len(INPUT_NAMES)}")
    attributes: dict[str, Any] = node_attributes(in_features, out_features, config, accuracy_level)
    return helper.make_node(OPERATOR, list(inputs), [output], name=name, domain=DOMAIN, **attributes)


def is_matmul_nm(node: onnx.NodeProto) -> bool:
    return node.domain == DOMAIN and node.op_type == OPERATOR


def operator_schemas() -> list[defs.OpSchema]:
    """The operators as the `onnx` package describes its own."""
    return [_matmul_nm_schema(), _swiglu_schema()]


def _matmul_nm_schema() -> defs.OpSchema:
    parameter, optional = defs.OpSchema.FormalParameter, defs.OpSchema.FormalParameterOption.Optional
    types = {
        "A": ("T", "activations [..., K]"),
        "values": ("TV", "stored values of the base"),
        "positions": ("tensor(uint8)", "kept columns of each group, as codes or bitmaps"),
        "scales": ("tensor(float16)", "scale of each row and column group"),
        "outlier_values": ("TO", "values outside the N:M budget"),
        "outlier_positions": ("tensor(uint8)", "their columns inside their block"),
        "bias": ("TB", "[N]"),
    }
    inputs = [
        parameter(name, type_name, text) if i < 3 else parameter(name, type_name, text, param_option=optional)
        for i, (name, (type_name, text)) in enumerate(types.items())
    ]
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
    attribute_types = {int: defs.OpSchema.AttrType.INT, str: defs.OpSchema.AttrType.STRING}
    attributes = [
        defs.OpSchema.Attribute(name, attribute_types[kind], name, required=True)
        for name, kind in ATTRIBUTE_TYPES.items()
    ]
    return defs.OpSchema(
        OPERATOR,
        DOMAIN,
        VERSION,
        "Y = A · Wᵀ + bias, W an N:M sparse weight in the packed format of optimum-nm.",
        inputs=inputs,
        outputs=[parameter("Y", "T", "[..., N]")],
        type_constraints=[
            ("T", floats, "activations"),
            ("TV", [*floats, "tensor(uint8)"], "values"),
            ("TO", ["tensor(float)", "tensor(float16)"], "outliers"),
            ("TB", floats, "bias"),
        ],
        attributes=attributes,
    )


def _swiglu_schema() -> defs.OpSchema:
    parameter = defs.OpSchema.FormalParameter
    return defs.OpSchema(
        SWIGLU,
        DOMAIN,
        VERSION,
        "Y = silu(gate) · up, where X [..., 2I] is gate [..., I] followed by up [..., I].",
        inputs=[parameter("X", "tensor(float)", "gate and up [..., 2I]")],
        outputs=[parameter("Y", "tensor(float)", "[..., I]")],
    )
