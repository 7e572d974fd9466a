"""Windows of tokens to calibrate on: stretches of joined documents, or the beginnings of documents."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import NMError

logger = logging.getLogger(__name__)

CANDIDATES = 4  # windows are chosen among up to this many times as many


def calibration_windows(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, samples: int, length: int, seed: int
) -> Tensor:
    """Cut text into windows of equal length and choose some at random.

    Documents are taken in random order, tokenized with the tokenizer's special tokens, and joined until there is text
    for `CANDIDATES · samples` windows; of the windows, `samples` are chosen. If `samples` need more text than that, all
    are taken, with a warning.

    Returns:
        Token ids, int64 `[samples or fewer, length]`.

    Raises:
        NMError: there is not enough text for one window.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = []
    for index in torch.randperm(len(documents), generator=generator).tolist():
        tokens += tokenizer(documents[index], verbose=False)["input_ids"]
        if len(tokens) >= CANDIDATES * samples * length:
            break
    available = len(tokens) // length
    if not available:
        raise NMError(
            f"calibration text has {len(tokens)} tokens; one window (calibration_length) needs {length}, "
            f"and calibration_samples={samples} of them are better."
        )
    _warn_of_few(available, length, samples)
    windows = torch.tensor(tokens[: available * length], dtype=torch.int64).view(available, length)
    return windows[torch.randperm(available, generator=generator)[:samples]]


def document_windows(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, samples: int, length: int, seed: int
) -> Tensor:
    """As `calibration_windows`, but each window is the beginning of a document of its own, as a model is given single
    sentences: documents are cut as the tokenizer truncates, special tokens included, and shorter ones left out.

    Raises:
        NMError: no document is long enough.
    """
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    windows: list[list[int]] = []
    longest = 0
    for index in order:
        tokens = tokenizer(documents[index], truncation=True, max_length=length)["input_ids"]
        longest = max(longest, len(tokens))
        if len(tokens) == length:
            windows.append(tokens)
        if len(windows) == samples:
            break
    if not windows:
        raise NMError(
            f"the longest document of the calibration text has {longest} tokens; with calibration_packing=False one of "
            f"{length} (calibration_length) is needed for each window."
        )
    _warn_of_few(len(windows), length, samples)
    return torch.tensor(windows, dtype=torch.int64)


def _warn_of_few(available: int, length: int, samples: int) -> None:
    if available < samples:
        logger.warning(
            "The calibration text makes %d windows of %d tokens, not the %d asked for.", available, length, samples
        )
