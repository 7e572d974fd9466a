"""ALPS (Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning", NeurIPS 2024)."""

from __future__ import annotations

import torch

from .problem import NormalEquations, SolverProblem, SolverSolution
from .quantized import quantized_solution
from .refit import refit
from .support import Support

DAMPING = 0.1
FIRST_PENALTY = 0.1
LARGEST_ROUNDS = 300
ROUNDS_PER_PENALTY = 3
# The penalty grows by the factor whose bound the share of the support that changed exceeds.
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))


def solve_alps(problem: SolverProblem) -> SolverSolution:
    """ADMM whose second step is the projection onto the pattern, under a penalty that grows until the support stays.

    One eigendecomposition serves every penalty. Conjugate gradients on the support that results finish the weights.
    """
    equations = NormalEquations.of(problem, DAMPING)
    eigenvalues, basis = torch.linalg.eigh(equations.matrix)
    support = Support(problem, fixed_outliers=False)
    gradient_at_zero = equations.target @ equations.matrix
    pruned, dual = equations.target, torch.zeros_like(equations.target)
    previous = torch.ones_like(problem.mask)
    penalty = FIRST_PENALTY
    for round_ in range(LARGEST_ROUNDS):
        weight = ((gradient_at_zero - dual + penalty * pruned) @ basis / (eigenvalues + penalty)) @ basis.t()
        shifted = weight + dual / penalty
        kept = support.project(shifted)
        pruned = shifted * kept
        dual = dual + penalty * (weight - pruned)
        if round_ % ROUNDS_PER_PENALTY == ROUNDS_PER_PENALTY - 1:
            changed = (kept != previous).sum() / (2 * kept.sum())
            if changed == 0:
                break
            penalty *= next(factor for bound, factor in GROWTH if changed > bound)
            previous = kept
    weight = refit(equations, kept, pruned) / equations.scale
    mask, outlier_mask = support.split(kept, weight)
    return quantized_solution(problem, weight, mask, outlier_mask)
