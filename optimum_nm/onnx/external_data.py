"""Initializers that are the checkpoint's own bytes: external data whose file is the safetensors file."""

from __future__ import annotations

from collections.abc import Iterable

from onnx import TensorProto, helper

from ..config import LayerConfig
from ..errors import NMError
from ..packing.checkpoint import PackedCheckpoint
from ..packing.packed_weight import TENSOR_NAMES
from ..packing.safetensors_files import TensorLocation
from ..patterns import NMPattern
from .operator import packed_inputs

MODEL_FILE = "model.onnx"
FLOAT_TYPES = {"F32": TensorProto.FLOAT, "F16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16}
_FLOAT_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_DENSE = NMPattern(16, 16)


def external_initializer(
    name: str, location: TensorLocation, element_type: int, shape: Iterable[int] | None = None
) -> TensorProto:
    """An initializer whose bytes are those at `location`, in the folder that the ONNX file will be in.

    `shape` and `element_type` say how the bytes are to be read; the shape is the stored one by default.
    """
    tensor = TensorProto(name=name, data_type=element_type, dims=location.shape if shape is None else shape)
    tensor.data_location = TensorProto.EXTERNAL
    entries = {"location": location.file.name, "offset": location.offset, "length": location.nbytes}
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def dense_layer_config(location: TensorLocation, tensor_name: str) -> LayerConfig:
    """How a plain `[out_features, in_features]` float matrix reads as a packed weight: N = M, and nothing but values.

    Raises:
        NMError: the matrix is not float32, float16 or bfloat16.
    """
    if location.dtype not in _FLOAT_NAMES:
        raise NMError(f"{tensor_name} in {location.file} is {location.dtype}; it must be one of F32, F16, BF16.")
    return LayerConfig(_DENSE, None, _FLOAT_NAMES[location.dtype], -1, "codes", "float16")


class CheckpointInitializers:
    """Initializers of one graph that refer to a checkpoint's tensors, each made once, under the tensor's name.

    Attributes:
        tensors: what was asked for so far, by name.
    """

    def __init__(self, checkpoint: PackedCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.tensors: dict[str, TensorProto] = {}

    def dense(self, tensor_name: str) -> tuple[str, int]:
        """Name and element type of the initializer for a float tensor as it is stored.

        Raises:
            NMError: the tensor is missing, or not float32, float16 or bfloat16.
        """
        location = self.checkpoint.locate(tensor_name)
        dense_layer_config(location, tensor_name)
        return self._add(tensor_name, location, FLOAT_TYPES[location.dtype]), FLOAT_TYPES[location.dtype]

    def packed_layer(self, layer: str) -> tuple[LayerConfig, list[str]]:
        """How a packed layer is stored, and the names of its MatMulNM inputs values … outlier_positions."""
        config = self.checkpoint.check_layer(layer)
        names = []
        for role, (shape, element_type) in packed_inputs(*self.checkpoint.features[layer], config).items():
            if 0 in shape:
                names.append(self._empty(element_type))
            else:
                location = self.checkpoint.locate(f"{layer}.{role}")
                names.append(self._add(f"{layer}.{role}", location, element_type))
        return config, names

    def dense_layer(self, tensor_name: str) -> tuple[LayerConfig, list[str]]:
        """As `packed_layer`, for a plain `[out_features, in_features]` matrix."""
        config = dense_layer_config(self.checkpoint.locate(tensor_name), tensor_name)
        values, _ = self.dense(tensor_name)
        empty = {name: self._empty(kind) for name, (_, kind) in packed_inputs(1, 1, config).items() if name != "values"}
        return config, [values, *(empty[name] for name in TENSOR_NAMES[1:])]

    def bias(self, tensor_name: str | None) -> str:
        """Name of the initializer for a bias; an empty one for None."""
        return self._empty(TensorProto.FLOAT) if tensor_name is None else self.dense(tensor_name)[0]

    def _add(self, name: str, location: TensorLocation, element_type: int) -> str:
        if name not in self.tensors:
            self.tensors[name] = external_initializer(name, location, element_type)
        return name

    def _empty(self, element_type: int) -> str:
        name = f"empty_{helper.tensor_dtype_to_string(element_type).rpartition('.')[2].lower()}"
        if name not in self.tensors:
            self.tensors[name] = helper.make_tensor(name, element_type, (0,), b"", raw=True)
        return name


def check_files(checkpoint: PackedCheckpoint) -> None:
    """Raise NMError unless ONNX readers will follow a reference from model.onnx into the checkpoint's files.

    For their safety they refuse links that leave the folder, and files with several hard links.
    """
    for file in sorted({location.file for location in checkpoint.locations.values()}):
        if file.resolve().parent != checkpoint.folder.resolve() or file.stat().st_nlink > 1:
            raise NMError(f"{file} is a link, which ONNX readers do not follow; export to another folder (output=…).")
