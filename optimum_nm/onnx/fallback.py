"""MatMulNM as a model-local function of standard operators, for runtimes without the library; SwiGLU with it.

The body unpacks the weight and multiplies densely. Everything but the multiplication depends on constants alone, so
ONNX Runtime folds it when it loads the model. A model holds one body for all its nodes, so what differs between them
is computed from the attributes; what occurs in none of them is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import comb
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..config import INTEGER_DTYPES
from ..errors import NMError
from ..packing.codes import unrank_masks
from ..packing.values import OFFSET
from ..patterns import GROUP_WIDTHS, NMPattern
from .operator import ATTRIBUTE_TYPES, DOMAIN, INPUT_NAMES, OPERATOR, SWIGLU, VERSION, is_matmul_nm
from .swiglu import swiglu_function

OLDEST_OPSET = 13
_WIDEST = max(GROUP_WIDTHS)
_LARGEST_TABLE = comb(16, 8)  # masks listed in the function; 16:32 has 601 million and is computed


def add_fallback(model: onnx.ModelProto) -> None:
    """Add the functions that MatMulNM and SwiGLU nodes fall back to, and the import of their domain, in place.

    Raises:
        NMError: the model's opset is older than 13.
    """
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    nodes = [node for node in _all_nodes(model.graph) if is_matmul_nm(node)]
    if not nodes:
        return
    attributes = [{a.name: helper.get_attribute_value(a) for a in node.attribute} for node in nodes]
    decoded = [{k: v.decode() if isinstance(v, bytes) else v for k, v in values.items()} for values in attributes]
    functions = [fallback_function(decoded, opsets[""])]
    if any((node.domain, node.op_type) == (DOMAIN, SWIGLU) for node in _all_nodes(model.graph)):
        functions.append(swiglu_function(opsets[""]))
    others = [f for f in model.functions if f.domain != DOMAIN]
    del model.functions[:]
    model.functions.extend([*others, *functions])
    if DOMAIN not in opsets:
        model.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))


def fallback_function(nodes: Sequence[Mapping[str, int | str]], opset: int) -> onnx.FunctionProto:
    """The function for nodes with these attributes (`operator.node_attributes`), in a model of this opset.

    Below opset 15 the activations must be float32.

    Raises:
        NMError: the opset is older than 13.
    """
    if opset < OLDEST_OPSET:
        raise NMError(f"the model's opset is {opset}; the fallback function needs {OLDEST_OPSET} or newer.")
    body = _Body()
    weight = _Unpack(body, nodes).weight()
    transposed = body.node("Transpose", weight, perm=[1, 0])
    product = body.node("MatMul", body.cast("A", TensorProto.FLOAT), transposed)
    features = body.attribute("N")
    biased = body.node("Add", product, body.padded("bias", TensorProto.FLOAT, features, 0.0))
    if opset >= 15:
        body.node("CastLike", biased, "A", output="Y")
    else:
        body.node("Identity", biased, output="Y")
    return helper.make_function(
        DOMAIN, OPERATOR, INPUT_NAMES, ["Y"], body.nodes, [helper.make_opsetid("", opset)], list(ATTRIBUTE_TYPES)
    )


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                yield from _all_nodes(inner)


class _Body:
    """Nodes of a function under construction. Values are known by name; each method returns its output's name."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._known: dict[object, str] = {}

    def node(self, op_type: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        output = output or f"{op_type.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], **attributes))
        return output

    def constant(self, value: npt.ArrayLike, dtype: type = np.int64) -> str:
        array: npt.NDArray[Any] = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._known:
            self._known[key] = self.node("Constant", value=numpy_helper.from_array(array))
        return self._known[key]

    def attribute(self, name: str) -> str:
        """An attribute of the calling node as a tensor of one element, int64 or string."""
        if name not in self._known:
            kind = onnx.AttributeProto.INT if ATTRIBUTE_TYPES[name] is int else onnx.AttributeProto.STRING
            scalar = self.node("Constant")
            self.nodes[-1].attribute.add(
                name="value_int" if kind == onnx.AttributeProto.INT else "value_string", ref_attr_name=name, type=kind
            )
            self._known[name] = self.node("Reshape", scalar, self.constant([1]))
        return self._known[name]

    def attribute_is(self, name: str, text: str) -> str:
        """Whether a string attribute has this value: bool [1].

        Equal takes strings only from opset 19 on, so count the different ones among the two.
        """
        key = (name, text)
        if key not in self._known:
            wanted = self.node("Constant", value_strings=[text])
            different = self.node("Unique", self.node("Concat", self.attribute(name), wanted, axis=0))
            self._known[key] = self.node("Equal", self.node("Shape", different), self.constant([1]))
        return self._known[key]

    def cast(self, value: str, element_type: int) -> str:
        return self.node("Cast", value, to=element_type)

    def ceil_div(self, a: str, b: str) -> str:
        return self.node("Div", self.node("Sub", self.node("Add", a, b), self.constant([1])), b)

    def shape(self, *sizes: str) -> str:
        return self.node("Concat", *sizes, axis=0)

    def slice(self, value: str, end: str, axis: int) -> str:
        """value[..., :end] along `axis`."""
        return self.node("Slice", value, self.constant([0]), end, self.constant([axis]))

    def count_to(self, end: str) -> str:
        """0 … end-1, int64 [end]."""
        scalar = self.node("Squeeze", end)
        return self.node("Range", self.constant(0), scalar, self.constant(1))

    def padded(self, tensor: str, element_type: TensorProto.DataType, count: str, fill: float) -> str:
        """A tensor flattened and cast, or `count` times `fill` where it is empty: one [count] either way."""
        flat = self.node("Reshape", self.cast(tensor, element_type), self.constant([-1]))
        dtype = {TensorProto.FLOAT: np.float32, TensorProto.INT32: np.int32, TensorProto.INT64: np.int64}[element_type]
        filling = self.node("Expand", self.constant([fill], dtype), count)
        return self.slice(self.node("Concat", flat, filling, axis=0), count, 0)


class _Unpack:
    """The steps from the packed tensors to the dense weight, as docs/format.md defines them.

    ONNX Runtime keeps every folded intermediate until all layers are folded, so wide tensors are few, and of bytes
    where that is possible: about 30 bytes a weight in all.
    """

    def __init__(self, body: _Body, nodes: Sequence[Mapping[str, int | str]]) -> None:
        self.body = body
        self.patterns = sorted({(int(node["n"]), int(node["m"])) for node in nodes})
        self.widest = max(m for _, m in self.patterns)
        self.dtypes = {str(node["dtype"]) for node in nodes}
        self.formats = {"codes" if node["n"] == node["m"] else str(node["positions"]) for node in nodes}
        self.has_outliers = any(node["outlier_k"] for node in nodes)
        self.columns, self.rows = body.attribute("K"), body.attribute("N")
        self.n, self.m = body.attribute("n"), body.attribute("m")
        self.groups = body.ceil_div(self.columns, self.m)

    def weight(self) -> str:
        """float32 [N, K]."""
        body = self.body
        mask = body.cast(self._mask(), TensorProto.INT32)
        # the k-th marked column of a row holds its k-th value; pruned columns take the zero put before the first
        place = body.node("Mul", body.node("CumSum", mask, body.constant(1)), mask)
        zero = body.node("Expand", body.constant([0], np.float32), body.shape(self.rows, body.constant([1])))
        weight = body.node("GatherElements", body.node("Concat", zero, self._values(), axis=1), place, axis=1)
        return self._add_outliers(weight) if self.has_outliers else weight

    def _mask(self) -> str:
        """uint8 [N, K], 1 in the marked columns."""
        body = self.body
        if self.formats == {"bitmap"}:
            masks = self._fields(self.m)
        elif self.formats == {"codes"}:
            masks = self._decode(self._ranks(self._fields(self._by_pattern(_code_bits))))
        else:
            sparse = body.node("Less", self.n, self.m)
            is_bitmap = body.node("And", body.attribute_is("positions", "bitmap"), sparse)
            fields = self._fields(body.node("Where", is_bitmap, self.m, self._by_pattern(_code_bits)))
            ranks = body.node("Where", is_bitmap, body.constant([0], np.int32), self._ranks(fields))
            # a code may be narrower than a mask: pad it, or the two could not stand in one Where
            zeros = body.node("Expand", body.constant([0], np.uint8), body.shape(self.rows, self.groups, self.m))
            bitmap = body.slice(body.node("Concat", fields, zeros, axis=2), self.m, 2)
            masks = body.node("Where", is_bitmap, bitmap, self._decode(ranks))
        flat = body.node("Reshape", masks, body.shape(self.rows, body.constant([-1])))
        return body.slice(flat, self.columns, 1)

    def _by_pattern(self, number: Callable[[int, int], int]) -> str:
        """number(n, m) of the calling node's pattern."""
        table = np.zeros((_WIDEST + 1, _WIDEST + 1), np.int64)
        for n, m in self.patterns:
            table[m, n] = number(n, m)
        place = self.body.node("Add", self.body.node("Mul", self.m, self.body.constant([_WIDEST + 1])), self.n)
        return self.body.node("Gather", self.body.constant(table.ravel()), place)

    def _bits(self, numbers: str) -> str:
        """Bits of int32 numbers below 256, lowest first, along a new last axis: uint8 [..., 8]."""
        table = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
        return self.body.node("Gather", self.body.constant(table, np.uint8), numbers)

    def _fields(self, width: str) -> str:
        """Bits of each group's position field, lowest first: uint8 [N, groups, width]."""
        body = self.body
        row_bits = body.node("Mul", self.groups, width)
        count = body.node("Mul", self.rows, body.ceil_div(row_bits, body.constant([8])))
        bits = self._bits(body.padded("positions", TensorProto.INT32, count, 0))
        rows = body.node("Reshape", bits, body.shape(self.rows, body.constant([-1])))
        return body.node("Reshape", body.slice(rows, row_bits, 1), body.shape(self.rows, self.groups, width))

    def _ranks(self, fields: str) -> str:
        """Codes as numbers: int32 [N, groups, 1]. First their four bytes, by a product of bytes, then the sum."""
        body = self.body
        powers = np.kron(np.eye(4, dtype=np.uint8), (1 << np.arange(8, dtype=np.uint8))[:, None])
        width = body.node("Slice", body.node("Shape", fields), body.constant([2]), body.constant([3]))
        digits = body.node("MatMulInteger", fields, body.slice(body.constant(powers, np.uint8), width, 0))
        terms = body.node("Mul", digits, body.constant([1 << 8 * i for i in range(4)], np.int32))
        return body.node("ReduceSum", terms, body.constant([2]), keepdims=1)

    def _decode(self, ranks: str) -> str:
        """Masks uint8 [N, groups, m] of codes."""
        body = self.body
        counts = [comb(m, n) for n, m in self.patterns]
        if max(counts) <= _LARGEST_TABLE:
            first = dict(zip(self.patterns, np.cumsum([0, *counts]).tolist(), strict=False))
            row = body.node("Add", ranks, body.cast(self._by_pattern(lambda n, m: first[n, m]), TensorProto.INT32))
            masks_as_bytes = np.concatenate([_mask_bytes(n, m, self.widest) for n, m in self.patterns])
            chosen = body.node(
                "Gather", body.constant(masks_as_bytes, np.uint8), body.node("Squeeze", row, body.constant([2]))
            )
            bits = self._bits(body.cast(chosen, TensorProto.INT32))
            masks = body.node("Reshape", bits, body.shape(self.rows, self.groups, body.constant([-1])))
        else:
            masks = self._unrank(ranks)
        return body.slice(masks, self.m, 2)

    def _unrank(self, rest: str) -> str:
        """Masks uint8 [N, groups, widest] of codes too many for a table.

        From the last column down, column c is marked if the rest of the code is not below C(c, columns left to mark).
        """
        body = self.body
        left = body.node("Expand", body.cast(self.n, TensorProto.INT32), body.node("Shape", rest))
        kept = []
        for column in reversed(range(self.widest)):
            binomials = body.constant([comb(column, i) for i in range(self.widest + 1)], np.int32)
            below = body.node("Gather", binomials, left)
            keep = body.cast(body.node("GreaterOrEqual", rest, below), TensorProto.INT32)
            rest = body.node("Sub", rest, body.node("Mul", keep, below))
            left = body.node("Sub", left, keep)
            kept.append(keep)
        return body.cast(body.node("Concat", *reversed(kept), axis=2), TensorProto.UINT8)

    def _values(self) -> str:
        """Values that the columns marked in a row stand for, in their order: float32 [N, stored values of a row]."""
        body = self.body
        values = body.cast("values", TensorProto.FLOAT)
        integers = sorted(self.dtypes & set(INTEGER_DTYPES))
        if not integers:
            return values
        dense = body.node("Equal", self.n, self.m)
        count = body.node("Where", dense, self.columns, body.node("Mul", self.groups, self.n))
        place = body.count_to(count)
        if "int4" in integers:
            values = self._halves(values, count, place, dense)
        for dtype in integers:
            offset = body.constant([OFFSET[dtype]], np.float32)
            if len(self.dtypes) > 1:
                offset = body.node("Mul", offset, body.cast(body.attribute_is("dtype", dtype), TensorProto.FLOAT))
            values = body.node("Sub", values, offset)
        # a scale covers whole groups, so a value's scale follows from its group
        group_start = body.node("Mul", body.node("Div", place, self.n), self.m)
        column = body.node("Where", dense, place, group_start)
        return body.node("Mul", values, self._scales(column))

    def _halves(self, stored: str, count: str, place: str, dense: str) -> str:
        """Half bytes of int4 weights in the order of the values; other weights as they are.

        A chunk of c values takes ⌈c/2⌉ bytes; its first ⌈c/2⌉ values are the low half bytes, the rest the high.
        """
        body = self.body
        two = body.constant([2])
        of_columns = body.node("Mul", body.node("Div", body.constant([128]), self.m), self.n)
        chunk_size = body.node("Where", dense, body.constant([64]), of_columns)
        chunk = body.node("Div", place, chunk_size)
        within = body.node("Mod", place, chunk_size)
        following = body.node("Sub", count, body.node("Mul", chunk, chunk_size))
        half = body.ceil_div(body.node("Min", following, chunk_size), two)
        high = body.cast(body.node("GreaterOrEqual", within, half), TensorProto.INT64)
        first_byte = body.node("Mul", chunk, body.node("Div", chunk_size, two))
        byte = body.node("Add", first_byte, body.node("Sub", within, body.node("Mul", half, high)))
        # the high half bytes stand behind all low ones
        byte_count = body.node("Slice", body.node("Shape", stored), body.constant([1]), two)
        half_byte = body.node("Add", byte, body.node("Mul", high, byte_count))

        sixteen = body.constant([16], np.float32)
        upper = body.node("Floor", body.node("Div", stored, sixteen))
        lower = body.node("Sub", stored, body.node("Mul", upper, sixteen))
        if self.dtypes == {"int4"}:
            return body.node("Gather", body.node("Concat", lower, upper, axis=1), half_byte, axis=1)
        is_int4 = body.attribute_is("dtype", "int4")
        low_or_whole = body.node("Where", is_int4, lower, stored)
        order = body.node("Where", is_int4, half_byte, place)
        return body.node("Gather", body.node("Concat", low_or_whole, upper, axis=1), order, axis=1)

    def _scales(self, column: str) -> str:
        """Scales of each row at these columns, int64 [count]; 1 where the weight has none: float32 [N, count]."""
        body = self.body
        size = body.attribute("group_size")
        size = body.node("Where", body.node("Less", size, body.constant([0])), self.columns, size)
        per_row = body.ceil_div(self.columns, size)
        scales = body.padded("scales", TensorProto.FLOAT, body.node("Mul", self.rows, per_row), 1.0)
        rows = body.node("Reshape", scales, body.shape(self.rows, per_row))
        last = body.node("Sub", per_row, body.constant([1]))
        return body.node("Gather", rows, body.node("Min", body.node("Div", column, size), last), axis=1)

    def _add_outliers(self, weight: str) -> str:
        """The weight plus its outliers; a layer without any gets one of value zero in each block."""
        body, one = self.body, self.body.constant([1])
        k = body.node("Max", body.attribute("outlier_k"), one)
        block = body.node("Max", body.attribute("outlier_block"), one)
        tail = body.node("Mod", self.columns, block)
        twice = body.node("Mul", body.node("Mul", k, tail), body.constant([2]))
        rounded = body.node("Div", body.node("Add", twice, block), body.node("Mul", block, body.constant([2])))
        in_tail = body.node("Mul", body.node("Max", rounded, one), body.node("Min", tail, one))
        per_row = body.node("Add", body.node("Mul", body.node("Div", self.columns, block), k), in_tail)
        shape = body.shape(self.rows, per_row)
        count = body.node("Mul", self.rows, per_row)
        values = body.node("Reshape", body.padded("outlier_values", TensorProto.FLOAT, count, 0.0), shape)
        places = body.node("Reshape", body.padded("outlier_positions", TensorProto.INT64, count, 0), shape)
        starts = body.node("Mul", body.node("Div", body.count_to(per_row), k), block)
        columns = body.node("Add", places, starts)
        sums = body.node("Add", body.node("GatherElements", weight, columns, axis=1), values)
        return body.node("ScatterElements", weight, columns, sums, axis=1)


def _code_bits(n: int, m: int) -> int:
    """Bits of a code; 1 where N = M has no code, which then reads as 0."""
    return max(1, NMPattern(n, m).code_bits)


def _mask_bytes(n: int, m: int, width: int) -> npt.NDArray[np.uint8]:
    """All masks of a pattern in the order of their codes, as rows of ⌈width/8⌉ little-endian bytes."""
    masks = unrank_masks(np.arange(comb(m, n)), NMPattern(n, m))
    return np.packbits(np.pad(masks, ((0, 0), (0, width - m))), axis=1, bitorder="little")
