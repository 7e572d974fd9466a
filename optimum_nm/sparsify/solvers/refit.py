"""Surviving weights by least squares on a fixed support."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import NormalEquations, SolverProblem, SolverSolution
from .quantized import quantized_solution

DAMPING = 0.1
ROUNDS = 40
_TOLERANCE = 1e-4


def solve_refit(problem: SolverProblem) -> SolverSolution:
    """The score's mask with the weights that minimise the layer error on it."""
    equations = NormalEquations.of(problem, DAMPING)
    weight = refit(equations, problem.kept, equations.target * problem.kept) / equations.scale
    return quantized_solution(problem, weight, problem.mask, problem.outlier_mask)


def refit(
    equations: NormalEquations, kept: Tensor, start: Tensor, rounds: int = ROUNDS, free: Tensor | None = None
) -> Tensor:
    """Minimise the damped layer error over the elements in `kept`: conjugate gradients on all rows at once.

    The unit diagonal of the equations is the preconditioner. A row stops when its residual has fallen to 1e-4 of the
    gradient at zero; the error never rises from one round to the next.

    Args:
        equations: the problem in scaled inputs.
        kept: bool `[rows, in_features]`.
        start: `[rows, in_features]`, scaled, zero outside `kept`.
        rounds: at most.
        free: bool, the elements of `kept` that may change; all by default.
    """
    free = kept if free is None else free
    weight = start.clone()
    residual = ((equations.target - weight) @ equations.matrix) * free
    limit = ((equations.target @ equations.matrix) * kept).square().sum(dim=1) * _TOLERANCE**2
    direction = residual.clone()
    power = residual.square().sum(dim=1)
    for _ in range(rounds):
        active = power > limit
        if not active.any():
            break
        image = direction @ equations.matrix
        curvature = (direction * image).sum(dim=1)
        step = torch.where(active & (curvature > 0), power / curvature, 0.0)[:, None]
        weight += step * direction
        residual -= step * (image * free)
        previous, power = power, residual.square().sum(dim=1)
        direction = residual + torch.where(active, power / previous, 0.0)[:, None] * direction
    return weight
