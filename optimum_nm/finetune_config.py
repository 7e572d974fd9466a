"""Settings of what is trained: blockwise fine-tuning, and distillation of the whole model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from .errors import NMError

SCHEDULES = ("cosine", "linear")
TARGETS = ("sparse", "dense")

Settings = TypeVar("Settings", bound="TrainingConfig")


@dataclass(frozen=True)
class TrainingConfig:
    """How weights are trained whose masks stay as they are.

    Args:
        epochs: passes over the calibration windows.
        learning_rate: of AdamW with β (0.9, 0.95), where the schedule starts.
        weight_decay: of the weights; norms and biases have none.
        batch_size: windows per step.
        schedule: "cosine" or "linear" decay of the learning rate to 0.
        train_norms: train norms and biases too.
        holdout: share of the windows that measure and do not train; the best epoch on them is what stays, and two
            epochs without gain end the training. 0 for none.

    Raises:
        NMError: a value is outside the above.
    """

    FIELD: ClassVar[str]  # of NMConfig

    epochs: int = 5
    learning_rate: float = 3e-4
    weight_decay: float = 0.0
    batch_size: int = 2
    schedule: str = "cosine"
    train_norms: bool = True
    holdout: float = 0.125

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            self._require(name, int, "a whole number above 0", lambda value: value >= 1)
        self._require("learning_rate", float, "a number above 0", lambda value: value > 0)
        self._require("weight_decay", float, "a number, 0 or more", lambda value: value >= 0)
        self._require("holdout", float, "a number from 0 to below 1", lambda value: 0 <= value < 1)
        self._require("train_norms", bool, "true or false", lambda value: True)
        self._require("schedule", str, f"one of {', '.join(SCHEDULES)}", SCHEDULES.__contains__)

    @classmethod
    def from_dict(cls: type[Settings], values: Any) -> Settings:
        """From a dictionary with some or all of the fields.

        Raises:
            NMError: it is none, or has another field.
        """
        fields = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, dict):
            raise NMError(f"{cls.FIELD} is {values!r}; it must be settings by name, as {{'epochs': 5}}, or None.")
        for name in values:
            if name not in fields:
                raise NMError(f"{cls.FIELD} sets {name!r}; it may set {', '.join(fields)}.")
        return cls(**values)

    def _require(self, name: str, kind: type, wanted: str, allowed: Any) -> None:
        value = getattr(self, name)
        kinds = (int, float) if kind is float else (kind,)
        if not isinstance(value, kinds) or (kind is not bool and isinstance(value, bool)) or not allowed(value):
            raise NMError(f"{self.FIELD}'s {name} is {value!r}; it must be {wanted}.")


@dataclass(frozen=True)
class FinetuneConfig(TrainingConfig):
    """How each decoder block is fine-tuned after its layers are solved: as TrainingConfig says, and

    Args:
        targets: what a block should give: "sparse", what the dense block does on the inputs that the sparse blocks
            before it produce (EBFT), or "dense", what it does in the dense model, so that later blocks make up for
            errors of earlier ones.

    Raises:
        NMError: a value is outside the above.
    """

    FIELD: ClassVar[str] = "finetune"

    targets: str = "sparse"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("targets", str, f"one of {', '.join(TARGETS)}", TARGETS.__contains__)


@dataclass(frozen=True)
class DistillConfig(TrainingConfig):
    """How the whole packed model is trained, last of all, to predict what the dense one does, or of an encoder to give
    the same hidden states: as TrainingConfig says, with defaults of its own, and

    Args:
        samples: windows to train on; None for as many as `calibration_samples`. Of these and those one begins with the
            other.
        gradient_checkpointing: compute the insides of each decoder block again for its gradient, so that those of one
            are in memory. Without it those of all are, and a step takes a fifth less time.

    Raises:
        NMError: a value is outside the above.
    """

    FIELD: ClassVar[str] = "distill"

    epochs: int = 1
    learning_rate: float = 1e-4
    batch_size: int = 1
    samples: int | None = None
    gradient_checkpointing: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples is not None:
            self._require("samples", int, "a whole number above 0, or None", lambda value: value >= 1)
        self._require("gradient_checkpointing", bool, "true or false", lambda value: True)
