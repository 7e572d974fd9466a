"""Reading and writing the tensors of safetensors files one at a time, whatever the size of the file."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import BinaryIO

import torch
from torch import Tensor

from .safetensors_files import DTYPES, TensorLocation

_CHUNK = 1 << 24
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_tensor(location: TensorLocation) -> Tensor:
    """A tensor in memory of its own, on the CPU.

    Raises:
        OSError: the file cannot be read, or ends before the tensor does.
    """
    tensor = torch.empty(location.shape, dtype=DTYPES[location.dtype])
    if location.nbytes:
        with location.file.open("rb") as stream:
            stream.seek(location.offset)
            if stream.readinto(tensor_bytes(tensor)) != location.nbytes:
                raise OSError(0, "it was cut short", str(location.file))
    return tensor


def write_tensors(stream: BinaryIO, tensors: Mapping[str, Tensor | TensorLocation]) -> dict[str, str]:
    """Write a safetensors file of tensors in memory, and of stored ones, which are copied piece by piece.

    Args:
        stream: open for writing, at its beginning.
        tensors: in the order in which their bytes are to follow each other; the same one twice is stored twice.

    Returns:
        The checksum of each tensor, as `tensor_checksum` gives it.
    """
    stream.write(_header(tensors))
    checksums = {}
    for name, tensor in tensors.items():
        checksum = 0
        for piece in _pieces(tensor):
            stream.write(piece)
            checksum = zlib.crc32(piece, checksum)
        checksums[name] = f"{checksum:08x}"
    return checksums


def tensor_checksum(tensor: Tensor | TensorLocation) -> str:
    """CRC-32 of a tensor's bytes, eight hexadecimal digits."""
    checksum = 0
    for piece in _pieces(tensor):
        checksum = zlib.crc32(piece, checksum)
    return f"{checksum:08x}"


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, as it is and to be written to."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _header(tensors: Mapping[str, Tensor | TensorLocation]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        dtype = tensor.dtype if isinstance(tensor, TensorLocation) else _NAMES[tensor.dtype]
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _pieces(tensor: Tensor | TensorLocation) -> Iterator[bytes | memoryview]:
    if isinstance(tensor, Tensor):
        if tensor.numel():
            yield tensor_bytes(tensor.detach().cpu().contiguous())
        return
    with tensor.file.open("rb") as source:
        source.seek(tensor.offset)
        left = tensor.nbytes
        while left:
            piece = source.read(min(left, _CHUNK))
            if not piece:
                raise OSError(0, "it was cut short", str(tensor.file))
            yield piece
            left -= len(piece)
