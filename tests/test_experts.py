"""Mixtures of experts: every expert's layers measured, packed, saved and loaded, routers left as they are."""

import json
import logging

import pytest
import torch
from expert_models import ARCHITECTURES, STARVED, expert_model
from packed_models import torch_logits
from test_sparsify import OPTIONS
from test_streaming import contents
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_nm import NMConfig, NMLinear, NMModelForCausalLM, NMOptimizer
from optimum_nm.calibration.windows import calibration_windows
from optimum_nm.errors import NMError
from optimum_nm.evaluate.inspect import inspect_checkpoint
from optimum_nm.evaluate.verify import verify_checkpoint
from optimum_nm.nn.convert import linear_layers
from optimum_nm.nn.skeleton import open_checkpoint
from optimum_nm.nn.stored_weights import StoredWeights
from optimum_nm.sparsify import statistics
from optimum_nm.sparsify.keep_mask import KeepMaskCallback
from optimum_nm.sparsify.work_folder import WorkFolder

TOKENS = list(range(3, 40))
QUICK = {"epochs": 2, "batch_size": 1, "holdout": 0.25}
CASES = {
    "mask": {},
    "admm": {"solver": "admm", "weight_dtype": "int8"},
    "outliers": {"solver": "sparsegpt", "outliers": "2:32"},
    "swaps": {"swaps": 2, "variance_correction": "least-squares"},
    "fold": {"equalization_mode": "fold", "weight_dtype": "int4"},
    "tuned": {"finetune": QUICK, "weight_dtype": "int4"},
    "distilled": {"distill": {"epochs": 1}},
    "bits": {"target_bits": 8.0, "exclude": ["lm_head", "*.self_attn.*", "*.w[13]"]},
}


def dense_folder(folder, architecture, tokenizer, **changes):
    expert_model(architecture, len(tokenizer), **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def experts_of(checkpoint):
    return [name for name in checkpoint.layer_names() if ".experts." in name]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_experts_are_packed_saved_and_loaded(architecture, tokenizer, text, tmp_path):
    source = dense_folder(tmp_path / "dense", architecture, tokenizer)
    optimizer = NMOptimizer.from_pretrained(source)
    assert isinstance(optimizer._weights, StoredWeights)
    dense = AutoModelForCausalLM.from_pretrained(source)
    config = NMConfig(weight_dtype="float32", pattern="12:16", variance_correction=None, **OPTIONS)
    summary = optimizer.optimize(tmp_path / "out", config, [text], progress=False)

    checkpoint = open_checkpoint(tmp_path / "out")
    block = "block_sparse_moe" if architecture == "Mixtral" else "mlp"
    layers = ("w1", "w2", "w3") if architecture == "Mixtral" else ("gate_proj", "up_proj", "down_proj")
    count = 5 if architecture in ("Mixtral", "Olmoe") else 6
    numbers = [(index, expert) for index in range(2) for expert in range(count)]
    expected = {f"model.layers.{i}.{block}.experts.{e}.{layer}" for i, e in numbers for layer in layers}
    assert set(experts_of(checkpoint)) == expected
    routers = [name for name in checkpoint.locations if name.endswith("gate.weight")]
    assert len(routers) == (4 if architecture == "Qwen2Moe" else 2)
    for name in checkpoint.layer_names():
        packed = checkpoint.packed(name)
        packed.validate(name)
        assert (packed.unpack() != 0).float().mean() == 0.75
    assert verify_checkpoint(tmp_path / "out").problems == []
    assert set(summary.by_type()) >= {f"experts.{layer}" for layer in layers}
    assert {layer.name for layer in inspect_checkpoint(tmp_path / "out").layers} >= expected

    packed = NMModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert sum(isinstance(module, NMLinear) for module in packed.modules()) == len(checkpoint.layer_names())
    logits = torch_logits(packed, TOKENS)
    packed.save_pretrained(tmp_path / "again")
    again = NMModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert (torch_logits(again, TOKENS) == logits).all()
    unpacked = packed.dequantize()
    assert len(linear_layers(unpacked)) == len(linear_layers(optimizer._weights.model)) + len(summary.layers)
    assert abs(torch_logits(unpacked, TOKENS) - logits).max() < 1e-4
    unpacked.save_pretrained(tmp_path / "unpacked")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "unpacked").eval()
    assert abs(torch_logits(plain, TOKENS) - logits).max() < 1e-4
    assert 0 < abs(torch_logits(dense, TOKENS) - logits).mean() < abs(logits).mean()


@pytest.mark.parametrize("case", CASES)
def test_every_way_to_sparsify_reads_from_files_what_it_does_in_memory(case, tokenizer, text, tmp_path):
    """With one expert that no token reaches, which is packed like the others."""
    architecture = "Mixtral" if case in ("swaps", "fold", "tuned", "bits") else "Qwen2Moe"
    source = dense_folder(tmp_path / "dense", architecture, tokenizer, starved=True)
    config = NMConfig(**CASES[case], **OPTIONS)
    streamed = NMOptimizer.from_pretrained(source)
    summary = streamed.optimize(tmp_path / "streamed", config, [text], memory_budget=1, progress=False)
    memory = NMOptimizer(AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source))
    expected = memory.optimize(tmp_path / "memory", config, [text], progress=False)
    assert contents(tmp_path / "streamed") == contents(tmp_path / "memory")
    assert summary.to_dict() == expected.to_dict()
    assert verify_checkpoint(tmp_path / "memory").problems == []
    loaded = NMModelForCausalLM.from_pretrained(tmp_path / "memory").eval()
    # The bytes are the same; torch's product by a router rounds as its weight is aligned, and a file maps it anywhere.
    assert abs(torch_logits(loaded, TOKENS) - torch_logits(memory.model, TOKENS)).max() < 1e-6
    if case in ("tuned", "distilled"):
        losses = [*summary.block_losses.values()] if case == "tuned" else [summary.distillation]
        assert all(0 < loss.after <= loss.before for loss in losses)


def unreached_layers(checkpoint):
    return [name for name in experts_of(checkpoint) if f"layers.1.{name.split('.')[3]}.experts.{STARVED}." in name]


@pytest.mark.parametrize("case", ["mask", "admm", "outliers", "swaps"])
def test_expert_without_tokens_is_pruned_by_magnitude_with_a_warning(case, tokenizer, text, tmp_path, caplog):
    model = expert_model("Qwen3Moe", len(tokenizer), starved=True)
    optimizer = NMOptimizer(model, tokenizer)
    dense = {name: module.weight.detach().clone() for name, module in linear_layers(model).items()}
    options = CASES[case] | {"weight_dtype": "float32", "outliers": None}
    with caplog.at_level(logging.WARNING, logger="optimum_nm"):
        summary = optimizer.optimize(tmp_path / "out", NMConfig(**options, **OPTIONS), [text], progress=False)
    place = f"model.layers.1.mlp.experts {STARVED}."
    (record,) = caplog.records
    assert record.getMessage() == summary.unreached() and record.getMessage().endswith(place)
    assert "No calibration token came to 1 expert, pruned" in str(summary) and place in str(summary)
    checkpoint = open_checkpoint(tmp_path / "out")
    unreached = unreached_layers(checkpoint)
    assert len(unreached) == 3
    tokens = {layer["name"]: layer["calibration_tokens"] for layer in summary.to_dict()["layers"]}
    assert {name for name, count in tokens.items() if count == 0} == {*unreached}
    routed = [count for name, count in tokens.items() if "layers.0.mlp.experts" in name and "down_proj" in name]
    assert sum(routed) == 2 * OPTIONS["calibration_samples"] * OPTIONS["calibration_length"]
    for name in unreached:
        groups = dense[name].abs().view(len(dense[name]), -1, 16)
        expected = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.topk(8).indices, True)
        assert torch.equal(checkpoint.packed(name).mask().view(groups.shape), expected)


def test_statistics_are_those_of_the_tokens_an_expert_gets(tokenizer, text, tmp_path):
    """An expert of the first block is pruned by its own inputs: the mask is the one that they give."""
    model = expert_model("Qwen3Moe", len(tokenizer))
    optimizer = NMOptimizer(model, tokenizer)
    inputs, weights = {}, {}
    for name, layer in linear_layers(model).items():
        if "layers.0.mlp.experts" in name and name.endswith("down_proj"):
            weights[name] = layer.weight.detach().clone()
            layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].detach()}))
    with torch.no_grad():
        model(calibration_windows([text], tokenizer, OPTIONS["calibration_samples"], 48, seed=0))
    seen = dict(inputs)  # the hooks go on
    config = NMConfig(score="wanda", equalization=None, variance_correction=None, weight_dtype="float32", **OPTIONS)
    summary = optimizer.optimize(tmp_path / "out", config, [text], progress=False)
    checkpoint = open_checkpoint(tmp_path / "out")
    tokens = {layer.name: layer.calibration_tokens for layer in summary.layers}
    for name, rows in seen.items():
        assert tokens[name] == len(rows)
        scores = (weights[name].abs() * rows.norm(dim=0)).view(len(weights[name]), -1, 16)
        expected = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(8).indices, True)
        assert (checkpoint.packed(name).mask().view(scores.shape) == expected).float().mean() > 0.99


@pytest.mark.parametrize("case", ["mask", "admm"])
def test_statistics_in_parts_give_the_same(case, tokenizer, text, tmp_path, monkeypatch):
    """A few experts at a time, so that memory stays bounded, and what the estimate says of it goes down."""
    config = NMConfig(**CASES[case], **OPTIONS)
    summaries = []
    for name, most in (("whole", 1 << 32), ("parts", 50_000)):
        monkeypatch.setattr(statistics, "STATISTICS_BYTES", most)
        model = expert_model("Mixtral", len(tokenizer), starved=True)
        linears = linear_layers(NMOptimizer(model, tokenizer).model.model.layers[0])
        parts = statistics.in_parts(linears, case == "admm")
        assert [layer for part in parts for layer in part] == [*linears]
        assert (len(parts) > 3) == (name == "parts")
        optimizer = NMOptimizer(model, tokenizer)
        summaries.append(optimizer.optimize(tmp_path / name, config, [text], progress=False))
    whole, parts = (contents(tmp_path / name) for name in ("whole", "parts"))
    assert whole["model.safetensors"] == parts["model.safetensors"]


def test_run_goes_on_after_the_first_block(tokenizer, text, tmp_path, monkeypatch, caplog):
    source = dense_folder(tmp_path / "dense", "Mixtral", tokenizer, starved=True)
    config = NMConfig(**OPTIONS)
    expected = NMOptimizer.from_pretrained(source).optimize(tmp_path / "whole", config, [text], progress=False)
    commit = WorkFolder.commit

    def interrupted(self, *args):
        commit(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "commit", interrupted)
        with pytest.raises(KeyboardInterrupt, match="1 blocks are finished"):
            NMOptimizer.from_pretrained(source).optimize(tmp_path / "out", config, [text], progress=False)
    summary = NMOptimizer.from_pretrained(source).optimize(tmp_path / "out", config, [text], progress=False)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert summary.to_dict() == expected.to_dict() and summary.unreached() == expected.unreached()


def test_routers_stay_dense_whatever_is_excluded(tokenizer, text, tmp_path):
    model = expert_model("Qwen2Moe", len(tokenizer))
    config = NMConfig(exclude=["*.self_attn.*"], **OPTIONS)
    NMOptimizer(model, tokenizer).optimize(tmp_path / "out", config, [text], progress=False)
    saved = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "*.mlp.shared_expert_gate" in saved["exclude"]
    locations = open_checkpoint(tmp_path / "out").locations
    assert {f"model.layers.{i}.mlp.{name}.weight" for i in (0, 1) for name in ("gate", "shared_expert_gate")} <= {
        *locations
    }


def test_experts_in_one_tensor_are_refused_by_name(tokenizer, text, tmp_path):
    from transformers import GptOssConfig

    sizes = dict(num_hidden_layers=1, hidden_size=32, intermediate_size=32, num_local_experts=2, pad_token_id=0)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    model = AutoModelForCausalLM.from_config(GptOssConfig(vocab_size=len(tokenizer), **sizes, **heads)).eval()
    with pytest.raises(NMError, match=r"model.layers.0.mlp.experts of model type 'gpt_oss' holds all its experts in"):
        NMOptimizer(model, tokenizer).optimize(tmp_path / "out", NMConfig(**OPTIONS), [text], progress=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(NMError, match=r"model.layers.0.mlp.experts holds all its experts in one tensor, whose zeros"):
        KeepMaskCallback().on_train_begin(None, None, None, model=model)
