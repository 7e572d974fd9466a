"""The function inside a model by which a runtime without the library runs MatMulNM: the same numbers."""

import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
from operator_models import IR_VERSION, chain_model, random_packed, reference, relative_error

from optimum_nm import session_options
from optimum_nm.config import POSITION_FORMATS, WEIGHT_DTYPES
from optimum_nm.errors import NMError
from optimum_nm.onnx.fallback import OLDEST_OPSET, add_fallback
from optimum_nm.onnx.operator import DOMAIN, OPERATOR


def runs(opset):
    """Whether this ONNX Runtime knows the operator set."""
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=IR_VERSION)
    try:
        without_library(model)
    except (ort_errors.Fail, ort_errors.InvalidArgument):
        return False
    return True


def without_library(model):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


OPSETS = [opset for opset in range(OLDEST_OPSET, onnx.defs.onnx_opset_version() + 1) if runs(opset)]


def check(layers, biases=None, tolerance=1e-5, **options):
    """Both sessions agree with float64 on `[2, 3, K]`, and the function alone on zero rows."""
    model = chain_model(layers, biases, fallback=True, **options)
    x = np.random.default_rng(0).standard_normal((2, 3, layers[0].in_features)).astype(np.float32)
    x = x.astype(np.float16).astype(np.float32)
    expected = reference(layers, x, biases)
    fallback = without_library(model)
    for session in (fallback, onnxruntime.InferenceSession(model.SerializeToString(), session_options(1))):
        (y,) = session.run(None, {"x": x})
        assert relative_error(y, expected) < tolerance
    assert fallback.run(None, {"x": x[:0]})[0].shape == (0, 3, layers[-1].out_features)


@pytest.mark.parametrize("outliers", [None, "3:20", "4:256"])
@pytest.mark.parametrize("pattern", ["2:4", "5:8", "8:16", "16:16"])
@pytest.mark.parametrize("positions", POSITION_FORMATS)
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_one_layer(dtype, positions, pattern, outliers):
    options = {"pattern": pattern, "outliers": outliers, "dtype": dtype, "positions": positions, "group_size": 32}
    check([random_packed(9, 70, **options)], [np.arange(9.0)])


@pytest.mark.parametrize("positions", POSITION_FORMATS)
@pytest.mark.parametrize("pattern", ["1:32", "16:32", "31:32"])
def test_groups_of_32(pattern, positions):
    check([random_packed(9, 70, pattern=pattern, positions=positions, dtype="int4", group_size=64, outliers="4:256")])


@pytest.mark.parametrize("group_size", [16, 64, "row"])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("width", [1, 15, 16, 17, 64, 129, 300])
def test_widths(width, dtype, group_size):
    check([random_packed(5, width, pattern="8:16", dtype=dtype, group_size=group_size, outliers="2:128")])


def test_float32_outliers():
    check([random_packed(5, 40, pattern="8:16", outliers="3:20", outlier_dtype="float32")])


MIXED = [
    {"pattern": "8:16", "outliers": "4:256", "dtype": "float16"},
    {"pattern": "2:4", "dtype": "int4", "group_size": 32, "positions": "bitmap"},
    {"pattern": "16:16", "dtype": "int8", "group_size": "row"},
    {"pattern": "4:8", "dtype": "bfloat16", "outliers": "1:16", "outlier_dtype": "float32"},
    {"pattern": "16:16", "dtype": "float32", "positions": "bitmap"},
    {"pattern": "7:8", "dtype": "int8", "group_size": 16, "outliers": "3:20"},
]
WIDEST = {"pattern": "16:32", "dtype": "int4", "group_size": 32, "outliers": "2:64"}


def mixed_layers(kinds):
    widths = [(40 + 13 * i, 40 + 13 * (i + 1)) for i in range(len(kinds))]
    return [
        random_packed(high, wide, i, **kind) for i, ((wide, high), kind) in enumerate(zip(widths, kinds, strict=True))
    ]


@pytest.mark.parametrize("kinds", [MIXED, [*MIXED, WIDEST]], ids=["up to 16", "up to 32"])
def test_one_function_serves_layers_of_every_kind(kinds):
    layers = mixed_layers(kinds)
    biases = [np.ones(layer.out_features) if i % 2 else None for i, layer in enumerate(layers)]
    check(layers, biases)


@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset(opset):
    check(mixed_layers(MIXED[:3]), opset=opset)


def test_newest_opsets_are_tried():
    assert OPSETS[0] == 13 and OPSETS[-1] >= 21


@pytest.mark.parametrize("opset", [15, OPSETS[-1]])
def test_float16_activations(opset):
    layers = mixed_layers(MIXED[:2])
    check(layers, [np.ones(53), None], opset=opset, activation=TensorProto.FLOAT16, tolerance=2e-3)


def test_packed_tensors_may_be_inputs_of_the_graph():
    packed = random_packed(pattern="8:16", dtype="int4", group_size=16, outliers="3:20")
    given = chain_model([packed], fallback=True, constant=False)
    constant = chain_model([packed])
    feeds = {t.name: onnx.numpy_helper.to_array(t) for t in constant.graph.initializer}
    x = np.random.default_rng(0).standard_normal((1, 4, 40)).astype(np.float32)
    (y,) = without_library(given).run(None, feeds | {"x": x})
    assert relative_error(y, reference([packed], x)) < 1e-5


def test_process_that_never_saw_the_library(tmp_path):
    layers = mixed_layers(MIXED)
    onnx.save(chain_model(layers, fallback=True), tmp_path / "model.onnx")
    x = np.random.default_rng(0).standard_normal((2, 3, 40)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    script = (
        "import numpy, onnxruntime, sys; session = onnxruntime.InferenceSession('model.onnx');"
        "numpy.save('y.npy', session.run(None, {'x': numpy.load('x.npy')})[0]); assert 'optimum_nm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    assert relative_error(np.load(tmp_path / "y.npy"), reference(layers, x)) < 1e-5


def test_library_is_used_where_there_is_one():
    """The function's own answer is put out of the way, so that only the kernel can give the right one."""
    packed = random_packed(pattern="8:16")
    model = chain_model([packed], fallback=True)
    (function,) = model.functions
    del function.node[:]
    function.node.append(helper.make_node("Identity", ["A"], ["Y"]))
    x = np.random.default_rng(0).standard_normal((2, 3, 40)).astype(np.float32)
    (y,) = onnxruntime.InferenceSession(model.SerializeToString(), session_options(1)).run(None, {"x": x})
    assert relative_error(y, reference([packed], x)) < 1e-5


def test_nodes_in_branches_are_found():
    packed = random_packed(pattern="8:16")
    inner = chain_model([packed])
    tensors = list(inner.graph.initializer)
    branch = helper.make_graph(inner.graph.node, "branch", [], list(inner.graph.output))
    condition = helper.make_tensor("condition", TensorProto.BOOL, (), [True])
    node = helper.make_node("If", ["condition"], ["z"], then_branch=branch, else_branch=branch)
    output = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    output.type.tensor_type.shape.CopyFrom(inner.graph.output[0].type.tensor_type.shape)
    graph = helper.make_graph([node], "outer", list(inner.graph.input), [output], [*tensors, condition])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=IR_VERSION)
    add_fallback(model)
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", 17), (DOMAIN, 1)}
    x = np.random.default_rng(0).standard_normal((1, 1, 40)).astype(np.float32)
    assert relative_error(without_library(model).run(None, {"x": x})[0], reference([packed], x)) < 1e-5


def test_adding_it_twice_leaves_one():
    model = chain_model([random_packed(pattern="8:16")], fallback=True)
    before = model.SerializeToString(deterministic=True)
    add_fallback(model)
    assert model.SerializeToString(deterministic=True) == before
    assert [(f.domain, f.name) for f in model.functions] == [(DOMAIN, OPERATOR)]


def test_model_without_packed_layers_stays_as_it_is():
    model = chain_model([random_packed(pattern="8:16")])
    del model.graph.node[1]
    before = model.SerializeToString(deterministic=True)
    add_fallback(model)
    assert model.SerializeToString(deterministic=True) == before


def test_refuses_opsets_that_are_too_old():
    with pytest.raises(NMError, match="the model's opset is 12; the fallback function needs 13 or newer"):
        chain_model([random_packed(pattern="8:16")], opset=12, fallback=True)
