"""Both graphs of mixtures of experts: every expert multiplies the tokens that are routed to it, as torch has it."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from expert_models import ARCHITECTURES, expert_model
from packed_models import random_tokens, torch_logits
from test_experts import dense_folder
from test_sparsify import OPTIONS

from optimum_nm import NMConfig, NMModelForCausalLM, NMOptimizer
from optimum_nm.errors import NMError
from optimum_nm.evaluate.onnx_decoder import OnnxDecoder
from optimum_nm.evaluate.verify_onnx import onnx_problems
from optimum_nm.nn.skeleton import open_checkpoint
from optimum_nm.onnx.export import export_checkpoint
from optimum_nm.onnx.fused import no_fused_graph
from optimum_nm.runtime.session import session_options

GRAPHS = [(architecture, graph) for architecture in ARCHITECTURES for graph in ("fused", "traced")]
GRAPHS.remove(("Olmoe", "fused"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer, text):
    """The folder of a packed mixture of experts, made once, and its torch model."""
    made = {}

    def packed(architecture):
        if architecture not in made:
            folder = tmp_path_factory.mktemp(architecture)
            config = NMConfig(weight_dtype="float16", outliers="2:32", **OPTIONS)
            NMOptimizer(expert_model(architecture, len(tokenizer)), tokenizer).optimize(
                folder / "packed", config, [text], progress=False
            )
            made[architecture] = folder / "packed", NMModelForCausalLM.from_pretrained(folder / "packed").eval()
        return made[architecture]

    return packed


def plain_options():
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return options


@pytest.mark.parametrize(("architecture", "graph"), GRAPHS)
def test_agrees_with_torch_with_a_prompt_and_token_by_token(architecture, graph, checkpoint):
    folder, model = checkpoint(architecture)
    path = export_checkpoint(folder, graph=graph, accuracy_level=0)
    assert not list(onnx_problems(path, open_checkpoint(folder)))
    for options in (session_options(1), plain_options()):  # the second runs the fallback
        decoder = OnnxDecoder(path, options)
        for length in (1, 30, 7):
            tokens = random_tokens(length + 6)
            decoder.reset()
            read = np.concatenate([decoder.read(tokens[:length]), *(decoder.read([t]) for t in tokens[length:])])
            np.testing.assert_allclose(read, torch_logits(model, tokens), atol=1e-4)


@pytest.mark.parametrize(("architecture", "graph"), [GRAPHS[0], GRAPHS[2], GRAPHS[5]])
def test_generates_the_tokens_that_torch_does(architecture, graph, checkpoint, tokenizer):
    from optimum.onnxruntime import ORTModelForCausalLM

    folder, model = checkpoint(architecture)
    export_checkpoint(folder, graph=graph, accuracy_level=0)
    prompt = tokenizer("the river of stone runs under a bright old city", return_tensors="pt")
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**prompt, **settings)
    loaded = ORTModelForCausalLM.from_pretrained(folder, session_options=session_options(1))
    loaded.num_key_value_heads = loaded.config.num_key_value_heads  # which Optimum reads for types that it lists
    assert loaded.generate(**prompt, **settings).tolist() == expected.tolist()


@pytest.mark.parametrize(("architecture", "experts"), [("Mixtral", 5), ("Qwen3Moe", 6)])
def test_fused_graph_has_three_nodes_an_expert(architecture, experts, checkpoint):
    """Gate and up projection as one product, SwiGLU, down projection; and one Split that gives each its tokens."""
    folder, _ = checkpoint(architecture)
    graph = onnx.load(export_checkpoint(folder, graph="fused"), load_external_data=False).graph
    products = [node.name for node in graph.node if node.op_type == "MatMulNM" and ".experts." in node.name]
    assert len(products) == 2 * 2 * experts
    assert sum(node.op_type == "SwiGLU" for node in graph.node) == 2 * experts
    splits = [len(node.output) for node in graph.node if node.op_type == "Split"]
    assert splits.count(experts) == 2


def test_blocks_without_experts_between_have_the_traced_graph(tokenizer, text, tmp_path, caplog):
    source = dense_folder(tmp_path / "dense", "Qwen3Moe", tokenizer, mlp_only_layers=[0])
    optimizer = NMOptimizer.from_pretrained(source)
    optimizer.optimize(tmp_path / "out", NMConfig(**OPTIONS), [text], progress=False)
    assert "blocks with and without experts in one model" in no_fused_graph(tmp_path / "out")
    path = export_checkpoint(tmp_path / "out", accuracy_level=0)
    assert "Exporting the traced graph" in caplog.text
    tokens = random_tokens(12)
    expected = torch_logits(NMModelForCausalLM.from_pretrained(tmp_path / "out").eval(), tokens)
    np.testing.assert_allclose(OnnxDecoder(path, session_options(1)).read(tokens), expected, atol=1e-4)


def test_experts_of_another_kind_are_refused_by_name(checkpoint, monkeypatch):
    folder, _ = checkpoint("Qwen3Moe")
    monkeypatch.setattr("optimum_nm.onnx.traced_experts.BLOCKS", ("MixtralSparseMoeBlock",))
    with pytest.raises(NMError, match="experts of class Qwen3MoeSparseMoeBlock have no traced graph"):
        export_checkpoint(folder, graph="traced")


def test_onnxruntime_genai_chooses_the_tokens_of_torch(checkpoint):
    import onnxruntime_genai

    folder, model = checkpoint("Mixtral")
    export_checkpoint(folder, graph="fused", runtime="genai", accuracy_level=0)
    tokens = random_tokens(20)
    count = len(tokens) + 12
    runtime = onnxruntime_genai.Model(str(folder))
    parameters = onnxruntime_genai.GeneratorParams(runtime)
    parameters.set_search_options(max_length=count, min_length=count)
    generator = onnxruntime_genai.Generator(runtime, parameters)
    generator.append_tokens(tokens)
    while not generator.is_done():
        generator.generate_next_token()
    chosen = [int(token) for token in generator.get_sequence(0)]
    expected = model.generate(torch.tensor([tokens]), min_length=count, max_length=count, do_sample=False)[0].tolist()
    assert chosen == expected
