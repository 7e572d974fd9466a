"""What a user could run instead: the dense model in ONNX Runtime, as it is and quantized by its own tools."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import NMError

BLOCK_SIZE = 128  # of MatMulNBits: the group size of our own integer types
ACCURACY_LEVEL = 4  # its fastest: activations rounded to int8


def dense_variants(model: str, load_options: dict[str, Any], names: list[str], work: Path) -> dict[str, Path]:
    """Folders with a model.onnx for each of `names` (of VARIANTS), built in `work` unless an earlier run did.

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
                QUANTIZERS[name](folder / "float32" / "model.onnx", built / "model.onnx")
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
    packages = ("optimum-onnx", "onnxruntime", "transformers")
    try:
        versions = [importlib.metadata.version(package) for package in packages]
    except importlib.metadata.PackageNotFoundError as error:
        raise NMError(f"{error.name} is not installed; `pip install 'optimum-nm[onnx]'` brings it.") from None
    files = [path for path in sorted(Path(model).glob("*")) if path.is_file()]
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    described = json.dumps([str(Path(model).resolve()) if files else model, load_options, versions, states])
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _export(model: str, load_options: dict[str, Any], folder: Path) -> None:
    from optimum.exporters.onnx import onnx_export_from_model

    from .perplexity import load_model

    loaded, _ = load_model(model, "float32", load_options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of every Python condition in transformers
        onnx_export_from_model(loaded, folder, task="text-generation-with-past", do_validation=False)


def _quantize_dynamic(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        source, target, op_types_to_quantize=["MatMul"], weight_type=QuantType.QInt8, use_external_data_format=True
    )


def _quantize_blocks(bits: int) -> Callable[[Path, Path], None]:
    def quantize(source: Path, target: Path) -> None:
        import onnx
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(
            onnx.load(source), bits=bits, block_size=BLOCK_SIZE, is_symmetric=True, accuracy_level=ACCURACY_LEVEL
        )
        quantizer.process()
        quantizer.model.save_model_to_file(str(target), use_external_data_format=True)

    return quantize


QUANTIZERS = {"int8-dynamic": _quantize_dynamic, "int8": _quantize_blocks(8), "int4": _quantize_blocks(4)}
VARIANTS = ("float32", *QUANTIZERS)
