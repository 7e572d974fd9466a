"""The order of tensors inside safetensors files: layers that read the same input, one after the other.

safetensors leaves the order free. Rows of packed weights that follow each other are one matrix to whoever maps the
file, so that a graph can multiply by query, key and value projections at once (`onnx.joint_projections`).
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any, BinaryIO

from ..packing.safetensors_files import DTYPES, TensorLocation, locate_tensors, read_header

JOINT_LAYERS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_CHUNK = 1 << 24


def arrange_tensors(folder: Path) -> None:
    """Rewrite the safetensors files of a folder, each by itself, with the rows of JOINT_LAYERS side by side.

    Wider elements come before narrower ones, as transformers has it, so that all stay aligned. Files that are in order
    already are left as they are.
    """
    for file in sorted({location.file for location in locate_tensors(folder).values()}):
        tensors = read_header(file)
        in_file = sorted(tensors, key=lambda name: tensors[name].offset)
        arranged = sorted(tensors, key=lambda name: _place(name, tensors[name]))
        if arranged != in_file:
            _rewrite(file, {name: tensors[name] for name in arranged})


def _place(name: str, location: TensorLocation) -> tuple[int, list[str], str, str, int]:
    *parent, layer, role = ["", *name.split(".")]
    group = next((layers for layers in JOINT_LAYERS if layer in layers), (layer,))
    return -DTYPES[location.dtype].itemsize, parent, group[0], role, group.index(layer)


def _rewrite(file: Path, tensors: dict[str, TensorLocation]) -> None:
    temporary = file.with_name(f".{file.name}")
    try:
        with file.open("rb") as source, temporary.open("wb") as target:
            target.write(_header(_metadata(source), tensors))
            for location in tensors.values():
                _copy(source, target, location)
        shutil.copymode(file, temporary)
        temporary.rename(file)
    finally:
        temporary.unlink(missing_ok=True)


def _metadata(source: BinaryIO) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", source.read(8))
    header = json.loads(source.read(length))
    return {name: header[name] for name in ("__metadata__",) if name in header}


def _header(header: dict[str, Any], tensors: dict[str, TensorLocation]) -> bytes:
    end = 0
    for name, location in tensors.items():
        begin, end = end, end + location.nbytes
        header[name] = {"dtype": location.dtype, "shape": list(location.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _copy(source: BinaryIO, target: BinaryIO, location: TensorLocation) -> None:
    source.seek(location.offset)
    left = location.nbytes
    while left:
        chunk = source.read(min(left, _CHUNK))
        target.write(chunk)
        left -= len(chunk)
