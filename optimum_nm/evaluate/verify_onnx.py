"""Whether the weights that a model.onnx points at are those of the checkpoint beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto

from ..onnx.operator import INPUT_NAMES, is_matmul_nm, node_attributes, packed_inputs
from ..packing.checkpoint import PackedCheckpoint
from ..packing.packed_weight import TENSOR_NAMES

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


def onnx_problems(path: Path, checkpoint: PackedCheckpoint) -> Iterator[str]:
    """One sentence for each thing in which `path` and the checkpoint in the same folder do not agree.

    Every external reference must lie inside a file of the folder and, where that is one of the checkpoint's, be exactly
    one of its tensors, with the element type that stands for the stored bits; every MatMulNM node must read the tensors
    of one layer, each in its place, with that layer's attributes.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, ValueError, OSError) as error:
        yield f"{path} is not a readable ONNX file ({' '.join(str(error).split())})."
        return
    if not model.graph.node:
        yield f"{path} has no nodes; it is not a model."
    places = {(place.file.name, place.offset): name for name, place in checkpoint.locations.items() if place.nbytes}
    pointed: dict[str, str] = {}
    for initializer in model.graph.initializer:
        if initializer.data_location == TensorProto.EXTERNAL:
            problem = _reference_problem(path, initializer, places, checkpoint, pointed)
            if problem is not None:
                yield f"{path.name}: initializer {initializer.name!r} {problem}"
    for node in model.graph.node:
        if is_matmul_nm(node):
            yield from (f"{path.name}: node {node.name!r} {text}" for text in _node_problems(node, pointed, checkpoint))


def _reference_problem(
    path: Path,
    initializer: TensorProto,
    places: dict[tuple[str, int], str],
    checkpoint: PackedCheckpoint,
    pointed: dict[str, str],
) -> str | None:
    """What is wrong with an external reference; the tensor it points at is noted in `pointed`."""
    entries = {entry.key: entry.value for entry in initializer.external_data}
    try:
        location, offset, length = entries["location"], int(entries.get("offset", "0")), int(entries["length"])
    except (KeyError, ValueError):
        return f"has the external reference {entries}; location, offset and length are needed."
    file = path.parent / location
    if Path(location).name != location or not _is_file(file):
        return f"lies in {location!r}, which is no file of the folder."
    size = file.stat().st_size
    if offset < 0 or length < 0 or offset + length > size:
        return f"is bytes {offset} to {offset + length} of {location}, which has {size}."
    if length == 0 or file not in {place.file for place in checkpoint.locations.values()}:
        return None
    name = places.get((location, offset))
    if name is None:
        return f"begins at byte {offset} of {location}, where no tensor begins."
    pointed[initializer.name] = name
    place = checkpoint.locate(name)
    found = f"{_type_name(initializer.data_type)} {list(initializer.dims)} in {length} bytes"
    wanted = f"{_type_name(_element_type(checkpoint, name))} {list(place.shape)} in {place.nbytes} bytes"
    return None if found == wanted else f"is {found}, but {name!r} in {location} is {wanted}."


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


def _node_problems(node: onnx.NodeProto, pointed: dict[str, str], checkpoint: PackedCheckpoint) -> Iterator[str]:
    inputs = dict(zip(INPUT_NAMES, node.input, strict=False))
    values = pointed.get(inputs.get("values", ""), "")
    layer = values.removesuffix(".values")
    if layer == values or layer not in checkpoint.features:
        yield "reads values that are not those of a packed layer of the checkpoint."
        return
    for role in TENSOR_NAMES:
        source = pointed.get(inputs.get(role, ""), f"{layer}.{role}")
        if source != f"{layer}.{role}":
            yield f"reads {source!r} as {role} of {layer!r}."
    config = checkpoint.config.layer(layer)
    if config is None:  # told with the checkpoint's own problems
        return
    attributes = {
        attribute.name: attribute.s.decode(errors="replace") if attribute.type == STRING else attribute.i
        for attribute in node.attribute
    }
    for name, wanted in node_attributes(*checkpoint.features[layer], config).items():
        if name != "accuracy_level" and attributes.get(name) != wanted:
            yield f"has {name} {attributes.get(name)!r}; the checkpoint says {wanted!r} for {layer!r}."
