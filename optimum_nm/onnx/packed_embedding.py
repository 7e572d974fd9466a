"""Looking up rows of a packed weight with standard operators: an embedding that is the packed output layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..config import INTEGER_DTYPES, LayerConfig
from ..packing.values import OFFSET, int4_chunk


def look_up_rows(
    tokens: str, output: str, stored: Sequence[str], width: int, config: LayerConfig
) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    """Nodes that turn token numbers `[...]` into float32 rows `[..., width]`, and the constants they need.

    Args:
        tokens, output: names of the values.
        stored: names of the initializers values, positions, scales, ….
        config: packed with N = M and no outliers.
    """
    rows = _Rows(output)
    values, _, scales, *_ = stored
    looked_up = rows.node("Gather", values, tokens, axis=0)
    if config.weight_dtype not in INTEGER_DTYPES:
        rows.node("Cast", looked_up, output=output, to=TensorProto.FLOAT)
        return rows.nodes, rows.constants
    if config.weight_dtype == "int4":
        low = rows.node("Mod", looked_up, rows.constant("sixteen", np.array(16, np.uint8)))
        high = rows.node("BitShift", looked_up, rows.constant("four", np.array(4, np.uint8)), direction="RIGHT")
        halves = rows.node("Concat", low, high, axis=-1)
        looked_up = rows.node(
            "Gather", halves, rows.constant("columns", _int4_columns(width, int4_chunk(config.pattern))), axis=-1
        )
    integers = rows.node("Cast", looked_up, to=TensorProto.FLOAT)
    offset = rows.constant("offset", np.array(OFFSET[config.weight_dtype], np.float32))
    centred = rows.node("Sub", integers, offset)
    per_group = rows.node("Cast", rows.node("Gather", scales, tokens, axis=0), to=TensorProto.FLOAT)
    group_size = width if config.group_size == -1 else config.group_size
    groups = rows.constant("groups", np.arange(width) // group_size)
    rows.node("Mul", centred, rows.node("Gather", per_group, groups, axis=-1), output=output)
    return rows.nodes, rows.constants


class _Rows:
    """Nodes under construction, named after what they end in."""

    def __init__(self, output: str) -> None:
        self.prefix = f"{output}/"
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []

    def node(self, op_type: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        name = f"{self.prefix}{op_type}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [output or name], name=name, **attributes))
        return self.nodes[-1].output[0]

    def constant(self, name: str, value: npt.NDArray) -> str:
        self.constants.append(numpy_helper.from_array(value, f"{self.prefix}{name}"))
        return self.constants[-1].name


def _int4_columns(width: int, chunk: int) -> npt.NDArray[np.int64]:
    """Where each column's four bits are among a row's low halves of bytes, followed by its high halves."""
    places = np.empty(width, np.int64)
    row_bytes, begin = (width + 1) // 2, 0
    for first in range(0, width, chunk):
        count = min(chunk, width - first)
        half = (count + 1) // 2
        places[first : first + half] = begin + np.arange(half)
        places[first + half : first + count] = row_bytes + begin + np.arange(count - half)
        begin += half
    return places
