"""Tasks of lm-eval (EleutherAI's evaluation harness), in torch or in ONNX Runtime."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import NMError
from ..nn.modeling import load_tokenizer
from ..runtime.session import session_options
from .onnx_decoder import SESSION_ERRORS
from .perplexity import load_model
from .tables import format_table


@dataclass(frozen=True)
class TaskResult:
    """What a model reached in one metric of a task.

    Attributes:
        metric: as lm-eval calls it, with the filter of the answers behind it if there is one: `exact_match,strict`.
        error: standard error of `value`; None where lm-eval gives none.
        samples: questions that were asked.
    """

    model: str
    runtime: str
    task: str
    metric: str
    value: float
    error: float | None
    samples: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_tasks(
    model: str,
    tasks: Sequence[str],
    include_path: str | Path | None = None,
    *,
    runtime: str = "torch",
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    device: str = "cpu",
    dtype: str = "float32",
    load_options: dict[str, Any] | None = None,
) -> list[TaskResult]:
    """Run tasks of lm-eval on a causal language model, dense or packed.

    Args:
        model: folder or name on the Hugging Face Hub; with runtime "onnxruntime" a folder that holds model.onnx and the
            tokenizer.
        tasks: names of tasks, groups or tags.
        include_path: folder of further tasks in YAML files, which win over those of lm-eval.
        num_fewshot: examples in front of each question; what the task says if None.
        limit: only so many questions of each task.
        batch_size: questions read at once.
        load_options: further arguments of `from_pretrained`, in torch.

    Raises:
        NMError: lm-eval is not installed, there is no such task or model, or lm-eval cannot run it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise NMError("lm-eval is not installed; `pip install optimum-nm[tasks]` brings it.")
    from lm_eval import simple_evaluate

    manager = _task_manager(tasks, include_path)
    load = _torch_model if runtime == "torch" else _onnx_model
    evaluated = load(model, batch_size, device, dtype, load_options or {})
    try:
        found = simple_evaluate(
            evaluated,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=False,
        )
    except NMError:
        raise
    except Exception as error:  # of any kind: a task's templates and data are programs of their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise NMError(f"lm-eval cannot run {', '.join(tasks)} on {model}: {reason}") from error
    assert found is not None  # it is on other ranks of several processes
    return list(_results(model, runtime, found))


def format_tasks(results: list[TaskResult]) -> str:
    """A table with a row for each."""
    rows = [
        [
            result.task,
            result.model,
            result.runtime,
            result.metric,
            f"{result.value:.4f}",
            "" if result.error is None else f"± {result.error:.4f}",
            str(result.samples),
        ]
        for result in results
    ]
    return format_table(["task", "model", "runtime", "metric", "value", "", "samples"], rows)


def _task_manager(tasks: Sequence[str], include_path: str | Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise NMError(f"{include_path} is no folder; one with the YAML files of tasks is needed.")
    path = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=path, include_defaults=path is None)
    if set(tasks) - set(manager.all_tasks) and path is not None:  # its own take seconds to find
        manager = TaskManager(include_path=path)
    for task in tasks:
        if task not in manager.all_tasks:
            where = "lm-eval" if path is None else f"{path} and lm-eval"
            raise NMError(f"task {task!r} is not one of {where}, which `lm-eval ls tasks` lists.")
    return manager


def _torch_model(model: str, batch_size: int, device: str, dtype: str, load_options: dict[str, Any]) -> Any:
    from lm_eval.models.huggingface import HFLM

    loaded, tokenizer = load_model(model, dtype, load_options)
    return HFLM(loaded.to(device), tokenizer=tokenizer, backend="causal", batch_size=batch_size)  # type: ignore[arg-type]


def _onnx_model(model: str, batch_size: int, device: str, dtype: str, load_options: dict[str, Any]) -> Any:
    if importlib.util.find_spec("optimum.onnxruntime") is None:
        raise NMError("optimum-onnx is not installed; `pip install optimum-nm[onnx]` brings it.")
    from lm_eval.models.huggingface import HFLM
    from optimum.onnxruntime import ORTModelForCausalLM

    class OnnxLM(HFLM):
        def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
            logits = self.model(inps, attention_mask=inps.new_ones(inps.shape), use_cache=False).logits
            if logits.shape[1] != inps.shape[1]:
                raise NMError(f"{path} has the logits of the last token only; export it with --runtime onnxruntime.")
            return logits

    path = Path(model) / "model.onnx"
    if not path.is_file():
        raise NMError(f"{path} does not exist; `optimum-cli nm export` writes it.")
    provider = "CUDAExecutionProvider" if device.startswith("cuda") else "CPUExecutionProvider"
    try:
        loaded = ORTModelForCausalLM.from_pretrained(model, provider=provider, session_options=session_options())
    except (*SESSION_ERRORS, ValueError, OSError) as error:
        raise NMError(f"ONNX Runtime cannot load {path}: {str(error).splitlines()[0]}") from None
    # which Optimum reads for the model types it lists only, Mixtral not among them
    loaded.num_key_value_heads = getattr(loaded.config, "num_key_value_heads", loaded.num_key_value_heads)
    return OnnxLM(loaded, tokenizer=load_tokenizer(model), backend="causal", batch_size=batch_size)


def _results(model: str, runtime: str, found: dict[str, Any]) -> Any:
    """lm-eval has `{"acc,none": 0.5, "acc_stderr,none": 0.1, …}` for each task."""
    for task, metrics in found["results"].items():
        samples = found["n-samples"].get(task, {}).get("effective", metrics.get("sample_len", 0))
        for name, value in metrics.items():
            metric, _, answers = name.partition(",")
            if not answers or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = metrics.get(f"{metric}_stderr,{answers}")
            error = float(error) if isinstance(error, (int, float)) else None
            label = metric if answers == "none" else name
            yield TaskResult(model, runtime, task, label, float(value), error, samples)
