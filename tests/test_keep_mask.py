"""Fine-tuning a sparse model with transformers' Trainer, whole or by LoRA, keeps its pattern, and `verify` sees it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from test_sparsify import OPTIONS, tiny_model
from transformers import Trainer, TrainingArguments

from optimum_nm.config import NMConfig
from optimum_nm.errors import NMError
from optimum_nm.evaluate.verify import verify_checkpoint
from optimum_nm.nn.convert import dense_weight, linear_layers
from optimum_nm.nn.modeling import NMModelForCausalLM
from optimum_nm.nn.skeleton import open_checkpoint
from optimum_nm.optimizer import NMOptimizer
from optimum_nm.sparsify.keep_mask import KeepMaskCallback
from optimum_nm.sparsify.lora import lora_layers, mask_lora


def train(model, folder, *callbacks):
    windows = torch.randint(1, 200, (8, 24), generator=torch.Generator().manual_seed(0))
    settings = TrainingArguments(
        folder, max_steps=3, per_device_train_batch_size=4, learning_rate=1e-3, report_to=[], disable_tqdm=True, seed=0
    )
    examples = [{"input_ids": window, "labels": window} for window in windows]
    Trainer(model, settings, train_dataset=examples, callbacks=list(callbacks)).train()


@pytest.mark.parametrize("architecture", ["Llama", "GPT2"])
def test_what_is_pruned_stays_pruned(architecture, tokenizer, text, tmp_path):
    config = NMConfig(score="magnitude", equalization=None, variance_correction=None, **OPTIONS)
    dense = tiny_model(architecture, len(tokenizer))
    NMOptimizer(dense, tokenizer).optimize(tmp_path / "sparse", config, [text], progress=False)
    model = NMModelForCausalLM.from_pretrained(tmp_path / "sparse").dequantize()
    before = {name: dense_weight(module).detach().clone() for name, module in linear_layers(model).items()}
    train(model, tmp_path / "trainer", KeepMaskCallback())
    NMOptimizer(model, tokenizer).optimize(tmp_path / "again", config, [text], progress=False)
    for name in open_checkpoint(tmp_path / "again").layer_names():
        weight = open_checkpoint(tmp_path / "again").packed(name).unpack()
        assert not weight[before[name] == 0].any()
        assert ((weight != before[name]) & (weight != 0)).float().mean() > 0.4


def test_dense_model_is_refused(tokenizer, tmp_path):
    with pytest.raises(NMError, match="LlamaForCausalLM has no zeros in linear layers"):
        train(tiny_model("Llama", len(tokenizer)), tmp_path / "trainer", KeepMaskCallback())


def sparse_model(architecture, tokenizer, text, folder):
    """A packed checkpoint with outliers in `folder`, as a dense model, and where it keeps weights."""
    config = NMConfig(outliers="2:32", **OPTIONS)
    NMOptimizer(tiny_model(architecture, len(tokenizer)), tokenizer).optimize(folder, config, [text], progress=False)
    return NMModelForCausalLM.from_pretrained(folder).dequantize()


def lora_model(model, **options):
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM", **options)
    return get_peft_model(model, config)


@pytest.mark.parametrize("architecture", ["Llama", "GPT2"])
@pytest.mark.parametrize("safe", [False, True])
def test_lora_keeps_the_pattern_when_trained_and_merged(architecture, safe, tokenizer, text, tmp_path):
    model = sparse_model(architecture, tokenizer, text, tmp_path / "sparse")
    before = {name: dense_weight(module).detach().clone() for name, module in linear_layers(model).items()}
    adapted = lora_model(model)
    start = {name: matrix.detach().clone() for name, matrix in adapted.named_parameters() if matrix.requires_grad}
    train(adapted, tmp_path / "trainer", KeepMaskCallback())
    trained = dict(adapted.named_parameters())
    assert start and not any(torch.equal(matrix, trained[name]) for name, matrix in start.items())
    tokens = torch.arange(1, 20)[None]
    with torch.no_grad():
        logits = adapted.eval()(tokens).logits
        merged = adapted.merge_and_unload(safe_merge=safe)
        torch.testing.assert_close(merged(tokens).logits, logits, atol=1e-4, rtol=1e-4)
    changed = [(dense_weight(module) != before[name]).any() for name, module in linear_layers(merged).items()]
    assert sum(changed) == len(before) - 1  # all but the output layer
    merged.save_pretrained(tmp_path / "merged")
    found = verify_checkpoint(tmp_path / "sparse", tmp_path / "merged")
    assert found.problems == [] and str(found).endswith("merged has its pattern.")


def test_lora_unmerges_and_takes_further_adapters(tokenizer, text, tmp_path):
    model = lora_model(sparse_model("Llama", tokenizer, text, tmp_path / "sparse"), lora_dropout=0.5)
    layers = len(lora_layers(model))
    assert mask_lora(model) == mask_lora(model) == layers > 0
    weight = next(iter(lora_layers(model).values())).get_base_layer().weight
    before = weight.detach().clone()
    model.merge_adapter()
    assert not torch.equal(weight, before) and not weight[before == 0].any()
    model.unmerge_adapter()
    torch.testing.assert_close(weight, before)


def test_unmasked_lora_is_found(tokenizer, text, tmp_path):
    model = sparse_model("Llama", tokenizer, text, tmp_path / "sparse")
    lora_model(model).merge_and_unload().save_pretrained(tmp_path / "merged")
    found = verify_checkpoint(tmp_path / "sparse", tmp_path / "merged").problems
    assert len(found) == 14
    (problem,) = [text for text in found if text.startswith("model.layers.0.self_attn.q_proj.weight in ")]
    assert "elements, the first at (0, " in problem and problem.endswith("fine-tune with KeepMaskCallback.")


def test_variants_of_lora_are_refused(tokenizer, text, tmp_path):
    model = lora_model(sparse_model("Llama", tokenizer, text, tmp_path / "sparse"), use_dora=True)
    with pytest.raises(NMError, match=r"q_proj has a DoraLinearVariant adapter; plain LoRA is needed"):
        train(model, tmp_path / "trainer", KeepMaskCallback())


def test_lora_of_a_dense_model_is_refused(tokenizer, tmp_path):
    with pytest.raises(NMError, match="has no zeros in linear layers"):
        train(lora_model(tiny_model("Llama", len(tokenizer))), tmp_path / "trainer", KeepMaskCallback())


def test_verify_names_what_is_not_the_fine_tuned_model(tokenizer, text, tmp_path):
    model = sparse_model("Llama", tokenizer, text, tmp_path / "sparse")
    (message,) = verify_checkpoint(tmp_path / "sparse", tmp_path / "none").problems
    assert "none" in message
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    name = "model.layers.1.mlp.up_proj.weight"
    (tmp_path / "other").mkdir()
    save_file(
        {other: tensor for other, tensor in tensors.items() if other != name}, tmp_path / "other/model.safetensors"
    )
    (message,) = verify_checkpoint(tmp_path / "sparse", tmp_path / "other").problems
    assert f"has no tensor '{name}'" in message
    save_file(tensors | {name: tensors[name][:-1].clone()}, tmp_path / "other/model.safetensors")
    (message,) = verify_checkpoint(tmp_path / "sparse", tmp_path / "other").problems
    assert "is F32 [87, 48]; the checkpoint's is of shape [88, 48]" in message
