"""Solvers that choose masks and new values for the survivors together, from a weight and its Gram matrix.

Each is a function of one signature, listed in SOLVERS under its name in `NMConfig.solver`; "mask", which leaves the
survivors as they are, is not among them. `swap_weights` refines the mask of any, `quantize_solution` then gives the
values found integers.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...config import LayerConfig
from .admm import admm
from .alps import alps
from .conjugate_gradients import conjugate_gradients
from .integers import quantize_solution
from .solution import Solution
from .sparsegpt import sparsegpt
from .swaps import swap_weights

Solver = Callable[[Tensor, Tensor, LayerConfig], Solution]
SOLVERS: dict[str, Solver] = {"sparsegpt": sparsegpt, "admm": admm, "alps": alps}

__all__ = [
    "SOLVERS",
    "Solution",
    "Solver",
    "admm",
    "alps",
    "conjugate_gradients",
    "quantize_solution",
    "sparsegpt",
    "swap_weights",
]
