"""Text to calibrate or to evaluate on, from wherever the user has it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import datasets

from ..errors import NMError

CalibrationSource: TypeAlias = str | os.PathLike | Iterable[str] | datasets.Dataset | datasets.IterableDataset
STREAM_LIMIT = 8192  # documents taken from a dataset too large to read whole

# Arguments of datasets.load_dataset. Public training splits; c4 is read as a stream of its first shard.
NAMED_DATASETS: dict[str, dict[str, Any]] = {
    "wikitext2": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "train"},
    "c4": {
        "path": "allenai/c4",
        "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"},
        "split": "train",
        "streaming": True,
    },
}
# What differs when the model is not to have been calibrated on it.
HELD_OUT: dict[str, dict[str, Any]] = {
    "wikitext2": {"split": "test"},
    "c4": {"data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}, "split": "validation"},
}


def read_documents(source: CalibrationSource, purpose: str = "calibration") -> list[str]:
    """Documents of a source of text, in its order, empty ones left out.

    Args:
        source: a text file (one document); a `.jsonl` file (per line a JSON object with a "text" field, or a JSON
            string); "wikitext2" or "c4"; strings; a `datasets` object with a "text" column or one column of strings.
        purpose: "calibration", or "evaluation", which reads the held-out split of a named dataset.

    Raises:
        NMError: there is no such file or dataset, it cannot be read, or it holds no text.
    """
    if isinstance(source, (str, os.PathLike)):
        name, texts = str(source), _read_named(source, purpose)
    elif isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
        name, texts = f"the {purpose} dataset", _read_dataset(source)
    else:
        name, texts = f"the {purpose} list", _check_strings(source)
    documents = [text for text in texts if text.strip()]
    if not documents:
        raise NMError(f"{purpose} text is empty: {name} holds no text.")
    return documents


def _read_named(source: str | os.PathLike, purpose: str) -> Iterator[str]:
    path = Path(source).expanduser()
    if path.is_file():
        return _read_jsonl(path) if path.suffix == ".jsonl" else iter([_read_text(path)])
    if str(source) not in NAMED_DATASETS:
        raise NMError(f"{purpose} text {str(source)!r} is neither a file nor one of {', '.join(NAMED_DATASETS)}.")
    try:
        held_out = HELD_OUT[str(source)] if purpose == "evaluation" else {}
        dataset = datasets.load_dataset(**{**NAMED_DATASETS[str(source)], **held_out})
        return iter(list(_read_dataset(dataset)))
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, NMError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise NMError(f"{purpose} dataset {str(source)!r} could not be loaded: {reason}") from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise NMError(f"text file {path} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise NMError(f"text file {path} is not UTF-8 text.") from None


def _read_jsonl(path: Path) -> Iterator[str]:
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise NMError(f"{path} line {number} is not valid JSON ({error}).") from None
        text = record.get("text") if isinstance(record, dict) else record
        if not isinstance(text, str):
            raise NMError(f'{path} line {number} has no text; a string, or an object with a "text" string, is needed.')
        yield text


def _read_dataset(dataset: datasets.Dataset | datasets.IterableDataset) -> Iterator[str]:
    features = dataset.features or {}
    strings = [name for name, kind in features.items() if getattr(kind, "dtype", "").endswith("string")]
    column = "text" if "text" in features or not features else strings[0] if len(strings) == 1 else None
    if column is None:
        raise NMError(f'the dataset has the columns {", ".join(features)}; a column called "text" is needed.')
    if isinstance(dataset, datasets.IterableDataset):
        rows = islice(dataset, STREAM_LIMIT)
        return _check_strings(row.get(column) for row in rows)
    return _check_strings(dataset[column])


def _check_strings(texts: Iterable[Any]) -> Iterator[str]:
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise NMError(f"item {index} is of type {type(text).__name__}; every item must be a string.")
        yield text
