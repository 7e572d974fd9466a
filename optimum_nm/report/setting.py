"""What all rows of a report have in common, and the key under which a row's result is kept."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..calibration.mixing import SELF, Calibration, is_self
from ..calibration.sources import CalibrationSource, read_documents
from ..evaluate.dense_variants import file_states
from ..evaluate.whole_file import write_text
from .matrix import Row

PACKAGES = ("optimum-nm", "torch", "transformers")


@dataclass(frozen=True)
class Setting:
    """The model, the texts and how they are read.

    Attributes:
        model: dense causal language model, a folder or a name on the Hugging Face Hub.
        calibration, text: .jsonl files named after what they hold, as `store_documents` writes them; calibration also
            "self", or {either: share}.
        window, stride, tokens: of the held-out text, as of `optimum_nm.evaluate.perplexity`.
        device: where to compute.
        dtype: to load the model in for sparsification; None for the checkpoint's own.
        load_options: further arguments of `from_pretrained`.
    """

    model: str
    calibration: str | dict[str, float]
    text: str
    window: int = 1024
    stride: int | None = None
    tokens: int | None = None
    device: str = "cpu"
    dtype: str | None = None
    load_options: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Setting:
        return cls(**values)

    def identity(self, row: Row) -> dict[str, Any]:
        """Everything that a row's result depends on."""
        files = file_states(self.model)
        names: dict[str, Any] = {"calibration": self._calibration_names(), "text": Path(self.text).name}
        names["model"] = Path(self.model).resolve().name if files else self.model
        return {
            "row": row.to_dict(),
            "setting": self.to_dict() | names,
            "model_files": files,
            "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        }

    def _calibration_names(self) -> str | dict[str, float]:
        if isinstance(self.calibration, dict):
            return {Path(source).name: share for source, share in self.calibration.items()}
        return Path(self.calibration).name

    def key(self, row: Row) -> str:
        """The digest of `identity`."""
        return _digest(json.dumps(self.identity(row), sort_keys=True))


def store_calibration(calibration: Calibration, folder: Path) -> str | dict[str, float]:
    """`calibration` with every text in it stored by `store_documents`."""
    if isinstance(calibration, Mapping):
        return {_stored(source, folder): share for source, share in calibration.items()}
    return _stored(calibration, folder)


def _stored(source: CalibrationSource, folder: Path) -> str:
    return SELF if is_self(source) else store_documents(read_documents(source), folder)


def store_documents(documents: list[str], folder: Path) -> str:
    """Write documents to a file that is named after them, unless it is there; returns its path."""
    content = "".join(json.dumps(document) + "\n" for document in documents)
    path = folder / f"{_digest(content)}.jsonl"
    if not path.exists():
        write_text(path, content)
    return str(path)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
