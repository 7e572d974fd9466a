"""The blocks of any transformers language model, found by structure rather than by a list of model types."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ..errors import NMError
from ..nn.convert import linear_layers


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The name and the list of the blocks that hidden states pass through one after the other.

    It is the outermost ModuleList as long as the configuration's number of layers whose members hold linear layers:
    `model.layers`, `transformer.h`, `model.decoder.layers`, `gpt_neox.layers`, `encoder.layer`, …

    Raises:
        NMError: the model has none.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and all(map(linear_layers, module)):
            return name, module
    raise NMError(
        f"model type {model.config.model_type!r} has no decoder blocks; a causal language model that is a list of "
        "transformer blocks with linear layers is needed."
    )


def output_layer_name(model: PreTrainedModel) -> str | None:
    """The full name of the layer that computes the logits: `lm_head`, for GPT-NeoX `embed_out`; None without one."""
    output = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is output and output is not None), None)
