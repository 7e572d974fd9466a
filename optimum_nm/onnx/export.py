"""From a packed checkpoint to model.onnx in the same folder, whose initializers are the checkpoint's own bytes."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx

from ..errors import NMError
from ..nn.skeleton import open_checkpoint
from ..packing.checkpoint import PackedCheckpoint
from ..sparsify.checkpoint import output_folder
from .checker import check_file
from .external_data import MODEL_FILE, check_files
from .fallback import add_fallback
from .genai import RUNTIMES, add_genai_files
from .onnx_config import TASKS
from .operator import DOMAIN, VERSION
from .traced import traced_graph

logger = logging.getLogger(__name__)
ACCURACY_LEVELS = (0, 4)
GRAPHS = ("auto", "fused", "traced")


def export_checkpoint(
    folder: str | Path,
    output: str | Path | None = None,
    task: str = TASKS[0],
    *,
    graph: str = GRAPHS[0],
    runtime: str = RUNTIMES[0],
    accuracy_level: int | None = None,
    opset: int | None = None,
    fallback: bool = True,
    overwrite: bool = False,
) -> Path:
    """Write model.onnx for a packed checkpoint, replacing an older one.

    No weight is copied or even read: what the graph multiplies by are external initializers that point into the
    checkpoint's safetensors files, so one file serves transformers and ONNX Runtime.

    Args:
        folder: a packed checkpoint.
        output: a new folder that gets model.onnx and a copy of the checkpoint beside it, which ONNX Runtime asks for;
            None for the checkpoint's own.
        task: one of TASKS, as Optimum names them.
        graph: "fused" is constructed, several times as fast, and there is one for the model types in
            `fused.MODEL_TYPES` and the first task; "traced" comes from Optimum's exporter; "auto" takes the first
            that there is.
        runtime: "genai" for onnxruntime-genai: genai_config.json and the operator library come beside model.onnx, which
            gives the logits after the last token only. ONNX Runtime and ORTModelForCausalLM generate with it too; to
            score texts, logits after every token are needed, which "onnxruntime" gives.
        accuracy_level: of all packed layers: 0 keeps activations float32, 4 lets them be rounded to int8 per row and
            block; None for 4 where the stored values are integers and 0 elsewhere.
        opset: ONNX operator set of the traced graph, at least 14; None for the one of Optimum's exporter.
        fallback: put the function inside by which an ONNX Runtime without the library runs the model.
        overwrite: replace `output` if it is a model folder.

    Returns:
        The path of model.onnx.

    Raises:
        NMError: the checkpoint is damaged, its model type or the task is not one that Optimum's exporter supports, an
            option is out of range, or the folder cannot be written. Nothing is left behind.
    """
    if task not in TASKS:
        raise NMError(f"task is {task!r}; it must be one of {', '.join(TASKS)}.")
    if accuracy_level not in (None, *ACCURACY_LEVELS):
        raise NMError(f"accuracy_level is {accuracy_level!r}; it must be 0 or 4, or None.")
    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not 14 <= opset <= newest:
        raise NMError(f"opset is {opset!r}; it must be between 14 and {newest}, or None.")
    for name, value, choices in (("graph", graph, GRAPHS), ("runtime", runtime, RUNTIMES)):
        if value not in choices:
            raise NMError(f"{name} is {value!r}; it must be one of {', '.join(choices)}.")
    source = Path(folder)
    reason = "the traced graph was asked for." if graph == "traced" else _no_fused_graph(source, task, opset)
    if reason and (graph == "fused" or runtime == "genai"):
        raise NMError(f"{source} cannot be exported so: {reason}")
    if reason and graph == "auto":
        logger.warning("Exporting the traced graph, which is slower: %s", reason)

    def make_graph(checkpoint: PackedCheckpoint) -> onnx.ModelProto:
        if reason:
            return traced_graph(checkpoint, task, accuracy_level, opset)
        from .fused import fused_graph

        return fused_graph(checkpoint, accuracy_level, last_logits=runtime == "genai")

    if output is None or Path(output).resolve() == source.resolve():
        return _export_into(source, make_graph, runtime, fallback)
    with output_folder(output, overwrite) as target:
        _copy_checkpoint(source, target)
        _export_into(target, make_graph, runtime, fallback)
    return Path(output) / MODEL_FILE


def _no_fused_graph(folder: Path, task: str, opset: int | None) -> str:
    """Why there is no fused graph for this, in a sentence; an empty one if there is."""
    if task != TASKS[0]:
        return f"there is no fused graph for the task {task!r}."
    if opset is not None:
        return f"there is no fused graph of opset {opset}; leave it out."
    if importlib.util.find_spec("mobius") is None:
        return "there is no fused graph without mobius-onnx, which `pip install optimum-nm[genai]` brings."
    from .fused import no_fused_graph

    open_checkpoint(folder)  # what is no checkpoint is refused as such
    return no_fused_graph(folder) or ""


def _export_into(
    folder: Path, make_graph: Callable[[PackedCheckpoint], onnx.ModelProto], runtime: str, fallback: bool
) -> Path:
    """Write what `make_graph` makes of the checkpoint in `folder`, and what the runtime needs, beside its weights."""
    checkpoint = open_checkpoint(folder)
    check_files(checkpoint)
    model = make_graph(checkpoint)
    if DOMAIN not in {entry.domain for entry in model.opset_import}:
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, VERSION))
    if fallback:
        add_fallback(model)
    path = folder / MODEL_FILE
    with checked_model(model, path):
        if runtime == "genai":
            add_genai_files(folder, model.graph)
    return path


@contextmanager
def checked_model(model: onnx.ModelProto, path: Path) -> Iterator[None]:
    """Check a model, whose external data lies in the folder of `path`; it takes that name when the `with` block ends.

    Raises:
        NMError: the folder cannot be written.
    """
    temporary = None
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(descriptor)
        temporary = Path(name)
        temporary.write_bytes(model.SerializeToString(deterministic=True))
        ours = {entry.domain for entry in model.opset_import} <= {"", DOMAIN}  # and no domain whose schemas onnx lacks
        check_file(temporary, check_custom_domain=ours)
        yield
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes it private
        temporary.rename(path)
    except OSError as error:
        raise NMError(f"{path.parent} cannot be written ({error.strerror}).") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _copy_checkpoint(source: Path, target: Path) -> None:
    """Copy all files but ONNX ones; links are followed, because ONNX readers refuse those that leave the folder."""
    if not source.is_dir():
        raise NMError(f"{source} is no folder; a packed checkpoint is needed.")
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix != ".onnx":
            shutil.copyfile(file, target / file.name)
