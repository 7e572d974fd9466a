"""Whether the weights that a model.onnx points at are those of the checkpoint beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto

from ..config import OUTPUT_LAYERS, LayerConfig
from ..onnx.external_data import dense_layer_config
from ..onnx.operator import INPUT_NAMES, is_matmul_nm, node_attributes, packed_inputs
from ..packing.checkpoint import PackedCheckpoint
from ..packing.packed_weight import TENSOR_NAMES
from ..packing.safetensors_files import TensorLocation

STRING = onnx.AttributeProto.STRING
ONNX_TYPES = {
    "BOOL": TensorProto.BOOL,
    "U8": TensorProto.UINT8,
    "I8": TensorProto.INT8,
    "I16": TensorProto.INT16,
    "I32": TensorProto.INT32,
    "I64": TensorProto.INT64,
    "F16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
    "F32": TensorProto.FLOAT,
    "F64": TensorProto.DOUBLE,
}


@dataclass(frozen=True)
class Rows:
    """Rows `begin` … `end`−1 of a tensor of the checkpoint."""

    tensor: str
    begin: int
    end: int


def onnx_problems(path: Path, checkpoint: PackedCheckpoint) -> Iterator[str]:
    """One sentence for each thing in which `path` and the checkpoint in the same folder do not agree.

    Every external reference must lie inside a file of the folder and, where that is one of the checkpoint's, be whole
    rows of one of its tensors, or of several that follow each other, with the element type that stands for the stored
    bits; every MatMulNM node must read the same rows of every tensor of a layer, each in its place, with that layer's
    attributes. A matrix stored as it is counts as N = M.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, ValueError, OSError) as error:
        yield f"{path} is not a readable ONNX file ({' '.join(str(error).split())})."
        return
    if not model.graph.node:
        yield f"{path} has no nodes; it is not a model."
    pointed: dict[str, list[Rows]] = {}
    for initializer in model.graph.initializer:
        if initializer.data_location == TensorProto.EXTERNAL:
            problem = _reference_problem(path, initializer, checkpoint, pointed)
            if problem is not None:
                yield f"{path.name}: initializer {initializer.name!r} {problem}"
    for node in model.graph.node:
        if is_matmul_nm(node):
            yield from (f"{path.name}: node {node.name!r} {text}" for text in _node_problems(node, pointed, checkpoint))


def _reference_problem(
    path: Path, initializer: TensorProto, checkpoint: PackedCheckpoint, pointed: dict[str, list[Rows]]
) -> str | None:
    """What is wrong with an external reference; the rows it points at are noted in `pointed`."""
    entries = {entry.key: entry.value for entry in initializer.external_data}
    try:
        location, offset, length = entries["location"], int(entries.get("offset", "0")), int(entries["length"])
    except (KeyError, ValueError):
        return f"has the external reference {entries}; location, offset and length are needed."
    # A string that is not UTF-8 is bytes to protobuf.
    if not isinstance(location, str) or Path(location).name != location or not _is_file(path.parent / location):
        return f"lies in {location!r}, which is no file of the folder."
    file = path.parent / location
    size = file.stat().st_size
    if offset < 0 or length < 0 or offset + length > size:
        return f"is bytes {offset} to {offset + length} of {location}, which has {size}."
    if length == 0 or file not in {place.file for place in checkpoint.locations.values()}:
        return None
    places = {name: place for name, place in checkpoint.locations.items() if place.file == file and place.nbytes}
    rows = _rows_at(offset, length, places)
    if not rows:
        return f"begins at byte {offset} of {location}, where no tensor begins, nor a row of one."
    pointed[initializer.name] = rows
    first = places[rows[0].tensor]
    shape = [sum(part.end - part.begin for part in rows), *first.shape[1:]] if first.shape else []
    stored = sum((part.end - part.begin) * _row_bytes(places[part.tensor]) for part in rows)
    found = f"{_type_name(initializer.data_type)} {list(initializer.dims)} in {length} bytes"
    wanted = f"{_type_name(_element_type(checkpoint, rows[0].tensor))} {shape} in {stored} bytes"
    return None if found == wanted else f"is {found}, but {rows[0].tensor!r} in {location} is {wanted}."


def _rows_at(offset: int, length: int, places: dict[str, TensorLocation]) -> list[Rows]:
    """The rows of one file's tensors from a byte on, up to the row that holds the last of `length` bytes.

    They end early where the next tensor has rows of another kind; there are none if no row begins at the byte.
    """
    rows: list[Rows] = []
    at, end = offset, offset + length
    for name, place in sorted(places.items(), key=lambda item: item[1].offset):
        if not place.offset <= at < min(end, place.offset + place.nbytes):
            continue
        row = _row_bytes(place)
        if (at - place.offset) % row or (rows and _row_kind(place) != _row_kind(places[rows[0].tensor])):
            break
        begin = (at - place.offset) // row
        count = min(-(-(end - at) // row), place.nbytes // row - begin)
        rows.append(Rows(name, begin, begin + count))
        at += count * row
    return rows


def _row_bytes(place: TensorLocation) -> int:
    return place.nbytes // (place.shape[0] if place.shape else 1)


def _row_kind(place: TensorLocation) -> tuple[str, tuple[int, ...]]:
    return place.dtype, place.shape[1:]


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except (OSError, ValueError):  # names that no file can have
        return False


def _element_type(checkpoint: PackedCheckpoint, tensor_name: str) -> int:
    """The ONNX type of a tensor; packed ones are stored as integers that hold the bits of other types."""
    layer, _, role = tensor_name.rpartition(".")
    config = checkpoint.config.layer(layer)
    if role in TENSOR_NAMES and layer in checkpoint.features and config is not None:
        return packed_inputs(*checkpoint.features[layer], config)[role][1]
    return ONNX_TYPES[checkpoint.locate(tensor_name).dtype]


def _type_name(element_type: int) -> str:
    names = {number: name for name, number in TensorProto.DataType.items()}
    return names.get(element_type, f"type {element_type}")


def _node_problems(node: onnx.NodeProto, pointed: dict[str, list[Rows]], checkpoint: PackedCheckpoint) -> Iterator[str]:
    inputs = dict(zip(INPUT_NAMES, node.input, strict=False))
    values = pointed.get(inputs.get("values", ""), [])
    layers = [_layer_of(rows.tensor, checkpoint) for rows in values]
    if not layers or None in layers:
        yield "reads values that are not those of a layer of the checkpoint."
        return
    for rows, layer in zip(values, layers, strict=True):
        assert layer is not None
        if rows.tensor == f"{layer}.values":
            yield from _role_problems(rows, layer, inputs, pointed, checkpoint)
        config = _layer_config(rows.tensor, layer, checkpoint)
        if config is None:  # told with the checkpoint's own problems
            continue
        attributes = {
            attribute.name: attribute.s.decode(errors="replace") if attribute.type == STRING else attribute.i
            for attribute in node.attribute
        }
        count = sum(part.end - part.begin for part in values)
        for name, wanted in node_attributes(checkpoint.features[layer][0], count, config).items():
            if name != "accuracy_level" and attributes.get(name) != wanted:
                yield f"has {name} {attributes.get(name)!r}; the checkpoint says {wanted!r} for {layer!r}."


def _layer_of(tensor: str, checkpoint: PackedCheckpoint) -> str | None:
    """The linear layer whose values or weight a tensor is; an embedding is the weight of an output layer tied to it."""
    layer, _, role = tensor.rpartition(".")
    if layer in checkpoint.features:
        return layer if role in ("values", "weight") else None
    shape = tuple(reversed(checkpoint.locate(tensor).shape))
    tied = (name for name, features in checkpoint.features.items() if name in OUTPUT_LAYERS and features == shape)
    return next(tied, None) if role == "weight" else None


def _layer_config(tensor: str, layer: str, checkpoint: PackedCheckpoint) -> LayerConfig | None:
    if tensor == f"{layer}.values":
        return checkpoint.config.layer(layer)
    return dense_layer_config(checkpoint.locate(tensor), tensor)


def _role_problems(
    rows: Rows, layer: str, inputs: dict[str, str], pointed: dict[str, list[Rows]], checkpoint: PackedCheckpoint
) -> Iterator[str]:
    """Whether the other tensors are those of the same layer, and the same rows of them."""
    for role in TENSOR_NAMES[1:]:
        wanted = Rows(f"{layer}.{role}", rows.begin, rows.end)
        found = pointed.get(inputs.get(role, ""), [])
        if found and wanted not in found:
            yield f"reads {found[0].tensor!r} as {role} of {layer!r}."
