"""Optimum's description of what a model's graph takes and gives for a task, corrected where exports fail by it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

from transformers import PretrainedConfig

from ..errors import NMError

# Mixtures of experts that Optimum does not know, with models it does whose graphs take and give the same.
DESCRIBED_AS = {"mixtral": "mistral", "olmoe": "olmo2", "qwen2_moe": "qwen2"}
TASKS = ("text-generation-with-past", "text-generation", "feature-extraction-with-past", "feature-extraction")


def onnx_config_factory(model_type: str, task: str) -> Callable[[PretrainedConfig], Any]:
    """What makes Optimum's OnnxConfig for a task, one of TASKS, from a model's configuration.

    Raises:
        NMError: there is no exporter, or it does not support the model type or the task.
    """
    if importlib.util.find_spec("optimum.exporters.onnx") is None:
        raise NMError("optimum-onnx is not installed; `pip install optimum-nm[onnx]` brings it.")
    import optimum.exporters.onnx.model_configs  # noqa: F401  it registers the model types
    from optimum.exporters.tasks import TasksManager

    try:
        supported = TasksManager.get_supported_tasks_for_model_type(
            DESCRIBED_AS.get(model_type, model_type), "onnx", library_name="transformers"
        )
    except KeyError:
        raise NMError(f"model type {model_type!r} is not one that Optimum's exporter supports.") from None
    if task not in supported:
        raise NMError(f"task {task!r} is not one that Optimum's exporter supports for model type {model_type!r}.")
    return partial(_onnx_config, supported[task].func, task)


def _onnx_config(described: Any, task: str, config: PretrainedConfig) -> Any:
    from optimum.utils.input_generators import DummyPastKeyValuesGenerator, MistralDummyPastKeyValuesGenerator

    if not task.endswith("-with-past"):
        return described(config, task=task)
    if task.startswith("feature-extraction"):
        described = _as_generation(described)
    onnx_config = described(config, task="text-generation", use_past=True, use_past_in_inputs=True)
    if "num_key_value_heads" in signature(type(config).__init__).parameters:
        # Phi's sample inputs have a cache with as many heads as there are queries
        onnx_config.DUMMY_INPUT_GENERATOR_CLASSES = tuple(
            MistralDummyPastKeyValuesGenerator if generator is DummyPastKeyValuesGenerator else generator
            for generator in onnx_config.DUMMY_INPUT_GENERATOR_CLASSES
        )
    return onnx_config


def _as_generation(described: Any) -> Any:
    """The class with what text-generation takes, and hidden states in the place of logits.

    Left to itself Optimum traces feature-extraction with one new token and an attention mask for the cached ones alone:
    OPT, which counts positions by the mask, does not get through.
    """

    class HiddenStates(described):  # type: ignore[misc]
        @property
        def outputs(self) -> dict[str, dict[int, str]]:
            outputs = super().outputs
            return {"last_hidden_state" if name == "logits" else name: axes for name, axes in outputs.items()}

    return HiddenStates
