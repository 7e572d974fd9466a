"""examples/cpp decodes the same tokens as Python, through the ONNX Runtime library inside the wheel."""

import subprocess
from pathlib import Path

import onnxruntime
import pytest
import torch
from native_build import build, run
from transformers import AutoConfig, AutoModelForCausalLM

from optimum_nm import NMConfig, NMOptimizer, library_path, session_options
from optimum_nm.evaluate.onnx_decoder import OnnxDecoder
from optimum_nm.onnx.export import export_checkpoint

PROMPT = [5, 17, 42, 99, 3]
COUNT = 16
RUNTIME = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"))


@pytest.fixture(scope="module")
def program():
    return build("examples/cpp", "cpp-example", ["decode"]) / "decode"


@pytest.fixture(scope="module")
def packed(tmp_path_factory, tiny_llama_folder, tokenizer, text):
    torch.manual_seed(0)
    architecture = AutoConfig.from_pretrained(tiny_llama_folder)
    architecture.num_attention_heads, architecture.head_dim = 6, 16  # the fused graph wants multiples of 16
    model = AutoModelForCausalLM.from_config(architecture)
    for parameter in model.parameters():  # untrained weights are so small that one token would follow for ever
        parameter.data.mul_(8 if parameter.ndim == 2 else 1)
    folder = tmp_path_factory.mktemp("cpp") / "packed"
    config = NMConfig(outliers="16:256", calibration_samples=2, calibration_length=32)
    NMOptimizer(model, tokenizer).optimize(folder, config, [text], progress=False)
    return folder


@pytest.mark.parametrize("graph", ["traced", "fused"])
def test_same_tokens_as_python(program, packed, graph, tmp_path):
    model = export_checkpoint(packed, tmp_path / graph, graph=graph)
    expected = OnnxDecoder(model, session_options(1)).generate(PROMPT, COUNT)
    assert len(set(expected)) > 3
    words = run(program, RUNTIME, library_path(), model, COUNT, *PROMPT).split()
    assert [int(word) for word in words] == expected
    assert run(program, RUNTIME, library_path(), model, 1, *PROMPT).split() == words[:1]


def test_graph_without_cache_does_one_forward(program, packed, tmp_path):
    model = export_checkpoint(packed, tmp_path / "plain", "text-generation")
    expected = OnnxDecoder(model, session_options(1)).generate(PROMPT, 1)
    arguments = [program, RUNTIME, library_path(), model]
    assert run(*arguments, 1, *PROMPT).split() == [str(expected[0])]
    failed = subprocess.run([*arguments, "2", *map(str, PROMPT)], capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr == "the model has no key-value cache.\n"


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_missing_file_is_an_error(program, packed, tmp_path, wrong):
    paths = [RUNTIME, library_path(), packed / "config.json"]
    paths[wrong] = tmp_path / "absent"
    failed = subprocess.run([program, *paths, "1", "5"], capture_output=True, text=True)
    assert failed.returncode == 1 and "absent" in failed.stderr
