"""What to do to a model: one configuration object, saved in the checkpoint, resolved per layer by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .errors import NMError
from .finetune_config import DistillConfig, FinetuneConfig
from .patterns import NMPattern, OutlierPattern
from .presets import PRESETS, with_presets

FORMAT_VERSION = 1
QUANT_METHOD = "nm"
WEIGHT_DTYPES = ("float32", "float16", "bfloat16", "int8", "int4")
INTEGER_DTYPES = ("int8", "int4")
OUTLIER_DTYPES = ("float16", "float32")
POSITION_FORMATS = ("codes", "bitmap")
DEFAULT_POSITIONS = "bitmap"  # as fast or faster with every type and kernel: docs/kernels.md
SCORES = ("magnitude", "wanda", "ria")
SOLVERS = ("mask", "sparsegpt", "admm", "alps")
EQUALIZATION_MODES = ("score", "fold")
OUTPUT_LAYERS = ("lm_head", "embed_out")  # one layer: GPT-NeoX calls it the second in transformers 4, and in files
VARIANCE_CORRECTIONS = ("row", "tensor", "output", "least-squares")


@dataclass(frozen=True)
class LayerConfig:
    """How one linear layer is stored. The fields an entry of `NMConfig.overrides` may set, with the same meaning."""

    pattern: NMPattern
    outliers: OutlierPattern | None
    weight_dtype: str
    group_size: int
    positions: str
    outlier_dtype: str


LAYER_FIELDS = tuple(f.name for f in dataclasses.fields(LayerConfig))


@with_presets
@dataclass
class NMConfig:
    """Sparsification settings of a model; also the `quantization_config` of its checkpoint.

    Args:
        pattern: `"N:M"`, keep N of every M consecutive inputs; M in 4, 8, 16, 32.
        outliers: `"k:block"`, weights kept in `outlier_dtype` outside the N:M budget (2507.03052 §3); None for none.
        score: importance of a weight: "magnitude", "wanda" (|w|·‖x‖₂) or "ria" (relative importance, 2402.18096).
        score_exponent: power of ‖x‖₂ in "ria".
        solver: "mask" chooses by score and keeps the surviving weights as they are; "sparsegpt" (2301.00774), "admm"
            (2401.02938, with a gradual mask) and "alps" (2406.07831) choose and update them by the inputs' Gram matrix,
            integer values included, and use neither score, equalization in mode "score", nor variance correction.
        swaps: rounds over every layer in which a pruned weight takes the place of a kept one of its group wherever that
            lowers the layer's error (2512.10922); with another solver than "mask" survivors get new values. 0 for none.
        equalization: SmoothQuant-like α in 0…1, or None for no equalization.
        equalization_mode: "score" rescales for statistics only; "fold" rescales the weights and folds the inverse into
            the preceding norm or linear, where the architecture allows.
        variance_correction: "row", "tensor", "output", "least-squares" or None.
        finetune: settings of blockwise fine-tuning, fields of FinetuneConfig by name ({} for its defaults): epochs,
            learning_rate, weight_decay, batch_size, schedule, targets, train_norms, holdout; None for none.
        distill: settings of a last pass over the whole packed model, which learns the dense model's predictions (an
            encoder's hidden states) by gradients through all blocks, fields of DistillConfig by name ({} for its
            defaults); None for none.
        weight_dtype: stored values: float32, float16, bfloat16, int8, int4.
        group_size: dense columns per float16 scale (int8, int4), a multiple of M; -1 or "row" for one per row.
        positions: "bitmap" (M bits a group), which kernels read faster, or "codes" (⌈log2 C(M,N)⌉ bits a group);
            None for "bitmap".
        outlier_dtype: "float16" or "float32".
        exclude: shell wildcards of module names left as they are.
        overrides: {shell wildcard of module names: {field of LayerConfig: value}}; of several matches the later wins.
        target_bits: bits per weight that all packed layers together may take, positions, scales and outliers counted;
            pattern (N of its M), outliers and weight_dtype of each layer are then chosen by what the model loses,
            unless an override sets one of them, and become overrides. None for all layers as said here.
        share_embedding: the input embedding looks up rows of the packed output layer, where the model ties the two;
            the output layer must be packed with N = M, as by `exclude=[]` and an override of "lm_head".
        preset: "fast" (training-free), "paper" (the whole pipeline of 2507.03052) or "best" (the most accurate, slow)
            sets the fields that docs/accuracy.md lists under it and that are not given; None for the defaults here.
        calibration_samples: number of calibration windows; `distill` may train on another number.
        calibration_length: tokens per window.
        calibration_packing: documents are joined to fill windows; if not, each window is the beginning of a document of
            its own, as encoders of single sentences read them, and shorter documents are left out.
        seed: of the choice of windows.

    Raises:
        NMError: a value is outside the above.
    """

    pattern: str = "8:16"
    outliers: str | None = None
    score: str = "ria"
    score_exponent: float = 0.5
    solver: str = "mask"
    swaps: int = 0
    equalization: float | None = 0.5
    equalization_mode: str = "score"
    variance_correction: str | None = "row"
    finetune: dict[str, Any] | None = None
    distill: dict[str, Any] | None = None
    weight_dtype: str = "float16"
    group_size: int | str = 128
    positions: str | None = None
    outlier_dtype: str = "float16"
    exclude: list[str] = field(default_factory=lambda: ["lm_head"])
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    target_bits: float | None = None
    share_embedding: bool = False
    preset: str | None = None
    calibration_samples: int = 128
    calibration_length: int = 1024
    calibration_packing: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        _require_choice("score", self.score, SCORES)
        _require_choice("solver", self.solver, SOLVERS)
        _require_choice("equalization_mode", self.equalization_mode, EQUALIZATION_MODES)
        _require_choice("preset", self.preset, (None, *PRESETS))
        _require_choice("variance_correction", self.variance_correction, (None, *VARIANCE_CORRECTIONS))
        if self.equalization is not None and not 0 <= self.equalization <= 1:
            raise NMError(f"equalization is {self.equalization}; it must be between 0 and 1, or None.")
        if self.target_bits is not None and not (_is_number(self.target_bits) and self.target_bits > 0):
            raise NMError(f"target_bits is {self.target_bits!r}; it must be a number above 0, or None.")
        if self.finetune is not None:
            self.finetune = dataclasses.asdict(FinetuneConfig.from_dict(self.finetune))
        if self.distill is not None:
            self.distill = dataclasses.asdict(DistillConfig.from_dict(self.distill))
        for name in ("calibration_samples", "calibration_length"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise NMError(f"{name} is {getattr(self, name)!r}; it must be a whole number above 0.")
        if type(self.swaps) is not int or self.swaps < 0:
            raise NMError(f"swaps is {self.swaps!r}; it must be a whole number, 0 or more.")
        for name in ("share_embedding", "calibration_packing"):
            if not isinstance(getattr(self, name), bool):
                raise NMError(f"{name} is {getattr(self, name)!r}; it must be true or false.")
        if not isinstance(self.exclude, list) or not all(isinstance(p, str) for p in self.exclude):
            raise NMError(f"exclude is {self.exclude!r}; it must be a list of name patterns.")
        self._layer({})
        for name_pattern, changes in self.overrides.items():
            unknown = set(changes) - set(LAYER_FIELDS)
            if unknown:
                raise NMError(
                    f"override {name_pattern!r} sets {sorted(unknown)[0]!r}; it may set {', '.join(LAYER_FIELDS)}."
                )
            self._layer(changes)
        self.pattern = str(NMPattern.parse(self.pattern))
        self.outliers = None if self.outliers is None else str(OutlierPattern.parse(self.outliers))

    def _layer(self, changes: dict[str, Any]) -> LayerConfig:
        values = {name: getattr(self, name) for name in LAYER_FIELDS} | changes
        _require_choice("weight_dtype", values["weight_dtype"], WEIGHT_DTYPES)
        _require_choice("positions", values["positions"], (None, *POSITION_FORMATS))
        _require_choice("outlier_dtype", values["outlier_dtype"], OUTLIER_DTYPES)
        values["pattern"] = NMPattern.parse(values["pattern"])
        values["outliers"] = OutlierPattern.parse(values["outliers"])
        values["group_size"] = check_group_size(values["group_size"], values["pattern"])
        values["positions"] = values["positions"] or DEFAULT_POSITIONS
        return LayerConfig(**values)

    @property
    def finetune_settings(self) -> FinetuneConfig | None:
        """`finetune` with its types."""
        return None if self.finetune is None else FinetuneConfig.from_dict(self.finetune)

    @property
    def distill_settings(self) -> DistillConfig | None:
        """`distill` with its types."""
        return None if self.distill is None else DistillConfig.from_dict(self.distill)

    @property
    def distill_samples(self) -> int:
        """Number of windows that `distill` trains on."""
        samples = None if self.distill is None else self.distill["samples"]
        return self.calibration_samples if samples is None else samples

    def is_excluded(self, name: str) -> bool:
        if name in OUTPUT_LAYERS and OUTPUT_LAYERS[0] in self.exclude:
            return True
        return any(fnmatchcase(name, pattern) for pattern in self.exclude)

    def layer(self, name: str, choice: Mapping[str, Any] = MappingProxyType({})) -> LayerConfig | None:
        """The configuration of the module called `name` (full dotted name), or None when it is excluded.

        Args:
            choice: fields of LayerConfig that win over all overrides.
        """
        if self.is_excluded(name):
            return None
        changes: dict[str, Any] = {}
        for pattern, override in self.overrides.items():
            if fnmatchcase(name, pattern):
                changes |= override
        return self._layer(changes | dict(choice))

    def check_names(self, names: list[str]) -> None:
        """Raise NMError if an override, or an exclude pattern other than the default, matches none of `names`."""
        for kind, patterns in (("exclude", self.exclude), ("overrides", list(self.overrides))):
            for pattern in patterns:
                if pattern != "lm_head" and not any(fnmatchcase(name, pattern) for name in names):
                    raise NMError(f"{kind} pattern {pattern!r} matches no linear layer; one is called {names[0]!r}.")

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION} | dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> NMConfig:
        """The inverse of `to_dict`; refuses another method, a newer format version and unknown fields."""
        values = dict(values)
        method = values.pop("quant_method", QUANT_METHOD)
        if method != QUANT_METHOD:
            raise NMError(f"quant_method is {method!r}; this reader understands {QUANT_METHOD!r}.")
        version = values.pop("format_version", FORMAT_VERSION)
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise NMError(
                f"format_version is {version!r}; this optimum-nm reads up to {FORMAT_VERSION}, please upgrade it."
            )
        unknown = set(values) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise NMError(f"configuration has the unknown field {sorted(unknown)[0]!r}.")
        try:
            return cls(**values)
        except (TypeError, AttributeError) as error:
            raise NMError(f"configuration has a field of the wrong type ({error}).") from None

    def save_pretrained(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "nm_config.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> NMConfig:
        """Read `nm_config.json`, or the `quantization_config` of a checkpoint's `config.json`, from a folder."""
        own, model = Path(folder) / "nm_config.json", Path(folder) / "config.json"
        path = own if own.exists() else model
        if not path.exists():
            raise NMError(f"{folder} holds neither nm_config.json nor config.json.")
        try:
            values = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise NMError(f"{path} is not readable JSON ({error}).") from None
        if path is model and isinstance(values, dict):
            values = values.get("quantization_config")
        if not isinstance(values, dict):
            raise NMError(f"{path} has no quantization_config; it is not a packed checkpoint.")
        return cls.from_dict(values)


def _require_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise NMError(f"{name} is {value!r}; it must be one of {', '.join(map(str, choices))}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_group_size(group_size: int | str, pattern: NMPattern) -> int:
    """Normalise a group size to a positive multiple of M, or -1 for the whole row."""
    if group_size in (-1, "row"):
        return -1
    if not isinstance(group_size, int) or group_size < 1 or group_size % pattern.m:
        raise NMError(
            f"group_size is {group_size!r}; it must be a multiple of {pattern.m} (pattern {pattern}), or 'row'."
        )
    return group_size
