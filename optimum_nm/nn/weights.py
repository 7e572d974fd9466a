"""The weights of a dense model that is being sparsified, which are in memory or come there when they are needed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import NMError
from ..packing.safetensors_files import TensorLocation
from ..packing.tensor_files import tensor_checksum
from ..packing.values import all_finite
from .experts import split_experts


class Weights(Protocol):
    """A dense model and access to its weights by the names of its state dictionary."""

    model: PreTrainedModel
    streamed: bool  # the weights are on the disk while they are not open

    @property
    def device(self) -> torch.device:
        """Where to compute."""

    def to(self, device: str | torch.device) -> None:
        """Compute elsewhere."""

    def check(self, names: Iterable[str]) -> None:
        """Raise NMError naming the first of these tensors that has an element which is not finite."""

    def open(self, names: Iterable[str]) -> None:
        """Have these tensors in the model.

        Raises:
            NMError: an element is not finite.
        """

    def prefetch(self, names: Iterable[str]) -> None:
        """Begin to read what `open` will be asked for next."""

    def close(self, names: Iterable[str]) -> None:
        """Give the memory of these tensors back; they are as they were before `open`."""

    def release(self, module: nn.Module) -> None:
        """Give the memory of all tensors of a module back, those of packed layers too; it is not needed any more."""

    def content(self, name: str, tensor: Tensor) -> Tensor | TensorLocation:
        """What is to be stored of a tensor of the model: itself, or the place where a file has it."""

    def digest(self) -> str:
        """Differs whenever a weight or the configuration does."""


class LoadedWeights:
    """Weights that are in memory and stay there."""

    streamed = False

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        split_experts(model)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def to(self, device: str | torch.device) -> None:
        self.model.to(device)  # type: ignore[arg-type]

    def check(self, names: Iterable[str]) -> None:
        tensors = self.model.state_dict()
        for name in names:
            check_finite(name, tensors[name])

    def open(self, names: Iterable[str]) -> None:
        self.check(names)

    def prefetch(self, names: Iterable[str]) -> None: ...

    def close(self, names: Iterable[str]) -> None: ...

    def release(self, module: nn.Module) -> None: ...

    def content(self, name: str, tensor: Tensor) -> Tensor | TensorLocation:
        return tensor

    def digest(self) -> str:
        digest = hashlib.sha256(self.model.config.to_json_string().encode())
        for name, tensor in self.model.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor_checksum(tensor)}\n".encode())
        return digest.hexdigest()


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise NMError if an element is not finite."""
    if not all_finite(tensor):
        raise NMError(f"{name} has elements that are not finite; every weight must be a finite number.")
