"""Solvers against exhaustive and closed-form optima, and against choosing by score alone."""

import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch

from optimum_nm.config import LayerConfig, NMConfig
from optimum_nm.nn.convert import linear_layers
from optimum_nm.nn.linear import NMLinear
from optimum_nm.optimizer import NMOptimizer
from optimum_nm.packing.packed_weight import PackedWeight
from optimum_nm.patterns import NMPattern, OutlierPattern
from optimum_nm.sparsify import products
from optimum_nm.sparsify.layer import solve_layer
from optimum_nm.sparsify.mask import best_masks, best_support, choose_masks
from optimum_nm.sparsify.products import product_with, rounded_products
from optimum_nm.sparsify.solvers import SOLVERS, conjugate_gradients, inverse_factor, quantize_solution
from optimum_nm.sparsify.statistics import StatisticsCollector


def layer_config(pattern, outliers=None, dtype="float16", group_size=32):
    return LayerConfig(NMPattern.parse(pattern), OutlierPattern.parse(outliers), dtype, group_size, "codes", "float32")


def problem(rows=16, columns=96, rank=24, tokens=400, seed=0):
    """A weight and the Gram matrix of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(tokens, rank, generator=generator)
    inputs = factors @ torch.randn(rank, columns, generator=generator)
    inputs += torch.randn(tokens, columns, generator=generator)
    inputs *= torch.rand(columns, generator=generator) * 3 + 0.2
    return torch.randn(rows, columns, generator=generator), inputs.t() @ inputs


def error(weight, pruned, gram):
    change = (weight - pruned).double()
    return ((change @ gram.double()) * change).sum().item()


def score_solution_error(weight, gram, layer):
    mask, outlier_mask = choose_masks(weight.abs() * gram.diagonal().sqrt(), layer)
    return error(weight, weight * (mask if outlier_mask is None else mask | outlier_mask), gram)


def exhaustive_optimum(weight, gram, n, m):
    """The least error over all masks of one row, each with its best values."""
    groups = [[set(kept) for kept in combinations(range(g, g + m), n)] for g in range(0, len(weight), m)]
    supports = [set()]
    for choices in groups:
        supports = [support | choice for support in supports for choice in choices]
    best = float("inf")
    for support in supports:
        index = torch.tensor(sorted(support))
        values = torch.linalg.solve(gram[index][:, index].double(), (gram[index].double() @ weight.double()))
        pruned = torch.zeros_like(weight, dtype=torch.float64)
        pruned[index] = values
        best = min(best, error(weight[None], pruned[None], gram))
    return best


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "8:16", "16:32", "6:16", "16:16"])
@pytest.mark.parametrize("outliers", [None, "4:32"])
@pytest.mark.parametrize("columns", [96, 90])
def test_solution_keeps_the_pattern(solver, pattern, outliers, columns):
    weight, gram = problem(columns=columns)
    layer = layer_config(pattern, outliers)
    solution = SOLVERS[solver](weight, gram, layer)
    assert torch.isfinite(solution.weight).all()
    assert not solution.weight[~solution.kept].any()
    m = layer.pattern.m
    counts = torch.nn.functional.pad(solution.mask, (0, -columns % m)).view(len(weight), -1, m).sum(dim=-1)
    assert counts.max() <= layer.pattern.n
    if outliers is None:
        assert (counts[:, :-1] == layer.pattern.n).all()
    else:
        assert not (solution.mask & solution.outlier_mask).any()
        assert (solution.outlier_mask.sum(dim=1) == layer.outliers.per_row(columns)).all()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("pattern", ["2:4", "8:16", "16:32"])
@pytest.mark.parametrize("outliers", [None, "4:32"])
def test_solution_beats_choosing_by_score(solver, pattern, outliers):
    weight, gram = problem()
    layer = layer_config(pattern, outliers)
    solution = SOLVERS[solver](weight, gram, layer)
    assert error(weight, solution.weight, gram) < 0.6 * score_solution_error(weight, gram, layer)


@pytest.mark.parametrize(("solver", "factor"), [("sparsegpt", 1.6), ("admm", 1.25), ("alps", 1.2)])
def test_solution_is_near_the_exhaustive_optimum(solver, factor):
    weight, gram = problem(rows=24, columns=8, rank=4)
    solution = SOLVERS[solver](weight, gram, layer_config("2:4"))
    best = sum(exhaustive_optimum(row, gram, 2, 4) for row in weight)
    assert best * 0.999 <= error(weight, solution.weight, gram) <= factor * best


@pytest.mark.parametrize("solver", SOLVERS)
def test_independent_inputs_have_a_known_optimum(solver):
    """With a diagonal Gram matrix it is the largest w²·G_jj of a group, unchanged."""
    weight, gram = problem()
    gram = torch.diag(gram.diagonal().mean().expand(96))
    layer = layer_config("8:16", "4:32")
    solution = SOLVERS[solver](weight, gram, layer)
    mask, outlier_mask = best_masks(weight.abs(), layer)
    optimum = error(weight, weight * (mask | outlier_mask), gram)
    assert optimum * 0.999 <= error(weight, solution.weight, gram) <= optimum * 1.05
    assert torch.allclose(solution.weight, weight * solution.kept, atol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_inputs_that_are_always_zero_are_no_obstacle(solver):
    weight, gram = problem()
    gram[:, 5:30], gram[5:30] = 0, 0
    solution = SOLVERS[solver](weight, gram, layer_config("8:16"))
    assert torch.isfinite(solution.weight).all()
    gram.zero_()
    assert torch.isfinite(SOLVERS[solver](weight, gram, layer_config("8:16")).weight).all()


def test_conjugate_gradients_reach_the_least_squares_values_of_a_mask():
    weight, gram = problem(columns=32)
    kept, _ = choose_masks(weight.abs(), layer_config("8:16"))
    refined = conjugate_gradients(weight, weight * kept, kept, gram, rounds=60)
    for row in range(len(weight)):
        index = kept[row].nonzero().flatten()
        values = torch.linalg.solve(gram[index][:, index].double(), gram[index].double() @ weight[row].double())
        assert torch.allclose(refined[row, index].double(), values, rtol=1e-2, atol=1e-3)
    assert not refined[~kept].any()


@pytest.fixture
def bfloat16_tiles(monkeypatch):
    """A processor that multiplies bfloat16 in tiles, as far as `product_with` knows."""
    monkeypatch.setattr(products, "_multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(products, "LEAST_WIDTH", 96)


def test_quick_product_is_wrong_by_little_of_what_is_off_the_diagonal(bfloat16_tiles):
    inputs, gram = problem()
    others = gram - gram.diagonal().diag()
    off = (product_with(gram)(inputs).double() - inputs.double() @ gram.double()).abs()
    assert off.max() > 0
    assert (off <= 2.0**-7 * (inputs.abs() @ others.abs()) + 1e-5 * (inputs @ gram).abs()).all()
    diagonal = gram.diagonal().diag()
    torch.testing.assert_close(product_with(diagonal)(inputs), inputs @ diagonal)


def test_product_is_exact_elsewhere(monkeypatch):
    inputs, gram = problem()
    assert torch.equal(product_with(gram)(inputs), inputs @ gram)  # narrow
    monkeypatch.setattr(products, "LEAST_WIDTH", 96)
    monkeypatch.setattr(products, "_multiplies_bfloat16", lambda: False)
    assert torch.equal(product_with(gram)(inputs), inputs @ gram)


def test_products_are_rounded_inside_only(monkeypatch):
    setting = torch.backends.mkldnn.matmul
    before, many = setting.fp32_precision, products.LEAST_WEIGHTS
    monkeypatch.setattr(products, "_multiplies_bfloat16", lambda: False)
    with rounded_products(many):
        assert setting.fp32_precision == before
    monkeypatch.setattr(products, "_multiplies_bfloat16", lambda: True)
    with rounded_products(many - 1):
        assert setting.fp32_precision == before
    with pytest.raises(RuntimeError), rounded_products(many):
        assert setting.fp32_precision == "bf16"
        raise RuntimeError
    assert setting.fp32_precision == before


@pytest.mark.parametrize("outliers", [None, "4:32"])
def test_admm_makes_up_for_quick_products(outliers, monkeypatch):
    weight, gram = problem(rows=64, columns=256)
    layer, errors = layer_config("8:16", outliers), []
    monkeypatch.setattr(products, "LEAST_WIDTH", 256)
    for quick in (False, True):
        monkeypatch.setattr(products, "_multiplies_bfloat16", lambda quick=quick: quick)
        errors.append(error(weight, SOLVERS["admm"](weight, gram, layer).weight, gram))
    assert errors[1] != errors[0]
    assert errors[1] == pytest.approx(errors[0], rel=0.01)


def test_admm_solves_some_rows_at_a_time(monkeypatch):
    weight, gram = problem(rows=16)
    layer = layer_config("8:16", "4:32")
    whole = SOLVERS["admm"](weight, gram, layer)
    monkeypatch.setattr(sys.modules["optimum_nm.sparsify.solvers.admm"], "ELEMENTS_AT_ONCE", 5 * weight.shape[1])
    parts = SOLVERS["admm"](weight, gram, layer)
    assert parts.mask.shape == parts.outlier_mask.shape == weight.shape
    assert (parts.kept == whole.kept).float().mean() > 0.99
    assert error(weight, parts.weight, gram) == pytest.approx(error(weight, whole.weight, gram), rel=0.01)


def packed_error(weight, solution, gram, layer):
    """Of what is stored, with the scales of the solution or else with those that packing chooses."""
    packed = PackedWeight.from_config(
        solution.weight,
        layer,
        mask=solution.mask,
        outlier_mask=solution.outlier_mask,
        column_weight=gram.diagonal(),
        scales=solution.scales,
    )
    return error(weight, packed.unpack(), gram)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("outliers", [None, "4:32"])
@pytest.mark.parametrize(("pattern", "group_size"), [("8:16", 32), ("2:4", -1), ("16:16", 16)])
def test_integer_values_are_what_is_packed(dtype, outliers, pattern, group_size):
    weight, gram = problem(columns=90)
    layer = layer_config(pattern, outliers, dtype, group_size)
    solution = quantize_solution(weight, SOLVERS["admm"](weight, gram, layer), gram, layer)
    packed = PackedWeight.from_config(
        solution.weight, layer, mask=solution.mask, outlier_mask=solution.outlier_mask, scales=solution.scales
    )
    assert torch.equal(packed.unpack(), solution.weight)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("dtype", "outliers", "share"), [("int4", None, 0.6), ("int4", "4:32", 0.6), ("int8", None, 1.0)]
)
def test_errors_fed_forward_beat_rounding_the_solution(solver, dtype, outliers, share):
    """Of the error that rounding adds at least so much goes away."""
    weight, gram = problem(rows=32)
    layer = layer_config("8:16", outliers, dtype)
    solution = SOLVERS[solver](weight, gram, layer)
    rounded = packed_error(weight, solution, gram, layer)
    fed_forward = packed_error(weight, quantize_solution(weight, solution, gram, layer), gram, layer)
    exact = error(weight, solution.weight, gram)
    assert fed_forward - exact < share * (rounded - exact)


def test_integers_are_near_the_best_levels():
    """Against every combination of levels of one group's survivors, with the scales found."""
    weight, gram = problem(rows=12, columns=8, rank=4)
    layer = layer_config("2:4", dtype="int4", group_size=8)
    solution = quantize_solution(weight, SOLVERS["admm"](weight, gram, layer), gram, layer)
    levels = torch.cartesian_prod(*[torch.arange(-8.0, 8.0)] * 4)
    for row in range(len(weight)):
        candidates = torch.zeros(len(levels), 8)
        candidates[:, solution.mask[row]] = levels * solution.scales[row].float()
        change = weight[row] - candidates
        best = ((change @ gram) * change).sum(dim=1).min().item()
        assert error(weight[row : row + 1], solution.weight[row : row + 1], gram) <= 1.1 * best


def test_float_values_stay_as_they_are():
    weight, gram = problem()
    solution = SOLVERS["admm"](weight, gram, layer_config("8:16"))
    assert quantize_solution(weight, solution, gram, layer_config("8:16")) is solution


def test_support_with_outliers_has_the_greatest_score():
    """Against every choice of a row of two groups of four, two of each and one more."""
    scores = torch.rand(50, 8, generator=torch.Generator().manual_seed(0))
    layer = layer_config("2:4", "1:8")
    choices = [
        set(first) | {4 + column for column in second}
        for left, right in ((3, 2), (2, 3))
        for first in combinations(range(4), left)
        for second in combinations(range(4), right)
    ]
    kept, (mask, outlier_mask) = best_support(scores, layer), best_masks(scores, layer)
    assert torch.equal(kept, mask | outlier_mask) and not (mask & outlier_mask).any()
    for row, chosen in zip(scores, kept, strict=True):
        assert row[chosen].sum() >= max(row[sorted(choice)].sum() for choice in choices) - 1e-6
    assert (scores.masked_fill(~outlier_mask, 0).amax(dim=1) >= 0.5).float().mean() > 0.9
    _, crossing = best_masks(scores, layer_config("2:4", "1:6"))
    assert (crossing[:, :6].sum(dim=1) == 1).all() and (crossing[:, 6:].sum(dim=1) == 1).all()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", ["float16", "int4"])
def test_optimizer_runs_the_solver(solver, dtype, tiny_llama_folder, text, tmp_path):
    errors = {}
    for name in ("mask", solver):
        config = NMConfig(
            solver=name, outliers="8:128", weight_dtype=dtype, calibration_samples=8, calibration_length=64
        )
        optimizer = NMOptimizer.from_pretrained(tiny_llama_folder)
        summary = optimizer.optimize(tmp_path / name, config, [text], progress=False)
        assert isinstance(optimizer.model.model.layers[0].mlp.up_proj, NMLinear)
        errors[name] = summary.by_type()["all"]["relative_error"]
    assert errors[solver] < errors["mask"]


@pytest.mark.parametrize("solver", SOLVERS)
def test_weights_that_no_token_reaches_are_pruned_by_magnitude(solver, tiny_llama_folder, text, tmp_path):
    optimizer = NMOptimizer.from_pretrained(tiny_llama_folder)
    optimizer.model.model.layers[0].mlp.unused = torch.nn.Linear(48, 32)
    weight = optimizer.model.model.layers[0].mlp.unused.weight.detach().clone()
    config = NMConfig(solver=solver, calibration_samples=4, calibration_length=32)
    optimizer.optimize(tmp_path / "out", config, [text], progress=False)
    packed = optimizer.model.model.layers[0].mlp.unused.packed
    mask, _ = choose_masks(weight.abs(), layer_config("8:16"))
    assert weight[packed.unpack() != 0].abs().sum() > 0.97 * weight[mask].abs().sum()


@pytest.fixture(scope="module")
def real_layers():
    """{name: (weight, statistics)} of the linear layers of a block in the middle of SmolLM2-135M, on an article."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from demo_data import smollm2, wikipedia_articles

    folder, file = smollm2()
    optimizer = NMOptimizer.from_pretrained(folder, gguf_file=file, dtype="float32")
    linears = linear_layers(optimizer.model.model.layers[14])
    tokens = optimizer.tokenizer(wikipedia_articles()[0][0])["input_ids"][:2048]
    with torch.no_grad(), StatisticsCollector(linears, with_gram=True, batches=1, seed=0) as collector:
        optimizer.model(torch.tensor([tokens]), logits_to_keep=1)
    return {name: (linears[name].weight.detach(), found) for name, found in collector.statistics().items()}


@pytest.mark.model
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("outliers", [None, "16:256"])
def test_no_layer_of_a_real_block_is_worse_than_by_score(solver, outliers, real_layers):
    for name, (weight, statistics) in real_layers.items():
        errors = {}
        for method in ("mask", solver):
            config = NMConfig(solver=method, outliers=outliers)
            solution = solve_layer(weight, statistics, config.layer(name), config, equalized=False)
            errors[method] = error(weight, solution.weight, statistics.gram)
        assert errors[solver] < 0.8 * errors["mask"], name


@pytest.mark.model
@pytest.mark.parametrize("solver", ["mask", *SOLVERS])
@pytest.mark.parametrize("outliers", [None, "16:256"])
def test_swaps_make_no_layer_of_a_real_block_worse(solver, outliers, real_layers):
    for name, (weight, statistics) in real_layers.items():
        errors = {}
        for swaps in (0, 2):
            config = NMConfig(solver=solver, outliers=outliers, swaps=swaps, variance_correction=None)
            solution = solve_layer(weight, statistics, config.layer(name), config, equalized=False)
            errors[swaps] = error(weight, solution.weight, statistics.gram)
        assert errors[2] <= errors[0] * (0.8 if solver == "mask" else 1.001), name


def swept_column_by_column(weight, gram, layer):
    """SparseGPT as its authors write it, in float64, without blocks."""
    weight, matrix = weight.double(), gram.double()
    damping = 0.01 * matrix.diagonal().mean() * torch.eye(len(gram))
    upper = torch.linalg.cholesky(torch.linalg.inv(matrix + damping), upper=True)
    kept = torch.zeros(weight.shape, dtype=torch.bool)
    current, m = weight.clone(), layer.pattern.m
    for j in range(weight.shape[1]):
        if j % m == 0:
            group = slice(j, j + m)
            kept[:, group] = choose_masks((current[:, group] / upper.diagonal()[group]).square(), layer)[0]
        error = current[:, j].masked_fill(kept[:, j], 0.0) / upper[j, j]
        current[:, j:] -= error[:, None] * upper[j, j:]
    return current.masked_fill(~kept, 0.0).float(), kept


@pytest.mark.parametrize(("pattern", "columns"), [("8:16", 352), ("2:4", 300), ("16:32", 610)])
def test_sweep_in_blocks_is_the_sweep_column_by_column(pattern, columns):
    weight, gram = problem(columns=columns, tokens=1000)
    layer = layer_config(pattern)
    solution = SOLVERS["sparsegpt"](weight, gram, layer)
    swept, kept = swept_column_by_column(weight, gram, layer)
    assert (solution.kept == kept).float().mean() > 0.999  # but for ties within float32's rounding
    assert error(weight, solution.weight, gram) == pytest.approx(error(weight, swept, gram), rel=2e-3)


@pytest.mark.parametrize("width", [1, 7, 100, 213])
@pytest.mark.parametrize("leaf, strip", [(8, 8), (8, 24), (24, 8), (16, 1024)])
def test_factor_of_an_inverse(monkeypatch, width, leaf, strip):
    monkeypatch.setattr(inverse_factor, "_LEAF", leaf)
    monkeypatch.setattr(inverse_factor, "_STRIP", strip)
    _, gram = problem(columns=width, tokens=300)
    damped = gram.double() + 0.01 * gram.diagonal().double().mean() * torch.eye(width)
    exact = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    factor = inverse_factor.inverse_factor(gram, 0.01)
    torch.testing.assert_close(factor.double(), exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())
    assert not factor.tril(-1).any()


def test_factor_of_what_float32_finds_none_of():
    """Matrices of the rank one but for the last digit of one element, positive definite in exact arithmetic."""
    failures = 0
    for seed in range(200):
        a, b = torch.rand(2, generator=torch.Generator().manual_seed(seed)) + 0.5
        least = (b.double().square() / a.double()).float()
        c = torch.nextafter(least, torch.tensor(4.0)) if least.double() * a.double() <= b.double() ** 2 else least
        matrix = torch.stack([torch.stack([c, b]), torch.stack([b, a])])
        failures += bool(torch.linalg.cholesky_ex(matrix.flip(0, 1))[1])
        factor = inverse_factor.inverse_factor(matrix, damping=0.0).double()
        assert factor.isfinite().all() and factor[1, 0] == 0
        exact = torch.linalg.cholesky(torch.linalg.inv(matrix.double()), upper=True)
        if failures == 1:
            torch.testing.assert_close(factor, exact, rtol=1e-4, atol=0)
            break
    assert failures == 1
