"""In-group swaps: each against every exchange there is, the end against every mask, and never worse than before."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from test_solvers import error, layer_config, problem

from optimum_nm.config import NMConfig
from optimum_nm.errors import NMError
from optimum_nm.optimizer import NMOptimizer
from optimum_nm.sparsify.layer import solve_layer
from optimum_nm.sparsify.mask import choose_masks
from optimum_nm.sparsify.solvers import Solution, swap_weights
from optimum_nm.sparsify.solvers.solution import normalized
from optimum_nm.sparsify.statistics import InputStatistics


def masked(weight, layer):
    """By magnitude, values as they are."""
    mask, outlier_mask = choose_masks(weight.abs(), layer)
    return Solution(weight * (mask if outlier_mask is None else mask | outlier_mask), mask, outlier_mask)


def equivalent_gram(gram):
    """The damped Gram matrix that exchanges with new values go by, for weights as they are."""
    matrix, scale = normalized(gram, 0.1)
    return matrix * scale.outer(scale)


def best_values(weight, kept, gram):
    """Of one row, by the normal equations."""
    index = kept.nonzero().flatten()
    values = torch.zeros_like(weight, dtype=torch.float64)
    values[index] = torch.linalg.solve(gram[index][:, index].double(), gram[index].double() @ weight.double())
    return values


def exchanges(mask, kept):
    """Every mask that one exchange of a group leads to, as (mask, kept)."""
    for incoming, outgoing in product((~kept).nonzero().flatten().tolist(), mask.nonzero().flatten().tolist()):
        swapped = [mask.clone(), kept.clone()]
        for chosen in swapped:
            chosen[outgoing], chosen[incoming] = False, True
        yield swapped


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("outliers", [None, "2:32"])
def test_each_exchange_is_the_best_there_is(refit, outliers):
    """One group, one round: the exact least error over all exchanges, or none if none lowers it."""
    weight, gram = problem(rows=40, columns=8, rank=3)
    layer = layer_config("4:8", outliers)
    start = masked(weight, layer)
    matrix = equivalent_gram(gram) if refit else gram

    def least_error(row, kept):
        values = best_values(weight[row], kept, matrix) if refit else weight[row] * kept
        return error(weight[row : row + 1], values[None], matrix)

    if refit:
        fitted = torch.stack([best_values(w, kept, matrix) for w, kept in zip(weight, start.kept, strict=True)])
        start = replace(start, weight=fitted.float())
    found = swap_weights(weight, start, gram, layer, rounds=1, refit=refit)
    exchanged = (found.mask != start.mask).any(dim=1)
    assert 0 < exchanged.sum() < len(weight)
    for row in range(len(weight)):
        choices = [least_error(row, kept) for _, kept in exchanges(start.mask[row], start.kept[row])]
        best = min(least_error(row, start.kept[row]), *choices)
        assert error(weight[row : row + 1], found.weight[row : row + 1], matrix) == pytest.approx(best, rel=1e-3)


def test_the_end_is_near_the_best_of_all_masks():
    weight, gram = problem(rows=30, columns=8, rank=3)
    layer = layer_config("2:4")
    start = masked(weight, layer)
    found = swap_weights(weight, start, gram, layer, rounds=20, refit=False)
    halves = [torch.tensor(half, dtype=torch.bool) for half in product([0, 1], repeat=4) if sum(half) == 2]
    masks = [torch.cat([left, right]) for left in halves for right in halves]
    best = sum(min(error(row[None], (row * mask)[None], gram) for mask in masks) for row in weight)
    assert best * 0.999 <= error(weight, found.weight, gram) < 1.1 * best < 0.75 * error(weight, start.weight, gram)
    assert torch.equal(found.weight, weight * found.mask)
    again = swap_weights(weight, found, gram, layer, rounds=1, refit=False)
    assert torch.equal(again.mask, found.mask)


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "8:16", "16:32", "6:16", "16:16"])
@pytest.mark.parametrize("outliers", [None, "4:32"])
@pytest.mark.parametrize("columns", [96, 90])
def test_no_row_is_worse_and_the_pattern_stays(refit, pattern, outliers, columns):
    weight, gram = problem(columns=columns)
    layer = layer_config(pattern, outliers)
    start = masked(weight, layer)
    matrix = equivalent_gram(gram) if refit else gram
    found = swap_weights(weight, start, gram, layer, rounds=3, refit=refit)

    def errors(solution):
        change = (weight - solution.weight).double()
        return ((change @ matrix.double()) * change).sum(dim=1)

    assert (errors(found) <= errors(start) * (1 + 1e-5) + 1e-3).all()
    assert not found.weight[~found.kept].any()
    m = layer.pattern.m
    before, after = (
        torch.nn.functional.pad(s.mask, (0, -columns % m)).view(len(weight), -1, m).sum(dim=-1) for s in (start, found)
    )
    assert torch.equal(before, after)
    if outliers is not None:
        assert torch.equal(found.outlier_mask, start.outlier_mask) and not (found.mask & found.outlier_mask).any()
    if not layer.pattern.is_dense:
        assert (found.mask != start.mask).any()
        assert errors(found).sum() < 0.9 * errors(start).sum()


def test_new_values_are_the_best_of_their_mask():
    weight, gram = problem(columns=32)
    layer = layer_config("8:16")
    found = swap_weights(weight, masked(weight, layer), gram, layer, rounds=5, refit=True)
    matrix = equivalent_gram(gram)
    best = sum(
        error(row[None], best_values(row, kept, matrix)[None], matrix)
        for row, kept in zip(weight, found.kept, strict=True)
    )
    assert error(weight, found.weight, matrix) <= 1.01 * best


def statistics_of(gram):
    square_sum = gram.diagonal().clone()
    return InputStatistics(400, square_sum, square_sum.sqrt() / 5, gram)


@pytest.mark.parametrize(("solver", "share"), [("mask", 0.75), ("sparsegpt", 0.95), ("admm", 1.0), ("alps", 1.0)])
@pytest.mark.parametrize("outliers", [None, "4:32"])
def test_no_solver_loses(solver, share, outliers):
    """At most this share of its error is left; the masks of `admm` and `alps` leave hardly an exchange to make."""
    weight, gram = problem(rows=32)
    matrix = gram if solver == "mask" else equivalent_gram(gram)
    errors = {}
    for swaps in (0, 5):
        config = NMConfig(solver=solver, outliers=outliers, swaps=swaps, variance_correction=None)
        solution = solve_layer(weight, statistics_of(gram), config.layer("x"), config, equalized=False)
        errors[swaps] = error(weight, solution.weight, matrix)
    assert errors[5] < share * errors[0]


@pytest.mark.parametrize("refit", [False, True])
def test_inputs_that_are_always_zero_are_no_obstacle(refit):
    weight, gram = problem()
    gram[:, 5:30], gram[5:30] = 0, 0
    layer = layer_config("8:16")
    assert torch.isfinite(swap_weights(weight, masked(weight, layer), gram, layer, 3, refit).weight).all()
    gram.zero_()
    found = swap_weights(weight, masked(weight, layer), gram, layer, 3, refit=False)
    assert torch.equal(found.mask, masked(weight, layer).mask)


def test_optimizer_swaps_before_the_variance_correction(tiny_llama_folder, text, tmp_path):
    errors = {}
    for swaps in (0, 3):
        config = NMConfig(swaps=swaps, weight_dtype="float32", calibration_samples=8, calibration_length=64)
        summary = NMOptimizer.from_pretrained(tiny_llama_folder).optimize(
            tmp_path / str(swaps), config, [text], progress=False
        )
        errors[swaps] = summary.by_type()["all"]["relative_error"]
    assert errors[3] < 0.9 * errors[0]


@pytest.mark.parametrize("swaps", [-1, 2.5, True])
def test_number_that_is_none_is_refused(swaps):
    with pytest.raises(NMError, match=f"swaps is {swaps!r}; it must be a whole number, 0 or more"):
        NMConfig(swaps=swaps)
