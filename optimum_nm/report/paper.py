"""The default matrix: the ablations of 2507.03052, and what this package adds to them, each row as fields of NMConfig.

What a row does not set is the user's, or NMConfig's default. A row of one name is the same in every table.
"""

from __future__ import annotations

from typing import Any

from ..presets import PRESETS

Rows = dict[str, dict[str, Any] | None]

_PATTERNS = ("2:4", "4:8", "8:16", "16:32")
_OUTLIERS = ("4:256", "8:256", "16:256")
_SOLVERS = ("mask", "sparsegpt", "admm", "alps")
_BUDGETS = (3.0, 3.5, 4.0, 4.25, 5.0)


def _sparse(pattern: str, outliers: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"pattern": pattern, "outliers": outliers, "weight_dtype": "float16", "target_bits": None, **fields}


def _dense(weight_dtype: str, group_size: int | str = 128, solver: str = "mask") -> dict[str, Any]:
    """N = M: nothing is pruned, values are rounded to the nearest level, or by coordinate descent."""
    return _sparse(
        "16:16",
        weight_dtype=weight_dtype,
        group_size=group_size,
        solver=solver,
        equalization=None,
        variance_correction=None,
        finetune=None,
        preset=None,
    )


def _patterns() -> Rows:
    rows: Rows = {}
    for pattern in _PATTERNS:
        rows[pattern] = _sparse(pattern)
        rows |= {f"{pattern} + {outliers}": _sparse(pattern, outliers) for outliers in _OUTLIERS}
    return rows


def _unstructured_outliers() -> Rows:
    rows: Rows = {}
    for outliers in _OUTLIERS:
        rows[f"8:16 + {outliers}"] = _sparse("8:16", outliers)
        rows[f"8:16 + {outliers} unstructured"] = _sparse("8:16", outliers, unstructured="outliers")
    return rows


def _solvers() -> Rows:
    rows: Rows = {}
    for solver in _SOLVERS:
        rows |= {f"{pattern} {solver}": _sparse(pattern, solver=solver) for pattern in ("2:4", "8:16")}
        rows[f"50 % unstructured {solver}"] = _sparse("8:16", solver=solver, unstructured="weights")
    return rows


def _values() -> Rows:
    return {f"8:16 admm {dtype}": _sparse("8:16", solver="admm", weight_dtype=dtype) for dtype in ("int8", "int4")}


# Rows of which the second is to come as near to the third as it can, from the first.
GAPS = {solver: (f"2:4 {solver}", f"8:16 {solver}", f"50 % unstructured {solver}") for solver in _SOLVERS}

TABLES: dict[str, Rows] = {
    "Dense references": {
        "dense float16": _dense("float16"),
        "dense int8 rounded": _dense("int8"),
        "dense int8": _dense("int8", solver="sparsegpt"),
        "dense int4 g128 rounded": _dense("int4"),
        "dense int4 g128": _dense("int4", solver="sparsegpt"),
        "dense int4 g32 rounded": _dense("int4", 32),
        "dense int4 g32": _dense("int4", 32, solver="sparsegpt"),
    },
    "Patterns and outliers": _patterns(),
    "Outliers: structured against unstructured": _unstructured_outliers(),
    "Equalization": {
        "8:16": _sparse("8:16"),
        "8:16 without equalization": _sparse("8:16", equalization=None),
        "8:16 folded equalization": _sparse("8:16", equalization_mode="fold"),
    },
    "Variance correction": {
        "8:16": _sparse("8:16"),
        "8:16 without correction": _sparse("8:16", variance_correction=None),
        "8:16 correction tensor": _sparse("8:16", variance_correction="tensor"),
        "8:16 correction output": _sparse("8:16", variance_correction="output"),
        "8:16 correction least-squares": _sparse("8:16", variance_correction="least-squares"),
    },
    "Scores": {
        "8:16": _sparse("8:16"),
        "8:16 wanda": _sparse("8:16", score="wanda"),
        "8:16 magnitude": _sparse("8:16", score="magnitude"),
    },
    "Solvers, against 2:4 and unstructured": _solvers(),
    "Swaps": {
        "8:16": _sparse("8:16"),
        "8:16 swaps": _sparse("8:16", swaps=3),
        "8:16 sparsegpt": _sparse("8:16", solver="sparsegpt"),
        "8:16 sparsegpt swaps": _sparse("8:16", solver="sparsegpt", swaps=3),
        "8:16 admm": _sparse("8:16", solver="admm"),
    },
    "Fine-tuning": {
        "8:16": _sparse("8:16"),
        "8:16 fine-tuned": _sparse("8:16", finetune=PRESETS["paper"]["finetune"]),
        "8:16 + 16:256": _sparse("8:16", "16:256"),
        "8:16 + 16:256 fine-tuned": _sparse("8:16", "16:256", finetune=PRESETS["paper"]["finetune"]),
    },
    "9:16 against outliers": {
        "9:16": _sparse("9:16"),
        "8:16 + 16:256": _sparse("8:16", "16:256"),
        "9:16 admm int4": _sparse("9:16", solver="admm", weight_dtype="int4"),
        "8:16 + 16:256 admm int4": _sparse("8:16", "16:256", solver="admm", weight_dtype="int4"),
    },
    "Values": {"8:16 admm": _sparse("8:16", solver="admm"), **_values()},
    "Mixes within a number of bits": {
        f"mix of {bits} bits": {"target_bits": bits, "solver": "admm"} for bits in _BUDGETS
    },
    "Presets": {
        **{f"preset {name}": {"preset": name, "outliers": None} for name in PRESETS},
        **{f"preset {name} + 16:256": {"preset": name, "outliers": "16:256"} for name in PRESETS},
    },
}
