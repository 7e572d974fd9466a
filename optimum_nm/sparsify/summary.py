"""What sparsification did, layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from ..nn.experts import split_expert_name


def layer_type(name: str) -> str:
    """The last two parts of a layer's name, numbers left out: "self_attn.q_proj", "experts.gate_proj"."""
    return ".".join([part for part in name.split(".") if not part.isdigit()][-2:])


@dataclass(frozen=True)
class LayerSummary:
    """One packed layer.

    Attributes:
        shape: (out_features, in_features).
        density: share of the weights that are kept, outliers included.
        relative_error: tr[(W−Ŵ)G(W−Ŵ)ᵀ] / tr[WGWᵀ] on the calibration inputs, Ŵ being what is packed; of a
            layer with many outputs, 256 to 511, evenly spread, stand for all.
        bits_per_weight: all packed tensors of the layer, without its bias.
        calibration_tokens: that came to the layer; to an expert, those that were routed there.
    """

    name: str
    shape: tuple[int, int]
    density: float
    relative_error: float
    bits_per_weight: float
    calibration_tokens: int

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def type(self) -> str:
        return layer_type(self.name)


@dataclass(frozen=True)
class BlockLoss:
    """Mean squared error of a block's output, over the mean square of what the block should add to its input.

    Measured on what fine-tuning holds out; if that is nothing, on a batch that it trains on.
    """

    before: float
    after: float


@dataclass(frozen=True)
class AllocatedLayer:
    """What was chosen for one layer.

    Attributes:
        bits_per_weight: all packed tensors, exactly.
        sensitivity: the loss, in nats a token, that the layer's absence is predicted to cost; None if it was not asked.
        relative_error: predicted for the choice, of the layer's output, weighted by what the loss makes of it.
    """

    name: str
    pattern: str
    outliers: str | None
    weight_dtype: str
    bits_per_weight: float
    sensitivity: float | None
    relative_error: float | None

    @property
    def storage(self) -> str:
        return " ".join(filter(None, (self.pattern, self.outliers and f"+ {self.outliers}", self.weight_dtype)))


@dataclass(frozen=True)
class Allocation:
    """How the layers of a model were stored within `target_bits`; `str()` is a table per layer type."""

    target_bits: float
    bits_per_weight: float
    layers: list[AllocatedLayer]

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Allocation:
        """The inverse of `dataclasses.asdict`."""
        return cls(**{**saved, "layers": [AllocatedLayer(**layer) for layer in saved["layers"]]})

    def __str__(self) -> str:
        header = f"{'layer type':<32}{'bits/weight':>20}{'sensitivity':>13}  chosen"
        lines = [f"{self.bits_per_weight:.3f} of {self.target_bits:g} bits per weight, allocated:", header]
        types: dict[str, list[AllocatedLayer]] = {}
        for layer in self.layers:
            types.setdefault(layer_type(layer.name), []).append(layer)
        for kind, layers in types.items():
            bits = [layer.bits_per_weight for layer in layers]
            spread = f"{sum(bits) / len(bits):.3f} ({min(bits):.2f}–{max(bits):.2f})"
            felt = [layer.sensitivity for layer in layers if layer.sensitivity is not None]
            sensitivity = f"{sum(felt) / len(felt):.4f}" if felt else "–"
            counts = Counter(layer.storage for layer in layers).most_common()
            chosen = ", ".join(f"{count} × {storage}" for storage, count in counts)
            lines.append(f"{kind:<32}{spread:>20}{sensitivity:>13}  {chosen}")
        return "\n".join(lines)


@dataclass
class SparsificationSummary:
    """Every packed layer in the order of the model, and the seconds it took; `str()` is a table per layer type.

    `block_losses` holds, by the number of the decoder block, what fine-tuning did; `allocation`, what was chosen for
    `target_bits`; `distillation`, the loss that `distill` gives; `estimated_bytes` and
    `peak_bytes`, the memory that the process was to take at most, and did.
    """

    layers: list[LayerSummary] = field(default_factory=list)
    block_losses: dict[int, BlockLoss] = field(default_factory=dict)
    seconds: float = 0.0
    allocation: Allocation | None = None
    distillation: BlockLoss | None = None
    estimated_bytes: int = 0
    peak_bytes: int = 0

    def by_type(self) -> dict[str, dict[str, float]]:
        """Per layer type, and under "all": layers, weights, and the averages of the figures of LayerSummary.

        Density and bits are averages over weights, the relative error over layers.
        """
        groups: dict[str, list[LayerSummary]] = {}
        for layer in self.layers:
            groups.setdefault(layer.type, []).append(layer)
        return {kind: _average(layers) for kind, layers in groups.items()} | {"all": _average(self.layers)}

    def unreached(self) -> str | None:
        """The experts, and other layers, that no calibration token came to, in a sentence; None if there are none."""
        experts: dict[str, set[int]] = {}
        others: list[str] = []
        for layer in self.layers:
            if layer.calibration_tokens == 0:
                expert = split_expert_name(layer.name)
                if expert is None:
                    others.append(layer.name)
                else:
                    experts.setdefault(expert[0], set()).add(expert[1])
        if not experts and not others:
            return None
        counts = {"expert": sum(map(len, experts.values())), "layer": len(others)}
        counted = " and ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in counts.items() if count)
        places = [f"{name} {', '.join(map(str, sorted(numbers)))}" for name, numbers in experts.items()] + others
        return (
            f"No calibration token came to {counted}, pruned by the magnitude of their weights; more text, or text of "
            f"more kinds, may reach them: {'; '.join(places)}."
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON. Holds no times: the same input gives the same dictionary."""
        losses = {str(index): asdict(loss) for index, loss in self.block_losses.items()}
        tuned = {"block_losses": losses} if losses else {}
        allocated = {} if self.allocation is None else {"allocation": asdict(self.allocation)}
        distilled = {} if self.distillation is None else {"distillation": asdict(self.distillation)}
        layers = [asdict(layer) for layer in self.layers]
        return {"layers": layers, "types": self.by_type(), **tuned, **allocated, **distilled}

    def __str__(self) -> str:
        header = f"{'layer type':<32}{'layers':>7}{'weights':>13}{'density':>9}{'error':>9}{'bits/weight':>13}"
        lines = [header, "-" * len(header)]
        for kind, row in self.by_type().items():
            lines.append(
                f"{kind:<32}{row['layers']:>7}{row['weights']:>13}{row['density']:>9.4f}"
                f"{row['relative_error']:>9.4f}{row['bits_per_weight']:>13.3f}"
            )
        if self.allocation is not None:
            lines += ["", str(self.allocation)]
        if self.distillation is not None:
            before, after = self.distillation.before, self.distillation.after
            lines += ["", f"Distilled: divergence from the dense model {before:.4f} → {after:.4f}."]
        if (unreached := self.unreached()) is not None:
            lines += ["", unreached]
        return "\n".join(lines)


def _average(layers: Iterable[LayerSummary]) -> dict[str, float]:
    layers = list(layers)
    weights = sum(layer.weights for layer in layers)
    return {
        "layers": len(layers),
        "weights": weights,
        "density": sum(layer.density * layer.weights for layer in layers) / weights,
        "relative_error": sum(layer.relative_error for layer in layers) / len(layers),
        "bits_per_weight": sum(layer.bits_per_weight * layer.weights for layer in layers) / weights,
    }
