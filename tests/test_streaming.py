"""Weights read from files a block at a time give the bytes that a model in memory gives."""

import pytest
import torch
from test_sparsify import OPTIONS, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_nm import NMConfig, NMLinear, NMModelForCausalLM, NMOptimizer
from optimum_nm.errors import NMError
from optimum_nm.evaluate.inspect import inspect_checkpoint
from optimum_nm.evaluate.verify import verify_checkpoint
from optimum_nm.memory import memory_bytes
from optimum_nm.nn.stored_weights import StoredWeights, find_stored_weights
from optimum_nm.nn.weights import LoadedWeights
from optimum_nm.sparsify import checkpoint
from optimum_nm.sparsify.architectures import decoder_blocks
from optimum_nm.sparsify.work_folder import WorkFolder

HEAD = {"exclude": [], "overrides": {"lm_head": {"pattern": "16:16", "weight_dtype": "int8"}}}
QUICK = {"epochs": 2, "batch_size": 1, "holdout": 0.25}
CASES = {
    "Llama": {},
    "Qwen2": {"outliers": "2:32"},
    "Qwen2 head": HEAD,
    "Qwen2 shared": HEAD | {"share_embedding": True},
    "GPT2": {"weight_dtype": "int4"},
    "GPT2 head": HEAD,
    "OPT": {"weight_dtype": "int8"},
    "Gemma3": {"solver": "admm"},
    "Llama fold": {"equalization_mode": "fold", "weight_dtype": "int4"},
    "Llama bits": {"target_bits": 4.0, "exclude": ["lm_head", "*.0.*", "*.mlp.*"]},
    "Llama tuned": {"finetune": QUICK, "weight_dtype": "int4"},
    "Qwen2 tuned": {"finetune": QUICK | {"targets": "dense"}},
}


def dense_folder(folder, architecture, tokenizer, shard="5GB"):
    tiny_model(architecture, len(tokenizer)).save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_memory(source, dtype="auto"):
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    return NMOptimizer(model, AutoTokenizer.from_pretrained(source))


@pytest.mark.parametrize(("case", "budget"), [*((case, None) for case in CASES), ("GPT2", 1), ("Llama tuned", 1)])
def test_same_bytes_as_in_memory(case, budget, tokenizer, text, tmp_path):
    """With hidden states in memory or on the disk; every second checkpoint is in several files."""
    shard = "40KB" if case.startswith(("Llama", "OPT")) else "5GB"
    source = dense_folder(tmp_path / "dense", case.split()[0], tokenizer, shard)
    config = NMConfig(**CASES[case], **OPTIONS)
    streamed = NMOptimizer.from_pretrained(source)
    assert isinstance(streamed._weights, StoredWeights)
    _, blocks = decoder_blocks(streamed._weights.model)
    summary = streamed.optimize(tmp_path / "streamed", config, [text], memory_budget=budget, progress=False)
    expected = in_memory(source).optimize(tmp_path / "memory", config, [text], progress=False)
    assert contents(tmp_path / "streamed") == contents(tmp_path / "memory")
    assert summary.to_dict() == expected.to_dict()
    assert all(tensor.is_meta for tensor in blocks.state_dict().values())
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "streamed", "memory"}


def test_another_type_than_the_files(tokenizer, text, tmp_path):
    source = dense_folder(tmp_path / "dense", "Qwen2", tokenizer)
    config = NMConfig(**OPTIONS)
    streamed = NMOptimizer.from_pretrained(source, dtype="bfloat16")
    streamed.optimize(tmp_path / "streamed", config, [text], progress=False)
    in_memory(source, torch.bfloat16).optimize(tmp_path / "memory", config, [text], progress=False)
    assert contents(tmp_path / "streamed") == contents(tmp_path / "memory")


def test_one_block_is_in_memory(tokenizer, text, tmp_path, monkeypatch):
    source = dense_folder(tmp_path / "dense", "Llama", tokenizer)
    optimizer = NMOptimizer.from_pretrained(source)
    model, commit, seen = optimizer._weights.model, WorkFolder.commit, []

    def counting(*args):
        inside = [any(not tensor.is_meta for tensor in block.state_dict().values()) for block in model.model.layers]
        seen.append((inside, model.model.embed_tokens.weight.is_meta, model.lm_head.weight.is_meta))
        commit(*args)

    monkeypatch.setattr(WorkFolder, "commit", counting)
    optimizer.optimize(tmp_path / "out", NMConfig(**OPTIONS), [text], progress=False)
    assert seen == [([True, False], True, True), ([False, True], True, True), ([False, False], True, True)]


def test_model_is_loaded_when_it_is_asked_for(tiny_llama_folder, text, tmp_path):
    optimizer = NMOptimizer.from_pretrained(tiny_llama_folder)
    optimizer.optimize(tmp_path / "out", NMConfig(**OPTIONS), [text], progress=False)
    packed = NMModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert isinstance(optimizer.model.model.layers[0].mlp.up_proj, NMLinear)
    assert all(torch.equal(tensor, packed[name]) for name, tensor in optimizer.model.state_dict().items())
    dense = NMOptimizer.from_pretrained(tiny_llama_folder)
    with torch.no_grad():
        dense.model.model.layers[0].mlp.up_proj.weight.zero_()
    summary = dense.optimize(tmp_path / "changed", NMConfig(**OPTIONS), [text], progress=False)
    assert next(layer for layer in summary.layers if "0.mlp.up_proj" in layer.name).relative_error == 0


def test_other_files_are_loaded_whole(tokenizer, text, tmp_path):
    model = tiny_model("Llama", len(tokenizer))
    model.config.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    torch.save(model.state_dict(), tmp_path / "dense" / "pytorch_model.bin")
    optimizer = NMOptimizer.from_pretrained(tmp_path / "dense", dtype="float32")
    assert isinstance(optimizer._weights, LoadedWeights)
    optimizer.optimize(tmp_path / "out", NMConfig(**OPTIONS), [text], progress=False)


@pytest.mark.parametrize("change", ["rename", "reshape"])
def test_tensors_that_are_not_as_the_model_has_them_are_left_to_transformers(change, tokenizer, tmp_path):
    model = tiny_model("Llama", len(tokenizer))
    tensors = dict(model.state_dict())
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[f"{name}s" if change == "rename" else name] = tensors.pop(name)[:40]
    model.save_pretrained(tmp_path, state_dict=tensors)
    assert find_stored_weights(tmp_path) is None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises((NMError, RuntimeError), match=r"up_proj|size mismatch"):
        NMOptimizer.from_pretrained(tmp_path)


def test_output_layer_that_is_not_finite_is_found_though_it_is_not_needed(tokenizer, text, tmp_path):
    model = tiny_model("Llama", len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight[3, 4] = torch.nan
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    with pytest.raises(NMError, match=r"lm_head.weight has elements that are not finite"):
        NMOptimizer.from_pretrained(tmp_path / "dense").optimize(tmp_path / "out", NMConfig(**OPTIONS), [text])
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_checkpoint_in_several_files(tokenizer, text, tmp_path, monkeypatch):
    """Loaded, inspected and verified as one in a single file is."""
    source = dense_folder(tmp_path / "dense", "Qwen2", tokenizer)
    for name, largest in (("one", 5_000_000_000), ("several", 20_000)):
        monkeypatch.setattr(checkpoint, "LARGEST_FILE", largest)
        NMOptimizer.from_pretrained(source).optimize(tmp_path / name, NMConfig(**OPTIONS), [text], progress=False)
    files = [file.name for file in (tmp_path / "several").glob("*.safetensors")]
    assert len(files) > 2 and "model.safetensors" not in files
    one, several = (NMModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "several"))
    tokens = torch.arange(20)[None]
    assert torch.equal(one(tokens).logits, several(tokens).logits)
    one, several = (inspect_checkpoint(tmp_path / name).to_dict() for name in ("one", "several"))
    assert {layer["name"]: layer for layer in one["layers"]} == {layer["name"]: layer for layer in several["layers"]}
    assert verify_checkpoint(tmp_path / "several").problems == []


def test_memory_is_told_before_and_after(tiny_llama_folder, text, tmp_path, capsys):
    optimizer = NMOptimizer.from_pretrained(tiny_llama_folder)
    summary = optimizer.optimize(tmp_path / "out", NMConfig(**OPTIONS), [text])
    assert f"Memory: about {summary.estimated_bytes / 1e9:.1f} GB at most." in capsys.readouterr().err
    assert 2**27 < summary.peak_bytes <= memory_bytes()[1]
    assert summary.estimated_bytes > 2**27


def test_memory_budget_that_is_no_size(tiny_llama_folder, text, tmp_path):
    with pytest.raises(NMError, match="memory_budget is 'much'; it must be a number of bytes"):
        NMOptimizer.from_pretrained(tiny_llama_folder).optimize(
            tmp_path / "out", NMConfig(**OPTIONS), [text], memory_budget="much"
        )
