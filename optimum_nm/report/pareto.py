"""Which packed models no other beats in both bits and perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..patterns import NMPattern
from .runner import Report


@dataclass(frozen=True)
class Point:
    """A packed model: bits per weight of its packed layers, perplexity, and whether it keeps every weight."""

    name: str
    bits: float
    perplexity: float
    dense: bool


def points(report: Report) -> list[Point]:
    """Of every row that was packed."""
    return [
        Point(
            row.name,
            report.results[row.name]["bits_per_weight"],
            report.perplexity(row.name),
            NMPattern.parse(row.config.pattern).is_dense and not row.config.overrides,
        )
        for row in report.matrix.rows
        if row.config is not None and "bits_per_weight" in report.results.get(row.name, {})
    ]


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Those that have a lower perplexity than all with as few bits, by ascending bits."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.bits, point.perplexity)):
        if not front or point.perplexity < front[-1].perplexity:
            front.append(point)
    return front
