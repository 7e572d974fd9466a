"""Blocks of experts in a constructed graph: every expert multiplies only the tokens that are routed to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import onnx_ir as ir
from mobius.components import MoELayer
from onnxscript import OpBuilder


@contextmanager
def routed_experts() -> Iterator[None]:
    """While it lasts, mobius's MoELayer, also under subclasses that add a shared expert, computes `_routed`.

    Its own graph has every expert compute every token, sixteen times what there is to do for 8 experts out of 128.
    """
    original = MoELayer.forward
    MoELayer.forward = _routed  # type: ignore[method-assign]
    try:
        yield
    finally:
        MoELayer.forward = original  # type: ignore[method-assign]


def _routed(self: MoELayer, op: OpBuilder, hidden_states: ir.Value) -> ir.Value:
    """Σ over the experts chosen of weight · expert(x), for `[batch, length, hidden_size]`.

    Each token is repeated for each of its experts, and all are put in the order of the experts, which a Split then
    hands to every expert, be it none at all.
    """
    assert self.experts is not None
    weights, chosen = self.gate(op, hidden_states)
    width = self.gate.weight.shape[1]
    expert_of_row = op.Reshape(chosen, [-1])
    numbers = op.Constant(value=ir.tensor(np.arange(self.num_experts, dtype=np.int64)[:, None]))
    counts = op.ReduceSum(op.Cast(op.Equal(numbers, expert_of_row), to=ir.DataType.INT64), [1], keepdims=False)
    _, order = op.TopK(expert_of_row, op.Shape(expert_of_row), axis=0, largest=0, _outputs=2)
    rows = op.Gather(op.Reshape(hidden_states, [-1, width]), op.Div(order, [self.top_k]))
    parts = op.Split(rows, counts, axis=0, _outputs=self.num_experts)
    outputs = [expert(op, part) for expert, part in zip(self.experts, parts, strict=True)]
    sorted_outputs = op.Concat(*outputs, axis=0)
    in_place = op.ScatterND(sorted_outputs, op.Unsqueeze(order, [1]), sorted_outputs)
    by_token = op.Reshape(in_place, [-1, self.top_k, width])
    weighted = op.Mul(by_token, op.Reshape(weights, [-1, self.top_k, 1]))
    return op.Reshape(op.ReduceSum(weighted, [1], keepdims=False), op.Shape(hidden_states))
