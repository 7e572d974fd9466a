"""Where each tensor of a safetensors folder lies, byte for byte, so that other formats can point at it."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from ..errors import NMError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_LARGEST_HEADER = 100_000_000  # the limit of the safetensors library
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class TensorLocation:
    """A tensor's bytes in a file: `nbytes` from `offset`, little-endian, row-major; `dtype` as safetensors names it."""

    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


def read_header(file: Path) -> dict[str, TensorLocation]:
    """Locate every tensor of one safetensors file, each checked to lie inside it.

    Raises:
        NMError: the file is missing, truncated, or not a safetensors file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _LARGEST_HEADER + 1
            if length > min(_LARGEST_HEADER, size - 8):
                raise NMError(
                    f"{file} is truncated or not a safetensors file: its header does not fit its {size} bytes."
                )
            header = json.loads(stream.read(length))
    except OSError as error:
        raise NMError(f"{file} cannot be read ({error.strerror}).") from None
    except NMError:
        raise
    except (ValueError, RecursionError):
        raise NMError(f"{file} has a header that is not valid JSON; it is not a safetensors file.") from None
    if not isinstance(header, dict):
        raise NMError(f"{file} has a header that is not a JSON object; it is not a safetensors file.")
    header.pop("__metadata__", None)
    return {name: _location(file, size, 8 + length, name, entry) for name, entry in header.items()}


def _location(file: Path, size: int, data_start: int, name: str, entry: object) -> TensorLocation:
    if not _is_well_formed(entry):
        raise NMError(f"{file} describes tensor {name!r} in a way safetensors does not allow: {entry!r}.")
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != expected:
        raise NMError(f"{file} gives tensor {name!r} {end - begin} bytes; {dtype} {shape} takes {expected}.")
    if data_start + end > size:
        raise NMError(f"{file} is truncated: tensor {name!r} ends at byte {data_start + end} of {size}.")
    return TensorLocation(file, data_start + begin, end - begin, dtype, shape)


def _is_well_formed(entry: object) -> TypeGuard[dict[str, Any]]:
    """A known dtype, a shape, and two offsets, all numbers whole, not negative and below 2^63."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str) or entry["dtype"] not in DTYPES:
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return False
    return all(type(number) is int and 0 <= number < 2**63 for number in (*shape, *offsets))


def locate_tensors(folder: Path) -> dict[str, TensorLocation]:
    """Locate every tensor of `model.safetensors`, or of the shards its index lists.

    Raises:
        NMError: there is neither, or a file is not what it should be.
    """
    index = folder / INDEX_FILE
    if not index.exists():
        if not (folder / SINGLE_FILE).exists():
            raise NMError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}.")
        return read_header(folder / SINGLE_FILE)
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        files = sorted(set(weight_map.values()))
        unsafe = [name for name in files if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise NMError(f"{index} has no readable weight_map.") from None
    if unsafe:
        raise NMError(f"{index} names {unsafe[0]!r}; a shard must lie in the same folder.")
    tensors: dict[str, TensorLocation] = {}
    for name in files:
        tensors |= read_header(folder / name)
    missing = weight_map.keys() - tensors.keys()
    if missing:
        raise NMError(f"{index} lists tensor {min(missing)!r}, which no shard holds.")
    return tensors
