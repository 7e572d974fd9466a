"""Layer allocation: the choice within a budget, what each choice costs, and what the whole makes of a model."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_sparsify import tiny_model

from optimum_nm.calibration.windows import calibration_windows
from optimum_nm.config import NMConfig
from optimum_nm.errors import NMError
from optimum_nm.evaluate.inspect import inspect_checkpoint
from optimum_nm.nn.convert import dense_weight, linear_layers
from optimum_nm.optimizer import NMOptimizer
from optimum_nm.packing.packed_weight import PackedWeight
from optimum_nm.patterns import NMPattern, OutlierPattern
from optimum_nm.sparsify.allocate import allocate_layers
from optimum_nm.sparsify.architectures import decoder_blocks
from optimum_nm.sparsify.block_inputs import BlockInputs
from optimum_nm.sparsify.budget import Choice, allocate, lower_hull
from optimum_nm.sparsify.candidates import candidate_errors, candidates, packed_bytes, sampled_rows
from optimum_nm.sparsify.sensitivity import output_fisher
from optimum_nm.sparsify.solvers import admm

QUICK = {"calibration_samples": 4, "calibration_length": 48, "solver": "sparsegpt"}
LAYER = NMConfig().layer("")

# --- the budget


def problem(sizes_and_losses):
    return {
        str(index): [Choice(LAYER, nbytes, 0.0, loss) for nbytes, loss in options]
        for index, options in enumerate(sizes_and_losses)
    }


def cost(chosen):
    return sum(choice.nbytes for choice in chosen), sum(choice.loss for choice in chosen)


def exhaustive(choices, nbytes):
    """The least loss of all combinations that fit; None if none does."""
    costs = map(cost, itertools.product(*choices.values()))
    return min((loss for size, loss in costs if size <= nbytes), default=None)


def breakpoints(choices):
    """Bytes at which the steps along the hulls, best first, have all been taken up to one."""
    hulls = [lower_hull(options) for options in choices.values()]
    steps = [(before, after) for hull in hulls for before, after in itertools.pairwise(hull)]
    steps.sort(key=lambda step: (step[0].loss - step[1].loss) / (step[1].nbytes - step[0].nbytes), reverse=True)
    smallest = sum(hull[0].nbytes for hull in hulls)
    return list(itertools.accumulate((after.nbytes - before.nbytes for before, after in steps), initial=smallest))


OPTIONS = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 200)), min_size=1, max_size=6)
PROBLEMS = st.lists(OPTIONS, min_size=1, max_size=4).map(problem)


@given(PROBLEMS)
def test_allocation_on_the_hull_is_what_exhaustive_search_finds(choices):
    for nbytes in breakpoints(choices):
        assert cost(allocate(choices, nbytes).values())[1] == exhaustive(choices, nbytes)


@given(PROBLEMS, st.integers(0, 250))
def test_no_budget_is_exceeded_and_what_is_left_over_is_used(choices, nbytes):
    chosen = allocate(choices, nbytes)
    best = exhaustive(choices, nbytes)
    assert (chosen is None) == (best is None)
    if chosen is None:
        return
    size, loss = cost(chosen.values())
    assert size <= nbytes
    for name, options in choices.items():
        changes = [c for c in options if size - chosen[name].nbytes + c.nbytes <= nbytes]
        assert min(c.loss for c in changes) == chosen[name].loss
    points = [point for point in breakpoints(choices) if point <= nbytes]
    assert best <= loss <= exhaustive(choices, points[-1])


def test_hull_is_convex_and_below_every_choice():
    options = [Choice(LAYER, n, 0.0, loss) for n, loss in [(1, 9.0), (2, 8.5), (3, 4.0), (4, 4.5), (6, 1.0), (9, 1.0)]]
    assert [choice.nbytes for choice in lower_hull(options)] == [1, 3, 6]


# --- what the loss depends on


@pytest.fixture(scope="module")
def small(tokenizer, text):
    model = tiny_model("Llama", len(tokenizer))
    return model, calibration_windows([text], tokenizer, 12, 48, seed=0)


@pytest.mark.parametrize("architecture", ["Llama", "Gemma2", "OPT", "GPT2"])
def test_fisher_is_the_mean_square_of_gradients_of_the_whole_model(architecture, tokenizer, small):
    model, windows = tiny_model(architecture, len(tokenizer)), small[1]
    linears = linear_layers(model)
    with torch.no_grad():
        inputs = BlockInputs(model, decoder_blocks(model)[1], windows[:2], 1)
        found = output_fisher(inputs, linears, seed=3)
    generator = torch.Generator().manual_seed(3)
    expected = {name: torch.zeros(len(dense_weight(module))) for name, module in linears.items()}
    outputs = {}
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: outputs.__setitem__(name, output))
        for name, module in linears.items()
    ]
    for window in windows[:2]:
        logits = model(window[None]).logits[0]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).flatten()
        loss = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
        for name, gradient in zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True):
            expected[name] += gradient.flatten(0, -2).square().sum(dim=0) / windows[:2].numel()
    for hook in hooks:
        hook.remove()
    assert found.keys() == expected.keys()
    for name in linears:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-9)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj", "lm_head"])
def test_fisher_predicts_what_noise_in_a_layers_output_costs(small, name):
    model, windows = small
    layer = model.get_submodule(name)
    with torch.no_grad():
        inputs = BlockInputs(model, decoder_blocks(model)[1], windows, 4)
        fisher = output_fisher(inputs, {name: layer}, seed=0)[name]
        dense = model(windows).logits.log_softmax(-1)
        sigma, generator = 0.02, torch.Generator().manual_seed(1)
        hook = layer.register_forward_hook(
            lambda _, __, output: output + sigma * torch.randn(output.shape, generator=generator)
        )
        noisy = model(windows).logits.log_softmax(-1)
        hook.remove()
    divergence = (dense.exp() * (dense - noisy)).sum(-1).mean().item()
    assert divergence == pytest.approx(0.5 * sigma**2 * fisher.sum().item(), rel=0.25)


# --- what a candidate costs


def layer_problem(rows=16, width=96):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, width, generator=generator)
    inputs = torch.randn(512, width, generator=generator) @ torch.randn(width, width, generator=generator)
    return weight, inputs.T @ inputs


def test_candidates_are_measured_each_once_and_better_ones_err_less():
    weight, gram = layer_problem()
    energy = ((weight @ gram) * weight).sum()
    errors = {candidate: (error.sum() / energy).item() for candidate, error in candidate_errors(weight, gram, LAYER)}
    assert set(errors) == set(candidates(LAYER)) and len(errors) == 13 * 4 * 3
    plain = replace(LAYER, outliers=None)
    for dtype in ("float16", "int8", "int4"):
        by_n = [errors[replace(plain, pattern=NMPattern(n, 16), weight_dtype=dtype)] for n in range(4, 17)]
        assert by_n == sorted(by_n, reverse=True)
        more = replace(plain, weight_dtype=dtype, outliers=OutlierPattern(16, 256))
        assert errors[more] < errors[replace(more, outliers=None)]
    assert errors[replace(plain, pattern=NMPattern(16, 16))] < 1e-12
    assert errors[replace(plain, weight_dtype="int4")] > errors[plain] > 0


def test_walk_errs_about_as_much_as_the_solver_it_stands_for():
    weight, gram = layer_problem(rows=32, width=128)
    errors = dict(candidate_errors(weight, gram, LAYER))
    for n in (6, 8, 10):
        layer = replace(LAYER, pattern=NMPattern(n, 16))
        change = weight - admm(weight, gram, layer).weight
        assert errors[layer].sum() <= 1.3 * ((change @ gram) * change).sum()


@pytest.mark.parametrize("outliers", [None, "4:256"])
@pytest.mark.parametrize(
    ("pattern", "dtype"), [("8:16", "int4"), ("11:16", "int8"), ("16:16", "float16"), ("2:4", "int4")]
)
def test_bytes_are_those_of_the_packed_tensors(pattern, dtype, outliers):
    packed = PackedWeight.pack(torch.randn(5, 300), pattern, outliers, dtype)
    assert packed_bytes((5, 300), packed.config) == packed.nbytes


def test_rows_are_sampled_without_repetition():
    assert sampled_rows(5).tolist() == [0, 1, 2, 3, 4]
    rows = sampled_rows(1000).tolist()
    assert len(set(rows)) == len(rows) and (rows[0], rows[-1]) == (0, 999)


# --- the whole


def optimized(tokenizer, text, folder, **options):
    model = tiny_model("Llama", len(tokenizer))
    config = NMConfig(**QUICK | options)
    return NMOptimizer(model, tokenizer).optimize(folder, config, [text], progress=False)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, tokenizer, text):
    folder = tmp_path_factory.mktemp("mixed") / "out"
    return folder, optimized(tokenizer, text, folder, target_bits=3.6)


def test_checkpoint_stays_within_the_budget_and_says_how(mixed):
    folder, summary = mixed
    totals = inspect_checkpoint(folder).totals()
    assert 3.5 < totals["bits_per_weight"] <= 3.6
    assert summary.allocation.bits_per_weight == pytest.approx(totals["bits_per_weight"], abs=1e-12)
    bits = {layer.name: layer.bits_per_weight for layer in inspect_checkpoint(folder).layers}
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert stored["target_bits"] == 3.6 and len(stored["overrides"]) == len(summary.allocation.layers) == 14
    for layer in summary.allocation.layers:
        assert layer.bits_per_weight == pytest.approx(bits[layer.name])
        override = stored["overrides"][layer.name]
        assert override == {"pattern": layer.pattern, "outliers": layer.outliers, "weight_dtype": layer.weight_dtype}
        assert layer.sensitivity > 0 and layer.relative_error >= 0
    assert len({layer.storage for layer in summary.allocation.layers}) > 1
    assert "3.6 bits per weight, allocated:" in str(summary) and "mlp.down_proj" in str(summary.allocation)
    assert json.loads((folder / "nm_summary.json").read_text())["allocation"]["target_bits"] == 3.6


def test_sensitive_layers_get_more_bits_than_those_whose_output_is_not_used(tokenizer, small):
    model, windows = tiny_model("Llama", len(tokenizer)), small[1]
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(4)
        model.model.layers[1].mlp.down_proj.weight.mul_(1e-3)
    _, allocation = allocate_layers(model, windows[:4], NMConfig(target_bits=4.0, positions="codes"), progress=False)
    chosen = {layer.name: layer for layer in allocation.layers}
    loud, quiet = (chosen[f"model.layers.{index}.mlp.down_proj"] for index in (0, 1))
    assert loud.sensitivity > 100 * quiet.sensitivity
    assert loud.bits_per_weight > quiet.bits_per_weight == min(layer.bits_per_weight for layer in allocation.layers)


def test_checkpoint_can_be_made_again_from_its_configuration(mixed, tokenizer, text, tmp_path):
    """Every layer is then set by an override, and nothing is measured."""
    folder, _ = mixed
    config = NMConfig.from_pretrained(folder)
    summary = NMOptimizer(tiny_model("Llama", len(tokenizer)), tokenizer).optimize(
        tmp_path / "again", config, [text], progress=False
    )
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert summary.allocation.layers[0].sensitivity is None


def test_overrides_and_a_shared_embedding_count_against_the_budget(tokenizer, text, tmp_path):
    model = tiny_model("Qwen2", len(tokenizer))
    overrides = {"*.v_proj": {"pattern": "16:16", "weight_dtype": "float16"}, "*.q_proj": {"positions": "bitmap"}}
    config = NMConfig(target_bits=6.0, exclude=[], overrides=overrides, share_embedding=True, **QUICK)
    summary = NMOptimizer(model, tokenizer).optimize(tmp_path / "out", config, [text], progress=False)
    chosen = {layer.name: layer for layer in summary.allocation.layers}
    assert inspect_checkpoint(tmp_path / "out").totals()["bits_per_weight"] <= 6.0
    assert chosen["model.layers.0.self_attn.v_proj"].storage == "16:16 float16"
    assert chosen["model.layers.0.self_attn.v_proj"].sensitivity is None
    assert chosen["lm_head"].pattern == "16:16" and chosen["lm_head"].outliers is None
    stored = NMConfig.from_pretrained(tmp_path / "out")
    assert stored.layer("model.layers.1.self_attn.q_proj").positions == "bitmap"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_bits": 1.0, "positions": "codes"},
            r"target_bits is 1; the smallest that the layers can take is 2\.150 bits per weight",
        ),
        (
            {"target_bits": 7.5, "overrides": {"*": {"weight_dtype": "int8", "pattern": "16:16"}}},
            r"target_bits is 7\.5; the smallest that the layers can take is 8\.\d\d\d bits per weight",
        ),
    ],
)
def test_budget_that_is_impossible(tokenizer, text, tmp_path, options, message):
    with pytest.raises(NMError, match=message):
        optimized(tokenizer, text, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bits", [0, -3.5, "many", True, float("nan")])
def test_target_that_is_no_number_of_bits(bits):
    with pytest.raises(NMError, match=r"target_bits is .*; it must be a number above 0, or None"):
        NMConfig(target_bits=bits)


def test_budget_for_everything_leaves_the_values_as_they_are(tokenizer, small):
    model, windows = tiny_model("Llama", len(tokenizer)), small[1]
    config, allocation = allocate_layers(model, windows[:2], NMConfig(target_bits=16.0), progress=False)
    assert {layer.storage for layer in allocation.layers} == {"16:16 float16"}
    assert allocation.bits_per_weight == 16 and config.target_bits == 16


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda output: (output - output.detach()).sqrt(),
            r"up_proj has gradients that are not finite; load the model",
        ),
        (lambda output: output + torch.inf, "the dense model's predictions are not finite; load it with dtype"),
    ],
)
def test_model_that_is_not_finite(tokenizer, small, damage, message):
    model, windows = tiny_model("Llama", len(tokenizer)), small[1]
    mlp = model.model.layers[1].mlp
    mlp.down_proj.register_forward_hook(lambda _, __, output: damage(output))
    with torch.no_grad(), pytest.raises(NMError, match=message):
        inputs = BlockInputs(model, decoder_blocks(model)[1], windows[:1])
        output_fisher(inputs, {"model.layers.1.mlp.up_proj": mlp.up_proj}, seed=0)
