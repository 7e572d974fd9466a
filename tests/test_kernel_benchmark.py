"""The kernel benchmark: valid weights, chains that compute what they should, and what is reported of them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from optimum_nm.config import LayerConfig
from optimum_nm.errors import NMError
from optimum_nm.evaluate.kernel_benchmark import PATTERN, KernelBenchmark, Timing, benchmark_kernels, select_kernels
from optimum_nm.evaluate.kernel_models import kernels, write_chains
from optimum_nm.evaluate.kernel_plot import check_plot_file, plot
from optimum_nm.onnx.operator import INPUT_NAMES
from optimum_nm.packing.packed_weight import PackedWeight, packed_shapes
from optimum_nm.patterns import NMPattern, OutlierPattern
from optimum_nm.runtime.session import session_options

SHAPE = (320, 96)  # a shorter last block of outliers and of scales
CHAIN_BYTES = 200_000
KERNELS = kernels(PATTERN)
PACKED = [name for name, kernel in KERNELS.items() if kernel.rivals]


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chains")
    return write_chains(folder, list(KERNELS.values()), PATTERN, *SHAPE, CHAIN_BYTES)


def layers_of(path):
    """(node, its attributes, its constants in order) of each layer, read back from the file."""
    model = onnx.load(path)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        yield node, attributes, [tensors[name] for name in node.input[1:]]


def packed_weight(attributes, constants):
    text = {name: value.decode() if isinstance(value, bytes) else value for name, value in attributes.items()}
    outliers = OutlierPattern(text["outlier_k"], text["outlier_block"]) if text["outlier_k"] else None
    pattern = NMPattern(text["n"], text["m"])
    config = LayerConfig(pattern, outliers, text["dtype"], text["group_size"], text["positions"], "float16")
    shapes = packed_shapes(text["K"], text["N"], config)
    raw = dict(zip(INPUT_NAMES[1:], (tensor.raw_data for tensor in constants), strict=False))
    tensors = {
        name: torch.from_numpy(np.frombuffer(raw[name], np.uint8).copy()).view(dtype).reshape(shape)
        for name, (shape, dtype) in shapes.items()
    }
    return PackedWeight(text["K"], text["N"], config, tensors)


def dense_matrix(node, attributes, constants):
    """`[in_features, out_features]` in float64, by the definition of ONNX Runtime's operators."""
    weight, *scales = (numpy_helper.to_array(tensor).astype(np.float64) for tensor in constants)
    if node.op_type == "MatMul":
        return weight
    if node.op_type == "DynamicQuantizeMatMul":
        return weight * scales[0]
    n, blocks, _ = weight.shape
    q = weight.astype(np.uint8)
    if attributes["bits"] == 4:
        q = np.stack([q & 15, q >> 4], axis=-1).reshape(n, blocks, -1)
    q = q - 2.0 ** (attributes["bits"] - 1)
    return (q * scales[0].reshape(n, blocks, 1)).reshape(n, -1)[:, : attributes["K"]].T


def expected(path, x):
    for node, attributes, constants in layers_of(path):
        if node.op_type == "MatMulNM":
            x = x @ packed_weight(attributes, constants).unpack().double().numpy().T
        else:
            x = x @ dense_matrix(node, attributes, constants)
    return x


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_multiplies_by_the_weights_of_its_chain(chains, name):
    check_chain(chains[name], name)


@pytest.mark.parametrize("pattern", ["11:16", "16:16", "3:4", "16:32"])
def test_any_pattern_can_be_measured(tmp_path, pattern):
    pattern = NMPattern.parse(pattern)
    chosen = select_kernels([f"{pattern} float16*", f"{pattern} int4*"], pattern)
    assert len(chosen) == (3 if pattern.is_dense else 12)
    chains = write_chains(tmp_path, chosen, pattern, *SHAPE, CHAIN_BYTES)
    for kernel in chosen:
        for _, attributes, constants in layers_of(chains[kernel.name]):
            packed_weight(attributes, constants).validate()
        check_chain(chains[kernel.name], kernel.name)


def check_chain(path, name):
    x = np.random.default_rng(1).standard_normal((3, SHAPE[0]), dtype=np.float32)
    session = onnxruntime.InferenceSession(path, session_options(1), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    reference = expected(path, x.astype(np.float64))
    rounded = ("int" in name and "accuracy level 0" not in name) or name.startswith(("Dynamic", "MatMulNBits"))
    error = np.linalg.norm(y - reference) / np.linalg.norm(reference)
    assert error < (0.05 if rounded else 1e-5)
    assert 0.05 < y.std() < 20


@pytest.mark.parametrize("name", PACKED)
def test_packed_weights_are_valid_and_differ(chains, name):
    packed = [packed_weight(attributes, constants) for _, attributes, constants in layers_of(chains[name])]
    for weight in packed:
        weight.validate()
    assert [(w.in_features, w.out_features) for w in packed[:2]] == [SHAPE, SHAPE[::-1]]
    assert not torch.equal(packed[0].tensors["values"], packed[2].tensors["values"])
    kernel = KERNELS[name]
    assert len(packed) == kernel.chain_length(*SHAPE, CHAIN_BYTES)
    assert packed[0].nbytes == kernel.layer_bytes(*SHAPE)
    assert sum(weight.nbytes for weight in packed) >= 0.9 * CHAIN_BYTES


def test_chains_share_files(chains):
    files = {file.name for file in next(iter(chains.values())).parent.glob("*.bin")}
    assert len([name for name in files if "int8.values" in name]) == 2  # one of each shape, for eight kernels
    assert len([name for name in files if "codes" in name]) == 2


@pytest.fixture(scope="module")
def result():
    names = ["MatMul float32", "MatMulNBits 8*", "8:16 int8 codes", "8:16 float16 codes"]
    return benchmark_kernels(
        shapes=[(64, 32), (48, 48)], rows=(1, 3), threads=(1, 2), names=names, rounds=2, chain_bytes=20_000
    )


def test_every_setting_is_measured_in_every_round(result):
    measured = {(t.in_features, t.out_features, t.threads, t.rows, t.kernel): t for t in result.timings}
    assert len(measured) == len(result.timings) == 2 * 2 * 2 * 4
    assert all(len(timing.seconds) == 2 and min(timing.seconds) > 0 for timing in result.timings)
    assert {threads: len(values) for threads, values in result.bandwidths.items()} == {1: 4, 2: 4}
    assert not result.left_out


def timing(kernel, seconds, rows=1, bits=8.0):
    return Timing(kernel, 1000, 1000, 1, rows, 3, bits, seconds, KERNELS[kernel].rivals)


def test_figures_follow_from_the_samples():
    timings = [
        timing("DynamicQuantizeMatMul int8", [4e-6, 5e-6, 6e-6]),
        timing("MatMulNBits 8-bit block 128", [1e-5, 1e-5, 1e-5]),
        timing("8:16 int8 codes", [1e-6, 2e-6, 4e-6], bits=5.0),
        timing("8:16 int8 codes", [1e-6], rows=16),
        timing("8:16 int4 codes", [1e-6]),
    ]
    benchmark = KernelBenchmark({"CPU": "a"}, {"rounds": 3}, {1: [1e9, 3e9, 2e9]}, timings, {})
    assert benchmark.speedup(timings[2]) == pytest.approx(2.5)
    assert [benchmark.speedup(timings[i]) for i in (0, 3, 4)] == [None] * 3
    assert timings[2].bandwidth == pytest.approx(5.0 / 8 * 1e6 / 2e-6)
    assert timings[2].spread == pytest.approx(0.75)
    assert benchmark.bandwidth(1) == 2e9


def test_table_names_kernels_threads_and_memory(result):
    text = str(result)
    assert "64×32, 1 thread; memory reads at" in text and "48×48, 2 threads" in text
    assert "8:16 int8 codes" in text and "µs M=3" in text and "instruction set" in text and "onnxruntime" in text


def test_a_picture_is_written_whole(result, tmp_path):
    plot(result, tmp_path / "kernels.png")
    assert (tmp_path / "kernels.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [file.name for file in tmp_path.iterdir()] == ["kernels.png"]


@pytest.mark.parametrize("name", ["kernels.pdf", "missing/kernels.png"])
def test_a_picture_that_cannot_be_written_is_refused_before_measuring(tmp_path, name):
    with pytest.raises(NMError, match=name.rpartition("/")[2]):
        check_plot_file(tmp_path / name)


def test_an_unknown_kernel_is_refused():
    with pytest.raises(NMError, match="'int9\\*'"):
        select_kernels(["*int8*", "int9*"])


def test_a_kernel_that_this_runtime_lacks_is_left_out(monkeypatch):
    real = onnxruntime.InferenceSession

    def without_nbits(path, *args, **options):
        if any(node.op_type == "MatMulNBits" for node in onnx.load(path, load_external_data=False).graph.node):
            raise RuntimeError("MatMulNBits is not implemented\nat length")
        return real(path, *args, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", without_nbits)
    names = ["MatMulNBits 8*", "8:16 int8 codes"]
    result = benchmark_kernels(shapes=[(32, 32)], rows=(1,), threads=(1,), names=names, rounds=1, chain_bytes=1000)
    assert result.left_out == {"MatMulNBits 8-bit block 128": "MatMulNBits is not implemented"}
    assert [timing.kernel for timing in result.timings] == ["8:16 int8 codes"]
    assert "MatMulNBits 8-bit block 128 left out" in str(result)


def run_command(*arguments):
    command = [sys.executable, "-m", "optimum_nm", "benchmark", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_command_prints_json_alone_and_writes_the_picture(tmp_path):
    size = ("--shapes", "2048x2048", "--rows", "1", "--threads", "1", "--rounds", "1")
    names = ("--kernels", "MatMulNBits 4-bit block 128", "DynamicQ*")
    run = run_command("kernels", *size, *names, "--plot", tmp_path / "a.png", "--json")
    assert run.returncode == 0, run.stderr
    data = json.loads(run.stdout)
    assert set(data) == {"machine", "settings", "read_bandwidth", "timings", "left_out"}
    assert [timing["kernel"] for timing in data["timings"]] == [
        "DynamicQuantizeMatMul int8",
        "MatMulNBits 4-bit block 128",
    ]
    assert data["timings"][0]["in_features"] == 2048 and len(data["timings"][0]["seconds"]) == 1
    assert data["read_bandwidth"][0]["bytes_per_second"] > 0
    assert Path(tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["kernels", "--shapes", "4096"], "'4096'"), (["kernels", "--rows", "0"], "'0'"), ([], "--model")],
)
def test_wrong_usage_is_told(arguments, message):
    run = run_command(*arguments)
    assert run.returncode == 2 and message in run.stderr.splitlines()[-1]
