"""convert-onnx on every form in which a constant weight occurs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from convert_models import (
    HALF_TYPES,
    IN,
    OUT,
    assert_same_outputs,
    convert,
    dense,
    linear_model,
    node,
    run,
    sparse,
    structure,
    two_layers,
    vector,
    write_model,
)
from onnx import TensorProto, helper, numpy_helper

from optimum_nm import PackedWeight
from optimum_nm.errors import NMError
from optimum_nm.onnx.convert import convert_onnx
from optimum_nm.onnx.operator import is_matmul_nm
from optimum_nm.runtime.session import session_options

GEMM = {"rank": 2}
FORMS = {
    "MatMul": ([node("MatMul", "x w", "y")], {"w": sparse().T}, {}),
    "MatMul of a vector": ([node("MatMul", "x w", "y")], {"w": sparse().T}, {"rank": 1}),
    "MatMul and bias": (
        [node("MatMul", "x w", "h"), node("Add", "h b", "y")],
        {"w": sparse().T, "b": vector()},
        {},
    ),
    "bias and MatMul": (
        [node("MatMul", "x w", "h"), node("Add", "b h", "y")],
        {"w": sparse().T, "b": vector()},
        {},
    ),
    "Transpose": (
        [node("Transpose", "w", "t", perm=[1, 0]), node("MatMul", "x t", "y")],
        {"w": sparse()},
        {},
    ),
    "Identity": ([node("Identity", "w", "t"), node("MatMul", "x t", "y")], {"w": sparse().T}, {}),
    "Cast and Transpose": (
        [node("Cast", "w", "c", to=TensorProto.FLOAT), node("Transpose", "c", "t"), node("MatMul", "x t", "y")],
        {"w": sparse().astype(np.float16)},
        {},
    ),
    "Constant": (
        [node("Constant", "", "w", value=numpy_helper.from_array(sparse().T.copy())), node("MatMul", "x w", "y")],
        {},
        {},
    ),
    "Constant bias": (
        [
            node("MatMul", "x w", "h"),
            node("Constant", "", "b", value=numpy_helper.from_array(vector())),
            node("Add", "h b", "y"),
        ],
        {"w": sparse().T},
        {},
    ),
    "Gemm": ([node("Gemm", "x w", "y")], {"w": sparse().T}, GEMM),
    "Gemm of a linear layer": ([node("Gemm", "x w b", "y", transB=1)], {"w": sparse(), "b": vector()}, GEMM),
    "Gemm with factors": (
        [node("Gemm", "x w b", "y", transB=1, alpha=0.5, beta=-3.0)],
        {"w": sparse(), "b": vector()},
        GEMM,
    ),
    "Gemm with a bias of two dimensions": (
        [node("Gemm", "x w b", "y", transB=1)],
        {"w": sparse(), "b": vector()[None]},
        GEMM,
    ),
    "Gemm with one bias for all": ([node("Gemm", "x w b", "y", transB=1)], {"w": sparse(), "b": vector(1)}, GEMM),
    "Gemm with a scalar bias": (
        [node("Gemm", "x w b", "y", transB=1)],
        {"w": sparse(), "b": vector(1)[0]},
        GEMM,
    ),
    "Gemm with a bias of no weight": (
        [node("Gemm", "x w b", "y", transB=1, beta=0.0)],
        {"w": sparse(), "b": vector()},
        GEMM,
    ),
}


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_form(tmp_path, form, external):
    nodes, constants, options = FORMS[form]
    constants = {name: np.array(tensor, order="C") for name, tensor in constants.items()}
    source = write_model(tmp_path / "model.onnx", nodes, constants, external=external, **options)
    target, summary = convert(source)
    types, names = structure(target)
    assert types == ["MatMulNM"] or types == ["Constant", "MatMulNM"]
    assert not names & {"w", "t"} and len(summary.packed) == 1 and summary.rounding_error == 0
    assert summary.packed[0].shape == (OUT, IN)
    assert_same_outputs(source, target, rank=options.get("rank", 3))


KEPT = {
    "no constant row": ([node("Gemm", "x w b", "y", transB=1)], {"w": sparse(), "b": dense(5, OUT)}, GEMM),
    "transposes": (
        [node("Transpose", "x", "t"), node("Gemm", "t w", "y", transA=1, transB=1)],
        {"w": sparse()},
        GEMM,
    ),
    "Relu uses it too": (
        [node("MatMul", "x w", "h"), node("Relu", "w", "r"), node("MatMul", "x r", "i"), node("Add", "h i", "y")],
        {"w": sparse().T},
        {},
    ),
}


@pytest.mark.parametrize("reason", KEPT)
def test_what_matmul_nm_cannot_stand_for_is_left(tmp_path, reason):
    nodes, constants, options = KEPT[reason]
    constants = {name: np.array(tensor, order="C") for name, tensor in constants.items()} | {
        "other": sparse(OUT, OUT).T.copy()
    }
    nodes = [*nodes, node("MatMul", "y other", "z", "other")]
    source = write_model(tmp_path / "model.onnx", nodes, constants, **options)
    target, summary = convert(source)
    assert [weight.name for weight in summary.packed] == ["other"]
    assert [weight.tensor for weight in summary.kept] == ["w"] and reason in summary.kept[0].kept_because
    assert_same_outputs(source, target, rank=options.get("rank", 3))


def test_bias_is_not_absorbed_where_the_product_is_needed_or_the_shape_would_change(tmp_path):
    nodes = [
        node("MatMul", "x w", "h"),
        node("Add", "h b", "i"),
        node("Mul", "h i", "j"),
        node("MatMul", "j v", "k"),
        node("Add", "k wide", "y"),
    ]
    constants = {"w": sparse().T.copy(), "v": sparse(OUT, OUT).T.copy(), "b": vector(), "wide": vector()[None, None]}
    source = write_model(tmp_path / "model.onnx", nodes, constants)
    target, _ = convert(source)
    assert structure(target)[0] == ["MatMulNM", "Add", "Mul", "MatMulNM", "Add"]
    assert_same_outputs(source, target)


def test_weights_are_shared_as_before(tmp_path):
    """One constant in two nodes is packed once; an embedding that is also the output layer stays one table."""
    square, table = sparse(IN, IN).T.copy(), sparse(OUT, IN)
    nodes = [
        node("MatMul", "x w", "h"),
        node("Identity", "w", "same"),
        node("MatMul", "h same", "i"),
        node("Gather", "table zero", "row"),
        node("Add", "i row", "j"),
        node("Transpose", "table", "t", perm=[1, 0]),
        node("MatMul", "j t", "y", "/lm_head/MatMul"),
    ]
    constants = {"w": square, "table": table, "zero": np.int64(0)}
    source = write_model(tmp_path / "model.onnx", nodes, constants)
    target, summary = convert(source)
    types, names = structure(target)
    assert types.count("MatMulNM") == 2 and "table" in names and "w" not in names
    assert len([name for name in names if name.endswith(".values")]) == 1
    assert [(weight.name, weight.kept_because) for weight in summary.kept] == [("lm_head", "Gather uses it too")]
    assert_same_outputs(source, target)


def test_same_name_twice(tmp_path):
    nodes = [node("MatMul", "x w", "h", "/mlp/MatMul"), node("MatMul", "h v", "y", "/mlp/MatMul_1")]
    constants = {"w": sparse(IN, IN).T.copy(), "v": sparse().T.copy(), "mlp.values": vector()}
    source = write_model(tmp_path / "model.onnx", nodes, constants)
    target, summary = convert(source)
    assert [weight.name for weight in summary.packed] == ["mlp", "mlp_2"]
    assert_same_outputs(source, target)


@pytest.mark.parametrize("inside", [True, False])
def test_subgraphs(tmp_path, inside):
    """Branches of an If that multiply by a constant of their own, or of the graph around them."""
    weight = {"w": sparse().T.copy()}
    branches = {}
    for branch, op in (("then_branch", "Relu"), ("else_branch", "Neg")):
        nodes = [helper.make_node("MatMul", ["x", "w"], [f"{branch}h"]), helper.make_node(op, [f"{branch}h"], [branch])]
        output = helper.make_tensor_value_info(branch, TensorProto.FLOAT, None)
        tensors = [numpy_helper.from_array(weight["w"], "w")] if inside else []
        branches[branch] = helper.make_graph(nodes, branch, [], [output], tensors)
    nodes = [
        node("ReduceSum", "x", "sum", keepdims=0),
        node("Greater", "sum zero", "condition"),
        node("If", "condition", "y", **branches),
    ]
    constants = {"zero": np.float32(0)} | ({} if inside else weight)
    source = write_model(tmp_path / "model.onnx", nodes, constants)
    target, summary = convert(source)
    assert len(summary.packed) == (2 if inside else 1) and "w" not in structure(target)[1]
    assert_same_outputs(source, target)


@pytest.mark.parametrize("element_type", HALF_TYPES)
def test_half_precision_models(tmp_path, element_type):
    weight = torch.from_numpy(sparse()).to(HALF_TYPES[element_type]).T.contiguous()
    raw = weight.view(torch.int16).numpy().tobytes()
    constants = {"w": helper.make_tensor("w", element_type, weight.shape, raw, raw=True)}
    nodes = [
        node("Cast", "x", "h", to=element_type),
        node("MatMul", "h w", "z"),
        node("Cast", "z", "y", to=TensorProto.FLOAT),
    ]
    source = write_model(tmp_path / "model.onnx", nodes, constants)
    target, _ = convert(source, weight_dtype="float16" if element_type == TensorProto.FLOAT16 else "bfloat16")
    x = np.random.default_rng(3).standard_normal((3, 5, IN)).astype(np.float32)
    activations = torch.from_numpy(x).to(HALF_TYPES[element_type]).double()
    expected = (activations @ weight.double()).numpy()
    for options in (session_options(1), None):
        found = onnxruntime.InferenceSession(str(target), options).run(None, {"x": x})[0]
        np.testing.assert_allclose(found, expected, atol=2e-2 * np.abs(expected).max())


@pytest.mark.parametrize("opset", [13, 18, 20, 23])
def test_opsets(tmp_path, opset):
    source = linear_model(tmp_path / "model.onnx", sparse(), opset=opset, ir_version=10 if opset > 20 else 7)
    target, _ = convert(source)
    assert_same_outputs(source, target)


def test_the_standard_domain_by_its_other_name(tmp_path):
    source = linear_model(tmp_path / "model.onnx", sparse())
    model = onnx.load(source)
    model.opset_import[0].domain = "ai.onnx"
    onnx.save(model, source)
    target, _ = convert(source)
    assert_same_outputs(source, target)


@pytest.mark.parametrize("opset", [11, 12])
def test_opsets_too_old_for_the_fallback(tmp_path, opset):
    source = linear_model(tmp_path / "model.onnx", sparse(), opset=opset, ir_version=6)
    with pytest.raises(NMError, match=rf"has opset {opset}, and the fallback function needs 13"):
        convert(source)
    target, _ = convert(source, fallback=False)
    assert not onnx.load(target).functions
    np.testing.assert_allclose(run(target, session_options(1)), run(source), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", ["codes", "bitmap"])
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "8:16", "12:32", "16:16"])
@pytest.mark.parametrize("weight_dtype", ["float32", "float16", "bfloat16", "int8", "int4"])
def test_the_node_multiplies_by_what_pack_makes(tmp_path, weight_dtype, pattern, positions):
    weight = dense() if pattern == "16:16" else sparse(pattern=pattern)
    storage = {"pattern": pattern, "positions": positions, "group_size": 32}
    source = linear_model(tmp_path / "model.onnx", weight)
    target, summary = convert(source, weight_dtype=weight_dtype, accuracy_level=0, **storage)
    packed = PackedWeight.pack(torch.from_numpy(weight), dtype=weight_dtype, **storage).unpack().numpy()
    assert_same_outputs(linear_model(tmp_path / "unpacked.onnx", packed), target)
    error = np.abs(packed - weight).max() / np.abs(weight).max()
    assert summary.rounding_error == pytest.approx(error)


def test_accuracy_level(tmp_path):
    source = linear_model(tmp_path / "model.onnx", sparse())
    for weight_dtype, level, expected in (("float16", None, 0), ("int8", None, 4), ("int8", 0, 0), ("float16", 4, 4)):
        target, _ = convert(source, weight_dtype=weight_dtype, accuracy_level=level, overwrite=True)
        (matmul,) = filter(is_matmul_nm, onnx.load(target).graph.node)
        assert helper.get_node_attr_value(matmul, "accuracy_level") == expected


def test_converting_again_packs_what_was_left(tmp_path):
    nodes = [node("MatMul", "x w", "h", "/a/MatMul"), node("MatMul", "h v", "y", "/lm_head/MatMul")]
    source = write_model(tmp_path / "model.onnx", nodes, {"w": sparse(IN, IN).T.copy(), "v": dense().T.copy()})
    once, summary = convert(source, exclude=["lm_head"])
    assert [weight.kept_because for weight in summary.kept] == ["it is excluded"]
    twice = tmp_path / "twice.onnx"
    convert_onnx(once, twice, "16:16", "float32")
    assert structure(twice)[0] == ["MatMulNM", "MatMulNM"]
    assert_same_outputs(source, twice)


def write_wide_model(path, layers=16, size=1024):
    """Square float32 matrices of 4 MiB each, as external data."""
    weight = np.tile(sparse(64, size), (size // 64, 1)).T.copy()
    nodes = [node("MatMul", f"h{i} w{i}", f"h{i + 1}") for i in range(layers)]
    nodes = [node("Identity", "x", "h0"), *nodes, node("Identity", f"h{layers}", "y")]
    constants = {f"w{i}": np.roll(weight, 64 * i, axis=1) for i in range(layers)}
    return write_model(path, nodes, constants, sizes=(size, size), external=True)


PEAK = """
import resource, sys
from optimum_nm.onnx.checker import check_file
from optimum_nm.onnx.convert import convert_onnx
convert_onnx(*sys.argv[1:3], overwrite=True)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert_onnx(*sys.argv[3:5])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) // 1024)
"""


def test_memory_is_that_of_a_layer_not_of_the_model(tmp_path):
    small = linear_model(tmp_path / "small.onnx", sparse())
    large = write_wide_model(tmp_path / "large.onnx")
    paths = [small, tmp_path / "s.onnx", large, tmp_path / "l.onnx"]
    result = subprocess.run([sys.executable, "-c", PEAK, *map(str, paths)], capture_output=True, text=True, check=True)
    model_mib = (tmp_path / "weights.bin").stat().st_size >> 20
    assert model_mib == 64 and int(result.stdout) < model_mib / 2


def test_quantized_weights_are_named(tmp_path):
    """What onnxruntime-genai's builder makes with -p int4: nothing in it is a float matrix."""
    attributes = {"K": IN, "N": OUT, "bits": 4, "block_size": 64}
    product = node("MatMulNBits", "x q s", "y", "/up/MatMul", domain="com.microsoft", **attributes)
    quantized = {"q": np.zeros((OUT, 1, 32), np.uint8), "s": np.ones((OUT, 1), np.float32)}
    source = write_model(tmp_path / "model.onnx", [product], quantized)
    model = onnx.load(source)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, source)
    with pytest.raises(NMError, match=r"nothing to pack \(the weight of MatMulNBits '/up/MatMul' is quantized; "):
        convert_onnx(source, tmp_path / "packed.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("operator,opset", [("SimplifiedLayerNormalization", 17), ("LayerNormalization", 14)])
def test_norms_that_only_onnxruntime_has(tmp_path, operator, opset):
    """Its optimizer and the builder of onnxruntime-genai put them into ONNX's own domain."""
    nodes = [node(operator, "x s", "h", axis=-1), node("MatMul", "h w", "y")]
    source = write_model(tmp_path / "model.onnx", nodes, {"w": sparse().T, "s": vector(IN)}, opset=opset)
    target, _ = convert(source)
    assert_same_outputs(source, target)


def command(*arguments):
    program = Path(sys.executable).with_name("optimum-cli")
    return subprocess.run([program, "nm", "convert-onnx", *map(str, arguments)], capture_output=True, text=True)


def test_command(tmp_path):
    source = two_layers(tmp_path / "model.onnx", dense())
    target = tmp_path / "packed.onnx"
    refused = command("--model", source, "--output", target)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("optimum-cli nm convert-onnx: error: weight 'onnx::MatMul_7' of node '/lm_head/")
    assert refused.stderr.count("\n") == 1
    packed = command("--model", source, "--output", target, "--exclude", "lm_head", "--weight-dtype", "int8", "--json")
    outcome = json.loads(packed.stdout)
    assert packed.returncode == 0 and outcome["output"] == str(target)
    assert [weight["name"] for weight in outcome["packed"]] == ["up"]
    assert [weight["name"] for weight in outcome["kept"]] == ["lm_head"]
    assert command("--model", source).returncode == 2
