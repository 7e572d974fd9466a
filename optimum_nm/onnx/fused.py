"""A decoder graph constructed by mobius: fused attention, norms and rotary embedding, MatMulNM for every linear layer.

Nothing is traced and no weight is read: the model's configuration gives the graph, the checkpoint's files the weights.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mobius
import numpy as np
import onnx
import onnx_ir as ir
from mobius.components import Embedding, Linear
from onnx import TensorProto
from onnxscript import OpBuilder, nn
from torch import Tensor
from transformers import AutoConfig

from ..config import INTEGER_DTYPES
from ..errors import NMError
from ..packing.checkpoint import PackedCheckpoint
from .joint_projections import join_projections
from .operator import DOMAIN, OPERATOR, VERSION, node_attributes
from .packed_embedding import look_up_rows
from .routed_experts import routed_experts
from .stored_tensors import StoredMatrix, StoredRows, StoredTensors, empty_initializer
from .swiglu import fuse_swiglu

# Those whose graph agrees with transformers' model in the tests.
MODEL_TYPES = (
    "arcee",
    "gpt2",
    "gptj",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "olmo",
    "olmo2",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "seed_oss",
    "smollm3",
    "starcoder2",
)
_PACKED_EMBEDDING = "PackedEmbedding"
ROTARY_TYPES = ("default", "linear", "llama3", "yarn")


def fused_graph(
    checkpoint: PackedCheckpoint, accuracy_level: int | None, *, last_logits: bool = False
) -> onnx.ModelProto:
    """The text-generation graph of a checkpoint with past key-values, float32 activations.

    Args:
        checkpoint: from `optimum_nm.nn.skeleton.open_checkpoint`.
        accuracy_level: of all packed layers; None for 4 where the stored values are integers and 0 elsewhere.
        last_logits: compute the logits `[batch, 1, vocabulary]` after the last token instead of after each: all that
            generation needs, and much less work for a long prompt.

    Raises:
        NMError: the model has no fused graph (`no_fused_graph`), or a tensor is missing or not what it should be.
    """
    _refuse_without_graph(checkpoint.folder)
    parameters = _Parameters(checkpoint, accuracy_level)

    def use_stored_bytes(module: Any) -> None:
        parameters.put_into(module)
        module.lm_head.last_token_only = last_logits

    package = _build(checkpoint.folder, use_stored_bytes, load_weights=False)
    model = package["model"]
    parameters.fill(model)
    tokens = 1 if last_logits else "sequence_len"
    model.graph.outputs[0].shape = ir.Shape(["batch", tokens, package.config.vocab_size])  # onnxruntime-genai asks it
    model.graph.opset_imports[DOMAIN] = VERSION
    proto = ir.to_proto(model)
    _expand_embeddings(proto.graph, parameters.embeddings)
    join_projections(proto.graph)
    fuse_swiglu(proto.graph)
    return proto


def dense_fused_graph(folder: Path) -> ir.Model:
    """The same graph of a dense checkpoint folder, with MatMul and its weights: what packed models are compared with.

    Raises:
        NMError: the model has no fused graph (`no_fused_graph`).
    """
    _refuse_without_graph(folder)
    return _build(folder, lambda module: None, load_weights=True)["model"]


def _build(folder: Path, prepare: Callable[[Any], None], load_weights: bool) -> Any:
    """What mobius makes of a folder with config.json; `prepare` changes the modules that the graph is made of."""
    model_config = json.loads((folder / "config.json").read_text())
    module_class = mobius.registry.get(model_config["model_type"])

    def construct(config: Any) -> nn.Module:
        module = module_class(_corrected(config, model_config))
        prepare(module)
        return module

    construct.config_class = getattr(module_class, "config_class", None)  # type: ignore[attr-defined]
    with _quiet(), routed_experts():
        return mobius.build(
            str(folder),
            module_class=construct,  # type: ignore[arg-type]  # it is only ever called
            dtype="float32",
            execution_provider="cpu",
            load_weights=load_weights,
        )


def _refuse_without_graph(folder: Path) -> None:
    reason = no_fused_graph(folder)
    if reason is not None:
        raise NMError(reason)


def no_fused_graph(folder: Path) -> str | None:
    """Why a folder's model has no fused graph, in a sentence: GroupQueryAttention and mobius leave some out."""
    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in MODEL_TYPES:
        return f"model type {config.model_type!r} has no fused graph; it must be one of {', '.join(MODEL_TYPES)}."
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    part = getattr(config, "partial_rotary_factor", None) or 1
    rotary_size = getattr(config, "rotary_dim", None) or int(part * head_size)
    for name, size in {"head": head_size, "rotary": rotary_size}.items():
        if size % 16:
            return f"{name} size {size} has no fused graph; it must be a multiple of 16."
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    rotary_type = rotary.get("rope_type", rotary.get("type", "default"))
    if rotary_type not in ROTARY_TYPES:
        return f"rope type {rotary_type!r} has no fused graph; it must be one of {', '.join(ROTARY_TYPES)}."
    kinds = sorted(set(getattr(config, "layer_types", None) or ()))
    if len(kinds) > 1:
        return f"layer types {' and '.join(kinds)} in one model have no fused graph; one must do for all."
    if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
        return "blocks with and without experts in one model have no fused graph; all must have them."
    if config.model_type == "phi3" and part != 1:
        return f"partial_rotary_factor {part} has no fused graph for phi3; it must be 1."
    return None


def _corrected(config: Any, model_config: dict[str, Any]) -> Any:
    """mobius's reading of config.json, without what it misunderstands.

    A packed checkpoint is none of the quantization methods it knows. Under transformers 4 it takes models with the
    usual rotary base of 10000 for models without rotary embedding.
    """
    if config.rope_type is None:
        factor = model_config.get("partial_rotary_factor") or 1.0
        theta = model_config.get("rope_theta") or 10_000.0
        config = dataclasses.replace(config, rope_type="default", rope_theta=theta, partial_rotary_factor=factor)
    return dataclasses.replace(config, quantization=None)


@contextmanager
def _quiet() -> Iterator[None]:
    """mobius warns of every initializer without a value, and there is none with one, and of operators not its own."""
    loggers = [logging.getLogger(name) for name in ("onnx_ir", "onnx_shape_inference")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class _Initializers:
    """Initializers that are the checkpoint's bytes, one for all uses of a name.

    They have no value while mobius works on the graph, which would read those it takes for small.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, TensorProto] = {}

    def value(self, op: OpBuilder, tensor: TensorProto) -> ir.Value:
        initializers = op.builder.root.graph.initializers
        if tensor.name not in initializers:
            self.tensors[tensor.name] = tensor
            op.builder.initializer(ir.serde.deserialize_tensor(tensor), tensor.name, qualify=False).const_value = None
        return initializers[tensor.name]


class _StoredLinear(nn.Module):
    """MatMulNM on stored bytes.

    Attributes:
        last_token_only: of each sequence; the output then has length 1.
    """

    last_token_only = False

    def __init__(
        self,
        name: str | None,
        initializers: _Initializers,
        matrix: StoredMatrix,
        bias: TensorProto,
        accuracy_level: int,
    ) -> None:
        super().__init__(name)
        self._initializers = initializers
        self._matrix = matrix
        self._bias = bias
        self._accuracy_level = accuracy_level

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        matrix = self._matrix
        if self.last_token_only:
            x = op.Slice(x, [-1], [np.iinfo(np.int64).max], [1])
        inputs = [self._initializers.value(op, tensor) for tensor in (*matrix.inputs, self._bias)]
        attributes = node_attributes(matrix.in_features, matrix.out_features, matrix.config, self._accuracy_level)
        name = matrix.inputs[0].name.removesuffix(".values")
        node = ir.node(OPERATOR, [x, *inputs], attributes, domain=DOMAIN, name=name)
        op.builder.add_node(node)  # op.MatMulNM would stumble over an attribute and an input of the same name
        result = node.outputs[0]
        result.dtype = ir.DataType.FLOAT
        if x.shape is not None:
            result.shape = ir.Shape([*x.shape[:-1], matrix.out_features])
        return result


class _StoredEmbedding(nn.Module):
    """Rows are looked up as they are stored and cast after: a cast before would be done to the whole table."""

    def __init__(self, name: str | None, initializers: _Initializers, table: TensorProto) -> None:
        super().__init__(name)
        self._initializers = initializers
        self._table = table

    def forward(self, op: OpBuilder, input_ids: ir.Value) -> ir.Value:
        rows = op.Gather(self._initializers.value(op, self._table), input_ids)
        return rows if self._table.data_type == TensorProto.FLOAT else op.Cast(rows, to=ir.DataType.FLOAT)


class _PackedEmbedding(nn.Module):
    """Stands for the rows of a packed weight until `look_up_rows` says how they are looked up."""

    def __init__(self, name: str | None, initializers: _Initializers, matrix: StoredMatrix) -> None:
        super().__init__(name)
        self._initializers = initializers
        self._matrix = matrix

    def forward(self, op: OpBuilder, input_ids: ir.Value) -> ir.Value:
        inputs = [self._initializers.value(op, tensor) for tensor in self._matrix.inputs]
        node = ir.node(_PACKED_EMBEDDING, [input_ids, *inputs], domain=DOMAIN)
        op.builder.add_node(node)
        node.outputs[0].dtype = ir.DataType.FLOAT
        return node.outputs[0]


def _expand_embeddings(graph: onnx.GraphProto, matrices: Mapping[str, StoredMatrix]) -> None:
    """Put standard operators in the place of _PackedEmbedding's nodes; `matrices` by the name of their values."""
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == _PACKED_EMBEDDING:
            tokens, *stored = node.input
            matrix = matrices[stored[0]]
            expanded, constants = look_up_rows(tokens, node.output[0], stored, matrix.in_features, matrix.config)
            nodes += expanded
            graph.initializer.extend(constants)
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


class _Parameters:
    """Gives the modules and the initializers of a mobius model the checkpoint's bytes."""

    def __init__(self, checkpoint: PackedCheckpoint, accuracy_level: int | None) -> None:
        self.stored = StoredTensors(checkpoint)
        self.initializers = _Initializers()
        self.accuracy_level = accuracy_level
        self.tensors: dict[str, Tensor] = {}
        self.embeddings: dict[str, StoredMatrix] = {}

    def put_into(self, module: Any) -> None:
        """Replace linear layers and embeddings by those that use stored bytes, in place."""
        self.tensors = module.preprocess_weights(dict(self.stored.state_dict))
        modules = dict(module.named_modules())
        for path, child in modules.items():
            if type(child) is Linear:
                new: nn.Module = self._linear(path, child)
            elif type(child) is Embedding:
                new = self._embedding(path, child)
            else:
                continue
            parent, _, name = path.rpartition(".")
            setattr(modules[parent], name, new)

    def _linear(self, path: str, linear: Linear) -> _StoredLinear:
        """Has a bias if the checkpoint has one: mobius does not know of all that a configuration can ask for."""
        matrix = self.stored.matrix(self._rows(f"{path}.weight"))
        name = f"{path}.bias"
        bias = self.stored.dense(self._rows(name)) if name in self.tensors else empty_initializer(TensorProto.FLOAT)
        level = self.accuracy_level
        if level is None:
            level = 4 if matrix.config.weight_dtype in INTEGER_DTYPES else 0
        return _StoredLinear(linear.name, self.initializers, matrix, bias, level)

    def _embedding(self, path: str, embedding: Embedding) -> nn.Module:
        rows = self._rows(f"{path}.weight")
        if not self.stored.is_packed(rows):
            return _StoredEmbedding(embedding.name, self.initializers, self.stored.dense(rows))
        matrix = self.stored.matrix(rows)
        self.embeddings[matrix.inputs[0].name] = matrix
        return _PackedEmbedding(embedding.name, self.initializers, matrix)

    def _rows(self, name: str) -> StoredRows:
        rows = self.stored.find(self._tensor(name))
        if rows is None:
            raise NMError(f"tensor {name!r} of the fused graph is not stored in one piece; export the traced graph.")
        return rows

    def _tensor(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise NMError(f"tensor {name!r} of the fused graph is missing from {self.stored.checkpoint.folder}.")
        return self.tensors[name]

    def _read(self, name: str, rows: StoredRows | None) -> Tensor:
        """A small matrix, as the router of experts is."""
        if rows is None or not rows.whole or self.stored.is_packed(rows):
            raise NMError(f"tensor {name!r} of the fused graph cannot be packed; export the traced graph.")
        return self.stored.checkpoint.tensor(rows.name).float()

    def fill(self, model: ir.Model) -> None:
        """Give every initializer its value; norms and routers become float32 copies unless stored as float32."""
        for name, value in model.graph.initializers.items():
            if value.const_value is not None:
                continue
            if name in self.initializers.tensors:
                value.const_value = ir.serde.deserialize_tensor(self.initializers.tensors[name])
                continue
            tensor = self._tensor(name)
            rows = self.stored.find(tensor)
            if tensor.is_meta:
                tensor = self._read(name, rows)
            stored = None if rows is None else self.stored.dense(rows)
            if stored is not None and stored.data_type == TensorProto.FLOAT:
                value.const_value = ir.serde.deserialize_tensor(stored)
            else:
                value.const_value = ir.tensor(tensor.contiguous().numpy().astype(np.float32), name=name)
        if self.stored.unused:
            raise NMError(f"the fused graph would leave out {min(self.stored.unused)!r}; export the traced graph.")
