"""Blocks of experts as they can be traced: transformers' loop over the experts that a sample reaches cannot."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NMError

# Blocks that `_routed` computes what they do.
BLOCKS = ("MixtralSparseMoeBlock", "OlmoeSparseMoeBlock", "Qwen2MoeSparseMoeBlock", "Qwen3MoeSparseMoeBlock")


def make_experts_traceable(model: nn.Module) -> None:
    """Let every block of experts compute `_routed`, in place.

    Raises:
        NMError: a block is of another kind.
    """
    for module in model.modules():
        if not isinstance(getattr(module, "experts", None), nn.ModuleList):
            continue
        kind = type(module).__name__
        if kind not in BLOCKS:
            raise NMError(f"experts of class {kind} have no traced graph; it must be one of {', '.join(BLOCKS)}.")
        module.forward = partial(_routed, module)  # type: ignore[method-assign]


def _routed(block: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """What the block computes: Σ over the experts chosen of weight · expert(x), and the router's logits.

    Every expert gets the tokens that chose it, in the sample none at all or more, in the graph as many as there are.
    """
    rows = hidden_states.flatten(0, 1)
    logits = block.gate(rows)
    weights, chosen = logits.softmax(dim=-1, dtype=torch.float32).topk(block.top_k, dim=-1)
    if getattr(block, "norm_topk_prob", True):  # Mixtral's always do
        weights = weights / weights.sum(dim=-1, keepdim=True)
    result = torch.zeros_like(rows)
    for number, expert in enumerate(block.experts):
        tokens, places = torch.where(chosen == number)
        output = expert(rows[tokens]) * weights[tokens, places, None].to(rows.dtype)
        result = result.index_add(0, tokens, output)
    if hasattr(block, "shared_expert"):
        result = result + block.shared_expert_gate(rows).sigmoid() * block.shared_expert(rows)
    return result.view(hidden_states.shape), logits
