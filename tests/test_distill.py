"""Distillation of the whole model: against its own loss, through checkpoints, and what it refuses."""

import copy
from functools import partial

import pytest
import torch
from test_sparsify import OPTIONS, tiny_model
from torch.nn.modules.module import register_module_forward_pre_hook

from optimum_nm import NMModelForCausalLM
from optimum_nm.calibration.windows import calibration_windows
from optimum_nm.config import NMConfig
from optimum_nm.errors import NMError
from optimum_nm.finetune_config import DistillConfig
from optimum_nm.nn.linear import NMLinear
from optimum_nm.nn.skeleton import open_checkpoint
from optimum_nm.nn.weights import LoadedWeights
from optimum_nm.optimizer import NMOptimizer
from optimum_nm.report.matrix import Row
from optimum_nm.sparsify import distill as distillation
from optimum_nm.sparsify import memory_estimate
from optimum_nm.sparsify.distill import distill
from optimum_nm.sparsify.memory_estimate import estimate_bytes
from optimum_nm.sparsify.pipeline import sparsify_model

QUICK = {"epochs": 2, "learning_rate": 1e-3, "holdout": 0.25}
ALL = {**OPTIONS, "calibration_samples": 8}


@torch.no_grad()
def divergence(dense, model, windows):
    """KL(dense ‖ model), nats a token."""
    expected, found = (each(windows).logits.log_softmax(dim=-1) for each in (dense, model))
    return (expected.exp() * (expected - found)).sum(dim=-1).mean().item()


def packed_layers(model):
    return {name: copy.deepcopy(m.packed) for name, m in model.named_modules() if isinstance(m, NMLinear)}


@torch.no_grad()
def telling_model(architecture, tokenizer):
    """A model whose predictions depend on its blocks, as those of a fresh one hardly do."""
    model = tiny_model(architecture, len(tokenizer))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter *= 6
    return model


def sparsified(tokenizer, text, architecture="Llama", **options):
    """(dense model, packed model, windows)."""
    optimizer = NMOptimizer(telling_model(architecture, tokenizer), tokenizer)
    dense = copy.deepcopy(optimizer.model)
    optimizer.sparsify(NMConfig(**ALL, **options), [text], progress=False)
    return dense, optimizer.model, calibration_windows([text], tokenizer, 8, 48, seed=0)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("Llama", {"outliers": "2:32"}),
        ("Qwen2", {"weight_dtype": "int4", "outliers": "2:32", "pattern": "2:4"}),
        ("GPT2", {"weight_dtype": "int8", "exclude": ["lm_head", "*.c_proj"]}),
        ("OPT", {"exclude": [], "overrides": {"lm_head": {"pattern": "16:16", "weight_dtype": "int8"}}}),
    ],
)
def test_packed_model_comes_nearer_to_the_dense_one(architecture, options, tokenizer, text):
    dense, model, windows = sparsified(tokenizer, text, architecture, **options)
    before, started = packed_layers(model), divergence(dense, model, windows)
    settings = DistillConfig(epochs=15, learning_rate=3e-3, holdout=0.0, batch_size=8)
    loss = distill(model, dense, windows, settings, seed=0, progress=False)
    assert loss.before == pytest.approx(started, rel=1e-3)
    assert loss.after == pytest.approx(divergence(dense, model, windows), rel=1e-3)  # what is packed was trained
    assert loss.after < 0.9 * loss.before
    for name, packed in packed_layers(model).items():
        packed.validate(name)
        assert torch.equal(packed.mask(), before[name].mask()), name
        assert torch.equal(packed.outlier_mask(), before[name].outlier_mask()), name
        assert packed.config == before[name].config
        if "scales" in packed.tensors:
            assert torch.equal(packed.tensors["scales"], before[name].tensors["scales"])
        in_block = ".0." in name or ".1." in name
        assert torch.equal(packed.unpack(), before[name].unpack()) != in_block, name


def test_checkpointing_computes_blocks_again_and_changes_no_gradient(tokenizer, text):
    trained, calls = [], [0, 0]
    for again in (False, True):
        dense, model, windows = sparsified(tokenizer, text, weight_dtype="float32")
        with register_module_forward_pre_hook(partial(count_block, calls, again)):
            settings = DistillConfig(**QUICK, gradient_checkpointing=again)
            distill(model, dense, windows, settings, seed=0, progress=False)
        trained.append({name: packed.unpack() for name, packed in packed_layers(model).items()})
    assert calls[1] > calls[0] > 0
    assert all(torch.allclose(trained[0][name], trained[1][name], atol=1e-6) for name in trained[0])


def count_block(calls, index, module, inputs):
    calls[index] += type(module).__name__ == "LlamaMLP"


def test_divergence_is_that_of_all_tokens_at_once(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    target, logits = torch.randn(2, 2, 37, 11, generator=generator)
    logits.requires_grad_()
    monkeypatch.setattr(distillation, "TOKENS_AT_ONCE", 10)
    expected, found = target.log_softmax(-1), logits.log_softmax(-1)
    whole = (expected.exp() * (expected - found)).sum(-1).mean()
    parts = distillation._divergence(target, logits)
    assert parts.item() == pytest.approx(whole.item(), rel=1e-5)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (whole, parts)]
    assert torch.allclose(*gradients, atol=1e-7)


def test_bfloat16_model_is_trained_in_float32(tokenizer, text):
    model = telling_model("Qwen2", tokenizer).to(torch.bfloat16)  # tied
    optimizer = NMOptimizer(model, tokenizer)
    config = NMConfig(distill=QUICK, weight_dtype="float32", **ALL)
    _, summary = optimizer.sparsify(config, [text], progress=False)
    assert summary.distillation.after < summary.distillation.before
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    weight = packed_layers(model)["model.layers.0.mlp.up_proj"].unpack()
    assert not torch.equal(weight, weight.bfloat16().float())


@pytest.mark.parametrize(("solved", "trained"), [(4, 8), (8, 2)])
def test_layers_are_solved_on_some_windows_and_the_model_is_trained_on_others(solved, trained, tokenizer, text):
    dense, model = telling_model("Llama", tokenizer), telling_model("Llama", tokenizer)
    windows = calibration_windows([text], tokenizer, 8, 48, seed=0)
    options = {**OPTIONS, "calibration_samples": solved, "outliers": "2:32"}
    settings = {**QUICK, "samples": trained}
    sparsify_model(LoadedWeights(model), windows[:solved], NMConfig(**options), progress=False)
    distill(model, dense, windows[:trained], DistillConfig(**settings), seed=0, progress=False)
    optimizer = NMOptimizer(telling_model("Llama", tokenizer), tokenizer)
    optimizer.sparsify(NMConfig(**options, distill=settings), [text], progress=False)
    found, expected = packed_layers(optimizer.model), packed_layers(model)
    assert all(torch.equal(found[name].unpack(), expected[name].unpack()) for name in expected)


@pytest.mark.parametrize("train_norms", [True, False])
def test_norms_are_trained_or_left(train_norms, tokenizer, text):
    dense, model, windows = sparsified(tokenizer, text)
    norms = [model.model.norm.weight, model.model.layers[1].input_layernorm.weight]
    before = [norm.detach().clone() for norm in norms]
    distill(model, dense, windows, DistillConfig(train_norms=train_norms, holdout=0.0), seed=0, progress=False)
    assert all(torch.equal(*pair) != train_norms for pair in zip(before, norms, strict=True))


def test_training_that_harms_what_is_held_out_is_undone(tokenizer, text):
    dense, model, windows = sparsified(tokenizer, text, outliers="2:32", weight_dtype="int4")
    before = packed_layers(model)
    loss = distill(model, dense, windows, DistillConfig(learning_rate=30.0, holdout=0.25), seed=0, progress=False)
    assert loss.after == loss.before
    for name, packed in packed_layers(model).items():
        assert torch.equal(packed.unpack(), before[name].unpack())


def test_optimizer_writes_what_was_distilled(tokenizer, text, tmp_path):
    model = telling_model("Llama", tokenizer)
    summary = NMOptimizer(model, tokenizer).optimize(
        tmp_path / "out", NMConfig(distill=QUICK, finetune={"epochs": 1}, **ALL), [text], progress=False
    )
    assert summary.distillation.after < summary.distillation.before
    assert summary.to_dict()["distillation"]["after"] == summary.distillation.after
    assert f"→ {summary.distillation.after:.4f}." in str(summary)
    checkpoint = open_checkpoint(tmp_path / "out")
    for name, packed in packed_layers(model).items():
        assert torch.equal(checkpoint.packed(name).unpack(), packed.unpack())
    assert torch.equal(checkpoint.tensor("model.norm.weight"), model.model.norm.weight)


def test_checkpoint_is_distilled_further(tokenizer, text, tmp_path):
    optimizer = NMOptimizer(telling_model("Llama", tokenizer), tokenizer)
    dense = copy.deepcopy(optimizer.model)
    optimizer.optimize(tmp_path / "out", NMConfig(**ALL), [text], progress=False)
    model = NMModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    windows = calibration_windows([text], tokenizer, 8, 48, seed=0)
    loss = distill(model, dense, windows, DistillConfig(**QUICK), seed=0, progress=False)
    assert loss.after < loss.before
    model.save_pretrained(tmp_path / "further")
    again = NMModelForCausalLM.from_pretrained(tmp_path / "further").eval()
    assert torch.equal(again(windows).logits, model(windows).logits)


def test_run_that_ended_after_distillation_goes_on_behind_it(tiny_llama_folder, text, tmp_path, monkeypatch):
    config = NMConfig(distill=QUICK, **ALL)

    def optimize(folder):
        return NMOptimizer.from_pretrained(tiny_llama_folder).optimize(folder, config, [text], progress=False)

    expected = optimize(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("optimum_nm.optimizer.write_checkpoint", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            optimize(tmp_path / "out")
    monkeypatch.setattr(distillation, "distill", None)
    summary = optimize(tmp_path / "out")
    assert summary.distillation == expected.distillation
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name


def test_memory_is_estimated(tokenizer, monkeypatch):
    monkeypatch.setattr(memory_estimate, "memory_bytes", lambda: (0, 0))
    model = tiny_model("Llama", len(tokenizer))
    arguments = LoadedWeights(model), model.model.layers, torch.zeros(8, 48, dtype=torch.int64)
    plain, distilled = (estimate_bytes(*arguments, NMConfig(distill=d), spilled=False) for d in (None, {}))
    weights = sum(parameter.numel() for parameter in model.model.layers.parameters())
    assert distilled - plain == 4 * (6 * weights + 48 * (2 * 48 + 4 * len(tokenizer)))


def test_memory_without_checkpointing_is_that_of_what_autograd_keeps(tokenizer, monkeypatch):
    monkeypatch.setattr(memory_estimate, "memory_bytes", lambda: (0, 0))
    model, kept = tiny_model("Llama", len(tokenizer)), {}
    parameters = {parameter.data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        if tensor.data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    windows = torch.zeros(8, 48, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(input_ids=windows[:1], use_cache=False)
    arguments = LoadedWeights(model), model.model.layers, windows
    few, all_of_them = (
        estimate_bytes(*arguments, NMConfig(distill={"gradient_checkpointing": again}), spilled=False)
        for again in (True, False)
    )
    inputs = 4 * 48 * 2 * 48
    measured = sum(size for size, _ in kept.values())
    assert 0.8 * measured < all_of_them - few + inputs < 1.5 * measured


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("once", "distill is 'once'; it must be settings by name"),
        ({"targets": "dense"}, "distill sets 'targets'; it may set epochs"),
        ({"epochs": 0}, "distill's epochs is 0; it must be a whole number above 0"),
        ({"samples": 0}, "distill's samples is 0; it must be a whole number above 0, or None"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(NMError, match=message):
        NMConfig(distill=settings)


def test_settings_are_completed_with_their_defaults():
    config = NMConfig(distill={"epochs": 2})
    assert config.distill["epochs"] == 2 and config.distill["batch_size"] == 1
    assert NMConfig.from_dict(config.to_dict()) == config


def test_baseline_that_is_not_packed_is_not_distilled():
    with pytest.raises(NMError, match="'anywhere': distill is set"):
        Row.read("anywhere", {"unstructured": "weights", "distill": {}}, {})
