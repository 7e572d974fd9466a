"""convert-onnx on what the model builder of onnxruntime-genai writes for a zero-filled sparse model."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from test_convert_exports import LAYERS, TOKENS, zero_fill
from transformers import AutoConfig, AutoModelForCausalLM

from optimum_nm.errors import NMError
from optimum_nm.evaluate.onnx_decoder import OnnxDecoder
from optimum_nm.onnx.convert import convert_onnx
from optimum_nm.runtime.library import library_path
from optimum_nm.runtime.session import session_options

JOINT = [name for name in LAYERS if not name.endswith(("k_proj", "v_proj"))]  # query, key and value are one matrix


def build(folder, tokenizer, model_type, precision, **changes):
    """What the builder makes of a tiny sparse model with random norms and biases, and the model."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    # 4.57 writes null for what is no scaling, which the builder does not read
    rope = {"rope_scaling": {"rope_type": "default"}, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **(sizes | tokens | rope | changes))
    model = zero_fill(AutoModelForCausalLM.from_config(config))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.2)
    model.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    program = Path(__file__).with_name("genai_builder.py")
    options = {"-m": folder / "dense", "-o": folder / "built", "-c": folder / "cache", "-p": precision, "-e": "cpu"}
    arguments = [str(text) for option in options.items() for text in option]
    run = subprocess.run([sys.executable, program, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return folder / "built" / "model.onnx", model


def read(path, options, prompt):
    """Logits of the first tokens, and of those that follow one by one."""
    decoder = OnnxDecoder(path, options)
    return np.concatenate([decoder.read(TOKENS[:prompt]), *(decoder.read([token]) for token in TOKENS[prompt:])])


def assert_same_logits(source, target, model, tolerance, prompt):
    expected = read(source, onnxruntime.SessionOptions(), prompt)
    with torch.no_grad():
        in_torch = model(torch.tensor([TOKENS])).logits[0].numpy()
    for options in (session_options(1), onnxruntime.SessionOptions()):
        found = read(target, options, prompt)
        assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()
        assert np.abs(found - in_torch).max() <= tolerance * np.abs(in_torch).max()


def operators(path):
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


@pytest.fixture(scope="module")
def tied_qwen2(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("qwen2")
    return build(folder, tokenizer, "qwen2", "fp32", tie_word_embeddings=True)


def test_tied_qwen2(tied_qwen2, tmp_path):
    """Query, key and value have a bias; the embedding's rows are those of the output layer's weight transposed."""
    source, model = tied_qwen2
    shutil.copyfile(source.with_name("genai_config.json"), tmp_path / "genai_config.json")
    summary = convert_onnx(source, tmp_path / "model.onnx")
    names = [name.replace("self_attn", "attn").replace("q_proj", "qkv_proj") for name in JOINT]
    assert [weight.name for weight in summary.packed] == names
    assert [(weight.name, weight.kept_because) for weight in summary.kept] == [("lm_head", "Gather uses it too")]
    assert_same_logits(source, tmp_path / "model.onnx", model, 1e-5, prompt=5)
    before, after = operators(source), operators(tmp_path / "model.onnx")
    assert after == before - Counter(MatMul=10, Add=2) + Counter(MatMulNM=10)


def test_onnxruntime_genai_runs_it(tied_qwen2, tmp_path):
    import onnxruntime_genai

    source, model = tied_qwen2
    shutil.copytree(source.parent, tmp_path, dirs_exist_ok=True)
    convert_onnx(source, tmp_path / "model.onnx", overwrite=True)
    shutil.copy(library_path(), tmp_path)
    config = json.loads((tmp_path / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"]["custom_ops_library"] = library_path().name
    (tmp_path / "genai_config.json").write_text(json.dumps(config))
    runtime = onnxruntime_genai.Model(str(tmp_path))
    parameters = onnxruntime_genai.GeneratorParams(runtime)
    parameters.set_search_options(min_length=24, max_length=24, do_sample=False)
    generator = onnxruntime_genai.Generator(runtime, parameters)
    generator.append_tokens(np.array([TOKENS], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    expected = model.generate(torch.tensor([TOKENS]), min_length=24, max_length=24, do_sample=False)
    assert [int(token) for token in generator.get_sequence(0)] == expected[0].tolist()


def test_head_size_that_nothing_tells(tied_qwen2, tmp_path):
    source, _ = tied_qwen2
    convert_onnx(source, tmp_path / "model.onnx")
    with pytest.raises(NMError, match=r"leaves the size of an attention head open; .*genai_config\.json must tell"):
        OnnxDecoder(tmp_path / "model.onnx", session_options(1))


def test_float16_llama(tokenizer, tmp_path):
    """Made for GPUs: query, key and value are apart, and on the CPU the dense graph itself fails on a second token."""
    source, model = build(tmp_path, tokenizer, "llama", "fp16", tie_word_embeddings=False)
    target = source.with_name("packed.onnx")
    summary = convert_onnx(source, target, skip_dense=True)
    assert [weight.name for weight in summary.packed] == [name.replace("self_attn", "attn") for name in LAYERS]
    ((name, reason),) = [(weight.name, weight.kept_because) for weight in summary.kept]
    assert name == "lm_head" and reason.startswith("it keeps 16 of 16")
    assert_same_logits(source, target, model, 5e-3, prompt=len(TOKENS))
    assert operators(target) == operators(source) - Counter(MatMul=14) + Counter(MatMulNM=14)
