"""A second reader of the packed format, written from docs/format.md alone with numpy and the standard library.

It shares no code with optimum_nm, so that the two agree only if the page says enough.
"""

import itertools
import json
import struct
from pathlib import Path

import numpy as np

NUMPY_DTYPES = {"U8": "u1", "I16": "<i2", "I32": "<i4"}


def read_safetensors(path):
    """{name: array} of the integer tensors of a safetensors file."""
    data = Path(path).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        if entry["dtype"] in NUMPY_DTYPES:
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            arrays[name] = np.frombuffer(data[begin:end], NUMPY_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return arrays


def read_bits(row, start, count):
    """`count` bits of a row of bytes from bit `start`, lowest first, as an integer."""
    return sum(((int(row[bit // 8]) >> (bit % 8)) & 1) << (bit - start) for bit in range(start, start + count))


def masks_in_order(n, m):
    """All m-bit integers with n bits set, ascending (m up to 16)."""
    return sorted(sum(1 << column for column in columns) for columns in itertools.combinations(range(m), n))


def mask_of_rank(rank, n):
    """The mask whose Σ C(cᵢ, i+1) is `rank`, found from the highest column down."""
    mask = 0
    for i in range(n, 0, -1):
        column = i - 1
        while binomial(column + 1, i) <= rank:
            column += 1
        rank -= binomial(column, i)
        mask |= 1 << column
    return mask


def binomial(n, k):
    result = 1
    for i in range(k):
        result = result * (n - i) // (i + 1)
    return result if n >= k else 0


def float_values(bits, dtype):
    if dtype == "float32":
        return bits.view("<f4").astype(np.float32)
    if dtype == "float16":
        return bits.view("<f2").astype(np.float32)
    return (bits.view("<u2").astype(np.uint32) << 16).view(np.float32)  # bfloat16: the upper half of a float32


def int4_values(row, count, chunk_size):
    values = []
    while len(values) < count:
        chunk = min(chunk_size, count - len(values))
        half = (chunk + 1) // 2
        data, row = row[:half], row[half:]
        values += ([int(byte) & 15 for byte in data] + [int(byte) >> 4 for byte in data])[:chunk]
    return np.array(values, dtype=np.int64) - 8


def read_weight(tensors, in_features, settings):
    """The float32 weight of one layer; `settings` has pattern, outliers, weight_dtype, group_size, positions, …"""
    n, m = map(int, settings["pattern"].split(":"))
    groups = -(-in_features // m)
    rows = len(tensors["values"])
    weight = np.zeros((rows, groups * m), dtype=np.float32)
    count = in_features if n == m else groups * n
    if settings["positions"] == "bitmap":
        bits, ranked = m, None
    else:
        ranked = masks_in_order(n, m) if m <= 16 else None
        total = binomial(m, n)
        bits = (total - 1).bit_length()
    for r in range(rows):
        if settings["weight_dtype"] == "int4":
            values = int4_values(tensors["values"][r], count, 64 if n == m else 128 * n // m).astype(np.float32)
        elif settings["weight_dtype"] == "int8":
            values = tensors["values"][r].astype(np.float32) - 128
        else:
            values = float_values(tensors["values"][r], settings["weight_dtype"])
        if n == m:
            weight[r, :in_features] = values
        else:
            for g in range(groups):
                field = read_bits(tensors["positions"][r], g * bits, bits)
                if settings["positions"] == "codes":
                    field = ranked[field] if ranked else mask_of_rank(field, n)
                columns = [g * m + j for j in range(m) if field >> j & 1]
                assert len(columns) == n
                weight[r, columns] = values[g * n : (g + 1) * n]
        if settings["weight_dtype"] in ("int8", "int4"):
            scales = tensors["scales"][r].view("<f2").astype(np.float32)
            size = in_features if settings["group_size"] == -1 else settings["group_size"]
            weight[r, :in_features] *= scales[np.arange(in_features) // size]
    weight = weight[:, :in_features]
    if settings["outliers"]:
        k, block = map(int, settings["outliers"].split(":"))
        add_outliers(weight, tensors, k, block, settings["outlier_dtype"])
    return weight


def add_outliers(weight, tensors, k, block, dtype):
    rows, in_features = weight.shape
    for r in range(rows):
        values, slot = float_values(tensors["outlier_values"][r], dtype), 0
        for start in range(0, in_features, block):
            length = min(block, in_features - start)
            kept = k if length == block else max(1, int(np.floor(k * length / block + 0.5)))
            for _ in range(kept):
                weight[r, start + int(tensors["outlier_positions"][r, slot])] += values[slot]
                slot += 1
        assert slot == len(values)
