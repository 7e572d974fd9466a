"""Calibration text that the model writes itself: no data is needed, and it is what the model sees when it is used."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import NMError

WINDOWS_PER_BATCH = 16


@torch.no_grad()
def generate_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    seed: int,
    progress: bool = True,
) -> Tensor:
    """Sample windows from the model's own distribution, at temperature 1 (Williams et al., 2410.17170).

    A window begins with the tokenizer's BOS token, or where it has none with a random token that is not special. An
    end-of-text token does not end a window: what the model writes after it follows.

    Args:
        model: dense, in eval mode.
        progress: show a progress bar over the tokens.

    Returns:
        Token ids, int64 `[samples, length]` on the CPU; the same for the same seed.

    Raises:
        NMError: the model generates no text, has no key-value cache, or its output is not finite.
    """
    if not model.can_generate():
        raise NMError(f"{type(model).__name__} generates no text; give text instead of 'self'.")
    generator = torch.Generator().manual_seed(seed)
    starts = _first_tokens(tokenizer, samples, generator)
    windows = []
    batches = starts.split(WINDOWS_PER_BATCH)
    with tqdm(total=len(batches) * (length - 1), desc="Generating text", unit="step", disable=not progress) as bar:
        for tokens in batches:
            cache = None
            for _ in range(length - 1):
                output = model(input_ids=tokens[:, -1:].to(model.device), past_key_values=cache, use_cache=True)
                cache = getattr(output, "past_key_values", None)
                if cache is None:
                    raise NMError(
                        f"model type {model.config.model_type!r} has no key-value cache to generate text with."
                    )
                tokens = torch.cat([tokens, _sample(output.logits[:, -1], generator)], dim=1)
                bar.update()
            windows.append(tokens)
    return torch.cat(windows)


def _first_tokens(tokenizer: PreTrainedTokenizerBase, samples: int, generator: torch.Generator) -> Tensor:
    """`[samples, 1]`."""
    if tokenizer.bos_token_id is not None:
        return torch.full((samples, 1), tokenizer.bos_token_id)
    special = set(tokenizer.all_special_ids)
    ordinary = torch.tensor([token for token in range(len(tokenizer)) if token not in special])
    return ordinary[torch.randint(len(ordinary), (samples, 1), generator=generator)]


def _sample(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token a row, `[rows, 1]`, on the CPU whatever the device, so that a seed means the same everywhere."""
    probabilities = logits.float().cpu().softmax(dim=-1)
    if not torch.isfinite(probabilities).all():
        raise NMError(
            "the model's output is not finite, so it cannot write its own text; load it with dtype='float32'."
        )
    return torch.multinomial(probabilities, 1, generator=generator)
