"""NMEmbedding: an input embedding that is the packed output layer, as the dense model ties the two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import LayerConfig
from ..errors import NMError
from ..packing.packed_weight import TENSOR_NAMES, PackedWeight
from .linear import NMLinear


class NMEmbedding(nn.Module):
    """Row `t` of the packed weight for each token `t`, unpacked when it is looked up. It has no tensors of its own.

    Args:
        output_layer: packed with N = M, `[tokens, width]`.
        dtype: of what is looked up.
    """

    def __init__(self, output_layer: NMLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings = output_layer.out_features
        self.embedding_dim = output_layer.in_features
        self.dtype = dtype
        self._output_layer = (output_layer,)  # in a tuple it is no submodule, whose tensors would be saved twice

    @property
    def output_layer(self) -> NMLinear:
        return self._output_layer[0]

    def forward(self, input: Tensor) -> Tensor:
        """int64 `[...]` to `[..., width]`."""
        layer = self.output_layer
        tokens = input.reshape(-1)
        stored = {name: getattr(layer, name) for name in TENSOR_NAMES if getattr(layer, name) is not None}
        rows = {name: tensor[tokens].cpu() for name, tensor in stored.items()}
        looked_up = PackedWeight(layer.in_features, len(tokens), layer.config, rows).unpack(self.dtype)
        return looked_up.to(input.device).view(*input.shape, self.embedding_dim)

    def _apply(self, fn: Any, recurse: bool = True) -> NMEmbedding:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


def check_shareable(model: PreTrainedModel, layer: LayerConfig | None) -> None:
    """Raise NMError unless the output layer, packed as `layer` says, can serve as the input embedding too."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    if layer is None or not layer.pattern.is_dense or layer.outliers is not None:
        how = "not packed" if layer is None else f"packed {layer.pattern} with outliers {layer.outliers}"
        raise NMError(f"share_embedding is set, but the output layer is {how}; it must be packed N = M, no outliers.")
    rows = (output.out_features, output.in_features) if isinstance(output, (nn.Linear, NMLinear)) else None
    if type(embedding) is not nn.Embedding or (embedding.num_embeddings, embedding.embedding_dim) != rows:
        raise NMError(
            f"share_embedding is set, but {type(model).__name__} looks up {embedding} and ends in {output}; a plain "
            "embedding and an output layer of the same shape are needed."
        )


def share_embedding(model: PreTrainedModel) -> None:
    """Let the input embedding look up the rows of the packed output layer, in place."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(output, NMLinear) and isinstance(embedding.weight, Tensor)
    model.set_input_embeddings(NMEmbedding(output, embedding.weight.dtype))
