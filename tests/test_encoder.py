"""A BERT encoder, which has no output layer and attends both ways, goes the way of the language models."""

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel

from optimum_nm import NMConfig, NMLinear, NMModel, NMModelForCausalLM, NMOptimizer, session_options
from optimum_nm.errors import NMError
from optimum_nm.evaluate.verify import verify_checkpoint
from optimum_nm.nn.convert import linear_layers
from optimum_nm.onnx.export import export_checkpoint

OPTIONS = {"exclude": [], "outliers": "8:256", "calibration_samples": 4, "calibration_length": 48}


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sparse(tmp_path_factory, dense_folder, text):
    """A packed checkpoint, and the model in memory."""
    folder = tmp_path_factory.mktemp("sparse") / "out"
    optimizer = NMOptimizer.from_pretrained(dense_folder)
    optimizer.optimize(folder, NMConfig(**OPTIONS), [text], progress=False)
    return folder, optimizer.model.eval()


def hidden(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens])).last_hidden_state[0].numpy()


def test_all_linears_are_packed(sparse, dense_folder):
    folder, model = sparse
    dense = AutoModel.from_pretrained(dense_folder)
    packed = {name for name, module in model.named_modules() if isinstance(module, NMLinear)}
    assert packed == linear_layers(dense).keys() and "pooler.dense" in packed
    found = verify_checkpoint(folder)
    assert found.problems == [] and found.layers == len(packed)


def test_loads_as_what_it_is(sparse):
    folder, model = sparse
    tokens = list(range(1, 30))
    for loaded in (NMModel.from_pretrained(folder), AutoModel.from_pretrained(folder)):
        assert isinstance(loaded, BertModel)
        np.testing.assert_allclose(hidden(loaded.eval(), tokens), hidden(model, tokens), atol=1e-6)
    dequantized = NMModel.from_pretrained(folder).dequantize().eval()
    np.testing.assert_allclose(hidden(dequantized, tokens), hidden(model, tokens), atol=1e-5)


@pytest.mark.parametrize("solver,finetune", [("admm", None), ("mask", {"epochs": 2, "learning_rate": 1e-3})])
def test_blocks_are_solved_and_fine_tuned(dense_folder, text, solver, finetune):
    """The more is done about it, the nearer are the hidden states to the dense ones."""
    tokens = list(range(1, 40))
    dense = hidden(AutoModel.from_pretrained(dense_folder).eval(), tokens)

    def error(**settings):
        optimizer = NMOptimizer.from_pretrained(dense_folder)
        config = NMConfig(**(OPTIONS | {"calibration_samples": 16} | settings))
        optimizer.sparsify(config, [text], progress=False)
        return np.square(hidden(optimizer.model.eval(), tokens) - dense).mean()

    assert error(solver=solver, finetune=finetune) < 0.9 * error(solver="mask")


def test_exported_it_gives_the_hidden_states_of_torch(sparse):
    folder, model = sparse
    path = export_checkpoint(folder, task="feature-extraction", accuracy_level=0)
    tokens = list(range(1, 30))
    feeds = {"input_ids": [tokens], "attention_mask": [[1] * len(tokens)], "token_type_ids": [[0] * len(tokens)]}
    for options in (session_options(1), None):
        session = onnxruntime.InferenceSession(str(path), options)
        names = {value.name for value in session.get_inputs()}
        arrays = {name: np.array(values) for name, values in feeds.items() if name in names}
        (found,) = session.run(["last_hidden_state"], arrays)
        np.testing.assert_allclose(found[0], hidden(model, tokens), atol=1e-4)
    assert verify_checkpoint(folder).problems == []


def test_distillation_aims_at_hidden_states(dense_folder, text, tmp_path):
    dense = AutoModel.from_pretrained(dense_folder).eval()
    tokens = list(range(1, 49))
    errors = {}
    for name, distill in (("plain", None), ("distilled", {"epochs": 4, "learning_rate": 1e-3, "holdout": 0.0})):
        optimizer = NMOptimizer.from_pretrained(dense_folder)
        optimizer.optimize(tmp_path / name, NMConfig(distill=distill, **OPTIONS), [text], progress=False)
        loaded = NMModel.from_pretrained(tmp_path / name).eval()
        errors[name] = np.square(hidden(loaded, tokens) - hidden(dense, tokens)).sum()
    assert errors["distilled"] < 0.9 * errors["plain"]
    assert verify_checkpoint(tmp_path / "distilled").problems == []


def test_what_needs_logits_is_refused(sparse, dense_folder, text, tmp_path):
    folder, _ = sparse
    with pytest.raises(
        NMError, match="'text-generation' is not one that Optimum's exporter supports for model type 'bert'"
    ):
        export_checkpoint(folder, task="text-generation")
    with pytest.raises(NMError, match="target_bits goes by predictions of the next token, and BertModel makes none"):
        NMOptimizer.from_pretrained(dense_folder).sparsify(NMConfig(target_bits=4, **OPTIONS), [text])
    with pytest.raises(NMError, match="is missing"):
        NMModelForCausalLM.from_pretrained(folder)
