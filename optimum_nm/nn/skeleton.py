"""A checkpoint's model without its weights, which is what tells a packed layer's width."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel

from ..errors import NMError
from ..packing.checkpoint import PackedCheckpoint
from .convert import dense_weight, linear_layers
from .experts import split_experts
from .modeling import auto_class


def model_skeleton(folder: str | Path) -> PreTrainedModel:
    """The model of a folder's config.json on the meta device: every shape, no memory.

    Raises:
        NMError: transformers does not know the model type, or it is neither a causal language model nor an encoder.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = auto_class(config).from_config(config)
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise NMError(f"{folder}/config.json describes no causal language model or encoder: {reason}") from None
    split_experts(model)
    return model


def open_checkpoint(folder: str | Path) -> PackedCheckpoint:
    """The packed checkpoint in `folder`, its layers' widths taken from the model's configuration.

    Raises:
        NMError: as PackedCheckpoint and `model_skeleton`.
    """
    checkpoint = PackedCheckpoint(folder)
    for name, module in linear_layers(model_skeleton(folder)).items():
        out_features, in_features = dense_weight(module).shape
        checkpoint.features[name] = (in_features, out_features)
    return checkpoint
