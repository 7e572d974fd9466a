"""The gate of a feed-forward block as one node: SiLU of one half of what a layer gives, times the other half."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import onnx
from onnx import TensorProto, helper, numpy_helper

from .operator import DOMAIN, SWIGLU


def fuse_swiglu(graph: onnx.GraphProto) -> None:
    """Put SwiGLU in the place of Split, Sigmoid and two Mul, in place.

    Each of them is a pass over the whole; the split alone copies all of it.
    """
    fused: dict[str, onnx.NodeProto] = {}  # by the output of the node whose place it takes
    left_out: set[str] = set()
    for nodes in _gates(graph):
        split, *_, last = nodes
        fused[last.output[0]] = helper.make_node(
            SWIGLU, [split.input[0]], [last.output[0]], name=f"{split.input[0]}/{SWIGLU}", domain=DOMAIN
        )
        left_out.update(output for node in nodes[:-1] for output in node.output)
    kept = [fused.get(node.output[0], node) for node in graph.node if node.output[0] not in left_out]
    read = {name for node in kept for name in node.input}
    tensors = [tensor for tensor in graph.initializer if tensor.name in read]
    shapes = [value for value in graph.value_info if value.name not in left_out]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(kept)
    graph.initializer.extend(tensors)
    graph.value_info.extend(shapes)


def _gates(graph: onnx.GraphProto) -> Iterator[list[onnx.NodeProto]]:
    """Split, Sigmoid, Mul and Mul that compute silu(first half) · second half, and whose values nothing else reads."""
    uses = Counter(name for node in graph.node for name in node.input)
    uses.update(value.name for value in graph.output)
    readers = {name: node for node in graph.node for name in node.input if uses[name] == 1}
    sigmoids = {node.input[0]: node for node in graph.node if node.op_type == "Sigmoid"}
    sizes = {tensor.name: tensor for tensor in graph.initializer}
    for split in graph.node:
        if split.op_type != "Split" or not _halves(split, sizes):
            continue
        gate, up = split.output
        sigmoid = sigmoids.get(gate)
        silu = sigmoid and _product(readers.get(sigmoid.output[0]), gate, sigmoid.output[0])
        last = silu and _product(readers.get(silu.output[0]), silu.output[0], up)
        if sigmoid and silu and last and (uses[gate], uses[up]) == (2, 1):
            yield [split, sigmoid, silu, last]


def _halves(split: onnx.NodeProto, tensors: Mapping[str, TensorProto]) -> bool:
    """Whether it cuts the last dimension in two equal parts."""
    attributes = {attribute.name: attribute.i for attribute in split.attribute}
    if len(split.output) != 2 or attributes.get("axis", 0) != -1:
        return False
    if len(split.input) == 1:
        return True
    sizes = numpy_helper.to_array(tensors[split.input[1]]) if split.input[1] in tensors else [0, 1]
    return sizes[0] == sizes[1]


def _product(node: onnx.NodeProto | None, *factors: str) -> onnx.NodeProto | None:
    """The node, if it is the product of these two."""
    return node if node is not None and node.op_type == "Mul" and {*node.input} == {*factors} else None


def swiglu_function(opset: int) -> onnx.FunctionProto:
    """SwiGLU of standard operators, for runtimes without the library, in a model of this opset, at least 18."""
    nodes = [
        helper.make_node("Split", ["X"], ["gate", "up"], axis=-1, num_outputs=2),
        helper.make_node("Sigmoid", ["gate"], ["sigmoid"]),
        helper.make_node("Mul", ["gate", "sigmoid"], ["silu"]),
        helper.make_node("Mul", ["silu", "up"], ["Y"]),
    ]
    return helper.make_function(DOMAIN, SWIGLU, ["X"], ["Y"], nodes, [helper.make_opsetid("", opset)])
