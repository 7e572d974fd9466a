"""Weight equalization (SmoothQuant, 2211.10438): move scale between the columns of a weight and its inputs.

`W' = W·diag(s)`, `X' = X/s`, so that `X' W'ᵀ = X Wᵀ`. Mode "score" uses W' and X' for statistics only; mode "fold"
puts 1/s into what computes X, which leaves the dense model's function as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..nn.convert import DENSE_LINEARS, dense_weight, set_dense_weight
from .ranks import broadcast
from .statistics import InputStatistics

# The linear whose outputs, one by one, scale the inputs of another of the same parent module.
PRODUCERS = {"o_proj": "v_proj", "out_proj": "v_proj", "down_proj": "up_proj", "w2": "w3"}
# A fold that does not change the function changes a block's update by rounding only: this much of it, relatively.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def equalization_scale(input_max: Tensor, weight_max: Tensor, alpha: float) -> Tensor:
    """s_j = max_t|X_tj|^α / max_i|W_ij|^(1−α), `[in_features]`; 1 where a maximum is zero or s is out of range."""
    scale = input_max.pow(alpha) / weight_max.pow(1 - alpha)
    usable = (input_max > 0) & (weight_max > 0) & (scale > 1e-6) & (scale < 1e6)
    return torch.where(usable, scale, 1.0)


@torch.no_grad()
def fold_block(
    block: nn.Module,
    linears: dict[str, nn.Module],
    statistics: dict[str, InputStatistics],
    hidden: Tensor,
    run: Callable[[], Tensor],
    alpha: float,
) -> set[str]:
    """Equalize a block's linears for good, wherever what precedes them can take 1/s.

    Candidates are found by structure (a norm whose output tensor goes into linears; v_proj and o_proj, up_proj and
    down_proj side by side, grouped-query heads sharing their s), and each is kept only if the block's output stays the
    same on a calibration batch: a norm that also feeds something else, or a nonlinearity in between, is undone.

    Args:
        block: changed in place.
        linears: {full name: module} of the block.
        statistics: per name; rescaled in place.
        hidden: the block's input for one batch.
        run: computes the block's output for that batch.
        alpha: α of the scale.

    Returns:
        Names of the linears whose inputs are now equalized.
    """
    folded: set[str] = set()
    groups, output = _normed_groups(block, linears, run)
    allowed = _TOLERANCE[output.dtype] * (output.float() - hidden.float()).norm()

    def holds(changed: list[nn.Module], fold: Callable[[], None]) -> bool:
        kept = [(parameter, parameter.detach().clone()) for module in changed for parameter in module.parameters()]
        fold()
        if broadcast(bool((run().float() - output.float()).norm() <= allowed)):
            return True
        for parameter, value in kept:
            parameter.copy_(value)
        return False

    for norm, names in groups:
        weight_max = torch.stack([dense_weight(linears[name]).float().abs().amax(dim=0) for name in names]).amax(dim=0)
        scale = equalization_scale(statistics[names[0]].absolute_max, weight_max, alpha)
        consumers = [linears[name] for name in names]
        if holds([norm, *consumers], partial(_fold_norm, norm, consumers, scale)):
            statistics[names[0]].rescale(scale)
            folded.update(names)
    for name, module in linears.items():
        parent, _, child = name.rpartition(".")
        producer = linears.get(f"{parent}.{PRODUCERS.get(child)}")
        if producer is None or module is producer:
            continue
        scales = _shared_scale(producer, module, block, statistics[name].absolute_max, alpha)
        if scales is not None and holds([producer, module], partial(_fold_producer, producer, module, *scales)):
            statistics[name].rescale(scales[1])
            folded.add(name)
    return folded


def _normed_groups(
    block: nn.Module, linears: dict[str, nn.Module], run: Callable[[], Tensor]
) -> tuple[list[tuple[nn.Module, list[str]]], Tensor]:
    """Norms of the block with the linears that take their output tensor as it is; and the block's output."""
    outputs: list[tuple[nn.Module, Tensor]] = []
    groups: dict[nn.Module, list[str]] = {}

    def record_output(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        outputs.append((module, output))

    def record_input(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            for norm, output in outputs:
                if output is args[0]:
                    groups.setdefault(norm, []).append(name)

        return record

    hooks = [module.register_forward_hook(record_output) for module in block.modules() if _is_norm(module)]
    hooks += [module.register_forward_pre_hook(record_input(name)) for name, module in linears.items()]
    try:
        block_output = run()
    finally:
        for hook in hooks:
            hook.remove()
    return list(groups.items()), block_output


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1 and not isinstance(module, DENSE_LINEARS)


def _fold_norm(norm: nn.Module, linears: list[nn.Module], scale: Tensor) -> None:
    for module in linears:
        set_dense_weight(module, dense_weight(module).float() * scale)
    offset = _weight_offset(norm)
    assert isinstance(norm.weight, Tensor)
    norm.weight.copy_((norm.weight.float() + offset) / scale - offset)
    bias = getattr(norm, "bias", None)
    if bias is not None:
        bias.copy_(bias.float() / scale)


def _fold_producer(producer: nn.Module, consumer: nn.Module, output_scale: Tensor, input_scale: Tensor) -> None:
    set_dense_weight(consumer, dense_weight(consumer).float() * input_scale)
    set_dense_weight(producer, dense_weight(producer).float() / output_scale[:, None])
    bias = getattr(producer, "bias", None)
    if bias is not None:
        bias.copy_(bias.float() / output_scale)


def _weight_offset(norm: nn.Module) -> float:
    """1 for norms that multiply by (1 + weight), as Gemma's do, else 0."""
    assert isinstance(norm.weight, Tensor)
    kept = norm.weight.clone()
    probe = torch.linspace(-1, 1, len(kept), device=kept.device, dtype=kept.dtype)
    norm.weight.zero_()
    zero_output = norm(probe[None])
    norm.weight.fill_(-1)
    minus_one_output = norm(probe[None])
    norm.weight.copy_(kept)
    # With weight −1 a (1 + weight) norm gives its bias alone; a plain norm does so with weight 0.
    bias = getattr(norm, "bias", None)
    base = torch.zeros_like(zero_output) if bias is None else bias.expand_as(zero_output)
    return 1.0 if (minus_one_output - base).abs().max() < (zero_output - base).abs().max() else 0.0


def _shared_scale(
    producer: nn.Module, consumer: nn.Module, block: nn.Module, input_max: Tensor, alpha: float
) -> tuple[Tensor, Tensor] | None:
    """Scales of the producer's outputs and of the consumer's inputs; None if their widths do not fit.

    With grouped-query heads several inputs come from one output: input (head, repeat, i) from output (head, i).
    """
    inputs, outputs = dense_weight(consumer).shape[1], dense_weight(producer).shape[0]
    weight_max = dense_weight(consumer).float().abs().amax(dim=0)
    if inputs == outputs:
        scale = equalization_scale(input_max, weight_max, alpha)
        return scale, scale
    head_dims = [getattr(module, "head_dim", None) for module in block.modules()]
    head_dim = next((width for width in head_dims if isinstance(width, int)), None)
    if head_dim is None or inputs % outputs or outputs % head_dim:
        return None
    heads = outputs // head_dim
    grouped_max = input_max.view(heads, -1, head_dim).amax(dim=1)
    scale = equalization_scale(grouped_max, weight_max.view(heads, -1, head_dim).amax(dim=1), alpha)
    repeated = scale[:, None].expand(heads, inputs // outputs, head_dim)
    return scale.reshape(-1), repeated.reshape(-1)
