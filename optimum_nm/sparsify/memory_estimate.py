"""How much memory a run is going to take."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import NMConfig
from ..memory import memory_bytes
from ..nn.convert import dense_weight, linear_layers
from ..nn.weights import Weights
from .block_inputs import TOKENS_PER_BATCH
from .layer import needs_gram, whole_block_at_once
from .statistics import FLOAT32, in_parts, statistics_bytes

SOLVER_COPIES = 8  # of the layer that is being solved, in float32
SOLVER_GRAM_COPIES = {"admm": 3, "sparsegpt": 3, "alps": 8}  # of its Gram matrix, in float32
DISTILLATION_COPIES = 6  # of all blocks' weights, in float32: masters, gradients, moments, the best so far, and masks
HIDDEN_COPIES = 13  # that a block keeps of a token for its gradient, beside what its linears take and give
LOGITS_COPIES = 4  # of a batch, in float32: of both models, their gradient, probabilities
TRAINING_COPIES = 8  # of a block's weights, in float32: masters, gradients, moments, the best so far, what is stored
INTERMEDIATES = 4  # of a batch, as wide as the widest layer


def activation_bytes(model: PreTrainedModel, windows: Tensor, config: NMConfig) -> int:
    """Bytes of hidden states that live from block to block: the inputs, and the targets of fine-tuning."""
    sets = 1 if config.finetune is None else 2
    return sets * windows.numel() * model.config.get_text_config().hidden_size * model.dtype.itemsize


def estimate_bytes(weights: Weights, blocks: nn.ModuleList, windows: Tensor, config: NMConfig, spilled: bool) -> int:
    """Memory of the process at most: what it has now, and what embeddings or, if it is more, the largest block adds.

    A block adds its weights, with those of the next, where they are streamed; the solver's copies of its largest layer
    and of the Gram matrix of that one, Gram matrices or sampled inputs, the intermediate results of one batch, and
    training's copies. Hidden states that are not `spilled` stay.
    """
    model, tuning = weights.model, config.finetune_settings
    shapes = [[tuple(dense_weight(module).shape) for module in linear_layers(block).values()] for block in blocks]
    size = max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks)
    gram_copies = SOLVER_GRAM_COPIES.get(config.solver, 0)
    layer = max(
        SOLVER_COPIES * outputs * inputs + gram_copies * inputs**2 for block in shapes for outputs, inputs in block
    )
    widest = max(width for block in shapes for shape in block for width in shape)
    tokens = tuning.batch_size * windows.shape[1] if tuning else max(TOKENS_PER_BATCH, windows.shape[1])
    element = model.dtype.itemsize
    block_bytes = (
        2 * size * element * weights.streamed
        + INTERMEDIATES * min(tokens, windows.numel()) * widest * element
        + FLOAT32 * (layer + TRAINING_COPIES * size * (tuning is not None))
        + max(_statistics_bytes(block, config) for block in blocks)
    )
    around = sum(parameter.numel() for parameter in model.parameters()) - sum(
        parameter.numel() for block in blocks for parameter in block.parameters()
    )
    kept = 0 if spilled else activation_bytes(model, windows, config)
    bytes_at_most = memory_bytes()[0] + max(block_bytes, around * element * weights.streamed) + kept
    return bytes_at_most + _distillation_bytes(model, blocks, windows, config)


def _distillation_bytes(model: PreTrainedModel, blocks: nn.ModuleList, windows: Tensor, config: NMConfig) -> int:
    """What distillation adds: training's copies, and of a batch the logits and what blocks keep for their gradients:
    their inputs, or all within them.

    The copy of the dense model is there from the beginning.
    """
    settings = config.distill_settings
    if settings is None:
        return 0
    text = model.config.get_text_config()
    tokens = min(settings.batch_size, config.distill_samples) * windows.shape[1]
    trained = sum(parameter.numel() for block in blocks for parameter in block.parameters())
    kept = text.hidden_size
    if not settings.gradient_checkpointing:
        outputs = sum(dense_weight(linear).shape[0] for linear in linear_layers(blocks[0]).values())
        kept = 2 * outputs + HIDDEN_COPIES * text.hidden_size
    activations = tokens * (len(blocks) * kept + LOGITS_COPIES * text.vocab_size)
    return FLOAT32 * (DISTILLATION_COPIES * trained + activations)


def _statistics_bytes(block: nn.Module, config: NMConfig) -> int:
    """Of the layers of a block that are measured at once."""
    linears, with_gram = linear_layers(block), needs_gram(config)
    parts = [linears] if whole_block_at_once(config) else in_parts(linears, with_gram)
    return max(statistics_bytes(part, with_gram) for part in parts)
