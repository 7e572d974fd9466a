"""MatMulNM nodes in the place of the MatMul and Gemm nodes that multiply by a constant matrix."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ..config import LayerConfig
from ..errors import NMError
from ..packing.packed_weight import PackedWeight
from .constant_weights import ConstantWeight, Product, constant_tensor, read_vector, unique_name
from .external_file import ExternalFile
from .operator import DOMAIN, OPERATOR, node_attributes, packed_inputs


class ProductReplacer:
    """Packs weights of one model, all in the same way, one after the other.

    Args:
        model: changed in place.
        file: gets the packed bytes.
        config: how weights are stored.
        accuracy_level: of the MatMulNM nodes.
    """

    def __init__(self, model: ir.Model, file: ExternalFile, config: LayerConfig, accuracy_level: int) -> None:
        self.graph = model.graph
        self.file = file
        self.config = config
        self.accuracy_level = accuracy_level
        self._names = {value.name for graph in model.graphs() for value in _values(graph) if value.name}

    def replace(self, weight: ConstantWeight) -> tuple[int, float]:
        """Pack a weight and let its products be MatMulNM nodes; the constant goes unless something else uses it.

        Returns:
            Bytes of the packed tensors, and the largest rounding error as a share of the largest element.

        Raises:
            NMError: an element is not finite or does not fit the type of the stored values.
        """
        tensors, error = _pack(weight, self.config)
        inputs = self._write(weight, tensors)
        for product in weight.products:
            self._replace_product(weight, product, inputs)
        return sum(tensor.nbytes for tensor in tensors.values()), error

    def _write(self, weight: ConstantWeight, tensors: dict[str, Tensor]) -> list[ir.Value]:
        """The initializers values … outlier_positions; those that the weight has not are empty, and shared."""
        inputs = []
        for role, (shape, element) in packed_inputs(weight.in_features, weight.out_features, self.config).items():
            dtype = ir.DataType(element)
            if role in tensors:
                name = unique_name(f"{weight.name}.{role}", self._names)
                bits = tensors[role].numpy().view(dtype.numpy())
                tensor: ir.TensorProtocol = self.file.append(ir.tensor(bits, dtype), name)
            else:
                name = f"{DOMAIN}.empty_{dtype.name.lower()}"
                tensor = ir.tensor(np.zeros(shape, dtype.numpy()), dtype, name=name)
            inputs.append(self._initializer(name, tensor))
        return inputs

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """In the outermost graph, where nodes of all graphs find it."""
        if name not in self.graph.initializers:
            shape = ir.Shape(tensor.shape.numpy())
            value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
            self.graph.initializers.add(value)
        return self.graph.initializers[name]

    def _replace_product(self, weight: ConstantWeight, product: Product, inputs: list[ir.Value]) -> None:
        node, last = product.node, product.last
        constants = [value for value in (*node.inputs[1:], product.bias) if value is not None]
        graph = node.graph
        assert graph is not None
        new = ir.node(
            OPERATOR,
            [node.inputs[0], *inputs, self._bias(weight, product)],
            node_attributes(weight.in_features, weight.out_features, self.config, self.accuracy_level),
            domain=DOMAIN,
            name=node.name,
            metadata_props=dict(node.metadata_props),
        )
        old_nodes = list(dict.fromkeys([last, node]))
        ir.convenience.replace_nodes_and_values(graph, last, old_nodes, [new], last.outputs, new.outputs)
        for value in constants:
            _remove_unused(value)

    def _bias(self, weight: ConstantWeight, product: Product) -> ir.Value:
        tensor = constant_tensor(product.bias)
        if product.bias is None or tensor is None:
            name = f"{DOMAIN}.empty_float"
            return self._initializer(name, ir.tensor(np.zeros(0, np.float32), name=name))
        if tensor.shape.numpy() == (weight.out_features,) and product.bias_factor == 1:
            return product.bias
        vector = (read_vector(tensor) * product.bias_factor).expand(weight.out_features).numpy()
        name = unique_name(f"{weight.name}.bias", self._names)
        return self._initializer(name, ir.tensor(vector.astype(tensor.dtype.numpy()), tensor.dtype, name=name))


def _pack(weight: ConstantWeight, config: LayerConfig) -> tuple[dict[str, Tensor], float]:
    """The packed tensors, and the largest rounding error as a share of the largest element; a few rows at a time."""
    parts: list[dict[str, Tensor]] = []
    error = largest = 0.0
    for block in weight.blocks():
        try:
            packed = PackedWeight.from_config(block, config)
        except NMError as problem:
            raise NMError(f"{weight} cannot be packed: {problem}") from None
        parts.append(packed.tensors)
        error = max(error, (packed.unpack() - block).abs().max().item())
        largest = max(largest, block.abs().max().item())
    return {role: torch.cat([part[role] for part in parts]) for role in parts[0]}, error / largest if largest else 0.0


def _values(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *graph.initializers.values(), *(output for node in graph for output in node.outputs)]


def _remove_unused(value: ir.Value) -> None:
    """Remove a value that nothing uses, and what was there only for it."""
    if value.uses() or value.is_graph_output():
        return
    producer, graph = value.producer(), value.graph
    if graph is None:  # removed before
        return
    if producer is not None:
        inputs = [input for input in producer.inputs if input is not None]
        graph.remove(producer, safe=True)
        for input in inputs:
            _remove_unused(input)
    elif value.is_initializer() and not value.is_graph_input():
        graph.initializers.pop(value.name or "")
