"""SwiGLU in ONNX Runtime, its fallback, and where the fused graph has it."""

import copy
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument
from swiglu_values import reference, swiglu_model

from optimum_nm import session_options
from optimum_nm.onnx.checker import check_file
from optimum_nm.onnx.swiglu import fuse_swiglu, swiglu_function
from optimum_nm.runtime.library import load_library


@pytest.fixture(scope="module")
def session():
    return onnxruntime.InferenceSession(swiglu_model().SerializeToString(), session_options(1))


@pytest.mark.parametrize("isa", sorted({"portable", load_library().nm_isa().decode()}))  # one loop for AVX2 and AVX-512
def test_agrees_with_float64_on_every_instruction_set(isa):
    command = [sys.executable, Path(__file__).with_name("swiglu_values.py")]
    run = subprocess.run(command, env=os.environ | {"OPTIMUM_NM_ISA": isa}, capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    assert found["isa"] == isa and found["error"] < 1e-6


def test_where_the_exponential_ends(session):
    """A gate far below zero is closed, one far above lets all through, and what is no number stays none."""
    gates = [-1e30, -1e4, -100, -88, 88, 100, 1e4, 1e30, np.inf, np.nan]
    x = np.array([[gates + [1] * len(gates)]], np.float32)
    (y,) = session.run(None, {"X": x})
    np.testing.assert_allclose(y[0, 0, :4], 0, atol=1e-6)
    np.testing.assert_array_equal(y[0, 0, 4:9], x[0, 0, 4:9])
    assert np.isnan(y[0, 0, 9])


@pytest.mark.parametrize("width", [0, 1, 7])
def test_needs_two_halves(session, width):
    with pytest.raises(InvalidArgument, match=rf"SwiGLU node 'gate': the last dimension of X is {width}; it must be"):
        session.run(None, {"X": np.zeros((1, 2, width), np.float32)})


def test_threads_do_not_change_the_result(session):
    x = np.random.default_rng(0).standard_normal((2, 50, 1000)).astype(np.float32)
    four = onnxruntime.InferenceSession(swiglu_model().SerializeToString(), session_options(4))
    np.testing.assert_array_equal(four.run(None, {"X": x})[0], session.run(None, {"X": x})[0])


def test_model_is_checked_by_onnx(tmp_path):
    onnx.save(swiglu_model(), tmp_path / "model.onnx")
    with pytest.raises(onnx.checker.ValidationError, match="SwiGLU"):
        onnx.checker.check_model(tmp_path / "model.onnx", check_custom_domain=True)
    check_file(tmp_path / "model.onnx", check_custom_domain=True)
    assert not onnx.defs.has("SwiGLU", 1, "optimum.nm")


@pytest.mark.parametrize("opset", [18, 24])
def test_runs_without_the_library(opset):
    model = swiglu_model([swiglu_function(opset)], opset)
    x = np.random.default_rng(0).standard_normal((2, 3, 10)).astype(np.float32)
    (y,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"X": x})
    np.testing.assert_allclose(y, reference(x), rtol=1e-5, atol=1e-6)


def gate_graph(sizes=(4, 4)):
    """silu(first part) · second part of x, in standard operators."""
    nodes = [
        helper.make_node("Split", ["x", "sizes"], ["gate", "up"], axis=-1),
        helper.make_node("Sigmoid", ["gate"], ["sigmoid"]),
        helper.make_node("Mul", ["gate", "sigmoid"], ["silu"]),
        helper.make_node("Mul", ["up", "silu"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")
    return helper.make_graph(nodes, "gate", [x], [y], [numpy_helper.from_array(np.array(sizes), "sizes")])


def kinds(graph):
    return Counter(node.op_type for node in graph.node)


def test_a_gate_becomes_one_node():
    graph = gate_graph()
    fuse_swiglu(graph)
    assert kinds(graph) == {"SwiGLU": 1} and not graph.initializer
    assert (graph.node[0].input[:], graph.node[0].output[:]) == (["x"], ["y"])


def read_elsewhere(name):
    def change(graph):
        graph.node.append(helper.make_node("Identity", [name], ["other"]))

    return change


def swap_halves(graph):
    graph.node[0].output[:] = ["up", "gate"]


def first_axis(graph):
    graph.node[0].attribute[0].i = 0


def other_function(graph):
    graph.node[1].op_type = "Tanh"


def is_output(graph):
    graph.output.append(helper.make_tensor_value_info("silu", TensorProto.FLOAT, None))


@pytest.mark.parametrize(
    "change",
    [
        *map(read_elsewhere, ("gate", "up", "sigmoid", "silu")),
        swap_halves,
        first_axis,
        other_function,
        is_output,
        lambda graph: graph.initializer[0].CopyFrom(numpy_helper.from_array(np.array([3, 5]), "sizes")),
    ],
)
def test_what_is_no_gate_stays(change):
    graph = gate_graph()
    change(graph)
    before = copy.deepcopy(graph)
    fuse_swiglu(graph)
    assert graph == before
