"""Folding equalization into the dense model leaves its function as it is."""

import pytest
import torch
from test_sparsify import OPTIONS, tiny_model

from optimum_nm.config import NMConfig
from optimum_nm.nn.convert import dense_weight, linear_layers
from optimum_nm.optimizer import NMOptimizer
from optimum_nm.sparsify.architectures import decoder_blocks
from optimum_nm.sparsify.block_inputs import BlockInputs
from optimum_nm.sparsify.equalize import equalization_scale, fold_block
from optimum_nm.sparsify.statistics import StatisticsCollector

# Per architecture the linears of a block whose inputs can be rescaled.
FOLDABLE = {
    "Llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "Qwen3": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "Gemma": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "Gemma2": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "Phi": {"q_proj", "k_proj", "v_proj", "fc1"},
    "OPT": {"out_proj"},  # a norm after attention feeds the residual as well
    "GPT2": {"c_attn", "c_fc"},
    "GPTNeoX": {"query_key_value", "dense_h_to_4h"},
}


def fold_model(model, windows, with_gram=True):
    """Fold every block, on dense inputs; returns per block the folded names and the statistics."""
    _, blocks = decoder_blocks(model)
    inputs = BlockInputs(model, blocks, windows)
    folded = []
    with torch.no_grad():
        for index, block in enumerate(blocks):
            linears = linear_layers(block)
            with StatisticsCollector(linears, with_gram, len(inputs.batches), 0) as collector:
                for batch in range(len(inputs.batches)):
                    inputs.run(index, batch)
            statistics = collector.statistics()
            run = lambda index=index: inputs.run(index, 0)  # noqa: E731
            folded.append((fold_block(block, linears, statistics, inputs.hidden[0], run, 0.5), statistics))
            inputs.advance(index)
    return folded


@pytest.fixture
def windows():
    return torch.randint(300, (4, 48), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", FOLDABLE)
def test_fold_keeps_the_dense_output(architecture, windows):
    model = tiny_model(architecture, 300)
    before = {name: dense_weight(module).detach().clone() for name, module in linear_layers(model).items()}
    with torch.no_grad():
        expected = model(windows).logits
        folded = fold_model(model, windows)
        found = model(windows).logits
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    for index, (names, _) in enumerate(folded):
        assert {name.rpartition(".")[2] for name in names} == FOLDABLE[architecture]
        prefix = f"{decoder_blocks(model)[0]}.{index}"
        for name in names:
            weight = dense_weight(model.get_submodule(f"{prefix}.{name}"))
            assert (weight - before[f"{prefix}.{name}"]).abs().max() > 1e-3


@pytest.mark.parametrize("with_gram", [True, False])
def test_fold_rescales_the_statistics_to_those_of_the_new_inputs(with_gram, windows):
    model = tiny_model("Llama", 300)
    folded = fold_model(model, windows, with_gram)
    again = tiny_model("Llama", 300)
    again.load_state_dict(model.state_dict())
    linears = linear_layers(again.model.layers[0])
    with torch.no_grad(), StatisticsCollector(linears, with_gram, 1, 0) as collector:
        again(windows)
    for name, measured in collector.statistics().items():
        kept = folded[0][1][name]
        assert torch.allclose(kept.norm, measured.norm, rtol=1e-3)
        assert torch.allclose(kept.absolute_max, measured.absolute_max, rtol=1e-3)
        if with_gram:
            assert (kept.gram - measured.gram).norm() < 1e-3 * measured.gram.norm()
        else:
            assert torch.allclose(torch.cat(kept.samples), torch.cat(measured.samples), rtol=1e-2, atol=1e-4)


def test_folded_columns_have_the_scale_of_the_formula(windows):
    model, dense = tiny_model("Llama", 300), tiny_model("Llama", 300)
    linears = linear_layers(dense.model.layers[0])
    with torch.no_grad(), StatisticsCollector(linears, False, 1, 0) as collector:
        dense(windows)
    input_max = collector.statistics()["mlp.gate_proj"].absolute_max
    weight_max = torch.maximum(linears["mlp.gate_proj"].weight.abs(), 0 * input_max).amax(dim=0)
    weight_max = torch.maximum(weight_max, linears["mlp.up_proj"].weight.abs().amax(dim=0))
    fold_model(model, windows)
    expected = linears["mlp.gate_proj"].weight * equalization_scale(input_max, weight_max, 0.5)
    assert torch.allclose(model.model.layers[0].mlp.gate_proj.weight, expected, rtol=1e-4, atol=1e-6)


def test_grouped_query_heads_share_the_scale_of_their_value_head(windows):
    model, dense = tiny_model("Llama", 300), tiny_model("Llama", 300)
    fold_model(model, windows)
    ratio = model.model.layers[0].self_attn.o_proj.weight / dense.model.layers[0].self_attn.o_proj.weight
    scale = ratio[0].detach().view(2, 2, 12)  # value head, repeat, element
    assert torch.allclose(scale[:, 0], scale[:, 1], rtol=1e-3)
    rows = dense.model.layers[0].self_attn.v_proj.bias / model.model.layers[0].self_attn.v_proj.bias
    assert torch.allclose(rows.view(2, 12), scale[:, 0], rtol=1e-3)


def test_fold_changes_what_is_packed_but_not_how_well_it_works(tokenizer, text, tmp_path):
    errors, weights = {}, {}
    for mode in ("score", "fold"):
        model = tiny_model("Llama", len(tokenizer))
        config = NMConfig(equalization_mode=mode, **OPTIONS)
        summary = NMOptimizer(model, tokenizer).optimize(tmp_path / mode, config, [text], progress=False)
        errors[mode] = summary.by_type()["all"]["relative_error"]
        weights[mode] = model.model.layers[0].self_attn.q_proj.packed.unpack()
    assert not torch.allclose(weights["score"], weights["fold"], rtol=0.1)
    assert errors["fold"] < 1.2 * errors["score"]
