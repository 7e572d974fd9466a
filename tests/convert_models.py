"""Small ONNX models with constant weights, sparse or not, and what their conversion is checked by."""

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from optimum_nm import PackedWeight
from optimum_nm.onnx.checker import check_file
from optimum_nm.onnx.convert import convert_onnx
from optimum_nm.runtime.session import session_options

HALF_TYPES = {TensorProto.FLOAT16: torch.float16, TensorProto.BFLOAT16: torch.bfloat16}
IN, OUT = 40, 24  # no multiple of 16: the last group is half a group


def sparse(out_features=OUT, in_features=IN, pattern="8:16", seed=0):
    """An N:M sparse weight whose elements are float16 values."""
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))
    return PackedWeight.pack(weight, pattern).unpack().numpy()


def dense(out_features=OUT, in_features=IN, seed=0):
    return np.random.default_rng(seed).standard_normal((out_features, in_features)).astype(np.float32)


def vector(size=OUT, seed=1):
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def node(op_type, inputs, output, name=None, **attributes):
    return helper.make_node(op_type, inputs.split(), [output], name=name or f"node of {output}", **attributes)


def write_model(path, nodes, constants, opset=17, ir_version=8, sizes=(IN, OUT), rank=3, external=False, **graph):
    """x [..., sizes[0]] → nodes → y [..., sizes[1]], constants as initializers."""
    dims = ["a", "b", "c"][: rank - 1]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [*dims, sizes[0]]), *graph.pop("inputs", [])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [*dims, sizes[1]])]
    tensors = [t if isinstance(t, TensorProto) else numpy_helper.from_array(t, n) for n, t in constants.items()]
    graph = helper.make_graph(nodes, "model", inputs, outputs, tensors, **graph)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    options = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0} if external else {}
    onnx.save(model, path, **options)
    return path


def linear_model(path, weight, op="MatMul", name="/mlp/up/MatMul", **options):
    return write_model(path, [node(op, "x w", "y", name)], {"w": np.ascontiguousarray(weight.T)}, **options)


def run(path, options=None, rank=3, size=IN):
    """The output for fixed activations, from ONNX Runtime alone or with these session options."""
    session = onnxruntime.InferenceSession(str(path), options)
    x = np.random.default_rng(3).standard_normal((2, 3, 5, size)[4 - rank :]).astype(np.float32)
    return session.run(None, {"x": x})[0]


def assert_same_outputs(source, target, tolerance=1e-5, **inputs):
    expected = run(source, **inputs)
    for options in (session_options(1), None):
        found = run(target, options, **inputs)
        assert found.shape == expected.shape and found.dtype == expected.dtype
        assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def convert(source, **options):
    """The converted model's path and what the conversion did."""
    target = source.with_name("packed.onnx")
    summary = convert_onnx(source, target, **options)
    check_file(target)
    return target, summary


def structure(path):
    """Operator types in order, and the initializers' names, of the outermost graph."""
    graph = onnx.load(str(path), load_external_data=False).graph
    return [node.op_type for node in graph.node], {tensor.name for tensor in graph.initializer}


def two_layers(path, second, **options):
    nodes = [node("MatMul", "x w", "h", "/up/MatMul"), node("MatMul", "h onnx::MatMul_7", "y", "/lm_head/MatMul")]
    constants = {"w": sparse(IN, IN).T.copy(), "onnx::MatMul_7": second.T.copy()}
    return write_model(path, nodes, constants, **options)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}
