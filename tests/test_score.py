"""Scores, masks and corrections against loops that follow the formulas."""

import math

import pytest
import torch

from optimum_nm.config import LayerConfig
from optimum_nm.patterns import NMPattern, OutlierPattern
from optimum_nm.sparsify.correct import variance_correction
from optimum_nm.sparsify.equalize import equalization_scale
from optimum_nm.sparsify.mask import choose_masks
from optimum_nm.sparsify.score import importance


def weight_and_norm(rows=5, columns=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator), torch.rand(columns, generator=generator) + 0.1


def layer_config(pattern="8:16", outliers=None):
    return LayerConfig(NMPattern.parse(pattern), OutlierPattern.parse(outliers), "float16", 128, "codes", "float16")


@pytest.mark.parametrize("score", ["magnitude", "wanda", "ria"])
def test_importance_follows_its_formula(score):
    weight, norm = weight_and_norm()
    magnitude = weight.abs().tolist()
    result = importance(weight, norm, score, exponent=0.7)
    for i, row in enumerate(magnitude):
        for j, value in enumerate(row):
            column_sum = sum(other[j] for other in magnitude)
            expected = {
                "magnitude": value,
                "wanda": value * norm[j].item(),
                "ria": (value / column_sum + value / sum(row)) * norm[j].item() ** 0.7,
            }[score]
            assert math.isclose(result[i, j].item(), expected, rel_tol=1e-5)


def test_ria_of_zero_rows_and_columns_is_zero():
    weight, norm = weight_and_norm()
    weight[1], weight[:, 2] = 0, 0
    result = importance(weight, norm, "ria", 0.5)
    assert torch.isfinite(result).all()
    assert not result[1].any() and not result[:, 2].any()


def test_equalization_scale_follows_its_formula():
    weight, norm = weight_and_norm()
    scale = equalization_scale(norm, weight.abs().amax(dim=0), 0.3)
    for j in range(weight.shape[1]):
        expected = norm[j].item() ** 0.3 / max(abs(v) for v in weight[:, j].tolist()) ** 0.7
        assert math.isclose(scale[j].item(), expected, rel_tol=1e-5)


def test_equalization_scale_of_an_unused_column_is_one():
    scale = equalization_scale(torch.tensor([0.0, 2.0, 2.0]), torch.tensor([1.0, 0.0, 2.0]), 0.5)
    assert scale.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "8:16", "16:32", "3:4", "1:8", "16:16"])
@pytest.mark.parametrize("outliers", [None, "3:16", "16:256"])
@pytest.mark.parametrize("columns", [64, 90, 300])
def test_masks_take_the_highest_scores(pattern, outliers, columns):
    scores = torch.rand(3, columns, generator=torch.Generator().manual_seed(1))
    layer = layer_config(pattern, outliers)
    mask, outlier_mask = choose_masks(scores, layer)
    n, m = layer.pattern.n, layer.pattern.m
    for row in range(3):
        taken = set()
        if outliers is not None:
            k, block = layer.outliers.k, layer.outliers.block
            for start in range(0, columns, block):
                inside = range(start, min(start + block, columns))
                count = k if len(inside) == block else max(1, math.floor(k * len(inside) / block + 0.5))
                taken |= set(sorted(inside, key=lambda j: -scores[row, j])[:count])
            assert set(outlier_mask[row].nonzero().flatten().tolist()) == taken
        kept = set()
        for start in range(0, columns, m):
            candidates = [j for j in range(start, min(start + m, columns)) if j not in taken]
            kept |= set(sorted(candidates, key=lambda j: -scores[row, j])[:n])
        assert set(mask[row].nonzero().flatten().tolist()) == kept


def test_variance_correction_restores_the_variance_of_rows_and_of_the_tensor():
    weight, _ = weight_and_norm()
    pruned = weight * (weight.abs() > 0.7)
    by_row = pruned * variance_correction(weight, pruned, "row", None)
    assert torch.allclose(by_row.var(dim=1), weight.var(dim=1))
    by_tensor = pruned * variance_correction(weight, pruned, "tensor", None)
    assert torch.allclose(by_tensor.var(), weight.var())


def test_variance_correction_at_8_16_is_the_published_factor_for_gaussian_weights():
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    mask, _ = choose_masks(weight.abs(), layer_config("8:16"))
    factor = variance_correction(weight, weight * mask, "tensor", None)
    assert abs(factor[0].item() - 1.047) < 0.003


def test_output_correction_restores_the_second_moment_of_every_output():
    weight, _ = weight_and_norm()
    inputs = torch.randn(100, weight.shape[1], generator=torch.Generator().manual_seed(2))
    pruned = weight * (weight.abs() > 0.7)
    factor = variance_correction(weight, pruned, "output", inputs.t() @ inputs)
    corrected, original = inputs @ (pruned * factor).t(), inputs @ weight.t()
    assert torch.allclose(corrected.square().sum(dim=0), original.square().sum(dim=0), rtol=1e-4)


def test_least_squares_correction_has_the_least_error():
    weight, _ = weight_and_norm()
    inputs = torch.randn(100, weight.shape[1], generator=torch.Generator().manual_seed(2))
    pruned = weight * (weight.abs() > 0.7)
    factor = variance_correction(weight, pruned, "least-squares", inputs.t() @ inputs)

    def error(scale):
        return (inputs @ (weight - pruned * scale).t()).square().sum(dim=0)

    for other in (0.98, 1.02):
        assert (error(factor) < error(factor * other)).all()


@pytest.mark.parametrize("kind", ["row", "tensor", "output", "least-squares"])
def test_correction_leaves_a_row_without_survivors_alone(kind):
    weight = torch.ones(2, 4)
    factor = variance_correction(weight, torch.zeros(2, 4), kind, torch.eye(4))
    assert factor.flatten().tolist() == [1.0, 1.0]
