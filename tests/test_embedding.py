"""An input embedding that is the packed output layer: sparsified, saved, loaded, verified, put back."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_nm import NMConfig, NMModelForCausalLM, NMOptimizer
from optimum_nm.errors import NMError
from optimum_nm.evaluate.verify import verify_checkpoint
from optimum_nm.nn.embedding import NMEmbedding

OPTIONS = {"share_embedding": True, "exclude": [], "calibration_samples": 2, "calibration_length": 32}


def shared(folder, source, text, dtype="int8", pattern="16:16", **changes):
    override = {"lm_head": {"pattern": pattern, "weight_dtype": dtype, "group_size": 32}}
    config = NMConfig(**(OPTIONS | {"overrides": override} | changes))
    optimizer = NMOptimizer.from_pretrained(source)
    optimizer.optimize(folder, config, [text], progress=False)
    return optimizer.model


@pytest.mark.parametrize("dtype", ["float16", "int8", "int4"])
def test_embedding_looks_up_the_rows_of_the_output_layer(tmp_path, tiny_llama_folder, text, dtype):
    sparsified = shared(tmp_path / "out", tiny_llama_folder, text, dtype)
    model = NMModelForCausalLM.from_pretrained(tmp_path / "out")
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, NMEmbedding)
    tokens = torch.tensor([[3, 5, 3], [0, 299, 7]]) % embedding.num_embeddings
    rows = model.lm_head.packed.unpack()
    assert torch.equal(embedding(tokens), rows[tokens])
    assert torch.equal(model(tokens).logits, sparsified(tokens).logits)
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama_folder).get_input_embeddings().weight
    tolerance = {"float16": 1e-3, "int8": 1e-2, "int4": 0.25}[dtype]
    assert (rows - dense).abs().max() <= tolerance * dense.abs().max()


def test_file_holds_one_table(tmp_path, tiny_llama_folder, text):
    shared(tmp_path / "out", tiny_llama_folder, text)
    found = verify_checkpoint(tmp_path / "out")
    assert found.problems == []
    checksums = json.loads((tmp_path / "out" / "nm_checksums.json").read_text())
    assert "lm_head.values" in checksums and not any("embed" in name for name in checksums)


def test_saved_again_it_is_the_same(tmp_path, tiny_llama_folder, text):
    shared(tmp_path / "out", tiny_llama_folder, text)
    model = NMModelForCausalLM.from_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    again = NMModelForCausalLM.from_pretrained(tmp_path / "again")
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_changes_type_with_the_model(tmp_path, tiny_llama_folder, text):
    shared(tmp_path / "out", tiny_llama_folder, text)
    model = NMModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert model.get_input_embeddings()(torch.tensor([1])).dtype == torch.bfloat16
    assert model.get_input_embeddings().to(torch.float32)(torch.tensor([1])).dtype == torch.float32


def test_dequantizes_to_a_plain_embedding_tied_to_the_output_layer(tmp_path, tiny_llama_folder, text):
    shared(tmp_path / "out", tiny_llama_folder, text)
    model = NMModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.tensor([[1, 2, 3]])
    expected = model(tokens).logits
    dense = model.dequantize()
    assert type(dense.get_input_embeddings()) is torch.nn.Embedding
    assert dense.get_input_embeddings().weight is dense.get_output_embeddings().weight
    assert dense.config.tie_word_embeddings
    torch.testing.assert_close(dense(tokens).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "changes,reason",
    [
        ({"exclude": ["lm_head"], "overrides": {}}, "the output layer is not packed"),
        ({"pattern": "8:16"}, "the output layer is packed 8:16"),
        ({"outliers": "4:256"}, "with outliers 4:256"),
        ({"share_embedding": "yes"}, "share_embedding is 'yes'; it must be true or false"),
    ],
)
def test_refuses_what_cannot_be_shared(tmp_path, tiny_llama_folder, text, changes, reason):
    with pytest.raises(NMError, match=reason):
        shared(tmp_path / "out", tiny_llama_folder, text, **changes)
    assert not (tmp_path / "out").exists()


def test_refuses_a_model_that_ties_nothing(tmp_path, tiny_llama_folder, text):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "untied")
    for file in tiny_llama_folder.glob("tokenizer*"):
        (tmp_path / "untied" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(NMError, match="LlamaForCausalLM does not tie its output layer"):
        shared(tmp_path / "out", tmp_path / "untied", text)
