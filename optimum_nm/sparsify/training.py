"""What blockwise fine-tuning and distillation share: float masters of packed weights, and the loop that trains them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..config import INTEGER_DTYPES, LayerConfig
from ..finetune_config import TrainingConfig
from ..packing.values import expand_scales, quantize, round_to_levels
from .products import rounded_products
from .ranks import average_, average_gradients
from .solvers import Solution

BETAS = (0.9, 0.95)
GRADIENT_CLIP = 1.0
PATIENCE = 2  # epochs without gain on what is held out


class TrainedWeight:
    """A float32 master, zero where nothing is kept, and the weight that would be stored of it.

    Args:
        solution: where to begin; masks and scales stay.
        layer: how the weight is stored.
    """

    def __init__(self, solution: Solution, layer: LayerConfig) -> None:
        self.solution, self.layer = _with_scales(solution, layer), layer
        kept = solution.kept
        self.master = (self.solution.weight.detach() * kept).requires_grad_()
        # What is zero stays zero without a gradient, and no step has to mask the weight first.
        self.master.register_post_accumulate_grad_hook(partial(_mask_gradient, kept))
        self._base = solution.mask.to(solution.weight.device)
        self._scales = None
        if self.solution.scales is not None:
            scales = self.solution.scales.to(solution.weight.device, torch.float32)
            self._scales = expand_scales(scales, solution.weight.shape[1], layer.group_size)

    def stored(self) -> Tensor:
        """`[out_features, in_features]`."""
        if self._scales is None:
            return self.master
        return _StraightThrough.apply(self.master, self._scales, self._base, self.layer.weight_dtype)

    def tuned(self) -> Solution:
        return replace(self.solution, weight=self.stored().detach())


class _StraightThrough(torch.autograd.Function):
    """Rounds what is stored as integers, as if it did not for the gradient (Bengio et al., 1308.3432)."""

    @staticmethod
    def forward(context: Any, master: Tensor, scales: Tensor, base: Tensor, dtype: str) -> Tensor:
        return torch.where(base, round_to_levels(master, scales, dtype).mul_(scales), master)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return gradients[0], None, None, None


@torch.no_grad()
def train(
    loss: Callable[[int], Tensor],
    count: int,
    weights: Sequence[Tensor],
    vectors: Sequence[Tensor],
    settings: TrainingConfig,
    seed: int,
    after_batch: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """Minimise the mean of `loss` over batches by AdamW, and leave the best epoch in `weights` and `vectors`.

    Ranks take every step together, with the mean of their gradients.

    Args:
        loss: of a batch by its number; of this rank's share of it.
        count: how many batches there are.
        weights, vectors: what is trained, with and without weight decay.
        seed: of the choice of what is held out, and of the order of batches.
        after_batch: called after each one that trains.

    Returns:
        The mean loss before and after, on what is held out; if that is nothing, on a batch that trains, and the last
        epoch stays.
    """
    trained = [*weights, *vectors]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator).tolist()
    held_out = order[: _held_out_count(count, settings.holdout)]
    batches = order[len(held_out) :]
    optimizer = torch.optim.AdamW(
        [
            {"params": list(weights), "weight_decay": settings.weight_decay},
            {"params": list(vectors), "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=BETAS,
        fused=all(tensor.device.type in ("cpu", "cuda") for tensor in trained),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _decay(settings, len(batches)))

    def measure() -> float:
        return average_(mean(loss(batch) for batch in held_out or batches[:1])).item()

    before = after = measure()
    size = sum(weight.numel() for weight in weights)
    best, epochs_without_gain = [tensor.detach().clone() for tensor in trained], 0
    for _ in range(settings.epochs):
        for batch in torch.tensor(batches)[torch.randperm(len(batches), generator=generator)].tolist():
            with torch.enable_grad(), rounded_products(size):
                loss(batch).backward(inputs=trained)
            average_gradients(trained)
            nn.utils.clip_grad_norm_(trained, GRADIENT_CLIP)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            after_batch()
        measured = measure()
        epochs_without_gain = 0 if measured < after else epochs_without_gain + 1
        if measured < after or not held_out:
            after = measured
            for tensor, value in zip(best, trained, strict=True):
                tensor.copy_(value)
        elif epochs_without_gain == PATIENCE:
            break
    for tensor, value in zip(trained, best, strict=True):
        tensor.copy_(value)
    return before, after


def mean(losses: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(losses)).mean()


def _mask_gradient(kept: Tensor, master: Tensor) -> None:
    assert master.grad is not None
    master.grad.mul_(kept)


def _with_scales(solution: Solution, layer: LayerConfig) -> Solution:
    """With the scales that packing would choose where integers have none yet."""
    if layer.weight_dtype not in INTEGER_DTYPES or solution.scales is not None:
        return solution
    base = solution.weight.masked_fill(~solution.mask.to(solution.weight.device), 0.0).cpu()
    return replace(solution, scales=quantize(base, layer.weight_dtype, layer.group_size)[1])


def _held_out_count(batches: int, share: float) -> int:
    """At least one batch if any is asked for, and at least one is left to train."""
    return min(max(1, round(share * batches)), batches - 1) if share else 0


def _decay(settings: TrainingConfig, batches: int) -> Callable[[int], float]:
    total = settings.epochs * batches

    def factor(step: int) -> float:
        progress = min(step / total, 1.0)
        return 1 - progress if settings.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2

    return factor
