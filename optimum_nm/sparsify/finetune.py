"""Blockwise fine-tuning (EBFT, Guo et al., 2402.12419): each sparse block learns to give what the dense one does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..config import INTEGER_DTYPES, LayerConfig
from ..finetune_config import FinetuneConfig
from ..packing.values import expand_scales, quantize, round_to_levels
from .block_inputs import BlockInputs
from .solvers import Solution
from .summary import BlockLoss

BETAS = (0.9, 0.95)
GRADIENT_CLIP = 1.0
PATIENCE = 2  # epochs without gain on what is held out


class _TrainedWeight:
    """A float32 master, and the weight that would be stored of it."""

    def __init__(self, solution: Solution, layer: LayerConfig) -> None:
        self.solution, self.layer = _with_scales(solution, layer), layer
        self.master = self.solution.weight.detach().clone().requires_grad_()
        self._kept, self._base = solution.kept, solution.mask.to(solution.weight.device)
        self._scales = None
        if self.solution.scales is not None:
            scales = self.solution.scales.to(solution.weight.device, torch.float32)
            self._scales = expand_scales(scales, solution.weight.shape[1], layer.group_size)

    def stored(self) -> Tensor:
        """`[out_features, in_features]`; what integers do not follow of the master passes its gradient on all the same
        (straight-through estimator)."""
        weight = self.master * self._kept
        if self._scales is None:
            return weight
        with torch.no_grad():
            rounded = round_to_levels(weight, self._scales, self.layer.weight_dtype) * self._scales
            rounding = torch.where(self._base, rounded - weight, 0.0)
        return weight + rounding

    def tuned(self) -> Solution:
        return replace(self.solution, weight=self.stored().detach())


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
    weights = {name: _TrainedWeight(*solution) for name, solution in solutions.items()}
    vectors = {name: p.detach().float().clone().requires_grad_() for name, p in _vectors(block, settings)}
    trained = [*(weight.master for weight in weights.values()), *vectors.values()]
    energy = _mean(_squared_error(target, hidden) for target, hidden in zip(targets, inputs.hidden, strict=True))
    energy = energy.clamp_min(torch.finfo(torch.float32).tiny)

    def loss(batch: int) -> Tensor:
        parameters = {f"{name}.weight": _as_parameter(block, name, weight.stored()) for name, weight in weights.items()}
        parameters |= {name: vector.to(block.get_parameter(name).dtype) for name, vector in vectors.items()}
        return _squared_error(inputs.run(index, batch, parameters=parameters), targets[batch]) / energy

    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(targets), generator=generator).tolist()
    held_out = order[: _held_out_count(len(targets), settings.holdout)]
    batches = order[len(held_out) :]
    optimizer = torch.optim.AdamW(
        [
            {"params": trained[: len(weights)], "weight_decay": settings.weight_decay},
            {"params": trained[len(weights) :], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=BETAS,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _decay(settings, len(batches)))

    def measure() -> float:
        with torch.no_grad():
            return _mean(loss(batch) for batch in held_out or batches[:1]).item()

    before = after = measure()
    best, epochs_without_gain = [tensor.detach().clone() for tensor in trained], 0
    for _ in range(settings.epochs):
        for batch in torch.tensor(batches)[torch.randperm(len(batches), generator=generator)].tolist():
            with torch.enable_grad():
                loss(batch).backward(inputs=trained)
            nn.utils.clip_grad_norm_(trained, GRADIENT_CLIP)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        measured = measure()
        epochs_without_gain = 0 if measured < after else epochs_without_gain + 1
        if measured < after or not held_out:
            after, best = measured, [tensor.detach().clone() for tensor in trained]
        elif epochs_without_gain == PATIENCE:
            break
    with torch.no_grad():
        for tensor, value in zip(trained, best, strict=True):
            tensor.copy_(value)
        for name, vector in vectors.items():
            block.get_parameter(name).copy_(vector)
    return {name: weight.tuned() for name, weight in weights.items()}, BlockLoss(before, after)


def _with_scales(solution: Solution, layer: LayerConfig) -> Solution:
    """With the scales that packing would choose where integers have none yet."""
    if layer.weight_dtype not in INTEGER_DTYPES or solution.scales is not None:
        return solution
    base = solution.weight.masked_fill(~solution.mask.to(solution.weight.device), 0.0).cpu()
    return replace(solution, scales=quantize(base, layer.weight_dtype, layer.group_size)[1])


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


def _mean(losses: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(losses)).mean()


def _held_out_count(batches: int, share: float) -> int:
    """At least one batch if any is asked for, and at least one is left to train."""
    return min(max(1, round(share * batches)), batches - 1) if share else 0


def _decay(settings: FinetuneConfig, batches: int) -> Callable[[int], float]:
    total = settings.epochs * batches

    def factor(step: int) -> float:
        progress = min(step / total, 1.0)
        return 1 - progress if settings.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2

    return factor
