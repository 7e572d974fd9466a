"""The pictures of a report; they need matplotlib, the extra [report]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..evaluate.pictures import save_picture
from .pareto import Point, pareto_front


def plot_pareto(points: Sequence[Point], dense_perplexity: float, file: Path) -> None:
    """Perplexity against bits per weight: sparse and dense models, the front, and the model before packing as a line.

    Raises:
        NMError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots()
    shown = [point for point in points if math.isfinite(point.perplexity)]
    for kind, dense, marker in (("N:M sparse", False, "o"), ("dense", True, "s")):
        chosen = [point for point in shown if point.dense == dense]
        axes.scatter([p.bits for p in chosen], [p.perplexity for p in chosen], marker=marker, label=kind, zorder=3)
    front = pareto_front(shown)
    axes.plot([p.bits for p in front], [p.perplexity for p in front], "k-", alpha=0.4, label="Pareto front")
    for point in front:
        axes.annotate(
            point.name, (point.bits, point.perplexity), xytext=(5, 5), textcoords="offset points", fontsize="small"
        )
    axes.axhline(dense_perplexity, color="grey", linestyle=":", label="before packing")
    axes.set(xlabel="bits per weight of the packed layers", ylabel="perplexity on held-out text", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    save_picture(figure, file)


def plot_layer_errors(name: str, layers: Sequence[dict[str, Any]], file: Path) -> None:
    """Relative output error over the layers of the model, one line for each layer type.

    Args:
        layers: as in SparsificationSummary.to_dict, in the order of the model.

    Raises:
        NMError: the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    types: dict[str, list[float]] = {}
    for layer in layers:
        types.setdefault(".".join(layer["name"].split(".")[-2:]), []).append(layer["relative_error"])
    for kind, errors in types.items():
        axes.plot(errors, marker=".", label=kind)
    positive = any(error > 0 for errors in types.values() for error in errors)
    axes.set(xlabel="layer among those of its type", ylabel="relative output error", title=name)
    axes.set_yscale("log" if positive else "linear")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    save_picture(figure, file)
