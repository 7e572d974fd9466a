"""Blockwise fine-tuning: against a closed form, through the whole pipeline, and what it refuses."""

import json

import pytest
import torch
from test_sparsify import OPTIONS, tiny_model

from optimum_nm.calibration.windows import calibration_windows
from optimum_nm.config import LayerConfig, NMConfig
from optimum_nm.errors import NMError
from optimum_nm.finetune_config import FinetuneConfig
from optimum_nm.nn.skeleton import open_checkpoint
from optimum_nm.optimizer import NMOptimizer
from optimum_nm.packing.packed_weight import PackedWeight
from optimum_nm.patterns import NMPattern, OutlierPattern
from optimum_nm.sparsify.finetune import finetune_block
from optimum_nm.sparsify.mask import choose_masks
from optimum_nm.sparsify.solvers import Solution

QUICK = {"epochs": 4, "learning_rate": 5e-4, "batch_size": 1, "holdout": 0.25}
WIDTH = 32


class LinearBlock(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.linear.weight.data = weight.clone()
        self.norm = torch.nn.Parameter(torch.ones(WIDTH))

    def forward(self, inputs):
        return self.linear(inputs) * self.norm


class OneBlock:
    """Stands for BlockInputs of a model that is one linear layer and a norm's weight on its output."""

    def __init__(self, weight, hidden):
        self.blocks, self.hidden = [LinearBlock(weight)], hidden

    def run(self, index, batch, parameters):
        return torch.func.functional_call(self.blocks[0], parameters, self.hidden[batch])


def linear_problem(dtype="float16", outliers=None):
    """(inputs, targets, solutions, the layer's weight) of a layer of which half is taken away."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(WIDTH, WIDTH, generator=generator)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator) / 6
    hidden = [torch.randn(2, 20, WIDTH, generator=generator) @ mixing for _ in range(8)]
    layer = LayerConfig(NMPattern(8, 16), OutlierPattern.parse(outliers), dtype, 16, "codes", "float32")
    mask, outlier_mask = choose_masks(weight.abs(), layer)
    solution = Solution(weight * (mask if outlier_mask is None else mask | outlier_mask), mask, outlier_mask)
    return OneBlock(weight, hidden), [batch @ weight.t() for batch in hidden], {"linear": (solution, layer)}


def least_squares(inputs, targets, kept):
    """The smallest squared error with a row's support, summed over rows and tokens."""
    rows, outputs = (torch.cat(tensors).reshape(-1, WIDTH).double() for tensors in (inputs.hidden, targets))
    total = 0.0
    for support, output in zip(kept, outputs.t(), strict=True):
        values = torch.linalg.lstsq(rows[:, support], output[:, None]).solution[:, 0]
        total += (rows[:, support] @ values - output).square().sum().item()
    return total


@pytest.mark.parametrize("outliers", [None, "2:32"])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_linear_block_reaches_the_least_squares_values_of_its_mask(outliers, schedule):
    inputs, targets, solutions = linear_problem(outliers=outliers)
    start, _ = solutions["linear"]
    settings = FinetuneConfig(epochs=40, learning_rate=0.03, train_norms=False, holdout=0.0, schedule=schedule)
    tuned, loss = finetune_block(inputs, 0, targets, solutions, settings, seed=0)
    solution = tuned["linear"]
    assert torch.equal(solution.mask, start.mask) and not solution.weight[~start.kept].any()

    def error(weight):
        pairs = zip(inputs.hidden, targets, strict=True)
        return sum((batch @ weight.t() - target).square().sum().item() for batch, target in pairs)

    best = least_squares(inputs, targets, start.kept)
    assert best * 0.999 <= error(solution.weight) < 1.05 * best < 0.7 * error(start.weight)
    assert loss.after < loss.before


@pytest.mark.parametrize("outliers", [None, "2:32"])
def test_integers_that_are_trained_are_those_that_are_packed(outliers):
    inputs, targets, solutions = linear_problem("int4", outliers)
    start, layer = solutions["linear"]
    settings = FinetuneConfig(epochs=30, learning_rate=0.02, train_norms=False, holdout=0.0)
    tuned, loss = finetune_block(inputs, 0, targets, solutions, settings, seed=0)
    solution = tuned["linear"]
    packed = PackedWeight.from_config(
        solution.weight, layer, mask=solution.mask, outlier_mask=solution.outlier_mask, scales=solution.scales
    )
    assert torch.equal(packed.unpack(), solution.weight)
    rounded = PackedWeight.from_config(start.weight, layer, mask=start.mask, outlier_mask=start.outlier_mask).unpack()
    energy = torch.stack([(t - h).square().mean() for t, h in zip(targets, inputs.hidden, strict=True)]).mean()

    def batch_losses(weight):
        pairs = zip(inputs.hidden, targets, strict=True)
        return [((batch @ weight.t() - target).square().mean() / energy).item() for batch, target in pairs]

    assert any(abs(value - loss.before) < 1e-5 for value in batch_losses(rounded))
    assert any(abs(value - loss.after) < 1e-5 for value in batch_losses(packed.unpack()))
    assert loss.after < 0.8 * loss.before


def test_norms_are_trained_or_left():
    for train_norms in (True, False):
        inputs, targets, solutions = linear_problem()
        settings = FinetuneConfig(epochs=1, train_norms=train_norms, holdout=0.0)
        finetune_block(inputs, 0, targets, solutions, settings, seed=0)
        assert torch.equal(inputs.blocks[0].norm, torch.ones(WIDTH)) != train_norms


def test_training_that_harms_what_is_held_out_is_undone():
    inputs, targets, solutions = linear_problem()
    settings = FinetuneConfig(learning_rate=30.0, holdout=0.25)
    tuned, loss = finetune_block(inputs, 0, targets, solutions, settings, seed=0)
    assert loss.after == loss.before
    assert torch.equal(tuned["linear"].weight, solutions["linear"][0].weight)
    assert torch.equal(inputs.blocks[0].norm, torch.ones(WIDTH))


def optimize(tokenizer, text, folder, finetune, architecture="Llama", **options):
    model = tiny_model(architecture, len(tokenizer))
    config = NMConfig(finetune=finetune, **{**OPTIONS, "calibration_samples": 8, **options})
    summary = NMOptimizer(model, tokenizer).optimize(folder, config, [text], progress=False)
    return model.eval(), summary


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("Llama", {"outliers": "2:32"}),
        ("GPT2", {"weight_dtype": "int4"}),
        ("Qwen2", {"weight_dtype": "int8", "equalization_mode": "fold", "exclude": ["lm_head", "*.v_proj"]}),
    ],
)
def test_every_block_comes_nearer_to_the_dense_one(architecture, options, tokenizer, text, tmp_path):
    optimize(tokenizer, text, tmp_path / "plain", None, architecture, **options)
    model, summary = optimize(tokenizer, text, tmp_path / "tuned", QUICK, architecture, **options)
    assert summary.block_losses.keys() == {0, 1}
    assert all(loss.after < loss.before for loss in summary.block_losses.values())
    saved = json.loads((tmp_path / "tuned" / "nm_summary.json").read_text())["block_losses"]
    assert saved["1"]["after"] == summary.block_losses[1].after
    plain, tuned = open_checkpoint(tmp_path / "plain"), open_checkpoint(tmp_path / "tuned")
    for name in tuned.layer_names():
        tuned.packed(name).validate(name)
        if ".0." in name:  # the second block sees other inputs
            assert torch.equal(tuned.packed(name).mask(), plain.packed(name).mask())
            assert torch.equal(tuned.packed(name).outlier_mask(), plain.packed(name).outlier_mask())
    norm = next(name for name in tuned.locations if "ln_1.weight" in name or "input_layernorm.weight" in name)
    assert not torch.equal(tuned.tensor(norm), plain.tensor(norm))
    assert torch.equal(tuned.tensor(norm), dict(model.named_parameters())[norm])


@torch.no_grad()
def test_dense_targets_are_those_of_the_dense_model(tokenizer, text, tmp_path):
    windows = calibration_windows([text], tokenizer, 8, 48, seed=0)
    wanted = tiny_model("Llama", len(tokenizer)).model(windows).last_hidden_state

    def distance(finetune, folder):
        model, _ = optimize(tokenizer, text, tmp_path / folder, finetune, pattern="4:16")
        return (model.model(windows).last_hidden_state - wanted).square().mean().item()

    plain = distance(None, "plain")
    sparse = distance({**QUICK, "targets": "sparse"}, "sparse")
    dense = distance({**QUICK, "targets": "dense"}, "dense")
    assert dense < sparse < plain


def test_same_input_gives_the_same_bytes(tokenizer, text, tmp_path):
    for run in ("first", "second"):
        optimize(tokenizer, text, tmp_path / run, QUICK, weight_dtype="int4", outliers="4:64")
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()


def test_bfloat16_model_is_trained_in_float32(tokenizer, text, tmp_path):
    model = tiny_model("Llama", len(tokenizer)).to(torch.bfloat16)
    config = NMConfig(finetune=QUICK, weight_dtype="float32", **{**OPTIONS, "calibration_samples": 8})
    summary = NMOptimizer(model, tokenizer).optimize(tmp_path / "out", config, [text], progress=False)
    assert all(loss.after < loss.before for loss in summary.block_losses.values())
    weight = open_checkpoint(tmp_path / "out").packed("model.layers.0.mlp.up_proj").unpack()
    assert not torch.equal(weight, weight.bfloat16().float())
    assert model.model.layers[0].input_layernorm.weight.dtype == torch.bfloat16


def test_progress_bar_shows_the_block_loss(tokenizer, text, tmp_path, capsys):
    config = NMConfig(finetune=QUICK, **OPTIONS)
    NMOptimizer(tiny_model("Llama", len(tokenizer)), tokenizer).optimize(tmp_path / "out", config, [text])
    shown = capsys.readouterr().err
    assert "block_loss=" in shown and "→" in shown


def test_settings_are_completed_with_their_defaults():
    config = NMConfig(finetune={"epochs": 2})
    assert config.finetune["epochs"] == 2 and config.finetune["schedule"] == "cosine"
    assert NMConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (3, "finetune is 3; it must be settings by name"),
        ({"epoch": 3}, "finetune sets 'epoch'; it may set epochs, learning_rate"),
        ({"epochs": 0}, "finetune's epochs is 0; it must be a whole number above 0"),
        ({"epochs": 1.5}, "finetune's epochs is 1.5"),
        ({"learning_rate": "1e-3"}, "finetune's learning_rate is '1e-3'; it must be a number above 0"),
        ({"weight_decay": -1}, "finetune's weight_decay is -1"),
        ({"batch_size": True}, "finetune's batch_size is True"),
        ({"schedule": "step"}, "finetune's schedule is 'step'; it must be one of cosine, linear"),
        ({"targets": None}, "finetune's targets is None; it must be one of sparse, dense"),
        ({"train_norms": 1}, "finetune's train_norms is 1; it must be true or false"),
        ({"holdout": 1.0}, "finetune's holdout is 1.0; it must be a number from 0 to below 1"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(NMError, match=message) as caught:
        NMConfig(finetune=settings)
    assert "\n" not in str(caught.value)
