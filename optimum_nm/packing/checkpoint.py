"""PackedCheckpoint: the packed weights of a checkpoint folder, read on demand and checked against its configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import LayerConfig, NMConfig
from ..errors import NMError
from .packed_weight import TENSOR_NAMES, PackedWeight, packed_shapes
from .safetensors_files import DTYPES, TensorLocation, locate_tensors


class PackedCheckpoint:
    """A checkpoint folder: `config.json` and the tensors of its safetensors files, which are read only when asked for.

    Args:
        folder: holds config.json with a quantization_config and model.safetensors, sharded or not.

    Attributes:
        features: (in_features, out_features) of each linear layer, which the model's architecture tells, not the
            format; `optimum_nm.nn.skeleton.open_checkpoint` fills it in.

    Raises:
        NMError: a file is missing, truncated or inconsistent, or the format version is newer than this reader.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.model_config = self._read_model_config()
        self.config = NMConfig.from_pretrained(self.folder)
        self.locations: dict[str, TensorLocation] = locate_tensors(self.folder)
        self.features: dict[str, tuple[int, int]] = {}

    def _read_model_config(self) -> dict[str, Any]:
        path = self.folder / "config.json"
        if not path.exists():
            raise NMError(f"{self.folder} holds no config.json; it is not a checkpoint folder.")
        try:
            model_config = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise NMError(f"{path} is not readable JSON ({error}).") from None
        if not isinstance(model_config, dict) or "quantization_config" not in model_config:
            raise NMError(f"{path} has no quantization_config; it is not a packed checkpoint.")
        return model_config

    def layer_names(self) -> list[str]:
        """Names of the packed linears, in the order of the files."""
        suffix = ".values"
        return [name.removesuffix(suffix) for name in self.locations if name.endswith(suffix)]

    def layer_config(self, name: str) -> LayerConfig:
        """How layer `name` is stored."""
        config = self.config.layer(name)
        if config is None:
            raise NMError(f"{name}.values is in {self.folder}, but its configuration excludes {name!r} from packing.")
        return config

    def locate(self, tensor_name: str) -> TensorLocation:
        """Where a tensor's bytes lie.

        Raises:
            NMError: there is no such tensor.
        """
        if tensor_name not in self.locations:
            raise NMError(f"tensor {tensor_name!r} is missing from {self.folder}.")
        return self.locations[tensor_name]

    def tensor(self, tensor_name: str) -> Tensor:
        """Read one tensor into memory of its own."""
        location = self.locate(tensor_name)
        if location.nbytes == 0:
            return torch.empty(location.shape, dtype=DTYPES[location.dtype])
        with location.file.open("rb") as stream:
            stream.seek(location.offset)
            data = bytearray(stream.read(location.nbytes))
        return torch.frombuffer(data, dtype=DTYPES[location.dtype]).view(location.shape)

    def check_layer(self, name: str) -> LayerConfig:
        """How layer `name` is stored, after a check that the headers give its tensors the shapes and dtypes for it."""
        config = self.layer_config(name)
        if name not in self.features:
            raise NMError(f"{name}.values is in {self.folder}, but the model has no linear layer {name!r}.")
        for tensor_name, (shape, dtype) in packed_shapes(*self.features[name], config).items():
            location = self.locate(f"{name}.{tensor_name}")
            if (location.shape, DTYPES[location.dtype]) != (shape, dtype):
                raise NMError(
                    f"{name}.{tensor_name} in {location.file} is {location.dtype} {list(location.shape)}; "
                    f"the configuration asks for {str(dtype).removeprefix('torch.')} {list(shape)}."
                )
        return config

    def packed(self, name: str) -> PackedWeight:
        """Read layer `name`, its shapes and dtypes checked; positions are checked by `PackedWeight.validate`."""
        config = self.check_layer(name)
        present = [tensor for tensor in TENSOR_NAMES if f"{name}.{tensor}" in self.locations]
        tensors = {tensor: self.tensor(f"{name}.{tensor}") for tensor in present}
        return PackedWeight(*self.features[name], config, tensors)
