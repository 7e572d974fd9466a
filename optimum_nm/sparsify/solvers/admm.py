"""ADMM with a gradually pruned mask (Boža, "Fast and Effective Weight Update for Pruned LLMs", TMLR 2024)."""

from __future__ import annotations

import torch

from .problem import NormalEquations, SolverProblem, SolverSolution
from .quantized import quantized_solution
from .refit import refit
from .support import Support

DAMPING = 0.1
PENALTY = 1.0
ROUNDS = 20
GRADUAL_ROUNDS = 15


def solve_admm(problem: SolverProblem) -> SolverSolution:
    """Split min ‖X(W−Ŵ)ᵀ‖² over Ŵ on a support into a dense least squares and a projection, and alternate.

    For the first rounds the support is chosen anew from what the iteration has, its size falling cubically from dense
    to N of M; then it stays, and conjugate gradients finish the weights on it.
    """
    pattern = problem.layer.pattern
    equations = NormalEquations.of(problem, DAMPING)
    inverse = equations.inverse(PENALTY)
    support = Support(problem, fixed_outliers=False)
    gradient_at_zero = equations.target @ equations.matrix
    weight, dual = equations.target, torch.zeros_like(equations.target)
    for round_ in range(ROUNDS):
        if round_ < GRADUAL_ROUNDS:
            remaining = (1 - (round_ + 1) / GRADUAL_ROUNDS) ** 3
            kept = support.project(weight + dual, pattern.n + round((pattern.m - pattern.n) * remaining))
        pruned = (weight + dual) * kept
        dual += weight - pruned
        weight = (gradient_at_zero + PENALTY * (pruned - dual)) @ inverse
    weight = refit(equations, kept, weight * kept) / equations.scale
    mask, outlier_mask = support.split(kept, weight)
    return quantized_solution(problem, weight, mask, outlier_mask)
