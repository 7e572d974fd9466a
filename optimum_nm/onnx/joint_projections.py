"""Query, key and value projections as one node, where the checkpoint stores their rows next to each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import onnx
from onnx import TensorProto, helper

from .operator import is_matmul_nm

ATTENTION = "GroupQueryAttention"


def join_projections(graph: onnx.GraphProto) -> None:
    """Let GroupQueryAttention read one MatMulNM in place of three, in place, wherever nothing stands between them.

    One node starts its threads once; each of the three has too few rows to keep them busy for long.
    """
    uses = Counter(name for node in graph.node for name in node.input)
    producers = {output: node for node in graph.node for output in node.output if is_matmul_nm(node)}
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    joined: dict[str, onnx.NodeProto] = {}  # by the name of the first node's output
    left_out = set()
    for attention in graph.node:
        projections = list(attention.input[:3])
        if attention.op_type != ATTENTION or any(uses[name] > 1 or name not in producers for name in projections):
            continue
        nodes = [producers[name] for name in projections]
        inputs = _joined_inputs(nodes, tensors)
        if inputs is None:
            continue
        tensors |= {tensor.name: tensor for tensor in inputs}
        joined[projections[0]] = _joined_node(nodes, inputs)
        left_out.update(projections[1:])
        attention.input[:3] = [*joined[projections[0]].output, "", ""]
    kept = [joined.get(node.output[0], node) for node in graph.node if node.output[0] not in left_out]
    used = {name for node in kept for name in node.input}
    shapes = [value for value in graph.value_info if value.name not in {*joined, *left_out}]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.value_info.extend(shapes)
    graph.node.extend(kept)
    graph.initializer.extend(tensor for name, tensor in tensors.items() if name in used)


def _joined_inputs(nodes: Sequence[onnx.NodeProto], tensors: dict[str, TensorProto]) -> list[TensorProto] | None:
    """What the joined node multiplies by, or None if the nodes are not rows of one matrix."""
    settings = [sorted(a.SerializeToString() for a in node.attribute if a.name != "N") for node in nodes]
    if any(node.input[0] != nodes[0].input[0] for node in nodes) or any(s != settings[0] for s in settings):
        return None
    columns = zip(*([tensors[name] for name in node.input[1:]] for node in nodes), strict=True)
    inputs = [_joined_rows(column) for column in columns]
    return None if None in inputs else [tensor for tensor in inputs if tensor is not None]


def _joined_node(nodes: Sequence[onnx.NodeProto], inputs: list[TensorProto]) -> onnx.NodeProto:
    node = onnx.NodeProto()
    node.CopyFrom(nodes[0])
    node.output[0] += "_joined"
    del node.input[1:]
    node.input.extend(tensor.name for tensor in inputs)
    rows = [helper.get_node_attr_value(each, "N") for each in nodes]
    next(attribute for attribute in node.attribute if attribute.name == "N").i = sum(rows)
    return node


def _joined_rows(tensors: Sequence[TensorProto]) -> TensorProto | None:
    """One initializer for the rows of several, or None if they do not follow each other in one file."""
    first = tensors[0]
    if all(tensor.name == first.name for tensor in tensors):  # absent
        return first
    kinds = {(tensor.data_type, *tensor.dims[1:]) for tensor in tensors}
    if len(kinds) > 1 or any(tensor.data_location != TensorProto.EXTERNAL for tensor in tensors):
        return None
    places = [{entry.key: entry.value for entry in tensor.external_data} for tensor in tensors]
    end = int(places[0]["offset"])
    for place in places:
        if place["location"] != places[0]["location"] or int(place["offset"]) != end:
            return None
        end += int(place["length"])
    tensor = TensorProto(name="+".join(tensor.name for tensor in tensors), data_type=first.data_type)
    tensor.dims.extend([sum(each.dims[0] for each in tensors), *first.dims[1:]])
    tensor.data_location = TensorProto.EXTERNAL
    start = int(places[0]["offset"])
    for key, value in (("location", places[0]["location"]), ("offset", start), ("length", end - start)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor
