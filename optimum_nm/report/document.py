"""A report as Markdown and as JSON."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from ..evaluate.tables import markdown_table
from ..evaluate.whole_file import write_text
from .paper import GAPS
from .pareto import Point, pareto_front, points
from .plots import plot_layer_errors, plot_pareto
from .runner import DENSE, Report

HEADER = [
    "configuration", "bits/weight", "model MB", "perplexity", "× dense", "layer error", "sparsify s", "peak MB",
]  # fmt: skip
NOTE = (
    "Bits per weight are those of the packed layers, all their tensors counted; MB are those of the files that hold "
    "weights. Layer error is the mean of the layers' relative output errors on the calibration text. A dash stands "
    "for what is evaluated and never packed. Peak is the memory of the process that sparsified."
)


def write_report(report: Report, folder: Path) -> None:
    """Write report.md, report.json, pareto.png and errors/NAME.png for each row that has layers."""
    front = pareto_front(points(report))
    plot_pareto(points(report), report.perplexity(DENSE.name), folder / "pareto.png")
    (folder / "errors").mkdir(exist_ok=True)
    for name, result in report.results.items():
        if "summary" in result:
            plot_layer_errors(name, result["summary"]["layers"], folder / "errors" / f"{file_name(name)}.png")
    write_text(folder / "report.json", json.dumps(report_data(report, front), indent=2) + "\n")
    write_text(folder / "report.md", report_text(report, front))


def report_text(report: Report, front: list[Point]) -> str:
    """The whole document."""
    setting = report.setting
    dense = report.results[DENSE.name]["perplexity"]
    stride = "" if dense["stride"] == dense["window"] else f", stride {dense['stride']}"
    parts = [
        f"# {Path(setting.model).name}",
        f"Dense perplexity {dense['perplexity']:.3f} on {dense['tokens']} held-out tokens, windows of "
        f"{dense['window']}{stride}. {NOTE}",
    ]
    for title, rows in report.matrix.tables.items():
        lines = [_line(report, row.name) for row in rows if row.name in report.results]
        if lines:
            parts += [f"## {title}", markdown_table(HEADER, lines)]
    gaps = gap_shares(report)
    if gaps:
        closed = ", ".join(f"{solver} {share:.0%}" for solver, share in gaps.items())
        parts.append(f"Of the perplexity between 2:4 and unstructured, 8:16 wins back: {closed}.")
    if front:
        parts += ["## Pareto front", "![perplexity against bits per weight](pareto.png)", _front_table(report, front)]
    if report.failures:
        parts += ["## Failed", "\n".join(f"- {name}: {reason}" for name, reason in report.failures.items())]
    missing = [row.name for row in report.matrix.rows if row.name not in (*report.results, *report.failures)]
    if missing:
        parts += ["## Not measured", ", ".join(missing)]
    return "\n\n".join(parts) + "\n"


def report_data(report: Report, front: list[Point]) -> dict[str, Any]:
    """For machines: everything that was measured, by the name of the row."""
    ratios = {name: report.ratio(name) for name in report.results}
    return {
        "setting": report.setting.to_dict(),
        "tables": {title: [row.name for row in rows] for title, rows in report.matrix.tables.items()},
        "results": {name: {"ratio": ratios[name], **result} for name, result in report.results.items()},
        "pareto_front": [point.name for point in front],
        "gap_shares": gap_shares(report),
        "failures": report.failures,
    }


def gap_shares(report: Report) -> dict[str, float]:
    """For each solver, by how much of the way 8:16 comes from 2:4 to unstructured, in perplexity."""
    shares: dict[str, float] = {}
    for solver, names in GAPS.items():
        if all(name in report.results for name in names):
            start, reached, goal = map(report.perplexity, names)
            if start > goal:
                shares[solver] = (start - reached) / (start - goal)
    return shares


def file_name(name: str) -> str:
    """A row's name without what file systems do not like."""
    return re.sub(r"[^\w.+-]+", "-", name.replace(":", "x")).strip("-")


def _line(report: Report, name: str) -> list[str]:
    result = report.results[name]
    summary = result.get("summary")
    return [
        name,
        _number(result.get("bits_per_weight"), 3),
        _number(result.get("model_bytes"), 1, 1e6),
        _number(report.perplexity(name), 3),
        _number(report.ratio(name), 3),
        _number(None if summary is None else summary["types"]["all"]["relative_error"], 4),
        _number(result.get("sparsify_seconds"), 0),
        _number(result.get("peak_bytes"), 0, 1e6),
    ]


def _front_table(report: Report, front: list[Point]) -> str:
    rows = [
        [point.name, f"{point.bits:.3f}", f"{point.perplexity:.3f}", _number(report.ratio(point.name), 3)]
        for point in front
    ]
    return markdown_table(["on the front", "bits/weight", "perplexity", "× dense"], rows)


def _number(value: float | None, digits: int, unit: float = 1.0) -> str:
    if value is None:
        return "–"
    return f"{value / unit:.{digits}f}" if math.isfinite(value) else "∞"
