"""Perplexity: how well a model predicts a text, in torch or in ONNX Runtime.

The documents are tokenized one by one with the tokenizer's special tokens and joined. A window reads `window` tokens
and predicts the token after each of them; the next window begins `stride` tokens later and only counts predictions that
no window before it made. So every token of the text but the first counts exactly once, whatever the stride; a smaller
stride only gives it more context. Perplexity is exp of the mean negative log-likelihood of these tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import NMError
from ..nn.modeling import load_causal_lm, load_tokenizer
from ..runtime.session import session_options
from .onnx_decoder import OnnxDecoder
from .tables import format_table


@dataclass(frozen=True)
class Window:
    """The model reads tokens `begin` to `end` (exclusive) and predicts `scored_from` to `end` (inclusive)."""

    begin: int
    end: int
    scored_from: int


@dataclass(frozen=True)
class Perplexity:
    """A model's perplexity on a text.

    Attributes:
        mean_loss: negative log-likelihood per token, in nats.
        tokens: how many were predicted.
    """

    model: str
    runtime: str
    perplexity: float
    mean_loss: float
    tokens: int
    window: int
    stride: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def cut_windows(tokens: int, window: int, stride: int | None = None) -> list[Window]:
    """Windows in which every token but the first is predicted exactly once.

    Args:
        tokens: length of the text.
        window: tokens read at once.
        stride: from one window to the next; None for `window`.

    Raises:
        NMError: the text is too short, or the stride is not in 1…window.
    """
    stride = window if stride is None else stride
    if window < 1 or not 1 <= stride <= window:
        raise NMError(f"window is {window} and stride {stride}; the stride must be between 1 and the window.")
    if tokens < 2:
        raise NMError(f"the text has {tokens} token(s); at least 2 are needed to predict one from another.")
    windows: list[Window] = []
    end = 0
    while end < tokens - 1:
        begin = len(windows) * stride
        scored_from, end = end + 1, min(begin + window, tokens - 1)
        windows.append(Window(begin, end, scored_from))
    return windows


def tokenize(documents: list[str], tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> list[int]:
    """The tokens of all documents in order, at most `limit`."""
    tokens: list[int] = []
    for document in documents:
        tokens += tokenizer(document, verbose=False)["input_ids"]
        if limit is not None and len(tokens) >= limit:
            break
    return tokens[:limit]


def evaluate_torch(
    model: str,
    documents: list[str],
    window: int,
    stride: int | None = None,
    limit: int | None = None,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    load_options: dict[str, Any] | None = None,
) -> Perplexity:
    """Perplexity of a dense or packed causal language model in torch.

    Args:
        model: folder or name on the Hugging Face Hub.
        documents: the text.
        window, stride: as of `cut_windows`.
        limit: read only so many tokens.
        load_options: further arguments of `from_pretrained`.

    Raises:
        NMError: the model cannot be loaded, the window is longer than the model reads, the text is too short, or the
            model's output is not finite.
    """
    loaded, tokenizer = load_model(model, dtype, load_options or {})
    loaded.to(device).eval()  # type: ignore[arg-type]
    return evaluate_loaded(model, loaded, tokenizer, documents, window, stride, limit)


def evaluate_loaded(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: list[str],
    window: int,
    stride: int | None = None,
    limit: int | None = None,
) -> Perplexity:
    """As `evaluate_torch`, of a model that is loaded, in eval mode and on its device."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and window > longest:
        raise NMError(f"window is {window}; {name} reads at most {longest} tokens.")

    def logits(tokens: list[int]) -> Tensor:
        return model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False).logits[0]

    return score_tokens(name, "torch", logits, tokenize(documents, tokenizer, limit), window, stride)


def evaluate_onnx(
    folder: str | Path,
    documents: list[str],
    window: int,
    stride: int | None = None,
    limit: int | None = None,
    *,
    device: str = "cpu",
) -> Perplexity:
    """Perplexity of the `model.onnx` of a folder, which also holds the tokenizer; otherwise as `evaluate_torch`."""
    provider = "CUDAExecutionProvider" if device.startswith("cuda") else "CPUExecutionProvider"
    decoder = OnnxDecoder(Path(folder) / "model.onnx", session_options(), provider)
    tokenizer = load_tokenizer(folder)

    def logits(tokens: list[int]) -> Tensor:
        decoder.reset()
        return torch.from_numpy(decoder.read(tokens))

    return score_tokens(str(folder), "onnxruntime", logits, tokenize(documents, tokenizer, limit), window, stride)


def format_perplexities(results: list[Perplexity]) -> str:
    """A table with a row for each; from the second on with the ratio to the last, which is the reference."""
    header = ["model", "runtime", "perplexity", "ratio", "tokens", "window", "stride", "seconds"]
    rows = [
        [
            result.model,
            result.runtime,
            f"{result.perplexity:.3f}",
            f"{result.perplexity / results[-1].perplexity:.3f}",
            str(result.tokens),
            str(result.window),
            str(result.stride),
            f"{result.seconds:.1f}",
        ]
        for result in results
    ]
    return format_table(header, rows)


def load_model(model: str, dtype: str, options: dict[str, Any]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model, packed or dense, and its tokenizer.

    Raises:
        NMError: as `load_causal_lm`, or it has no tokenizer.
    """
    loaded = load_causal_lm(model, dtype=getattr(torch, dtype), **options)
    return loaded, load_tokenizer(model, **options)


@torch.no_grad()
def score_tokens(
    model: str,
    runtime: str,
    logits: Callable[[list[int]], Tensor],
    tokens: list[int],
    window: int,
    stride: int | None,
) -> Perplexity:
    """Perplexity of `tokens` under `logits`, which gives `[read, vocabulary]` after each token that a window reads.

    Raises:
        NMError: as `cut_windows`, or a prediction is not finite.
    """
    start = time.perf_counter()
    total, count = 0.0, 0
    for part in tqdm(cut_windows(len(tokens), window, stride), desc=f"Perplexity of {model}", unit="window"):
        predictions = logits(tokens[part.begin : part.end])[part.scored_from - 1 - part.begin :].float()
        targets = torch.tensor(tokens[part.scored_from : part.end + 1], device=predictions.device)
        total += torch.nn.functional.cross_entropy(predictions, targets, reduction="none").double().sum().item()
        count += len(targets)
        if not math.isfinite(total):
            raise NMError(f"{model} predicts what is not finite in the window at token {part.begin} of the text.")
    loss = total / count
    seconds = time.perf_counter() - start
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return Perplexity(model, runtime, perplexity, loss, count, window, stride or window, seconds)
