"""What a user could run instead: the dense model in ONNX Runtime, as it is and quantized by its own tools."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import NMError

if TYPE_CHECKING:
    import onnx

ACCURACY_LEVEL = 4  # of MatMulNBits, its fastest: activations rounded to int8
BLOCK_SIZES = {8: 128, 4: 32}  # columns a scale; int4 loses a third of SmolLM2's perplexity more with 128


def dense_variants(model: str, load_options: dict[str, Any], names: list[str], work: Path) -> dict[str, Path]:
    """A folder with model.onnx and tokenizer for each of `names` (of VARIANTS), built in `work` unless it is there.

    Their graph is the fused one where packed models of the type have it, and else Optimum's.

    Args:
        model: dense causal language model, a folder or a name on the Hugging Face Hub.
        load_options: further arguments of `from_pretrained`.

    Raises:
        NMError: the model cannot be loaded, or optimum-onnx is not installed.
    """
    from tqdm.auto import tqdm

    folder = work / _fingerprint(model, load_options)
    folders = {name: folder / name for name in names}
    needed = [name for name in dict.fromkeys(["float32", *names]) if not (folder / name / "model.onnx").exists()]
    if not folders.keys() & set(needed):
        return folders
    for name in tqdm(needed, desc="Dense variants", unit="variant"):
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=_made(folder)) as temporary:
            built = Path(temporary) / name
            built.mkdir()
            if name == "float32":
                _export(model, load_options, built)
            else:
                _quantize(name, folder / "float32", built)
            shutil.rmtree(folder / name, ignore_errors=True)
            built.rename(folder / name)
    return folders


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NMError(f"work folder {folder} cannot be written ({error.strerror}).") from None
    return folder


def _fingerprint(model: str, load_options: dict[str, Any]) -> str:
    """Another model, changed files or other versions build anew."""
    packages = ("optimum-onnx", "onnxruntime", "transformers", "optimum-nm")
    try:
        versions = [importlib.metadata.version(package) for package in packages]
    except importlib.metadata.PackageNotFoundError as error:
        raise NMError(f"{error.name} is not installed; `pip install 'optimum-nm[onnx]'` brings it.") from None
    states = file_states(model)
    identity = str(Path(model).resolve()) if states else model
    fused = importlib.util.find_spec("mobius") is not None
    described = json.dumps([identity, load_options, versions, fused, states])
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def file_states(model: str) -> list[list[Any]]:
    """Name, size and time of change of every file of a model's folder; empty for a name on the Hugging Face Hub."""
    files = [path for path in sorted(Path(model).glob("*")) if path.is_file()]
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _export(model: str, load_options: dict[str, Any], folder: Path) -> None:
    from .perplexity import load_model

    loaded, tokenizer = load_model(model, "float32", load_options)
    loaded.save_pretrained(folder)
    tokenizer.save_pretrained(folder, legacy_format=False if tokenizer.is_fast else None)
    if _has_fused_graph(folder):
        import onnx_ir as ir

        from ..onnx.fused import dense_fused_graph

        ir.save(dense_fused_graph(folder), folder / "model.onnx", external_data="model.onnx.data")
    else:
        from optimum.exporters.onnx import onnx_export_from_model

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing warns of every Python condition in transformers
            onnx_export_from_model(loaded, folder, task="text-generation-with-past", do_validation=False)
    for file in folder.glob("*.safetensors*"):
        file.unlink()


def _has_fused_graph(folder: Path) -> bool:
    if importlib.util.find_spec("mobius") is None:
        return False
    from ..onnx.fused import no_fused_graph

    return no_fused_graph(folder) is None


def _quantize(name: str, source: Path, target: Path) -> None:
    import onnx

    for file in source.iterdir():
        if not file.name.startswith("model.onnx"):
            shutil.copy(file, target)
    model = onnx.load(source / "model.onnx")
    _transpose_weights(model.graph)
    if name == "int8-dynamic":
        _quantize_dynamic(model, target / "model.onnx")
    else:
        _quantize_blocks(model, target / "model.onnx", bits=int(name.removeprefix("int")))


def _transpose_weights(graph: onnx.GraphProto) -> None:
    """Compute every Transpose of a weight, as of the output layer tied to an embedding: only weights are quantized."""
    from onnx import numpy_helper

    weights = {tensor.name: tensor for tensor in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in weights]:
        axes = next((attribute.ints for attribute in node.attribute if attribute.name == "perm"), None)
        transposed = numpy_helper.to_array(weights[node.input[0]]).transpose(axes)
        graph.initializer.append(numpy_helper.from_array(transposed.copy(), node.output[0]))
        graph.node.remove(node)


def _quantize_dynamic(model: onnx.ModelProto, path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        model, path, op_types_to_quantize=["MatMul"], weight_type=QuantType.QInt8, use_external_data_format=True
    )


def _quantize_blocks(model: onnx.ModelProto, path: Path, bits: int) -> None:
    """MatMulNBits for every linear layer; the embedding too as int4, the one type the quantizer has for it."""
    level = logging.root.level
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer, logger

    logging.root.setLevel(level)  # importing it turns on every package's messages
    logger.setLevel(logging.WARNING)  # three lines a layer, through a progress bar
    quantizer = MatMulNBitsQuantizer(
        model,
        bits=bits,
        block_size=BLOCK_SIZES[bits],
        is_symmetric=True,
        accuracy_level=ACCURACY_LEVEL,
        op_types_to_quantize=("MatMul", "Gather") if bits == 4 else ("MatMul",),
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(path), use_external_data_format=True)


VARIANTS = ("float32", "int8-dynamic", "int8", "int4")
