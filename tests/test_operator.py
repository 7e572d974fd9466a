"""MatMulNM in ONNX Runtime: its numbers on each instruction set, its inputs, what it refuses, the memory it takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from native_build import ISAS
from onnx import TensorProto, helper
from operator_models import bias_initializer, chain_model, random_packed, reference, relative_error

from optimum_nm import session_options
from optimum_nm.config import POSITION_FORMATS, WEIGHT_DTYPES
from optimum_nm.onnx.operator import INPUT_NAMES, matmul_nm_node
from optimum_nm.runtime.library import load_library

NODE = "MatMulNM node '/layer0/MatMul'"
BEST = ISAS.index(load_library().nm_isa().decode())


def session(model):
    return onnxruntime.InferenceSession(model.SerializeToString(), session_options(1))


def program(name, **environment):
    """Standard output of a program of this folder, which must end well."""
    command = [sys.executable, Path(__file__).with_name(name)]
    run = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert run.returncode == 0, f"exit status {run.returncode}\n{run.stdout}{run.stderr}"
    return json.loads(run.stdout)


@pytest.mark.parametrize("isa", ISAS[: BEST + 1])
def test_agrees_with_float64_on_every_instruction_set(isa):
    found = program("operator_grid.py", OPTIMUM_NM_ISA=isa)
    assert found["isa"] == isa and found["cases"] > 500
    assert not found["wrong"]


@pytest.mark.parametrize("positions", POSITION_FORMATS)
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_packed_tensors_may_be_inputs_of_the_graph(dtype, positions):
    packed = random_packed(pattern="8:16", outliers="3:20", dtype=dtype, positions=positions, group_size=16)
    constant = chain_model([packed], [np.arange(24.0)])
    x = np.random.default_rng(0).standard_normal((2, 3, 40)).astype(np.float32)
    (expected,) = session(constant).run(None, {"x": x})
    feeds = {tensor.name: ort_value(tensor) for tensor in constant.graph.initializer}
    given = session(chain_model([packed], [np.arange(24.0)], constant=False))
    (y,) = given.run_with_ort_values(None, feeds | {"x": onnxruntime.OrtValue.ortvalue_from_numpy(x)})
    assert np.array_equal(y.numpy(), expected)


def ort_value(tensor):
    """A graph input of any type, bfloat16 too, which numpy has not: the output of a session that holds it."""
    node = helper.make_node("Identity", [tensor.name], ["y"])
    output = helper.make_tensor_value_info("y", tensor.data_type, list(tensor.dims))
    model = helper.make_model(
        helper.make_graph([node], "constant", [], [output], [tensor]),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    (value,) = onnxruntime.InferenceSession(model.SerializeToString()).run_with_ort_values(None, {})
    return value


@pytest.mark.parametrize("kept", [3, 4, 6])
def test_trailing_inputs_may_be_left_out(kept):
    options = {3: {}, 4: {"dtype": "int8", "group_size": 16}, 6: {"dtype": "int8", "outliers": "3:20"}}[kept]
    packed = random_packed(pattern="8:16", **options)
    model = chain_model([packed])
    del model.graph.node[1].input[kept:]
    x = np.random.default_rng(0).standard_normal((1, 2, 40)).astype(np.float32)
    (y,) = session(model).run(None, {"x": x})
    assert relative_error(y, reference([packed], x)) < 1e-5


def test_middle_inputs_may_be_left_out():
    packed = random_packed(pattern="8:16", outliers="3:20")
    model = chain_model([packed], [np.ones(24)])
    model.graph.node[1].input[INPUT_NAMES.index("scales")] = ""
    x = np.random.default_rng(0).standard_normal((1, 2, 40)).astype(np.float32)
    (y,) = session(model).run(None, {"x": x})
    assert relative_error(y, reference([packed], x, [np.ones(24)])) < 1e-5


@pytest.mark.parametrize("element", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_bias_of_any_float_type(element):
    packed, bias = random_packed(pattern="8:16"), np.arange(24.0) / 4
    model = chain_model([packed], [bias])
    model.graph.initializer[-1].CopyFrom(helper.make_tensor("layer0.bias", element, (24,), bias))
    x = np.random.default_rng(0).standard_normal((1, 2, 40)).astype(np.float32)
    (y,) = session(model).run(None, {"x": x})
    assert relative_error(y, reference([packed], x, [bias])) < 1e-5


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_accuracy_level_4_may_round_activations(dtype):
    packed = random_packed(64, 512, pattern="8:16", outliers="4:256", dtype=dtype, group_size=128)
    x = np.random.default_rng(0).standard_normal((1, 5, 512)).astype(np.float32)
    (y,) = session(chain_model([packed], accuracy_level=4)).run(None, {"x": x})
    expected = reference([packed], x)
    assert np.linalg.norm(y - expected) / np.linalg.norm(expected) < 0.01


def test_chain_of_layers_of_several_kinds():
    kinds = [
        {"pattern": "8:16", "outliers": "4:256"},
        {"pattern": "2:4", "dtype": "int4", "group_size": 32, "positions": "bitmap"},
        {"pattern": "16:16", "dtype": "bfloat16"},
    ]
    widths = [40, 48, 24, 56]
    layers = [random_packed(widths[i + 1], widths[i], i, **kind) for i, kind in enumerate(kinds)]
    biases = [np.ones(48), None, np.arange(56.0)]
    x = np.random.default_rng(0).standard_normal((2, 3, 40)).astype(np.float32)
    (y,) = session(chain_model(layers, biases)).run(None, {"x": x})
    assert relative_error(y, reference(layers, x, biases)) < 1e-5


def test_threads_change_nothing():
    packed = random_packed(200, 96, pattern="8:16", dtype="int8", group_size=32)
    model = chain_model([packed]).SerializeToString()
    x = np.random.default_rng(0).standard_normal((4, 9, 96)).astype(np.float32)
    one, three = (onnxruntime.InferenceSession(model, session_options(n)).run(None, {"x": x})[0] for n in (1, 3))
    assert np.array_equal(one, three)


def edit_attribute(name, value):
    def edit(model):
        (attribute,) = (a for a in model.graph.node[1].attribute if a.name == name)
        attribute.CopyFrom(helper.make_attribute(name, value))

    return edit


def remove_attribute(name):
    def edit(model):
        kept = [a for a in model.graph.node[1].attribute if a.name != name]
        del model.graph.node[1].attribute[:]
        model.graph.node[1].attribute.extend(kept)

    return edit


def edit_tensor(role, **fields):
    """Other dimensions, bytes or element type for an initializer."""

    def edit(model):
        (tensor,) = (t for t in model.graph.initializer if t.name == f"layer0.{role}")
        for name, value in fields.items():
            if name == "dims":
                del tensor.dims[:]
                tensor.dims.extend(value)
            else:
                setattr(tensor, name, value(tensor.raw_data) if callable(value) else value)

    return edit


def overwrite(index, *values):
    return lambda raw: raw[:index] + bytes(values) + raw[index + len(values) :]


# of the layer below: 24 rows, 40 columns, so three groups a row, 24 values, 6 bytes of codes, 3 scales, 3 + 3 outliers
LAYER = {"pattern": "8:16", "outliers": "3:20", "dtype": "int8", "group_size": 16, "positions": "codes"}
REFUSED = {
    "K missing": (remove_attribute("K"), "attribute K is missing or not an integer."),
    "K a string": (edit_attribute("K", "40"), "attribute K is missing or not an integer."),
    "K zero": (edit_attribute("K", 0), "attribute K is 0; it must be between 1 and 2147483647."),
    "K huge": (edit_attribute("K", 2**40), "attribute K is 1099511627776; it must be between 1 and 2147483647."),
    "K other": (edit_attribute("K", 80), "values has 576 bytes; 24 rows of 40 bytes are needed."),
    "N negative": (edit_attribute("N", -1), "attribute N is -1; it must be between 1 and 2147483647."),
    "N other": (edit_attribute("N", 25), "values must have 2 dimensions, the first of 25."),
    "n zero": (edit_attribute("n", 0), "n is 0; it must be between 1 and m = 16."),
    "n above m": (edit_attribute("n", 17), "n is 17; it must be between 1 and m = 16."),
    "n negative": (edit_attribute("n", -8), "attribute n is -8; it must be between 0 and 2147483647."),
    "m": (edit_attribute("m", 12), "m is 12; it must be 4, 8, 16 or 32."),
    "dtype": (
        edit_attribute("dtype", "int3"),
        "attribute dtype must be the string float32, float16, bfloat16, int8 or int4.",
    ),
    "dtype a number": (
        edit_attribute("dtype", 8),
        "attribute dtype must be the string float32, float16, bfloat16, int8 or int4.",
    ),
    "dtype long": (
        edit_attribute("dtype", "int8" * 100),
        "attribute dtype must be the string float32, float16, bfloat16, int8 or int4.",
    ),
    "dtype other": (edit_attribute("dtype", "float16"), "values has the ONNX element type 2; it must be float16."),
    "positions": (edit_attribute("positions", ""), "attribute positions must be the string codes or bitmap."),
    "positions other": (
        edit_attribute("positions", "bitmap"),
        "positions: row 0, group 0 marks",
    ),
    "group_size zero": (edit_attribute("group_size", 0), "group_size is 0; it must be -1 or a multiple of m = 16."),
    "group_size odd": (edit_attribute("group_size", 24), "group_size is 24; it must be -1 or a multiple of m = 16."),
    "group_size other": (edit_attribute("group_size", 32), "scales has 144 bytes; 24 rows of 4 bytes are needed."),
    "outlier_k none": (edit_attribute("outlier_k", 0), "outlier_values has 288 bytes; 24 rows of 0 bytes"),
    "outlier_k many": (edit_attribute("outlier_k", 21), "outlier_k is 21; it must be between 0 and outlier_block = 20"),
    "outlier_block zero": (edit_attribute("outlier_block", 0), "outlier_block is 0; it must be between 1 and 256."),
    "outlier_block wide": (edit_attribute("outlier_block", 257), "outlier_block is 257; it must be between 1 and 256."),
    "outlier_block missing": (remove_attribute("outlier_block"), "attribute outlier_block is missing"),
    "accuracy_level": (edit_attribute("accuracy_level", 1), "attribute accuracy_level must be 0 or 4."),
    "too few inputs": (lambda model: model.graph.node[1].input.__delitem__(slice(3, None)), "scales has 0 bytes"),
    "values cut": (
        edit_tensor("values", dims=(24, 23), raw_data=lambda raw: raw[: 24 * 23]),
        "values has 552 bytes; 24 rows of 24 bytes are needed.",
    ),
    "values turned": (edit_tensor("values", dims=(48, 12)), "values must have 2 dimensions, the first of 24."),
    "values flat": (edit_tensor("values", dims=(576,)), "values must have 2 dimensions, the first of 24."),
    "values empty": (
        edit_tensor("values", dims=(24, 0), raw_data=b""),
        "values has 0 bytes; 24 rows of 24 bytes are needed.",
    ),
    "positions long": (
        edit_tensor("positions", dims=(24, 7), raw_data=bytes(24 * 7)),
        "positions has 168 bytes; 24 rows of 6 bytes are needed.",
    ),
    "code": (
        edit_tensor("positions", raw_data=overwrite(6, 255, 255)),
        "positions: row 1, group 0 has the code 16383; it must be below 12870.",
    ),
    "unused bits": (
        edit_tensor("positions", raw_data=overwrite(5, 255)),
        "positions: row 0 has unused bits set in its last byte.",
    ),
    "scales type": (
        edit_tensor("scales", data_type=TensorProto.BFLOAT16),
        "scales has the ONNX element type 16; it must be float16.",
    ),
    "outlier type": (
        edit_tensor("outlier_values", data_type=TensorProto.BFLOAT16),
        "outlier_values has the ONNX element type 16; it must be float16 or float32.",
    ),
    "outlier order": (
        edit_tensor("outlier_positions", raw_data=overwrite(6, 9, 4)),
        "outlier_positions: row 1, block 0, position 4 must lie inside the block and above the one before it.",
    ),
    "outlier outside": (
        edit_tensor("outlier_positions", raw_data=overwrite(5, 20)),
        "outlier_positions: row 0, block 1, position 20 must lie inside the block and above the one before it.",
    ),
    "bias short": (
        lambda model: model.graph.initializer[-1].CopyFrom(bias_initializer(np.zeros(23), "layer0.")),
        "bias must have 1 dimension, the first of 24.",
    ),
    "bias type": (
        lambda model: model.graph.initializer[-1].CopyFrom(
            helper.make_tensor("layer0.bias", TensorProto.INT32, (24,), [0] * 24)
        ),
        "bias has the ONNX element type 6; it must be float32, float16 or bfloat16.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_when_the_session_is_created(case):
    edit, reason = REFUSED[case]
    model = chain_model([random_packed(**LAYER)])
    session(model)
    edit(model)
    with pytest.raises(Exception, match=NODE) as refusal:
        session(model)
    assert f"{NODE}: {reason}" in str(refusal.value)


@pytest.mark.parametrize("pattern,code", [("2:4", 6), ("16:32", 601080390)])
def test_every_code_below_the_number_of_masks_is_taken(pattern, code):
    width = int(pattern.partition(":")[2])
    packed = random_packed(1, width, pattern=pattern, dtype="float32", positions="codes")
    for given, accepted in ((code - 1, True), (code, False)):
        raw = given.to_bytes(packed.tensors["positions"].shape[1], "little")
        model = chain_model([packed])
        edit_tensor("positions", raw_data=raw)(model)
        if accepted:
            assert session(model).run(None, {"x": np.ones((1, 1, width), np.float32)})[0].shape == (1, 1, 1)
        else:
            with pytest.raises(Exception, match=f"has the code {code}; it must be below {code}"):
                session(model)


def test_refuses_inputs_of_the_graph_when_it_runs():
    packed = random_packed(pattern="8:16", positions="codes")
    given = session(chain_model([packed], constant=False))
    feeds = {t.name: ort_value(t) for t in chain_model([packed]).graph.initializer}
    feeds["x"] = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((1, 1, 40), np.float32))
    given.run_with_ort_values(None, feeds)
    broken = np.full((24, 6), 255, np.uint8)
    feeds["layer0.positions"] = onnxruntime.OrtValue.ortvalue_from_numpy(broken)
    with pytest.raises(Exception, match=r"row 0, group 0 has the code 16383") as refusal:
        given.run_with_ort_values(None, feeds)
    assert NODE in str(refusal.value)


def test_refuses_activations_of_another_width():
    packed = random_packed(pattern="8:16")
    model = chain_model([packed], leading=("batch",))
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "width"
    with pytest.raises(Exception, match="the last dimension of A is 41; it must be K = 40") as refusal:
        session(model).run(None, {"x": np.zeros((2, 41), np.float32)})
    assert NODE in str(refusal.value)


def test_nodes_are_written_with_every_input():
    packed = random_packed(pattern="8:16")
    with pytest.raises(ValueError, match="3 inputs are given; MatMulNM nodes are written with 7"):
        matmul_nm_node(["A", "values", "positions"], "Y", 40, 24, packed.config)


def test_any_bytes_whatever_give_an_answer_or_an_error():
    found = program("operator_damage.py")
    assert found["strange"] == []
    assert min(found["refused"], found["taken"]) > 100


def test_sessions_share_the_file_and_copy_nothing():
    found = program("operator_memory.py")
    assert found["same"]
    assert found["embedded"] > found["weight"] / 2
    assert found["two_sessions"] < found["weight"] / 8
