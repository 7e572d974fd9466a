"""How much the model's loss depends on each output of its linear layers: the diagonal of the Fisher information."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import NMError
from ..nn.convert import dense_weight
from ..packing.values import all_finite
from .block_inputs import BlockInputs


def output_fisher(
    inputs: BlockInputs, linears: dict[str, nn.Module], seed: int, progress: bool = False
) -> dict[str, Tensor]:
    """E[(∂ log p / ∂y_i)²] of every output y_i of every linear layer, a mean over tokens.

    The next tokens are drawn from the model itself, so that ½ Σ_i E[…]·E[δ_i²] is what errors δ of the outputs add to
    the divergence from the dense model's predictions, to second order, errors of different tokens taken as
    independent. Gradients go back block by block, each computed anew from its input: beside the hidden states of one
    batch there is one block's graph in memory.

    Args:
        inputs: of the dense model, before its first block.
        linears: {full name: module}, in blocks and outside.
        seed: of the tokens drawn.
        progress: show a progress bar over the batches.

    Returns:
        float32 `[out_features]` by name; zeros for a layer that no token reaches.

    Raises:
        NMError: the model's predictions, or a layer's gradients, are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    sums = {name: torch.zeros(dense_weight(module).shape[0]) for name, module in linears.items()}
    tokens = 0
    for batch, hidden in enumerate(tqdm(inputs.hidden, desc="Sensitivity", unit="batch", disable=not progress)):
        states = [hidden]
        for index in range(len(inputs.blocks)):
            states.append(inputs.run(index, batch, states[-1]))
        tokens += states[-1].shape[:-1].numel()
        with torch.enable_grad(), _squared_gradients(linears, sums) as watched:
            final = states.pop().detach().requires_grad_()
            logits = inputs.logits(batch, final).float().flatten(0, -2)
            if not all_finite(logits):
                raise NMError("the dense model's predictions are not finite; load it with dtype='float32'.")
            drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator).flatten()
            loss = nn.functional.cross_entropy(logits, drawn.to(logits.device), reduction="sum")
            (gradient,) = torch.autograd.grad(loss, final)
            del logits, loss
            for index in reversed(range(len(inputs.blocks))):
                watched.clear()  # or the graphs of all blocks would stay
                state = states.pop().detach().requires_grad_()
                (gradient,) = torch.autograd.grad(inputs.run(index, batch, state), state, gradient)
            watched.clear()
            entry = inputs.entry(batch)
            if watched:  # linears before the first block, as OPT's project_in
                torch.autograd.grad(entry, watched, gradient)
    for name, total in sums.items():
        if not all_finite(total):
            raise NMError(f"{name} has gradients that are not finite; load the model with dtype='float32'.")
    return {name: total / tokens for name, total in sums.items()}


@contextmanager
def _squared_gradients(linears: dict[str, nn.Module], sums: dict[str, Tensor]) -> Iterator[list[Tensor]]:
    """Adds the squares of the gradients of outputs, summed over tokens, to `sums`; yields the outputs as they come."""
    watched: list[Tensor] = []

    def watch(name: str, output: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            sums[name] += gradient.detach().float().flatten(0, -2).square().sum(dim=0).cpu()

        if output.requires_grad:
            output.register_hook(add)
            watched.append(output)

    with ExitStack() as hooks:
        for name, module in linears.items():
            hooks.enter_context(module.register_forward_hook(lambda _, __, output, name=name: watch(name, output)))
        yield watched
