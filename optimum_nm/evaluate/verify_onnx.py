"""Whether the weights that a model.onnx points at are those of the checkpoint beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from ..errors import NMError
from ..packing.checkpoint import PackedCheckpoint
from ..packing.safetensors_files import TensorLocation

DOMAIN, OPERATOR = "optimum.nm", "MatMulNM"
ONNX_TYPES = {
    "BOOL": onnx.TensorProto.BOOL,
    "U8": onnx.TensorProto.UINT8,
    "I8": onnx.TensorProto.INT8,
    "I16": onnx.TensorProto.INT16,
    "I32": onnx.TensorProto.INT32,
    "I64": onnx.TensorProto.INT64,
    "F16": onnx.TensorProto.FLOAT16,
    "BF16": onnx.TensorProto.BFLOAT16,
    "F32": onnx.TensorProto.FLOAT,
    "F64": onnx.TensorProto.DOUBLE,
}


def onnx_problems(path: Path, checkpoint: PackedCheckpoint) -> Iterator[str]:
    """One sentence for each thing in which `path` and the checkpoint in the same folder do not agree."""
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, ValueError, OSError) as error:
        yield f"{path} is not a readable ONNX file ({' '.join(str(error).split())})."
        return
    if not model.graph.node:
        yield f"{path} has no nodes; it is not a model."
    places = {(place.file.name, place.offset): name for name, place in checkpoint.locations.items() if place.nbytes}
    for initializer in model.graph.initializer:
        if initializer.data_location == onnx.TensorProto.EXTERNAL:
            yield from _reference_problems(path, initializer, places, checkpoint)
    for node in model.graph.node:
        if node.domain == DOMAIN and node.op_type == OPERATOR:
            yield from _node_problems(path, node, checkpoint)


def _reference_problems(
    path: Path, initializer: onnx.TensorProto, places: dict[tuple[str, int], str], checkpoint: PackedCheckpoint
) -> Iterator[str]:
    """An external reference lies in a file of the folder and, in a safetensors file, is exactly one tensor of it."""
    where = f"{path.name}: initializer {initializer.name!r}"
    entries = {entry.key: entry.value for entry in initializer.external_data}
    try:
        location = entries["location"]
        offset, length = int(entries.get("offset", "0")), int(entries["length"])
    except (KeyError, ValueError):
        yield f"{where} has the external reference {entries}; location, offset and length are needed."
        return
    file = path.parent / location
    if Path(location).name != location or not file.is_file():
        yield f"{where} lies in {location!r}, which is no file of the folder."
        return
    if offset < 0 or length < 0 or offset + length > file.stat().st_size:
        yield f"{where} ends at byte {offset + length} of {location}, which has {file.stat().st_size}."
        return
    if file.suffix != ".safetensors" or not length:
        return
    name = places.get((location, offset))
    if name is None:
        yield f"{where} begins at byte {offset} of {location}, where no tensor begins."
        return
    place = checkpoint.locate(name)
    found, wanted = _describe(initializer, length), _describe_place(place)
    if found != wanted:
        yield f"{where} is {found}, but {name!r} in {location} is {wanted}."
    if initializer.name in checkpoint.locations and checkpoint.locate(initializer.name) != place:
        yield f"{where} points at {name!r}."


def _describe(initializer: onnx.TensorProto, length: int) -> str:
    dtype = next((name for name, number in ONNX_TYPES.items() if number == initializer.data_type), "of another type")
    return f"{dtype} {list(initializer.dims)} in {length} bytes"


def _describe_place(place: TensorLocation) -> str:
    return f"{place.dtype} {list(place.shape)} in {place.nbytes} bytes"


def _node_problems(path: Path, node: onnx.NodeProto, checkpoint: PackedCheckpoint) -> Iterator[str]:
    """The attributes of a MatMulNM node are those of the layer whose tensors it reads."""
    layer = next((name.removesuffix(".values") for name in node.input if name.endswith(".values")), None)
    if layer is None or f"{layer}.values" not in checkpoint.locations:
        return
    try:
        config = checkpoint.layer_config(layer)
    except NMError:  # already told
        return
    in_features, out_features = checkpoint.features.get(layer, (None, None))
    expected = {
        "K": in_features,
        "N": out_features,
        "n": config.pattern.n,
        "m": config.pattern.m,
        "dtype": config.weight_dtype,
        "positions": config.positions,
        "group_size": config.group_size,
        "outlier_k": config.outliers.k if config.outliers else 0,
        "outlier_block": config.outliers.block if config.outliers else 0,
    }
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    for name, value in expected.items():
        found = attributes.get(name, value)
        found = found.decode(errors="replace") if isinstance(found, bytes) else found
        if value is not None and found != value:
            yield f"{path.name}: node {node.name!r} has {name} {found!r}; the checkpoint says {value!r} for {layer!r}."
