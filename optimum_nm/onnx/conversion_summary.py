"""What packing the weights of an ONNX file did, weight by weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..evaluate.tables import format_table


@dataclass(frozen=True)
class WeightSummary:
    """A constant matrix that nodes multiply by, packed or not.

    Attributes:
        name: of its module, and of its packed tensors up to their last dot.
        tensor: name of the constant in the source.
        nodes: that multiply by it.
        shape: (out_features, in_features).
        bytes_before: of the constant.
        bytes_after: of the packed tensors, or of the constant.
        rounding_error: largest difference between a stored and an original element, as a share of the largest element.
        kept_because: why it is not packed; empty if it is.
    """

    name: str
    tensor: str
    nodes: tuple[str, ...]
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int
    rounding_error: float = 0.0
    kept_because: str = ""

    @property
    def elements(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class ConversionSummary:
    """Every constant matrix in the order of the graph; `str()` is a table and a line for each that is not packed.

    Attributes:
        bytes_before, bytes_after: of the ONNX file with its external data.
    """

    weights: list[WeightSummary]
    bytes_before: int
    bytes_after: int

    @property
    def packed(self) -> list[WeightSummary]:
        return [weight for weight in self.weights if not weight.kept_because]

    @property
    def kept(self) -> list[WeightSummary]:
        return [weight for weight in self.weights if weight.kept_because]

    @property
    def rounding_error(self) -> float:
        return max(weight.rounding_error for weight in self.packed)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bits_per_weight": _bits_per_weight(self.packed),
            "rounding_error": self.rounding_error,
            "packed": [asdict(weight) for weight in self.packed],
            "kept": [asdict(weight) for weight in self.kept],
        }

    def __str__(self) -> str:
        rows = []
        for label, weights in (("packed", self.packed), ("left as they are", self.kept)):
            if weights:
                elements = sum(weight.elements for weight in weights)
                before, after = (
                    sum(weight.bytes_before for weight in weights),
                    sum(weight.bytes_after for weight in weights),
                )
                bits = f"{_bits_per_weight(weights):.3f}"
                rows.append((label, str(len(weights)), f"{elements:,}", f"{before:,}", f"{after:,}", bits))
        rows.append(("whole model", "", "", f"{self.bytes_before:,}", f"{self.bytes_after:,}", ""))
        table = format_table(("weights", "count", "elements", "bytes before", "bytes after", "bits/weight"), rows)
        lines = [table, f"Largest rounding error: {self.rounding_error:.2g} of a weight's largest element."]
        lines += [f"Left as it is: {weight.name}, because {weight.kept_because}." for weight in self.kept]
        return "\n".join(lines)


def _bits_per_weight(weights: Sequence[WeightSummary]) -> float:
    return 8 * sum(weight.bytes_after for weight in weights) / sum(weight.elements for weight in weights)
