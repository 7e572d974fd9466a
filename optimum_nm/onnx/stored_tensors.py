"""Which bytes of a checkpoint each parameter of a constructed graph is, found without reading a weight.

mobius renames and cuts the tensors of a Hugging Face checkpoint as its graphs need them. It is given tensors without
memory in place of matrices and biases; what it makes of them is a renamed tensor or some of its rows, which the storage
they share tells. Rows of a packed weight are stored independently, so a range of them is a range of bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from onnx import TensorProto, helper
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ..config import LayerConfig
from ..errors import NMError
from ..nn.convert import linear_layers
from ..nn.skeleton import model_skeleton
from ..packing.checkpoint import PackedCheckpoint
from ..packing.packed_weight import TENSOR_NAMES
from ..packing.safetensors_files import TensorLocation
from .external_data import FLOAT_TYPES, dense_layer_config, external_initializer
from .operator import packed_inputs


@dataclass(frozen=True)
class StoredRows:
    """Rows `begin` … `end`−1 of a stored matrix `[…, width]` or vector.

    Attributes:
        name: a packed layer, or a tensor stored as it is.
        whole: these are all its rows.
    """

    name: str
    begin: int
    end: int
    whole: bool

    def label(self, role: str = "") -> str:
        """Name of the initializer for these rows of tensor `name`, or of its packed tensor `role`."""
        name = f"{self.name}.{role}" if role else self.name
        return name if self.whole else f"{name}[{self.begin}:{self.end}]"


@dataclass(frozen=True)
class StoredMatrix:
    """What a MatMulNM node needs: `inputs` are values … outlier_positions, the absent ones empty."""

    in_features: int
    out_features: int
    config: LayerConfig
    inputs: list[TensorProto]


class StoredTensors:
    """The tensors of a checkpoint under the names of the dense model, and the way back to their bytes.

    Args:
        checkpoint: from `optimum_nm.nn.skeleton.open_checkpoint`.

    Attributes:
        state_dict: matrices `[out_features, in_features]` (`[in_features, out_features]` for Conv1D), embeddings and
            biases of linear layers on the meta device; norms and other vectors as float32 values.
        unused: packed layers and stored parameters that nothing was asked for yet.

    Raises:
        NMError: a packed tensor is missing or not what the configuration asks for.
    """

    def __init__(self, checkpoint: PackedCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.state_dict: dict[str, Tensor] = {}
        self._owners: dict[int, tuple[str, Tensor]] = {}
        skeleton = model_skeleton(checkpoint.folder)
        linears = linear_layers(skeleton)
        packed = checkpoint.layer_names()
        self.unused = {*packed, *checkpoint.locations.keys() & dict(skeleton.named_parameters()).keys()}
        for name in packed:
            checkpoint.check_layer(name)
            in_features, out_features = checkpoint.features[name]
            matrix = self._without_memory(name, (out_features, in_features))
            self.state_dict[f"{name}.weight"] = matrix.t() if isinstance(linears[name], Conv1D) else matrix
        roles = {f"{name}.{role}" for name in packed for role in TENSOR_NAMES}
        biases = {f"{name}.bias" for name in linears}
        for name, location in checkpoint.locations.items():
            if name in roles:
                continue
            if len(location.shape) > 1 or name in biases:
                self.state_dict[name] = self._without_memory(name, location.shape)
            else:
                self.state_dict[name] = checkpoint.tensor(name).float()
                self._own(name, self.state_dict[name])
        if checkpoint.config.share_embedding:
            names = {id(module): name for name, module in skeleton.named_modules()}
            embedding, output = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
            self.state_dict[f"{names[id(embedding)]}.weight"] = self.state_dict[f"{names[id(output)]}.weight"]

    def _without_memory(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.empty(shape, device="meta")
        self._own(name, tensor)
        return tensor

    def _own(self, name: str, tensor: Tensor) -> None:
        self._owners[tensor.untyped_storage()._cdata] = (name, tensor)

    def find(self, tensor: Tensor) -> StoredRows | None:
        """The stored rows that a tensor made from `state_dict` is, or None if it is anything else."""
        name, owner = self._owners.get(tensor.untyped_storage()._cdata, ("", tensor))
        row = owner[:1].numel()
        same_row = tensor.is_contiguous() and tensor.shape[1:] == owner.shape[1:] and tensor.dtype == owner.dtype
        if not name or not same_row or tensor.storage_offset() % row:
            return None
        begin = tensor.storage_offset() // row
        return StoredRows(name, begin, begin + tensor.shape[0], tensor.shape == owner.shape)

    def is_packed(self, rows: StoredRows) -> bool:
        return f"{rows.name}.values" in self.checkpoint.locations

    def matrix(self, rows: StoredRows) -> StoredMatrix:
        """The packed weight that a linear layer multiplies by; a matrix stored as it is counts as N = M.

        Raises:
            NMError: the matrix is stored as it is, but not as float32, float16 or bfloat16.
        """
        self.unused.discard(rows.name)
        packed = self.is_packed(rows)
        if packed:
            in_features, config = self.checkpoint.features[rows.name][0], self.checkpoint.layer_config(rows.name)
        else:
            location = self.checkpoint.locate(rows.name)
            in_features, config = location.shape[1], dense_layer_config(location, rows.name)
        inputs = []
        for role, (shape, element_type) in packed_inputs(in_features, rows.end - rows.begin, config).items():
            if 0 in shape:
                inputs.append(empty_initializer(element_type))
                continue
            stored = f"{rows.name}.{role}" if packed else rows.name
            part = _part(self.checkpoint.locate(stored), rows)
            inputs.append(external_initializer(rows.label(role if packed else ""), part, element_type, shape))
        return StoredMatrix(in_features, rows.end - rows.begin, config, inputs)

    def dense(self, rows: StoredRows) -> TensorProto:
        """An initializer for rows of a tensor stored as it is, of the stored type.

        Raises:
            NMError: the tensor is missing, or not float32, float16 or bfloat16.
        """
        self.unused.discard(rows.name)
        location = self.checkpoint.locate(rows.name)
        if location.dtype not in FLOAT_TYPES:
            raise NMError(f"{rows.name} in {location.file} is {location.dtype}; it must be one of F32, F16, BF16.")
        return external_initializer(rows.label(), _part(location, rows), FLOAT_TYPES[location.dtype])


def empty_initializer(element_type: TensorProto.DataType) -> TensorProto:
    """What stands for an absent tensor: ONNX Runtime cannot skip an input in the middle."""
    kind = helper.tensor_dtype_to_string(element_type).rpartition(".")[2].lower()
    return helper.make_tensor(f"empty_{kind}", element_type, (0,), b"", raw=True)


def _part(location: TensorLocation, rows: StoredRows) -> TensorLocation:
    row_bytes = location.nbytes // location.shape[0]
    count = rows.end - rows.begin
    return replace(
        location,
        offset=location.offset + rows.begin * row_bytes,
        nbytes=count * row_bytes,
        shape=(count, *location.shape[1:]),
    )
