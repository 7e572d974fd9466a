"""The constant matrices that MatMul and Gemm nodes of a graph multiply by, read a few rows at a time."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from ..errors import NMError
from ..packing.row_blocks import row_blocks
from ..packing.values import all_finite
from ..patterns import NMPattern

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class Product:
    """A node that multiplies by a constant matrix, and the bias that can be added in the same step.

    Attributes:
        node: a MatMul or Gemm.
        last: the node whose output the product with its bias is: `node`, or the Add behind it.
        bias: constant, one element per output feature, or None.
        bias_factor: what the bias is multiplied by, Gemm's beta.
    """

    node: ir.Node
    last: ir.Node
    bias: ir.Value | None = None
    bias_factor: float = 1.0


@dataclass
class ConstantWeight:
    """A constant matrix, and all nodes that multiply by it in one way.

    Attributes:
        name: of the module it belongs to, as far as the file tells; unique among the weights of a graph.
        value: initializer, or output of a Constant node.
        transposed: the constant is `[in_features, out_features]`.
        factor: what the constant is multiplied by, Gemm's alpha.
        keep: why it stays as it is, in words; empty if nothing speaks against packing.
    """

    name: str
    value: ir.Value
    transposed: bool
    factor: float
    products: list[Product] = field(default_factory=list)
    keep: str = ""

    @property
    def tensor(self) -> ir.TensorProtocol:
        tensor = constant_tensor(self.value)
        assert tensor is not None
        return tensor

    @property
    def in_features(self) -> int:
        return self.tensor.shape.numpy()[0 if self.transposed else 1]

    @property
    def out_features(self) -> int:
        return self.tensor.shape.numpy()[1 if self.transposed else 0]

    @property
    def names(self) -> list[str]:
        """All that a user may call it by: the module, the tensor, the nodes."""
        names = [self.name, self.value.name, *(product.node.name for product in self.products)]
        return [name for name in dict.fromkeys(names) if name]

    def __str__(self) -> str:
        nodes = ", ".join(repr(product.node.name) for product in self.products)
        return f"weight {self.value.name!r} of node {nodes}"

    def blocks(self) -> Iterator[Tensor]:
        """The weight, float32 `[out_features, in_features]`, some rows at a time, each a copy.

        Raises:
            NMError: an element is not finite.
        """
        array = self.tensor.numpy()
        try:
            for rows in row_blocks(self.out_features, self.in_features):
                block = _float32(array[:, rows].T if self.transposed else array[rows])
                if not all_finite(block):
                    raise NMError(f"{self} has elements that are not finite; every element must be a finite number.")
                yield block * self.factor
        finally:
            del array
            _unmap(self.tensor)

    def misfit(self, pattern: NMPattern) -> str:
        """Where more than N of M consecutive inputs are kept, in words; empty if nowhere.

        Raises:
            NMError: as `blocks`.
        """
        first = 0
        for block in self.blocks():
            groups = pattern.groups(self.in_features)
            kept = torch.nn.functional.pad(block != 0, (0, groups * pattern.m - self.in_features))
            counts = kept.view(len(block), groups, pattern.m).sum(dim=-1)
            wrong = (counts > pattern.n).nonzero()
            if len(wrong):
                row, group = wrong[0].tolist()
                width = min(pattern.m, self.in_features - group * pattern.m)
                return f"keeps {counts[row, group]} of {width} in row {first + row}, group {group}"
            first += len(block)
        return ""


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer that no caller can replace, or of a Constant node."""
    if value is None:
        return None
    producer = value.producer()
    if producer is None:
        return value.const_value if value.is_initializer() and not value.is_graph_input() else None
    if producer.op_type == "Constant" and producer.domain == "" and "value" in producer.attributes:
        return producer.attributes["value"].as_tensor()
    return None


def read_vector(tensor: ir.TensorProtocol) -> Tensor:
    """A small tensor's elements, float32 and one-dimensional, a copy."""
    vector = _float32(tensor.numpy()).flatten()
    _unmap(tensor)
    return vector


def _float32(array: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))


def _unmap(tensor: ir.TensorProtocol) -> None:
    """Close the file behind an external tensor, whose mapping would else last as long as the model."""
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()


def constant_weights(graph: ir.Graph) -> list[ConstantWeight]:
    """Every float matrix that is constant and that a MatMul or Gemm multiplies by, subgraphs included, in node order.

    Those that cannot be packed say why in `keep`: a node computes something else with the matrix, as the lookup of a
    tied embedding does, or the Gemm is not one of a linear layer.
    """
    weights: dict[tuple[ir.Value, bool, float], ConstantWeight] = {}
    names: set[str] = set()
    for node in ir.traversal.RecursiveGraphIterator(graph):
        if node.domain != "" or node.op_type not in ("MatMul", "Gemm"):
            continue
        source = _constant_matrix(node.inputs[1])
        if source is None:
            continue
        value, transposed = source
        attributes = node.attributes
        if not attributes.get_int("transB", 0):
            transposed = not transposed
        key = (value, transposed, attributes.get_float("alpha", 1.0))
        if key not in weights:
            name = unique_name(_module_name(node, value), names)
            weights[key] = ConstantWeight(name, *key)
        weight = weights[key]
        weight.products.append(_product(node, weight.out_features))
        weight.keep = weight.keep or _not_linear(node, weight.out_features)
    multiplied = {product.node for weight in weights.values() for product in weight.products}
    for weight in weights.values():
        others = [node for node, index in _uses(weight.value) if index != 1 or node not in multiplied]
        if others:
            weight.keep = f"{others[0].op_type} uses it too"
        elif weight.value.is_graph_output():
            weight.keep = "it is an output of the graph"
    return list(weights.values())


def _constant_matrix(value: ir.Value | None) -> tuple[ir.Value, bool] | None:
    """The constant behind a value, and whether the value is its transpose; None if there is no float matrix."""
    transposed = False
    while value is not None and (producer := _passes_on(value)) is not None:
        transposed ^= producer.op_type == "Transpose"
        value = producer.inputs[0]
    tensor = constant_tensor(value)
    if value is None or tensor is None or tensor.dtype not in FLOATS:
        return None
    shape = tensor.shape.numpy()
    return (value, transposed) if len(shape) == 2 and math.prod(shape) > 0 else None


def _passes_on(value: ir.Value) -> ir.Node | None:
    """The node that gives a value with the same elements as its input: Identity, Transpose, Cast to float32."""
    node = value.producer()
    if node is None or node.domain != "" or node.op_type not in ("Identity", "Transpose", "Cast"):
        return None
    if node.op_type == "Transpose" and list(node.attributes.get_ints("perm", (1, 0))) != [1, 0]:
        return None
    if node.op_type == "Cast" and node.attributes.get_int("to", 0) != ir.DataType.FLOAT:
        return None
    return node


def _uses(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Who reads a value in the end, behind nodes that pass it on, and as which input."""
    for node, index in value.uses():
        output = node.outputs[0]
        if index == 0 and not output.is_graph_output() and _passes_on(output) is node:
            yield from _uses(output)
        else:
            yield node, index


def _not_linear(node: ir.Node, out_features: int) -> str:
    """Why MatMulNM cannot stand for a node, in words; empty if it can."""
    if node.attributes.get_int("transA", 0):
        return "Gemm transposes its other factor"
    bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    if bias is not None and not _is_row(constant_tensor(bias), (1, out_features)):
        return "Gemm adds what is no constant row"
    return ""


def _is_row(tensor: ir.TensorProtocol | None, lengths: tuple[int, ...]) -> bool:
    if tensor is None or tensor.dtype not in FLOATS:
        return False
    shape = (1, *tensor.shape.numpy())
    return math.prod(shape[:-1]) == 1 and shape[-1] in lengths


def _product(node: ir.Node, out_features: int) -> Product:
    if node.op_type == "Gemm":
        beta = node.attributes.get_float("beta", 1.0)
        return Product(node, node, node.inputs[2] if len(node.inputs) > 2 and beta != 0 else None, beta)
    output = node.outputs[0]
    uses = list(output.uses())
    if len(uses) == 1 and not output.is_graph_output():
        ((add, index),) = uses
        bias = add.inputs[1 - index] if (add.domain, add.op_type, add.graph) == ("", "Add", node.graph) else None
        tensor = constant_tensor(bias)
        # a bias of more dimensions than the product would give its own to the sum
        if tensor is not None and tensor.shape.rank() == 1 and _is_row(tensor, (out_features,)):
            return Product(node, add, bias)
    return Product(node, node)


def _module_name(node: ir.Node, value: ir.Value) -> str:
    """`model.layers.0.mlp.up_proj`, from what the exporter wrote down: scopes, a path, or the tensor's name."""
    if scopes := _scopes(node, "pkg.torch.onnx.name_scopes"):  # "", "mlp", "mlp.up_proj", "linear_1"
        name = scopes[-2]
    elif scopes := _scopes(node, "pkg.onnxscript.name_scopes"):  # "", "mlp", "up_proj"
        name = ".".join(scopes[1:])
    else:
        name = ".".join((node.name or "").strip("/").split("/")[:-1])  # /mlp/up_proj/MatMul
    tensor = value.name or ""
    return name or (tensor.removesuffix(".weight") if tensor.endswith(".weight") else node.name or tensor)


def _scopes(node: ir.Node, key: str) -> list[str]:
    try:
        scopes = ast.literal_eval(node.metadata_props.get(key, "[]"))
    except (SyntaxError, ValueError):
        return []
    return [str(scope) for scope in scopes] if isinstance(scopes, list) and len(scopes) > 1 else []


def unique_name(name: str, taken: set[str]) -> str:
    """`name`, with a number behind it if it is among `taken`; it is from then on."""
    numbered, count = name, 1
    while numbered in taken:
        count += 1
        numbered = f"{name}_{count}"
    taken.add(numbered)
    return numbered
