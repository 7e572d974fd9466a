"""The training-free choice: the score's mask, and the surviving weights as they are."""

from __future__ import annotations

from .problem import SolverProblem, SolverSolution


def solve_mask(problem: SolverProblem) -> SolverSolution:
    return SolverSolution(problem.weight * problem.kept, problem.mask, problem.outlier_mask)
