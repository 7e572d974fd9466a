"""Layers that read the same values as one node, where the checkpoint stores their rows next to each other."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .operator import is_matmul_nm

ATTENTION = "GroupQueryAttention"


def join_projections(graph: onnx.GraphProto) -> None:
    """Multiply once by all packed matrices that read the same values and lie side by side, in place.

    One node starts its threads once, and rounds what it reads to int8 once; each of several has too few rows to keep
    threads busy for long. Attention reads query, key and value as they come out of it, all else its part of a Split.
    """
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    uses = Counter(name for node in graph.node for name in node.input)
    attentions = {tuple(node.input[:3]): node for node in graph.node if node.op_type == ATTENTION}
    instead: dict[str, list[onnx.NodeProto]] = {}  # of the node with this output
    for parts, inputs in _adjacent(graph.node, tensors):
        outputs = [part.output[0] for part in parts]
        nodes = [_joined_node(parts, inputs)]
        attention = attentions.get(tuple(outputs))
        if attention is not None and all(uses[output] == 1 for output in outputs):
            attention.input[:3] = [nodes[0].output[0], "", ""]
        else:
            rows = numpy_helper.from_array(np.array([_rows(part) for part in parts]))
            rows.name = f"rows_{'_'.join(str(_rows(part)) for part in parts)}"
            tensors[rows.name] = rows
            nodes.append(helper.make_node("Split", [nodes[0].output[0], rows.name], outputs, axis=-1))
        first = next(node.output[0] for node in graph.node if node.output[0] in outputs)
        tensors |= {tensor.name: tensor for tensor in inputs}
        instead |= {output: nodes if output == first else [] for output in outputs}
    kept = [new for node in graph.node for new in instead.get(node.output[0], [node])]
    read = {name for node in kept for name in node.input}
    written = {name for node in kept for name in node.output}
    shapes = [value for value in graph.value_info if value.name in written]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(kept)
    graph.initializer.extend(tensor for name, tensor in tensors.items() if name in read)
    graph.value_info.extend(shapes)


def _adjacent(
    nodes: Sequence[onnx.NodeProto], tensors: Mapping[str, TensorProto]
) -> Iterator[tuple[list[onnx.NodeProto], list[TensorProto]]]:
    """MatMulNM nodes that are rows of one matrix, in their order, and the inputs of the node that multiplies by it."""
    readers = defaultdict(list)
    for node in nodes:
        if is_matmul_nm(node):
            readers[node.input[0]].append(node)
    for same in readers.values():
        parts: list[onnx.NodeProto] = []
        joined: list[TensorProto] = []
        for node in sorted(same, key=lambda node: _place(tensors[node.input[1]])):
            inputs = _joined_inputs([*parts, node], tensors)
            if inputs is None and len(parts) > 1:
                yield parts, joined
            parts, joined = ([node], []) if inputs is None else ([*parts, node], inputs)
        if len(parts) > 1:
            yield parts, joined


def _joined_inputs(nodes: Sequence[onnx.NodeProto], tensors: Mapping[str, TensorProto]) -> list[TensorProto] | None:
    """What the joined node multiplies by, or None if the nodes are not rows of one matrix."""
    settings = [sorted(a.SerializeToString() for a in node.attribute if a.name != "N") for node in nodes]
    if any(setting != settings[0] for setting in settings):
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
    next(attribute for attribute in node.attribute if attribute.name == "N").i = sum(map(_rows, nodes))
    return node


def _rows(node: onnx.NodeProto) -> int:
    return helper.get_node_attr_value(node, "N")


def _joined_rows(tensors: Sequence[TensorProto]) -> TensorProto | None:
    """One initializer for the rows of several, or None if they do not follow each other in one file."""
    first = tensors[0]
    if all(0 in tensor.dims for tensor in tensors):  # absent
        return first
    kinds = {(tensor.data_type, *tensor.dims[1:]) for tensor in tensors}
    if len(kinds) > 1 or any(tensor.data_location != TensorProto.EXTERNAL for tensor in tensors):
        return None
    location, start = _place(first)
    end = start
    for tensor in tensors:
        if _place(tensor) != (location, end):
            return None
        end += int(_external(tensor)["length"])
    joined = TensorProto(name="+".join(tensor.name for tensor in tensors), data_type=first.data_type)
    joined.dims.extend([sum(tensor.dims[0] for tensor in tensors), *first.dims[1:]])
    joined.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", start), ("length", end - start)):
        joined.external_data.add(key=key, value=str(value))
    return joined


def _place(tensor: TensorProto) -> tuple[str, int]:
    """File and first byte."""
    entries = _external(tensor)
    return entries.get("location", ""), int(entries.get("offset", 0))


def _external(tensor: TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}
