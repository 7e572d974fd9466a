"""Packing the N:M sparse weights of an ONNX file, whatever wrote it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError, Message
from tqdm.auto import tqdm

from ..config import INTEGER_DTYPES, LayerConfig, NMConfig
from ..errors import NMError
from ..patterns import NMPattern
from .checker import check_file
from .constant_weights import ConstantWeight, constant_weights
from .conversion_summary import ConversionSummary, WeightSummary
from .external_file import external_file
from .fallback import OLDEST_OPSET, add_fallback
from .operator import DOMAIN, VERSION
from .replace_products import ProductReplacer

ACCURACY_LEVELS = (0, 4)
OLDEST_HALF_OPSET = 15  # of the fallback function, if activations are not float32
FUNCTIONS_IR_VERSION = 8
QUANTIZED_PRODUCTS = ("MatMulNBits", "MatMulInteger", "QLinearMatMul", "DynamicQuantizeMatMul")


def convert_onnx(
    source: str | Path,
    target: str | Path,
    pattern: str = "8:16",
    weight_dtype: str = "float16",
    group_size: int | str = 128,
    positions: str | None = None,
    *,
    accuracy_level: int | None = None,
    exclude: Sequence[str] = (),
    skip_dense: bool = False,
    fallback: bool = True,
    overwrite: bool = False,
) -> ConversionSummary:
    """Write a copy of an ONNX file in which the N:M sparse weights of linear layers are packed.

    Float matrices that MatMul and Gemm nodes multiply by become initializers of MatMulNM nodes, with the bias added
    behind them; their zeros are what the pattern leaves out, nothing else is pruned. All initializers lie in one
    file beside `target`, called as it with ".data" behind. Weights are read, packed and written a few rows at a time;
    of a source with external data no more than a layer is ever in memory.

    Args:
        source: an ONNX file, with its external data if it has any.
        target: the file to write.
        pattern, weight_dtype, group_size, positions: as in NMConfig.
        accuracy_level: of all MatMulNM nodes: 0 keeps activations float32, 4 lets them be rounded to int8 per row and
            block; None for 4 where the stored values are integers and 0 elsewhere.
        exclude: shell wildcards; a weight stays as it is if one matches its module, its tensor or a node that uses it.
        skip_dense: leave weights that do not satisfy the pattern as they are instead of refusing the file.
        fallback: put the function inside by which an ONNX Runtime without the library runs the model.
        overwrite: replace `target` if it exists.

    Returns:
        What was packed and what was left as it is.

    Raises:
        NMError: the source is not a valid ONNX file, a weight that is not excluded does not satisfy the pattern, none
            does, an option is out of range, or the target cannot be written. Nothing is left behind.
    """
    config = NMConfig(pattern, weight_dtype=weight_dtype, group_size=group_size, positions=positions, exclude=[])
    layer_config = config.layer("")
    assert layer_config is not None
    if accuracy_level not in (None, *ACCURACY_LEVELS):
        raise NMError(f"accuracy_level is {accuracy_level!r}; it must be 0 or 4, or None.")
    if accuracy_level is None:
        accuracy_level = 4 if weight_dtype in INTEGER_DTYPES else 0
    source, target = Path(source), Path(target)
    model = _read(source)
    _check_target(target, source, model, overwrite)
    weights = constant_weights(model.graph)
    if not weights:
        reason = f"{source} has no MatMul or Gemm with a constant float matrix; there is nothing to pack"
        raise NMError(f"{reason}{_quantized_hint(model)}.")
    _choose(source, weights, layer_config.pattern, exclude, skip_dense)
    if fallback:
        _check_opset(source, model, weights)
    bytes_before = sum(path.stat().st_size for path in (source, *_external_files(model)))
    summaries = _write(model, weights, target, layer_config, accuracy_level, fallback)
    bytes_after = sum(path.stat().st_size for path in (target, _data_path(target)))
    return ConversionSummary(summaries, bytes_before, bytes_after)


def _read(source: Path) -> ir.Model:
    """The model, with its external data where it is."""
    if not source.is_file():
        raise NMError(f"{source} is no file; an ONNX file is needed.")
    try:
        check_file(source)
        proto = onnx.load(str(source), load_external_data=False)
        if proto.graph.sparse_initializer:
            raise NMError(f"{source} has sparse initializers, which are not read; they must be dense.")
        if any(isinstance(text, bytes) for text in _texts(proto)):
            raise NMError(f"{source} is not a valid ONNX model (a name in it is not UTF-8).")
        for entry in proto.opset_import:
            entry.domain = "" if entry.domain == "ai.onnx" else entry.domain  # two names of one domain
        model = ir.from_proto(proto)
        ir.external_data.set_base_dir(model.graph, source.absolute().parent)
        for tensor in _external_tensors(model):
            tensor.numpy()  # maps it: it lies in the model's folder and is not cut off
            tensor.release()
    except NMError:
        raise
    except (onnx.checker.ValidationError, DecodeError, RuntimeError, ValueError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise NMError(f"{source} is not a valid ONNX model ({reason}).") from None
    return model


def _texts(message: Message) -> Iterator[str | bytes]:
    """All string fields, which protobuf gives as bytes where they are not UTF-8."""
    for field, value in message.ListFields():
        items = [value] if isinstance(value, (Message, str, bytes)) else value
        if field.type == field.TYPE_STRING:
            yield from items
        elif field.type == field.TYPE_MESSAGE:
            for item in items:
                yield from _texts(item)


def _external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value


def _external_files(model: ir.Model) -> set[Path]:
    return {Path(tensor.path).resolve() for tensor in _external_tensors(model)}


def _data_path(target: Path) -> Path:
    return target.with_name(f"{target.name}.data")


def _check_target(target: Path, source: Path, model: ir.Model, overwrite: bool) -> None:
    if not target.absolute().parent.is_dir():
        raise NMError(f"output {target} cannot be written: {target.parent} is no folder.")
    sources = {source.resolve(), *_external_files(model)}
    for path in (target, _data_path(target)):
        if path.resolve() in sources:
            raise NMError(f"output {target} would replace {path}, which belongs to the model; choose another name.")
        if path.is_dir() or (path.exists() and not overwrite):
            raise NMError(f"output {path} exists; choose another, or overwrite it (--overwrite, overwrite=True).")


def _quantized_hint(model: ir.Model) -> str:
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type in QUANTIZED_PRODUCTS:
            return f" (the weight of {node.op_type} {node.name!r} is quantized; convert the float model it comes from)"
    return ""


def _choose(
    source: Path, weights: list[ConstantWeight], pattern: NMPattern, exclude: Sequence[str], skip_dense: bool
) -> None:
    """Set `keep` of the weights that are excluded or, if they may be skipped, do not satisfy the pattern.

    Raises:
        NMError: a weight is to be refused, none is left to pack, or a wildcard matches none.
    """
    for wildcard in exclude:
        if not any(_matches(weight, [wildcard]) for weight in weights):
            raise NMError(f"exclude pattern {wildcard!r} matches no weight; one is called {weights[0].name!r}.")
    refused = {}
    for weight in tqdm(weights, desc="Checking", unit="weight", delay=2):
        if _matches(weight, exclude):
            weight.keep = "it is excluded"
        elif not weight.keep and not pattern.is_dense and (misfit := weight.misfit(pattern)):
            refused[weight.name] = f"{weight} {misfit}; {pattern} keeps at most {pattern.n}"
            weight.keep = f"it {misfit}"
    packable = sum(not weight.keep for weight in weights)
    if refused and not (skip_dense and packable):
        name, sentence = next(iter(refused.items()))
        if not packable:
            raise NMError(f"{source} has no {pattern} sparse weight to pack: {sentence}.")
        others = f", and {len(refused) - 1} more do not fit" if len(refused) > 1 else ""
        raise NMError(f"{sentence}{others}: leave it as it is by --exclude {name!r}, or all such by --skip-dense.")
    if not packable:
        raise NMError(f"{source} has no weight to pack: {weights[0]} is left because {weights[0].keep}.")


def _matches(weight: ConstantWeight, wildcards: Sequence[str]) -> bool:
    return any(fnmatchcase(name, wildcard) for name in weight.names for wildcard in wildcards)


def _check_opset(source: Path, model: ir.Model, weights: list[ConstantWeight]) -> None:
    opset = model.opset_imports.get("", 1)
    all_float32 = all(weight.tensor.dtype == ir.DataType.FLOAT for weight in weights if not weight.keep)
    needed = OLDEST_OPSET if all_float32 else OLDEST_HALF_OPSET
    if opset < needed:
        raise NMError(
            f"{source} has opset {opset}, and the fallback function needs {needed} or newer; leave it out by "
            "--no-fallback (fallback=False), or export the model with a newer opset."
        )


def _write(
    model: ir.Model,
    weights: list[ConstantWeight],
    target: Path,
    config: LayerConfig,
    accuracy_level: int,
    fallback: bool,
) -> list[WeightSummary]:
    """Replace the weights and write both files, under temporary names until they are whole and checked."""
    data = _data_path(target)
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.absolute().parent))
        with external_file(folder / data.name) as file:
            replacer = ProductReplacer(model, file, config, accuracy_level)
            summaries = [_pack(weight, replacer) for weight in tqdm(weights, desc="Packing", unit="weight", delay=2)]
            file.move_initializers(model)
        model.opset_imports[DOMAIN] = VERSION
        proto = ir.to_proto(model)
        if fallback:
            add_fallback(proto)
            proto.ir_version = max(proto.ir_version, FUNCTIONS_IR_VERSION)
        (folder / target.name).write_bytes(proto.SerializeToString(deterministic=True))
        check_file(folder / target.name)
        target.unlink(missing_ok=True)  # an old model beside new data would be worse than none
        (folder / data.name).replace(data)
        (folder / target.name).replace(target)
    except OSError as error:
        raise NMError(f"output {target} cannot be written ({error.strerror}).") from None
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    return summaries


def _pack(weight: ConstantWeight, replacer: ProductReplacer) -> WeightSummary:
    nodes = tuple(product.node.name or "" for product in weight.products)
    shape = (weight.out_features, weight.in_features)
    before = weight.tensor.nbytes
    after, error = (before, 0.0) if weight.keep else replacer.replace(weight)
    return WeightSummary(weight.name, weight.value.name or "", nodes, shape, before, after, error, weight.keep)
