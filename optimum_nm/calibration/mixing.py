"""One set of calibration windows from one source or from several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import NMError
from .generation import generate_windows
from .sources import CalibrationSource, read_documents
from .windows import calibration_windows, document_windows

SELF = "self"  # the source that is the model itself

# A source, or {source: its share of the windows}, shares being relative to each other.
Calibration: TypeAlias = CalibrationSource | Mapping[CalibrationSource, float]


def read_windows(
    calibration: Calibration,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    seed: int,
    packing: bool = True,
    progress: bool = True,
) -> Tensor:
    """Windows of calibration text, those of several sources in random order.

    Args:
        calibration: what `read_documents` takes, "self" for text that `model` generates, or {source: share}.
        model: dense, in eval mode; only "self" runs it.
        packing: documents are joined to fill windows; otherwise each window is the beginning of one.

    Returns:
        Token ids, int64 `[samples or fewer, length]`.

    Raises:
        NMError: a source cannot be used, a share is no number above 0 or too small for a window.
    """

    def read(source: CalibrationSource, count: int) -> Tensor:
        if is_self(source):
            return generate_windows(model, tokenizer, count, length, seed, progress)
        cut = calibration_windows if packing else document_windows
        return cut(read_documents(source), tokenizer, count, length, seed)

    if not isinstance(calibration, Mapping):
        return read(calibration, samples)
    counts = share_out(calibration, samples)
    windows = torch.cat([read(source, count) for source, count in counts.items()])
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))]


def runs_model(calibration: Calibration) -> bool:
    """Whether `read_windows` needs the weights of the model."""
    return SELF in calibration if isinstance(calibration, Mapping) else is_self(calibration)


def is_self(source: CalibrationSource) -> bool:
    """Whether the source is the model itself."""
    return isinstance(source, str) and source == SELF


def share_out(shares: Mapping[CalibrationSource, float], samples: int) -> dict[CalibrationSource, int]:
    """How many of the windows each source gives, by largest remainders.

    Raises:
        NMError: as of `read_windows`.
    """
    for source, share in shares.items():
        if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 < share < float("inf"):
            raise NMError(f"calibration source {str(source)!r} has share {share!r}; it must be a number above 0.")
    if not shares:
        raise NMError("calibration is a mapping without sources; {source: share} is needed.")
    total = sum(shares.values())
    exact = {source: samples * share / total for source, share in shares.items()}
    counts = {source: int(value) for source, value in exact.items()}
    by_remainder = sorted(shares, key=lambda source: counts[source] - exact[source])
    for source in by_remainder[: samples - sum(counts.values())]:
        counts[source] += 1
    for source, count in counts.items():
        if not count:
            raise NMError(
                f"calibration source {str(source)!r} has a share of {shares[source] / total:.3g}, less than one window "
                f"of calibration_samples={samples}."
            )
    return counts
