"""The fused graph: the model types it stands for, its weights in place, its three runtimes."""

import json

import numpy as np
import onnx
import pytest
import torch
from packed_models import DIMENSIONS, TOKENS, packed_checkpoint, random_tokens, rearrange, torch_logits

from optimum_nm import NMConfig
from optimum_nm.errors import NMError
from optimum_nm.evaluate.onnx_decoder import OnnxDecoder
from optimum_nm.evaluate.verify_onnx import onnx_problems
from optimum_nm.nn.skeleton import open_checkpoint
from optimum_nm.onnx.export import export_checkpoint
from optimum_nm.onnx.fused import MODEL_TYPES, no_fused_graph
from optimum_nm.onnx.genai import genai_config
from optimum_nm.onnx.operator import operator_schemas
from optimum_nm.runtime.session import session_options

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
VARIANTS = {
    "arcee": {},
    "gpt2": {},
    "gptj": {"rotary_dim": 16},
    "granite": {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "llama biased": {"attention_bias": True, "mlp_bias": True},
    "llama rope": {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}},
    "llama linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "llama yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    "mistral": {"sliding_window": None},
    "mistral window": {"sliding_window": 8},
    "olmo": {},
    "olmo2": {},
    "phi": {"num_attention_heads": 2, "partial_rotary_factor": 0.5},
    "phi3": {"head_dim": 32},
    "qwen2": {"rope_theta": 1e6},
    "qwen3": {"head_dim": 32},
    "seed_oss": {"head_dim": 32},
    "smollm3": {"num_hidden_layers": 3, "no_rope_layer_interval": 2},
    "starcoder2": {},
}


def export(folder, accuracy_level=0, **options):
    path = export_checkpoint(folder, graph="fused", accuracy_level=accuracy_level, **options)
    return onnx.load(path, load_external_data=False)


def test_every_model_type_is_tested():
    experts = {"mixtral", "qwen2_moe", "qwen3_moe"}  # in test_experts_export.py
    assert {name.partition(" ")[0] for name in VARIANTS} | experts == set(MODEL_TYPES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees_with_torch_with_a_prompt_and_token_by_token(tmp_path, variant):
    model = packed_checkpoint(tmp_path, variant.partition(" ")[0], **VARIANTS[variant])
    rearrange(tmp_path)
    kinds = {node.op_type for node in export(tmp_path).graph.node}
    assert "GroupQueryAttention" in kinds and "MatMul" not in kinds
    tokens = random_tokens(40)
    decoder = OnnxDecoder(tmp_path / "model.onnx", session_options(1))
    read = np.concatenate([decoder.read(tokens[:30]), *(decoder.read([token]) for token in tokens[30:])])
    np.testing.assert_allclose(read, torch_logits(model, tokens), atol=1e-4)
    assert not list(onnx_problems(tmp_path / "model.onnx", open_checkpoint(tmp_path)))


@pytest.mark.parametrize("stored_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", ["float16", "int8", "int4"])
def test_agrees_with_torch_in_every_type(tmp_path, weight_dtype, stored_dtype):
    model = packed_checkpoint(tmp_path, "qwen2", weight_dtype, stored_dtype)
    export(tmp_path)
    tokens = random_tokens(20)
    read = OnnxDecoder(tmp_path / "model.onnx", session_options(1)).read(tokens)
    np.testing.assert_allclose(read, torch_logits(model, tokens), atol=1e-3)


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16", "int8", "int4"])
def test_embedding_that_is_the_packed_output_layer(tmp_path, weight_dtype, group_size):
    layer = {"pattern": "16:16", "weight_dtype": weight_dtype, "group_size": group_size, "outliers": None}
    packing = NMConfig(outliers="4:256", overrides={"lm_head": layer}, exclude=["model.*"], share_embedding=True)
    model = packed_checkpoint(tmp_path, packing=packing, hidden_size=96, num_attention_heads=6)
    traced = OnnxDecoder(export_checkpoint(tmp_path, graph="traced", accuracy_level=0), session_options(1))
    graph = export(tmp_path).graph
    tables = [t.name for t in graph.initializer if TOKENS["vocab_size"] in t.dims]
    assert len(tables) == len(set(tables)) and all(name.startswith("lm_head.") for name in tables)
    tokens = random_tokens(20)
    read = OnnxDecoder(tmp_path / "model.onnx", session_options(1)).read(tokens)
    np.testing.assert_allclose(read, torch_logits(model, tokens), atol=1e-3)
    np.testing.assert_allclose(traced.read(tokens), read, atol=1e-3)


def test_runs_without_the_library(tmp_path):
    import onnxruntime

    model = packed_checkpoint(tmp_path, "qwen3", "int4", head_dim=32)
    export(tmp_path)
    tokens = random_tokens(12)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    read = OnnxDecoder(tmp_path / "model.onnx", options).read(tokens)
    np.testing.assert_allclose(read, torch_logits(model, tokens), atol=1e-3)


def test_operator_may_be_known_to_the_onnx_package(tmp_path):
    packed_checkpoint(tmp_path)
    schemas = operator_schemas()
    for schema in schemas:
        onnx.defs.register_schema(schema)
    try:
        names = [node.name for node in export(tmp_path).graph.node if node.op_type == "MatMulNM"]
    finally:
        for schema in schemas:
            onnx.defs.deregister_schema(schema.name, schema.since_version, schema.domain)
    assert "model.layers.0.mlp.down_proj" in names and len(set(names)) == len(names)


def test_the_front_takes_the_fused_graph_where_there_is_one(tmp_path, caplog):
    packed_checkpoint(tmp_path)
    kinds = []
    for options in ({}, {"graph": "traced"}, {"task": "text-generation"}):
        graph = onnx.load(export_checkpoint(tmp_path, **options), load_external_data=False).graph
        kinds.append("GroupQueryAttention" in {node.op_type for node in graph.node})
    assert kinds == [True, False, False]
    assert "no fused graph for the task 'text-generation'" in caplog.text
    with pytest.raises(NMError, match="no fused graph of opset 17"):
        export_checkpoint(tmp_path, graph="fused", opset=17)
    with pytest.raises(NMError, match="no fused graph for the task"):
        export_checkpoint(tmp_path, task="text-generation", runtime="genai")
    with pytest.raises(NMError, match="graph is 'quick'; it must be one of auto, fused, traced"):
        export_checkpoint(tmp_path, graph="quick")


def test_weights_are_the_checkpoints_own_bytes(tmp_path):
    packed_checkpoint(tmp_path, "phi3", "int8", torch.float16, tie_word_embeddings=True, head_dim=32)
    graph = export(tmp_path)
    external = {tensor.name for tensor in graph.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL}
    layer = "model.layers.0.self_attn.qkv_proj.values"
    assert f"{layer}[0:128]+{layer}[128:192]+{layer}[192:256]" in external
    assert "model.layers.1.mlp.gate_up_proj.positions" in external
    assert "model.embed_tokens.weight" in external and not any("lm_head" in name for name in external)
    inside = sum(len(tensor.raw_data) for tensor in graph.graph.initializer if tensor.name not in external)
    rotary = 2 * DIMENSIONS["max_position_embeddings"] * 16 * 4
    norms = 5 * DIMENSIONS["hidden_size"] * 4
    assert inside <= rotary + norms + 100
    assert {file.name for file in tmp_path.iterdir()} >= {"model.onnx", "model.safetensors"}


def test_projections_stored_side_by_side_are_one_node(tmp_path):
    packed_checkpoint(tmp_path, "qwen2", "int4")
    counts, few_tokens, more_tokens = [], [], []
    for _ in range(2):
        kinds = [node.op_type for node in export(tmp_path).graph.node]
        counts.append(kinds.count("MatMulNM"))
        decoder = OnnxDecoder(tmp_path / "model.onnx", session_options(1))
        few_tokens.append(decoder.read(random_tokens(4)))
        more_tokens.append(decoder.read(random_tokens(12)))
        rearrange(tmp_path)
    assert counts == [2 * 7 + 1, 2 * 4 + 1]  # query, key and value; output; gate and up; down
    np.testing.assert_allclose(*few_tokens, atol=1e-5)
    np.testing.assert_allclose(*more_tokens, atol=5e-5)  # AMX's products of floats are of 16 bits
    # nothing else is left between the products of a layer
    assert kinds.count("SwiGLU") == kinds.count("GroupQueryAttention") == 2
    assert not {"Split", "Sigmoid", "Transpose", "Reshape"} & set(kinds)


def test_accuracy_level_is_4_for_integers_unless_asked(tmp_path):
    packed_checkpoint(tmp_path, weight_dtype="int8")

    def levels(asked):
        nodes = [node for node in export(tmp_path, asked).graph.node if node.op_type == "MatMulNM"]
        return {a.i for node in nodes[:-1] for a in node.attribute if a.name == "accuracy_level"}

    assert (levels(None), levels(0), levels(4)) == ({4}, {0}, {4})


def test_last_logits_are_those_of_the_last_token(tmp_path):
    packed_checkpoint(tmp_path)
    export(tmp_path)
    tokens = random_tokens(15)
    every = OnnxDecoder(tmp_path / "model.onnx", session_options(1)).read(tokens)
    (tmp_path / "tokenizer.json").write_text("{}")
    export(tmp_path, runtime="genai")
    last = OnnxDecoder(tmp_path / "model.onnx", session_options(1)).read(tokens)
    assert last.shape == (1, TOKENS["vocab_size"])
    np.testing.assert_allclose(last[0], every[-1], atol=1e-5)


@pytest.mark.parametrize(
    "changes,reason",
    [
        ({"model_type": "gpt_neox"}, "model type 'gpt_neox'"),
        ({"head_dim": 24}, "head size 24"),
        ({"model_type": "phi", "partial_rotary_factor": 0.5}, "rotary size 8"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"layer_types": ["full_attention", "sliding_attention"], "model_type": "qwen2"}, "full_attention and sliding"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.5, "head_dim": 32}, "partial_rotary_factor 0.5"),
    ],
)
def test_says_what_has_no_fused_graph(tmp_path, changes, reason):
    packed_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": 1e4} | changes))
    assert reason in (no_fused_graph(tmp_path) or "")
    with pytest.raises(NMError, match=reason):
        export(tmp_path)


@pytest.fixture
def genai_folder(tmp_path, tokenizer):
    model = packed_checkpoint(tmp_path, vocab_size=len(tokenizer), eos_token_id=[0, 1])
    tokenizer.save_pretrained(tmp_path)
    export(tmp_path, runtime="genai")
    return tmp_path, model


def test_onnxruntime_genai_chooses_the_tokens_of_torch(genai_folder, tokenizer):
    import onnxruntime_genai

    folder, model = genai_folder
    runtime = onnxruntime_genai.Model(str(folder))
    prompt = "The river runs under"
    tokens = [int(token) for token in onnxruntime_genai.Tokenizer(runtime).encode(prompt)]
    assert tokens == tokenizer.encode(prompt)
    parameters = onnxruntime_genai.GeneratorParams(runtime)
    parameters.set_search_options(max_length=len(tokens) + 24, min_length=len(tokens) + 24)
    generator = onnxruntime_genai.Generator(runtime, parameters)
    generator.append_tokens(tokens)
    while not generator.is_done():
        generator.generate_next_token()
    chosen = [int(token) for token in generator.get_sequence(0)]
    count = len(tokens) + 24
    expected = model.generate(torch.tensor([tokens]), min_length=count, max_length=count, do_sample=False)[0].tolist()
    assert chosen == expected


def test_ort_model_generates_the_tokens_of_torch(genai_folder):
    from optimum.onnxruntime import ORTModelForCausalLM

    folder, model = genai_folder
    prompt = torch.tensor([random_tokens(9)])
    settings = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    loaded = ORTModelForCausalLM.from_pretrained(folder, session_options=session_options(1))
    assert loaded.generate(prompt, attention_mask=torch.ones_like(prompt), **settings).tolist() == expected.tolist()


def test_genai_config_states_the_model(genai_folder):
    folder, _ = genai_folder
    config = json.loads((folder / "genai_config.json").read_text())
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    library = config["model"]["decoder"]["session_options"]["custom_ops_library"]
    assert (folder / library).is_file()
    assert config == genai_config(folder, graph, library)
    assert config["model"]["eos_token_id"] == [0, 1] and config["model"]["context_length"] == 256
    assert config["search"]["past_present_share_buffer"]


def test_genai_needs_a_tokenizer(tmp_path):
    packed_checkpoint(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(NMError, match=r"has no tokenizer\.json"):
        export(tmp_path, runtime="genai")
    assert sorted(tmp_path.iterdir()) == before


def test_runtimes_are_two(tmp_path):
    with pytest.raises(NMError, match="runtime is 'llama'; it must be one of onnxruntime, genai"):
        export_checkpoint(tmp_path, runtime="llama")


def test_byte_level_tokenizers_keep_only_the_byte_level_decoder(genai_folder, tokenizer):
    folder, _ = genai_folder
    plain = json.loads((folder / "tokenizer.json").read_text())
    fuse = {"type": "Fuse"}
    changed = plain | {"decoder": {"type": "Sequence", "decoders": [fuse, plain["decoder"]]}}
    (folder / "tokenizer.json").write_text(json.dumps(changed))
    export(folder, runtime="genai")
    assert json.loads((folder / "tokenizer.json").read_text()) == plain
