"""Distillation: the whole packed model learns to give what the dense one does, its masks staying as they are."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..config import NMConfig
from ..finetune_config import DistillConfig
from ..memory import memory_bytes
from ..nn.convert import replace_linear
from ..nn.linear import NMLinear
from ..packing.packed_weight import PackedWeight
from ..packing.tensor_files import read_tensor
from .architectures import decoder_blocks
from .ranks import count, share
from .solvers import Solution
from .summary import BlockLoss, SparsificationSummary
from .training import TrainedWeight, train
from .work_folder import WorkFolder

TOKENS_AT_ONCE = 256  # of which probabilities are in memory


class _TrainedLinear(nn.Module):
    """In the place of an NMLinear, multiplies by the weight that would be stored of its master."""

    def __init__(self, linear: NMLinear, device: torch.device) -> None:
        super().__init__()
        self.linear = linear
        packed = linear.packed
        outlier_mask = None if packed.config.outliers is None else packed.outlier_mask()
        mask = packed.mask() if outlier_mask is None else packed.mask() & ~outlier_mask
        scales = packed.tensors.get("scales")
        scales = None if scales is None else scales.view(torch.float16)
        solution = Solution(packed.unpack().to(device), mask, outlier_mask, scales)
        self.weight = TrainedWeight(solution, packed.config)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.stored(), self.linear.bias)

    @torch.no_grad()
    def packed(self) -> NMLinear:
        """The NMLinear, with the trained weight."""
        solution = self.weight.tuned()
        packed = PackedWeight.from_config(
            solution.weight,
            self.linear.config,
            mask=solution.mask,
            outlier_mask=solution.outlier_mask,
            scales=solution.scales,
        )
        for name, tensor in packed.tensors.items():
            getattr(self.linear, name).copy_(tensor)
        return self.linear


def distill_last(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    windows: Tensor,
    config: NMConfig,
    summary: SparsificationSummary,
    progress: bool,
    work: WorkFolder | None = None,
) -> None:
    """The last step of a run: `distill`, reported in `summary`, and durable in `work`, which may have it already."""
    settings = config.distill_settings
    assert settings is not None
    blocks_name, blocks = decoder_blocks(dense)
    number = len(blocks) + 1  # of the part, after those of the blocks and of what is in none
    if work is not None and work.manifest is not None and work.done > number:
        tensors = model.state_dict()
        for name, location in work.part(number).items():
            tensors[name].copy_(read_tensor(location))
        summary.distillation = BlockLoss(**work.manifest.parts[number].report["loss"])
        return
    start = time.perf_counter()
    summary.distillation = distill(model, dense, windows, settings, config.seed, progress)
    seconds = time.perf_counter() - start
    summary.seconds += seconds
    summary.peak_bytes = memory_bytes()[1]
    if work is not None:
        vectors = {name for name, parameter in model.named_parameters() if parameter.ndim == 1}
        tensors = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if name.startswith(f"{blocks_name}.") or name in vectors
        }
        work.commit(tensors, {"loss": asdict(summary.distillation)}, [], seconds)


def distill(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    windows: Tensor,
    settings: DistillConfig,
    seed: int,
    progress: bool = True,
) -> BlockLoss:
    """Minimise the divergence of the packed model's next-token probabilities from the dense model's; of a model that
    makes none, as an encoder, the error of its last hidden states.

    Trained are the values of all packed layers in decoder blocks, in float32, integers through a straight-through
    estimator, and all norms and biases.

    Args:
        model: packed, in eval mode; changed in place, what is stored is what was trained.
        dense: the same model before it was packed, in eval mode, on the same device.
        windows: int64 `[samples, length]`.
        seed: of the choice of what is held out, and of the order of batches.

    Returns:
        Before and after, KL(dense ‖ packed) in nats a token, or ‖packed − dense‖² / ‖dense‖² of the hidden states.
    """
    blocks = model.get_submodule(decoder_blocks(dense)[0])
    assert isinstance(blocks, nn.ModuleList)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    batches = share(windows).split(settings.batch_size // count())
    linears = {name: module for name, module in blocks.named_modules() if isinstance(module, NMLinear)}
    trained = {name: _TrainedLinear(linear, model.device) for name, linear in linears.items()}
    nn.Module.float(model)  # transformers' own refuses a quantized model, as one loaded from a checkpoint
    for name, linear in trained.items():
        replace_linear(blocks, name, linear)
    vectors = [p.requires_grad_() for p in model.parameters() if p.ndim == 1 and settings.train_norms]

    def loss(batch: int) -> Tensor:
        tokens = batches[batch].to(model.device)
        with torch.no_grad():
            target = dense(input_ids=tokens, use_cache=False)
        found = model(input_ids=tokens, use_cache=False)
        if "logits" in target:
            return _divergence(target.logits, found.logits)
        return _relative_error(target.last_hidden_state, found.last_hidden_state)

    masters = [linear.weight.master for linear in trained.values()]
    steps = settings.epochs * len(batches)
    memory = _checkpointed(blocks) if settings.gradient_checkpointing else nullcontext()
    with memory, tqdm(total=steps, desc="Distilling", unit="batch", disable=not progress) as bar:
        losses = train(loss, len(batches), masters, vectors, settings, seed, bar.update)
    for name, linear in trained.items():
        replace_linear(blocks, name, linear.packed())
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    return BlockLoss(*losses)


class _Divergence(torch.autograd.Function):
    """Mean over tokens of KL(p ‖ q), p given by the logits `target` `[…, vocabulary]` and q by `logits`.

    Its gradient, (q − p) / tokens, comes with it, so that no probabilities wait for the way back.
    """

    @staticmethod
    def forward(context: Any, target: Tensor, logits: Tensor) -> Tensor:
        shape, target, logits = logits.shape, target.flatten(0, -2), logits.flatten(0, -2)
        gradient = torch.empty_like(logits) if context.needs_input_grad[1] else None
        total = torch.zeros((), device=logits.device)
        for start in range(0, len(logits), TOKENS_AT_ONCE):
            rows = slice(start, start + TOKENS_AT_ONCE)
            expected, found = (values[rows].float().log_softmax(dim=-1) for values in (target, logits))
            probabilities = expected.exp()
            total += expected.sub_(found).mul_(probabilities).sum()
            if gradient is not None:
                gradient[rows] = found.exp_().sub_(probabilities).div_(len(logits))
        context.save_for_backward(None if gradient is None else gradient.view(shape))
        return total / len(logits)

    @staticmethod
    def backward(context: Any, *outputs: Tensor) -> tuple[None, Tensor]:
        return None, context.saved_tensors[0] * outputs[0]


def _divergence(target: Tensor, logits: Tensor) -> Tensor:
    return _Divergence.apply(target, logits)


def _relative_error(target: Tensor, found: Tensor) -> Tensor:
    target, found = target.float(), found.float()
    return (found - target).square().sum() / target.square().sum()


@contextmanager
def _checkpointed(blocks: nn.ModuleList) -> Iterator[None]:
    """Inside, gradients are computed block by block.

    transformers' own checkpointing works in training mode only, in which there would be dropout.
    """
    try:
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)
