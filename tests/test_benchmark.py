"""Packed models beside the dense ones of ONNX Runtime: what is measured, of which files, and what is built for it."""

import json
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from optimum_nm.config import NMConfig
from optimum_nm.errors import NMError
from optimum_nm.evaluate import dense_variants as variants_module
from optimum_nm.evaluate.benchmark import FIGURES, benchmark
from optimum_nm.evaluate.dense_variants import VARIANTS, dense_variants
from optimum_nm.evaluate.onnx_decoder import OnnxDecoder
from optimum_nm.onnx.export import export_checkpoint
from optimum_nm.optimizer import NMOptimizer
from optimum_nm.runtime.session import session_options

TOKENS = [5, 9, 200, 41, 17, 8, 150, 33]
QUICK = {"threads": 1, "prompt_tokens": 8, "new_tokens": 2, "rounds": 2}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tokenizer):
    """A dense checkpoint with tied embeddings that has a fused graph: its head size is a multiple of 16."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = LlamaConfig(
        **sizes, **tokens, num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory, model_folder, text):
    folder = tmp_path_factory.mktemp("packed") / "sparse"
    config = NMConfig(calibration_samples=2, calibration_length=64)
    NMOptimizer.from_pretrained(model_folder).optimize(folder, config, [text], progress=False)
    export_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory, model_folder):
    return dense_variants(str(model_folder), {}, list(VARIANTS), tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def measured(packed, dense):
    return benchmark([packed], {name: dense[name] for name in ("float32", "int4")}, **QUICK)


def torch_logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].numpy()


@pytest.mark.parametrize(("name", "error"), [("float32", 1e-5), ("int8-dynamic", 0.1), ("int8", 0.05), ("int4", 0.4)])
def test_dense_variants_compute_the_model(dense, model_folder, name, error):
    logits = OnnxDecoder(dense[name] / "model.onnx", session_options(1)).read(TOKENS)
    expected = torch_logits(model_folder)
    assert np.linalg.norm(logits - expected) <= error * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("name", "operators"),
    [
        ("float32", {"MatMul"}),
        ("int8-dynamic", {"MatMulInteger"}),
        ("int8", {"MatMulNBits"}),
        ("int4", {"MatMulNBits", "GatherBlockQuantized"}),
    ],
)
def test_dense_variants_are_fused_and_quantized_whole(dense, name, operators):
    """The output layer too, which shares the embedding's weight: a weak opponent would flatter the packed model."""
    kinds = {node.op_type for node in onnx.load(dense[name] / "model.onnx", load_external_data=False).graph.node}
    assert kinds & {"MatMul", "MatMulInteger", "MatMulNBits", "GatherBlockQuantized"} == operators
    assert "GroupQueryAttention" in kinds


def test_dense_variants_have_their_tokenizer_and_no_second_copy_of_the_weights(dense):
    for folder in dense.values():
        AutoTokenizer.from_pretrained(folder)
        assert not list(folder.glob("*.safetensors"))


def test_dense_variants_of_a_model_without_fused_graph(tmp_path, model_folder, monkeypatch):
    monkeypatch.setattr(variants_module, "_has_fused_graph", lambda folder: False)
    folders = dense_variants(str(model_folder), {}, ["int8"], tmp_path)
    nodes = onnx.load(folders["int8"] / "model.onnx", load_external_data=False).graph.node
    kinds = [node.op_type for node in nodes]
    assert "GroupQueryAttention" not in kinds and kinds.count("MatMulNBits") == 2 * 7 + 1
    logits = OnnxDecoder(folders["int8"] / "model.onnx", session_options(1)).read(TOKENS)
    expected = torch_logits(model_folder)
    assert np.linalg.norm(logits - expected) <= 0.05 * np.linalg.norm(expected)


def test_dense_variants_are_built_once(tmp_path, model_folder, monkeypatch):
    first = dense_variants(str(model_folder), {}, ["float32"], tmp_path)
    monkeypatch.setattr(variants_module, "_export", None)
    assert dense_variants(str(model_folder), {}, ["float32"], tmp_path) == first


def test_dense_variants_leave_nothing_half_built(tmp_path, model_folder, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(variants_module, "_quantize", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        dense_variants(str(model_folder), {}, ["int8"], tmp_path)
    assert [path.name for path in tmp_path.glob("*/*")] == ["float32"]


def test_dense_variants_need_a_model_and_a_folder_to_write(tmp_path, model_folder):
    with pytest.raises(NMError, match="nowhere cannot be loaded as a causal language model"):
        dense_variants(str(tmp_path / "nowhere"), {}, ["float32"], tmp_path / "work")
    (tmp_path / "file").write_text("")
    with pytest.raises(NMError, match=r"work folder .*file.* cannot be written"):
        dense_variants(str(model_folder), {}, ["float32"], tmp_path / "file")


def test_every_model_is_measured_every_round(measured):
    assert [model.name for model in measured.models] == ["dense float32", "dense int4", "sparse"]
    for model in measured.models:
        assert set(model.samples) == set(FIGURES)
        assert all(len(values) == QUICK["rounds"] and min(values) >= 0 for values in model.samples.values())
        assert all(model.median(figure) > 0 for figure in ("load_seconds", "prefill", "decode", "peak_bytes"))


def test_size_is_that_of_all_the_files_a_runtime_reads(measured, packed):
    sizes = {path.name: path.stat().st_size for path in packed.iterdir()}
    assert measured.models[-1].file_bytes == sizes["model.onnx"] + sizes["model.safetensors"]


def test_table_and_data_say_the_same(measured):
    lines = str(measured).splitlines()
    data = json.loads(json.dumps(measured.to_dict()))
    for line, model in zip(lines[2:5], data["models"], strict=True):
        assert line.startswith(model["name"])
    assert lines[2].split()[-1] == "1.00" and f"{data['models'][0]['load_seconds']['median']:.2f}" in lines[2]
    assert "prompt tokens 8" in lines[6] and data["settings"]["rounds"] == 2
    assert data["machine"]["onnxruntime"] in lines[7]


def test_folders_of_the_same_name_are_told_apart(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "sparse")
    again = benchmark([packed, tmp_path / "sparse"], {}, **QUICK | {"rounds": 1})
    assert [model.name for model in again.models] == [str(packed), str(tmp_path / "sparse")]


def test_folder_without_onnx_model(tmp_path, packed):
    with pytest.raises(NMError, match=r"has no model.onnx; `optimum-cli nm export"):
        benchmark([tmp_path], {}, **QUICK)


def test_measurement_that_fails_is_named(tmp_path, packed):
    for file in packed.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "model.onnx").unlink()
    (tmp_path / "model.onnx").write_bytes(b"no ONNX")
    with pytest.raises(NMError, match=rf"{tmp_path.name} .* cannot be measured: .*ONNX Runtime cannot load") as caught:
        benchmark([tmp_path], {}, **QUICK)
    assert "\n" not in str(caught.value)


def test_measurement_of_a_process_is_one_json_object(packed):
    settings = {"threads": 1, "vocabulary": 300, "prompt_tokens": 4, "new_tokens": 1}
    specification = json.dumps({"path": str(packed / "model.onnx")} | settings)
    command = [sys.executable, "-m", "optimum_nm.evaluate.measure", specification]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert set(json.loads(run.stdout)) == set(FIGURES)
