"""Fine-tuning a sparse model with transformers' Trainer keeps its pattern."""

import pytest
import torch
from test_sparsify import OPTIONS, tiny_model
from transformers import Trainer, TrainingArguments

from optimum_nm.config import NMConfig
from optimum_nm.errors import NMError
from optimum_nm.nn.convert import dense_weight, linear_layers
from optimum_nm.nn.modeling import NMModelForCausalLM
from optimum_nm.nn.skeleton import open_checkpoint
from optimum_nm.optimizer import NMOptimizer
from optimum_nm.sparsify.keep_mask import KeepMaskCallback


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
