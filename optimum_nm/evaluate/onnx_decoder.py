"""A causal language model in a bare ONNX Runtime session, with or without a key-value cache."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from ..errors import NMError

NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}
SESSION_ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)
PAST, PRESENT = "past_key_values", "present"


class OnnxDecoder:
    """Runs `model.onnx` of Optimum's or onnxruntime-genai's layout, batch 1, and keeps the cache between calls.

    Args:
        path: the ONNX file.
        options: of the session; those of `optimum_nm.session_options` for a packed model.
        provider: execution provider, in front of the CPU's.

    Raises:
        NMError: there is no such file, ONNX Runtime refuses it, or it is not a causal language model.
    """

    def __init__(self, path: Path, options: onnxruntime.SessionOptions, provider: str = "CPUExecutionProvider") -> None:
        if not path.is_file():
            raise NMError(f"{path} does not exist; `optimum-cli nm export` writes it.")
        if provider not in onnxruntime.get_available_providers():
            have = ", ".join(onnxruntime.get_available_providers())
            raise NMError(f"{provider} is not part of this onnxruntime, which has {have}.")
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
        except SESSION_ERRORS as error:
            raise NMError(f"ONNX Runtime cannot load {path}: {error}") from None
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        outputs = [value.name for value in self.session.get_outputs()]
        self.past_names = [name for name in self.inputs if name.startswith(PAST)]
        present = [name.replace(PAST, PRESENT, 1) for name in self.past_names]
        known = {"input_ids", "attention_mask", "position_ids", *self.past_names}
        if "input_ids" not in self.inputs or self.inputs.keys() - known or not {"logits", *present} <= set(outputs):
            raise NMError(f"{path} has inputs {', '.join(self.inputs)}; a causal language model is needed.")
        self.output_names = ["logits", *present]
        is_open = any(isinstance(self.inputs[name].shape[-1], str) for name in self.past_names)
        self.head_size = _head_size(path) if is_open else 0
        self.reset()

    def reset(self) -> None:
        """Forget the tokens read so far."""
        self.length = 0
        self.cache = [self._ort_value(self._empty_cache(name)) for name in self.past_names]

    def read(self, tokens: list[int]) -> npt.NDArray[Any]:
        """Logits `[len(tokens), vocabulary]` after each of the tokens, which follow those read before.

        Raises:
            NMError: the graph has no cache and tokens were read before.
        """
        if self.length and not self.past_names:
            raise NMError("model.onnx has no key-value cache; export it with the task text-generation-with-past.")
        feeds = {name: self._ort_value(array) for name, array in self._token_inputs(tokens).items()}
        feeds |= dict(zip(self.past_names, self.cache, strict=True))
        logits, *self.cache = self.session.run_with_ort_values(self.output_names, feeds)
        self.length += len(tokens)
        return logits.numpy()[0]

    def generate(self, prompt: list[int], count: int) -> list[int]:
        """The `count` most likely tokens after the prompt, one by one."""
        self.reset()
        chosen = [int(self.read(prompt)[-1].argmax())]
        while len(chosen) < count:
            chosen.append(int(self.read(chosen[-1:])[-1].argmax()))
        return chosen

    def _token_inputs(self, tokens: list[int]) -> dict[str, npt.NDArray[Any]]:
        total = self.length + len(tokens)
        values = {"input_ids": tokens, "attention_mask": [1] * total, "position_ids": range(self.length, total)}
        return {
            name: np.array([values[name]], dtype=NUMPY_TYPES[self.inputs[name].type])
            for name in values
            if name in self.inputs
        }

    def _empty_cache(self, name: str) -> npt.NDArray[Any]:
        *sizes, head_size = self.inputs[name].shape
        shape = [size if isinstance(size, int) else 1 if "batch" in str(size) else 0 for size in sizes]
        shape.append(head_size if isinstance(head_size, int) else self.head_size)
        assert math.prod(shape) == 0, f"{name} {shape}"
        return np.empty(shape, dtype=NUMPY_TYPES[self.inputs[name].type])

    @staticmethod
    def _ort_value(array: npt.NDArray[Any]) -> onnxruntime.OrtValue:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _head_size(path: Path) -> int:
    """Elements of a key or value, which graphs of onnxruntime-genai's model builder leave open."""
    config = path.with_name("genai_config.json")
    try:
        return int(json.loads(config.read_text())["model"]["decoder"]["head_size"])
    except (OSError, ValueError, KeyError, TypeError):
        raise NMError(f"{path} leaves the size of an attention head open; {config} must tell (head_size).") from None
