"""Named sets of NMConfig fields; what each costs and reaches is in docs/accuracy.md."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

# "fast": no training. "paper": the pipeline of 2507.03052, fine-tuned as EBFT (2402.12419) publishes. "best": what
# measured best within an hour or two on a CPU.
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"solver": "admm", "calibration_samples": 32},
    "paper": {
        "outliers": "16:256",
        "score": "ria",
        "solver": "mask",
        "equalization": 0.5,
        "equalization_mode": "score",
        "variance_correction": "row",
        "calibration_samples": 256,
        "finetune": {
            "epochs": 10,
            "learning_rate": 2e-4,
            "weight_decay": 0.1,
            "batch_size": 8,
            "schedule": "linear",
            "targets": "sparse",
            "train_norms": True,
            "holdout": 0.0,
        },
    },
    "best": {
        "solver": "admm",
        "calibration_samples": 256,
        "distill": {"epochs": 1, "learning_rate": 4e-4, "holdout": 0.0},
    },
}

Config = TypeVar("Config")


def with_presets(config_class: type[Config]) -> type[Config]:
    """Class decorator of a dataclass with a field `preset`: the preset's fields take the place of the defaults."""
    initialize: Any = config_class.__init__
    names = list(config_class.__annotations__)

    @functools.wraps(initialize)
    def __init__(self: Config, *args: Any, **given: Any) -> None:
        preset = given.get("preset")
        chosen = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
        explicit = {*names[: len(args)], *given}
        initialize(self, *args, **given, **{name: chosen[name] for name in chosen if name not in explicit})

    config_class.__init__ = __init__  # type: ignore[method-assign, assignment]
    return config_class
