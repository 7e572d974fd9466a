"""convert-onnx on what exporters write for a zero-filled sparse model: Optimum, torch and mobius."""

import logging

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from optimum_nm import PackedWeight
from optimum_nm.errors import NMError
from optimum_nm.evaluate.onnx_decoder import OnnxDecoder
from optimum_nm.nn.convert import linear_layers
from optimum_nm.onnx.convert import convert_onnx
from optimum_nm.onnx.operator import is_matmul_nm
from optimum_nm.runtime.session import session_options

LAYERS = [
    f"model.layers.{layer}.{name}"
    for layer in range(2)
    for name in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
]
TOKENS = [5, 17, 3, 99, 4, 250, 31, 8]


def zero_fill(model):
    """What tools without a packed format leave behind: 8:16 sparse weights, dense in the file."""
    for name, linear in linear_layers(model).items():
        if "lm_head" not in name:
            linear.weight.data = PackedWeight.pack(linear.weight).unpack()
    return model.eval()


def assert_same_logits(source, target):
    expected = OnnxDecoder(source, onnxruntime.SessionOptions()).read(TOKENS)
    for options in (session_options(1), onnxruntime.SessionOptions()):
        found = OnnxDecoder(target, options).read(TOKENS)
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.filterwarnings("ignore")
def test_traced_llama_of_optimum(tmp_path, tiny_llama_folder):
    from optimum.exporters.onnx import onnx_export_from_model

    model = zero_fill(AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32))
    onnx_export_from_model(model, tmp_path, task="text-generation-with-past", do_validation=False)
    source, target = tmp_path / "model.onnx", tmp_path / "packed.onnx"
    summary = convert_onnx(source, target, skip_dense=True)
    assert [weight.name for weight in summary.packed] == LAYERS
    assert [weight.name for weight in summary.kept] == ["lm_head"]
    assert_same_logits(source, target)


class Network(torch.nn.Module):
    """Two linear layers, the second used twice, and an output layer."""

    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(40, 48)
        self.square = torch.nn.Linear(48, 48, bias=False)
        self.lm_head = torch.nn.Linear(48, 24, bias=False)

    def forward(self, x):
        return self.lm_head(torch.relu(self.square(torch.relu(self.square(torch.relu(self.up(x)))))))


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_torch_exporters(tmp_path, dynamo, rank):
    torch.manual_seed(0)
    model = zero_fill(Network())
    x = torch.randn((2, 3, 40)[3 - rank :])
    source, target = tmp_path / "model.onnx", tmp_path / "packed.onnx"
    torch.onnx.export(model, (x,), str(source), input_names=["x"], dynamo=dynamo, external_data=False, verbose=False)
    with pytest.raises(NMError, match="--exclude 'lm_head'"):
        convert_onnx(source, target)
    summary = convert_onnx(source, target, exclude=["lm_head"])
    assert {weight.name.partition(".")[0] for weight in summary.packed} >= {"up", "square"}
    graph = onnx.load(target, load_external_data=False).graph
    assert len([node for node in graph.node if is_matmul_nm(node)]) == 3
    assert not any(node.op_type == "Add" for node in graph.node)
    expected = onnxruntime.InferenceSession(str(source)).run(None, {"x": x.numpy()})[0]
    for options in (session_options(1), None):
        found = onnxruntime.InferenceSession(str(target), options).run(None, {"x": x.numpy()})[0]
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("tied", [True, False])
def test_constructed_llama_of_mobius(tmp_path, tied):
    """Query, key and value are one matrix there, and a tied output layer is the embedding's transpose."""
    mobius = pytest.importorskip("mobius", reason="the extra genai is not installed")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=300, num_key_value_heads=2, tie_word_embeddings=tied, **sizes)
    zero_fill(LlamaForCausalLM(config)).save_pretrained(tmp_path)
    source, target = tmp_path / "model.onnx", tmp_path / "packed.onnx"
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    package = mobius.build(str(tmp_path), dtype="float32", execution_provider="cpu")
    ir.save(package["model"], source, external_data="model.onnx.data")
    summary = convert_onnx(source, target, skip_dense=True)
    joint = {name.partition(".self_attn.")[0] + ".self_attn" for name in LAYERS if ".self_attn." in name}
    apart = {name for name in LAYERS if not name.endswith(("q_proj", "k_proj", "v_proj"))}
    assert {weight.name for weight in summary.packed} == joint | apart
    ((name, reason),) = [(weight.name, weight.kept_because) for weight in summary.kept]
    assert name == "lm_head" and reason.startswith("Gather" if tied else "it keeps 16 of 16")
    assert_same_logits(source, target)
