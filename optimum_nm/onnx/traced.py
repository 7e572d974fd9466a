"""A checkpoint's graph from Optimum's exporter, made without its weights.

During tracing every linear layer and embedding stands for its stored tensors by a number, its handle; only norms and
other small parameters are read. Afterwards each handle becomes the initializers that point into the checkpoint.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import onnx
import torch
from accelerate import init_empty_weights
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..config import INTEGER_DTYPES
from ..errors import NMError
from ..nn.convert import dense_weight, linear_layers, replace_linear
from ..nn.modeling import auto_class
from ..packing.checkpoint import PackedCheckpoint
from .external_data import CheckpointInitializers, external_initializer
from .onnx_config import onnx_config_factory
from .operator import DOMAIN, matmul_nm_node
from .packed_embedding import look_up_rows
from .traced_experts import make_experts_traceable

_LINEAR, _EMBEDDING = "StoredLinear", "StoredEmbedding"


@dataclass(frozen=True)
class StoredModule:
    """A linear layer or embedding, by the names its tensors have in the checkpoint.

    `layer` is set for a packed linear and for an embedding that shares one, `weight` for what is stored as a plain
    matrix: `[out_features, in_features]`, `[in_features, out_features]` if `transposed` (Conv1D), `[rows, width]` for
    an embedding.
    """

    layer: str | None = None
    weight: str | None = None
    bias: str | None = None
    transposed: bool = False


class _StoredLinear(torch.autograd.Function):
    """Stands for a linear layer in the traced graph; the values it computes are of no interest."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, handle: Tensor, out_features: int) -> Tensor:
        return input.new_zeros(*input.shape[:-1], out_features)

    @staticmethod
    def symbolic(g: Any, input: Any, handle: Any, out_features: int) -> Any:
        output = g.op(f"{DOMAIN}::{_LINEAR}", input, handle)
        return output.setType(input.type().with_sizes(_sizes(input, last=out_features, kept=-1)))


class _StoredEmbedding(torch.autograd.Function):
    """Stands for an embedding in the traced graph."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, handle: Tensor, width: int) -> Tensor:
        return torch.zeros(*input.shape, width)

    @staticmethod
    def symbolic(g: Any, input: Any, handle: Any, width: int) -> Any:
        output = g.op(f"{DOMAIN}::{_EMBEDDING}", input, handle)
        float_type = input.type().with_dtype(torch.float32)
        return output.setType(float_type.with_sizes(_sizes(input, last=width, kept=None)))


def _sizes(input: Any, last: int, kept: int | None) -> list[int | None] | None:
    """The leading sizes of a traced value, `[:kept]`, None where they vary, followed by `last`; None if unknown."""
    sizes = input.type().varyingSizes()
    return None if sizes is None else [*sizes[:kept], last]


class _HandleLinear(nn.Module):
    def __init__(self, handle: int, out_features: int) -> None:
        super().__init__()
        self.register_buffer("handle", torch.tensor([handle]))
        self.out_features = out_features

    def forward(self, input: Tensor) -> Tensor:
        return _StoredLinear.apply(input, self.handle, self.out_features)


@contextmanager
def _embeddings_by_handle() -> Iterator[None]:
    """While it lasts, nn.Embedding, also under subclasses that add to it, looks nothing up but leaves its handle."""
    original = nn.Embedding.forward

    def forward(self: nn.Embedding, input: Tensor) -> Tensor:
        return _StoredEmbedding.apply(input, self.handle, self.embedding_dim)

    nn.Embedding.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Embedding.forward = original  # type: ignore[method-assign]


def traced_graph(
    checkpoint: PackedCheckpoint, task: str, accuracy_level: int | None, opset: int | None
) -> onnx.ModelProto:
    """The graph of `task` for a checkpoint, as Optimum's exporter names its inputs and outputs.

    Args:
        checkpoint: from `optimum_nm.nn.skeleton.open_checkpoint`.
        task: one of `onnx_config.TASKS`.
        accuracy_level: of all packed layers; None for 4 where the stored values are integers and 0 elsewhere.
        opset: the exporter's default for the model type if None.

    Raises:
        NMError: there is no exporter, it does not support the model type, or a tensor is missing or not what it should
            be.
    """
    make_onnx_config = onnx_config_factory(checkpoint.model_config.get("model_type", ""), task)
    model, modules = _handle_model(checkpoint)
    prefix = ""
    if task.startswith("feature-extraction"):
        base = cast(PreTrainedModel, model.base_model)
        prefix = "" if base is model else f"{model.base_model_prefix}."  # an encoder is its own base
        model = base
    model.config.use_cache = task.endswith("-with-past")
    onnx_config = make_onnx_config(model.config)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "traced.onnx"
        _export(model, onnx_config, path, opset)
        del model
        proto = onnx.load(str(path), load_external_data=True)
    initializers = CheckpointInitializers(checkpoint)
    _Rewriter(initializers, modules, accuracy_level).rewrite(proto.graph)
    _refer_to_small_tensors(proto.graph, checkpoint, prefix)
    proto.graph.initializer.extend(initializers.tensors.values())
    return proto


def _export(model: PreTrainedModel, onnx_config: Any, path: Path, opset: int | None) -> None:
    from optimum.exporters.onnx import export

    with warnings.catch_warnings(), _embeddings_by_handle():
        warnings.simplefilter("ignore")  # what the tracer warns of has been seen to by Optimum's patches
        try:
            export(model, onnx_config, path, opset=opset, disable_dynamic_axes_fix=True)
        except Exception as error:  # of any kind: the model's own code runs, and the tracer
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise NMError(f"Optimum's exporter cannot export this {type(model).__name__}: {reason}") from error


def _handle_model(checkpoint: PackedCheckpoint) -> tuple[PreTrainedModel, list[StoredModule]]:
    """The model with handles in place of weights, and the module each handle stands for."""
    config = AutoConfig.from_pretrained(checkpoint.folder)
    with init_empty_weights(include_buffers=False):
        model = auto_class(config).from_config(config, dtype=torch.float32)
    model.tie_weights()
    make_experts_traceable(model)
    shared: nn.Module | None = model.get_input_embeddings() if checkpoint.config.share_embedding else None
    output = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), None)
    if shared is not None:
        del shared.weight
    stored = _stored_names(model, checkpoint)
    modules: list[StoredModule] = []
    for name, linear in linear_layers(model).items():
        bias = stored[f"{name}.bias"] if linear.bias is not None else None
        if f"{name}.values" in checkpoint.locations:
            modules.append(StoredModule(layer=name, bias=bias))
            out_features = checkpoint.features[name][1]
        else:
            transposed = isinstance(linear, Conv1D)
            modules.append(StoredModule(weight=stored[f"{name}.weight"], bias=bias, transposed=transposed))
            out_features = dense_weight(linear).shape[0]
        replace_linear(model, name, _HandleLinear(len(modules) - 1, out_features))
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            if module is shared:
                modules.append(StoredModule(layer=output))
            else:
                modules.append(StoredModule(weight=stored[f"{name}.weight"]))
                del module.weight
            module.register_buffer("handle", torch.tensor([len(modules) - 1]))
    for name, _ in [*model.named_parameters()]:
        _set_parameter(model, name, checkpoint.tensor(stored[name]).float())
    for name, buffer in model.named_buffers():
        if name in checkpoint.locations:
            buffer.copy_(checkpoint.tensor(name))
    return model.eval(), modules


def _stored_names(model: nn.Module, checkpoint: PackedCheckpoint) -> dict[str, str]:
    """The checkpoint's name of each parameter; of several names of a shared one, the file may hold any.

    Raises:
        NMError: a parameter that is not a packed weight is missing.
    """
    by_identity: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_identity.setdefault(id(parameter), []).append(name)
    stored = {}
    for names in by_identity.values():
        present = [name for name in names if name in checkpoint.locations]
        for name in names:
            if present:
                stored[name] = name if name in present else present[0]
            elif f"{name.removesuffix('.weight')}.values" not in checkpoint.locations:
                raise NMError(f"tensor {name!r} is missing from {checkpoint.folder}.")
    return stored


def _set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Parameter(value, requires_grad=False))


class _Rewriter:
    """Puts MatMulNM, Gather and MatMul nodes where the trace left StoredLinear and StoredEmbedding."""

    def __init__(
        self, initializers: CheckpointInitializers, modules: list[StoredModule], accuracy_level: int | None
    ) -> None:
        self.initializers = initializers
        self.modules = modules
        self.accuracy_level = accuracy_level

    def rewrite(self, graph: onnx.GraphProto) -> None:
        handles = {t.name: t for t in graph.initializer if t.data_type == TensorProto.INT64 and list(t.dims) == [1]}
        nodes: list[onnx.NodeProto] = []
        used = set()
        for node in graph.node:
            if node.domain != DOMAIN:
                nodes.append(node)
                continue
            used.add(node.input[1])
            module = self.modules[int(numpy_helper.to_array(handles[node.input[1]])[0])]
            nodes += self._embedding(node, module) if node.op_type == _EMBEDDING else self._linear(node, module)
        kept = [tensor for tensor in graph.initializer if tensor.name not in used]
        del graph.node[:]
        graph.node.extend(nodes)
        del graph.initializer[:]
        graph.initializer.extend(kept)

    def _linear(self, node: onnx.NodeProto, module: StoredModule) -> list[onnx.NodeProto]:
        if module.transposed:
            return self._conv1d(node, module)
        if module.layer is not None:
            config, names = self.initializers.packed_layer(module.layer)
            in_features, out_features = self.initializers.checkpoint.features[module.layer]
        else:
            assert module.weight is not None
            config, names = self.initializers.dense_layer(module.weight)
            out_features, in_features = self.initializers.checkpoint.locate(module.weight).shape
        level = self.accuracy_level
        if level is None:
            level = 4 if config.weight_dtype in INTEGER_DTYPES else 0
        inputs = [node.input[0], *names, self.initializers.bias(module.bias)]
        name = node.name.replace(_LINEAR, "MatMulNM")
        return [matmul_nm_node(inputs, node.output[0], in_features, out_features, config, level, name)]

    def _conv1d(self, node: onnx.NodeProto, module: StoredModule) -> list[onnx.NodeProto]:
        weight, cast_weight = self._as_float32(module.weight, node.name)
        bias, cast_bias = self._as_float32(module.bias, node.name)
        product = f"{node.output[0]}_product"
        return [
            *cast_weight,
            *cast_bias,
            helper.make_node("MatMul", [node.input[0], weight], [product], name=f"{node.name}/MatMul"),
            helper.make_node("Add", [product, bias], [node.output[0]], name=f"{node.name}/Add"),
        ]

    def _as_float32(self, tensor_name: str | None, node_name: str) -> tuple[str, list[onnx.NodeProto]]:
        assert tensor_name is not None
        name, element_type = self.initializers.dense(tensor_name)
        if element_type == TensorProto.FLOAT:
            return name, []
        cast = f"{node_name}/{tensor_name}_float32"
        return cast, [helper.make_node("Cast", [name], [cast], name=f"{cast}/Cast", to=TensorProto.FLOAT)]

    def _embedding(self, node: onnx.NodeProto, module: StoredModule) -> list[onnx.NodeProto]:
        """Rows are cast after they are looked up: a cast before would be done to the whole table."""
        if module.layer is not None:
            config, names = self.initializers.packed_layer(module.layer)
            width, _ = self.initializers.checkpoint.features[module.layer]
            expanded, constants = look_up_rows(node.input[0], node.output[0], names, width, config)
            self.initializers.tensors |= {tensor.name: tensor for tensor in constants}
            return expanded
        assert module.weight is not None
        table, element_type = self.initializers.dense(module.weight)
        name, output = node.name.replace(_EMBEDDING, "Gather"), node.output[0]
        rows = output if element_type == TensorProto.FLOAT else f"{output}_stored"
        nodes = [helper.make_node("Gather", [table, node.input[0]], [rows], name=name, axis=0)]
        if rows != output:
            nodes.append(helper.make_node("Cast", [rows], [output], name=f"{name}/Cast", to=TensorProto.FLOAT))
        return nodes


def _refer_to_small_tensors(graph: onnx.GraphProto, checkpoint: PackedCheckpoint, prefix: str) -> None:
    """Point the norms that the file holds as float32, as the graph does, into it; the others stay float32 copies."""
    for tensor in graph.initializer:
        location = checkpoint.locations.get(prefix + tensor.name)
        if location is not None and location.dtype == "F32" and tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(external_initializer(tensor.name, location, TensorProto.FLOAT))
