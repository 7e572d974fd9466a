"""One row of a report: `python -m optimum_nm.report.measure`, a process of its own, so that its memory is its own.

Reads the task, a JSON object, from the first line of standard input, and writes the result, another, to the file that
the task names. When standard input closes, whoever asked has ended, and so does this process.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from ..calibration.sources import read_documents
from ..errors import NMError
from ..evaluate.inspect import inspect_checkpoint
from ..evaluate.perplexity import evaluate_loaded, evaluate_torch
from ..evaluate.whole_file import write_text
from ..memory import memory_bytes
from ..optimizer import NMOptimizer
from .matrix import Row
from .setting import Setting
from .unstructured import stored_dense, unstructured_solver


def measure(row: Row, setting: Setting, checkpoint: Path) -> dict[str, Any]:
    """Sparsify, pack and evaluate one row.

    Args:
        checkpoint: where the packed model is put, in place of what is there.

    Returns:
        perplexity, as `Perplexity.to_dict`; of a row that is sparsified, also summary (SparsificationSummary.to_dict),
        sparsify_seconds, peak_bytes of this process, and device_peak_bytes of its GPU; of one that is packed, also
        bits_per_weight (of the packed layers) and model_bytes (of the files that hold weights).

    Raises:
        NMError: the model, the texts and the configuration do not go together.
    """
    documents = read_documents(setting.text, "evaluation")
    protocol: dict[str, Any] = {"window": setting.window, "stride": setting.stride, "limit": setting.tokens}
    if row.config is None:
        protocol |= {"load_options": setting.load_options, "device": setting.device}
        return {"perplexity": evaluate_torch(setting.model, documents, **protocol).to_dict()}
    optimizer = NMOptimizer.from_pretrained(setting.model, dtype=setting.dtype, **setting.load_options)
    if row.unstructured is not None:
        solve = unstructured_solver(row.config, row.unstructured)
        stored = stored_dense(row.config)
        _, summary = optimizer.sparsify(stored, setting.calibration, device=setting.device, solve=solve)
    else:
        summary = optimizer.optimize(checkpoint, row.config, setting.calibration, overwrite=True, device=setting.device)
    result = {
        "summary": summary.to_dict(),
        "sparsify_seconds": summary.seconds,
        "peak_bytes": memory_bytes()[1],
        "device_peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }
    if row.unstructured is not None:
        model = optimizer.model.float()
        perplexity = evaluate_loaded(row.name, model, optimizer.tokenizer, documents, **protocol)
        return result | {"perplexity": perplexity.to_dict()}
    del optimizer
    totals = inspect_checkpoint(checkpoint).totals()
    perplexity = evaluate_torch(str(checkpoint), documents, **protocol, device=setting.device)
    return result | {
        "perplexity": perplexity.to_dict(),
        "bits_per_weight": totals["bits_per_weight"],
        "model_bytes": totals["file_bytes"],
    }


def run_task(task: dict[str, Any]) -> None:
    """Measure what `runner.measure_apart` asks for, and write the result."""
    row = Row.read(task["name"], task["row"], {})
    result = measure(row, Setting.from_dict(task["setting"]), Path(task["checkpoint"]))
    write_text(Path(task["result"]), json.dumps({**task["identity"], **result}, indent=2) + "\n")


def end_with_input() -> None:
    """Wait until standard input closes, and end the process.

    It reads from the descriptor: a thread that waits in sys.stdin would hold its lock when the process ends by itself.
    """
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    task = json.loads(sys.stdin.readline())
    threading.Thread(target=end_with_input, daemon=True).start()
    try:
        run_task(task)
    except NMError as error:
        sys.exit(" ".join(str(error).split()))
