"""Small ONNX models of MatMulNM nodes, for the tests of the operator and of its fallback."""

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from optimum_nm.onnx.fallback import add_fallback
from optimum_nm.onnx.operator import DOMAIN, VERSION, matmul_nm_node, packed_inputs
from optimum_nm.packing.packed_weight import PackedWeight

IR_VERSION = 8
NUMPY_BITS = {
    TensorProto.FLOAT: np.int32,
    TensorProto.FLOAT16: np.int16,
    TensorProto.BFLOAT16: np.int16,
    TensorProto.UINT8: np.uint8,
}


def random_packed(out_features=24, in_features=40, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return PackedWeight.pack(torch.randn(out_features, in_features, generator=generator), **options)


def initializers(packed, prefix=""):
    """The packed tensors as ONNX initializers, empty where absent."""
    tensors = []
    for name, (shape, element) in packed_inputs(packed.in_features, packed.out_features, packed.config).items():
        present = packed.tensors.get(name)
        raw = b"" if present is None else present.numpy().tobytes()
        tensors.append(helper.make_tensor(prefix + name, element, shape, raw, raw=True))
    return tensors


def bias_initializer(bias, prefix=""):
    values = np.zeros(0, np.float32) if bias is None else np.asarray(bias, np.float32)
    return helper.make_tensor(prefix + "bias", TensorProto.FLOAT, values.shape, values.tobytes(), raw=True)


def chain_model(
    layers,
    biases=None,
    opset=17,
    activation=TensorProto.FLOAT,
    accuracy_level=0,
    fallback=False,
    constant=True,
    leading=("batch", "tokens"),
):
    """A model x [*leading, K₁] → MatMulNM of each PackedWeight in turn → y, both float32.

    Args:
        activation: type that x is cast to before the first node, and that the last one's output is cast back from.
        constant: whether the packed tensors are initializers; else they are graph inputs.
    """
    nodes, tensors = [helper.make_node("Cast", ["x"], ["h0"], to=activation)], []
    for i, packed in enumerate(layers):
        prefix = f"layer{i}."
        tensors += [*initializers(packed, prefix), bias_initializer(biases[i] if biases else None, prefix)]
        names = [f"h{i}", *(tensor.name for tensor in tensors[-6:])]
        sizes = (packed.in_features, packed.out_features)
        node_name = f"/layer{i}/MatMul"
        nodes.append(matmul_nm_node(names, f"h{i + 1}", *sizes, packed.config, accuracy_level, name=node_name))
    nodes.append(helper.make_node("Cast", [f"h{len(layers)}"], ["y"], to=TensorProto.FLOAT))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [*leading, layers[0].in_features])]
    if not constant:
        inputs += [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in tensors]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [*leading, layers[-1].out_features])
    graph = helper.make_graph(nodes, "chain", inputs, [output], tensors if constant else [])
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=IR_VERSION,
    )
    if fallback:
        add_fallback(model)
    onnx.checker.check_model(model)
    return model


def reference(layers, x, biases=None):
    """The chain in float64."""
    y = x.astype(np.float64)
    for i, packed in enumerate(layers):
        y = y @ packed.unpack().double().numpy().T
        if biases and biases[i] is not None:
            y = y + biases[i]
    return y


def relative_error(y, expected):
    """Largest difference beside the largest element; 0 for empty arrays."""
    assert y.shape == expected.shape, (y.shape, expected.shape)
    return np.abs(y - expected).max(initial=0) / max(np.abs(expected).max(initial=0), 1e-30)
