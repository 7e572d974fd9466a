"""The linear layers of a model: finding them, reading their weight, putting others in their place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import NMError

DENSE_LINEARS = (nn.Linear, Conv1D)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every dense linear layer by its full dotted name, in module order, inside decoder blocks or not.

    These are the names that `exclude` and `overrides` of NMConfig are matched against. Embeddings and packed layers are
    not among them.
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, DENSE_LINEARS)}


def dense_weight(module: nn.Module) -> Tensor:
    """The weight as `[out_features, in_features]`: a view of the parameter, which GPT-2's Conv1D holds transposed."""
    assert isinstance(module.weight, Tensor)
    return module.weight.t() if isinstance(module, Conv1D) else module.weight


@torch.no_grad()
def set_dense_weight(module: nn.Module, weight: Tensor) -> None:
    """Copy a `[out_features, in_features]` weight into the module, cast to the dtype it has."""
    dense_weight(module).copy_(weight)


def replace_linear(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the submodule called `name` is.

    Raises:
        NMError: the model has no such submodule.
    """
    parent_name, _, child = name.rpartition(".")
    try:
        parent = model.get_submodule(parent_name)
        parent.get_submodule(child)
    except AttributeError:
        raise NMError(f"{type(model).__name__} has no submodule {name!r} to replace.") from None
    setattr(parent, child, new)


def untie_output(model: PreTrainedModel, name: str) -> None:
    """Give the output layer `name` a weight of its own when it shares the input embedding's, and say so in the config.

    A user who asks for a packed output layer wants just that layer packed; the embedding, whose rows are looked up and
    not multiplied, stays as it is.
    """
    weight, module = model.get_input_embeddings().weight, model.get_submodule(name)
    if module.weight is weight and isinstance(weight, Tensor):
        module.weight = nn.Parameter(weight.detach().clone())
        _say_tied(model, False)


def tie_output(model: PreTrainedModel) -> None:
    """Let the output layer use the input embedding's weight, and say so in the config."""
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    _say_tied(model, True)


def _say_tied(model: PreTrainedModel, tied: bool) -> None:
    model_config: Any = model.config
    for config in (model_config, model_config.get_text_config()):
        config.tie_word_embeddings = tied
