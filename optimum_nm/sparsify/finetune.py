"""Blockwise fine-tuning (EBFT, Guo et al., 2402.12419): each sparse block learns to give what the dense one does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..config import LayerConfig
from ..finetune_config import FinetuneConfig
from .block_inputs import BlockInputs
from .ranks import average_
from .solvers import Solution
from .summary import BlockLoss
from .training import TrainedWeight, mean, train


def finetune_block(
    inputs: BlockInputs,
    index: int,
    targets: Sequence[Tensor],
    solutions: dict[str, tuple[Solution, LayerConfig]],
    settings: FinetuneConfig,
    seed: int,
) -> tuple[dict[str, Solution], BlockLoss]:
    """Minimise the squared error of one block's output over the values of its sparse weights, and its norms.

    Args:
        inputs: with the hidden states that reach the block.
        targets: per batch `[batch, length, hidden_size]`.
        solutions: of each linear layer to train, by its name inside the block.
        seed: of the choice of what is held out, and of the order of batches.

    Returns:
        The solutions with their trained values, masks and scales as they were; norms and biases are changed in place.
    """
    block = inputs.blocks[index]
    weights = {name: TrainedWeight(*solution) for name, solution in solutions.items()}
    vectors = {name: p.detach().float().clone().requires_grad_() for name, p in _vectors(block, settings)}
    energy = mean(_squared_error(target, hidden) for target, hidden in zip(targets, inputs.hidden, strict=True))
    energy = average_(energy).clamp_min(torch.finfo(torch.float32).tiny)

    def loss(batch: int) -> Tensor:
        parameters = {f"{name}.weight": _as_parameter(block, name, weight.stored()) for name, weight in weights.items()}
        parameters |= {name: vector.to(block.get_parameter(name).dtype) for name, vector in vectors.items()}
        return _squared_error(inputs.run(index, batch, parameters=parameters), targets[batch]) / energy

    masters = [weight.master for weight in weights.values()]
    losses = train(loss, len(targets), masters, list(vectors.values()), settings, seed)
    with torch.no_grad():
        for name, vector in vectors.items():
            block.get_parameter(name).copy_(vector)
    return {name: weight.tuned() for name, weight in weights.items()}, BlockLoss(*losses)


def _vectors(block: nn.Module, settings: FinetuneConfig) -> list[tuple[str, nn.Parameter]]:
    """Norms and biases."""
    return [(n, p) for n, p in block.named_parameters() if p.ndim == 1 and settings.train_norms]


def _as_parameter(block: nn.Module, name: str, weight: Tensor) -> Tensor:
    """`[out_features, in_features]` as the module called `name` holds it."""
    module = block.get_submodule(name)
    assert isinstance(module.weight, Tensor)
    return (weight.t() if isinstance(module, Conv1D) else weight).to(module.weight.dtype)


def _squared_error(output: Tensor, target: Tensor) -> Tensor:
    return (output.float() - target.float()).square().mean()
