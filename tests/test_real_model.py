"""SmolLM2-135M-Instruct from end to end: torch, a bare InferenceSession and ORTModelForCausalLM agree on one file."""

import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

from optimum_nm import NMConfig, NMModelForCausalLM, NMOptimizer, session_options
from optimum_nm.evaluate.onnx_decoder import OnnxDecoder
from optimum_nm.evaluate.verify import verify_checkpoint
from optimum_nm.onnx.export import export_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from demo_data import smollm2, wikipedia_articles

pytestmark = pytest.mark.model

NEW_TOKENS = 64
HIDDEN, MLP, KEY_VALUE, BLOCKS, VOCABULARY = 576, 1536, 192, 30, 49152


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """8:16 + 16:256, float16 values, calibrated on as little as does."""
    folder = tmp_path_factory.mktemp("smollm2") / "sparse"
    train, _ = wikipedia_articles()
    location, gguf_file = smollm2()
    config = NMConfig(outliers="16:256", solver="mask", calibration_samples=2, calibration_length=256)
    NMOptimizer.from_pretrained(location, gguf_file=gguf_file).optimize(folder, config, train)
    export_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def prompt(sparse):
    message = [{"role": "user", "content": "What is a river?"}]
    return AutoTokenizer.from_pretrained(sparse).apply_chat_template(message, add_generation_prompt=True)


@pytest.fixture(scope="module")
def reference(sparse, prompt):
    """In torch: the most likely tokens one by one, and the logits after every token of prompt and answer."""
    model = NMModelForCausalLM.from_pretrained(sparse, dtype=torch.float32).eval()
    tokens = generate(model, prompt)
    with torch.no_grad():
        return tokens, model(torch.tensor([prompt + tokens])).logits[0].numpy()


def generate(model, prompt):
    """The most likely tokens one by one, also past an end of the text."""
    model.generation_config.eos_token_id = None
    inputs = torch.tensor([prompt])
    attended = torch.ones_like(inputs)  # else ends of messages, which are the padding token too, would be left out
    tokens = model.generate(inputs, attention_mask=attended, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokens[0, len(prompt) :].tolist()


def test_every_byte_is_sound(sparse):
    verification = verify_checkpoint(sparse)
    assert not verification.problems and verification.onnx
    assert verification.layers == BLOCKS * 7


def test_file_size_is_the_arithmetic_of_the_format(sparse):
    def packed(out_features, in_features):
        groups = in_features // 16
        full, rest = divmod(in_features, 256)
        outliers = full * 16 + rest // 16
        values, positions = groups * 8 * 2, groups * 16 // 8  # bitmaps
        return out_features * (values + positions + outliers * (2 + 1))

    attention = 2 * packed(HIDDEN, HIDDEN) + 2 * packed(KEY_VALUE, HIDDEN)
    mlp = 2 * packed(MLP, HIDDEN) + packed(HIDDEN, MLP)
    dense = VOCABULARY * HIDDEN + (2 * BLOCKS + 1) * HIDDEN  # embedding, which the output layer shares, and norms
    content = (sparse / "model.safetensors").read_bytes()
    (header,) = struct.unpack_from("<Q", content)
    assert len(content) == 8 + header + BLOCKS * (attention + mlp) + 4 * dense
    stored = json.loads(content[8 : 8 + header])
    assert not any("lm_head" in name for name in stored)


def test_model_file_holds_the_graph_and_no_second_copy_of_the_weights(sparse):
    assert (sparse / "model.onnx").stat().st_size < 8e6
    assert not list(sparse.glob("*.onnx*data"))


def test_bare_session_gives_the_same_logits(sparse, prompt, reference):
    tokens, logits = reference
    decoder = OnnxDecoder(sparse / "model.onnx", session_options())
    read = decoder.read(prompt + tokens)
    np.testing.assert_allclose(read, logits, atol=1e-3)


def test_bare_session_generates_the_same_tokens(sparse, prompt, reference):
    decoder = OnnxDecoder(sparse / "model.onnx", session_options())
    assert decoder.generate(prompt, NEW_TOKENS) == reference[0]


def test_ort_model_generates_the_same_tokens(sparse, prompt, reference):
    model = ORTModelForCausalLM.from_pretrained(sparse, session_options=session_options())
    assert generate(model, prompt) == reference[0]
