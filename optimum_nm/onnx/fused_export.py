"""Writing the fused graph of a packed checkpoint into its folder."""

from __future__ import annotations

import os
from pathlib import Path

import onnx

from ..errors import NMError
from ..nn.skeleton import open_checkpoint
from .external_data import MODEL_FILE, check_files
from .fallback import add_fallback
from .fused import fused_graph
from .genai import RUNTIMES, add_genai_files


def export_fused(
    folder: str | Path, *, accuracy_level: int | None = None, runtime: str = RUNTIMES[0], fallback: bool = True
) -> Path:
    """Write model.onnx for a packed checkpoint, replacing an older one; its weights are the checkpoint's own files.

    Args:
        folder: a packed checkpoint of a model type in `fused.MODEL_TYPES`.
        accuracy_level: of all packed layers: 0 keeps activations float32, 4 lets them be rounded to int8 per row and
            block; None for 4 where the stored values are integers and 0 elsewhere.
        runtime: "genai" for onnxruntime-genai: genai_config.json and the operator library come beside model.onnx, which
            gives the logits after the last token only. ONNX Runtime and ORTModelForCausalLM generate with it too; to
            score texts, logits after every token are needed, which "onnxruntime" gives.
        fallback: put the function inside by which an ONNX Runtime without the library runs the model.

    Returns:
        The path of model.onnx.

    Raises:
        NMError: the checkpoint is damaged, its model has no fused graph, an option is none of the above, or the folder
            cannot be written.
    """
    if runtime not in RUNTIMES:
        raise NMError(f"runtime is {runtime!r}; it must be one of {', '.join(RUNTIMES)}.")
    checkpoint = open_checkpoint(folder)
    check_files(checkpoint)
    model = fused_graph(checkpoint, accuracy_level, last_logits=runtime == "genai")
    if fallback:
        add_fallback(model)
    path = checkpoint.folder / MODEL_FILE
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(model.SerializeToString(deterministic=True))
        onnx.checker.check_model(temporary)
        if runtime == "genai":
            add_genai_files(checkpoint.folder, model.graph)
        temporary.rename(path)
    except OSError as error:
        raise NMError(f"{checkpoint.folder} cannot be written ({error.strerror}).") from None
    finally:
        temporary.unlink(missing_ok=True)
    return path
